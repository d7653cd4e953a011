"""Dequantising a layer against bitsandbytes. Bytes an element: NF4 reads 0.52, int8 1; either writes 4 or 2."""

from __future__ import annotations

from typing import Any

import pytest
import timer
import torch

from fusetune.nn.quantize import quantizer
from fusetune.ops import dequantize

SHAPES = [(768, 768), (4096, 4096), (14336, 4096)]  # N, K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dequantize(
    benchmark: Any, device: torch.device, quantize: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    w = torch.randn(shape, device=device)
    q = quantizer(quantize)(w)
    if quantize == "nf4":
        codes, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        state.dtype = dtype

    def theirs() -> torch.Tensor:
        if quantize == "nf4":
            return bnb.functional.dequantize_4bit(codes, state)
        return bnb.functional.int8_vectorwise_dequant(q.codes, q.absmax).to(dtype)

    torch.testing.assert_close(dequantize(q, dtype), theirs())
    timer.compare(
        *(benchmark, lambda: dequantize(q, dtype), {"bitsandbytes": theirs}),
        **dict(op="dequantize", shape=f"{quantize} {shape[0]}x{shape[1]}", dtype=str(dtype)[6:]),
    )
    moved = q.nbytes + dtype.itemsize * w.numel()
    benchmark.extra_info["gbs"] = round(moved / benchmark.extra_info["ours_ms"] / 1e6, 1)
