"""What flash_attention adds to logits, and does to them: dense and relative biases, softcaps and sinks, with their
gradients."""

import math

import pytest
import torch
from attention import BF16, FP16, FP32, OP, cases, compare, cross, make, with_dtypes  # noqa: F401
from oracle import gradients

from fusetune.ops import flash_attention
from fusetune.ops.flash_attention import alibi_bias, t5_relative_bias

pytestmark = pytest.mark.beyond_cuda("bias", "relative_bias", "softcap", "sinks")
DTYPES = [FP32, BF16, FP16]


def leaf(*shape, device="cpu", dtype=FP32):
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


BROADCASTS = [(b, h, q, k) for b in (1, 2) for h in (1, 4) for q in (1, 9) for k in (1, 14)]
FEW = [(2, 4, 9, 14), (1, 4, 9, 14), (2, 1, 1, 14), (1, 1, 9, 1), (4, 1, 14), ()]
OTHERS = [shape for shape in [*BROADCASTS, (14,), (9, 1), (9, 14)] if shape not in FEW]


@pytest.mark.parametrize("shape", cases(cross([()], FEW), cross([()], OTHERS)), ids=str)
def test_gradient_of_every_broadcast(backend, shape):
    inputs, do = make((2, 4, 2, 9, 14, 8), FP32, backend.device)
    inputs["bias"] = leaf(*shape, device=backend.device)
    compare(inputs, do, causal=len(shape) != 4)


@pytest.mark.large
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 113, 203), (2, 1, 113, 203), (2, 4, 1, 203), (1, 1, 113, 1)], ids=str)
def test_gradient_of_large_biases(backend, shape, dtype):
    inputs, do = make((2, 4, 2, 113, 203, 40), dtype, backend.device)
    inputs["bias"] = leaf(*shape, device=backend.device)
    compare(inputs, do, causal=True)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_biases(backend, dtype, bias_dtype):
    inputs, do = make((2, 2, 1, 13, 20, 8), dtype, backend.device)
    inputs["bias"] = leaf(1, 2, 13, 20, device=backend.device, dtype=bias_dtype)
    compare(inputs, do)


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_layouts_of_biases(backend, layout):
    inputs, do = make((2, 2, 1, 13, 20, 8), FP32, backend.device)
    bias = torch.randn(2, 2, 13, 40, device=backend.device)
    bias = {
        "transposed": bias[..., :20].mT.contiguous().mT,
        "every other": bias[..., ::2],
        "expanded": bias[:1, :1, :1, :20].expand(2, 2, 13, 20),
    }[layout]
    inputs["bias"] = bias.requires_grad_()
    compare(inputs, do)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_that_are_added_have_gradients(backend, dtype):
    inputs, do = make((2, 2, 1, 13, 20, 8), dtype, backend.device)
    inputs["mask"] = leaf(13, 20, device=backend.device)
    got = gradients(flash_attention, inputs, do)
    inputs["bias"] = inputs.pop("mask")
    expected = gradients(flash_attention, inputs, do)
    assert torch.equal(got["dmask"], expected["dbias"])


@pytest.mark.parametrize("name", ["bias", "relative_bias", "sinks"])
def test_gradient_beside_frozen_inputs(backend, name):
    inputs, do = make((2, 2, 1, 13, 20, 8), FP32, backend.device)
    inputs[name] = leaf(*{"bias": (2, 1, 13, 20), "relative_bias": (2, 39), "sinks": (2,)}[name], device=do.device)
    all_of_them = compare(inputs, do, causal=True)
    for frozen in ("q", "k", "v"):
        inputs[frozen].requires_grad_(False)
    alone = compare(inputs, do, causal=True)
    assert alone.keys() == {"out", f"d{name}"}
    assert torch.equal(alone[f"d{name}"], all_of_them[f"d{name}"])
    for tensor in inputs.values():
        tensor.requires_grad_(True)
    inputs[name].requires_grad_(False)
    without = gradients(lambda **t: flash_attention(**t, causal=True), inputs, do)
    for frozen in ("q", "k", "v"):
        assert torch.equal(without[f"d{frozen}"], all_of_them[f"d{frozen}"]), frozen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 3])
def test_biases_that_hide(backend, hidden, dtype):
    """-inf hides a key as a mask does, and has no gradient; a row of them sees nothing."""
    inputs, do = make((2, 2, 1, 13, 20, 8), dtype, backend.device)
    bias = torch.randn(2, 1, 13, 20, device=backend.device)
    bias[torch.rand(bias.shape, device=do.device) < hidden / 4] = -math.inf
    bias[1, 0, 4], bias[..., 7] = -math.inf, -math.inf
    inputs["bias"] = bias.requires_grad_()
    got = compare(inputs, do, causal=True, lse=True)
    assert not got["dbias"][bias == -math.inf].any()
    assert not got["out"][1, :, 4].any()
    assert not got["dk"][:, :, 7].any()


@pytest.mark.parametrize(
    ("Sq", "Sk", "N", "causal", "align", "dtype"),
    with_dtypes(
        [(13, 20, 20, False, "bottom_right"), (20, 13, 23, True, "top_left"), (1, 5, 5, True, "bottom_right")],
        cross([(113, 203, 203), (257, 130, 300)], [False, True], ["top_left", "bottom_right"]),
    ),
)
def test_relative_bias(backend, Sq, Sk, N, causal, align, dtype):
    inputs, do = make((2, 4, 2, Sq, Sk, 8), dtype, backend.device)
    inputs["relative_bias"] = leaf(4, 2 * N - 1, device=backend.device)
    compare(inputs, do, causal=causal, align=align)


def test_relative_bias_is_a_dense_bias(backend):
    inputs, do = make((2, 2, 1, 13, 20, 8), FP32, backend.device)
    relative = torch.randn(2, 2 * 25 - 1, device=backend.device)
    dense = torch.stack([torch.stack([relative[:, 24 + j - (i + 7)] for j in range(20)], 1) for i in range(13)], 1)
    got, expected = (
        gradients(lambda options=options, **t: flash_attention(**t, **options), inputs, do)
        for options in ({"relative_bias": relative}, {"bias": dense[None]})
    )
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize(("bidirectional", "causal"), [(True, False), (False, True)])
@pytest.mark.parametrize("S", [20, pytest.param(300, marks=pytest.mark.large)])
def test_t5(backend, S, bidirectional, causal):
    """As T5 calls attention: no scale, and a table that all layers share and learn."""
    inputs, do = make((2, 4, 4, S, S, 8), FP32, backend.device)
    table = torch.randn(32, 4, device=backend.device)
    inputs["relative_bias"] = t5_relative_bias(table, S, bidirectional=bidirectional).detach().requires_grad_()
    compare(inputs, do, scale=1.0, causal=causal)
    table.requires_grad_()
    o = flash_attention(
        inputs["q"], inputs["k"], inputs["v"], relative_bias=t5_relative_bias(table, S, bidirectional=bidirectional)
    )
    assert torch.autograd.grad(o.sum(), table)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("Sq", "Sk"), cases([(13, 20)], [(113, 203)]))
def test_alibi(backend, Sq, Sk, dtype):
    inputs, do = make((2, 4, 2, Sq, Sk, 8), dtype, backend.device)
    slopes = 2.0 ** -torch.arange(1, 5, device=backend.device)
    inputs["relative_bias"] = alibi_bias(slopes, Sk).requires_grad_()
    compare(inputs, do, causal=True)


@pytest.mark.parametrize(
    ("Sq", "Sk", "D", "softcap", "size", "dtype"),
    with_dtypes(
        [(13, 20, 8, 0.5, 6.0), (13, 20, 8, 30.0, 1.0)],
        cross([(113, 203, 64), (60, 70, 17)], [0.5, 30.0, 50.0], [1.0, 6.0]),
    ),
)
def test_softcap(backend, Sq, Sk, D, softcap, size, dtype):
    inputs, do = make((2, 4, 2, Sq, Sk, D), dtype, backend.device)
    inputs["q"] = (inputs["q"] * size).detach().requires_grad_()
    compare(inputs, do, softcap=softcap, causal=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_softcap_of_logits_beyond_it(backend, dtype):
    """tanh is 1 there, and its derivative 0: neither overflows."""
    inputs, do = make((1, 2, 1, 13, 20, 8), dtype, backend.device)
    inputs["q"] = (inputs["q"] * 1e4).detach().requires_grad_()
    got = compare(inputs, do, softcap=2.0)
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize(
    ("Sq", "Sk", "causal", "dtype"),
    with_dtypes([(13, 20, False), (20, 13, True)], cross([(113, 203), (257, 130), (70, 9)], [False, True])),
)
def test_sinks(backend, Sq, Sk, causal, dtype):
    """With causal and more queries than keys some rows see the sink alone."""
    inputs, do = make((2, 4, 2, Sq, Sk, 8), dtype, backend.device)
    inputs["sinks"] = leaf(4, device=backend.device)
    compare(inputs, do, causal=causal, lse=True)


@pytest.mark.parametrize("size", [-1e4, -math.inf, 60.0, 1e4])
def test_sinks_of_any_size(backend, size):
    """A large one takes all, a small one nothing, and -inf is none."""
    inputs, do = make((2, 2, 1, 13, 20, 8), FP32, backend.device)
    inputs["sinks"] = torch.tensor([size, 0.5], device=backend.device).requires_grad_()
    got = compare(inputs, do)
    assert all(t.isfinite().all() for t in got.values())
    if size == 1e4:
        assert not got["out"][:, 0].any()


def test_sinks_of_rows_that_see_nothing(backend):
    """Their log-sum-exp is the sink."""
    inputs, do = make((2, 2, 1, 13, 20, 8), FP32, backend.device)
    inputs["sinks"] = leaf(2, device=backend.device)
    mask = torch.rand(2, 1, 13, 20, device=backend.device) < 0.5
    mask[0, 0, 4] = mask[1] = False
    got = compare(inputs, do, mask=mask, lse=True)
    for row in (got["out"][0, :, 4], got["out"][1].transpose(0, 1)):
        assert not row[..., :-1].any()
        torch.testing.assert_close(row[..., -1], inputs["sinks"].detach().expand(row.shape[:-1]))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", ["relative_bias", "sinks"])
def test_small_tensors_of_low_precision(backend, name, dtype):
    inputs, do = make((2, 2, 1, 13, 20, 8), dtype, backend.device)
    inputs[name] = leaf(*{"relative_bias": (2, 39), "sinks": (2,)}[name], device=do.device, dtype=dtype)
    compare(inputs, do)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "Sq", "Sk", "D", "Dv"),
    cases([(2, 2, 1, 13, 20, 8, 16)], [(2, 4, 2, 113, 203, 40, 32), (1, 4, 1, 130, 65, 64, 64)]),
)
def test_everything_together(backend, B, H, Hkv, Sq, Sk, D, Dv, dtype):
    device = backend.device
    inputs, do = make((B, H, Hkv, Sq, Sk, D, Dv), dtype, device)
    N = max(Sq, Sk)
    inputs["bias"] = leaf(B, 1, Sq, Sk, device=device)
    inputs["relative_bias"] = leaf(H, 2 * N - 1, device=device)
    inputs["sinks"] = leaf(H, device=device)
    options = {
        "causal": True,
        "window": (Sk // 2, None),
        "softcap": 3.0,
        "mask": torch.rand(1, H, Sq, Sk, device=device) < 0.8,
        "key_padding_mask": torch.rand(B, Sk, device=device) < 0.8,
        "scale": 0.4,
        "dropout_p": 0.2,
    }
    compare(inputs, do, lse=True, **options)


@pytest.mark.parametrize("shape", [(1, 2, 13, 20), (2, 1, 1, 20)], ids=str)
def test_repeats_bitwise_whatever_the_thread_count(backend, shape, set_threads):
    check_repeats(backend, (2, 2, 1, 13, 20, 8), shape, set_threads)


@pytest.mark.parametrize("shape", [(1, 4, 113, 203), (3, 1, 1, 203), (1, 1, 113, 1)], ids=str)
def test_large_ones_repeat_bitwise(cpu_backend, shape, set_threads):
    check_repeats(cpu_backend, (3, 4, 2, 113, 203, 32), shape, set_threads)


def check_repeats(backend, shape, bias_shape, set_threads):
    inputs, do = make(shape, FP32, backend.device)
    inputs["bias"] = leaf(*bias_shape, device=do.device)
    inputs["relative_bias"] = leaf(shape[1], 2 * max(shape[3:5]) - 1, device=do.device)
    inputs["sinks"] = leaf(shape[1], device=do.device)

    def run(threads):
        set_threads(threads)
        torch.manual_seed(7)
        return gradients(lambda **t: flash_attention(**t, causal=True, softcap=4.0, dropout_p=0.2), inputs, do)

    first = run(1)
    for threads in (1, 2, 3, 7) if backend.name == "cpu" else (1,):
        again = run(threads)
        for name in first:
            assert torch.equal(first[name], again[name]), f"{name} with {threads} threads"
