"""The dropout generator of csrc/philox.h in plain torch: the oracle of every backend's masks."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
GROUP = 128  # columns served by 16 counters
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """`count` int64 seeds from torch's generator of `device`: checkpointing replays them, CUDA graphs capture them."""
    return torch.randint(2**63 - 1, (count,), device=device)  # torch.compile has no graph for Tensor.random_


def threshold(p: float) -> int:
    """Of the 65536 values of a mask element, how many are dropped."""
    return int(p * 65536 + 0.5)


def kept_scale(p: float) -> float:
    """The factor of kept elements, 1/(1-p) with p as it is realised; 0 where nothing is kept."""
    dropped = threshold(p)
    return 65536 / (65536 - dropped) if dropped < 65536 else 0.0


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int) -> list[Tensor]:
    """Philox4x32 (Salmon et al., SC'11, section 3.3) on int64 tensors that hold 32-bit words.

    Args:
        counter: four tensors that broadcast together.
        key: two 32-bit words.
        rounds: the generator's number of rounds.

    Returns:
        The four output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # 32 x 32 -> 64 bits in halves: int64 products of whole words would overflow.
        high0, low0 = _multiply_wide(c0, _M0)
        high1, low1 = _multiply_wide(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def _multiply_wide(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    low_part = a * (m & 0xFFFF)
    high_part = a * (m >> 16)
    carry = (low_part >> 16) + (high_part & 0xFFFF)
    high = (high_part >> 16) + (carry >> 16)
    low = ((carry & 0xFFFF) << 16) | (low_part & 0xFFFF)
    return high, low


def random_bits(seed: int, rows: Tensor, cols: int) -> Tensor:
    """The generator's 16 bits of each element.

    Args:
        seed: value of the op's seed tensor.
        rows: [...] int64 row numbers (csrc/philox.h says what a row is in each op).
        cols: number of columns.

    Returns:
        [..., cols] int64 from 0 to 65535.
    """
    col = torch.arange(cols, device=rows.device)
    row = rows[..., None]
    counter = (16 * (col // GROUP) + col % 16, row & _LOW, (row >> 32) & _LOW, torch.zeros_like(col))
    key = (seed & _LOW, (seed >> 32) & _LOW)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, key, ROUNDS)))
    piece = (col % GROUP) // 16
    word = words.gather(0, (piece // 2).expand(words.shape[1:])[None])[0]
    return (word >> (16 * (piece % 2))) & 0xFFFF


def keep_mask(seed: int, rows: Tensor, cols: int, p: float) -> Tensor:
    """Which elements dropout with probability p keeps: [..., cols] bool; `seed`, `rows`, `cols` as above."""
    return random_bits(seed, rows, cols) >= threshold(p)
