"""LoRA linear in Triton: the contract is csrc/lora.h, the caller pyfront/ops/lora.py.

Three products make both passes, with the mask D of the dropout where the contract has it:

    down    out [M, R] = (t . D) w^T      s from x, a;    ds from dy, b
    up      out [M, C] = (t w) . D        y0 from s, b;   dx0 from ds, a
    outer   out [R, C] = t^T (u . D)      da from ds, x;  db from s, dy

`outer` is summed over parts of the rows, then the parts in a fixed order: no atomics, and the same bits every time.

Products take the adapter's type: in 16 bits as they are, in float32 for float32 x on the FMA units. A float32 adapter
on 16-bit x keeps its 24 bits on the tensor cores, as three TF32 products; AMD's multiply float32 as it is.

Floor: bytes over the copy rate; x is read twice, dy twice (for ds and for db), y0 and dx0 are written once.
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


# By bytes of an element of the adapter, and padded rank at most. A program of `down` and `outer` takes MAX_RANK of the
# rank, one turn of the loop of `up` UP_RANK.
MAX_RANK = 128
UP_RANK = {2: 64, 4: 32}
DOWN = {
    2: {32: Tile(64, 128, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(32, 64, 4, 3)},
    4: {32: Tile(32, 64, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2)},
}
UP = {
    2: {32: Tile(64, 128, 4, 1), 128: Tile(64, 64, 4, 1)},
    4: {128: Tile(64, 64, 4, 1)},
}
OUTER = {
    2: {32: Tile(64, 128, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 4, 3)},
    4: {32: Tile(32, 64, 4, 2), 64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2)},
}
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
def down_kernel(
    t, w, out, seed, M, C, R, t_row, w_rank, w_col, factor, threshold,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out [M, R] = factor (t . D) w^T."""
    if seed is not None:
        seed = tl.load(seed)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    acc = tl.zeros([ROWS, RANK], tl.float32)
    for c0 in range(0, C, COLS):
        col = c0 + tl.arange(0, COLS)
        t_tile = load_masked(t, row, t_row, col, M, C, seed, c0, threshold, COLS)
        w_tile = tl.load(
            w + rank[None, :] * w_rank + col[:, None] * w_col, (rank < R)[None, :] & (col < C)[:, None], 0.0
        )
        acc = tl.dot(t_tile.to(w_tile.dtype), w_tile, acc, input_precision=PRECISION)
    tl.store(
        out + row.to(tl.int64)[:, None] * R + rank[None, :], acc * factor, (row < M)[:, None] & (rank < R)[None, :]
    )


@triton.jit
def up_kernel(
    t, w, bias, out, seed, M, C, R, w_rank, w_col, factor, threshold,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out [M, C] = bias + factor (t w) . D."""
    if seed is not None:
        seed = tl.load(seed)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1) * COLS
    col = first_col + tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for r0 in range(0, R, RANK):
        rank = r0 + tl.arange(0, RANK)
        t_tile = tl.load(
            t + row.to(tl.int64)[:, None] * R + rank[None, :], (row < M)[:, None] & (rank < R)[None, :], 0.0
        )
        w_tile = tl.load(
            w + rank[:, None] * w_rank + col[None, :] * w_col, (rank < R)[:, None] & (col < C)[None, :], 0.0
        )
        acc = tl.dot(t_tile.to(w_tile.dtype), w_tile, acc, input_precision=PRECISION)
    acc *= factor
    if seed is not None:
        acc = tl.where(keep_mask(seed, row, 0, first_col, threshold, COLS), acc, 0.0)
    if bias is not None:
        acc += tl.load(bias + col, col < C, 0.0).to(tl.float32)[None, :]
    pointers = out + row.to(tl.int64)[:, None] * C + col[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), (row < M)[:, None] & (col < C)[None, :])


@triton.jit
def outer_kernel(
    t, u, out, seed, M, C, R, u_row, out_part, out_rank, out_col, part_rows, factor, threshold,
    DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out [part, R, C] = factor t^T (u . D) over the rows of each part."""
    if seed is not None:
        seed = tl.load(seed)
    first_col = tl.program_id(0) * COLS
    col = first_col + tl.arange(0, COLS)
    rank = tl.program_id(1) * RANK + tl.arange(0, RANK)
    first_row = tl.program_id(2) * part_rows
    acc = tl.zeros([COLS, RANK], tl.float32)
    for m0 in range(first_row, tl.minimum(first_row + part_rows, M), ROWS):
        row = m0 + tl.arange(0, ROWS)
        u_tile = load_masked(u, row, u_row, col, M, C, seed, first_col, threshold, COLS)
        t_tile = tl.load(
            t + row.to(tl.int64)[:, None] * R + rank[None, :], (row < M)[:, None] & (rank < R)[None, :], 0.0
        )
        acc = tl.dot(tl.trans(u_tile.to(DOT)), t_tile.to(DOT), acc, input_precision=PRECISION)
    out += tl.program_id(2).to(tl.int64) * out_part
    pointers = out + rank[None, :] * out_rank + col[:, None] * out_col
    tl.store(pointers, (acc * factor).to(out.dtype.element_ty), (rank < R)[None, :] & (col < C)[:, None])


@triton.jit
def sum_kernel(parts, out, count, size, SIZE: tl.constexpr):
    """out [size] = sum of parts [count, size], in order."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for _ in range(count):
        total += tl.load(parts + i, i < size, 0.0)
        parts += size
    tl.store(out + i, total.to(out.dtype.element_ty), i < size)


def options(
    table: dict[int, dict[int, Tile]], rank: int, x_dtype: torch.dtype, w: Tensor
) -> tuple[Tile, dict[str, Any]]:
    """Tile and compile-time arguments of a product with w of an adapter, or for its gradient, `rank` of its rank at a
    time."""
    tile = next(tile for most, tile in table[w.dtype.itemsize].items() if rank <= most)
    amd = device.capability(w.device) == device.AMD
    return tile, {
        "PRECISION": "ieee" if amd or x_dtype == torch.float32 else "tf32x3",  # of float32 adapters
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "RANK": rank,
        "num_warps": tile.warps,
        "num_stages": min(tile.stages, 2) if amd else tile.stages,  # 64 KiB of shared memory
        "enable_fp_fusion": True,
    }


def padded(R: int, most: int) -> int:
    return min(max(16, triton.next_power_of_2(R)), most)


def down(
    t: Tensor, w: Tensor, w_strides: tuple[int, int], out: Tensor, factor: float, threshold: int, seed: Tensor | None
) -> None:
    (M, C), R = t.shape, out.shape[1]
    tile, constants = options(DOWN, padded(R, MAX_RANK), t.dtype, w)
    grid = (triton.cdiv(M, tile.rows), triton.cdiv(R, constants["RANK"]))
    down_kernel[grid](t, w, out, seed, M, C, R, t.stride(0), *w_strides, factor, threshold, **constants)


def up(
    t: Tensor,
    w: Tensor,
    w_strides: tuple[int, int],
    bias: Tensor | None,
    out: Tensor,
    x_dtype: torch.dtype,
    factor: float,
    threshold: int,
    seed: Tensor | None,
) -> None:
    (M, C), R = out.shape, t.shape[1]
    tile, constants = options(UP, padded(R, UP_RANK[w.dtype.itemsize]), x_dtype, w)
    grid = (triton.cdiv(M, tile.rows), triton.cdiv(C, tile.cols))
    up_kernel[grid](t, w, bias, out, seed, M, C, R, *w_strides, factor, threshold, **constants)


def outer(
    t: Tensor, u: Tensor, out: Tensor, out_strides: tuple[int, int], factor: float, threshold: int, seed: Tensor | None
) -> None:
    (M, C), R = u.shape, t.shape[1]
    tile, constants = options(OUTER, padded(R, MAX_RANK), u.dtype, out)
    blocks = triton.cdiv(C, tile.cols), triton.cdiv(R, constants["RANK"])
    wanted = min(triton.cdiv(PROGRAMS, blocks[0] * blocks[1]), triton.cdiv(M, PART_TILES * tile.rows))
    part_rows = triton.cdiv(triton.cdiv(M, max(wanted, 1)), tile.rows) * tile.rows
    count = triton.cdiv(M, part_rows) if M else 1
    parts = out if count == 1 else out.new_empty(count, *out.shape, dtype=torch.float32)
    outer_kernel[(*blocks, count)](
        *(t, u, parts, seed, M, C, R, u.stride(0), out.numel(), *out_strides, part_rows, factor, threshold),
        DOT=DOT_TYPES[out.dtype],
        **constants,
    )
    if count > 1:
        grid = (triton.cdiv(out.numel(), SUM_SIZE),)
        sum_kernel[grid](parts, out, count, out.numel(), SIZE=SUM_SIZE, enable_fp_fusion=True)


DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    y: Tensor,
    s: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes y0 to y, and s. Arguments as in csrc/lora.h; seed is a one-element int64 tensor, or None."""
    K, R = x.shape[1], a.shape[0]
    threshold, kept_scale = dropped(dropout_p)
    with device.guard(x.device):
        down(x, a, (K, 1), s, kept_scale, threshold, seed)
        up(s, b, (1, R), bias, y, x.dtype, scale, 0, None)


def backward(
    dy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    dx: Tensor,
    da: Tensor,
    db: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes dx0 to dx, da and db, each unless it has no elements. Arguments as in csrc/lora.h and `forward`."""
    K, R = x.shape[1], a.shape[0]
    threshold, kept_scale = dropped(dropout_p)
    with device.guard(x.device):
        if dx.numel() or da.numel():
            ds = torch.empty_like(s)
            down(dy, b, (1, R), ds, scale, 0, None)
        if dx.numel():
            up(ds, a, (K, 1), None, dx, x.dtype, kept_scale, threshold, seed)
        if da.numel():
            outer(ds, x, da, (K, 1), kept_scale, threshold, seed)
        if db.numel():
            outer(s, dy, db, (1, R), scale, 0, None)
