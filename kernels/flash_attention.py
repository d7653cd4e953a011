"""Flash attention in Triton: the contract is csrc/flash_attention.h, the caller pyfront/ops/flash_attention.py.

Forward is one kernel over blocks of queries. Backward is three, deterministic and without atomics: delta = rowsum
(do . o); dk and dv over blocks of keys; dq over blocks of queries. Both of the latter compute the logits: 7 products of
2 B H Sq Sk D flops where one pass would need 5. Blocks that causal hides are skipped, and the mask is evaluated only in
blocks that it cuts, or in all with a padding mask.

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


class Tile(NamedTuple):
    """Queries and keys of a tile, and the launch options that go with it."""

    queries: int
    keys: int
    warps: int
    stages: int


# By compute capability, 8 standing for those not listed, and bytes of an element; then by padded head dimension at
# most. The tiles of 8 fit the 99 KiB of shared memory of 8.6, 8.9 and 12.0, those of AMD 64 KiB.
FORWARD = {
    (device.AMD, 2): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
    (device.AMD, 4): {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    (8, 2): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    (8, 4): {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    (9, 2): {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    (9, 4): {64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
}
KEYS_BACKWARD = {
    (device.AMD, 2): {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 4, 1), 256: Tile(16, 64, 4, 1)},
    (device.AMD, 4): {256: Tile(16, 32, 4, 1)},
    (8, 2): {64: Tile(64, 32, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    (8, 4): {64: Tile(16, 32, 8, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 32, 8, 1)},
    (9, 2): {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 32, 8, 1)},
}
QUERIES_BACKWARD = {
    (device.AMD, 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    (device.AMD, 4): {128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    (8, 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    (8, 4): {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    (9, 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(32, 32, 4, 1)},
}
DELTA_SIZE = 2048  # elements of a tile of delta_kernel

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def kept_keys(j, keep, Sk):
    """Which keys j there are, and are not padding; keep is the batch's row of the mask, or None."""
    kept = j < Sk
    if keep is not None:
        kept &= tl.load(keep + j, kept, other=0) != 0
    return kept


@triton.jit
def forward_kernel(
    q, k, v, keep, o, lse, seed, q_stride, k_stride, v_stride, o_stride, keep_stride, H, GROUP, Sq, Sk,
    scale, threshold, kept_scale,
    D: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Sq, QUERIES)
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # with causal the last queries see the most keys
    i = first + tl.arange(0, QUERIES)
    q_tile = load_rows(q + b * q_stride[0] + h * q_stride[1], i, q_stride[2], i < Sq, D, DIM)
    k += b * k_stride[0] + h // GROUP * k_stride[1]
    v += b * v_stride[0] + h // GROUP * v_stride[1]
    if keep is not None:
        keep += b * keep_stride
    if seed is not None:
        seed = tl.load(seed)

    end = Sk  # keys that some query of the block sees
    full = Sk if keep is None else 0  # keys that all do
    if CAUSAL:
        end = tl.minimum(end, first + QUERIES + Sk - Sq)
        full = tl.minimum(full, first + 1 + Sk - Sq)
    full = tl.maximum(full, 0) // KEYS * KEYS

    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM], tl.float32)
    for MASKED in tl.static_range(0 if keep is None else 1, 2):
        for j0 in range(full if MASKED else 0, end if MASKED else full, KEYS):
            j = j0 + tl.arange(0, KEYS)
            kept = kept_keys(j, keep, Sk)
            k_tile = load_rows(k, j, k_stride[2], kept, D, DIM)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2E)
            if MASKED:
                seen = kept[None, :]
                if CAUSAL:
                    seen &= j[None, :] <= i[:, None] + Sk - Sq
                logits = tl.where(seen, logits, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # of rows that see nothing so far
            p = tl.exp2(logits - base[:, None])
            rescale = tl.exp2(largest - base)
            total = total * rescale + tl.sum(p, 1)
            if seed is not None:
                p = tl.where(keep_mask(seed, i, head, j0, threshold, KEYS), p, 0.0)
            v_tile = load_rows(v, j, v_stride[2], kept, D, DIM)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
            largest = new_largest

    total = tl.where(total == 0, 1.0, total)  # of rows that see nothing: acc = 0 and largest = -inf
    store_rows(
        o + b * o_stride[0] + h * o_stride[1], i, o_stride[2], i < Sq, acc * (kept_scale / total)[:, None], D, DIM
    )
    tl.store(lse + head.to(tl.int64) * Sq + i, (largest + tl.log2(total)) * LN2, i < Sq)


@triton.jit
def delta_kernel(
    grad_o, o, delta, grad_o_stride, o_stride, H, Sq, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr
):
    blocks = tl.cdiv(Sq, ROWS)
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    do = load_rows(grad_o + b * grad_o_stride[0] + h * grad_o_stride[1], i, grad_o_stride[2], i < Sq, D, DIM)
    o_tile = load_rows(o + b * o_stride[0] + h * o_stride[1], i, o_stride[2], i < Sq, D, DIM)
    tl.store(delta + head.to(tl.int64) * Sq + i, tl.sum(do.to(tl.float32) * o_tile.to(tl.float32), 1), i < Sq)


@triton.jit
def keys_backward_kernel(
    grad_o, q, k, v, keep, lse, delta, dk, dv, seed,
    grad_o_stride, q_stride, k_stride, v_stride, dk_stride, dv_stride, keep_stride, Hkv, GROUP, Sq, Sk,
    scale, threshold, kept_scale,
    D: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Sk, KEYS)
    kv_head = tl.program_id(0) // blocks
    b, h_kv = (kv_head // Hkv).to(tl.int64), (kv_head % Hkv).to(tl.int64)
    j0 = tl.program_id(0) % blocks * KEYS  # with causal the first keys are seen by the most queries
    j = j0 + tl.arange(0, KEYS)
    if keep is not None:
        keep += b * keep_stride
    kept = kept_keys(j, keep, Sk)
    k_tile = load_rows(k + b * k_stride[0] + h_kv * k_stride[1], j, k_stride[2], kept, D, DIM)
    v_tile = load_rows(v + b * v_stride[0] + h_kv * v_stride[1], j, v_stride[2], kept, D, DIM)
    if seed is not None:
        seed = tl.load(seed)

    first = 0  # query that sees some key of the block
    full = tl.where(j0 + KEYS <= Sk, 0, Sq)  # query that sees all
    if keep is not None:
        full = Sq
    if CAUSAL:
        first = tl.maximum(j0 + Sq - Sk, 0) // QUERIES * QUERIES
        full = tl.maximum(full, j0 + KEYS - 1 + Sq - Sk)
    full = tl.minimum(tl.cdiv(full, QUERIES) * QUERIES, Sq)

    dk_acc = tl.zeros([KEYS, DIM], tl.float32)
    dv_acc = tl.zeros([KEYS, DIM], tl.float32)
    for g in range(GROUP):
        h = h_kv * GROUP + g
        head = kv_head * GROUP + g
        q_head = q + b * q_stride[0] + h * q_stride[1]
        grad_o_head = grad_o + b * grad_o_stride[0] + h * grad_o_stride[1]
        for MASKED in tl.static_range(0 if keep is None else 1, 2):
            for i0 in range(first if MASKED else full, full if MASKED else Sq, QUERIES):
                i = i0 + tl.arange(0, QUERIES)
                q_tile = load_rows(q_head, i, q_stride[2], i < Sq, D, DIM)
                do = load_rows(grad_o_head, i, grad_o_stride[2], i < Sq, D, DIM)
                row_lse = tl.load(lse + head.to(tl.int64) * Sq + i, i < Sq, other=float("-inf")) * LOG2E
                row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # rows that see nothing: p = 0
                row_delta = tl.load(delta + head.to(tl.int64) * Sq + i, i < Sq, other=0.0)
                # Transposed, [KEYS, QUERIES]: p and ds are then first operands straight from registers.
                logits = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * (scale * LOG2E)
                p = tl.exp2(logits - row_lse[None, :])
                if MASKED:
                    seen = kept[:, None]
                    if CAUSAL:
                        seen &= j[:, None] <= i[None, :] + Sk - Sq
                    p = tl.where(seen, p, 0.0)
                dp = tl.dot(v_tile, tl.trans(do), input_precision="ieee")
                dropped = p
                if seed is not None:
                    undropped = tl.trans(keep_mask(seed, i, head, j0, threshold, KEYS))
                    dropped = tl.where(undropped, p, 0.0)
                    dp = tl.where(undropped, dp * kept_scale, 0.0)
                dv_acc = tl.dot(dropped.to(do.dtype), do, dv_acc, input_precision="ieee")
                ds = p * (dp - row_delta[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    store_rows(dk + b * dk_stride[0] + h_kv * dk_stride[1], j, dk_stride[2], j < Sk, dk_acc * scale, D, DIM)
    store_rows(dv + b * dv_stride[0] + h_kv * dv_stride[1], j, dv_stride[2], j < Sk, dv_acc * kept_scale, D, DIM)


@triton.jit
def queries_backward_kernel(
    grad_o, q, k, v, keep, lse, delta, dq, seed,
    grad_o_stride, q_stride, k_stride, v_stride, dq_stride, keep_stride, H, GROUP, Sq, Sk,
    scale, threshold, kept_scale,
    D: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Sq, QUERIES)
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    i = first + tl.arange(0, QUERIES)
    q_tile = load_rows(q + b * q_stride[0] + h * q_stride[1], i, q_stride[2], i < Sq, D, DIM)
    do = load_rows(grad_o + b * grad_o_stride[0] + h * grad_o_stride[1], i, grad_o_stride[2], i < Sq, D, DIM)
    row_lse = tl.load(lse + head.to(tl.int64) * Sq + i, i < Sq, other=float("-inf")) * LOG2E
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # rows that see nothing: p = 0
    row_delta = tl.load(delta + head.to(tl.int64) * Sq + i, i < Sq, other=0.0)
    k += b * k_stride[0] + h // GROUP * k_stride[1]
    v += b * v_stride[0] + h // GROUP * v_stride[1]
    if keep is not None:
        keep += b * keep_stride
    if seed is not None:
        seed = tl.load(seed)

    end = Sk  # as in forward_kernel
    full = Sk if keep is None else 0
    if CAUSAL:
        end = tl.minimum(end, first + QUERIES + Sk - Sq)
        full = tl.minimum(full, first + 1 + Sk - Sq)
    full = tl.maximum(full, 0) // KEYS * KEYS

    acc = tl.zeros([QUERIES, DIM], tl.float32)
    for MASKED in tl.static_range(0 if keep is None else 1, 2):
        for j0 in range(full if MASKED else 0, end if MASKED else full, KEYS):
            j = j0 + tl.arange(0, KEYS)
            kept = kept_keys(j, keep, Sk)
            k_tile = load_rows(k, j, k_stride[2], kept, D, DIM)
            v_tile = load_rows(v, j, v_stride[2], kept, D, DIM)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2E)
            p = tl.exp2(logits - row_lse[:, None])
            if MASKED:
                seen = kept[None, :]
                if CAUSAL:
                    seen &= j[None, :] <= i[:, None] + Sk - Sq
                p = tl.where(seen, p, 0.0)
            dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
            if seed is not None:
                dp = tl.where(keep_mask(seed, i, head, j0, threshold, KEYS), dp * kept_scale, 0.0)
            ds = p * (dp - row_delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    store_rows(dq + b * dq_stride[0] + h * dq_stride[1], i, dq_stride[2], i < Sq, acc * scale, D, DIM)


def padded(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def options(table: dict[tuple[int, int], dict[int, Tile]], q: Tensor, causal: bool) -> tuple[Tile, dict[str, Any]]:
    """Tile and compile-time arguments of a launch."""
    D, size = q.shape[-1], q.element_size()
    DIM = padded(D)
    by_dim = table.get((device.capability(q.device), size), table[8, size])
    tile = next(tile for most, tile in by_dim.items() if most >= DIM)
    return tile, {
        "D": D,
        "DIM": DIM,
        "CAUSAL": causal,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes o and lse. Arguments as in csrc/flash_attention.h; seed is a one-element int64 tensor, or None."""
    (B, H, Sq, _), (Hkv, Sk) = q.shape, k.shape[1:3]
    if o.numel() == 0:
        lse.fill_(-torch.inf)
        return
    tile, constants = options(FORWARD, q, causal)
    with device.guard(q.device):
        forward_kernel[(triton.cdiv(Sq, tile.queries) * B * H,)](
            *(q, k, v, keep, o, lse, seed),
            *(t.stride()[:3] for t in (q, k, v, o)),
            0 if keep is None else keep.stride(0),
            *(H, H // Hkv, Sq, Sk),
            *(scale, *dropped(dropout_p)),
            **constants,
        )


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Writes dq, dk and dv. Arguments as in csrc/flash_attention.h and `forward`."""
    (B, H, Sq, D), (Hkv, Sk) = q.shape, k.shape[1:3]
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    keep_stride = 0 if keep is None else keep.stride(0)
    delta = torch.empty_like(lse)
    DIM = padded(D)
    with device.guard(q.device):
        delta_kernel[(triton.cdiv(Sq, DELTA_SIZE // DIM) * B * H,)](
            *(grad_o, o, delta, grad_o.stride()[:3], o.stride()[:3], H, Sq),
            D=D,
            DIM=DIM,
            ROWS=DELTA_SIZE // DIM,
            enable_fp_fusion=True,
        )
        tile, constants = options(KEYS_BACKWARD, q, causal)
        keys_backward_kernel[(triton.cdiv(Sk, tile.keys) * B * Hkv,)](
            *(grad_o, q, k, v, keep, lse, delta, dk, dv, seed),
            *(t.stride()[:3] for t in (grad_o, q, k, v, dk, dv)),
            *(keep_stride, Hkv, H // Hkv, Sq, Sk),
            *(scale, *dropped(dropout_p)),
            **constants,
        )
        tile, constants = options(QUERIES_BACKWARD, q, causal)
        queries_backward_kernel[(triton.cdiv(Sq, tile.queries) * B * H,)](
            *(grad_o, q, k, v, keep, lse, delta, dq, seed),
            *(t.stride()[:3] for t in (grad_o, q, k, v, dq)),
            *(keep_stride, H, H // Hkv, Sq, Sk),
            *(scale, *dropped(dropout_p)),
            **constants,
        )
