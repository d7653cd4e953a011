"""Gradients of flash attention's biases and sinks, with 2 products more than flash_attention.py's backward, or none:

    dbias       a program owns a tile of it and sums ds over the dimensions that bias is broadcast in
    drelative   a program owns the tiles along one diagonal, whose ds it adds up before the sum along their diagonals
    dsinks      from lse and delta alone

Without atomics, and the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusetune.kernels import device
from fusetune.kernels.flash_attention_tile import (
    HIDDEN,
    Call,
    Tile,
    head_of,
    kept_keys,
    keys_of,
    load_gradient,
    load_rows,
    load_statistics,
    options,
    run_of,
    strides,
    tile_backward,
)

# As those of flash_attention.py, with as many queries as keys.
BIAS_BACKWARD = {
    (device.AMD, 2): {128: Tile(64, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    (device.AMD, 4): {256: Tile(32, 32, 4, 1)},
    (8, 2): {64: Tile(64, 64, 8, 2), 128: Tile(32, 32, 4, 2), 256: Tile(32, 32, 8, 1)},
    (8, 4): {128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 8, 1)},
    (9, 2): {128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
}
RELATIVE_BACKWARD = BIAS_BACKWARD | {
    (8, 2): {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    (8, 4): {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 16, 1), 256: Tile(32, 32, 8, 1)},
    (9, 2): {64: Tile(64, 64, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
}
SINKS_ROWS = 1024
PROGRAMS = 512  # of relative_backward_kernel at least, where there are batches enough: four on a multiprocessor


@triton.jit
def ds_of(
    grad_o, q, k, v, lse, delta, grad_o_stride, q_stride, k_stride, v_stride, call, b, h, i0, j0, q0, Sq, k0, Sk, seed,
    D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """ds [QUERIES, KEYS] at any i0 and j0, 0 outside of the sequences; j0 is a multiple of KEYS."""
    i = i0 + tl.arange(0, QUERIES)
    j = j0 + tl.arange(0, KEYS)
    inside = (i >= 0) & (i < Sq)
    kept = kept_keys(j, b, Sk, call, True)
    h_kv = h // call.GROUP
    q_tile = load_rows(head_of(q, q_stride, b, h, call.q_starts, q0), i, q_stride[2], inside, D, DIM)
    k_tile = load_rows(head_of(k, k_stride, b, h_kv, call.k_starts, k0), j, k_stride[2], kept, D, DIM)
    v_tile = load_rows(head_of(v, v_stride, b, h_kv, call.k_starts, k0), j, v_stride[2], kept, DV, DIM_V)
    lse = head_of(lse, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    delta = head_of(delta, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    row_lse, row_delta = load_statistics(lse, delta, i, inside, call)
    grad_o = head_of(grad_o, grad_o_stride, b, h, call.q_starts, q0)
    do = load_gradient(grad_o, i, grad_o_stride[2], inside, row_lse, call, DV, DIM_V)
    shift = call.bottom_right * (Sk - Sq)
    _, ds, _ = tile_backward(
        q_tile, k_tile, do, v_tile, row_lse, row_delta, i, j0, kept, b, h, shift, Sq, call, seed, True, KEYS, 0
    )  # fmt: skip
    return ds


@triton.jit
def bias_backward_kernel(
    grad_o, q, k, v, lse, delta, dbias, grad_o_stride, q_stride, k_stride, v_stride, call,
    B, dbias_B, dbias_H, q_blocks, k_blocks, dbias_b, dbias_h, dbias_q, dbias_k,
    D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SUM_QUERIES: tl.constexpr, SUM_KEYS: tl.constexpr,
):  # fmt: skip
    """dbias [dbias_B, dbias_H, .., ..]: a block of it, of the sum over what it is broadcast in."""
    j_first = tl.program_id(0) % k_blocks * KEYS
    i_first = tl.program_id(0) // k_blocks % q_blocks * QUERIES
    head = tl.program_id(0) // (k_blocks * q_blocks)
    seed = call.seed
    if seed is not None:
        seed = tl.load(seed)
    shift = call.bottom_right * (call.Sk - call.Sq)
    step = k_blocks * KEYS
    acc = tl.zeros([QUERIES, KEYS], tl.float32)
    # One turn of each loop but those over dimensions that bias is broadcast in, for which dbias has one block.
    for b in range(head // dbias_H, B, dbias_B):
        for h in range(head % dbias_H, call.H, dbias_H):
            for i0 in range(i_first, call.Sq, q_blocks * QUERIES):
                start, _, _, end = keys_of(i0, b, shift, call.Sk, call, QUERIES, KEYS)
                skipped = tl.cdiv(tl.maximum(start - j_first, 0), step) * step
                for j0 in range(j_first + skipped, end, step):
                    acc += ds_of(
                        grad_o, q, k, v, lse, delta, grad_o_stride, q_stride, k_stride, v_stride, call,
                        b, h, i0, j0, 0, call.Sq, 0, call.Sk, seed, D, DV, DIM, DIM_V, QUERIES, KEYS,
                    )  # fmt: skip
    dbias += (head // dbias_H).to(tl.int64) * dbias_b + (head % dbias_H).to(tl.int64) * dbias_h
    i = i_first + tl.arange(0, QUERIES)
    j = j_first + tl.arange(0, KEYS)
    if SUM_QUERIES:
        acc = tl.sum(acc, 0, keep_dims=True)
        i = tl.arange(0, 1)
    if SUM_KEYS:
        acc = tl.sum(acc, 1, keep_dims=True)
        j = tl.arange(0, 1)
    pointers = dbias + i.to(tl.int64)[:, None] * dbias_q + j.to(tl.int64)[None, :] * dbias_k
    tl.store(pointers, acc, (i < call.Sq)[:, None] & (j < call.Sk)[None, :])


@triton.jit
def relative_backward_kernel(
    grad_o, q, k, v, lse, delta, sums, grad_o_stride, q_stride, k_stride, v_stride, call, B, parts, tiles,
    D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """sums [parts, H, tiles, 2, KEYS] of ds along diagonals j - position.

    A program adds up the tiles whose element [r, c] has j - position = KEYS t + c - r, in every parts-th batch or
    member. Its sums are of diagonals KEYS (t - 1) .. KEYS t, then KEYS t .. KEYS (t + 1).
    """
    t = tl.program_id(0) % tiles - tiles // 2
    h = tl.program_id(0) // tiles % call.H
    seed = call.seed
    if seed is not None:
        seed = tl.load(seed)
    acc = tl.zeros([QUERIES, KEYS], tl.float32)
    for b in range(tl.program_id(0) // (tiles * call.H), B, parts):
        q0, Sq = run_of(b, call.q_starts, call.Sq)
        k0, Sk = run_of(b, call.k_starts, call.Sk)
        ahead = call.bottom_right * (Sk - Sq) + KEYS * t  # j0 - i0
        start = tl.maximum(ahead, 0) // KEYS * KEYS
        end = tl.minimum(Sk, ahead + Sq)
        if call.right is not None:
            end = tl.where(KEYS * (t - 1) < call.right, end, 0)
        if call.left is not None:
            end = tl.where(KEYS * (t + 1) > -call.left, end, 0)
        for j0 in range(start, end, KEYS):
            acc += ds_of(
                grad_o, q, k, v, lse, delta, grad_o_stride, q_stride, k_stride, v_stride, call,
                b, h, j0 - ahead, j0, q0, Sq, k0, Sk, seed, D, DV, DIM, DIM_V, QUERIES, KEYS,
            )  # fmt: skip
    r = tl.arange(0, QUERIES)[:, None]
    c = tl.arange(0, KEYS)[None, :]
    acc = tl.gather(acc, (r + c) % KEYS, 1)  # diagonals to columns
    sums += tl.program_id(0).to(tl.int64) * 2 * KEYS + tl.arange(0, KEYS)
    tl.store(sums, tl.sum(tl.where(r + c >= KEYS, acc, 0.0), 0))
    tl.store(sums + KEYS, tl.sum(tl.where(r + c < KEYS, acc, 0.0), 0))


@triton.jit
def sinks_backward_kernel(sinks, lse, delta, dsinks, B, H, Sq, ROWS: tl.constexpr):
    h = tl.program_id(0)
    sink = tl.load(sinks + h)
    acc = tl.zeros([ROWS], tl.float32)
    for b in range(0, B):
        head = (tl.cast(b, tl.int64) * H + h) * Sq
        for i0 in range(0, Sq, ROWS):
            i = i0 + tl.arange(0, ROWS)
            row_lse = tl.load(lse + head + i, i < Sq, other=float("-inf"))
            row_lse = tl.where(row_lse < HIDDEN, float("inf"), row_lse)
            acc -= tl.exp(sink - row_lse) * tl.load(delta + head + i, i < Sq, other=0.0)
    tl.store(dsinks + h, tl.sum(acc, 0))


def bias_backward(inputs: tuple[Tensor, ...], call: Call, dbias: Tensor) -> None:
    grad_o, q, k, v = inputs[:4]
    tile, constants = options(BIAS_BACKWARD, q, v, call)
    dbias_B, dbias_H, queries, keys = dbias.shape
    q_blocks, k_blocks = triton.cdiv(queries, tile.queries), triton.cdiv(keys, tile.keys)
    bias_backward_kernel[(dbias_B * dbias_H * q_blocks * k_blocks,)](
        *(*inputs, dbias, *strides(grad_o, q, k, v), call),
        *(q.shape[0], dbias_B, dbias_H, q_blocks, k_blocks, *dbias.stride()),
        SUM_QUERIES=queries == 1,
        SUM_KEYS=keys == 1,
        **constants,
    )


def relative_backward(inputs: tuple[Tensor, ...], call: Call, drelative: Tensor) -> None:
    grad_o, q, k, v = inputs[:4]
    tile, constants = options(RELATIVE_BACKWARD, q, v, call)
    B = call.members if call.q_starts is not None else q.shape[0]
    longest = max(call.Sq, call.Sk)
    half = triton.cdiv(longest, tile.keys)
    tiles = 2 * half + 1
    parts = max(1, min(B, PROGRAMS // (tiles * call.H)))
    sums = q.new_empty(parts, call.H, tiles, 2, tile.keys, dtype=torch.float32)
    relative_backward_kernel[(parts * call.H * tiles,)](
        *(*inputs, sums, *strides(grad_o, q, k, v), call, B, parts, tiles), **constants
    )
    sums = sums.sum(0)
    diagonals = (sums[:, :-1, 1] + sums[:, 1:, 0]).flatten(1)  # from -half * tile.keys on
    first, N = half * tile.keys, call.N
    drelative[:, N - longest : N + longest - 1] = diagonals[:, first - longest + 1 : first + longest]


def sinks_backward(inputs: tuple[Tensor, ...], call: Call, dsinks: Tensor) -> None:
    *_, lse, delta = inputs
    B, H, Sq = lse.shape
    sinks_backward_kernel[(H,)](call.sinks, lse, delta, dsinks, B, H, Sq, ROWS=SINKS_ROWS)
