"""Which calls of flash attention csrc/cuda/flash_attention.cu takes, and how it wants their tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fusetune.ops.flash_attention import Arguments


def cuda_refuses(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> str | None:
    """Why the CUDA kernels, which are made for speed, do not take a call, or None. Triton's take all."""
    for name, given in (
        ("mask", a.mask is not None),
        ("bias", a.bias is not None),
        ("relative_bias", a.relative is not None),
        ("sinks", a.sinks is not None),
        ("softcap", a.softcap != 0),
    ):
        if given:
            return f"{name} must be None, which Triton takes"
    if q.dtype == torch.float32:
        return "q must be bfloat16 or float16, got float32, which Triton takes"
    if not a.scale > 0:
        return f"scale must be positive, got {a.scale}, which Triton takes"
    for name, size in (("D", q.shape[3]), ("Dv", v.shape[3])):
        if size % 8 or not 8 <= size <= 128:
            return f"{name} must be a multiple of 8 from 8 to 128, got {size}, which Triton takes"
    return None


def aligned(x: Tensor) -> Tensor:
    """x with rows at multiples of 16 bytes, as the CUDA kernels read it."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    if x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)
