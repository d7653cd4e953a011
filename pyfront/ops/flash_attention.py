"""Flash attention: softmax(scale q k^T) v without an [Sq, Sk] tensor. The maths is in csrc/flash_attention.h."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusetune._check import FLOATS, check, check_device, check_dtype, check_probability, check_shape
from fusetune._register import register
from fusetune.backend import choose
from fusetune.ops import _flash_attention_backends as backends
from fusetune.ops._flash_attention_backends import Arguments
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale

MAX_HEAD_DIM = 256
_OP = "flash_attention"

Window = tuple[int | None, int | None]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = (None, None),
    align: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    key_padding_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention (Dao, arXiv 2307.08691); memory grows with S, not S^2.

    Query head h reads key head h // (H / Hkv). A query that sees no key gives zeros and takes no part in gradients.
    Gradients reach q, k, v, bias, relative_bias, sinks and, through it, what the log-sum-exp is used for; they are the
    same bits in every run.

    Args:
        q: [B, H, Sq, D] float32, bfloat16 or float16, D <= 256; any strides.
        k: [B, Hkv, Sk, D] of q's dtype, H a multiple of Hkv.
        v: [B, Hkv, Sk, Dv], Dv <= 256.
        causal: a query sees keys up to its own position.
        window: (left, right), how many keys before and behind its own position a query sees besides that one; None for
            all. Mistral's sliding window of n tokens is causal with left = n - 1.
        align: the position of query i among the keys: "bottom_right", i + Sk - Sq, so that the last query stands at the
            last key (as flash-attn), or "top_left", i (as torch's is_causal).
        scale: factor of the logits; 1/sqrt(D) by default.
        softcap: c > 0 makes c tanh(logit / c) of the scaled logits, before bias and masks.
        key_padding_mask: [B, Sk] bool, True where a key is seen. Its other keys cost nothing.
        mask: bool, True where a query sees a key, or float, added to the logits, as in torch's
            scaled_dot_product_attention; broadcasts to [B, H, Sq, Sk] and is read by its strides.
        bias: float, added to the logits; as mask, besides which it may be given.
        relative_bias: [H, 2N - 1], N >= max(Sq, Sk): entry N - 1 + d is added where the key is d positions behind the
            query (`t5_relative_bias`, `alibi_bias`).
        sinks: [H], logits that take their share of the softmax and lead nowhere.
        dropout_p: probability of dropping an attention weight after the softmax. The mask is recomputed in backward
            from a seed drawn from torch's generator.
        cu_seqlens_q, cu_seqlens_k: [members + 1] int32 (or int64), for packed sequences: B is 1, and tokens
            cu_seqlens[m] .. cu_seqlens[m + 1] are member m, which sees itself only. Keys' default to the queries'.
            Tokens outside of all members give zeros.
        return_lse: whether to return lse = log(sum(exp(logits))) too.

    Returns:
        [B, H, Sq, Dv] of q's dtype, in q's memory layout if neighbours in D are neighbours there; with return_lse also
        [B, H, Sq] float32, -inf for a query that sees no key. Under autocast q, k and v are cast first.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes that do not fit, tensors on different devices, an unknown align, a negative window, softcap
            <= 0, scale not finite, dropout_p not in [0, 1], or cu_seqlens that decrease or leave the tokens (on a GPU
            these are not read, and an assertion fails there).
        NotImplementedError: a head dimension over 256, or no backend works on q's device.
    """
    backend = choose(_OP, q.device)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    arguments = _arguments(
        *(q, causal, _check_window(window), align, scale, softcap, key_padding_mask, mask, bias),
        *(relative_bias, sinks, dropout_p, cu_seqlens_q, cu_seqlens_k),
    )
    _check(q, k, v, arguments, softcap, align)
    arguments = _prepared(arguments)
    if backend == "reference":
        seed = int(draw_seed(q.device)) if dropout_p else 0
        o, lse = _reference(q, k, v, arguments, seed)
    elif not return_lse and backends.torch_is_faster(
        q, k, v, arguments, lambda q, k, v: _attend(q, k, v, arguments)[0]
    ):
        return backends.torch_attention(q, k, v, arguments)
    else:
        o, lse = _attend(q, k, v, arguments)
    return (o, lse) if return_lse else o


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = (None, None),
    align: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    key_padding_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` in plain torch, with the dropout mask of `seed`. Any floating dtype; gradients by autograd."""
    arguments = _arguments(
        *(q, causal, window, align, scale, softcap, key_padding_mask, mask, bias),
        *(relative_bias, sinks, dropout_p, cu_seqlens_q, cu_seqlens_k),
    )
    o, lse = _reference(q, k, v, arguments, seed)
    return (o, lse) if return_lse else o


def _arguments(
    q: Tensor,
    causal: bool,
    window: Window,
    align: str,
    scale: float | None,
    softcap: float | None,
    key_padding_mask: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Arguments:
    """The public arguments in the form of the contract."""
    if mask is not None and mask.dtype != torch.bool:
        bias, mask = mask if bias is None else bias + mask, None
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.dim() and q.shape[-1] else 1.0
    left, right = (-1 if side is None else side for side in window)
    return Arguments(
        keep=key_padding_mask,
        mask=_to_four(mask),
        bias=_to_four(bias),
        relative=relative_bias,
        sinks=sinks,
        q_starts=cu_seqlens_q,
        k_starts=cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        scale=float(scale),
        softcap=0.0 if softcap is None else float(softcap),
        left=left,
        right=0 if causal else right,
        top_left=align == "top_left",
        dropout_p=float(dropout_p),
        seed=None,
    )


def _reference(q: Tensor, k: Tensor, v: Tensor, a: Arguments, seed: int) -> tuple[Tensor, Tensor]:
    if a.q_starts is None or a.k_starts is None:
        return _reference_of_batch(q, k, v, a, seed, 0)
    # Each member by itself, its results put in the place of its tokens.
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf)
    q_starts, k_starts = a.q_starts.tolist(), a.k_starts.tolist()
    for member, (q0, q1, k0, k1) in enumerate(zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False)):
        if q1 > q0:
            part = _reference_of_batch(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], a, seed, member)
            inside = torch.arange(q0, q1, device=q.device)
            o, lse = o.index_copy(2, inside, part[0]), lse.index_copy(2, inside, part[1].to(lse.dtype))
    return o, lse


def _reference_of_batch(
    q: Tensor, k: Tensor, v: Tensor, a: Arguments, seed: int, first_batch: int
) -> tuple[Tensor, Tensor]:
    (B, H, Sq, _), Sk = q.shape, k.shape[2]
    k, v = (t.repeat_interleave(H // k.shape[1], dim=1) for t in (k, v))
    i = torch.arange(Sq, device=q.device)[:, None] + (0 if a.top_left else Sk - Sq)
    j = torch.arange(Sk, device=q.device)
    seen = torch.ones(B, H, Sq, Sk, dtype=torch.bool, device=q.device)
    if a.left >= 0:
        seen = seen & (j >= i - a.left)
    if a.right >= 0:
        seen = seen & (j <= i + a.right)
    if a.keep is not None:
        seen = seen & a.keep[:, None, None, :]
    if a.mask is not None:
        seen = seen & a.mask
    logits = (q @ k.transpose(-1, -2)) * a.scale
    if a.softcap:
        logits = a.softcap * torch.tanh(logits / a.softcap)
    if a.bias is not None:
        logits = logits + a.bias
    if a.relative is not None:
        N = (a.relative.shape[1] + 1) // 2
        logits = logits + a.relative.to(logits.dtype)[:, j - i + N - 1]
    seen = seen & (logits.detach() != -math.inf)
    logits = logits.masked_fill(~seen, -math.inf)
    if a.sinks is not None:
        logits = torch.cat([logits, a.sinks.to(logits.dtype)[:, None, None].expand(B, H, Sq, 1)], dim=-1)
        seen = torch.cat([seen, seen.new_ones(B, H, Sq, 1)], dim=-1)
    # softmax of a row of -inf is NaN: such rows are given zeros and cut from the graph instead
    empty = ~seen.any(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0)
    p = logits.softmax(-1).masked_fill(~seen, 0)[..., :Sk]
    lse = logits.logsumexp(-1) if logits.shape[-1] else logits.sum(-1)
    lse = lse.masked_fill(empty[..., 0], -math.inf).to(torch.promote_types(q.dtype, torch.float32))
    if a.dropout_p:
        b = torch.arange(first_batch * H, (first_batch + B) * H, device=q.device)
        row = b[:, None] * 2**32 + torch.arange(Sq, device=q.device)
        p = p * keep_mask(seed, row, Sk, a.dropout_p).view(B, H, Sq, Sk) * kept_scale(a.dropout_p)
    return p.to(v.dtype) @ v, lse


def t5_relative_bias(table: Tensor, N: int, *, bidirectional: bool = True, max_distance: int = 128) -> Tensor:
    """T5's bucketed position bias as a `relative_bias` of `flash_attention`: memory of H N, not H N^2.

    Distances below half of the buckets of a direction have one each, the others share the rest logarithmically up to
    max_distance (Raffel et al., arXiv 1910.10683, section 2.1).

    Args:
        table: [buckets, H], the weight of T5's `relative_attention_bias`.
        N: number of positions, max(Sq, Sk).
        bidirectional: whether keys behind the query have buckets of their own (an encoder) or share one (a decoder).
        max_distance: from which on distances share the last bucket.

    Returns:
        [H, 2N - 1], differentiable with respect to table.
    """
    # The arithmetic is that of transformers' T5Attention, so that a distance never falls into another bucket.
    distance = torch.arange(1 - N, N, device=table.device)
    buckets, first = table.shape[0], torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = buckets // 2
    share = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + share.to(torch.long)).clamp(max=buckets - 1)
    return table[first + torch.where(distance < exact, distance, far)].T


def alibi_bias(slopes: Tensor, N: int) -> Tensor:
    """ALiBi (Press et al., arXiv 2108.12409) as a `relative_bias` of `flash_attention`: -slope |distance|.

    Args:
        slopes: [H].
        N: number of positions, max(Sq, Sk).

    Returns:
        [H, 2N - 1], differentiable with respect to slopes.
    """
    return -slopes[:, None] * torch.arange(1 - N, N, device=slopes.device).abs()


def _to_four(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dim() >= 4 else mask[(None,) * (4 - mask.dim())]


def _check_window(window: Window) -> Window:
    check(
        len(window) == 2 and all(side is None or (isinstance(side, int) and side >= 0) for side in window),
        ValueError,
        f"{_OP}: window must be two sizes from 0 on, or None for all, got {window}",
    )
    return window


def _check(q: Tensor, k: Tensor, v: Tensor, a: Arguments, softcap: float | None, align: str) -> None:
    check_dtype(_OP, "q", q)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(_OP, name, tensor, [q.dtype])
        check_device(_OP, name, tensor, q.device)
    check_shape(_OP, "q", q, ["B", "H", "Sq", "D"])
    check_shape(_OP, "k", k, [q.shape[0], "Hkv", "Sk", q.shape[3]])
    check_shape(_OP, "v", v, [*k.shape[:3], "Dv"])
    (B, H, Sq, D), (_, Hkv, Sk, Dv) = q.shape, v.shape
    check(
        H > 0 and Hkv > 0 and H % Hkv == 0,
        ValueError,
        f"{_OP}: heads of q must be a positive multiple of those of k, got {H}, {Hkv}",
    )
    largest = max(D, Dv)
    check(
        largest <= MAX_HEAD_DIM,
        NotImplementedError,
        f"{_OP}: head dimension must be at most {MAX_HEAD_DIM}, got {largest}",
    )
    check(
        align in ("bottom_right", "top_left"), ValueError, f"{_OP}: align must be bottom_right or top_left, got {align}"
    )
    check(math.isfinite(a.scale), ValueError, f"{_OP}: scale must be finite, got {a.scale}")
    check(
        softcap is None or 0 < softcap < math.inf,
        ValueError,
        f"{_OP}: softcap must be positive and finite, or None, got {softcap}",
    )
    check_probability(_OP, "dropout_p", a.dropout_p)
    if a.keep is not None:
        _check_tensor("key_padding_mask", a.keep, [torch.bool], [B, Sk], q.device)
    for name, mask, dtypes in (("mask", a.mask, [torch.bool]), ("bias", a.bias, FLOATS)):
        if mask is not None:
            check_dtype(_OP, name, mask, dtypes)
            check_device(_OP, name, mask, q.device)
            check(
                mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, (B, H, Sq, Sk), strict=True)),
                ValueError,
                f"{_OP}: {name} must broadcast to {[B, H, Sq, Sk]}, got {list(mask.shape)}",
            )
    if a.relative is not None:
        _check_tensor("relative_bias", a.relative, FLOATS, [H, "2N - 1"], q.device)
        check(
            a.relative.shape[1] % 2 == 1 and a.relative.shape[1] >= 2 * max(Sq, Sk, 1) - 1,
            ValueError,
            f"{_OP}: relative_bias must have 2 N - 1 columns, N at least {max(Sq, Sk, 1)}, got {a.relative.shape[1]}",
        )
    if a.sinks is not None:
        _check_tensor("sinks", a.sinks, FLOATS, [H], q.device)
    _check_starts(q, k, a)


def _check_tensor(name: str, tensor: Tensor, dtypes: Any, shape: list[int | str], device: torch.device) -> None:
    check_dtype(_OP, name, tensor, dtypes)
    check_shape(_OP, name, tensor, shape)
    check_device(_OP, name, tensor, device)


def _check_starts(q: Tensor, k: Tensor, a: Arguments) -> None:
    if a.q_starts is None or a.k_starts is None:
        check(a.k_starts is None, ValueError, f"{_OP}: cu_seqlens_q must be given with cu_seqlens_k, got None")
        return
    check(q.shape[0] == 1, ValueError, f"{_OP}: q must have batch size 1 with cu_seqlens_q, got {q.shape[0]}")
    for name, other in (("key_padding_mask", a.keep), ("mask", a.mask), ("bias", a.bias)):
        check(other is None, ValueError, f"{_OP}: {name} must be None with cu_seqlens_q; leave padding out of the pack")
    for name, starts, tokens in (("cu_seqlens_q", a.q_starts, q.shape[2]), ("cu_seqlens_k", a.k_starts, k.shape[2])):
        _check_tensor(name, starts, [torch.int32, torch.int64], ["members + 1"], q.device)
        check(len(starts) > 0, ValueError, f"{_OP}: {name} must have at least one element, got none")
        check(
            len(starts) == len(a.q_starts),
            ValueError,
            f"{_OP}: {name} must have as many elements as cu_seqlens_q, {len(a.q_starts)}, got {len(starts)}",
        )
        if torch.compiler.is_compiling():
            continue
        ordered = (starts[1:] >= starts[:-1]).all() & (starts[0] >= 0) & (starts[-1] <= tokens)
        condition = f"{name} must never decrease, from 0 or more to at most {tokens}"
        if q.device.type == "cuda":
            torch._assert_async(ordered, f"{_OP}: {condition}")
        else:
            check(bool(ordered), ValueError, f"{_OP}: {condition}, got {starts.tolist()}")


def _prepared(a: Arguments) -> Arguments:
    """The small tensors in the dtypes of the contract, by operations that autograd follows."""
    q_starts = None if a.q_starts is None else a.q_starts.int().contiguous()
    k_starts = q_starts if a.k_starts is a.q_starts or a.k_starts is None else a.k_starts.int().contiguous()
    return a._replace(
        relative=None if a.relative is None else a.relative.float().contiguous(),
        sinks=None if a.sinks is None else a.sinks.float().contiguous(),
        q_starts=q_starts,
        k_starts=k_starts,
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    o, lse = _FlashAttention.apply(q, k, v, *a)
    return o, lse


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
        a = Arguments(*flat)
        if a.dropout_p:
            a = a._replace(seed=draw_seed(q.device))
        o, lse = _attention_forward(q, k, v, *a)
        ctx.save_for_backward(q, k, v, o, lse, *a[:7], a.seed)
        ctx.options = a[7:13]
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, *tensors, seed = ctx.saved_tensors
        a = Arguments._make([*tensors, *ctx.options, seed])
        needed = [ctx.needs_input_grad[3 + Arguments._fields.index(name)] for name in ("bias", "relative", "sinks")]
        if grad_o is None:
            grad_o = torch.zeros_like(o)
        dq, dk, dv, *extra = _attention_backward(grad_o, grad_lse, q, k, v, o, lse, *a, needed)
        dbias, drelative, dsinks = (t if need else None for t, need in zip(extra, needed, strict=True))
        return dq, dk, dv, None, None, dbias, drelative, dsinks, *[None] * 9


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring elements in its last dimension, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _forward(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*flat)
    q, k, v = _rows(q), _rows(k), _rows(v)
    if a.keep is not None:
        a = a._replace(keep=_rows(a.keep))
    o, lse = _fake_forward(q, k, v, *a)
    if a.q_starts is not None:  # for tokens outside of all members
        o.zero_()
        lse.fill_(-math.inf)
    backends.forward(_backend(q, k, v, a), q, k, v, a, o, lse)
    return o, lse


def _backward(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    *fields, needed = flat
    a = Arguments(*fields)
    grad_o, q, k, v = _rows(grad_o), _rows(q), _rows(k), _rows(v)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    if a.keep is not None:
        a = a._replace(keep=_rows(a.keep))
    dq, dk, dv, dbias, drelative, dsinks = gradients = _gradients(q, k, v, a, needed)
    for gradient in gradients if a.q_starts is not None else (dbias, drelative, dsinks):
        gradient.zero_()
    backends.backward(_backend(q, k, v, a), grad_o, grad_lse, q, k, v, a, o, lse, gradients)
    if a.bias is not None and needed[0]:
        dbias = dbias.to(a.bias.dtype)
    return dq, dk, dv, dbias, drelative, dsinks


def _backend(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> str:
    """Which backend takes a call: on a GPU the one that a trial of each favours."""

    def trial(backend: str) -> list[Tensor]:
        seeded = a if not a.dropout_p else a._replace(seed=torch.zeros(1, dtype=torch.int64, device=q.device))
        o, lse = _fake_forward(q, k, v, *seeded)
        gradients = _gradients(q, k, v, seeded, [True] * 3)
        for t in (o, lse, *gradients):
            t.zero_()
        backends.forward(backend, q, k, v, seeded, o, lse)
        backends.backward(backend, o, None, q, k, v, seeded, o, lse, gradients)
        return [o, *gradients]

    return backends.choose_for(q, k, v, a, trial)


def _gradients(q: Tensor, k: Tensor, v: Tensor, a: Arguments, needed: list[bool]) -> tuple[Tensor, ...]:
    """Memory for the gradients of q, k, v, bias, relative and sinks; empty for what is not needed."""
    float32 = torch.float32
    return (
        *(torch.empty_like(_rows(t)) for t in (q, k, v)),
        q.new_empty(a.bias.shape if a.bias is not None and needed[0] else [0], dtype=float32),
        q.new_empty(a.relative.shape if a.relative is not None and needed[1] else [0], dtype=float32),
        q.new_empty(a.sinks.shape if a.sinks is not None and needed[2] else [0], dtype=float32),
    )


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    q = _rows(q)
    if q.shape[3] == v.shape[3]:
        o = torch.empty_like(q)
    else:  # the order of q's dimensions in memory
        order = sorted(range(4), key=lambda d: (q.stride(d), -d), reverse=True) if q.numel() else list(range(4))
        shape = [*q.shape[:3], v.shape[3]]
        o = q.new_empty([shape[d] for d in order]).permute([order.index(d) for d in range(4)])
        o = o if o.stride(-1) == 1 else q.new_empty(shape)
    return o, q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    *fields, needed = flat
    a = Arguments(*fields)
    dq, dk, dv, dbias, drelative, dsinks = _gradients(q, k, v, a, needed)
    return dq, dk, dv, dbias if a.bias is None else dbias.to(a.bias.dtype), drelative, dsinks


_FIELDS = (
    "Tensor? keep, Tensor? mask, Tensor? bias, Tensor? relative, Tensor? sinks, Tensor? q_starts, Tensor? k_starts,"
    " float scale, float softcap, int left, int right, bool top_left, float dropout_p, Tensor? seed"
)
_attention_forward: Callable[..., tuple[Tensor, Tensor]] = register(
    f"flash_attention_forward(Tensor q, Tensor k, Tensor v, {_FIELDS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_attention_backward: Callable[..., tuple[Tensor, ...]] = register(
    "flash_attention_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    f" {_FIELDS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
