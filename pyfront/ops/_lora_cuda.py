"""The CUDA launchers of csrc/lora.h, with the signatures of the Triton functions in kernels/lora.py, which say what the
arguments are."""

from __future__ import annotations

import torch
from torch import Tensor

from fusetune import _native
from fusetune._native import address, code


def down(t: Tensor, w: Tensor, out: Tensor, factor: float, dropout_p: float, seed: Tensor | None) -> None:
    w = _one_unit_stride(w)
    with _native.current_stream(t.device) as stream:
        _native.extension().cuda_lora_down(
            *(address(t), address(w), address(out)),
            *(*t.shape, out.shape[1], t.stride(0), *w.stride(), out.stride(0)),
            *(factor, dropout_p, address(seed), _masks(seed)),
            *(code(t.dtype), code(w.dtype), stream),
        )


def up(
    t: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    factor: float,
    dropout_p: float,
    seed: Tensor | None,
    accumulate: bool,
) -> None:
    w = _one_unit_stride(w)
    with _native.current_stream(out.device) as stream:
        _native.extension().cuda_lora_up(
            *(address(t), address(w), address(bias), address(out)),
            *(*out.shape, t.shape[1], t.stride(0), *w.stride(), out.stride(0)),
            *(factor, dropout_p, address(seed), _masks(seed), accumulate),
            *(code(out.dtype), code(w.dtype), code(out.dtype if bias is None else bias.dtype), stream),
        )


def outer(
    t: Tensor, u: Tensor, out: Tensor, factor: float, dropout_p: float, seed: Tensor | None, dot_dtype: torch.dtype
) -> None:
    sizes = (*u.shape, t.shape[1])
    with _native.current_stream(u.device) as stream:
        workspace = t.new_empty(_native.extension().cuda_lora_outer_workspace(*sizes, dropout_p, _masks(seed)))
        _native.extension().cuda_lora_outer(
            *(address(t), address(u), address(out), address(workspace)),
            *(*sizes, t.stride(0), u.stride(0), *out.stride()),
            *(factor, dropout_p, address(seed), _masks(seed)),
            *(code(u.dtype), code(dot_dtype), code(out.dtype), stream),
        )


def _masks(seed: Tensor | None) -> int:
    return 1 if seed is None else seed.numel()


def _one_unit_stride(w: Tensor) -> Tensor:
    return w if 1 in w.stride() else w.contiguous()
