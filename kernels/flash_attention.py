"""Flash attention in Triton: the contract is csrc/flash_attention.h, the caller pyfront/ops/flash_attention.py.

Forward is one kernel over blocks of queries. Backward is deterministic and without atomics: delta = rowsum(do . o)
- dlse; dk and dv over blocks of keys; dq over blocks of queries. Both of the latter compute the logits: 7 products of
2 B H Sq Sk D flops where one pass would need 5. Biases and sinks: flash_attention_bias.py.

Blocks that causal, window or padding hide are skipped, and the mask is evaluated only in blocks that causal or window
cut, or in all with padding or a mask. Packed sequences have cdiv(tokens, BLOCK) + members tiles a head, the most that
they can need: a tile finds its member on the device, and leaves where there is none.

Floor: flops over the tensor cores' rate in 16-bit types; float32 runs on the FMA units, because TF32 would lose 13 of
24 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusetune.kernels import device
from fusetune.kernels import flash_attention_bias as biases
from fusetune.kernels.flash_attention_tile import (
    HIDDEN,
    LN2,
    Arguments,
    Tile,
    block_of,
    blocks_of,
    call_of,
    exponential,
    head_of,
    kept_keys,
    keys_of,
    load_gradient,
    load_rows,
    load_statistics,
    logits,
    options,
    padded,
    queries_of,
    run_of,
    seen,
    store_rows,
    strides,
    tile_backward,
    unit,
)
from fusetune.kernels.philox import keep_mask

# By compute capability, 8 standing for those not listed, and bytes of an element; then by padded head dimension at
# most. The tiles of 8 fit the 99 KiB of shared memory of 8.6, 8.9 and 12.0, those of AMD 64 KiB. Rows of a feature are
# for kernels that would not keep the others' tiles in registers: "biased" by bias, mask or softcap, "packed"
# with starts, "padded" with keep.
FORWARD = {
    (device.AMD, 2): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
    (device.AMD, 2, "padded"): {64: Tile(128, 64, 8, 1)},
    (device.AMD, 4): {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    (8, 2): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    (8, 2, "biased"): {64: Tile(128, 32, 8, 2), 128: Tile(128, 32, 8, 2)},
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
    (9, 2, "biased"): {64: Tile(32, 64, 8, 2), 128: Tile(32, 32, 8, 2)},
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
DELTA_SIZE = 2048  # elements of a tile of delta_kernel


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
    hidden = tl.load(lse + row, i < Sq, other=0.0) < HIDDEN  # takes no part, whatever its gradients
    tl.store(delta + row, tl.where(hidden, 0.0, D_i), i < Sq)


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
                row_lse, row_delta = load_statistics(lse_head, delta_head, i, i < Sq, call)
                do = load_gradient(do_head, i, grad_o_stride[2], i < Sq, row_lse, call, DV, DIM_V)
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
    lse = head_of(lse, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    delta = head_of(delta, (call.H * call.Sq, call.Sq, 1), b, h, call.q_starts, q0)
    row_lse, row_delta = load_statistics(lse, delta, i, i < Sq, call)
    grad_o = head_of(grad_o, grad_o_stride, b, h, call.q_starts, q0)
    do = load_gradient(grad_o, i, grad_o_stride[2], i < Sq, row_lse, call, DV, DIM_V)
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


def forward(q: Tensor, k: Tensor, v: Tensor, a: Arguments, o: Tensor, lse: Tensor) -> None:
    """Writes o and lse. Arguments as in csrc/flash_attention.h; a.seed is a one-element int64 tensor, or None."""
    if not lse.numel() or (a.q_starts is not None and len(a.q_starts) == 1):
        return
    B, H, Sq, _ = q.shape
    call = call_of(q, k, a)
    tile, constants = options(FORWARD, q, v, call)
    with device.guard(q.device):
        forward_kernel[(blocks_of(Sq, tile.queries, call.members) * B * H,)](
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
        keys_backward_kernel[(blocks_of(Sk, tile.keys, call.members) * B * Hkv,)](
            *(*inputs, dk, dv, *strides(grad_o, q, k, v, dk, dv), call), **constants
        )
        tile, constants = options(QUERIES_BACKWARD, q, v, call)
        queries_backward_kernel[(blocks_of(Sq, tile.queries, call.members) * B * H,)](
            *(*inputs, dq, *strides(grad_o, q, k, v, dq), call), **constants
        )
        if dbias.numel():
            biases.bias_backward(inputs, call, dbias)
        if drelative.numel():
            biases.relative_backward(inputs, call, drelative)
        if dsinks.numel():
            biases.sinks_backward(inputs, call, dsinks)
