"""LoRA linear, forward and backward, against the frozen layer alone and PEFT's formula.

lora_tax = t(LoRA) / t(frozen linear: y and dx) - 1. Its floor is the adapter's share of the flops, 1.5 R (1/K + 1/N).
"""

from __future__ import annotations

from typing import Any

import pytest
import timer
import torch
import torch.nn.functional as F

from fusetune.backend import gemm_dtype
from fusetune.ops import lora_linear, lora_linear_reference

SHAPES = [  # M, K, N
    (4096, 384, 384),
    (4096, 384, 1536),
    (1024, 768, 768),
    (2048, 2048, 2048),
    (2048, 2048, 5632),
    (1024, 4096, 4096),
]
RANK = 16


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_lora_linear(
    benchmark: Any, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, dropout_p: float
) -> None:
    M, K, N = shape
    if gemm_dtype(device.type, dtype) != dtype and M * K * N > 4e9:
        pytest.skip(f"torch emulates {dtype} products here: its step takes minutes")
    torch.manual_seed(0)
    x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
    w = (torch.randn(N, K, device=device) / K**0.5).to(dtype)
    a = (torch.randn(RANK, K, device=device) / K**0.5).requires_grad_()  # float32, as PEFT keeps adapters
    b = (torch.randn(N, RANK, device=device) / RANK**0.5).requires_grad_()
    dy = torch.randn(M, N, device=device).to(dtype)

    def frozen() -> Any:
        return torch.autograd.grad(F.linear(x, w), x, dy)

    def peft() -> Any:
        y = F.linear(x, w) + F.linear(F.linear(F.dropout(x.to(a.dtype), dropout_p), a), b) * 2.0
        return torch.autograd.grad(y.to(dtype), (x, a, b), dy)

    def ours() -> Any:
        return torch.autograd.grad(lora_linear(x, w, a, b, 2.0, dropout_p=dropout_p), (x, a, b), dy)

    y, expected = lora_linear(x, w, a, b, 2.0), lora_linear_reference(x, w, a, b, 2.0)
    assert (y - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.norm()
    timer.compare(
        *(benchmark, ours, {"frozen": frozen, "peft": peft}),
        **dict(op="lora_linear", shape=f"{M}x{K}x{N} r={RANK}", dtype=str(dtype)[6:], dropout_p=dropout_p),
        floor=round(1.5 * RANK * (1 / K + 1 / N), 4),
    )
    info = benchmark.extra_info
    info["lora_tax"] = round(1 / info["speedup_over_frozen"] - 1, 4)
    info["peft_tax"] = round(info["speedup_over_peft"] / info["speedup_over_frozen"] - 1, 4)
