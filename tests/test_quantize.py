"""Quantised weights: the codes are bitsandbytes', the values those of the reference bit for bit, at every backend; and the
layer over them, its checkpoints, PEFT around it, and `fusetune finetune --quantize`."""

import copy
import importlib.util
import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, assert_right
from safetensors.torch import load_file, save_file
from torch import nn

from fusetune import backend as backends
from fusetune import ops
from fusetune.finetune import UserError, main
from fusetune.nn.quantize import (
    QuantizedLinear,
    dequantize_linears,
    quantize_linears,
    quantized_size,
    quantized_weight,
    quantizer,
)
from fusetune.ops import quantize as quantize_ops

OP = "quantize"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
FORMATS = ("nf4", "int8")

# N, K: 0, 1, primes, no whole block, K odd and no multiple of 64, and more than an item of work
SHAPES = [(0, 8), (4, 0), (1, 1), (3, 5), (1, 64), (7, 129), (64, 64), (129, 257), (40, 1000), (301, 96)]

needs_bitsandbytes = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes, which the dev extra has, is not installed"
)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes, which the dev extra has, is not installed")


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def weights(N, K, dtype=FP32):
    """Rows of sizes that differ by powers of ten, a row of zeros, and values that lie on the midpoints of NF4's codes."""
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
        q = q._replace(**{name: t.to(backend.device) for name, t in q._asdict().items() if isinstance(t, torch.Tensor)})
        assert_same([ops.dequantize(q, dtype)], [ops.dequantize_reference(q, dtype)])


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [((0, 1), (0, 257)), ((5, 77), (0, 257)), ((1, 33), (3, 100)), ((0, 129), (64, 128))])
def test_a_block_of_the_weight(backend, quantize, rows, columns):
    """K is odd, so that rows begin within a byte, and blocks of NF4 within a row."""
    q = quantizer(quantize)(weights(129, 257))
    q = q._replace(**{name: t.to(backend.device) for name, t in q._asdict().items() if isinstance(t, torch.Tensor)})
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
    q = ops.quantize_nf4_reference(weights(33, 96))
    q = q._replace(codes=LAYOUTS["unaligned"](q.codes.to(backend.device)), absmax=q.absmax.to(backend.device), nested=q.nested.to(backend.device))
    assert_same([ops.dequantize(q, FP16)], [ops.dequantize_reference(q, FP16)])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads, set_threads):
    w = weights(301, 257)
    one, q = ops.dequantize_reference(ops.quantize_nf4_reference(w), BF16), None
    set_threads(threads)
    q = ops.quantize_nf4(w)
    assert_same([ops.dequantize(q, BF16)], [one])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize", FORMATS)
def test_error_of_a_value_is_half_a_step(quantize, dtype):
    """In units of its block's largest: half the widest gap of NF4's table, or half of 1 / 127; and rounding to dtype."""
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
    q, x = ops.quantize_nf4(weights(700, 96)), torch.randn(5, 96)
    y, expected = torch.ones(5, 700), 1 + x @ ops.dequantize(q, FP32).T
    quantize_ops.accumulate(y, x, q)
    dx = torch.ones(5, 96)
    quantize_ops.accumulate_t(dx, y, q)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, 1 + y @ ops.dequantize(q, FP32))
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
    q = quantizer(quantize)(torch.randn(N, K) / max(K, 1) ** 0.5)
    q = q._replace(**{name: t.to(backend.device) for name, t in q._asdict().items() if isinstance(t, torch.Tensor)})
    x = torch.randn(M, K).to(backend.device, dtype).requires_grad_()
    bias, dy = torch.randn(N).to(x), torch.randn(M, N).to(x)
    w = ops.dequantize_reference(q, FP32)
    y = ops.quantized_linear(x, q, bias)
    (dx,) = torch.autograd.grad(y, x, dy)

    def linear(dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        out = F.linear(leaf, w.to(dtype), bias.to(dtype))
        return out.detach(), *torch.autograd.grad(out, leaf, dy.to(dtype))

    for name, got, plain, exact in zip(("y", "dx"), (y.detach(), dx), linear(dtype), linear(torch.float64), strict=True):
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
    compiled = torch.compile(lambda x: ops.quantized_linear(x, layer.quantized, layer.bias), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (dx,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(layer(x).sum(), x)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: ops.quantize_nf4(torch.zeros(2, 2).double()), TypeError, "quantize_nf4: w must be float32"),
        (lambda q: ops.quantize_int8(torch.zeros(2, 2, dtype=torch.int8)), TypeError, "quantize_int8: w must be float32"),
        (lambda q: ops.quantize_nf4(torch.zeros(4)), ValueError, r"w must have shape \[N, K\], got \[4\]"),
        (lambda q: ops.quantize_nf4(torch.zeros(2, 2), blocksize=48), ValueError, "blocksize must be one of 32, 64"),
        (lambda q: ops.dequantize(q, torch.float64), TypeError, "dtype must be float32, bfloat16, float16, got float64"),
        (lambda q: ops.dequantize(q._replace(codes=q.codes[1:]), FP32), ValueError, r"q.codes must have shape \[192, 1\]"),
        (lambda q: ops.dequantize(q._replace(absmax=q.absmax[1:]), FP32), ValueError, r"q.absmax must have shape \[6\]"),
        (lambda q: ops.dequantize(q._replace(nested=None), FP32), TypeError, "q.absmax must be float32, got uint8"),
        (lambda q: ops.dequantize(q._replace(nested=q.nested[1:]), FP32), ValueError, r"q.nested must have shape \[258\]"),
        (lambda q: ops.dequantize(q._replace(blocksize=7), FP32), ValueError, "q.blocksize must be one of 32"),
        (lambda q: ops.quantized_linear(torch.randn(2, 95), q), ValueError, r"x must have shape \[96\], got \[95\]"),
        (lambda q: ops.quantized_linear(torch.randn(2, 96).long(), q), TypeError, "x must be float32"),
        (lambda q: ops.quantized_linear(torch.randn(2, 96), q, torch.randn(3)), ValueError, r"bias must have shape \[4\]"),
        (lambda q: quantizer("fp4"), ValueError, "quantize: must be one of nf4, int8, got fp4"),
    ],
)  # fmt: skip
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


def bnb_layer(bnb, quantize, linear):
    """bitsandbytes' layer with the weight of `linear`."""
    K, N = linear.in_features, linear.out_features
    if quantize == "nf4":
        layer = bnb.nn.Linear4bit(K, N, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.load_state_dict(copy.deepcopy(linear.state_dict()))
    return layer.to("cpu")


@pytest.mark.parametrize("quantize", FORMATS)
def test_checkpoint_of_bitsandbytes_loads_here(bnb, quantize, tmp_path):
    theirs = bnb_layer(bnb, quantize, nn.Linear(96, 40))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    for start in FORMATS:  # of the layer that loads
        ours = QuantizedLinear(96, 40, quantize=start)
        ours.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
        assert ours.quantize == quantize
        assert_same(ours.quantized, quantized_weight(theirs))
        again = ours.state_dict()
        assert again.keys() == theirs.state_dict().keys()
        for key, tensor in theirs.state_dict().items():
            assert_same([again[key]], [tensor])


@pytest.mark.parametrize("quantize", FORMATS)
def test_checkpoint_of_ours_loads_in_bitsandbytes(bnb, quantize, tmp_path):
    linear = nn.Linear(96, 40)
    ours = QuantizedLinear.from_linear(linear, quantize)
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    saved = load_file(tmp_path / "ours.safetensors")
    if quantize == "nf4":
        theirs = bnb.nn.Linear4bit(96, 40, quant_type="nf4")
        stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
        theirs.weight = bnb.nn.Params4bit.from_prequantized(saved["weight"], stats, device="cpu", module=theirs)
        theirs.bias.data = saved["bias"]
        x = torch.randn(3, 96)
        torch.testing.assert_close(theirs(x), ours(x))
    else:
        theirs = bnb_layer(bnb, quantize, nn.Linear(96, 40))
        theirs.load_state_dict(saved)
    assert_same(quantized_weight(theirs), ours.quantized)


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_layer_of_bitsandbytes_is_seen_without_a_copy(bnb, quantize):
    theirs = bnb_layer(bnb, quantize, nn.Linear(96, 40))
    q = quantized_weight(theirs)
    assert q.codes.data_ptr() == theirs.weight.data_ptr()
    assert_same(q, quantizer(quantize)(nn.Linear(96, 40).weight.new_zeros(0, 0)) if False else quantized_weight(theirs))
    x = torch.randn(5, 96)
    if quantize == "nf4":
        torch.testing.assert_close(ops.quantized_linear(x, q, theirs.bias), theirs(x))
        assert quantized_weight(theirs).nested is q.nested  # made once
    else:
        theirs(x)  # moves the codes and the scales
        assert_same(quantized_weight(theirs), q)


def test_what_of_bitsandbytes_is_not_seen(bnb):
    fp4 = bnb.nn.Linear4bit(64, 8).to("cpu")
    with pytest.raises(NotImplementedError, match="its weight is in fp4, not NF4"):
        quantized_weight(fp4)
    with pytest.raises(NotImplementedError, match="not quantised yet"):
        quantized_weight(bnb.nn.Linear4bit(64, 8))
    with pytest.raises(NotImplementedError, match="not quantised"):
        quantized_weight(bnb.nn.Linear8bitLt(64, 8))
    with pytest.raises(RuntimeError, match="weight: the format must be nf4, got fp4"):
        QuantizedLinear(64, 8).load_state_dict(fp4.state_dict())
    assert quantized_weight(nn.Linear(4, 4)) is None


def test_without_double_quantisation_and_stored_as_another_dtype(bnb):
    theirs = bnb.nn.Linear4bit(96, 40, quant_type="nf4", compress_statistics=False, quant_storage=BF16).to("cpu")
    ours = QuantizedLinear(96, 40)
    ours.load_state_dict(theirs.state_dict())
    assert ours.quantized.nested is None
    x = torch.randn(5, 96)
    torch.testing.assert_close(ours(x), theirs(x))


# The layer


@pytest.mark.parametrize("quantize", FORMATS)
def test_layer_reads_and_writes_its_weight(quantize):
    linear = nn.Linear(96, 40).requires_grad_(False)
    layer = QuantizedLinear.from_linear(linear, quantize)
    before = layer.weight.data.clone()
    assert_same([before], [ops.dequantize(quantizer(quantize)(linear.weight), FP32)])
    delta = torch.randn(40, 96)
    layer.weight.data += delta
    assert_same(layer.quantized, quantizer(quantize)(before + delta))
    for change in (lambda: layer.weight.add_(1), lambda: layer.weight.copy_(delta), lambda: layer.weight.__setitem__(0, 1)):
        with pytest.raises(NotImplementedError, match="must be changed by assignment to weight.data"):
            change()
    with pytest.raises(ValueError, match=r"weight must have shape \[40, 96\], got \[96, 40\]"):
        layer.weight.data = delta.T


@pytest.mark.parametrize("quantize", FORMATS)
def test_layer_keeps_its_scales_when_it_is_cast(quantize):
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40), quantize)
    before = copy.deepcopy(layer).quantized
    layer.to(BF16)
    assert layer.bias.dtype == BF16
    assert_same(layer.quantized, before)
    assert layer(torch.randn(3, 96, dtype=BF16)).dtype == BF16


@pytest.mark.parametrize("quantize", FORMATS)
def test_layer_under_autocast(quantize):
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40), quantize)
    with torch.autocast("cpu", BF16):
        y = layer(torch.randn(3, 96, requires_grad=True))
    assert y.dtype == BF16
    y.float().sum().backward()


def test_layer_loads_a_float_weight_and_says_what_is_wrong():
    linear, layer = nn.Linear(96, 40), QuantizedLinear(96, 40)
    layer.load_state_dict(linear.state_dict())
    assert_same(layer.quantized, ops.quantize_nf4(linear.weight))
    good = layer.state_dict()
    for broken, message in (
        ({key: value for key, value in good.items() if key != "weight"}, "Missing key.*weight"),
        (good | {"other": torch.zeros(1)}, "Unexpected key.*other"),
        ({key: value for key, value in good.items() if "quant_state" not in key}, "one weight.quant_state must come"),
        ({key: value for key, value in good.items() if key != "weight.absmax"}, "weight.absmax must come with the codes"),
        (good | {"weight.quant_map": torch.linspace(-1, 1, 16)}, "must be that of NF4"),
        (good | {"weight": good["weight"][1:]}, "codes must have shape"),
        (QuantizedLinear(40, 96).state_dict() | {"bias": good["bias"]}, r"must have shape \[40, 96\], got \[96, 40\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            QuantizedLinear(96, 40).load_state_dict(broken)


@pytest.mark.parametrize("quantize", FORMATS)
def test_nothing_is_saved_for_backward_but_the_codes(quantize):
    layer, saved = QuantizedLinear.from_linear(nn.Linear(96, 40), quantize), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(torch.randn(300, 96, requires_grad=True))
    kept = {t.data_ptr() for t in layer.quantized[:3] if t is not None}
    assert {t.data_ptr() for t in saved} == kept


def quantized_bert(quantize):
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny.bert_config(hidden_size=128, intermediate_size=512))
    quantize_linears(model.bert, quantize)
    return model


def test_memory_of_nf4():
    """Parameters and buffers of the linear layers, of which a bfloat16 weight has 2 bytes an element."""
    model = quantized_bert("nf4")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    held = sum(t.nbytes for layer in layers for t in layer.buffers())
    elements = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 13
    assert quantized_size(model) == (13, elements, 4 * elements, held)
    assert held <= 0.30 * 2 * elements


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_step_of_qlora_is_that_of_the_dequantised_model(quantize):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    plain = quantized_bert(quantize)
    quantized = copy.deepcopy(plain)
    dequantize_linears(plain)
    found = []
    for model in (quantized, plain):
        torch.manual_seed(1)
        model = get_peft_model(model.eval(), config)
        tokens = torch.arange(12).view(2, 6) + 4
        loss = model(input_ids=tokens, labels=torch.tensor([0, 1])).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_into_the_quantised_weight(quantize, options, safe):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options)
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(QuantizedLinear.from_linear(nn.Linear(96, 40), quantize)), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(0.1) if "magnitude" not in name else None
    before = layer.base_layer.weight.data.clone()
    x = torch.randn(3, 96)
    expected = model(x)
    delta = layer.get_delta_weight("default")
    w = before + delta
    if options:
        norm = torch.linalg.norm(w, dim=1)
        w = (layer.lora_magnitude_vector["default"].weight / norm)[:, None] * w
    layer.merge(safe_merge=safe)
    torch.testing.assert_close(layer.base_layer.weight.data, ops.dequantize(quantizer(quantize)(w.detach()), FP32))
    assert layer.merged
    error = (model(x) - expected).abs().max()
    assert error <= 0.15 * expected.abs().max()  # requantised
    if not options:
        layer.unmerge()
        torch.testing.assert_close(
            layer.base_layer.weight.data,
            ops.dequantize(quantizer(quantize)(ops.dequantize(quantizer(quantize)(w), FP32) - delta), FP32),
        )
    assert isinstance(model.merge_and_unload()[0], QuantizedLinear)


def test_which_layers_are_quantised():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"c": nn.Linear(8, 8)}), "head": nn.Linear(8, 8)})
    model["tied"], model["embedding"] = shared, nn.Embedding(8, 8)
    model["embedding"].weight = shared.weight
    model["attention"] = nn.MultiheadAttention(8, 2)  # its projection is a subclass of nn.Linear
    quantize_linears(model, "nf4", skip=[model["head"]])
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == {"a", "b.c"}
    dequantize_linears(model)
    assert not quantized_size(model).layers
    assert type(model["b"]["c"]) is nn.Linear


# fusetune finetune --quantize


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    return {
        "bert": tiny.save_bert(folder / "bert"),
        "llama": tiny.save_llama(folder / "llama", tie_word_embeddings=True),
        "table": tiny.write_csv(folder / "table.csv", tiny.sentences(120)),
    }


def job(data, output, **changes):
    return {
        "model": str(data["bert"]), "dataset": str(data["table"]), "output_dir": str(output), "method": "lora",
        "lr": 2e-2, "batch_size": 12, "epochs": 2, "lora_r": 4,
    } | changes  # fmt: skip


@pytest.mark.parametrize("quantize", FORMATS)
def test_finetune_predict_and_merge(data, tmp_path, quantize, capsys):
    from transformers import AutoModelForSequenceClassification

    from fusetune.train.predict import load_trained, merge, predict

    result = main(**job(data, tmp_path / "out", quantize=quantize))
    assert f"quantized 13 linear layers to {quantize}" in capsys.readouterr().out
    assert result["train_step_loss"][-1] < result["train_step_loss"][0]
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())["quantized"]
    assert saved == result["quantized"]
    assert saved["layers"] == 13
    assert saved["bytes_now"] < saved["bytes_before"] / 2
    names = set(load_file(tmp_path / "out" / "model" / "adapter_model.safetensors"))
    assert names
    assert all("lora_" in name or "classifier" in name for name in names)

    texts = [text for text, _ in tiny.sentences(5, seed=3)]
    trained, tokenizer = load_trained(tmp_path / "out")
    assert quantized_size(trained).layers == 13
    merge(tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not quantized_size(merged).layers
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, trained(**inputs).logits, rtol=1e-4, atol=1e-5)
    labels = [prediction.label for prediction in predict(tmp_path / "out", texts)]
    assert labels == [prediction.label for prediction in predict(tmp_path / "merged", texts)]


def test_resumed_run_equals_a_straight_one(data, tmp_path):
    straight = main(**job(data, tmp_path / "straight", quantize="nf4"))
    main(**job(data, tmp_path / "parts", quantize="nf4", max_steps=9, save_steps=9))
    with pytest.raises(UserError, match="quantize must be 'nf4', as in the run to resume, got None"):
        main(**job(data, tmp_path / "parts", resume=True))
    resumed = main(**job(data, tmp_path / "parts", quantize="nf4", resume=True))
    assert resumed["train_step_loss"] == straight["train_step_loss"]


def test_causal_lm_keeps_its_head(data, tmp_path):
    from fusetune.train.predict import generate, load_trained

    main(**job(data, tmp_path / "out", model=str(data["llama"]), task="causal-lm", quantize="nf4", max_length=16, max_steps=2))
    model, _ = load_trained(tmp_path / "out")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "lm_head" in name}
    assert set(kinds.values()) == {"Linear"}
    assert quantized_size(model).layers == 14
    assert list(generate(tmp_path / "out", ["the cat"], 4))
    model, _ = load_trained(next((tmp_path / "out").glob("checkpoint-*")))
    assert quantized_size(model).layers == 14


@pytest.mark.parametrize("method", ["full", "head"])
def test_only_frozen_weights_are_quantised(data, tmp_path, method):
    with pytest.raises(UserError, match=f"method must be lora with quantize nf4.*got {method}"):
        main(**job(data, tmp_path / "out", quantize="nf4", method=method))


def test_a_checkpoint_that_is_quantised_already(data, tmp_path, monkeypatch):
    folder = tiny.save_bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantize must be none.*quantized by bitsandbytes already"):
        main(**job(data, tmp_path / "out", model=str(folder), quantize="nf4"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find_spec(name, *a))
    with pytest.raises(UserError, match="quantized by bitsandbytes, which must be installed; `pip install bitsandbytes`"):
        main(**job(data, tmp_path / "out", model=str(folder)))
