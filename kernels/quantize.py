"""Dequantising a block of a frozen weight in Triton. The contract is csrc/quantize.h, the caller
pyfront/ops/quantize.py.

A program makes BLOCK elements of one row. The table of NF4 is read from memory, where its 64 bytes stay in L1; so are
the scales, of which a warp shares two or three. Products and sums are not contracted, so that results are those of the
CPU kernel bit by bit.

Floor: the contract's bytes over the stream rate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusetune.kernels.device import guard

# Where parts of `nested` begin, and a block's size: csrc/quantize.h.
NESTED_MAP, NESTED_ABSMAX, NESTED_BLOCK = map(tl.constexpr, (1, 257, 256))
RECIPROCAL_127 = tl.constexpr(7.874015718698502e-3)

BLOCK = 1024


@triton.jit(do_not_specialize=["n0", "k0"])
def dequantize_kernel(
    codes, absmax, nested, table, out, n0, k0, width, K, quant_block, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[n, k] is the element (n0 + n, k0 + k) of the weight; row n is program 0's."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < width
    i = (n0 + n) * K + k0 + k
    block = i // quant_block
    scale = tl.load(absmax + block, inside, 0)
    if nested is not None:
        value = tl.load(nested + NESTED_MAP + scale.to(tl.int32), inside, 0.0)
        scale = value * tl.load(nested + NESTED_ABSMAX + block // NESTED_BLOCK, inside, 0.0) + tl.load(nested)
    if BITS == 4:
        both = tl.load(codes + i // 2, inside, 0).to(tl.int32)
        code = tl.where(i % 2 == 0, both >> 4, both & 15)
        w = tl.load(table + code) * scale
    else:
        w = tl.load(codes + i, inside, 0).to(tl.float32) * scale * RECIPROCAL_127
    tl.store(out + n * width + k, w.to(out.dtype.element_ty), inside)


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    table: Tensor,
    out: Tensor,
    n0: int,
    k0: int,
    K: int,
    block: int,
    bits: int,
) -> None:
    """Writes rows n0 ... and columns k0 ... of the weight to `out`, whose shape says how many.

    Args:
        table: [16] float32, the values of NF4's codes.
        out: [rows, columns], contiguous.
    """
    rows, width = out.shape
    if not out.numel():
        return
    with guard(out.device):
        dequantize_kernel[(rows, triton.cdiv(width, BLOCK))](
            codes, absmax, nested, table, out, n0, k0, width, K, block, BITS=bits, BLOCK=BLOCK, enable_fp_fusion=False
        )
