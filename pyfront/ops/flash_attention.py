"""Flash attention: softmax(scale q k^T) v without an [Sq, Sk] tensor. The maths is in csrc/flash_attention.h."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusetune import _native
from fusetune._check import check, check_device, check_dtype, check_probability, check_shape
from fusetune._register import register
from fusetune.backend import choose
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale

MAX_HEAD_DIM = 256


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention (Dao, arXiv 2307.08691); memory grows with S, not S^2.

    Query head h reads key head h // (H / Hkv). A query that sees no key gives zeros and takes no part in gradients.

    Args:
        q: [B, H, Sq, D] float32, bfloat16 or float16, D <= 256; any strides.
        k, v: [B, Hkv, Sk, D] of q's dtype, H a multiple of Hkv.
        causal: query i sees keys j <= i + Sk - Sq, i.e. the last query sees all keys.
        scale: factor of the logits; 1/sqrt(D) by default.
        key_padding_mask: [B, Sk] bool, True where a key is seen.
        dropout_p: probability of dropping an attention weight after the softmax. The mask is recomputed in backward
            from a seed drawn from torch's generator.

    Returns:
        [B, H, Sq, D] of q's dtype, in q's memory layout if neighbours in D are neighbours there. Under autocast q, k
        and v are cast first.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes that do not fit, tensors on different devices, scale not finite, or dropout_p not in [0, 1].
        NotImplementedError: D > 256, or no backend works on q's device.
    """
    backend = choose("flash_attention", q.device)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.dim() and q.shape[-1] else 1.0
    _check(q, k, v, scale, key_padding_mask, dropout_p)
    if backend == "reference":
        seed = int(draw_seed(q.device)) if dropout_p else 0
        return flash_attention_reference(
            q, k, v, causal=causal, scale=scale, key_padding_mask=key_padding_mask, dropout_p=dropout_p, seed=seed
        )
    o: Tensor = _FlashAttention.apply(q, k, v, key_padding_mask, float(scale), causal, float(dropout_p))
    return o


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """`flash_attention` in plain torch, with the dropout mask of `seed`. Any floating dtype; gradients by autograd."""
    (B, H, Sq, D), Sk = q.shape, k.shape[2]
    k, v = (t.repeat_interleave(H // k.shape[1], dim=1) for t in (k, v))
    seen = torch.ones(B, 1, Sq, Sk, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(Sk - Sq)
    if key_padding_mask is not None:
        seen = seen & key_padding_mask[:, None, None, :]
    logits = (q @ k.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)
    # softmax of a row of -inf is NaN: such rows are given zeros and cut from the graph instead
    p = logits.masked_fill(~seen, -math.inf).masked_fill(~seen.any(-1, keepdim=True), 0).softmax(-1)
    p = p.masked_fill(~seen, 0)
    if dropout_p:
        row = torch.arange(B * H, device=q.device)[:, None] * 2**32 + torch.arange(Sq, device=q.device)
        p = p * keep_mask(seed, row, Sk, dropout_p).view(B, H, Sq, Sk) * kept_scale(dropout_p)
    return p.to(v.dtype) @ v


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float, key_padding_mask: Tensor | None, dropout_p: float) -> None:
    op = "flash_attention"
    check_dtype(op, "q", q)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(op, name, tensor, [q.dtype])
        check_device(op, name, tensor, q.device)
    check_shape(op, "q", q, ["B", "H", "Sq", "D"])
    check_shape(op, "k", k, [q.shape[0], "Hkv", "Sk", q.shape[3]])
    check_shape(op, "v", v, list(k.shape))
    H, Hkv, D = q.shape[1], k.shape[1], q.shape[3]
    check(
        H > 0 and Hkv > 0 and H % Hkv == 0,
        ValueError,
        f"{op}: heads of q must be a positive multiple of those of k, got {H}, {Hkv}",
    )
    check(D <= MAX_HEAD_DIM, NotImplementedError, f"{op}: head dimension must be at most {MAX_HEAD_DIM}, got {D}")
    check(math.isfinite(scale), ValueError, f"{op}: scale must be finite, got {scale}")
    check_probability(op, "dropout_p", dropout_p)
    if key_padding_mask is not None:
        check_dtype(op, "key_padding_mask", key_padding_mask, [torch.bool])
        check_shape(op, "key_padding_mask", key_padding_mask, [k.shape[0], k.shape[2]])
        check_device(op, "key_padding_mask", key_padding_mask, q.device)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        scale: float,
        causal: bool,
        dropout_p: float,
    ) -> Tensor:
        seed = draw_seed(q.device) if dropout_p else None
        o, lse = _attention_forward(q, k, v, key_padding_mask, scale, causal, dropout_p, seed)
        ctx.save_for_backward(q, k, v, key_padding_mask, o, lse, seed)
        ctx.arguments = scale, causal, dropout_p
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_padding_mask, o, lse, seed = ctx.saved_tensors
        dq, dk, dv = _attention_backward(grad_o, q, k, v, key_padding_mask, o, lse, *ctx.arguments, seed)
        return dq, dk, dv, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring elements in its last dimension, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([t.stride()[:3] for t in tensors], dtype=torch.int64)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    keep = None if key_padding_mask is None else _rows(key_padding_mask)
    o, lse = _fake_forward(q, k, v, keep, scale, causal, dropout_p, seed)
    if choose("flash_attention", q.device) == "cpu":
        strides = _strides(q, k, v, o)
        _native.extension().flash_attention_forward(
            *map(_native.address, (q, k, v, keep, o, lse)),
            *_sizes(q, k),
            strides.data_ptr(),
            0 if keep is None else keep.stride(0),
            *(scale, causal, dropout_p, 0 if seed is None else int(seed)),
            _native.code(q.dtype),
            _native.threads(),
        )
    else:
        from fusetune.kernels import flash_attention as triton_attention

        triton_attention.forward(q, k, v, keep, o, lse, scale, causal, dropout_p, seed)
    return o, lse


def _backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_o, q, k, v = _rows(grad_o), _rows(q), _rows(k), _rows(v)
    keep = None if key_padding_mask is None else _rows(key_padding_mask)
    dq, dk, dv = _fake_backward(grad_o, q, k, v, keep, o, lse, scale, causal, dropout_p, seed)
    if choose("flash_attention", q.device) == "cpu":
        strides = _strides(grad_o, q, k, v, o, dq, dk, dv)
        _native.extension().flash_attention_backward(
            *map(_native.address, (grad_o, q, k, v, keep, o, lse, dq, dk, dv)),
            *_sizes(q, k),
            strides.data_ptr(),
            0 if keep is None else keep.stride(0),
            *(scale, causal, dropout_p, 0 if seed is None else int(seed)),
            _native.code(q.dtype),
            _native.threads(),
        )
    else:
        from fusetune.kernels import flash_attention as triton_attention

        triton_attention.backward(grad_o, q, k, v, keep, o, lse, dq, dk, dv, scale, causal, dropout_p, seed)
    return dq, dk, dv


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_rows(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(_rows(q)), torch.empty_like(_rows(k)), torch.empty_like(_rows(v))


_attention_forward: Callable[..., tuple[Tensor, Tensor]] = register(
    "flash_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, float scale, bool causal,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_attention_backward = register(
    "flash_attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, Tensor o,"
    " Tensor lse, float scale, bool causal, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
