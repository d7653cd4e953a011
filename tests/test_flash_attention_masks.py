"""Who sees whom in flash_attention: causal masks, windows, key padding and general masks, bool and float."""

import math

import pytest
import torch
from attention import BF16, FP16, FP32, OP, cases, compare, cross, make, padding, visible, with_dtypes  # noqa: F401
from oracle import gradients

from fusetune.ops import flash_attention

beyond_cuda = pytest.mark.beyond_cuda("mask", "bias")


def judge(inputs, do, seen, **options):
    """By the rule; besides, what is unseen is exactly zero. seen broadcasts to [B, H, Sq, Sk]."""
    got = compare(inputs, do, **options)
    (B, H, Sq, _), (_, Hkv, Sk, _) = inputs["q"].shape, inputs["k"].shape
    seen = seen.to(do.device).expand(B, H, Sq, Sk)
    for name in ("out", "dq"):
        assert not got[name][~seen.any(3)].any(), name
    read = seen.any(2).view(B, Hkv, H // Hkv, Sk).any(2)
    for name in ("dk", "dv"):
        assert not got[name][~read].any(), name
    return got


# causal, window, align, Sq, Sk
WINDOWS = [
    (True, (None, None), "bottom_right", 20, 13),
    (True, (None, None), "top_left", 20, 13),
    (True, (None, None), "top_left", 10, 23),
    (True, (3, None), "bottom_right", 10, 23),
    (True, (3, 9), "top_left", 20, 13),
    (True, (0, None), "bottom_right", 20, 13),
    (False, (2, 4), "bottom_right", 20, 13),
    (False, (2, 4), "top_left", 10, 23),
    (False, (None, 1), "bottom_right", 20, 13),
    (False, (5, None), "top_left", 20, 13),
    (False, (0, 0), "top_left", 10, 23),
]
LARGE_WINDOWS = [
    (True, (None, None), "top_left", 257, 131),
    (True, (None, None), "top_left", 113, 203),
    (True, (40, None), "bottom_right", 300, 300),
    (True, (127, None), "bottom_right", 70, 300),
    (True, (128, None), "top_left", 300, 130),
    (True, (1000, None), "bottom_right", 129, 129),
    (False, (64, 64), "bottom_right", 129, 257),
    (False, (63, 1), "top_left", 257, 129),
    (False, (None, 130), "bottom_right", 300, 280),
    (False, (10, None), "bottom_right", 300, 280),
    (False, (200, 0), "top_left", 65, 300),
    (False, (0, 200), "bottom_right", 65, 300),
]


@pytest.mark.parametrize(("causal", "window", "align", "Sq", "Sk", "dtype"), with_dtypes(WINDOWS, LARGE_WINDOWS))
def test_windows(backend, causal, window, align, Sq, Sk, dtype):
    options = {"causal": causal, "window": window, "align": align}
    inputs, do = make((2, 2, 1, Sq, Sk, 16), dtype, backend.device)
    judge(inputs, do, visible(Sq, Sk, **options), **options)


KINDS = ["left", "right", "scattered", "one sequence has none", "none", "all", "expanded", "transposed"]
PADDED = [(3, 4, 2, 60, 300, 32), (2, 2, 2, 300, 130, 64)]


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "Sq", "Sk", "D", "kind", "causal", "dtype"),
    with_dtypes(
        [(3, 2, 1, 10, 20, 8, kind, n % 2 == 0) for n, kind in enumerate(KINDS)], cross(PADDED, KINDS, [True, False])
    ),
)
def test_padding(backend, B, H, Hkv, Sq, Sk, D, kind, causal, dtype):
    inputs, do = make((B, H, Hkv, Sq, Sk, D), dtype, backend.device)
    keep = padding(kind, B, Sk, backend.device)
    seen = keep[:, None, None, :] & visible(Sq, Sk, causal=causal).to(backend.device)
    judge(inputs, do, seen, causal=causal, key_padding_mask=keep)


@pytest.mark.parametrize(
    ("kind", "window", "align"),
    [("left", (4, 2), "bottom_right"), ("right", (0, 5), "top_left"), ("scattered", (3, 3), "bottom_right")],
)
def test_padding_within_windows(backend, kind, window, align):
    inputs, do = make((2, 2, 1, 13, 20, 8), FP16, backend.device)
    keep = padding(kind, 2, 20, backend.device)
    seen = keep[:, None, None, :] & visible(13, 20, window=window, align=align).to(backend.device)
    judge(inputs, do, seen, window=window, align=align, key_padding_mask=keep)


def test_padded_keys_are_never_read(backend):
    """So that not even NaN comes through."""
    inputs, do = make((2, 2, 1, 10, 20, 8), FP16, backend.device)
    mask = padding("scattered", 2, 20, backend.device)
    clean = gradients(lambda **t: flash_attention(**t, key_padding_mask=mask), inputs, do)
    with torch.no_grad():
        for name in ("k", "v"):
            inputs[name].masked_fill_(~mask[:, None, :, None], math.nan)
    got = gradients(lambda **t: flash_attention(**t, key_padding_mask=mask), inputs, do)
    for name in clean:
        assert torch.equal(got[name], clean[name]), name


BROADCASTS = [(b, h, q, k) for b in (1, 2) for h in (1, 4) for q in (1, 10) for k in (1, 20)]
FEW = [(2, 4, 10, 20), (2, 1, 1, 20), (1, 4, 10, 1), (10, 20)]
OTHERS = [shape for shape in [*BROADCASTS, (20,), (10, 1), (4, 1, 20)] if shape not in FEW]


@beyond_cuda
@pytest.mark.parametrize("shape", cases(cross([()], FEW), cross([()], OTHERS)), ids=str)
def test_masks_broadcast(backend, shape):
    inputs, do = make((2, 4, 2, 10, 20, 8), FP16, backend.device)
    mask = torch.rand(shape, device=backend.device) < 0.6
    judge(inputs, do, mask, mask=mask)


def layouts(mask):
    """mask in other memory layouts."""
    padded = torch.zeros(*mask.shape[:3], 2 * mask.shape[3], dtype=mask.dtype, device=mask.device)
    padded[..., ::2] = mask
    return {
        "contiguous": mask,
        "transposed": mask.mT.contiguous().mT,
        "every other": padded[..., ::2],
        "heads last": mask.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "expanded": mask[:1, :1].expand(mask.shape),
        "one row": mask[:, :, :1].expand(mask.shape),
        "one column": mask[..., :1].expand(mask.shape),
        "of one element": mask[:1, :1, :1, :1].expand(mask.shape),
        "part of a larger one": torch.nn.functional.pad(mask, (3, 5, 1, 2))[..., 1:-2, 3:-5],
    }


@beyond_cuda
@pytest.mark.parametrize(
    ("shape", "layout"),
    cases(
        [((2, 2, 1, 10, 20, 8), layout) for layout in ("transposed", "every other", "expanded", "one column")],
        cross([((2, 4, 2, 70, 150, 32),)], layouts(torch.zeros(1, 1, 1, 1))),
    ),
)
def test_layouts_of_masks(backend, shape, layout):
    inputs, do = make(shape, FP32, backend.device)
    B, H, _, Sq, Sk, _ = shape
    mask = layouts(torch.rand(B, H, Sq, Sk, device=backend.device) < 0.7)[layout]
    judge(inputs, do, mask, mask=mask)


@beyond_cuda
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "Sq", "Sk", "D"), cases([(2, 2, 1, 13, 20, 8)], [(2, 4, 2, 113, 203, 64), (1, 2, 2, 130, 65, 50)])
)
def test_masks_with_everything_else(backend, B, H, Hkv, Sq, Sk, D, dtype):
    device = backend.device
    inputs, do = make((B, H, Hkv, Sq, Sk, D), dtype, device)
    mask, keep = torch.rand(B, 1, Sq, Sk, device=device) < 0.7, padding("scattered", B, Sk, device)
    options = {"causal": True, "window": (Sk // 2, None)}
    seen = mask & keep[:, None, None, :] & visible(Sq, Sk, **options).to(device)
    judge(inputs, do, seen, mask=mask, key_padding_mask=keep, dropout_p=0.2, lse=True, **options)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_large_masks(device, dtype):
    """Block-sparse, as documents in a row are; whole blocks are hidden, and whole blocks seen."""
    inputs, do = make((1, 2, 1, 1023, 1024, 64), dtype, device)
    document = torch.arange(1024, device=device) // 200
    mask = (document[:1023, None] == document) & (torch.arange(1023, device=device) != 500)[:, None]
    judge(inputs, do, mask, mask=mask)


@beyond_cuda
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("hidden", ["all", "a query", "a sequence", "a head"])
def test_masks_that_hide_all_keys(backend, hidden, dtype):
    inputs, do = make((2, 2, 1, 10, 20, 8), dtype, backend.device)
    mask = torch.ones(2, 2, 10, 20, dtype=torch.bool, device=backend.device)
    mask[{"all": ..., "a query": (0, 1, 3), "a sequence": 1, "a head": (0, 1)}[hidden]] = False
    judge(inputs, do, mask, mask=mask, lse=True)
    judge(inputs, do, mask, mask=torch.zeros(mask.shape, device=do.device).masked_fill(~mask, -math.inf), lse=True)


@beyond_cuda
@pytest.mark.parametrize("hides", ["-inf", "smallest"])
@pytest.mark.parametrize("mask_dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("Sq", "Sk"), cases([(13, 20)], [(70, 130)]))
def test_float_masks_that_hide(backend, Sq, Sk, dtype, mask_dtype, hides):
    """As transformers makes them, whose models hide by the smallest number of a dtype, which may not be q's."""
    device = backend.device
    inputs, do = make((2, 2, 1, Sq, Sk, 8), dtype, device)
    seen = (torch.rand(2, 1, Sq, Sk, device=device) < 0.6) & visible(Sq, Sk, causal=True).to(device)
    seen[..., 0] = True  # a row of smallest numbers sees all keys
    low = -math.inf if hides == "-inf" else torch.finfo(mask_dtype).min
    mask = torch.zeros(seen.shape, dtype=mask_dtype, device=device).masked_fill(~seen, low)
    judge(inputs, do, seen, mask=mask, lse=True)


@beyond_cuda
@pytest.mark.parametrize("mask_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_rows_of_smallest_numbers_average_all_keys(backend, dtype, mask_dtype):
    """As left-padded queries have them: the sum of a logit and finfo.min is finfo.min."""
    inputs, do = make((2, 2, 1, 10, 20, 8), dtype, backend.device)
    seen = visible(10, 20, causal=True).to(do.device).repeat(2, 1, 1, 1)
    seen[0, :, 2:5] = False
    mask = torch.zeros(seen.shape, dtype=mask_dtype, device=do.device).masked_fill(~seen, torch.finfo(mask_dtype).min)
    got, expected = (
        gradients(lambda mask=mask, **t: flash_attention(**t, mask=mask), inputs, do) for mask in (mask, seen)
    )
    average = inputs["v"].detach().float().mean(2, keepdim=True).expand(2, 2, 3, 8)[0].to(dtype)
    torch.testing.assert_close(got["out"][0, :, 2:5], average)
    expected["out"][0, :, 2:5] = got["out"][0, :, 2:5]
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    assert not got["dq"][0, :, 2:5].any()


@beyond_cuda
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("low", [-1e4, torch.finfo(FP16).min])
def test_rows_of_small_numbers_see_all_keys_alike(backend, low, dtype):
    """Softmax does not know that all logits of a row are small."""
    inputs, do = make((2, 2, 1, 10, 20, 8), dtype, backend.device)
    mask = torch.zeros(2, 1, 10, 20, device=backend.device)
    mask[0, :, 2:5] = low
    compare(inputs, do, mask=mask, large_logits=True)


@beyond_cuda
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_float_masks_are_added(backend, dtype):
    device = backend.device
    inputs, do = make((2, 2, 1, 13, 20, 8), dtype, device)
    mask, bias = torch.randn(2, 1, 13, 20, device=device), torch.randn(2, 1, 20, device=device)
    compare(inputs, do, mask=mask, bias=bias)
    together = flash_attention(**inputs, mask=mask, bias=bias)
    assert torch.equal(together, flash_attention(**inputs, bias=mask + bias))


@beyond_cuda
def test_nothing_hidden_is_no_mask(backend):
    """Masks of True, paddings of True and windows beyond the sequence leave the result as it is."""
    inputs, do = make((2, 2, 1, 10, 20, 8), FP32, backend.device)
    device = backend.device
    for options in (
        {"mask": torch.ones(1, 1, 10, 20, dtype=torch.bool, device=device)},
        {"mask": torch.zeros(20, device=device)},
        {"key_padding_mask": torch.ones(2, 20, dtype=torch.bool, device=device)},
        {"window": (19, 9)},
        {"window": (10**6, None), "align": "top_left"},
    ):
        compare(inputs, do, **options)
