"""What the kernels of flash_attention.py and flash_attention_bias.py do with a tile of queries and keys: who sees whom,
the logits, and backward their gradients; and what their launches share."""

from __future__ import annotations

from typing import Any, NamedTuple

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


KEPT_CHUNK = tl.constexpr(1024)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1e5)  # kHidden of the contract


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
    hides: int | None  # 1 where some query may see no key
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
    """lse times `unit`, infinite for queries that take no part so that their p is 0; and delta."""
    rows = tl.load(lse + i, inside, other=float("-inf"))
    return tl.where(rows < HIDDEN, float("inf"), rows * unit(call)), tl.load(delta + i, inside, other=0.0)


@triton.jit
def load_gradient(base, i, row_stride, inside, lse, call, DV: tl.constexpr, DIM_V: tl.constexpr):
    """Rows of do, zeros where load_statistics has lse infinite: what those queries' gradients are may be anything."""
    if call.hides is not None:
        inside &= lse < float("inf")
    return load_rows(base, i, row_stride, inside, DV, DIM_V)


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


def padded(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def call_of(q: Tensor, k: Tensor, a: Arguments) -> Call:
    def strides_of(mask: Tensor | None) -> list[int]:
        if mask is None:
            return [0] * 4
        return [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]

    # Between as many queries as keys a query sees itself, unless a mask hides it. Values of starts are not read.
    same = q.shape[2] == k.shape[2] if a.q_starts is None else a.q_starts.data_ptr() == a.k_starts.data_ptr()
    masks = any(t is not None for t in (a.keep, a.mask, a.bias, a.relative))
    mask_b, mask_h, mask_q, mask_k = strides_of(a.mask)
    bias_b, bias_h, bias_q, bias_k = strides_of(a.bias)
    threshold, kept_scale = dropped(a.dropout_p)
    return Call(
        H=q.shape[1],
        GROUP=q.shape[1] // k.shape[1],
        Sq=q.shape[2],
        Sk=k.shape[2],
        scale=a.scale,
        softcap=a.softcap or None,
        left=None if a.left < 0 else a.left,
        right=None if a.right < 0 else a.right,
        bottom_right=int(not a.top_left),
        keep=a.keep,
        keep_row=0 if a.keep is None else a.keep.stride(0),
        mask=a.mask,
        mask_b=mask_b,
        mask_h=mask_h,
        mask_q=mask_q,
        mask_k=mask_k,
        bias=a.bias,
        bias_b=bias_b,
        bias_h=bias_h,
        bias_q=bias_q,
        bias_k=bias_k,
        relative=a.relative,
        N=0 if a.relative is None else (a.relative.shape[1] + 1) // 2,
        sinks=a.sinks,
        q_starts=a.q_starts,
        k_starts=a.k_starts,
        members=0 if a.q_starts is None else len(a.q_starts) - 1,
        hides=None if same and not masks else 1,
        seed=a.seed,
        threshold=threshold,
        kept_scale=kept_scale,
    )


def options(
    table: dict[tuple[Any, ...], dict[int, Tile]], q: Tensor, v: Tensor, call: Call
) -> tuple[Tile, dict[str, Any]]:
    """Tile and compile-time arguments of a launch."""
    D, DV = q.shape[-1], v.shape[-1]
    DIM, DIM_V = padded(D), padded(DV)
    biased = any(term is not None for term in (call.bias, call.relative, call.mask, call.softcap))
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


def blocks_of(tokens: int, size: int, members: int) -> int:
    return triton.cdiv(tokens, size) + members


def strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(t.stride()[:3] for t in tensors)
