"""lora_linear at every backend: the oracle is its reference in float64, the yardstick the same in low precision."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, assert_right, gradients, to_double
from torch.utils.checkpoint import checkpoint

from fusetune.ops import lora_linear, lora_linear_reference
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale

OP = "lora"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# M, K, N, R: 0, 1, primes, and either side of the kernels' blocks of 48 and 192 rows, 128 and 256 columns
SMALL = [(1, 1, 1, 1), (5, 3, 7, 2), (17, 37, 29, 8)]
EMPTY = [(0, 16, 8, 4), (6, 0, 8, 4), (6, 16, 0, 4), (6, 16, 8, 0)]
AWKWARD = [
    (47, 129, 255, 7),
    (48, 128, 256, 16),
    (49, 257, 127, 17),
    (97, 256, 131, 31),
    (193, 64, 300, 33),
    (400, 61, 24, 70),
    (50, 70, 90, 512),
]
SHAPES = [*SMALL, *EMPTY, *(pytest.param(shape, marks=pytest.mark.large) for shape in AWKWARD)]
DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]  # of x and of the adapter


def shape_id(value):
    if isinstance(value, tuple):
        return "x".join(str(size).removeprefix("torch.") for size in value)
    return None


def make(shape, dtype=FP32, adapter=None, device="cpu", bias=True, layout=None, lead=None):
    """Inputs of a layer: rows of x, w and of the adapter have length about 1."""
    M, K, N, R = shape
    inputs = {
        "x": torch.randn(*(lead or (M,)), K),
        "w": torch.randn(N, K) / max(K, 1) ** 0.5,
        "a": torch.randn(R, K) / max(K, 1) ** 0.5,
        "b": torch.randn(N, R) / max(R, 1) ** 0.5,
    }
    if bias:
        inputs["bias"] = torch.randn(N)
    dtypes = {"a": adapter or dtype, "b": adapter or dtype}
    inputs = {name: t.to(device, dtypes.get(name, dtype)) for name, t in inputs.items()}
    if layout:
        inputs = {name: LAYOUTS[layout](t) if t.dim() > 1 or layout == "unaligned" else t for name, t in inputs.items()}
    return {name: t.requires_grad_(name != "w") for name, t in inputs.items()}


def compare(inputs, scale=0.5, dropout_p=0.0, layout=None):
    """Judges lora_linear's result and gradients; gives them."""
    dy = torch.randn(*inputs["x"].shape[:-1], inputs["w"].shape[0], device=inputs["x"].device, dtype=inputs["x"].dtype)
    dy = LAYOUTS[layout](dy) if layout else dy
    return oracle.compare(lora_linear, lora_linear_reference, inputs, dy, scale=scale, dropout_p=dropout_p)


@pytest.mark.parametrize("dtypes", DTYPES, ids=shape_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes_and_dtypes(backend, shape, dtypes):
    compare(make(shape, *dtypes, device=backend.device))


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 5), (2, 0), (2, 3, 2)], ids=str)
def test_leading_dimensions(backend, lead):
    inputs = make((0, 19, 23, 4), lead=lead or (), device=backend.device)
    if not lead:
        inputs["x"] = torch.randn(19, device=backend.device, requires_grad=True)
    got = compare(inputs)
    assert got["out"].shape == (*lead, 23)
    assert got["dx"].shape == inputs["x"].shape


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=shape_id)
@pytest.mark.parametrize("shape", [(19, 37, 29, 5), (19, 40, 32, 8)], ids=shape_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, shape, dtype, dropout_p):
    """Of rows that are no multiple of 16 bytes, and of rows that are."""
    compare(make(shape, dtype, FP32, backend.device, layout=layout), dropout_p=dropout_p, layout=layout)


def test_x_in_three_dimensions_that_no_view_flattens(backend):
    inputs = make((0, 19, 23, 4), lead=(4, 3), device=backend.device)
    inputs["x"] = torch.randn(3, 4, 19, device=backend.device).transpose(0, 1).requires_grad_()
    compare(inputs)


def test_rows_that_need_64_bit_indices(backend):
    """Of 4 GiB of float16 that are reserved on a CPU and never touched, but for the rows of x and dy."""
    step = 2**30 + 8
    memory = torch.empty(2 * step + 128, dtype=FP16, device=backend.device)
    x, dy = memory.as_strided((3, 37), (step, 1)), memory.as_strided((3, 29), (step, 1), 64)
    inputs = make((3, 37, 29, 5), FP16, FP32, backend.device)
    inputs["w"] = torch.zeros_like(inputs["w"])  # no product of torch's
    x.copy_(inputs["x"].detach())
    dy.copy_(torch.randn(3, 29))
    far = {**inputs, "x": x.requires_grad_()}

    def run(inputs, dy):
        torch.manual_seed(7)
        return gradients(lambda **t: lora_linear(**t, scale=0.5, dropout_p=0.25), inputs, dy)

    assert_same(run(inputs, dy.contiguous()), run(far, dy))


@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
def test_bias(backend, bias):
    inputs = make((17, 19, 23, 4), device=backend.device, bias=bias != "none")
    if bias == "frozen":
        inputs["bias"].requires_grad_(False)
    assert ("dbias" in compare(inputs)) == (bias == "trained")


@pytest.mark.parametrize("frozen", ["x", "a", "b", "x a", "x b", "a b bias", "x a bias", "x bias"])
def test_frozen_inputs(backend, frozen):
    inputs = make((70, 19, 23, 4), device=backend.device)
    for name in frozen.split():
        inputs[name].requires_grad_(False)
    got = compare(inputs, dropout_p=0.3)
    assert sorted(got) == sorted(["out", *(f"d{name}" for name, t in inputs.items() if t.requires_grad)])


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5, 64.0])
def test_scale(backend, scale):
    compare(make((17, 19, 23, 4), FP16, FP32, backend.device), scale=scale)


@pytest.mark.parametrize("dtypes", DTYPES, ids=shape_id)
@pytest.mark.parametrize("shape", [(17, 37, 29, 8), pytest.param((100, 300, 70, 16), marks=pytest.mark.large)])
@pytest.mark.parametrize("dropout_p", [1e-6, 0.1, 0.5, 1.0])
def test_dropout_follows_the_reference(backend, dropout_p, shape, dtypes):
    got = compare(make(shape, *dtypes, device=backend.device), dropout_p=dropout_p)
    if dropout_p == 1:
        assert not got["da"].any()
        assert not got["db"].any()


@pytest.mark.parametrize("size", [40, pytest.param(300, marks=pytest.mark.large)])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_mask_bit_for_bit(backend, size, dropout_p):
    """With w = 0 and a = b = 1 the layer is its dropout mask, and so is its dx."""
    eye = torch.eye(size, device=backend.device)
    x = torch.ones(77, size, device=backend.device, requires_grad=True)
    torch.manual_seed(5)
    y = lora_linear(x, torch.zeros_like(eye), eye, eye, 1.0, dropout_p=dropout_p)
    torch.manual_seed(5)
    seed = int(draw_seed(x.device))
    mask = keep_mask(seed, torch.arange(77, device=x.device), size, dropout_p) * kept_scale(dropout_p)
    assert torch.equal(y, mask.float())
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], mask.float())


def adapter_only(shape, dtype, device, dropout_p=0.2):
    """Result and gradients where w = 0, so that no product of torch's is in them."""
    inputs = make(shape, dtype, FP32, device)
    inputs["w"] = torch.zeros_like(inputs["w"])
    dy = torch.randn(shape[0], shape[2], device=device)
    torch.manual_seed(7)
    return lambda: gradients(lambda **t: lora_linear(**t, scale=0.5, dropout_p=dropout_p), inputs, dy)


def assert_same(first, second):
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=shape_id)
@pytest.mark.parametrize("shape", [(17, 37, 29, 8), pytest.param((500, 300, 270, 16), marks=pytest.mark.large)])
def test_repeats_bitwise(backend, shape, dtype):
    run = adapter_only(shape, dtype, backend.device)
    first = run()
    for _ in range(5):
        torch.manual_seed(7)
        assert_same(first, run())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=shape_id)
@pytest.mark.parametrize("shape", [(500, 300, 270, 16), (49, 1000, 1000, 3)], ids=shape_id)
def test_result_does_not_depend_on_the_thread_count(cpu_backend, shape, dtype, set_threads):
    run = adapter_only(shape, dtype, cpu_backend.device)
    set_threads(1)
    first = run()
    for threads in (2, 3, 7):
        set_threads(threads)
        torch.manual_seed(7)
        assert_same(first, run())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["x", "w", "a", "b", "bias", "dy"])
def test_nan_and_infinity_reach_what_they_should(backend, name, poison):
    """And nothing else: in the last of 300 rows, of which CUDA's kernels make two parts."""
    inputs = make((300, 19, 23, 3), device=backend.device)
    dy = torch.randn(300, 23, device=backend.device)
    with torch.no_grad():
        (dy if name == "dy" else inputs[name]).view(-1)[-5] = poison
    got = gradients(lambda **t: lora_linear(**t, scale=0.5), inputs, dy)
    expected = gradients(lambda **t: lora_linear_reference(**t, scale=0.5), inputs, dy)
    for key in expected:
        assert torch.equal(got[key].isfinite(), expected[key].isfinite()), key
        assert torch.equal(got[key].isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=shape_id)
@pytest.mark.parametrize("shape", [(17, 37, 29, 8), pytest.param((97, 256, 131, 16), marks=pytest.mark.large)])
def test_against_pefts_layer(backend, shape, dtypes, bias):
    peft = pytest.importorskip("peft")
    dtype, adapter = dtypes
    M, K, N, R = shape
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(K, N, bias=bias, dtype=dtype)),
        peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"], init_lora_weights=False),
        autocast_adapter_dtype=adapter != dtype,
    ).to(backend.device)
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == adapter
    x, dy = (torch.randn(M, size).to(backend.device, dtype) for size in (K, N))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    parameters = {"w": layer.base_layer.weight, "a": a, "b": b}
    if bias:
        parameters["bias"] = layer.base_layer.bias
    inputs = {"x": x.requires_grad_(), **{name: p.detach() for name, p in parameters.items()}}
    for name in ("a", "b"):
        inputs[name].requires_grad_()

    got = gradients(lambda **t: lora_linear(**t, scale=layer.scaling["default"]), inputs, dy)
    exact = gradients(lambda **t: lora_linear_reference(**t, scale=2.0), to_double(inputs), dy)
    y = layer(x)
    plain = {"out": y, **dict(zip(["dx", "da", "db"], torch.autograd.grad(y, [x, a, b], dy), strict=True))}
    for name in exact:
        assert_right(name, got[name], plain[name], exact[name])


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_saves_x_by_reference_and_one_product(device, dropout_p):
    inputs = make((64, 48, 40, 4), BF16, FP32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(**inputs, scale=1.0, dropout_p=dropout_p)
    own = {t.data_ptr() for t in inputs.values()}
    assert inputs["x"].data_ptr() in {t.data_ptr() for t in saved}
    extra = [(list(t.shape), t.dtype) for t in saved if t.data_ptr() not in own]
    assert extra == [([64, 4], torch.float32), *([([1], torch.int64)] if dropout_p else [])]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_replays_dropout(device, use_reentrant):
    inputs = make((30, 19, 23, 4), device=device)

    def layer(*tensors):
        return lora_linear(*tensors[:4], 0.5, tensors[4], dropout_p=0.4)

    def backward(function, *extra, **options):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs.values()]
        torch.manual_seed(7)
        y = function(*extra, *leaves, **options)
        y.square().sum().backward()  # reentrant checkpoints know only this form
        return {"y": y, **{name: leaf.grad for name, leaf in zip(inputs, leaves, strict=True) if name != "w"}}

    assert_same(backward(layer), backward(checkpoint, layer, use_reentrant=use_reentrant))


@pytest.mark.parametrize("adapter", [FP32, BF16], ids=shape_id)
def test_autocast(device, adapter):
    inputs = make((30, 19, 23, 4), FP32, adapter if adapter == FP32 else None, device)
    if adapter == BF16:
        inputs |= {name: inputs[name].detach().bfloat16().requires_grad_() for name in ("a", "b")}
    dy = torch.randn(30, 23, device=device, dtype=BF16)
    with torch.autocast(device.type, BF16):
        got = gradients(lambda **t: lora_linear(**t, scale=0.5), inputs, dy)
    assert got.pop("out").dtype == BF16
    assert {name: g.dtype for name, g in got.items()} == {f"d{n}": t.dtype for n, t in inputs.items() if n != "w"}
    low = {n: t.detach().to(t.dtype if n in ("a", "b") else BF16).requires_grad_(n != "w") for n, t in inputs.items()}
    expected = gradients(lambda **t: lora_linear(**t, scale=0.5, compute="fast"), low, dy)
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name].to(gradient.dtype)), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32)], ids=shape_id)
def test_opcheck(device, dtypes, dropout_p):
    x, w, a, b, bias = (t.detach() for t in make((9, 19, 23, 4), *dtypes, device).values())
    seed = draw_seed(device) if dropout_p else None
    ops = torch.ops.fusetune
    options = [23, 0], [1], [0.5], [dropout_p], seed, False
    torch.library.opcheck(ops.lora_forward.default, (x, [w, None, None], [bias], [a], [b], *options))
    torch.library.opcheck(ops.lora_forward.default, (x, [w, None, None], [None], [a], [b], *options))
    dy, s = torch.randn(9, 23, device=device, dtype=x.dtype), torch.randn(9, 4, device=device)
    for needs in ((True, [True], [True]), (False, [True], [False])):
        torch.library.opcheck(ops.lora_backward.default, (x, [dy], [w, None, None], [a], [b], s, *options, *needs))


def test_compiles_without_a_graph_break(device):
    inputs = make((0, 19, 23, 4), lead=(3, 5), device=device)
    inputs.pop("bias")  # its gradient is a sum of the compiler's, in an order of its own

    def layer(**tensors):
        return lora_linear(**tensors, scale=0.5)

    assert_same(gradients(layer, inputs), gradients(torch.compile(layer, fullgraph=True), inputs))


def test_compiled_backward_has_the_mask_of_forward(device):
    eye = torch.eye(40, device=device)
    x = torch.ones(30, 40, device=device, requires_grad=True)
    compiled = torch.compile(lora_linear, fullgraph=True)
    w, a, b = torch.zeros_like(eye), eye, eye.clone()
    y = compiled(x, w, a, b, 1.0, dropout_p=0.5)
    assert 0.3 < (y == 0).float().mean() < 0.7
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert not torch.equal(compiled(x, w, a, b, 1.0, dropout_p=0.5), y)


def test_under_no_grad_and_inference_mode(device):
    inputs = make((9, 19, 23, 4), device=device)
    expected = lora_linear(**inputs, scale=0.5).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = lora_linear(**inputs, scale=0.5)
        assert not y.requires_grad
        assert torch.equal(y, expected)


def test_second_derivative_raises(device):
    inputs = make((9, 19, 23, 4), device=device)
    y = lora_linear(**inputs, scale=0.5)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_backend_is_the_reference(device, dropout_p, monkeypatch):
    monkeypatch.setenv("FUSETUNE_BACKEND", "reference")
    inputs = make((9, 19, 23, 4), device=device)
    torch.manual_seed(7)
    got = gradients(lambda **t: lora_linear(**t, scale=0.5, dropout_p=dropout_p), inputs)
    torch.manual_seed(7)
    seed = int(draw_seed(device))
    assert_same(
        got, gradients(lambda **t: lora_linear_reference(**t, scale=0.5, dropout_p=dropout_p, seed=seed), inputs)
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradients(dropout_p):
    x, w, a, b, bias = to_double(make((5, 4, 3, 2))).values()
    w.requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: lora_linear_reference(x, w, a, b, 0.5, bias, dropout_p, seed=3), (x, a, b, bias)
    )


def test_reference_is_a_linear_layer_with_merged_weight():
    x, w, a, b, bias = to_double(make((5, 4, 3, 2))).values()
    torch.testing.assert_close(lora_linear_reference(x, w, a, b, 0.5, bias), F.linear(x, w + 0.5 * b @ a, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(9, 19).double()}, TypeError, "x must be float32, bfloat16, float16, got float64"),
        ({"w": torch.randn(23, 19, dtype=BF16)}, TypeError, "w must be float32, got bfloat16"),
        ({"a": torch.randn(4, 19, dtype=FP16)}, TypeError, "a must be float32, got float16"),
        ({"b": torch.randn(23, 4, dtype=FP16)}, TypeError, "b must be float32, got float16"),
        ({"bias": torch.randn(23, dtype=FP16)}, TypeError, "bias must be float32, got float16"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least 1 dimension, got 0"),
        ({"w": torch.randn(23, 18)}, ValueError, r"w must have shape \[N, 19\], got \[23, 18\]"),
        ({"a": torch.randn(4, 18)}, ValueError, r"a must have shape \[R, 19\], got \[4, 18\]"),
        ({"b": torch.randn(23, 5)}, ValueError, r"b must have shape \[23, 4\], got \[23, 5\]"),
        ({"b": torch.randn(4)}, ValueError, r"b must have shape \[23, 4\], got \[4\]"),
        ({"bias": torch.randn(1)}, ValueError, r"bias must have shape \[23\], got \[1\]"),
        ({"a": torch.randn(4, 19, device="meta")}, ValueError, "a must be on cpu, got meta"),
        ({"bias": torch.randn(23, device="meta")}, ValueError, "bias must be on cpu, got meta"),
        ({"w": torch.randn(23, 19, requires_grad=True)}, ValueError, "w must be frozen, got requires_grad=True; use F"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p must be between 0 and 1, got nan"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"^lora_linear: {message}"):
        lora_linear(**{**make((9, 19, 23, 4)), "scale": 0.5, **change})


def test_unsupported_devices_and_backends_say_why(monkeypatch):
    inputs = {name: t.detach().to("meta") for name, t in make((9, 19, 23, 4)).items()}
    with pytest.raises(NotImplementedError, match="lora: no backend works on meta"):
        lora_linear(**inputs, scale=0.5)
    monkeypatch.setenv("FUSETUNE_BACKEND", "cuda")
    message = "FUSETUNE_BACKEND: must be one of cpu, triton, reference for lora on cpu, got cuda"
    with pytest.raises(ValueError, match=message):
        lora_linear(**make((9, 19, 23, 4)), scale=0.5)
