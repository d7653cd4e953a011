"""AdamW step over many tensors in Triton, and the norm of their gradients: the contract is csrc/adamw.h, the caller
pyfront/ops/_adamw_table.py.

The table, its rows in the order of their kinds (format, with or without v', addresses multiples of 16 or not), reaches
the device in one copy from pinned memory, and nothing synchronizes. A step is one launch for the scalars of all rows,
bias corrections, clipping and step counts among them, and one for each kind, of which a program takes ITEM elements of
one tensor, found by a binary search. Divisions and roots are rounded as IEEE 754 has it, and products and sums are not
contracted, so that without codes results are those of the CPU kernel bit by bit where the scalars are.

Floor: the contract's bytes over the stream rate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusetune.kernels.device import guard, to_device
from fusetune.kernels.philox import random_bits

# Columns of the table and of the hyper-parameters, and how a parameter is kept: csrc/adamw.h.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_SQ, STEP, WIDE, ABSMAX, ABSMAX_SQ, ROW_LR, NUMEL, FORMAT, GROUP, KEY = map(
    tl.constexpr, range(14)
)
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, MAXIMIZE, HYPERS = map(tl.constexpr, range(7))
PLAIN, STOCHASTIC, MASTER, SPLIT = map(tl.constexpr, range(4))
WALKED = [PARAM.value, GRAD.value, EXP_AVG.value, EXP_AVG_SQ.value, MAX_SQ.value, WIDE.value]  # by elements
# Columns of the scalars, float32 [rows, SCALARS]. FACTOR is that of the gradient: the clipping and the sign.
DECAY, BETA1_COMPLEMENT, KEPT_BETA2, BETA2_COMPLEMENT, SQRT_BIAS2, INVERSE_SQRT_BIAS2, ADDED, STEP_SIZE, FACTOR = map(
    tl.constexpr, range(9)
)
SCALARS = tl.constexpr(9)
DTYPES = (tl.float32, tl.bfloat16, tl.float16, tl.uint8)  # by the code in a format

SCALAR_ROWS = 128
ITEM = tl.constexpr(8192)  # elements of a program,
BLOCK = tl.constexpr(1024)  # and of one turn of its loop: 16 bytes a thread in 16-bit types
QUANT_BLOCK = tl.constexpr(256)
SUM_BLOCK = 4096


@triton.jit(do_not_specialize=["rows"])
def scalars_kernel(table, rows, hypers, scalars, found_inf, grad_norm, max_grad_norm, ROWS: tl.constexpr):
    """Scalars of every row of the table, in float64 and rounded once; increments the step counts."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    hyper = hypers + tl.load(table + GROUP * rows + r, inside, 0) * HYPERS
    lr = tl.load(hyper + LR, inside, 0.0)
    beta1 = tl.load(hyper + BETA1, inside, 0.5)
    beta2 = tl.load(hyper + BETA2, inside, 0.5)
    eps = tl.load(hyper + EPS, inside, 0.0)
    weight_decay = tl.load(hyper + WEIGHT_DECAY, inside, 0.0)
    maximize = tl.load(hyper + MAXIMIZE, inside, 0.0)
    own_lr = tl.load(table + ROW_LR * rows + r, inside, 0)
    lr = tl.where(own_lr == 0, lr, tl.load(own_lr.to(tl.pointer_type(tl.float32)), own_lr != 0, 0.0).to(tl.float64))
    factor = tl.where(maximize == 0, 1.0, -1.0)
    if grad_norm is not None:
        clip = tl.div_rn(1.0, tl.load(grad_norm) + 1e-6) * max_grad_norm
        factor *= tl.where(clip > 1, 1.0, clip)  # and a NaN stays

    count = tl.load(table + STEP * rows + r, inside, 0).to(tl.pointer_type(tl.float32))
    step = tl.load(count, inside, 0.0) + 1
    bias1 = 1 - tl.exp2(step.to(tl.float64) * tl.log2(beta1))
    bias2 = 1 - tl.exp2(step.to(tl.float64) * tl.log2(beta2))
    out = scalars + r * SCALARS
    tl.store(out + DECAY, (1 - lr * weight_decay).to(tl.float32), inside)
    tl.store(out + BETA1_COMPLEMENT, (1 - beta1).to(tl.float32), inside)
    tl.store(out + KEPT_BETA2, beta2.to(tl.float32), inside)
    tl.store(out + BETA2_COMPLEMENT, (1 - beta2).to(tl.float32), inside)
    tl.store(out + SQRT_BIAS2, tl.sqrt(bias2).to(tl.float32), inside)
    tl.store(out + INVERSE_SQRT_BIAS2, (1 / tl.sqrt(bias2)).to(tl.float32), inside)
    tl.store(out + ADDED, eps.to(tl.float32), inside)
    tl.store(out + STEP_SIZE, (-lr / bias1).to(tl.float32), inside)
    tl.store(out + FACTOR, factor, inside)
    if found_inf is not None:
        rows = tl.where(tl.load(found_inf) != 0, 0, rows)
    tl.store(count, step, r < rows)


@triton.jit
def find_item(table, rows, first_item, first_row, end_row):
    """This program's item: its number, its row, and the first and the last element + 1 of the row that are its.

    first_item [rows] numbers the items of the rows, and a launch's programs take those of rows first_row to end_row.
    """
    item = tl.load(first_item + first_row) + tl.program_id(0)
    low, high = first_row, end_row  # the row whose items include this one
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(first_item + middle) <= item
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    begin = (item - tl.load(first_item + low)) * ITEM
    return item, low, begin, tl.minimum(begin + ITEM, tl.load(table + NUMEL * rows + low))


@triton.jit
def address(table, rows, row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + COLUMN * rows + row).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def store(out, x, inside, key, step, start, KIND: tl.constexpr, WEIGHTS: tl.constexpr):
    """Stores a turn's tile x; bfloat16 with stochastic rounding takes the random bits of tensor KIND."""
    STORAGE: tl.constexpr = out.dtype.element_ty
    if STORAGE == tl.bfloat16 and WEIGHTS == STOCHASTIC:
        group = (start // 128 + tl.arange(0, BLOCK // 128)).to(tl.int32)
        random = tl.reshape(random_bits(key, step, KIND << 24, group[:, None]), x.shape).to(tl.int32)
        upper = tl.where(x == x, (x.to(tl.int32, bitcast=True) + random) >> 16, 0x7FC0)
        x = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(out, x.to(STORAGE), inside)


@triton.jit
def quantize(x, SIGNED: tl.constexpr):
    """Codes nearest to x [blocks, 256], and the blocks' absmax."""
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    absmax = tl.max(tl.abs(x), 1)
    lift = tl.where(absmax < 1, 2.0**64, 2.0**-64)  # with which no reciprocal is subnormal or infinite
    inverse = tl.div_rn(1.0, tl.where(absmax == 0, 1.0, absmax * lift))
    y = tl.abs(x * lift[:, None] * inverse[:, None])

    # Between 10^(d-7) and 10^(d-6) are c codes, the c-th of their sign and on, of which each stands for the middle of a
    # c-th of the range; so y is in that of code c + (10^(6-d) y - 0.1) c / 0.9, rounded down. The first one's has its
    # lower 1.8 / 9 nearer to the code below.
    FIRST: tl.constexpr = 1 if SIGNED else 2
    zero = y < 0.5e-6 * (0.1 + 0.45 / FIRST)
    power = tl.where(zero, 0.0, 1e6)
    c = tl.where(zero, 0.5, 1.0 * FIRST)
    for d in tl.static_range(1, 7):
        above = y >= 10.0 ** (d - 7) * (1 + 1.8 / (FIRST * 2.0**d))
        power = tl.where(above, 10.0 ** (6 - d), power)
        c = tl.where(above, FIRST * 2.0**d, c)
    n = c.to(tl.int32) + tl.minimum((y * power - 0.1) * (1 / 0.9) * c, c - 0.5).to(tl.int32)
    n = tl.where(y >= 1 - 0.225 / (FIRST * 64), FIRST * 128, n)
    code = tl.where(x < 0, 127 - n, 127 + n) if SIGNED else n - 1
    return tl.maximum(code, 0).to(tl.uint8), absmax  # -1 has no code; unsigned, n of 0 is 0


@triton.jit(do_not_specialize=["rows", "first_row", "end_row"])
def update_kernel(
    table, rows, first_item, first_row, end_row, scalars, maps, grad_scale, found_inf,
    DTYPE: tl.constexpr, STATE: tl.constexpr, WEIGHTS: tl.constexpr, AMSGRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One item of one row; `maps` [2, 256] are what the codes of m and v stand for."""
    _, row, begin, end = find_item(table, rows, first_item, first_row, end_row)
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) != 0, begin, end)
    param = address(table, rows, row, PARAM, tl.int16 if WEIGHTS == SPLIT else DTYPE, ALIGNED)
    grad = address(table, rows, row, GRAD, DTYPE, ALIGNED)
    exp_avg = address(table, rows, row, EXP_AVG, STATE, ALIGNED)
    exp_avg_sq = address(table, rows, row, EXP_AVG_SQ, STATE, ALIGNED)
    max_sq = address(table, rows, row, MAX_SQ, STATE, ALIGNED)
    wide = address(table, rows, row, WIDE, tl.int16 if WEIGHTS == SPLIT else tl.float32, ALIGNED)
    absmax = address(table, rows, row, ABSMAX, tl.float32, False)
    absmax_sq = address(table, rows, row, ABSMAX_SQ, tl.float32, False)
    key = tl.load(table + KEY * rows + row)
    step = tl.load(tl.load(table + STEP * rows + row).to(tl.pointer_type(tl.float32))).to(tl.int32)
    scalars += row * SCALARS
    decay = tl.load(scalars + DECAY)
    weight = tl.load(scalars + BETA1_COMPLEMENT)
    from_grad = weight >= 0.5  # m' = m + weight (g - m) from the nearer end, as torch's lerp
    weight = tl.where(from_grad, weight - 1, weight)
    beta2 = tl.load(scalars + KEPT_BETA2)
    beta2_complement = tl.load(scalars + BETA2_COMPLEMENT)
    sqrt_bias2 = tl.load(scalars + SQRT_BIAS2)
    inverse_sqrt_bias2 = tl.load(scalars + INVERSE_SQRT_BIAS2)
    eps = tl.load(scalars + ADDED)
    step_size = tl.load(scalars + STEP_SIZE)
    factor = tl.load(scalars + FACTOR)
    if grad_scale is not None:
        grad_scale = tl.load(grad_scale)

    in_block, block = tl.arange(0, QUANT_BLOCK)[None, :], tl.arange(0, BLOCK // QUANT_BLOCK)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else begin, end if TAIL else whole, BLOCK):
            i = start + block[:, None] * QUANT_BLOCK + in_block
            inside = i < end if TAIL else None
            g = tl.load(grad + i, inside).to(tl.float32)
            if grad_scale is not None:
                g = tl.div_rn(g, grad_scale)
            g *= factor
            if WEIGHTS == SPLIT:
                upper = tl.load(param + i, inside).to(tl.int32) << 16
                p = (upper + tl.load(wide + i, inside)).to(tl.float32, bitcast=True)
            elif WEIGHTS == MASTER:
                p = tl.load(wide + i, inside)
            else:
                p = tl.load(param + i, inside).to(tl.float32)
            p *= decay
            m, v = tl.load(exp_avg + i, inside), tl.load(exp_avg_sq + i, inside)
            if STATE == tl.uint8:
                b = start // QUANT_BLOCK + block
                begun = b * QUANT_BLOCK < end if TAIL else None
                m = tl.load(maps + m.to(tl.int32)) * tl.load(absmax + b, begun)[:, None]
                v = tl.load(maps + 256 + v.to(tl.int32)) * tl.load(absmax_sq + b, begun)[:, None]
            m, v = m.to(tl.float32), v.to(tl.float32)
            m = tl.fma(weight, g - m, tl.where(from_grad, g, m))
            v = tl.fma(beta2_complement * g, g, v * beta2)
            largest = v
            if AMSGRAD:
                largest = tl.maximum(tl.load(max_sq + i, inside).to(tl.float32), v, propagate_nan=tl.PropagateNan.ALL)
                store(max_sq + i, largest, inside, key, step, start, 3, WEIGHTS)
            root = tl.sqrt_rn(largest)
            if DTYPE == tl.float32 and STATE == tl.float32:
                root = tl.div_rn(root, sqrt_bias2)
            else:
                root *= inverse_sqrt_bias2
            p += tl.div_rn(step_size * m, root + eps)
            if WEIGHTS == SPLIT:
                bits = tl.where(p == p, p.to(tl.int32, bitcast=True), 0x7FC00000)
                tl.store(param + i, ((bits + 0x8000) >> 16).to(tl.int16), inside)
                tl.store(wide + i, bits.to(tl.int16), inside)
            else:
                store(param + i, p, inside, key, step, start, 0, WEIGHTS)
                if WEIGHTS == MASTER:
                    tl.store(wide + i, p, inside)
            if STATE == tl.uint8:
                codes, scale = quantize(tl.where(inside, v, 0.0) if TAIL else v, False)
                tl.store(exp_avg_sq + i, codes, inside)
                tl.store(absmax_sq + b, scale, begun)
                codes, scale = quantize(tl.where(inside, m, 0.0) if TAIL else m, True)
                tl.store(exp_avg + i, codes, inside)
                tl.store(absmax + b, scale, begun)
            else:
                store(exp_avg + i, m, inside, key, step, start, 1, WEIGHTS)
                store(exp_avg_sq + i, v, inside, key, step, start, 2, WEIGHTS)


@triton.jit(do_not_specialize=["rows", "first_row", "end_row"])
def squares_kernel(
    table, rows, first_item, first_row, end_row, partial, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """partial[item] = the sum of the squares of an item's gradients."""
    item, row, begin, end = find_item(table, rows, first_item, first_row, end_row)
    grad = address(table, rows, row, GRAD, DTYPE, ALIGNED)
    total = tl.zeros([BLOCK], tl.float64)
    whole = begin + (end - begin) // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else begin, end if TAIL else whole, BLOCK):
            i = start + tl.arange(0, BLOCK)
            g = (tl.load(grad + i, i < end, 0.0) if TAIL else tl.load(grad + i)).to(tl.float64)
            total += g * g
    tl.store(partial + item, tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def norm_kernel(partial, count, grad_scale, norm, SUM_BLOCK: tl.constexpr):
    total = tl.zeros([SUM_BLOCK], tl.float64)
    for start in range(0, count, SUM_BLOCK):
        i = start + tl.arange(0, SUM_BLOCK)
        total += tl.load(partial + i, i < count, 0.0)
    root = tl.sqrt(tl.sum(total, 0))
    if grad_scale is not None:
        root /= tl.load(grad_scale).to(tl.float64)
    tl.store(norm, root.to(tl.float32))


class Kind(NamedTuple):
    """Rows that one launch takes, first_row to end_row, and the number of their items."""

    dtype: tl.dtype
    state: tl.dtype
    weights: int
    amsgrad: bool
    aligned: bool
    first_row: int
    end_row: int
    items: int


def lay_out(table: Tensor, device: torch.device, *more: Tensor) -> tuple[list[Tensor], list[Kind]]:
    """On `device`: the table with its rows in the order of their kinds, each row's first item, and `more`, all flat;
    and the kinds."""
    aligned, amsgrad = (table[WALKED] % 16 == 0).all(0), table[MAX_SQ.value] != 0
    codes, order = (table[FORMAT.value] << 2 | amsgrad << 1 | aligned).sort(stable=True)
    table = table[:, order]
    counts = (table[NUMEL.value] + ITEM.value - 1) // ITEM.value
    ends = counts.cumsum(0)
    parts = [table.flatten(), ends - counts, *(part.flatten().view(torch.int64) for part in more)]
    buffer = to_device(torch.cat(parts), device)

    kinds, end_row = [], 0
    for code, rows in zip(*(t.tolist() for t in codes.unique_consecutive(return_counts=True)), strict=True):
        dtype, state, weights = DTYPES[code >> 2 & 15], DTYPES[code >> 6 & 15], code >> 10
        first_row, end_row = end_row, end_row + rows
        items = int(counts[first_row:end_row].sum())
        kinds.append(Kind(dtype, state, weights, bool(code & 2), bool(code & 1), first_row, end_row, items))
    return list(buffer.split([part.numel() for part in parts])), kinds


def step(
    table: Tensor,
    hypers: Tensor,
    maps: Tensor,
    device: torch.device,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_norm: Tensor | None,
    max_grad_norm: float,
) -> None:
    """Steps every tensor of the table.

    Args:
        table: int64 [columns, rows] on the CPU, as csrc/adamw.h has it.
        hypers: float64 [groups, HYPERS] on the CPU.
        maps: float32 [2, 256] on the CPU, what the codes of m and v stand for.
        device: where the tensors are.
        grad_scale, found_inf, grad_norm: one-element float32 on `device`, or None.
        max_grad_norm: of the clipping, where there is a `grad_norm`.
    """
    rows = table.shape[1]
    (table, first_item, hypers, maps), kinds = lay_out(table, device, hypers, maps)
    scalars = torch.empty(rows, SCALARS.value, device=device)
    with guard(device):
        scalars_kernel[(triton.cdiv(rows, SCALAR_ROWS),)](
            *(table, rows, hypers.view(torch.float64), scalars, found_inf, grad_norm, max_grad_norm),
            ROWS=SCALAR_ROWS,
            enable_fp_fusion=False,
        )
        for kind in kinds:
            update_kernel[(kind.items,)](
                *(table, rows, first_item, kind.first_row, kind.end_row, scalars, maps.view(torch.float32)),
                *(grad_scale, found_inf),
                DTYPE=kind.dtype,
                STATE=kind.state,
                WEIGHTS=kind.weights,
                AMSGRAD=kind.amsgrad,
                ALIGNED=kind.aligned,
                enable_fp_fusion=False,
            )


def grad_norm(table: Tensor, device: torch.device, grad_scale: Tensor | None, norm: Tensor) -> None:
    """Writes the 2-norm of all gradients of the table, over grad_scale, to `norm`. Squares are summed in float64, in an
    order that depends on the table alone.

    Args:
        table, device, grad_scale: as above.
        norm: one-element float32 on `device`.
    """
    rows = table.shape[1]
    (table, first_item), kinds = lay_out(table, device)
    count = sum(kind.items for kind in kinds)
    partial = torch.empty(count, dtype=torch.float64, device=device)
    with guard(device):
        for kind in kinds:
            squares_kernel[(kind.items,)](
                *(table, rows, first_item, kind.first_row, kind.end_row, partial),
                DTYPE=kind.dtype,
                ALIGNED=kind.aligned,
            )
        norm_kernel[(1,)](partial, count, grad_scale, norm, SUM_BLOCK=SUM_BLOCK, num_warps=16)
