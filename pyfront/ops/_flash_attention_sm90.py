"""Flash attention on Hopper's own instructions (csrc/cuda/flash_attention_sm90.cu): which calls it takes.

It has run in an emulation, on no device: nothing takes it by default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusetune import _native

if TYPE_CHECKING:
    from fusetune.ops.flash_attention import Arguments

_LARGEST = 2**31 - 1


def why_not(a: Arguments, q: Tensor, k: Tensor, v: Tensor, **others: Tensor) -> str | None:
    """Why the kernel cannot take a call, or None where it can. The caller sees to it that the GPU is one of Hopper's.

    Args:
        a: the call's arguments besides tensors.
        q, k, v, others: o, and in backward grad_o, dq, dk and dv, all [B, H, S, D] with neighbouring elements in the
            last dimension.
    """
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q must be bfloat16 or float16, got {q.dtype}"
    if q.shape[3] not in (64, 128) or v.shape[3] != q.shape[3]:
        return f"head dimensions must be 64 or 128 and equal, got {q.shape[3]}, {v.shape[3]}"
    given = [name for name in ("keep", "mask", "bias", "relative", "sinks", "q_starts") if getattr(a, name) is not None]
    given += [name for name in ("softcap", "dropout_p") if getattr(a, name)]
    if given:
        return f"there must be no {', '.join(given)}"
    if a.left != -1 or a.right not in (-1, 0):
        return f"window must be none or causal, got ({a.left}, {a.right})"
    if a.scale <= 0:
        return f"scale must be positive, got {a.scale}"
    for name, t in {"q": q, "k": k, "v": v, **others}.items():
        if not 0 < t.numel() or max(t.shape) > _LARGEST:
            return f"{name} must have sizes from 1 to {_LARGEST}, got {list(t.shape)}"
        strides = [stride for stride, size in zip(t.stride()[:3], t.shape, strict=False) if size > 1]
        if t.data_ptr() % 16 or any(stride % 8 or stride < t.shape[3] for stride in strides):
            return f"{name} must have rows at multiples of 16 bytes, got strides {t.stride()}"
    return None


def forward(call: Any, stream: int) -> None:
    """Runs it for the arguments of csrc/flash_attention.h."""
    _native.extension().cuda_flash_attention_sm90_forward(call, stream)


def backward(call: Any, q: Tensor, stream: int) -> None:
    """The same for dq, dk and dv."""
    extension = _native.extension()
    workspace = q.new_empty(extension.cuda_flash_attention_sm90_workspace(*q.shape[:3]), dtype=torch.float32)
    extension.cuda_flash_attention_sm90_backward(call, workspace.data_ptr(), stream)
