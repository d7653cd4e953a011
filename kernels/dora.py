"""What DoRA adds to LoRA linear, in Triton: the contract is csrc/dora.h, the caller pyfront/ops/dora.py.

Floor: bytes over the copy rate; each kernel touches its tensors once. Sums over rows are made in parts, and the parts
are added in a fixed order: no atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusetune.kernels import device
from fusetune.kernels.philox import dropped, keep_mask

NORM_ROWS, NORM_COLS, NORM_RANK = 32, 64, 32
ROWS, COLS = 16, 128
PROGRAMS = 512  # that the rows are cut up for: about four on each of a large GPU's 132 multiprocessors


@triton.jit
def norm_kernel(
    w, a, b, norm, N, K, R, w_row, w_col, scale,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """norm [N] = |w + scale b a| by rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros([ROWS], tl.float32)
    for c0 in range(0, K, COLS):
        col = c0 + tl.arange(0, COLS)
        inside = (row < N)[:, None] & (col < K)[None, :]
        delta = tl.zeros([ROWS, COLS], tl.float32)
        for r0 in range(0, R, RANK):
            rank = r0 + tl.arange(0, RANK)
            b_tile = tl.load(
                b + row.to(tl.int64)[:, None] * R + rank[None, :], (row < N)[:, None] & (rank < R)[None, :], 0.0
            )
            a_tile = tl.load(
                a + rank.to(tl.int64)[:, None] * K + col[None, :], (rank < R)[:, None] & (col < K)[None, :], 0.0
            )
            delta = tl.dot(b_tile, a_tile, delta, input_precision=PRECISION)
        w_tile = tl.load(w + row.to(tl.int64)[:, None] * w_row + col.to(tl.int64)[None, :] * w_col, inside, 0.0)
        value = w_tile.to(tl.float32) + scale * delta
        squares += tl.sum(value * value, 1)
    tl.store(norm + row, tl.sqrt(squares), row < N)


@triton.jit
def scale_kernel(pre, g, bias, rest, y, M, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y [M, N] = g . pre + bias + rest."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < M)[:, None] & (col < N)[None, :]
    offsets = row.to(tl.int64)[:, None] * N + col[None, :]
    out = tl.load(g + col, col < N, 0.0)[None, :] * tl.load(pre + offsets, inside, 0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + col, col < N, 0.0)[None, :]
    if rest is not None:
        out += tl.load(rest + offsets, inside, 0.0).to(tl.float32)
    tl.store(y + offsets, out.to(y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(dy, pre, g, dpre, sums, M, N, dy_row, part_rows, ROWS: tl.constexpr, COLS: tl.constexpr):
    """dpre [M, N] = g . dy, and sums [part, 2, N] of dy pre and of dy over the rows of each part."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first_row = tl.program_id(1) * part_rows
    factor = tl.load(g + col, col < N, 0.0)[None, :]
    dg = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    for m0 in range(first_row, tl.minimum(first_row + part_rows, M), ROWS):
        row = m0 + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (col < N)[None, :]
        offsets = row.to(tl.int64)[:, None] * N + col[None, :]
        dy_tile = tl.load(dy + row.to(tl.int64)[:, None] * dy_row + col[None, :], inside, 0.0).to(tl.float32)
        dg += dy_tile * tl.load(pre + offsets, inside, 0.0).to(tl.float32)
        dbias += dy_tile
        tl.store(dpre + offsets, (factor * dy_tile).to(dpre.dtype.element_ty), inside)
    sums += tl.program_id(1).to(tl.int64) * 2 * N
    tl.store(sums + col, tl.sum(dg, 0), col < N)
    tl.store(sums + N + col, tl.sum(dbias, 0), col < N)


@triton.jit
def sum_kernel(sums, dg, dbias, count, N, COLS: tl.constexpr):
    """dg and dbias [N] = sums [count, 2, N] over the parts, in order."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total_g = tl.zeros([COLS], tl.float32)
    total_bias = tl.zeros([COLS], tl.float32)
    for _ in range(count):
        total_g += tl.load(sums + col, col < N, 0.0)
        total_bias += tl.load(sums + N + col, col < N, 0.0)
        sums += 2 * N
    tl.store(dg + col, total_g, col < N)
    tl.store(dbias + col, total_bias, col < N)


@triton.jit
def dropout_kernel(x, out, seed, M, K, x_row, factor, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out [M, K] = x . D."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_col = tl.program_id(1) * COLS
    col = first_col + tl.arange(0, COLS)
    inside = (row < M)[:, None] & (col < K)[None, :]
    tile = tl.load(x + row.to(tl.int64)[:, None] * x_row + col[None, :], inside, 0.0).to(tl.float32) * factor
    tile = tl.where(keep_mask(tl.load(seed), row, 0, first_col, threshold, COLS), tile, 0.0)
    tl.store(out + row.to(tl.int64)[:, None] * K + col[None, :], tile.to(out.dtype.element_ty), inside)


def norm(w: Tensor, a: Tensor, b: Tensor, out: Tensor, scale: float) -> None:
    """Arguments as in csrc/dora.h."""
    (N, K), R = w.shape, a.shape[0]
    exact = a.dtype != torch.float32 or device.capability(w.device) == device.AMD or w.dtype == torch.float32
    with device.guard(w.device):
        norm_kernel[(triton.cdiv(N, NORM_ROWS),)](
            *(w, a, b, out, N, K, R, w.stride(0), w.stride(1), scale),
            PRECISION="ieee" if exact else "tf32x3",
            ROWS=NORM_ROWS,
            COLS=NORM_COLS,
            RANK=NORM_RANK,
            enable_fp_fusion=True,
        )


def forward(pre: Tensor, g: Tensor, bias: Tensor | None, rest: Tensor | None, y: Tensor) -> None:
    """Arguments as in csrc/dora.h."""
    M, N = pre.shape
    with device.guard(pre.device):
        grid = (triton.cdiv(M, ROWS), triton.cdiv(N, COLS))
        scale_kernel[grid](pre, g, bias, rest, y, M, N, ROWS=ROWS, COLS=COLS, enable_fp_fusion=True)


def backward(dy: Tensor, pre: Tensor, g: Tensor, dpre: Tensor, dg: Tensor, dbias: Tensor) -> None:
    """Arguments as in csrc/dora.h."""
    M, N = pre.shape
    strips = triton.cdiv(N, COLS)
    parts = min(triton.cdiv(PROGRAMS, strips), triton.cdiv(M, ROWS))
    part_rows = triton.cdiv(triton.cdiv(M, parts), ROWS) * ROWS
    parts = triton.cdiv(M, part_rows)
    sums = g.new_empty(parts, 2, N)
    with device.guard(pre.device):
        backward_kernel[(strips, parts)](
            *(dy, pre, g, dpre, sums, M, N, dy.stride(0), part_rows), ROWS=ROWS, COLS=COLS, enable_fp_fusion=True
        )
        sum_kernel[(strips,)](sums, dg, dbias, parts, N, COLS=COLS, enable_fp_fusion=True)


def dropout(x: Tensor, out: Tensor, dropout_p: float, seed: Tensor) -> None:
    """Arguments as in csrc/dora.h; seed is a one-element int64 tensor."""
    M, K = x.shape
    threshold, factor = dropped(dropout_p)
    with device.guard(x.device):
        grid = (triton.cdiv(M, ROWS), triton.cdiv(K, COLS))
        dropout_kernel[grid](
            *(x, out, seed, M, K, x.stride(0), factor, threshold), ROWS=ROWS, COLS=COLS, enable_fp_fusion=True
        )
