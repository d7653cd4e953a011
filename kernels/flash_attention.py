"""Flash attention in Triton: the contract is csrc/flash_attention.h, the caller pyfront/ops/flash_attention.py.

Forward is one kernel over blocks of queries. Backward is deterministic and without atomics: delta = rowsum(do . o)
- dlse; dk and dv over blocks of keys; dq over blocks of queries. Both of the latter compute the logits: 7 products of
2 B H Sq Sk D flops where one pass would need 5. A bias whose gradient is needed costs 2 more:

    dbias       a program owns a tile of it and sums ds over the dimensions that bias is broadcast in
    drelative   a program owns the tiles along one diagonal, whose ds it adds up before the sum along their diagonals
    dsinks      from lse and delta alone

Blocks that causal, window or padding hide are skipped, and the mask is evaluated only in blocks that causal or window
cut, or in all with padding or a mask. Packed sequences have cdiv(tokens, BLOCK) + members tiles a head, the most that
they can need: a tile finds its member on the device, and leaves where there is none.

Floor: flops over the tensor cores' rate in 16-bit types; float32 runs on the FMA units, because TF32 would lose 13 of
24 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusetune.kernels import device
from fusetune.kernels.philox import dropped, keep_mask

Arguments = Any  # the NamedTuple of pyfront/ops/flash_attention.py, which this layer may not import


class Tile(NamedTuple):
    """Queries and keys of a tile, and the launch options that go with it."""

    queries: int
    keys: int
    warps: int
    stages: int


# By compute capability, 8 standing for those not listed, and bytes of an element; then by padded head dimension at
# most. The tiles of 8 fit the 99 KiB of shared memory of 8.6, 8.9 and 12.0, those of AMD 64 KiB. Rows of a feature are
# for kernels that would not keep the others' tiles in registers: "biased" by bias, relative bias or softcap, "packed"
# with starts, "padded" with keep.
FORWARD = {
    (device.AMD, 2): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
    (device.AMD, 2, "padded"): {64: Tile(128, 64, 8, 1)},
    (device.AMD, 4): {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    (8, 2): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    (8, 2, "biased"): {128: Tile(128, 32, 8, 2)},
    (8, 4): {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    (9, 2): {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    (9, 2, "biased"): {64: Tile(128, 64, 8, 3)},
    (9, 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    (9, 4, "padded"): {128: Tile(16, 32, 16, 1)},
}
KEYS_BACKWARD = {
    (device.AMD, 2): {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 4, 1), 256: Tile(16, 64, 4, 1)},
    (device.AMD, 4): {256: Tile(16, 32, 4, 1)},
    (8, 2): {64: Tile(64, 32, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    (8, 2, "packed"): {64: Tile(32, 32, 4, 2)},
    (8, 2, "biased"): {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2)},
    (8, 4): {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 32, 8, 1)},
    (8, 4, "packed"): {64: Tile(32, 32, 8, 1)},
    (9, 2): {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 32, 8, 1)},
    (9, 2, "biased"): {128: Tile(32, 32, 8, 2)},
    (9, 4): {64: Tile(16, 32, 8, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 32, 8, 1)},
}
QUERIES_BACKWARD = {
    (device.AMD, 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    (device.AMD, 4): {128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    (8, 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    (8, 2, "biased"): {64: Tile(64, 32, 4, 2)},
    (8, 4): {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    (8, 4, "biased"): {64: Tile(16, 32, 8, 1), 128: Tile(16, 32, 8, 1)},
    (9, 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(32, 32, 4, 1)},
    (9, 2, "biased"): {128: Tile(128, 32, 8, 2)},
}
BIAS_BACKWARD = {  # as many queries as keys
    (device.AMD, 2): {128: Tile(64, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    (device.AMD, 4): {256: Tile(32, 32, 4, 1)},
    (8, 2): {64: Tile(64, 64, 8, 2), 128: Tile(32, 32, 4, 2), 256: Tile(32, 32, 8, 1)},
    (8, 4): {128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 8, 1)},
    (9, 2): {128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
}
RELATIVE_BACKWARD = BIAS_BACKWARD | {
    (8, 4): {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 16, 1), 256: Tile(32, 32, 8, 1)},
}
DELTA_SIZE = 2048  # elements of a tile of delta_kernel
SINKS_ROWS = 1024
PROGRAMS = 512  # of relative_backward_kernel at least, where there are batches enough: four on a multiprocessor
KEPT_CHUNK = tl.constexpr(1024)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Call(NamedTuple):
    """What all kernels take of the contract's arguments. What is absent is None, and then not compiled."""

    H: int
    GROUP: int  # query heads of a key head
    Sq: int
    Sk: int
    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    bottom_right: int  # 1, or 0 for top left
    keep: Tensor | None
    keep_row: int
    mask: Tensor | None
    mask_b: int  # strides, 0 where it is broadcast
    mask_h: int
    mask_q: int
    mask_k: int
    bias: Tensor | None
    bias_b: int
    bias_h: int
    bias_q: int
    bias_k: int
    relative: Tensor | None
    N: int
    sinks: Tensor | None
    q_starts: Tensor | None
    k_starts: Tensor | None
    members: int
    seed: Tensor | None
    threshold: int
    kept_scale: float


@triton.jit
def load_rows(base, row, row_stride, inside, D: tl.constexpr, DIM: tl.constexpr):
    """Rows of a [*, D] matrix as [len(row), DIM], zeros beyond D and where a row is not inside."""
    d = tl.arange(0, DIM)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * row_stride + d, inside[:, None] & (d < D), other=0.0)


@triton.jit
def store_rows(base, row, row_stride, inside, values, D: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * row_stride + d
    tl.store(pointers, values.to(base.dtype.element_ty), inside[:, None] & (d < D))


@triton.jit
def unit(call):
    """What logits are multiplied by: log2 e for the hardware's exp2; not with a bias, for finfo.min would overflow."""
    if call.bias is None and call.relative is None:
        return LOG2E
    else:
        return 1.0


@triton.jit
def exponential(s, call):
    return tl.exp2(s * (LOG2E / unit(call)))


@triton.jit
def load_statistics(lse, delta, i, inside, call):
    """lse in the units of `logits`, infinite for queries that see nothing so that their p is 0; and delta."""
    rows = tl.load(lse + i, inside, other=float("-inf")) * unit(call)
    return tl.where(rows == float("-inf"), float("inf"), rows), tl.load(delta + i, inside, other=0.0)


@triton.jit
def block_of(program, heads, tokens, starts, members, BLOCK: tl.constexpr):
    """(b, head, first row) of a program's block; b is the member of packed sequences."""
    blocks = tl.cdiv(tokens, BLOCK)
    if starts is None:
        head = program // blocks
        return head // heads, head % heads, program % blocks * BLOCK
    else:
        # The blocks of member b are counted from starts[b] // BLOCK + b on, which leaves room for all those before.
        blocks += members
        block = program % blocks
        b = 0
        end = members
        while end - b > 1:
            middle = (b + end) // 2
            if tl.load(starts + middle) // BLOCK + middle <= block:
                b = middle
            else:
                end = middle
        return b, program // blocks, (block - tl.load(starts + b) // BLOCK - b) * BLOCK


@triton.jit
def run_of(b, starts, tokens):
    """First token and number of tokens of member b, or of any batch."""
    if starts is None:
        return 0, tokens
    else:
        first = tl.load(starts + b)
        return first, tl.load(starts + b + 1) - first


@triton.jit
def head_of(base, stride, b, h, starts, first):
    """Address of head h of batch b, or of the member whose first token is `first`."""
    if starts is None:
        return base + tl.cast(b, tl.int64) * stride[0] + tl.cast(h, tl.int64) * stride[1]
    else:
        return base + tl.cast(h, tl.int64) * stride[1] + tl.cast(first, tl.int64) * stride[2]


@triton.jit
def kept_range(b, Sk, call):
    """The first key that is kept, and the one after the last."""
    first = Sk
    end = 0
    for j0 in range(0, Sk, KEPT_CHUNK):
        j = j0 + tl.arange(0, KEPT_CHUNK)
        kept = kept_keys(j, b, Sk, call, True)
        first = tl.minimum(first, tl.min(tl.where(kept, j, Sk)))
        end = tl.maximum(end, tl.max(tl.where(kept, j + 1, 0)))
    return first, end


@triton.jit
def kept_keys(j, b, Sk, call, MASKED: tl.constexpr):
    """Which keys j there are, and in masked blocks are not padding."""
    kept = j < Sk
    if MASKED and call.keep is not None:
        kept &= tl.load(call.keep + tl.cast(b, tl.int64) * call.keep_row + j, kept, other=0) != 0
    return kept


@triton.jit
def keys_of(first, b, shift, Sk, call, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """(start, full, full_end, end) of a block of queries: some see keys start .. end, all see full .. full_end.

    All but end are multiples of KEYS. Without a left edge full is 0.
    """
    start = 0
    full = 0
    full_end = Sk if call.mask is None and call.keep is None else 0
    end = Sk
    if call.keep is not None:
        start, end = kept_range(b, Sk, call)
    if call.right is not None:
        end = tl.minimum(end, first + QUERIES + shift + call.right)
        full_end = tl.minimum(full_end, first + 1 + shift + call.right)
    if call.left is not None:
        start = tl.maximum(start, first + shift - call.left)
        full = tl.maximum(full, first + QUERIES - 1 + shift - call.left)
    full = tl.cdiv(full, KEYS) * KEYS
    return start // KEYS * KEYS, full, tl.maximum(full_end // KEYS * KEYS, full), end


@triton.jit
def queries_of(j0, kept, shift, Sq, Sk, call, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """As `keys_of`, queries that see keys of the block at j0. Without a left edge full_end is Sq."""
    start = 0
    full = tl.where(j0 + KEYS <= Sk, 0, Sq) if call.mask is None and call.keep is None else Sq
    full_end = Sq
    end = Sq
    if call.keep is not None:
        end = tl.where(tl.max(kept.to(tl.int32)) == 0, 0, Sq)
    if call.right is not None:
        start = tl.maximum(j0 - shift - call.right, 0) // QUERIES * QUERIES
        full = tl.maximum(full, j0 + KEYS - 1 - shift - call.right)
    if call.left is not None:
        end = tl.minimum(end, j0 + KEYS + call.left - shift)
        full_end = tl.minimum(end, j0 + 1 + call.left - shift) // QUERIES * QUERIES
    full = tl.minimum(tl.cdiv(full, QUERIES) * QUERIES, Sq)
    return start, full, tl.maximum(full_end, full), end


@triton.jit
def seen(kept, i, j, b, h, shift, Sq, call):
    """Which queries i see which keys j, of those that are kept; i and j broadcast to the tile."""
    found = kept
    if call.right is not None:
        found &= j <= i + shift + call.right
    if call.left is not None:
        found &= j >= i + shift - call.left
    if call.mask is not None:
        mask = call.mask + tl.cast(b, tl.int64) * call.mask_b + tl.cast(h, tl.int64) * call.mask_h
        pointers = mask + i.to(tl.int64) * call.mask_q + j.to(tl.int64) * call.mask_k
        found &= tl.load(pointers, (i >= 0) & (i < Sq) & kept, other=0) != 0
    return found


@triton.jit
def tanh(x):
    """x + x^3 P(x^2) below 0.625, P fitted to that interval, 1 - 2 / (1 + e^2x) above: relative error < 3e-7."""
    z = x * x
    p = -0.005704984 * z + 0.020639084
    p = p * z - 0.053739715
    p = p * z + 0.13331442
    p = p * z - 0.3333328
    large = 1 - 2 / (1 + tl.exp2(tl.abs(x) * (2 * LOG2E)))
    return tl.where(z < 0.390625, x + x * (z * p), tl.where(x < 0, -large, large))


@triton.jit
def logits(products, kept, i, j, b, h, shift, Sq, call):
    """(s times `unit`, t / softcap) of q k^T at queries i and keys j, which broadcast to the tile."""
    capped = products
    if call.softcap is not None:
        capped = tanh(products * (call.scale / call.softcap))
        s = capped * (call.softcap * unit(call))
    else:
        s = products * (call.scale * unit(call))
    inside = (i >= 0) & (i < Sq) & kept
    if call.bias is not None:
        bias = call.bias + tl.cast(b, tl.int64) * call.bias_b + tl.cast(h, tl.int64) * call.bias_h
        pointers = bias + i.to(tl.int64) * call.bias_q + j.to(tl.int64) * call.bias_k
        s += tl.load(pointers, inside, other=0.0).to(tl.float32)
    if call.relative is not None:
        relative = call.relative + tl.cast(h, tl.int64) * (2 * call.N - 1) + (call.N - 1 - shift)
        s += tl.load(relative + (j - i), inside, other=0.0)
    return s, capped


@triton.jit
def tile_backward(
    q_tile, k_tile, do, v_tile, lse, delta, i, j0, kept, b, h, shift, Sq, call, seed,
    MASKED: tl.constexpr, KEYS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """(P . Z without its scale, ds, dt) of a tile.

    Args:
        lse, delta: as load_statistics has them.
        AXIS: of the tile along which the queries lie.
    """
    if AXIS == 0:
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    else:
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
    row = tl.expand_dims(i, 1 - AXIS)
    col = tl.expand_dims(j0 + tl.arange(0, KEYS), AXIS)
    kept = tl.expand_dims(kept, AXIS)
    s, capped = logits(products, kept, row, col, b, h, shift, Sq, call)
    p = exponential(s - tl.expand_dims(lse, 1 - AXIS), call)
    if MASKED:
        p = tl.where(seen(kept, row, col, b, h, shift, Sq, call), p, 0.0)
    # Not before p, which would take the registers of two tiles.
    if AXIS == 0:
        dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
    else:
        dp = tl.dot(v_tile, tl.trans(do), input_precision="ieee")
    pz = p
    if seed is not None:
        undropped = keep_mask(seed, i, (b * call.H + h).to(tl.int32), j0, call.threshold, KEYS)
        if AXIS == 1:
            undropped = tl.trans(undropped)
        pz = tl.where(undropped, p, 0.0)
        dp = tl.where(undropped, dp * call.kept_scale, 0.0)
    ds = p * (dp - tl.expand_dims(delta, 1 - AXIS))
    dt = ds
    if call.softcap is not None:
        dt = ds * (1 - capped * capped)
    return pz, ds, dt


@triton.jit
def forward_kernel(
    q, k, v, o, lse, q_stride, k_stride, v_stride, o_stride, call,
    D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # From the last block on: with causal it sees the most keys.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h, first = block_of(program, call.H, call.Sq, call.q_starts, call.members, QUERIES)
    q0, Sq = run_of(b, call.q_starts, call.Sq)
    k0, Sk = run_of(b, call.k_starts, call.Sk)
    if call.q_starts is not None and ((first < 0) | (first >= Sq)):
        return
    shift = call.bottom_right * (Sk - Sq)
    i = first + tl.arange(0, QUERIES)
    q_tile = load_rows(head_of(q, q_stride, b, h, call.q_starts, q0), i, q_stride[2], i < Sq, D, DIM)
    k = head_of(k, k_stride, b, h // call.GROUP, call.k_starts, k0)
    v = head_of(v, v_stride, b, h // call.GROUP, call.k_starts, k0)
    seed = call.seed
    if seed is not None:
        seed = tl.load(seed)
    start, full, full_end, end = keys_of(first, b, shift, Sk, call, QUERIES, KEYS)
    skipped = full_end - full

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if call.sinks is not None:  # as a key whose value is 0
        sink = tl.load(call.sinks + h)
        largest = tl.zeros([QUERIES], tl.float32) + sink * unit(call)
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([QUERIES, DIM_V], tl.float32)
    for MASKED in tl.static_range(0 if call.mask is None and call.keep is None else 1, 2):
        for x in range(start + skipped if MASKED else full, end if MASKED else full_end, KEYS):
            j0 = x
            if MASKED and call.left is not None:
                j0 = tl.where(x < full_end, x - skipped, x)
            j = j0 + tl.arange(0, KEYS)
            kept = kept_keys(j, b, Sk, call, MASKED)
            k_tile = load_rows(k, j, k_stride[2], kept, D, DIM)
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            s, _ = logits(products, kept[None, :], i[:, None], j[None, :], b, h, shift, Sq, call)
            if MASKED:
                s = tl.where(seen(kept[None, :], i[:, None], j[None, :], b, h, shift, Sq, call), s, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(s, 1))
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # of rows that see nothing so far
            p = exponential(s - base[:, None], call)
            rescale = exponential(largest - base, call)
            total = total * rescale + tl.sum(p, 1)
            if seed is not None:
                p = tl.where(keep_mask(seed, i, b * call.H + h, j0, call.threshold, KEYS), p, 0.0)
            v_tile = load_rows(v, j, v_stride[2], kept, DV, DIM_V)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
            largest = new_largest

    total = tl.where(total == 0, 1.0, total)  # of rows that see nothing: acc = 0 and largest = -inf
    o = head_of(o, o_stride, b, h, call.q_starts, q0)
    store_rows(o, i, o_stride[2], i < Sq, acc * (call.kept_scale / total)[:, None], DV, DIM_V)
    lse = head_of(lse, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    tl.store(lse + i, largest * (1 / unit(call)) + tl.log2(total) * LN2, i < Sq)


@triton.jit
def delta_kernel(
    grad_o, grad_lse, o, lse, delta, grad_o_stride, o_stride, H, Sq,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Sq, ROWS)
    head = tl.program_id(0) // blocks
    b, h = head // H, head % H
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    do = load_rows(head_of(grad_o, grad_o_stride, b, h, None, 0), i, grad_o_stride[2], i < Sq, D, DIM)
    o_tile = load_rows(head_of(o, o_stride, b, h, None, 0), i, o_stride[2], i < Sq, D, DIM)
    D_i = tl.sum(do.to(tl.float32) * o_tile.to(tl.float32), 1)
    row = head.to(tl.int64) * Sq + i
    if grad_lse is not None:
        D_i -= tl.load(grad_lse + row, i < Sq, other=0.0)
    sees_nothing = tl.load(lse + row, i < Sq, other=0.0) == float("-inf")  # and takes no part, whatever its gradients
    tl.store(delta + row, tl.where(sees_nothing, 0.0, D_i), i < Sq)


@triton.jit
def keys_backward_kernel(
    grad_o, q, k, v, lse, delta, dk, dv, grad_o_stride, q_stride, k_stride, v_stride, dk_stride, dv_stride, call,
    D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # With causal the first keys are seen by the most queries.
    b, h_kv, j0 = block_of(tl.program_id(0), call.H // call.GROUP, call.Sk, call.k_starts, call.members, KEYS)
    q0, Sq = run_of(b, call.q_starts, call.Sq)
    k0, Sk = run_of(b, call.k_starts, call.Sk)
    if call.k_starts is not None and ((j0 < 0) | (j0 >= Sk)):
        return
    shift = call.bottom_right * (Sk - Sq)
    j = j0 + tl.arange(0, KEYS)
    kept = kept_keys(j, b, Sk, call, True)
    k_tile = load_rows(head_of(k, k_stride, b, h_kv, call.k_starts, k0), j, k_stride[2], kept, D, DIM)
    v_tile = load_rows(head_of(v, v_stride, b, h_kv, call.k_starts, k0), j, v_stride[2], kept, DV, DIM_V)
    seed = call.seed
    if seed is not None:
        seed = tl.load(seed)
    start, full, full_end, end = queries_of(j0, kept, shift, Sq, Sk, call, QUERIES, KEYS)
    skipped = full_end - full

    dk_acc = tl.zeros([KEYS, DIM], tl.float32)
    dv_acc = tl.zeros([KEYS, DIM_V], tl.float32)
    for g in range(call.GROUP):
        h = h_kv * call.GROUP + g
        q_head = head_of(q, q_stride, b, h, call.q_starts, q0)
        do_head = head_of(grad_o, grad_o_stride, b, h, call.q_starts, q0)
        lse_head = head_of(lse, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
        delta_head = head_of(delta, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
        for MASKED in tl.static_range(0 if call.mask is None and call.keep is None else 1, 2):
            for x in range(start if MASKED else full, end - skipped if MASKED else full_end, QUERIES):
                i0 = x
                if MASKED and call.left is not None:
                    i0 = tl.where(x < full, x, x + skipped)
                i = i0 + tl.arange(0, QUERIES)
                q_tile = load_rows(q_head, i, q_stride[2], i < Sq, D, DIM)
                do = load_rows(do_head, i, grad_o_stride[2], i < Sq, DV, DIM_V)
                row_lse, row_delta = load_statistics(lse_head, delta_head, i, i < Sq, call)
                # Transposed, [KEYS, QUERIES]: p and ds are then first operands straight from registers.
                pz, _, dt = tile_backward(
                    q_tile,
                    k_tile,
                    do,
                    v_tile,
                    row_lse,
                    row_delta,
                    i,
                    j0,
                    kept,
                    b,
                    h,
                    shift,
                    Sq,
                    call,
                    seed,
                    MASKED,
                    KEYS,
                    1,
                )
                dv_acc = tl.dot(pz.to(do.dtype), do, dv_acc, input_precision="ieee")
                dk_acc = tl.dot(dt.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    dk = head_of(dk, dk_stride, b, h_kv, call.k_starts, k0)
    dv = head_of(dv, dv_stride, b, h_kv, call.k_starts, k0)
    store_rows(dk, j, dk_stride[2], j < Sk, dk_acc * call.scale, D, DIM)
    store_rows(dv, j, dv_stride[2], j < Sk, dv_acc * call.kept_scale, DV, DIM_V)


@triton.jit
def queries_backward_kernel(
    grad_o, q, k, v, lse, delta, dq, grad_o_stride, q_stride, k_stride, v_stride, dq_stride, call,
    D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # as in forward_kernel
    b, h, first = block_of(program, call.H, call.Sq, call.q_starts, call.members, QUERIES)
    q0, Sq = run_of(b, call.q_starts, call.Sq)
    k0, Sk = run_of(b, call.k_starts, call.Sk)
    if call.q_starts is not None and ((first < 0) | (first >= Sq)):
        return
    shift = call.bottom_right * (Sk - Sq)
    i = first + tl.arange(0, QUERIES)
    q_tile = load_rows(head_of(q, q_stride, b, h, call.q_starts, q0), i, q_stride[2], i < Sq, D, DIM)
    do = load_rows(head_of(grad_o, grad_o_stride, b, h, call.q_starts, q0), i, grad_o_stride[2], i < Sq, DV, DIM_V)
    lse = head_of(lse, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    delta = head_of(delta, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    row_lse, row_delta = load_statistics(lse, delta, i, i < Sq, call)
    k = head_of(k, k_stride, b, h // call.GROUP, call.k_starts, k0)
    v = head_of(v, v_stride, b, h // call.GROUP, call.k_starts, k0)
    seed = call.seed
    if seed is not None:
        seed = tl.load(seed)
    start, full, full_end, end = keys_of(first, b, shift, Sk, call, QUERIES, KEYS)
    skipped = full_end - full

    acc = tl.zeros([QUERIES, DIM], tl.float32)
    for MASKED in tl.static_range(0 if call.mask is None and call.keep is None else 1, 2):
        for x in range(start + skipped if MASKED else full, end if MASKED else full_end, KEYS):
            j0 = x
            if MASKED and call.left is not None:
                j0 = tl.where(x < full_end, x - skipped, x)
            j = j0 + tl.arange(0, KEYS)
            kept = kept_keys(j, b, Sk, call, MASKED)
            k_tile = load_rows(k, j, k_stride[2], kept, D, DIM)
            v_tile = load_rows(v, j, v_stride[2], kept, DV, DIM_V)
            _, _, dt = tile_backward(
                q_tile,
                k_tile,
                do,
                v_tile,
                row_lse,
                row_delta,
                i,
                j0,
                kept,
                b,
                h,
                shift,
                Sq,
                call,
                seed,
                MASKED,
                KEYS,
                0,
            )
            acc = tl.dot(dt.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    dq = head_of(dq, dq_stride, b, h, call.q_starts, q0)
    store_rows(dq, i, dq_stride[2], i < Sq, acc * call.scale, D, DIM)


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
    do = load_rows(head_of(grad_o, grad_o_stride, b, h, call.q_starts, q0), i, grad_o_stride[2], inside, DV, DIM_V)
    k_tile = load_rows(head_of(k, k_stride, b, h_kv, call.k_starts, k0), j, k_stride[2], kept, D, DIM)
    v_tile = load_rows(head_of(v, v_stride, b, h_kv, call.k_starts, k0), j, v_stride[2], kept, DV, DIM_V)
    lse = head_of(lse, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    delta = head_of(delta, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    row_lse, row_delta = load_statistics(lse, delta, i, inside, call)
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
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
            acc -= tl.exp(sink - row_lse) * tl.load(delta + head + i, i < Sq, other=0.0)
    tl.store(dsinks + h, tl.sum(acc, 0))


def padded(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def call_of(q: Tensor, k: Tensor, a: Arguments) -> Call:
    def of(mask: Tensor | None) -> list[Any]:
        if mask is None:
            return [None, 0, 0, 0, 0]
        return [mask, *(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))]

    return Call(
        *(q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2]),
        *(a.scale, a.softcap or None),
        *(None if side < 0 else side for side in (a.left, a.right)),
        int(not a.top_left),
        *(a.keep, 0 if a.keep is None else a.keep.stride(0)),
        *of(a.mask),
        *of(a.bias),
        *(a.relative, 0 if a.relative is None else (a.relative.shape[1] + 1) // 2),
        a.sinks,
        *(a.q_starts, a.k_starts, 0 if a.q_starts is None else len(a.q_starts) - 1),
        *(a.seed, *dropped(a.dropout_p)),
    )


def options(
    table: dict[tuple[Any, ...], dict[int, Tile]], q: Tensor, v: Tensor, call: Call
) -> tuple[Tile, dict[str, Any]]:
    """Tile and compile-time arguments of a launch."""
    D, DV = q.shape[-1], v.shape[-1]
    DIM, DIM_V = padded(D), padded(DV)
    biased = call.bias is not None or call.relative is not None or call.softcap is not None
    features = {"biased": biased, "packed": call.q_starts is not None, "padded": call.keep is not None}
    feature = next((name for name, has in features.items() if has), "")
    key = device.capability(q.device), q.element_size()
    key = key if key in table else (8, q.element_size())
    rows = table[key] | table.get((*key, feature), {})
    tile = rows[min(most for most in rows if most >= max(DIM, DIM_V))]
    return tile, {
        "D": D,
        "DV": DV,
        "DIM": DIM,
        "DIM_V": DIM_V,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def blocks(tokens: int, size: int, members: int) -> int:
    return triton.cdiv(tokens, size) + members


def strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(t.stride()[:3] for t in tensors)


def forward(q: Tensor, k: Tensor, v: Tensor, a: Arguments, o: Tensor, lse: Tensor) -> None:
    """Writes o and lse. Arguments as in csrc/flash_attention.h; a.seed is a one-element int64 tensor, or None."""
    if not lse.numel() or (a.q_starts is not None and len(a.q_starts) == 1):
        return
    B, H, Sq, _ = q.shape
    call = call_of(q, k, a)
    tile, constants = options(FORWARD, q, v, call)
    with device.guard(q.device):
        forward_kernel[(blocks(Sq, tile.queries, call.members) * B * H,)](
            *(q, k, v, o, lse, *strides(q, k, v, o), call), **constants
        )


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Arguments,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor,
    drelative: Tensor,
    dsinks: Tensor,
) -> None:
    """Writes the gradients of q, k and v, and those of bias, relative and sinks that are not empty."""
    if a.q_starts is not None and len(a.q_starts) == 1:
        return
    (B, H, Sq, _), (Hkv, Sk, DV) = q.shape, v.shape[1:]
    call = call_of(q, k, a)
    delta = torch.empty_like(lse)
    DIM_V = padded(DV)
    inputs = (grad_o, q, k, v, lse, delta)
    with device.guard(q.device):
        delta_kernel[(triton.cdiv(Sq, DELTA_SIZE // DIM_V) * B * H,)](
            *(grad_o, grad_lse, o, lse, delta, *strides(grad_o, o), H, Sq),
            D=DV,
            DIM=DIM_V,
            ROWS=DELTA_SIZE // DIM_V,
            enable_fp_fusion=True,
        )
        tile, constants = options(KEYS_BACKWARD, q, v, call)
        keys_backward_kernel[(blocks(Sk, tile.keys, call.members) * B * Hkv,)](
            *(*inputs, dk, dv, *strides(grad_o, q, k, v, dk, dv), call), **constants
        )
        tile, constants = options(QUERIES_BACKWARD, q, v, call)
        queries_backward_kernel[(blocks(Sq, tile.queries, call.members) * B * H,)](
            *(*inputs, dq, *strides(grad_o, q, k, v, dq), call), **constants
        )
        if dbias.numel():
            bias_backward(inputs, call, dbias)
        if drelative.numel():
            relative_backward(inputs, call, drelative)
        if dsinks.numel():
            sinks_backward_kernel[(H,)](a.sinks, lse, delta, dsinks, B, H, Sq, ROWS=SINKS_ROWS)


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
