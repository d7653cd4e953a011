"""The dropout generator's oracle, fusetune.ops.philox; that the kernels' masks equal it is in each op's tests."""

import math

import pytest
import torch

from fusetune.ops.philox import GROUP, ROUNDS, draw_seed, keep_mask, kept_scale, philox4x32, random_bits, threshold

SIDE = 256  # of the masks whose statistics are taken
ONES, PI = (0xFFFFFFFF,) * 6, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    ("rounds", "counter_and_key", "words"),
    [
        (7, (0,) * 6, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, ONES, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, (0,) * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(rounds, counter_and_key, words):
    *counter, k0, k1 = counter_and_key
    got = philox4x32(tuple(torch.tensor([c]) for c in counter), (k0, k1), rounds)
    assert " ".join(f"{int(word):08x}" for word in got) == words


@pytest.mark.parametrize("row", [0, 5, 2**32 - 1, 2**32, (3 << 32) | 17, 2**62])
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 0x123456789ABCDEF])
def test_an_element_is_the_documented_piece_of_the_documented_counter(row, seed):
    cols, p = 300, 0.3
    mask = keep_mask(seed, torch.tensor([row]), cols, p)[0]
    random = random_bits(seed, torch.tensor([row]), cols)[0]
    for col in (0, 15, 16, 31, 127, 128, 143, 255, 256, 299):
        counter = (16 * (col // 128) + col % 16, row % 2**32, row // 2**32, 0)
        words = philox4x32(tuple(torch.tensor([c]) for c in counter), (seed % 2**32, seed // 2**32), 7)
        piece = col % 128 // 16
        bits = int(words[piece // 2]) >> 16 * (piece % 2) & 0xFFFF
        assert random[col] == bits, f"column {col}"
        assert bool(mask[col]) == (bits >= threshold(p)), f"column {col}"
    assert (ROUNDS, GROUP) == (7, 128)


def test_probabilities_are_quantised_to_65536ths():
    assert [threshold(p) for p in (0, 1 / 65536, 0.1, 0.5, 1)] == [0, 1, 6554, 32768, 65536]
    assert threshold(0.49 / 65536) == 0
    assert threshold(0.51 / 65536) == 1
    assert kept_scale(0) == 1
    assert kept_scale(0.5) == 2
    assert kept_scale(0.1) == 65536 / (65536 - 6554)
    assert kept_scale(1) == 0
    rows = torch.arange(64)
    assert keep_mask(3, rows, 256, 0).all()
    assert not keep_mask(3, rows, 256, 1).any()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_kept_fraction(p):
    mask = keep_mask(11, torch.arange(SIDE), SIDE, p)
    realised = threshold(p) / 65536
    deviation = math.sqrt(realised * (1 - realised))
    assert abs(mask.double().mean() - (1 - realised)) < 4 * deviation / SIDE
    # rows and columns by themselves: of 2 SIDE means the largest is below 5 deviations
    for dim in (0, 1):
        assert (mask.double().mean(dim) - (1 - realised)).abs().max() < 5 * deviation / math.sqrt(SIDE)


def test_bits_are_uniform_and_each_bit_a_fair_coin():
    """Counts of the upper and of the lower 8 bits: chi-squared of 255 degrees of freedom, within 5 deviations."""
    bits = random_bits(11, torch.arange(SIDE), SIDE)
    assert bits.shape == (SIDE, SIDE)
    assert bits.dtype == torch.int64
    assert 0 <= bits.min() <= bits.max() <= 65535
    for byte in (bits >> 8, bits & 255):
        counts = byte.flatten().bincount(minlength=256).double()
        assert abs(((counts - SIDE) ** 2 / SIDE).sum() - 255) < 5 * math.sqrt(2 * 255)
    for place in range(16):
        assert abs((bits >> place & 1).double().mean() - 0.5) < 4 * 0.5 / SIDE


def test_a_row_may_be_one_number_and_bits_a_prefix_of_longer_ones():
    row = torch.tensor(3 << 56 | 7)
    bits = random_bits(2**63 - 1, row, 300)
    assert bits.shape == (300,)
    assert torch.equal(bits[:131], random_bits(2**63 - 1, row, 131))
    assert torch.equal(bits, random_bits(2**63 - 1, row[None], 300)[0])


@pytest.mark.parametrize("shift", [(0, 1), (0, 16), (0, 32), (0, 128), (1, 0), (1, 1), (48, 0)])
def test_shifted_masks_are_uncorrelated(shift):
    rows, cols = shift
    x = keep_mask(5, torch.arange(SIDE), SIDE, 0.5).double() * 2 - 1
    products = x[rows:, cols:] * x[: SIDE - rows, : SIDE - cols]
    assert abs(products.mean()) < 4 / math.sqrt(products.numel())


@pytest.mark.parametrize(
    ("seeds", "rows"),
    [((5, 6), (0, 0)), ((5, 5 + 2**32), (0, 0)), ((5, 5), (0, 2**32)), ((5, 5), (0, 1000))],
    ids=["low word of the seed", "high word of the seed", "high word of the row", "row"],
)
def test_masks_of_other_seeds_and_rows_are_uncorrelated(seeds, rows):
    x, y = (
        keep_mask(seed, torch.arange(SIDE) + row, SIDE, 0.5).double() * 2 - 1
        for seed, row in zip(seeds, rows, strict=True)
    )
    assert abs((x * y).mean()) < 4 / SIDE


def test_a_mask_depends_on_position_only():
    whole = keep_mask(9, torch.arange(70), 300, 0.4)
    assert torch.equal(whole[13:55, :131], keep_mask(9, torch.arange(13, 55), 131, 0.4))


def test_seeds_come_from_torchs_generator():
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
    assert first.shape == (1,)
    assert first.dtype == torch.int64
