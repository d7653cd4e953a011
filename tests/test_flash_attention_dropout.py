"""Dropout of flash_attention: the mask of philox.h, element by element, at every backend, and its statistics."""

import pytest
import torch
from attention import FP32, OP, compare, cross, make, padding, with_dtypes  # noqa: F401
from oracle import gradients
from torch.utils.checkpoint import checkpoint

from fusetune.ops import flash_attention
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale


@pytest.mark.parametrize(
    ("shape", "causal", "kind", "dropout_p", "dtype"),
    with_dtypes(
        [((3, 2, 1, 10, 20, 8), *rest) for rest in [(False, None, 0.1), (True, "left", 0.5), (True, "scattered", 1.0)]],
        cross([((2, 4, 2, 60, 140, 32, 64),)], [False, True], [None, "left", "scattered"], [0.1, 0.5]),
    ),
    ids=str,
)
def test_follows_the_reference(backend, shape, causal, kind, dropout_p, dtype):
    inputs, do = make(shape, dtype, backend.device)
    mask = kind and padding(kind, shape[0], shape[4], backend.device)
    got = compare(inputs, do, causal=causal, key_padding_mask=mask, dropout_p=dropout_p)
    if dropout_p == 1:
        assert not any(t.any() for t in got.values())


def weights(B, H, S, device, dtype=FP32, **options):
    """[B, H, S, S] attention weights of forward, which q = 0 and v = 1 give, and of backward, which do = 1 gives."""
    eye = torch.eye(S, device=device, dtype=dtype).expand(B, H, S, S)
    v = eye.clone().requires_grad_()
    o = flash_attention(torch.zeros_like(eye), torch.zeros_like(eye), v, **options)
    return o.detach(), torch.autograd.grad(o, v, eye)[0].mT


@pytest.mark.parametrize(
    ("S", "kind", "dtype"), with_dtypes([(24, None), (24, "scattered")], cross([(128,)], ["scattered", None, "left"]))
)
def test_mask_bit_for_bit(backend, S, kind, dtype):
    B, H, p, device = 2, 2, 0.3, backend.device
    keep = padding(kind or "all", B, S, device)
    torch.manual_seed(5)
    found = weights(B, H, S, device, dtype, key_padding_mask=keep if kind else None, dropout_p=p)
    torch.manual_seed(5)
    rows = torch.arange(B * H, device=device)[:, None] * 2**32 + torch.arange(S, device=device)
    mask = keep_mask(int(draw_seed(device)), rows, S, p).view(B, H, S, S) & keep[:, None, None, :]
    expected = (mask * kept_scale(p) / keep.sum(1)[:, None, None, None]).to(dtype)
    for t in found:
        assert torch.equal(t != 0, mask)
        torch.testing.assert_close(t, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_columns_beyond_a_group_of_the_generator(cpu_backend):
    """Keys 128 and on have counters of their own."""
    p, S, device = 0.3, 256, cpu_backend.device
    torch.manual_seed(5)
    o, dv = weights(1, 1, S, device, dropout_p=p)
    torch.manual_seed(5)
    mask = keep_mask(int(draw_seed(device)), torch.arange(S, device=device), S, p)
    assert torch.equal(o[0, 0] != 0, mask)
    assert torch.equal(dv[0, 0] != 0, mask)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(device, p):
    kept = weights(2, 3, 256, device, dropout_p=p)[0] != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.01
    assert (kept.float().mean((2, 3)) - (1 - p)).abs().max() < 0.01  # of each head

    def agreement(a, b):
        return (a == b).float().mean()

    chance = p**2 + (1 - p) ** 2  # of two independent elements
    pairs = {
        "sequences": (kept[0], kept[1]),
        "heads": (kept[:, 0], kept[:, 1]),
        "rows": (kept[:, :, 1:], kept[:, :, :-1]),
        "keys": (kept[..., 1:], kept[..., :-1]),
        "groups of keys": (kept[..., 128:], kept[..., :128]),
        "rows and keys": (kept, kept.mT),
    }
    for name, pair in pairs.items():
        assert abs(agreement(*pair) - chance) < 0.01, name


def test_calls_differ_and_seeds_repeat(device):
    runs = []
    for seed in (1, None, 1):
        if seed:
            torch.manual_seed(seed)
        runs.append(weights(1, 1, 64, device, dropout_p=0.5)[0])
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_replays_dropout(device, use_reentrant):
    inputs, _ = make((1, 2, 1, 10, 20, 8), FP32, device)

    def attend(q, k, v):
        return flash_attention(q, k, v, causal=True, dropout_p=0.4)

    def backward(function, *extra, **options):
        leaves = [t.detach().requires_grad_() for t in inputs.values()]
        torch.manual_seed(7)
        o = function(*extra, *leaves, **options)
        o.square().sum().backward()  # reentrant checkpoints know only this form
        return [o, *(leaf.grad for leaf in leaves)]

    for direct, replayed in zip(
        backward(attend), backward(checkpoint, attend, use_reentrant=use_reentrant), strict=True
    ):
        assert torch.equal(direct, replayed)


def test_compiled_backward_has_the_mask_of_forward(device):
    eye = torch.eye(30, device=device)[None, None]
    v = eye.clone().requires_grad_()
    compiled = torch.compile(flash_attention, fullgraph=True)
    o = compiled(torch.zeros_like(eye), torch.zeros_like(eye), v, dropout_p=0.5)
    assert 0.3 < (o == 0).float().mean() < 0.7
    assert torch.equal(torch.autograd.grad(o, v, eye)[0] != 0, o.mT != 0)


def test_backward_repeats_for_one_forward(device):
    """The seed is saved, not drawn again."""
    inputs, do = make((1, 2, 1, 10, 20, 8), FP32, device)
    o = flash_attention(**inputs, dropout_p=0.5)
    first = torch.autograd.grad(o, list(inputs.values()), do, retain_graph=True)
    again = torch.autograd.grad(o, list(inputs.values()), do)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_zero_draws_no_seed(device):
    inputs, do = make((1, 2, 1, 10, 20, 8), FP32, device)
    before = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    gradients(flash_attention, inputs, do)
    after = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after)
