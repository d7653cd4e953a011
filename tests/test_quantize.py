"""Quantised weights: the codes are bitsandbytes', and the values those of the reference bit for bit, at every backend.
The layer over them is in test_qlora.py."""

import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, assert_right
from torch import nn

from fusetune import backend as backends
from fusetune import ops
from fusetune.nn.quantize import (
    QuantizedLinear,
    quantizer,
)
from fusetune.ops import quantize as quantize_ops

OP = "quantize"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
FORMATS = ("nf4", "int8")

# N, K: 0, 1, primes, no whole block, K odd and no multiple of 64, and more than an item of work
SHAPES = [(0, 8), (4, 0), (1, 1), (3, 5), (1, 64), (7, 129), (64, 64), (129, 257), (40, 1000), (301, 96)]


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes, which the dev extra has, is not installed")


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def on(device, q):
    return q._replace(**{name: t.to(device) for name, t in q._asdict().items() if isinstance(t, torch.Tensor)})


def weights(N, K, dtype=FP32):
    """Rows of sizes that differ by powers of ten, a row of zeros, and values on the midpoints of NF4's codes."""
    w = torch.randn(N, K) * 10.0 ** (torch.arange(N)[:, None] % 5 - 3)
    w[1:2] = 0
    if N > 2 and K >= 17:
        table = torch.tensor(quantize_ops.NF4)
        w[2, :16] = torch.cat([(table[1:] + table[:-1]) / 2, torch.ones(1)])
    return w.to(dtype)


# The ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_references(cpu_backend, shape, dtype):
    w = weights(*shape, dtype)
    for blocksize in (32, 64, 4096):
        for double_quant in (False, True):
            options = {"double_quant": double_quant, "blocksize": blocksize}
            assert_same(ops.quantize_nf4(w, **options), ops.quantize_nf4_reference(w, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_the_references(backend, shape, dtype):
    w = weights(*shape)
    for q in (
        ops.quantize_nf4_reference(w),
        ops.quantize_nf4_reference(w, double_quant=False, blocksize=32),
        ops.quantize_nf4_reference(w, blocksize=4096),
        ops.quantize_int8(w),
    ):
        q = on(backend.device, q)
        assert_same([ops.dequantize(q, dtype)], [ops.dequantize_reference(q, dtype)])


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 1), (0, 257)), ((5, 77), (0, 257)), ((1, 33), (3, 100)), ((0, 129), (64, 128))]
)
def test_a_block_of_the_weight(backend, quantize, rows, columns):
    """K is odd, so that rows begin within a byte, and blocks of NF4 within a row."""
    q = on(backend.device, quantizer(quantize)(weights(129, 257)))
    expected = ops.dequantize_reference(q, FP32)[slice(*rows), slice(*columns)]
    assert_same([quantize_ops._dequantized_block(q, *rows, *columns, FP32)], [expected])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(cpu_backend, value):
    w = torch.randn(4, 96)
    w[1, 5] = value
    q = ops.quantize_nf4(w, double_quant=False)
    assert_same(q, ops.quantize_nf4_reference(w, double_quant=False))
    block = slice(64, 128)  # the second, that of the value
    assert q.absmax[1].isnan() if value != value else q.absmax[1] == torch.inf
    assert not ops.dequantize(q, FP32).flatten()[block].isfinite().any()
    rest = torch.ones(4 * 96, dtype=torch.bool)
    rest[block] = False
    assert ops.dequantize(q, FP32).flatten()[rest].isfinite().all()
    assert_same(ops.quantize_nf4(w), ops.quantize_nf4_reference(w))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "row_strided"])
def test_layouts_of_the_source(cpu_backend, layout):
    w = weights(33, 96)
    assert_same(ops.quantize_nf4(LAYOUTS[layout](w)), ops.quantize_nf4(w))
    assert_same(ops.quantize_int8(LAYOUTS[layout](w)), ops.quantize_int8(w))


def test_unaligned_codes(backend):
    q = on(backend.device, ops.quantize_nf4_reference(weights(33, 96)))
    q = q._replace(codes=LAYOUTS["unaligned"](q.codes))
    assert_same([ops.dequantize(q, FP16)], [ops.dequantize_reference(q, FP16)])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads, set_threads):
    w = weights(301, 257)
    expected = ops.quantize_nf4_reference(w)
    set_threads(threads)
    assert_same(ops.quantize_nf4(w), expected)
    assert_same([ops.dequantize(expected, BF16)], [ops.dequantize_reference(expected, BF16)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize", FORMATS)
def test_error_of_a_value_is_half_a_step(quantize, dtype):
    """In units of its block's largest: half the widest gap of NF4's table, or half of 1 / 127; and rounding."""
    w = weights(40, 128, dtype).float()
    block = 64 if quantize == "nf4" else 128
    largest = w.view(-1, block).abs().amax(1, keepdim=True)
    options = {"double_quant": False} if quantize == "nf4" else {}
    got = ops.dequantize(quantizer(quantize)(w.to(dtype), **options), dtype).float()
    step = max(torch.tensor(quantize_ops.NF4).diff()).item() if quantize == "nf4" else 1 / 127
    # int8 rounds to float16 first, whose least subnormal is 2^-24.
    error = (got - w).abs().view(-1, block)
    assert (error <= (step / 2 + torch.finfo(dtype).eps + 2**-10) * largest + 2**-23).all()


def test_scratch_is_shared_and_bounded(monkeypatch):
    monkeypatch.setitem(quantize_ops.SCRATCH_BYTES, "cpu", 64 * 1024)
    monkeypatch.setattr(quantize_ops, "_thread", type(quantize_ops._thread)())
    q, x, dy = ops.quantize_nf4(torch.randn(700, 96) / 10), torch.randn(5, 96), torch.randn(5, 700)
    w = ops.dequantize(q, FP32)
    y, dx = torch.ones(5, 700), torch.ones(5, 96)
    quantize_ops.accumulate(y, x, q)
    quantize_ops.accumulate_t(dx, dy, q)
    assert_right("y", y, 1 + x @ w.T, 1 + x.double() @ w.T.double())
    assert_right("dx", dx, 1 + dy @ w, 1 + dy.double() @ w.double())
    assert quantize_ops._thread.buffer.nbytes <= 64 * 1024
    buffer = quantize_ops._thread.buffer.data_ptr()
    quantize_ops.accumulate(y, x, q)
    assert quantize_ops._thread.buffer.data_ptr() == buffer


def test_scratch_of_inference_mode_serves_training(monkeypatch):
    monkeypatch.setattr(quantize_ops, "_thread", type(quantize_ops._thread)())
    monkeypatch.setenv("FUSETUNE_BACKEND", "reference")
    q, x = ops.quantize_nf4(weights(6, 96)), torch.randn(5, 96, requires_grad=True)
    with torch.inference_mode():
        ops.quantized_linear(x, q)
    ops.quantized_linear(x, q).sum().backward()
    assert x.grad.isfinite().all()


LINEAR_SHAPES = [(0, 16, 8), (6, 0, 8), (6, 16, 0), (1, 1, 1), (17, 129, 31), (33, 96, 300)]  # M, K, N


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
@pytest.mark.parametrize("quantize", FORMATS)
def test_linear(backend, quantize, shape, dtype, monkeypatch):
    monkeypatch.setitem(quantize_ops.SCRATCH_BYTES, "cpu", 64 * 1024)  # several blocks
    M, K, N = shape
    q = on(backend.device, quantizer(quantize)(torch.randn(N, K) / max(K, 1) ** 0.5))
    x = torch.randn(M, K).to(backend.device, dtype).requires_grad_()
    bias, dy = torch.randn(N).to(x), torch.randn(M, N).to(x)
    w = ops.dequantize_reference(q, FP32)
    y = ops.quantized_linear(x, q, bias)
    (dx,) = torch.autograd.grad(y, x, dy)

    def linear(dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        out = F.linear(leaf, w.to(dtype), bias.to(dtype))
        return out.detach(), *torch.autograd.grad(out, leaf, dy.to(dtype))

    for name, got, plain, exact in zip(
        ("y", "dx"), (y.detach(), dx), linear(dtype), linear(torch.float64), strict=True
    ):
        assert_right(name, got, plain, exact)


@pytest.mark.parametrize("quantize", FORMATS)
def test_ops_are_traceable(quantize):
    q = quantizer(quantize)(torch.randn(6, 70))
    parts = (*q[:3], *q.shape, q.blocksize)
    registered = torch.ops.fusetune
    torch.library.opcheck(registered.quantize_nf4.default, (torch.randn(5, 7), 64))
    torch.library.opcheck(registered.dequantize.default, (*parts, BF16))
    torch.library.opcheck(registered.quantized_linear.default, (torch.randn(3, 70), *parts, None))
    torch.library.opcheck(registered.quantized_linear.default, (torch.randn(3, 70), *parts, torch.randn(6)))
    torch.library.opcheck(registered.quantized_linear_dx.default, (torch.randn(3, 6), *parts))


def test_compiles_without_a_break():
    layer = QuantizedLinear.from_linear(nn.Linear(70, 6))
    x = torch.randn(2, 3, 70, requires_grad=True)
    compiled = torch.compile(
        lambda x: ops.quantized_linear(x, layer.quantized, layer.bias), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), layer(x))
    (dx,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(layer(x).sum(), x)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: ops.quantize_nf4(torch.zeros(2, 2).double()), TypeError, "quantize_nf4: w must be float32"),
        (
            lambda q: ops.quantize_int8(torch.zeros(2, 2, dtype=torch.int8)),
            TypeError,
            "quantize_int8: w must be float32",
        ),
        (lambda q: ops.quantize_nf4(torch.zeros(4)), ValueError, r"w must have shape \[N, K\], got \[4\]"),
        (lambda q: ops.quantize_nf4(torch.zeros(2, 2), blocksize=48), ValueError, "blocksize must be one of 32, 64"),
        (
            lambda q: ops.dequantize(q, torch.float64),
            TypeError,
            "dtype must be float32, bfloat16, float16, got float64",
        ),
        (
            lambda q: ops.dequantize(q._replace(codes=q.codes[1:]), FP32),
            ValueError,
            r"q.codes must have shape \[192, 1\]",
        ),
        (
            lambda q: ops.dequantize(q._replace(absmax=q.absmax[1:]), FP32),
            ValueError,
            r"q.absmax must have shape \[6\]",
        ),
        (lambda q: ops.dequantize(q._replace(nested=None), FP32), TypeError, "q.absmax must be float32, got uint8"),
        (
            lambda q: ops.dequantize(q._replace(nested=q.nested[1:]), FP32),
            ValueError,
            r"q.nested must have shape \[258\]",
        ),
        (lambda q: ops.dequantize(q._replace(blocksize=7), FP32), ValueError, "q.blocksize must be one of 32"),
        (lambda q: ops.quantized_linear(torch.randn(2, 95), q), ValueError, r"x must have shape \[96\], got \[95\]"),
        (lambda q: ops.quantized_linear(torch.randn(2, 96).long(), q), TypeError, "x must be float32"),
        (
            lambda q: ops.quantized_linear(torch.randn(2, 96), q, torch.randn(3)),
            ValueError,
            r"bias must have shape \[4\]",
        ),
        (lambda q: quantizer("fp4"), ValueError, "quantize: must be one of nf4, int8, got fp4"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(ops.quantize_nf4(torch.randn(4, 96)))


def test_no_backend(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, device: f"no {name}")
    with pytest.raises(NotImplementedError, match="quantize: no backend works on cpu"):
        ops.quantize_nf4(torch.randn(4, 96))


# bitsandbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape)], ids=str)
def test_codes_are_those_of_bitsandbytes(bnb, shape, dtype):
    w = weights(*shape, dtype)
    for blocksize in (32, 64, 4096):
        for double_quant in (False, True):
            codes, state = bnb.functional.quantize_4bit(
                w, quant_type="nf4", compress_statistics=double_quant, blocksize=blocksize
            )
            q = ops.quantize_nf4(w, double_quant=double_quant, blocksize=blocksize)
            assert_same(q[:2], (codes, state.absmax))
            if double_quant:
                assert_same([q.nested], [torch.cat([state.offset[None], state.state2.code, state.state2.absmax])])
            if w.numel() % 2 == 0:  # as one row: its kernel for AVX-512 is wrong where a block goes on in the next row
                state.shape = torch.Size([1, w.numel()])
            for out in DTYPES:
                state.dtype = out
                assert_same([ops.dequantize(q, out)], [bnb.functional.dequantize_4bit(codes, state).view(shape)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-39, 0.0])
def test_odd_values_have_the_codes_of_bitsandbytes(bnb, value):
    w = torch.randn(5, 70)
    w[1:] *= value
    for double_quant in (False, True):
        codes, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
        assert_same(ops.quantize_nf4(w, double_quant=double_quant)[:2], (codes, state.absmax))


def test_scales_have_the_codes_of_bitsandbytes(bnb):
    """For scales of every size, and an odd number of them."""
    for seed in range(50):
        torch.manual_seed(seed)
        absmax = torch.rand(256 * 3 + 17) * 10.0 ** (seed % 7 - 3)
        codes, state = bnb.functional.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
        got, nested = quantize_ops._quantize_absmax(absmax)
        assert_same((got, nested[1:257], nested[257:]), (codes, state.code, state.absmax))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_that_of_bitsandbytes(bnb, dtype):
    w = weights(129, 257, dtype)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(w.half())
    q = ops.quantize_int8(w)
    assert_same(q[:2], (codes, scales))
    assert_same([ops.dequantize(q, FP32)], [bnb.functional.int8_vectorwise_dequant(codes, scales)])
