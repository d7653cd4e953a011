"""Random bits and dropout masks of csrc/philox.h, made in registers.

A tile of 32, 64 or 128 columns needs 16 counters a row, one for every 2, 4 or 8 of its elements. Triton gives their
words the layout of the tile that they mask; the 16 neighbouring counters of a group lie so that each thread of a
tensor-core tile computes the words of its own columns, without a shuffle.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


def dropped(p: float) -> tuple[int, float]:
    """Of the 65536 values of a mask element, how many are dropped; and the factor of kept elements, 0 where none is."""
    threshold = int(p * 65536 + 0.5)
    return threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


@triton.jit
def random_words(seed, row_low, row_high, group, first, COLS: tl.constexpr):
    """The generator's words of a tile, [ROWS, 16] or with more dimensions; word i holds pieces 2i and 2i + 1, and a
    piece is 16 neighbouring columns.

    Args:
        seed: int64, the value of the op's seed tensor.
        row_low, row_high, group: int32, the halves of the 64-bit row number and the column div 128; scalars, or
            [ROWS, 1], which one is at least.
        first: int32, the tile's first column within its group, a multiple of COLS.
        COLS: 32, 64 or 128.
    """
    tl.static_assert(COLS == 32 or COLS == 64 or COLS == 128)
    lane = tl.arange(0, 16)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, 16 * group + lane, row_low, row_high, 0, n_rounds=ROUNDS)
    if COLS == 128:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, 16, i div 2, i mod 2]
    else:
        upper = first >= 64
        w0, w1 = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
        words = tl.join(w0, w1) if COLS == 64 else tl.where(first % 64 >= 32, w1, w0)
    return words


@triton.jit
def in_columns(low, high, COLS: tl.constexpr):
    """[ROWS, COLS] of what was made of the lower and the upper halves of `random_words`."""
    both = tl.join(low, high)
    if COLS == 128:
        both = tl.permute(both, 0, 2, 3, 4, 1)
    elif COLS == 64:
        both = tl.permute(both, 0, 2, 3, 1)
    else:
        both = tl.permute(both, 0, 2, 1)
    return tl.reshape(both, (low.shape[0], COLS))


@triton.jit
def random_bits(seed, row_low, row_high, group):
    """The generator's 16 bits of each element of groups of 128 columns: [ROWS, 128] uint16; arguments as above."""
    words = random_words(seed, row_low, row_high, group, 0, 128)
    return in_columns(words.to(tl.uint16), (words >> 16).to(tl.uint16), 128)


@triton.jit
def keep_mask(seed, row_low, row_high, first_col, threshold, COLS: tl.constexpr):
    """Which elements of a tile dropout keeps: [ROWS, COLS] int1.

    Args:
        seed: int64, the value of the op's seed tensor.
        row_low, row_high: [ROWS] or scalar int32, the halves of the 64-bit row number.
        first_col: int32, a multiple of COLS.
        threshold: int32, of 65536 values the number that is dropped.
        COLS: 32, 64 or 128.
    """
    words = random_words(seed, row_low[:, None], row_high, first_col // 128, first_col % 128, COLS)
    return in_columns((words & 0xFFFF).to(tl.int32) >= threshold, (words >> 16).to(tl.int32) >= threshold, COLS)
