"""Both passes of LoRA linear on GPUs, of the products that kernels/lora.py names: Triton's, or those of CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusetune._tune import fastest
from fusetune.ops.quantize import QuantizedWeight, accumulate, accumulate_t


def primitives(backend: str) -> Any:
    """The products of a backend."""
    if backend == "cuda":
        from fusetune.ops import _lora_cuda

        return _lora_cuda
    from fusetune.kernels import lora as triton_lora

    return triton_lora


class Stack(NamedTuple):
    """Neighbouring adapters whose products with x are one call: without dropout, or of one probability and rank."""

    columns: slice  # of s
    adapters: slice
    a: Tensor  # theirs, one below the other
    dropout_p: float
    seed: Tensor | None  # one for each of them


def stacks(a: list[Tensor], dropout_ps: list[float], seeds: Tensor | None) -> Iterator[Stack]:
    first = column = 0
    for i in range(1, len(a) + 1):
        if i < len(a) and dropout_ps[i] == dropout_ps[first] and (not dropout_ps[i] or len(a[i]) == len(a[first])):
            continue
        stacked = a[first] if i == first + 1 else torch.cat(a[first:i])
        seed = seeds[first:i] if seeds is not None and dropout_ps[first] else None
        columns = slice(column, column + len(stacked))
        yield Stack(columns, slice(first, i), stacked, dropout_ps[first], seed)
        first, column = i, columns.stop


class LowRank(NamedTuple):
    """factor (t w) . D, as `up` takes it."""

    t: Tensor
    w: Tensor
    factor: float
    dropout_p: float = 0.0
    seed: Tensor | None = None


def linear(
    kernels: Any,
    products: list[tuple[Tensor, Tensor | QuantizedWeight]],
    transposed: bool,
    low_rank: list[LowRank],
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """out = bias + the sums of x weight^T over `products`, or where `transposed` x weight, and of low-rank products.

    By torch's products and then `up`, so that out is rounded as PEFT's sum is; or in one kernel, where there is one
    product of each kind and a measurement on this GPU says that one kernel is faster.
    """

    def addmm_and_up() -> None:
        if starts := bias is not None and not low_rank:
            out.copy_(bias)
        for i, (x, weight) in enumerate(products):
            (accumulate_t if transposed else accumulate)(out, x, weight, beta=1 if i or starts else 0)
        for i, (t, w, factor, dropout_p, seed) in enumerate(low_rank):
            kernels.up(t, w, None if i else bias, out, factor, dropout_p, seed, True)

    x, weight = products[0]
    single = len(products) == len(low_rank) == 1 and (low_rank[0].seed is None or len(low_rank[0].seed) == 1)
    tunable = single and hasattr(kernels, "linear") and out.dtype != torch.float32 and out.numel() > 0
    if not tunable or not isinstance(weight, Tensor):
        return addmm_and_up()
    v = weight.t() if transposed else weight
    t, w, *factors = low_rank[0]
    ways: dict[str, Callable[[], None]] = {"addmm and up": addmm_and_up}
    for tile in kernels.linear_tiles(x.device):
        ways[f"linear {tile.rows} x {tile.cols}"] = functools.partial(
            kernels.linear, x, v, t, w, bias, out, *factors, tile
        )
    rows = 1 << (len(x) - 1).bit_length()  # so that sequences of varying length are not measured each
    dropout = low_rank[0].dropout_p > 0
    case = (x.dtype, w.dtype, rows, *v.shape, "transposed" if v.stride(0) == 1 else "", len(w), dropout)
    ways[fastest("lora_linear", case, x.device, ways)]()


def forward(
    kernels: Any,
    x: Tensor,
    w: list[Tensor | QuantizedWeight],
    bias: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    counts: list[int],
    scales: list[float],
    dropout_ps: list[float],
    seeds: Tensor | None,
    fast: bool,
) -> tuple[list[Tensor], Tensor]:
    """y of each projection, and s."""
    if fast:
        a, b = [t.to(x.dtype) for t in a], [t.to(x.dtype) for t in b]
    s = x.new_empty(len(x), sum(len(t) for t in a), dtype=torch.float32)
    for stack in stacks(a, dropout_ps, seeds):
        kernels.down(x, stack.a, s[:, stack.columns], 1.0, stack.dropout_p, stack.seed)
    of_adapters = s.split([len(t) for t in a], 1)
    ys = []
    first = 0
    for weight, t, count in zip(w, bias, counts, strict=True):
        y = x.new_empty(len(x), weight.shape[0])
        end = first + count
        low_rank = [LowRank(of_adapters[i], b[i].t(), scales[i]) for i in range(first, end)]
        if count > 1:  # one product, so that y is rounded once after it
            scaled = torch.cat([factor * s_i for s_i, _, factor, *_ in low_rank], 1)
            low_rank = [LowRank(scaled, torch.cat(b[first:end], 1).t(), 1.0)]
        linear(kernels, [(x, weight)], False, low_rank, t, y)
        ys.append(y)
        first = end
    return ys, s


def backward(
    kernels: Any,
    x: Tensor,
    dys: list[Tensor],
    w: list[Tensor | QuantizedWeight],
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    counts: list[int],
    scales: list[float],
    dropout_ps: list[float],
    seeds: Tensor | None,
    fast: bool,
    dx: Tensor,
    da: list[Tensor],
    db: list[Tensor],
) -> None:
    """Writes dx, da and db, each unless it has no elements."""
    if fast:
        a, b = [t.to(x.dtype) for t in a], [t.to(x.dtype) for t in b]
    dot_dtype = a[0].dtype if a else x.dtype
    ds = torch.empty_like(s)
    wants_ds = dx.numel() or any(t.numel() for t in da)
    of_adapters = [dy for dy, count in zip(dys, counts, strict=True) for _ in range(count)]
    ranks = [len(t) for t in a]
    columns = zip(s.split(ranks, 1), ds.split(ranks, 1), strict=True)
    for dy, (s_i, ds_i), b_i, db_i, scale in zip(of_adapters, columns, b, db, scales, strict=True):
        if wants_ds:
            kernels.down(dy, b_i.t(), ds_i, scale, 0.0, None)
        if db_i.numel():
            kernels.outer(s_i, dy, db_i.t(), scale, 0.0, None, dot_dtype)
    low_rank = []
    for stack in stacks(a, dropout_ps, seeds):
        mask = stack.dropout_p, stack.seed
        low_rank.append(LowRank(ds[:, stack.columns], stack.a, 1.0, *mask))
        gradients = da[stack.adapters]
        if all(not t.numel() for t in gradients):
            continue
        out = gradients[0] if len(gradients) == 1 else gradients[0].new_empty(stack.a.shape)
        kernels.outer(ds[:, stack.columns], x, out, 1.0, *mask, dot_dtype)
        if len(gradients) > 1:
            for gradient, part in zip(gradients, out.split(ranks[stack.adapters]), strict=True):
                if gradient.numel():
                    gradient.copy_(part)
    if dx.numel():
        linear(kernels, list(zip(dys, w, strict=True)), True, low_rank, None, dx)
