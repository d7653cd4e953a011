"""LoRA linear: y = x w^T + bias + scale dropout(x) a^T b^T. The maths and its costs are in csrc/lora.h."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusetune import _native
from fusetune._check import check, check_device, check_dtype, check_probability, check_shape
from fusetune._register import register
from fusetune.backend import choose, gemm_dtype
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale


def lora_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Linear layer with a low-rank adapter (Hu et al., arXiv 2106.09685, section 4.1); w is frozen.

    Saves x by reference and an [M, R] product for backward; the dropout mask is recomputed from a seed drawn from
    torch's generator.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        w: [N, K] frozen weight, of x's dtype.
        a: [R, K] down projection, of x's dtype or float32.
        b: [N, R] up projection, of a's dtype.
        scale: factor of the adapter (alpha / R in PEFT).
        bias: [N], of x's dtype.
        dropout_p: probability of dropping an element of the adapter's input.

    Returns:
        [..., N], of x's dtype. Under autocast x, w and bias are cast first.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes that do not fit, tensors on different devices, scale not finite, dropout_p not in [0, 1], or
            w requiring grad.
        NotImplementedError: no backend works on x's device.
    """
    backend = choose("lora", x.device)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, w, a, b, scale, bias, dropout_p)
    if backend == "reference":
        seed = int(draw_seed(x.device)) if dropout_p else 0
        return lora_linear_reference(x, w, a, b, scale, bias, dropout_p, seed=seed)
    y: Tensor = _LoraLinear.apply(x[None].flatten(0, -2), w, a, b, bias, float(scale), float(dropout_p))
    return y.view(*x.shape[:-1], w.shape[0])


def lora_linear_reference(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int = 0,
) -> Tensor:
    """`lora_linear` in plain torch, with the dropout mask of `seed`. Any floating dtype; gradients by autograd."""
    h = x.to(a.dtype)
    if dropout_p:
        rows = torch.arange(x.numel() // x.shape[-1], device=x.device).view(x.shape[:-1])
        h = h * keep_mask(seed, rows, x.shape[-1], dropout_p) * kept_scale(dropout_p)
    return (F.linear(x, w, bias) + scale * F.linear(F.linear(h, a), b)).to(x.dtype)


def _check(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None, dropout_p: float) -> None:
    op = "lora_linear"
    check_dtype(op, "x", x)
    check_dtype(op, "w", w, [x.dtype])
    check_dtype(op, "a", a, list(dict.fromkeys([x.dtype, torch.float32])))
    check_dtype(op, "b", b, [a.dtype])
    check(x.dim() >= 1, ValueError, f"{op}: x must have at least 1 dimension, got 0")
    check_shape(op, "w", w, ["N", x.shape[-1]])
    check_shape(op, "a", a, ["R", x.shape[-1]])
    check_shape(op, "b", b, [w.shape[0], a.shape[0]])
    for name, tensor in (("w", w), ("a", a), ("b", b)):
        check_device(op, name, tensor, x.device)
    if bias is not None:
        check_dtype(op, "bias", bias, [x.dtype])
        check_shape(op, "bias", bias, [w.shape[0]])
        check_device(op, "bias", bias, x.device)
    check(not w.requires_grad, ValueError, f"{op}: w must be frozen, got requires_grad=True; use F.linear to train it")
    check(math.isfinite(scale), ValueError, f"{op}: scale must be finite, got {scale}")
    check_probability(op, "dropout_p", dropout_p)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, dropout_p: float
    ) -> Tensor:
        seed = draw_seed(x.device) if dropout_p else None
        y, s = _lora_forward(x, w, a, b, bias, scale, dropout_p, seed)
        ctx.save_for_backward(x, w, a, b, s, seed)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, s, seed = ctx.saved_tensors
        needs_dx, _, needs_da, needs_db, needs_dbias, _, _ = ctx.needs_input_grad
        dx, da, db = _lora_backward(dy, x, w, a, b, s, ctx.scale, ctx.dropout_p, seed, needs_dx, needs_da, needs_db)
        return (
            dx if needs_dx else None,
            None,
            da if needs_da else None,
            db if needs_db else None,
            dy.sum(0) if needs_dbias else None,
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring elements within a row, as the kernels read it."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x, a, b = _rows(x), a.contiguous(), b.contiguous()
    bias = None if bias is None else bias.contiguous()
    backend = choose("lora", x.device)
    dtype = gemm_dtype(x.device.type, x.dtype) if backend == "cpu" else x.dtype
    y = x.new_empty(x.shape[0], w.shape[0], dtype=dtype)
    s = x.new_empty(x.shape[0], a.shape[0], dtype=torch.float32)
    tensors = [_native.address(t) for t in (x, a, b, bias, y, s)]
    sizes = (x.shape[0], w.shape[0], x.shape[1], a.shape[0], x.stride(0))
    if backend == "cpu":
        _native.extension().lora_forward(
            *tensors,
            *sizes,
            *(scale, dropout_p, 0 if seed is None else int(seed)),
            *map(_native.code, (x.dtype, a.dtype, y.dtype)),
            _native.threads(),
        )
    elif backend == "cuda":
        with _native.current_stream(x.device) as stream:
            _native.extension().cuda_lora_forward(
                *tensors,
                *sizes,
                *(scale, dropout_p, _native.address(seed)),
                *map(_native.code, (x.dtype, a.dtype)),
                stream,
            )
    else:
        from fusetune.kernels import lora as triton_lora

        triton_lora.forward(x, a, b, bias, y, s, scale, dropout_p, seed)
    y.addmm_(x.to(dtype), w.to(dtype).t())
    return y.to(x.dtype), s


def _backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_dx: bool,
    needs_da: bool,
    needs_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, a, b = _rows(dy), _rows(x), a.contiguous(), b.contiguous()
    backend = choose("lora", x.device)
    dtype = gemm_dtype(x.device.type, x.dtype) if backend == "cpu" else x.dtype
    dx = x.new_empty(x.shape if needs_dx else 0, dtype=dtype)
    da = a.new_empty(a.shape if needs_da else 0)
    db = b.new_empty(b.shape if needs_db else 0)
    tensors = [_native.address(t) for t in (dy, x, a, b, s)]
    tensors += [_native.address(t) if t.numel() else 0 for t in (dx, da, db)]
    sizes = (x.shape[0], w.shape[0], x.shape[1], a.shape[0])
    if backend == "cpu":
        _native.extension().lora_backward(
            *tensors,
            *sizes,
            *(dy.stride(0), x.stride(0)),
            *(scale, dropout_p, 0 if seed is None else int(seed)),
            *map(_native.code, (x.dtype, a.dtype, dx.dtype)),
            _native.threads(),
        )
    elif backend == "cuda":
        with _native.current_stream(x.device) as stream:
            workspace = s.new_empty(_native.extension().cuda_lora_workspace(*sizes))
            _native.extension().cuda_lora_backward(
                *tensors,
                _native.address(workspace),
                *sizes,
                *(dy.stride(0), x.stride(0)),
                *(scale, dropout_p, _native.address(seed)),
                *map(_native.code, (x.dtype, a.dtype)),
                stream,
            )
    else:
        from fusetune.kernels import lora as triton_lora

        triton_lora.backward(dy, x, a, b, s, dx, da, db, scale, dropout_p, seed)
    if needs_dx:
        dx.addmm_(dy.to(dtype), w.to(dtype))
    return dx.to(x.dtype), da, db


def _fake_forward(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], a.shape[0], dtype=torch.float32)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_dx: bool,
    needs_da: bool,
    needs_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_dx else 0),
        a.new_empty(a.shape if needs_da else 0),
        b.new_empty(b.shape if needs_db else 0),
    )


_lora_forward: Callable[..., tuple[Tensor, Tensor]] = register(
    "lora_forward(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scale, float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_lora_backward = register(
    "lora_backward(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor s, float scale, float dropout_p,"
    " Tensor? seed, bool needs_dx, bool needs_da, bool needs_db) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
