"""Attention, forward and backward, against torch's scaled_dot_product_attention.

Useful flops: 14 B H S^2 D, halved for causal, and of real tokens only for padding.
"""

from __future__ import annotations

from typing import Any

import pytest
import timer
import torch
import torch.nn.functional as F

from fusetune.ops import flash_attention

CELLS = [  # B, H, Hkv, S, D
    (32, 12, 12, 128, 32),
    (8, 12, 12, 512, 64),
    (2, 9, 3, 512, 64),
    (1, 8, 8, 2048, 128),
]
MASKS = ["full", "causal", "padded"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "x".join(map(str, cell)))
def test_flash_attention(
    benchmark: Any,
    device: torch.device,
    cell: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    mask: str,
    dropout_p: float,
) -> None:
    B, H, Hkv, S, D = cell
    if mask == "padded" and B == 1:
        pytest.skip("a batch of one is not padded")
    torch.manual_seed(0)

    def tensor(heads: int) -> torch.Tensor:  # [B, heads, S, D] in the layout of a projection's output
        return torch.randn(B, S, heads, D, device=device).to(dtype).transpose(1, 2)

    q, k, v = tensor(H).requires_grad_(), tensor(Hkv).requires_grad_(), tensor(Hkv).requires_grad_()
    grad_o = tensor(H)
    lengths = torch.linspace(0.15, 1.0, B, device=device) * S
    keep = torch.arange(S, device=device) < lengths[:, None] if mask == "padded" else None
    bias = None if keep is None else keep[:, None, None, :]

    def stock(p: float = dropout_p) -> Any:
        o = F.scaled_dot_product_attention(
            *(q, k, v, bias), is_causal=mask == "causal", dropout_p=p, enable_gqa=H != Hkv
        )
        return torch.autograd.grad(o, (q, k, v), grad_o)

    def ours(p: float = dropout_p) -> Any:
        o = flash_attention(q, k, v, causal=mask == "causal", key_padding_mask=keep, dropout_p=p)
        return torch.autograd.grad(o, (q, k, v), grad_o)

    for grad, expected in zip(ours(0.0), stock(0.0), strict=True):
        assert (grad - expected).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * expected.norm()
    pairs = S * S * B / (2 if mask == "causal" else 1) if keep is None else float(S * keep.sum())
    timer.compare(
        *(benchmark, ours, {"stock": stock}),
        **dict(op="flash_attention", shape=f"B={B} H={H}/{Hkv} S={S} D={D}", mask=mask),
        **dict(dtype=str(dtype)[6:], dropout_p=dropout_p),
    )
    benchmark.extra_info["gflops"] = round(14 * pairs * H * D / benchmark.extra_info["ours_ms"] / 1e6, 1)
