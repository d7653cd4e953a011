"""flash_attention at every backend: shapes, layouts, logits of all sizes and the log-sum-exp. The oracle is
flash_attention_reference in float64 (test_flash_attention_reference.py), the yardstick the same in low precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention import BF16, DTYPES, FP16, FP32, LARGE, OP, cases, compare, cross, float32, make, padding, with_dtypes  # noqa: F401
from oracle import LAYOUTS, assert_right, gradients, to_double
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusetune.ops import flash_attention, flash_attention_reference
from fusetune.ops.flash_attention import Arguments

positive_scale = pytest.mark.beyond_cuda("scale <= 0")
no_size = pytest.mark.beyond_cuda("head dimension of 0")


# Either side of tiles of 16, 24, 48, 64, 128 and 240.
LENGTHS = [(113, 203), (16, 17), (1, 300), (25, 129), (48, 127), (63, 64), (64, 65), (65, 63), (127, 128), (129, 127)]
LENGTHS += [(128, 49), (241, 257), (257, 131)]


@pytest.mark.parametrize(
    ("Sq", "Sk", "causal", "dtype"),
    with_dtypes(cross([(1, 1), (1, 9), (9, 1), (23, 40)], [False, True]), cross(LENGTHS, [True, False])),
)
def test_sequence_lengths(backend, Sq, Sk, causal, dtype):
    compare(*make((2, 2, 1, Sq, Sk, 24), dtype, backend.device), causal=causal)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_long_sequences(device, dtype):
    compare(*make((1, 2, 1, 1023, 1024, 64), dtype, device), causal=True)


# Every head dimension on either side, equal and not; of those the CUDA kernels take multiples of 8 up to 128.
HEAD_DIMS = [(8, 8), (16, 32), (32, 16), (64, 64), (80, 96), (96, 40), (40, 80), (64, 128), (128, 64), (128, 128)]
OTHER_HEAD_DIMS = [(8, 256), (50, 59), (59, 64), (64, 50), (111, 128), (128, 111), (160, 224), (192, 128)]
OTHER_HEAD_DIMS += [(224, 160), (256, 192), (256, 256), (128, 8), (2, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "Dv"), cases(HEAD_DIMS[:1], HEAD_DIMS[1:]))
def test_head_dimensions(backend, D, Dv, dtype):
    compare(*make((1, 2, 1, 35, 60, D, Dv), dtype, backend.device), causal=True)


@pytest.mark.beyond_cuda("head dimensions over 128 or not multiples of 8")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("D", "Dv"), cases([(1, 3), (17, 5)], OTHER_HEAD_DIMS))
def test_other_head_dimensions(backend, D, Dv, dtype):
    compare(*make((1, 2, 1, 35, 60, D, Dv), dtype, backend.device), causal=True)


@pytest.mark.parametrize(
    ("H", "Hkv", "causal", "dtype"),
    with_dtypes([(4, 2, False), (3, 1, True)], cross([(4, 4), (12, 4), (71, 1)], [False, True])),
)
def test_grouped_heads(backend, H, Hkv, causal, dtype):
    compare(*make((2, H, Hkv, 31, 45, 24), dtype, backend.device), causal=causal)


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=[*LARGE, float32]), FP16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 1, 5, 6, 8), (2, 2, 1, 0, 6, 8), (2, 2, 1, 5, 0, 8)]
    + [pytest.param((2, 2, 1, 5, 6, *sizes), marks=no_size) for sizes in [(0, 0), (0, 8), (8, 0)]],
    ids=str,
)
def test_empty_tensors(backend, shape, dtype):
    compare(*make(shape, dtype, backend.device), causal=True, scale=0.5)


@pytest.mark.parametrize(
    ("layout", "dropout_p", "dtype"),
    with_dtypes(
        cross([("bshd",), ("packed",), ("expanded",), *((layout,) for layout in LAYOUTS)], [0.25]),
        cross([("bshd",), ("packed",), ("expanded",), *((layout,) for layout in LAYOUTS)], [0.0]),
    ),
)
def test_layouts(backend, layout, dtype, dropout_p):
    inputs, do = make((2, 3, 3, 21, 21, 24), dtype, backend.device, layout)
    got = compare(inputs, do, causal=True, dropout_p=dropout_p)
    if layout != "transposed":  # which the kernels copy
        assert got["out"].stride() == torch.empty_like(inputs["q"]).stride()
        assert got["dq"].stride() == torch.empty_like(inputs["q"]).stride()
        assert got["dk"].stride() == torch.empty_like(inputs["k"]).stride()


@pytest.mark.parametrize("layout", ["bshd", "row_strided", "transposed"])
def test_layouts_of_values_of_another_dimension(backend, layout):
    inputs, do = make((2, 4, 2, 21, 30, 8, 24), FP16, backend.device, layout)
    got = compare(inputs, do, causal=True)
    if layout == "bshd":
        assert got["out"].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=[*LARGE, float32]), FP16], ids=str)
@pytest.mark.parametrize("scale", [1.0, *(pytest.param(s, marks=positive_scale) for s in (-0.5, 0.0))])
def test_scale(backend, scale, dtype):
    compare(*make((1, 2, 2, 19, 30, 16), dtype, backend.device), scale=scale, causal=True)


@float32
@pytest.mark.parametrize(
    ("S", "D", "kind", "Hkv", "causal"),
    cases(
        [(12, 8, None, 2, True), (12, 8, "scattered", 1, False)],
        cross([(130, 64)], [None, "left", "scattered"], [4, 1], [False, True]),
    ),
)
def test_against_torchs_attention(backend, S, D, kind, Hkv, causal):
    inputs, do = make((2, 4, Hkv, S, S, D), FP32, backend.device)
    mask = kind and padding(kind, 2, S, backend.device)
    allowed = None
    if mask is not None:
        mask[:, 0] = True  # torch's rows that see nothing are NaN or a uniform average
        allowed = mask[:, None, None, :].expand(2, 1, S, S)
        allowed = allowed.tril() if causal else allowed

    def stock(q, k, v):
        return F.scaled_dot_product_attention(
            q, k, v, allowed, is_causal=causal and allowed is None, scale=0.3, enable_gqa=True
        )

    compare(inputs, do, plain=stock, causal=causal, key_padding_mask=mask, scale=0.3)


@pytest.mark.parametrize(
    ("size", "causal", "dtype"),
    with_dtypes([(4.0, True), (30.0, False)], cross([(4.0,), (30.0,)], [False, True])),
)
def test_logits_whose_exponential_overflows(backend, size, causal, dtype):
    inputs, do = make((1, 2, 2, 40, 50, 32), dtype, backend.device)
    inputs |= {name: (inputs[name] * size).detach().requires_grad_() for name in ("q", "k")}
    logits = inputs["q"].detach().float() @ inputs["k"].detach().float().mT
    assert logits.max() > 88.8  # log of the largest float32
    compare(inputs, do, causal=causal, scale=1.0, large_logits=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [10.0, 60.0])
def test_logits_whose_exponential_is_zero(backend, size, dtype):
    """Rows of a log-sum-exp below log of the smallest float32 have the same softmax as others."""
    inputs, do = make((1, 2, 1, 20, 30, 8), dtype, backend.device)
    with torch.no_grad():
        inputs["q"][..., 0], inputs["k"][..., 0] = size, -size
    _, lse = flash_attention(**inputs, return_lse=True, scale=1.0)
    assert (lse < -88.8).any()
    compare(inputs, do, scale=1.0, large_logits=True, lse=dtype == FP32)


@pytest.mark.usefixtures("cpu_backend")
def test_exp2():
    """The claim in csrc/cpu/simd.h. With q = do = 1 and lse = o = 0, dv of a key is 2^k where scale is ln 2, whose
    product with log2(e) is 1; it is taken first in whole blocks of 128 keys."""

    def exp2(x):
        one, lse = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
        k = F.pad(x, (0, -len(x) % 128)).view(1, 1, -1, 1)
        arguments = (
            one,
            None,
            one,
            k,
            torch.zeros_like(k),
            torch.zeros_like(one),
            lse,
            *Arguments(*[None] * 7, math.log(2), 0.0, -1, -1, False, 0.0, None),
        )
        return torch.ops.fusetune.flash_attention_backward(*arguments, [False] * 3)[2].view(-1)[: len(x)]

    dense = torch.cat([torch.linspace(-126, 127, 2**19), torch.linspace(-1, 1, 2**19)])
    tiny = torch.logspace(-38, 0, 2**12)
    edges = torch.arange(-126.0, 127.5, 0.5)
    x = torch.cat([dense, tiny, -tiny, edges, edges.nextafter(edges + 1)[:-1], edges.nextafter(edges - 1)[1:]])
    exact = x.double().exp2()
    assert ((exp2(x) - exact) / exact).abs().max() < 1.2e-7
    assert not exp2(torch.tensor([-126.5, -127, -150, -1e10, -math.inf])).any()
    assert exp2(torch.tensor([math.nan, 0, -math.nan])).isnan().tolist() == [True, False, True]


@float32
@pytest.mark.parametrize(
    ("name", "poison"),
    cases(
        [("q", math.inf), ("v", math.nan)],
        cross([("q",), ("k",), ("v",), ("do",)], [math.nan, math.inf, -math.inf]),
    ),
)
def test_nan_and_infinity_reach_what_they_should(backend, name, poison):
    """What is not finite in plain torch must not be here, and what cannot be reached from the poisoned row must be."""
    inputs, do = make((1, 2, 1, 6, 20, 8), FP32, backend.device)
    with torch.no_grad():
        (do if name == "do" else inputs[name])[0, 0, 3, 2] = poison
    got = gradients(flash_attention, inputs, do)
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(lambda **t: F.scaled_dot_product_attention(*t.values(), enable_gqa=True), inputs, do)
    for key in expected:
        assert torch.equal(got[key].isfinite(), expected[key].isfinite()), key


@pytest.mark.parametrize(
    ("Sq", "Sk", "kind", "dtype"),
    with_dtypes(
        [(1, 1, None), (20, 13, "left"), (20, 13, "one sequence has none")],
        cross([(113, 203), (130, 64)], [None, "left", "one sequence has none"]),
    ),
)
def test_log_sum_exp(backend, Sq, Sk, kind, dtype):
    """Products of 16-bit numbers are exact in float32, so that this is as right as that of float32 tensors."""
    inputs, _ = make((2, 4, 2, Sq, Sk, 24), dtype, backend.device)
    options = {"causal": True, "key_padding_mask": kind and padding(kind, 2, Sk, backend.device), "return_lse": True}
    o, lse = flash_attention(**inputs, **options)
    _, plain = flash_attention_reference(**{name: t.float() for name, t in inputs.items()}, **options)
    _, exact = flash_attention_reference(**to_double(inputs), **options)
    empty = exact == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert_right("lse", *(t.masked_fill(empty, 0) for t in (lse, plain, exact)))
    assert torch.equal(o, flash_attention(**inputs, **options | {"return_lse": False}))


@pytest.mark.parametrize(
    ("Sq", "Sk", "D", "dropout_p", "dtype"),
    with_dtypes([(20, 13, 8, 0.0), (20, 13, 8, 0.3)], cross([(70, 130, 64), (130, 70, 40)], [0.0, 0.3])),
)
def test_gradients_through_the_log_sum_exp(backend, Sq, Sk, D, dropout_p, dtype):
    compare(*make((2, 4, 2, Sq, Sk, D), dtype, backend.device), lse=True, causal=True, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_log_sum_exp_alone(backend, dtype):
    inputs, _ = make((2, 2, 1, 20, 13, 8), dtype, backend.device)
    dlse = torch.randn(2, 2, 20, device=backend.device)

    def lse_of(function):
        return lambda **t: function(**t, causal=True, return_lse=True)[1].clamp(min=-1e30)

    got = gradients(lse_of(flash_attention), inputs, dlse)
    assert not got["dv"].any()
    inputs["v"].requires_grad_(False)
    plain, exact = (gradients(lse_of(flash_attention_reference), t, dlse) for t in (inputs, to_double(inputs)))
    for name in ("dq", "dk"):
        assert_right(name, got[name], plain[name], exact[name])


def test_gradients_of_rows_that_see_nothing_are_not_read(backend):
    inputs, do = make((1, 2, 1, 20, 13, 8), FP16, backend.device)

    def run(do, dlse):
        leaves = [t.detach().requires_grad_() for t in inputs.values()]
        o, lse = flash_attention(*leaves, causal=True, return_lse=True)
        return torch.autograd.grad([o, lse], leaves, [do, dlse])

    dlse = torch.randn(1, 2, 20, device=backend.device)
    expected = run(do, dlse)
    do[:, :, :7], dlse[:, :, :7] = math.nan, math.inf
    for name, t, other in zip("qkv", run(do, dlse), expected, strict=True):
        assert torch.equal(t, other), f"d{name}"


def test_repeats_bitwise_whatever_the_thread_count(backend, set_threads):
    check_repeats(backend, (1, 2, 1, 10, 20, 8), FP16, set_threads)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 8, 2, 70, 140, 56), BF16), ((1, 4, 2, 300, 400, 64), FP32)], ids=str)
def test_large_ones_repeat_bitwise(cpu_backend, shape, dtype, set_threads):
    check_repeats(cpu_backend, shape, dtype, set_threads)


def check_repeats(backend, shape, dtype, set_threads):
    inputs, do = make(shape, dtype, backend.device)
    mask = padding("scattered", shape[0], shape[4], backend.device)

    def run(threads):
        set_threads(threads)
        torch.manual_seed(7)
        return gradients(
            lambda **t: flash_attention(**t, causal=True, key_padding_mask=mask, dropout_p=0.2), inputs, do
        )

    first = run(1)
    for threads in (1, 2, 3, 7) if backend.name == "cpu" else (1,):
        again = run(threads)
        for name in first:
            assert torch.equal(first[name], again[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("frozen", ["q", "k v", "q k"])
def test_frozen_inputs(backend, frozen):
    inputs, do = make((1, 2, 1, 10, 20, 8), FP16, backend.device)
    expected = compare(inputs, do)
    for name in frozen.split():
        inputs[name].requires_grad_(False)
    got = gradients(flash_attention, inputs, do)
    assert len(got) == 1 + len(inputs) - len(frozen.split())
    for name in got:
        assert torch.equal(got[name], expected[name]), name
