"""DoRA layers, forward and backward, against the same layer with LoRA and against PEFT's layer with DoRA.

dora_over_lora = t(DoRA) / t(LoRA), both patched. What DoRA adds is a pass over w for the norms, and passes over y; with
dropout a second product with w, as in PEFT.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timer
import torch
from bench_lora import RANK, SHAPES, agree, layers, saved_bytes, step

from fusetune import patch
from fusetune.backend import gemm_dtype


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_dora_linear(
    benchmark: Any, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, dropout_p: float
) -> None:
    M, K, N = shape
    if gemm_dtype(device.type, dtype) != dtype and M * K * N > 4e9:
        pytest.skip(f"torch emulates {dtype} products here: its step takes minutes")
    _, stock = layers(device, [(K, N)], dtype, lora_dropout=dropout_p, use_dora=True)
    _, lora = layers(device, [(K, N)], dtype, lora_dropout=dropout_p)
    ours = copy.deepcopy(stock)
    for modules in (ours, lora):
        patch(modules, ops=["lora"], strict=True)
    x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
    dys = [torch.randn(M, N, device=device).to(dtype)]
    agree(ours, stock, x, dys)
    timer.compare(
        *(benchmark, lambda: step(ours, x, dys)),
        {"peft": lambda: step(stock, x, dys), "lora": lambda: step(lora, x, dys)},
        **dict(op="dora_linear", shape=f"{M}x{K}x{N} r={RANK}", dtype=str(dtype)[6:], dropout_p=dropout_p),
        saved_bytes=saved_bytes(ours, x),
        peft_saved_bytes=saved_bytes(stock, x),
    )
    info = benchmark.extra_info
    info["dora_over_lora"] = round(1 / info["speedup_over_lora"], 4)
