"""LoRA linear: y = x w^T + bias + scale dropout(x) a^T b^T. The maths and its costs are in csrc/lora.h."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusetune import _native
from fusetune._check import check, check_device, check_dtype, check_probability, check_shape
from fusetune._register import register
from fusetune.backend import choose, gemm_dtype
from fusetune.ops import _lora_gpu
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale
from fusetune.ops.quantize import QuantizedWeight, accumulate, accumulate_t, check_quantized, dequantize_reference


class Adapter(NamedTuple):
    """A low-rank adapter: scale dropout(x) a^T b^T."""

    a: Tensor  # [R, K] down projection, of x's dtype or float32
    b: Tensor  # [N, R] up projection, of a's dtype
    scale: float  # alpha / R in PEFT
    dropout_p: float = 0.0  # probability of dropping an element of the adapter's input


class Projection(NamedTuple):
    """A frozen linear layer and the adapters that are added to it."""

    w: Tensor | QuantizedWeight  # [N, K] frozen weight, of x's dtype or quantised
    bias: Tensor | None  # [N], of x's dtype or float32
    adapters: Sequence[Adapter]


def lora_linear(
    x: Tensor,
    w: Tensor | QuantizedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    compute: str = "match",
) -> Tensor:
    """Linear layer with a low-rank adapter (Hu et al., arXiv 2106.09685, section 4.1); w is frozen.

    Saves x by reference and an [M, R] product for backward; the dropout mask is recomputed from a seed drawn from
    torch's generator.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        w: [N, K] frozen weight, of x's dtype; or quantised, then never dequantised as a whole and not for backward.
        a: [R, K] down projection, of x's dtype or float32.
        b: [N, R] up projection, of a's dtype.
        scale: factor of the adapter (alpha / R in PEFT).
        bias: [N], of x's dtype or float32.
        dropout_p: probability of dropping an element of the adapter's input.
        compute: "match" takes float32 adapters on 16-bit x in float32, as PEFT does; "fast" may round them to x's dtype
            first, for its matrix instructions. Their gradients are float32 either way.

    Returns:
        [..., N], of x's dtype. Under autocast x, w and bias are cast first, and adapters may be rounded, as PEFT's are.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes that do not fit, tensors on different devices, scale not finite, dropout_p not in [0, 1], w
            requiring grad, or another `compute`.
        NotImplementedError: no backend works on x's device.
    """
    return lora_linear_group(x, [Projection(w, bias, [Adapter(a, b, scale, dropout_p)])], compute=compute)[0]


def lora_linear_group(x: Tensor, projections: Sequence[Projection], *, compute: str = "match") -> tuple[Tensor, ...]:
    """Several `lora_linear` of one x, each with the sum of any number of adapters, all with masks of their own.

    x is read once, and its gradient is one sum. For query, key and value, or gate and up.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        projections: at least one; all adapters of one dtype.
        compute: as `lora_linear` has it.

    Returns:
        For each projection [..., N], of x's dtype.

    Raises:
        As `lora_linear`.
    """
    backend = choose("lora", x.device)
    fast = compute == "fast"
    if torch.is_autocast_enabled(x.device.type):
        fast = True  # PEFT rounds them then
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        projections = [
            Projection(w.to(dtype) if isinstance(w, Tensor) else w, None if bias is None else bias.to(dtype), adapters)
            for w, bias, adapters in projections
        ]
    _check(x, projections, compute)
    adapters = [adapter for projection in projections for adapter in projection.adapters]
    if backend == "reference":
        seeds = draw_seed(x.device, len(adapters)).tolist() if any(adapter.dropout_p for adapter in adapters) else ()
        return lora_linear_group_reference(x, projections, seeds=seeds)
    ys = _LoraLinear.apply(
        x[None].flatten(0, -2),
        [size for projection in projections for size in _format(projection.w)],
        [len(projection.adapters) for projection in projections],
        [float(adapter.scale) for adapter in adapters],
        [float(adapter.dropout_p) for adapter in adapters],
        fast,
        *[tensor for projection in projections for tensor in _tensors(projection.w)],
        *[projection.bias for projection in projections],
        *[adapter.a for adapter in adapters],
        *[adapter.b for adapter in adapters],
    )
    return tuple([y.view(*x.shape[:-1], y.shape[1]) for y in ys])


def lora_linear_reference(
    x: Tensor,
    w: Tensor | QuantizedWeight,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: int = 0,
) -> Tensor:
    """`lora_linear` in plain torch, with the dropout mask of `seed`. Any floating dtype; gradients by autograd."""
    projection = Projection(w, bias, [Adapter(a, b, scale, dropout_p)])
    return lora_linear_group_reference(x, [projection], seeds=[seed])[0]


def lora_linear_group_reference(
    x: Tensor, projections: Sequence[Projection], *, seeds: Sequence[int] = ()
) -> tuple[Tensor, ...]:
    """`lora_linear_group` in plain torch, with the dropout masks of `seeds`, one for each adapter."""
    ys = []
    index = 0
    for w, bias, adapters in projections:
        w = w if isinstance(w, Tensor) else dequantize_reference(w, x.dtype)
        y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
        for a, b, scale, dropout_p in adapters:
            h = x.to(a.dtype)
            if dropout_p:
                rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
                h = h * keep_mask(seeds[index], rows, x.shape[-1], dropout_p) * kept_scale(dropout_p)
            y = y + scale * F.linear(F.linear(h, a), b)
            index += 1
        ys.append(y.to(x.dtype))
    return tuple(ys)


def _check(x: Tensor, projections: Sequence[Projection], compute: str) -> None:
    op = "lora_linear"
    check_dtype(op, "x", x)
    check(x.dim() >= 1, ValueError, f"{op}: x must have at least 1 dimension, got 0")
    check(len(projections) > 0, ValueError, f"{op}: projections must not be empty, got []")
    check(compute in ("match", "fast"), ValueError, f"{op}: compute must be 'match' or 'fast', got {compute!r}")
    K = x.shape[-1]
    adapter_dtype = None
    for w, bias, adapters in projections:
        if isinstance(w, Tensor):
            check_dtype(op, "w", w, [x.dtype])
            check_shape(op, "w", w, ["N", K])
            frozen = not w.requires_grad
            check(frozen, ValueError, f"{op}: w must be frozen, got requires_grad=True; use F.linear to train it")
        else:
            check_quantized(op, "w", w)
            check(w.shape[1] == K, ValueError, f"{op}: w must have shape [N, {K}], got {list(w.shape)}")
        check_device(op, "w", w if isinstance(w, Tensor) else w.codes, x.device)
        if bias is not None:
            check_dtype(op, "bias", bias, list(dict.fromkeys([x.dtype, torch.float32])))
            check_shape(op, "bias", bias, [w.shape[0]])
            check_device(op, "bias", bias, x.device)
        for a, b, scale, dropout_p in adapters:
            check_dtype(op, "a", a, [adapter_dtype or x.dtype, *([] if adapter_dtype else _float32_too(x))])
            check_dtype(op, "b", b, [a.dtype])
            adapter_dtype = a.dtype
            check_shape(op, "a", a, ["R", K])
            check_shape(op, "b", b, [w.shape[0], a.shape[0]])
            check_device(op, "a", a, x.device)
            check_device(op, "b", b, x.device)
            check(math.isfinite(scale), ValueError, f"{op}: scale must be finite, got {scale}")
            check_probability(op, "dropout_p", dropout_p)


def _float32_too(x: Tensor) -> list[torch.dtype]:
    return [torch.float32] if x.dtype != torch.float32 else []


class _LoraLinear(torch.autograd.Function):
    """`tensors` are what _tensors gives of all projections, their biases, then the a and the b of all adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        formats: list[int],
        counts: list[int],
        scales: list[float],
        dropout_ps: list[float],
        fast: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        w, bias, a, b = _split(tensors, counts)
        seeds = draw_seed(x.device, len(a)) if any(dropout_ps) else None
        ys, s = _lora_forward(x, w, bias, a, b, formats, counts, scales, dropout_ps, seeds, fast)
        ctx.save_for_backward(x, s, seeds, *w, *a, *b)
        ctx.options = formats, counts, scales, dropout_ps, fast
        ctx.bias_dtypes = [None if t is None else t.dtype for t in bias]
        ctx.set_materialize_grads(False)  # a result that is not used leaves its adapters without gradients
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, s, seeds, *tensors = ctx.saved_tensors
        formats, counts, scales, dropout_ps, fast = ctx.options
        P, A = len(counts), len(scales)
        w, a, b = tensors[: 3 * P], tensors[3 * P : 3 * P + A], tensors[3 * P + A :]
        needs_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        _, needs_dbias, needs_da, needs_db = _split(needs, counts)
        dys = [x.new_zeros(x.shape[0], N) if dy is None else dy for dy, N in zip(grads, formats[::2], strict=True)]
        for i, dy in enumerate(grads):
            if dy is None:
                needs_dbias[i] = False
                adapters = slice(sum(counts[:i]), sum(counts[: i + 1]))
                needs_da[adapters] = needs_db[adapters] = [False] * counts[i]
        dx, da, db = _lora_backward(
            x, dys, w, a, b, s, formats, counts, scales, dropout_ps, seeds, fast, needs_dx, needs_da, needs_db
        )
        wanted = zip(dys, ctx.bias_dtypes, needs_dbias, strict=True)
        return (
            dx if needs_dx else None,
            *[None] * (5 + 3 * P),
            *(dy.sum(0, dtype=dtype) if needed else None for dy, dtype, needed in wanted),
            *(gradient if needed else None for gradient, needed in zip(da, needs_da, strict=True)),
            *(gradient if needed else None for gradient, needed in zip(db, needs_db, strict=True)),
        )


def _split(values: Sequence[Any], counts: Sequence[int]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Of w, bias, a and b, what _LoraLinear takes as one list."""
    P, A = len(counts), sum(counts)
    ends = 3 * P, 4 * P, 4 * P + A
    return (
        list(values[: ends[0]]),
        list(values[ends[0] : ends[1]]),
        list(values[ends[1] : ends[2]]),
        list(values[ends[2] :]),
    )


# A weight crosses torch's dispatcher as three tensors and its format, N and the blocksize: codes, absmax and nested of
# a quantised weight, or an ordinary one, twice None, and blocksize 0.
def _tensors(w: Tensor | QuantizedWeight) -> tuple[Tensor | None, ...]:
    return (w, None, None) if isinstance(w, Tensor) else w[:3]


def _format(w: Tensor | QuantizedWeight) -> tuple[int, int]:
    return (w.shape[0], 0) if isinstance(w, Tensor) else (w.shape[0], w.blocksize)


def _weights(tensors: list[Any], formats: list[int], K: int) -> list[Tensor | QuantizedWeight]:
    """The other way round."""
    return [
        QuantizedWeight(codes, absmax, nested, (N, K), blocksize) if absmax is not None else codes
        for codes, absmax, nested, N, blocksize in zip(
            *(tensors[i::3] for i in range(3)), *(formats[i::2] for i in range(2)), strict=True
        )
    ]


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring elements within a row, as the kernels read it."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _tables(
    a: list[Tensor],
    b: list[Tensor],
    da: list[Tensor] | None,
    db: list[Tensor] | None,
    counts: list[int],
    scales: list[float],
    dropout_ps: list[float],
    seeds: Tensor | None,
    ys: list[Tensor],
    bias: list[Tensor | None] | None,
) -> tuple[array[int], array[float], array[int]]:
    """The adapters, their numbers and the projections, as csrc/lora.h has them; empty gradients are not wanted."""
    adapters: list[int] = []
    factors: list[float] = []
    projections: list[int] = []
    numbers = [0] * len(a) if seeds is None else seeds.tolist()
    first = 0
    for owner, count in enumerate(counts):
        for i in range(first, first + count):
            to_da = da[i].data_ptr() if da and da[i].numel() else 0
            to_db = db[i].data_ptr() if db and db[i].numel() else 0
            adapters += a[i].data_ptr(), b[i].data_ptr(), to_da, to_db, a[i].shape[0], owner, numbers[i]
            factors += scales[i], dropout_ps[i]
        first += count
        y = ys[owner]
        t = bias[owner] if bias else None
        at_bias, dtype = (0, 0) if t is None else (t.data_ptr(), _native.code(t.dtype))
        projections += y.shape[1], y.data_ptr(), y.stride(0), at_bias, dtype
    return array("q", adapters), array("d", factors), array("q", projections)


def _forward(
    x: Tensor,
    w: list[Tensor | None],
    bias: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    formats: list[int],
    counts: list[int],
    scales: list[float],
    dropout_ps: list[float],
    seeds: Tensor | None,
    fast: bool,
) -> tuple[list[Tensor], Tensor]:
    x = _rows(x)
    a, b = [t.contiguous() for t in a], [t.contiguous() for t in b]
    bias = [None if t is None else t.contiguous() for t in bias]
    device = x.device
    backend = choose("lora", device)
    weights = _weights(w, formats, x.shape[1])
    if backend != "cpu":
        kernels = _lora_gpu.primitives(backend)
        return _lora_gpu.forward(kernels, x, weights, bias, a, b, counts, scales, dropout_ps, seeds, fast)
    M, K = x.shape
    dtype = gemm_dtype(device.type, x.dtype)
    ys = [torch.empty((M, N), dtype=dtype, device=device) for N in formats[::2]]
    s = torch.empty((M, sum([t.shape[0] for t in a])), dtype=torch.float32, device=device)
    tables = _tables(a, b, None, None, counts, scales, dropout_ps, seeds, ys, bias)
    adapters, factors, projections = [table.buffer_info()[0] for table in tables]
    code = _native.code
    _native.extension().lora_forward(
        *(x.data_ptr(), s.data_ptr(), adapters, factors, len(a), projections, len(ys), M, K, x.stride(0)),
        *(code(x.dtype), code(a[0].dtype) if a else 0, code(dtype), fast, _native.threads()),
    )
    h = x if x.dtype == dtype else x.to(dtype)
    for y, weight in zip(ys, weights, strict=True):
        accumulate(y, h, weight)
    return [y if dtype == x.dtype else y.to(x.dtype) for y in ys], s


def _backward(
    x: Tensor,
    dys: list[Tensor],
    w: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    formats: list[int],
    counts: list[int],
    scales: list[float],
    dropout_ps: list[float],
    seeds: Tensor | None,
    fast: bool,
    needs_dx: bool,
    needs_da: list[bool],
    needs_db: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, dys = _rows(x), [_rows(dy) for dy in dys]
    a, b = [t.contiguous() for t in a], [t.contiguous() for t in b]
    device = x.device
    backend = choose("lora", device)
    M, K = x.shape
    dtype = gemm_dtype(device.type, x.dtype) if backend == "cpu" else x.dtype
    make = torch.empty if a else torch.zeros  # without adapters, nothing writes dx0
    dx = make((M, K) if needs_dx else (0,), dtype=dtype, device=device)
    da = [torch.empty_like(t) if needed else t.new_empty(0) for t, needed in zip(a, needs_da, strict=True)]
    db = [torch.empty_like(t) if needed else t.new_empty(0) for t, needed in zip(b, needs_db, strict=True)]
    weights = _weights(w, formats, K)
    if backend != "cpu":
        kernels = _lora_gpu.primitives(backend)
        _lora_gpu.backward(kernels, x, dys, weights, a, b, s, counts, scales, dropout_ps, seeds, fast, dx, da, db)
        return dx, da, db
    tables = _tables(a, b, da, db, counts, scales, dropout_ps, seeds, dys, None)
    adapters, factors, projections = [table.buffer_info()[0] for table in tables]
    code = _native.code
    _native.extension().lora_backward(
        *(x.data_ptr(), s.data_ptr(), dx.data_ptr() if dx.numel() else 0),
        *(adapters, factors, len(a), projections, len(dys), M, K, x.stride(0)),
        *(code(x.dtype), code(a[0].dtype) if a else 0, code(dtype), fast, _native.threads()),
    )
    if needs_dx:
        for dy, weight in zip(dys, weights, strict=True):
            accumulate_t(dx, dy, weight)
    return dx.to(x.dtype), da, db


def _fake_forward(
    x: Tensor,
    w: list[Tensor | None],
    bias: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    formats: list[int],
    counts: list[int],
    scales: list[float],
    dropout_ps: list[float],
    seeds: Tensor | None,
    fast: bool,
) -> tuple[list[Tensor], Tensor]:
    s = x.new_empty(x.shape[0], sum(t.shape[0] for t in a), dtype=torch.float32)
    return [x.new_empty(x.shape[0], N) for N in formats[::2]], s


def _fake_backward(
    x: Tensor,
    dys: list[Tensor],
    w: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    formats: list[int],
    counts: list[int],
    scales: list[float],
    dropout_ps: list[float],
    seeds: Tensor | None,
    fast: bool,
    needs_dx: bool,
    needs_da: list[bool],
    needs_db: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return (
        x.new_empty(x.shape if needs_dx else 0),
        [t.new_empty(t.shape if needed else 0) for t, needed in zip(a, needs_da, strict=True)],
        [t.new_empty(t.shape if needed else 0) for t, needed in zip(b, needs_db, strict=True)],
    )


_lora_forward: Callable[..., tuple[list[Tensor], Tensor]] = register(
    "lora_forward(Tensor x, Tensor?[] w, Tensor?[] bias, Tensor[] a, Tensor[] b, int[] formats, int[] counts,"
    " float[] scales, float[] dropout_ps, Tensor? seeds, bool fast) -> (Tensor[], Tensor)",
    _forward,
    _fake_forward,
)
_lora_backward: Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]] = register(
    "lora_backward(Tensor x, Tensor[] dys, Tensor?[] w, Tensor[] a, Tensor[] b, Tensor s, int[] formats, int[] counts,"
    " float[] scales, float[] dropout_ps, Tensor? seeds, bool fast, bool needs_dx, bool[] needs_da, bool[] needs_db)"
    " -> (Tensor, Tensor[], Tensor[])",
    _backward,
    _fake_backward,
)
