"""DoRA linear: LoRA linear with the norms of its rows learned apart. The maths and its costs are in csrc/dora.h."""

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
from fusetune.backend import choose
from fusetune.ops.lora import _format, _lora_backward, _lora_forward, _rows, _tensors
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale


def dora_linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Linear layer with a weight-decomposed low-rank adapter (Liu et al., arXiv 2402.09353, eq. 5); w is frozen.

    The norms of w + scale b a are made from its blocks, which are never stored, and are not differentiated. Saves for
    backward x by reference, an [M, R] product, and the [M, N] product that the magnitudes scale. Dropout is PEFT's:
    what DoRA changes in the frozen layer's result is computed from the dropped x. That takes two products with w in
    place of one; the mask is recomputed from a seed drawn from torch's generator.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        w: [N, K] frozen weight, of x's dtype.
        a: [R, K] down projection, of x's dtype or float32.
        b: [N, R] up projection, of a's dtype.
        magnitude: [N] norms of the rows, float32 or of x's dtype.
        scale: factor of the adapter (alpha / R in PEFT).
        bias: [N], of x's dtype or float32.
        dropout_p: probability of dropping an element of the adapter's input.

    Returns:
        [..., N], of x's dtype. Under autocast x, w and bias are cast first.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes that do not fit, tensors on different devices, scale not finite, dropout_p not in [0, 1], or
            w requiring grad.
        NotImplementedError: no backend works on x's device.
    """
    backend = choose("dora", x.device)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, w, a, b, magnitude, scale, bias, dropout_p)
    if backend == "reference":
        seed = int(draw_seed(x.device)) if dropout_p else 0
        return dora_linear_reference(x, w, a, b, magnitude, scale, bias, dropout_p, seed=seed)
    g = magnitude.float() / _dora_norm(w, a.detach(), b.detach(), float(scale))
    bias = None if bias is None else bias.float()
    y: Tensor = _DoraLinear.apply(x[None].flatten(0, -2), w, a, b, g, bias, float(scale), float(dropout_p))
    return y.view(*x.shape[:-1], w.shape[0])


def dora_linear_reference(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int = 0,
) -> Tensor:
    """`dora_linear` in plain torch, as PEFT computes it, with the dropout mask of `seed`. Any floating dtype; gradients
    by autograd."""
    h, base = x.to(a.dtype), F.linear(x, w)
    scaled = base
    if dropout_p:
        rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
        h = h * keep_mask(seed, rows, x.shape[-1], dropout_p) * kept_scale(dropout_p)
        scaled = F.linear(h, w.to(h.dtype))
    norm = torch.linalg.vector_norm(w.to(a.dtype) + scale * (b @ a), dim=1).detach()
    g = magnitude / norm
    y = base + (g - 1) * scaled + g * scale * F.linear(F.linear(h, a), b)
    out: Tensor = y if bias is None else y + bias
    return out.to(x.dtype)


def _check(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout_p: float,
) -> None:
    op = "dora_linear"
    or_float32 = list(dict.fromkeys([x.dtype, torch.float32]))
    check_dtype(op, "x", x)
    check_dtype(op, "w", w, [x.dtype])
    check_dtype(op, "a", a, or_float32)
    check_dtype(op, "b", b, [a.dtype])
    check_dtype(op, "magnitude", magnitude, or_float32)
    check(x.dim() >= 1, ValueError, f"{op}: x must have at least 1 dimension, got 0")
    check_shape(op, "w", w, ["N", x.shape[-1]])
    check_shape(op, "a", a, ["R", x.shape[-1]])
    check_shape(op, "b", b, [w.shape[0], a.shape[0]])
    check_shape(op, "magnitude", magnitude, [w.shape[0]])
    if bias is not None:
        check_dtype(op, "bias", bias, or_float32)
        check_shape(op, "bias", bias, [w.shape[0]])
    for name, tensor in (("w", w), ("a", a), ("b", b), ("magnitude", magnitude), ("bias", bias)):
        if tensor is not None:
            check_device(op, name, tensor, x.device)
    check(not w.requires_grad, ValueError, f"{op}: w must be frozen, got requires_grad=True; train it without DoRA")
    check(math.isfinite(scale), ValueError, f"{op}: scale must be finite, got {scale}")
    check_probability(op, "dropout_p", dropout_p)


class _DoraLinear(torch.autograd.Function):
    """`kept` is the product that g scales: x w^T + scale x a^T b^T, or with dropout xd w^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        g: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout_p: float,
    ) -> Tensor:
        seed = draw_seed(x.device) if dropout_p else None
        weight, form = list(_tensors(w)), list(_format(w))
        if seed is None:
            (kept,), s = _lora_forward(x, weight, [None], [a], [b], form, [1], [scale], [0.0], None, False)
            y = _dora_forward(kept, g, bias, None)
        else:
            adapter = [a], [_scaled(b, g)], form, [1], [scale], [dropout_p], seed, False
            (rest,), s = _lora_forward(x, weight, [bias], *adapter)
            xd = _dora_dropout(x, dropout_p, seed)
            (kept,), _ = _lora_forward(xd, weight, [None], [], [], form, [0], [], [], None, False)
            y = _dora_forward(kept, g - 1, None, rest)
        ctx.save_for_backward(x, w, a, b, g, s, kept, seed)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, g, s, kept, seed = ctx.saved_tensors
        needs_dx, _, needs_da, needs_db, needs_dg, needs_dbias, _, _ = ctx.needs_input_grad

        weight, form = list(_tensors(w)), list(_format(w))

        def lora(dy: Tensor, b: Tensor, *needs: bool) -> tuple[Tensor, Tensor, Tensor]:
            options = form, [1], [ctx.scale], [ctx.dropout_p], seed, False
            wanted = needs[0], [needs[1]], [needs[2]]
            dx, (da,), (db,) = _lora_backward(x, [dy], weight, [a], [b], s, *options, *wanted)
            return dx, da, db

        dkept, dg, dbias = _dora_backward(dy, kept, g if seed is None else g - 1)
        if seed is not None:
            dx, da, db = lora(dy, _scaled(b, g), needs_dx, needs_da, needs_db or needs_dg)
            if needs_dg:
                dg += (b.float() * db).sum(1)  # sum_m dy (scale s b^T)
            if needs_dx:
                frozen: Any = [], [], s[:, :0], form, [0], [], [], None, False
                dxd, _, _ = _lora_backward(x, [dkept], weight, *frozen, True, [], [])
                dx = dx + _dora_dropout(dxd, ctx.dropout_p, seed)
        elif a.dtype == x.dtype:
            dx, da, db = lora(dkept, b, needs_dx, needs_da, needs_db)
        else:  # float32 gradients of the adapter come from dy: dkept = g . dy is rounded to 16 bits
            dx, _, _ = lora(dkept, b, needs_dx, False, False)
            _, da, db = lora(dy, _scaled(b, g), False, needs_da, needs_db)
        if needs_db and not (seed is None and a.dtype == x.dtype):
            db = _scaled(db, g)
        return (
            dx if needs_dx else None,
            None,
            da if needs_da else None,
            db if needs_db else None,
            dg if needs_dg else None,
            dbias if needs_dbias else None,
            None,
            None,
        )


def _scaled(b: Tensor, g: Tensor) -> Tensor:
    """g . b by rows: dy^T (g . b) = (g . dy)^T b, and the same of its gradient."""
    return (b * g[:, None]).to(b.dtype)


def _norm(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    if w.stride(1) != 1 and w.stride(0) != 1:
        w = w.contiguous()
    a, b = a.contiguous(), b.contiguous()
    (N, K), R = w.shape, a.shape[0]
    norm = w.new_empty(N, dtype=torch.float32)
    if choose("dora", w.device) == "cpu":
        _native.extension().dora_norm(
            *map(_native.address, (w, a, b, norm)),
            *(N, K, R, *w.stride(), scale),
            *map(_native.code, (w.dtype, a.dtype)),
            _native.threads(),
        )
    elif N:
        from fusetune.kernels import dora as triton_dora

        triton_dora.norm(w, a, b, norm, scale)
    return norm


def _forward(pre: Tensor, g: Tensor, bias: Tensor | None, rest: Tensor | None) -> Tensor:
    pre, g = pre.contiguous(), g.contiguous()
    bias = None if bias is None else bias.contiguous()
    rest = None if rest is None else rest.contiguous()
    y = torch.empty_like(pre)
    if choose("dora", pre.device) == "cpu":
        _native.extension().dora_forward(
            *map(_native.address, (pre, g, bias, rest, y)),
            *(*pre.shape, _native.code(pre.dtype), _native.threads()),
        )
    elif y.numel():
        from fusetune.kernels import dora as triton_dora

        triton_dora.forward(pre, g, bias, rest, y)
    return y


def _backward(dy: Tensor, pre: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy, pre, g = _rows(dy), pre.contiguous(), g.contiguous()
    dpre, dg, dbias = torch.empty_like(pre), torch.zeros_like(g), torch.zeros_like(g)
    if choose("dora", pre.device) == "cpu":
        _native.extension().dora_backward(
            *map(_native.address, (dy, pre, g, dpre, dg, dbias)),
            *(*pre.shape, dy.stride(0), _native.code(pre.dtype), _native.threads()),
        )
    elif pre.numel():
        from fusetune.kernels import dora as triton_dora

        triton_dora.backward(dy, pre, g, dpre, dg, dbias)
    return dpre, dg, dbias


def _dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    x = _rows(x)
    out = x.new_empty(x.shape)
    if choose("dora", x.device) == "cpu":
        _native.extension().dora_dropout(
            *map(_native.address, (x, out)),
            *(*x.shape, x.stride(0), dropout_p, int(seed), _native.code(x.dtype), _native.threads()),
        )
    elif out.numel():
        from fusetune.kernels import dora as triton_dora

        triton_dora.dropout(x, out, dropout_p, seed)
    return out


def _fake_norm(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape[0], dtype=torch.float32)


def _fake_forward(pre: Tensor, g: Tensor, bias: Tensor | None, rest: Tensor | None) -> Tensor:
    return pre.new_empty(pre.shape)


def _fake_backward(dy: Tensor, pre: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return pre.new_empty(pre.shape), g.new_empty(g.shape), g.new_empty(g.shape)


def _fake_dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_dora_norm: Callable[..., Tensor] = register(
    "dora_norm(Tensor w, Tensor a, Tensor b, float scale) -> Tensor", _norm, _fake_norm
)
_dora_forward: Callable[..., Tensor] = register(
    "dora_forward(Tensor pre, Tensor g, Tensor? bias, Tensor? rest) -> Tensor", _forward, _fake_forward
)
_dora_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = register(
    "dora_backward(Tensor dy, Tensor pre, Tensor g) -> (Tensor, Tensor, Tensor)", _backward, _fake_backward
)
_dora_dropout: Callable[..., Tensor] = register(
    "dora_dropout(Tensor x, float dropout_p, Tensor seed) -> Tensor", _dropout, _fake_dropout
)
