"""LoRA linear in Triton: the maths is that of csrc/lora.h, the caller pyfront/ops/lora.py.

Three products make both passes, with the mask D of the dropout where the contract has it:

    down    out [M, R]    = factor (t . D) w^T            s from x, a;    ds from dy, b^T
    up      out [M, C] (+)= bias + factor (t w) . D       y from s, b^T;  dx from ds, a
    outer   out [R, C]    = factor t^T (u . D)            da from ds, x;  db^T from s, dy

`linear` is `up` and the product with the frozen weight in one: the accumulator starts as the low-rank product.

A stack of adapters that share x has one call: its w is theirs, one below another, and t or out theirs side by side.
With dropout, `seed` has one element for all or one for each adapter, whose ranks are then equal. Programs that read the
same rows of x for different ranks are neighbours, so that all but the first find them in the cache.

`outer` is summed over parts of the rows, then the parts in a fixed order: no atomics, and the same bits every time.

Products take w's type: in 16 bits as they are, in float32 for float32 x on the FMA units. A float32 adapter on 16-bit x
keeps its 24 bits on the tensor cores, as three TF32 products; AMD's multiply float32 as it is.

Floor: bytes over the copy rate; x is read twice, dy twice (for ds and for db), y and dx are read and written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusetune.kernels import device
from fusetune.kernels.philox import dropped, keep_mask


class Tile(NamedTuple):
    """Rows and columns of a tile of x, y, dx or dy, and the launch options that go with it."""

    rows: int
    cols: int
    warps: int
    stages: int
    depth: int = 0  # of the product with the frozen weight, at a time


# By bytes of an element of the adapter, and padded rank at most. A program of `down` and `outer` takes MAX_RANK of the
# rank, one turn of the loop of `up` UP_RANK.
MAX_RANK = 128
UP_RANK = {2: 64, 4: 32}
DOWN = {
    2: {32: Tile(64, 128, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(32, 64, 4, 3)},
    4: {32: Tile(32, 64, 4, 3), 64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2)},
}
UP = {
    2: {32: Tile(64, 128, 4, 1), 128: Tile(64, 64, 4, 1)},
    4: {128: Tile(64, 64, 4, 1)},
}
UP_MASKS = Tile(64, 64, 4, 1)  # with a second accumulator, for the sum over masks
OUTER = {
    2: {32: Tile(64, 128, 4, 3), 64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 3)},
    4: {32: Tile(32, 64, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2)},
}
# By compute capability, 8 standing for those not listed. Larger ones spill, for the sake of the low-rank product.
LINEAR = {
    8: (Tile(128, 128, 8, 3, 64), Tile(64, 128, 4, 3, 64)),
    9: (Tile(128, 128, 8, 4, 64), Tile(64, 128, 4, 4, 64)),
}
LINEAR_RANK = {2: 64, 4: 16}  # of one turn of its first loop
LINEAR_ROW_BLOCKS = 8  # that neighbouring programs go through before the next columns, for the second-level cache
PROGRAMS = 512  # that the rows are cut up for: about four on each of a large GPU's 132 multiprocessors
PART_TILES = 4  # of rows, at least
SUM_SIZE = 1024


@triton.jit
def load_masked(t, row, row_stride, col, M, C, seed, first_col, threshold, COLS: tl.constexpr):
    """t . D at [ROWS, COLS], zeros beyond [M, C]; seed is its value."""
    tile = tl.load(
        t + row.to(tl.int64)[:, None] * row_stride + col[None, :], (row < M)[:, None] & (col < C)[None, :], 0.0
    )
    if seed is not None:
        tile = tl.where(keep_mask(seed, row, 0, first_col, threshold, COLS), tile, 0.0)
    return tile


@triton.jit
def ranks(block, run, RANK: tl.constexpr):
    """The mask, the ranks and which of them exist of a block of the ranks, of which each mask has `run`."""
    blocks = tl.cdiv(run, RANK)
    of_run = block % blocks * RANK + tl.arange(0, RANK)
    return block // blocks, block // blocks * run + of_run, of_run < run


@triton.jit
def low_rank(
    t, w, seed, row, col, first_col, M, C, run, t_row, w_rank, w_col, factor, threshold,
    MASKS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """factor (t w) . D at [ROWS, COLS], summed over the masks."""
    total = tl.zeros([ROWS, COLS], tl.float32)
    for mask in range(MASKS):
        acc = tl.zeros([ROWS, COLS], tl.float32)
        for r0 in range(0, run, RANK):
            of_run = r0 + tl.arange(0, RANK)
            rank = mask * run + of_run
            t_tile = tl.load(
                t + row.to(tl.int64)[:, None] * t_row + rank[None, :], (row < M)[:, None] & (of_run < run)[None, :], 0.0
            )
            w_tile = tl.load(
                w + rank.to(tl.int64)[:, None] * w_rank + col.to(tl.int64)[None, :] * w_col,
                (of_run < run)[:, None] & (col < C)[None, :],
                0.0,
            )
            acc = tl.dot(t_tile.to(w_tile.dtype), w_tile, acc, input_precision=PRECISION)
        if seed is not None:
            acc = tl.where(keep_mask(tl.load(seed + mask), row, 0, first_col, threshold, COLS), acc, 0.0)
        total += acc
    return total * factor


@triton.jit
def down_kernel(
    t, w, out, seed, M, C, run, masks, t_row, w_rank, w_col, out_row, factor, threshold,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out [M, masks run] = factor (t . D) w^T."""
    blocks = masks * tl.cdiv(run, RANK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    mask, rank, exists = ranks(tl.program_id(0) % blocks, run, RANK)
    if seed is not None:
        seed = tl.load(seed + mask)
    w += rank.to(tl.int64)[None, :] * w_rank
    acc = tl.zeros([ROWS, RANK], tl.float32)
    for c0 in range(0, C, COLS):
        col = c0 + tl.arange(0, COLS)
        t_tile = load_masked(t, row, t_row, col, M, C, seed, c0, threshold, COLS)
        w_tile = tl.load(w + col.to(tl.int64)[:, None] * w_col, exists[None, :] & (col < C)[:, None], 0.0)
        acc = tl.dot(t_tile.to(w_tile.dtype), w_tile, acc, input_precision=PRECISION)
    pointers = out + row.to(tl.int64)[:, None] * out_row + rank[None, :]
    tl.store(pointers, acc * factor, (row < M)[:, None] & exists[None, :])


@triton.jit
def up_kernel(
    t, w, bias, out, seed, M, C, run, t_row, w_rank, w_col, out_row, factor, threshold,
    ACCUMULATE: tl.constexpr,
    MASKS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out [M, C] (+)= bias + factor (t w) . D."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1) * COLS
    col = first_col + tl.arange(0, COLS)
    acc = low_rank(
        t, w, seed, row, col, first_col, M, C, run, t_row, w_rank, w_col, factor, threshold,
        MASKS, PRECISION, ROWS, COLS, RANK,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + col, col < C, 0.0).to(tl.float32)[None, :]
    pointers = out + row.to(tl.int64)[:, None] * out_row + col[None, :]
    inside = (row < M)[:, None] & (col < C)[None, :]
    if ACCUMULATE:
        acc += tl.load(pointers, inside, 0.0).to(tl.float32)
    tl.store(pointers, acc.to(out.dtype.element_ty), inside)


@triton.jit
def outer_kernel(
    t, u, out, seed, M, C, run, masks, t_row, u_row, out_part, out_rank, out_col, part_rows, factor, threshold,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out [part, masks run, C] = factor t^T (u . D) over the rows of each part."""
    blocks = masks * tl.cdiv(run, RANK)
    first_col = tl.program_id(0) // blocks * COLS
    col = first_col + tl.arange(0, COLS)
    mask, rank, exists = ranks(tl.program_id(0) % blocks, run, RANK)
    if seed is not None:
        seed = tl.load(seed + mask)
    first_row = tl.program_id(1) * part_rows
    acc = tl.zeros([COLS, RANK], tl.float32)
    for m0 in range(first_row, tl.minimum(first_row + part_rows, M), ROWS):
        row = m0 + tl.arange(0, ROWS)
        u_tile = load_masked(u, row, u_row, col, M, C, seed, first_col, threshold, COLS)
        t_tile = tl.load(
            t + row.to(tl.int64)[:, None] * t_row + rank[None, :], (row < M)[:, None] & exists[None, :], 0.0
        )
        acc = tl.dot(tl.trans(u_tile.to(DOT)), t_tile.to(DOT), acc, input_precision=PRECISION)
    out += tl.program_id(1).to(tl.int64) * out_part
    pointers = out + rank.to(tl.int64)[None, :] * out_rank + col.to(tl.int64)[:, None] * out_col
    tl.store(pointers, (acc * factor).to(out.dtype.element_ty), exists[None, :] & (col < C)[:, None])


@triton.jit
def sum_kernel(parts, out, count, size, width, out_row, out_col, SIZE: tl.constexpr):
    """out [size div width, width] = sum of parts [count, size], in order."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for _ in range(count):
        total += tl.load(parts + i, i < size, 0.0)
        parts += size
    pointers = out + (i // width).to(tl.int64) * out_row + (i % width).to(tl.int64) * out_col
    tl.store(pointers, total.to(out.dtype.element_ty), i < size)


@triton.jit
def linear_kernel(
    x, v, t, w, bias, out, seed, M, C, K, R, x_row, v_row, v_col, t_row, w_rank, w_col, out_row, factor, threshold,
    ROW_BLOCKS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out [M, C] = bias + factor (t w) . D + x v^T."""
    row_blocks, col_blocks = tl.cdiv(M, ROWS), tl.cdiv(C, COLS)
    group = tl.program_id(0) // (ROW_BLOCKS * col_blocks)
    in_group = tl.program_id(0) % (ROW_BLOCKS * col_blocks)
    height = tl.minimum(row_blocks - group * ROW_BLOCKS, ROW_BLOCKS)
    row = (group * ROW_BLOCKS + in_group % height) * ROWS + tl.arange(0, ROWS)
    first_col = in_group // height * COLS
    col = first_col + tl.arange(0, COLS)
    acc = low_rank(
        t, w, seed, row, col, first_col, M, C, R, t_row, w_rank, w_col, factor, threshold,
        1, PRECISION, ROWS, COLS, RANK,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + col, col < C, 0.0).to(tl.float32)[None, :]
    x += row.to(tl.int64)[:, None] * x_row
    v += col.to(tl.int64)[None, :] * v_row
    for k0 in range(0, K, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        x_tile = tl.load(x + k[None, :], (row < M)[:, None] & (k < K)[None, :], 0.0)
        v_tile = tl.load(v + k.to(tl.int64)[:, None] * v_col, (col < C)[None, :] & (k < K)[:, None], 0.0)
        acc = tl.dot(x_tile, v_tile, acc)
    pointers = out + row.to(tl.int64)[:, None] * out_row + col[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), (row < M)[:, None] & (col < C)[None, :])


def options(tile: Tile, rank: int, x_dtype: torch.dtype, where: torch.device) -> dict[str, Any]:
    """Compile-time arguments of a product, `rank` of the adapter's rank at a time."""
    amd = device.capability(where) == device.AMD
    return {
        "PRECISION": "ieee" if amd or x_dtype == torch.float32 else "tf32x3",  # of float32 adapters
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "RANK": rank,
        "num_warps": tile.warps,
        "num_stages": min(tile.stages, 2) if amd else tile.stages,  # 64 KiB of shared memory
        "enable_fp_fusion": True,
    }


def choose_tile(table: dict[int, dict[int, Tile]], rank: int, dtype: torch.dtype) -> Tile:
    return next(tile for most, tile in table[dtype.itemsize].items() if rank <= most)


def padded(R: int, most: int) -> int:
    return min(max(16, triton.next_power_of_2(R)), most)


def mask_arguments(R: int, dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, int, int, float]:
    """seed or None, ranks of a mask, number of masks, threshold, factor of kept elements."""
    threshold, kept_scale = dropped(dropout_p)
    seed = seed if threshold else None
    masks = 1 if seed is None else seed.numel()
    return seed, R // masks, masks, threshold, kept_scale


def down(t: Tensor, w: Tensor, out: Tensor, factor: float, dropout_p: float, seed: Tensor | None) -> None:
    """out = factor (t . D) w^T.

    Args:
        t: [M, C], float32, bfloat16 or float16; neighbouring elements within a row, rows any stride apart.
        w: [R, C], t's dtype or float32, in which the product is taken; any strides.
        out: [M, R] float32, as t.
        factor: multiplies the product, as does 65536/(65536 - threshold) of csrc/philox.h, which is 1 without dropout.
        dropout_p: probability of dropping an element of t; D is the mask of 0 and 1.
        seed: [A] int64 on the device, contiguous. Mask i is for the i-th of A equal runs of the R ranks. Not read
            where dropout_p rounds to 0.
    """
    (M, C), R = t.shape, out.shape[1]
    seed, run, masks, threshold, kept_scale = mask_arguments(R, dropout_p, seed)
    rank = padded(run, MAX_RANK)
    tile = choose_tile(DOWN, rank, w.dtype)
    grid = (triton.cdiv(M, tile.rows) * masks * triton.cdiv(run, rank),)
    with device.guard(t.device):
        down_kernel[grid](
            *(t, w, out, seed, M, C, run, masks, t.stride(0), *w.stride(), out.stride(0)),
            *(factor * kept_scale, threshold),
            **options(tile, rank, t.dtype, t.device),
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
    """out = bias + factor (t w) . D, added to what out holds where `accumulate`.

    Args:
        t: [M, R] float32; neighbouring elements within a row, rows any stride apart.
        w: [R, C], out's dtype or float32, in which the product is taken; any strides.
        bias: [C] contiguous, out's dtype or float32; or None.
        out: [M, C], float32, bfloat16 or float16, as t.
        factor, dropout_p, seed: as in `down`, of the elements of t w; summed over the masks.
    """
    (M, C), R = out.shape, t.shape[1]
    seed, run, masks, threshold, kept_scale = mask_arguments(R, dropout_p, seed)
    rank = padded(run, UP_RANK[w.dtype.itemsize])
    tile = choose_tile(UP, rank, w.dtype) if masks == 1 else UP_MASKS
    grid = (triton.cdiv(M, tile.rows), triton.cdiv(C, tile.cols))
    with device.guard(out.device):
        up_kernel[grid](
            *(t, w, bias, out, seed, M, C, run, t.stride(0), *w.stride(), out.stride(0)),
            *(factor * kept_scale, threshold),
            ACCUMULATE=accumulate,
            MASKS=masks,
            **options(tile, rank, out.dtype, out.device),
        )


def outer(
    t: Tensor,
    u: Tensor,
    out: Tensor,
    factor: float,
    dropout_p: float,
    seed: Tensor | None,
    dot_dtype: torch.dtype,
) -> None:
    """out = factor t^T (u . D).

    Args:
        t: [M, R] float32; neighbouring elements within a row, rows any stride apart.
        u: [M, C], float32, bfloat16 or float16, as t.
        out: [R, C], u's dtype or float32; any strides.
        factor, dropout_p, seed: as in `down`, of the elements of u.
        dot_dtype: u's dtype or float32, in which the product is taken.
    """
    (M, C), R = u.shape, t.shape[1]
    seed, run, masks, threshold, kept_scale = mask_arguments(R, dropout_p, seed)
    rank = padded(run, MAX_RANK)
    tile = choose_tile(OUTER, rank, dot_dtype)
    blocks = triton.cdiv(C, tile.cols) * masks * triton.cdiv(run, rank)
    wanted = min(triton.cdiv(PROGRAMS, max(blocks, 1)), triton.cdiv(M, PART_TILES * tile.rows))
    part_rows = triton.cdiv(triton.cdiv(M, max(wanted, 1)), tile.rows) * tile.rows
    count = triton.cdiv(M, part_rows) if M else 1
    by_rank = out if out.stride(0) >= out.stride(1) else out.t()  # parts are stored as out is
    parts = by_rank if count == 1 else out.new_empty(count, *by_rank.shape, dtype=torch.float32)
    strides = parts.stride()[-2:] if by_rank is out else parts.stride()[:-3:-1]
    with device.guard(u.device):
        outer_kernel[(blocks, count)](
            *(t, u, parts, seed, M, C, run, masks, t.stride(0), u.stride(0), out.numel(), *strides, part_rows),
            *(factor * kept_scale, threshold),
            DOT=DOT_TYPES[dot_dtype],
            **options(tile, rank, u.dtype, u.device),
        )
        if count > 1:
            sum_kernel[(triton.cdiv(out.numel(), SUM_SIZE),)](
                *(parts, by_rank, count, out.numel(), by_rank.shape[1], *by_rank.stride()),
                SIZE=SUM_SIZE,
                enable_fp_fusion=True,
            )


def linear(
    x: Tensor,
    v: Tensor,
    t: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    factor: float,
    dropout_p: float,
    seed: Tensor | None,
    tile: Tile,
) -> None:
    """out = bias + factor (t w) . D + x v^T: `up`, and a linear layer, without the pass over memory between them.

    Args:
        x: [M, K], bfloat16 or float16; neighbouring elements within a row, rows any stride apart.
        v: [C, K] of x's dtype, any strides: the frozen weight, or for dx its transpose.
        t, w, bias, out, factor, dropout_p, seed: as in `up`, with one mask; out has x's dtype.
        tile: one of linear_tiles.
    """
    (M, C), R, K = out.shape, t.shape[1], x.shape[1]
    threshold, kept_scale = dropped(dropout_p)
    seed = seed if threshold else None
    rank = padded(R, LINEAR_RANK[w.dtype.itemsize])
    grid = (triton.cdiv(M, tile.rows) * triton.cdiv(C, tile.cols),)
    with device.guard(out.device):
        linear_kernel[grid](
            *(x, v, t, w, bias, out, seed, M, C, K, R),
            *(x.stride(0), *v.stride(), t.stride(0), *w.stride(), out.stride(0), factor * kept_scale, threshold),
            ROW_BLOCKS=LINEAR_ROW_BLOCKS,
            DEPTH=tile.depth,
            **options(tile, rank, x.dtype, out.device),
        )


def linear_tiles(where: torch.device) -> tuple[Tile, ...]:
    """Tiles for `linear` to be measured with on a device."""
    return LINEAR.get(device.capability(where), LINEAR[8])


DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
