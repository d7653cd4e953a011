"""dora_linear at every backend: the oracle is its reference in float64, the yardstick the same in low precision, which
is how PEFT computes it."""

import oracle
import pytest
import torch
from oracle import LAYOUTS, assert_right, gradients, to_double
from torch.utils.checkpoint import checkpoint

from fusetune.ops import dora_linear, dora_linear_reference, lora_linear
from fusetune.ops.dora import _dora_backward, _dora_dropout, _dora_forward, _dora_norm
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale

OP = "dora"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# M, K, N, R: 0, 1, primes, and either side of the kernels' blocks of 48 rows, 128 and 512 columns
SMALL = [(1, 1, 1, 1), (5, 3, 7, 2), (17, 37, 29, 8)]
EMPTY = [(0, 16, 8, 4), (6, 16, 0, 4), (6, 16, 8, 0)]
AWKWARD = [(47, 129, 49, 7), (48, 128, 48, 16), (193, 64, 515, 33), (3100, 61, 24, 70), (50, 70, 90, 512)]
SHAPES = [*SMALL, *EMPTY, *(pytest.param(shape, marks=pytest.mark.large) for shape in AWKWARD)]
DTYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]  # of x and of the adapter


def shape_id(value):
    if isinstance(value, tuple):
        return "x".join(str(size).removeprefix("torch.") for size in value)
    return None


def make(shape, dtype=FP32, adapter=None, device="cpu", bias=True, layout=None, lead=None):
    """Inputs of a layer: rows of x, w and of the adapter have length about 1, and so have the magnitudes."""
    M, K, N, R = shape
    inputs = {
        "x": torch.randn(*(lead or (M,)), K),
        "w": torch.randn(N, K) / max(K, 1) ** 0.5,
        "a": torch.randn(R, K) / max(K, 1) ** 0.5,
        "b": torch.randn(N, R) / max(R, 1) ** 0.5,
        "magnitude": torch.rand(N) + 0.5,
    }
    if bias:
        inputs["bias"] = torch.randn(N)
    dtypes = dict.fromkeys(("a", "b", "magnitude"), adapter or dtype)
    inputs = {name: t.to(device, dtypes.get(name, dtype)) for name, t in inputs.items()}
    if layout:
        inputs = {name: LAYOUTS[layout](t) if t.dim() > 1 or layout == "unaligned" else t for name, t in inputs.items()}
    return {name: t.requires_grad_(name != "w") for name, t in inputs.items()}


def compare(inputs, scale=0.5, dropout_p=0.0, layout=None):
    """Judges dora_linear's result and gradients; gives them."""
    dy = torch.randn(*inputs["x"].shape[:-1], inputs["w"].shape[0], device=inputs["x"].device, dtype=inputs["x"].dtype)
    dy = LAYOUTS[layout](dy) if layout else dy
    return oracle.compare(
        *(dora_linear, dora_linear_reference, inputs, dy),
        scale=scale,
        dropout_p=dropout_p,
        cancelled=rounding_of_the_product(inputs, dy, scale, dropout_p),
    )


def rounding_of_the_product(inputs, dy, scale, dropout_p):
    """What is rounded to 16 bits on the way, each by a part of at most eps/2 and added up in squares, twice that where
    many are; of float32 these terms are in the order of its own floor.

        pre, which the magnitudes scale                                         out, dmagnitude
        dpre; dx = dy w + (ds a + dpre w) . D, two terms one after the other    dx
        g . b, and db before g scales it, with dropout                          da, db
    """
    x, w, a, b, m = (inputs[name].detach().double() for name in ("x", "w", "a", "b", "magnitude"))
    if not x.numel() or not w.numel():
        return {}
    half, kept = torch.finfo(inputs["x"].dtype).eps / 2, kept_scale(dropout_p)
    x, dy = x.reshape(-1, x.shape[-1]), dy.double().reshape(-1, w.shape[0])
    delta = scale * b @ a
    norm = torch.linalg.vector_norm(w + delta, dim=1)
    g = m / norm
    scaled = g - 1 if dropout_p else g
    pre = kept**0.5 * (x @ (w if dropout_p else w + delta).T)  # in the mean square over masks
    product = (dy * scaled) @ w  # rounded before the adapter's part is added, where products of 16 bits are native
    terms = (2 * dy @ w, 3 * kept * product, 2 * kept * (dy * g) @ delta) if dropout_p else (product,)
    floors = {
        "out": half * (scaled * pre).abs().max().item(),
        "dmagnitude": 2 * half * torch.linalg.vector_norm(dy * pre / norm, dim=0).max().item(),
        "dx": float(
            half * sum(t.abs().max() for t in terms) + 2 * half * kept**0.5 * ((dy * scaled) ** 2 @ w**2).sqrt().max()
        ),
    }
    if dropout_p and a.numel() and inputs["a"].dtype != torch.float32:
        db = kept * scale * (dy * g).T @ (x @ a.T)
        da = kept * scale**2 * (g[:, None] * b).T ** 2 @ (dy.T @ x) ** 2
        floors |= {"db": half * db.abs().max().item(), "da": 2 * half * da.sqrt().max().item()}
    return floors


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=shape_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes_and_dtypes(backend, shape, dtypes, dropout_p):
    compare(make(shape, *dtypes, device=backend.device), dropout_p=dropout_p)


@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (2, 0), (2, 3, 2)], ids=str)
def test_leading_dimensions(backend, lead):
    inputs = make((0, 19, 23, 4), lead=lead or (), device=backend.device)
    if not lead:
        inputs["x"] = torch.randn(19, device=backend.device, requires_grad=True)
    got = compare(inputs)
    assert got["out"].shape == (*lead, 23)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=shape_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, dtype, dropout_p):
    """Transposed is also the weight of a Conv1D."""
    compare(make((19, 137, 59, 5), dtype, FP32, backend.device, layout=layout), dropout_p=dropout_p, layout=layout)


@pytest.mark.parametrize("bias", ["none", "frozen", "trained", "float32"])
def test_bias(backend, bias):
    inputs = make((17, 19, 23, 4), BF16 if bias == "float32" and backend.name == "cpu" else FP16, FP32, backend.device)
    if bias == "none":
        del inputs["bias"]
    elif bias == "frozen":
        inputs["bias"].requires_grad_(False)
    elif bias == "float32":
        inputs["bias"] = torch.randn(23, device=backend.device, requires_grad=True)
    got = compare(inputs)
    assert ("dbias" in got) == (bias in ("trained", "float32"))
    if bias == "float32":
        assert got["dbias"].dtype == FP32


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("frozen", ["x", "a", "b", "magnitude", "x a b", "x a b bias", "x magnitude bias"])
def test_frozen_inputs(backend, frozen, dropout_p):
    inputs = make((70, 19, 23, 4), device=backend.device)
    for name in frozen.split():
        inputs[name].requires_grad_(False)
    got = compare(inputs, dropout_p=dropout_p)
    assert sorted(got) == sorted(["out", *(f"d{name}" for name, t in inputs.items() if t.requires_grad)])


@pytest.mark.parametrize("dropout_p", [1e-6, 0.1, 1.0])
@pytest.mark.parametrize("scale", [0.0, -2.5, 64.0])
def test_scale_and_dropout(backend, scale, dropout_p):
    compare(make((17, 19, 23, 4), FP16, FP32, backend.device), scale=scale, dropout_p=dropout_p)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP16, FP32)], ids=shape_id)
def test_norm_where_weight_and_adapter_cancel(backend, dtypes):
    """Of rows of which w + scale b a leaves a thousandth: the expanded square would lose six digits there."""
    a, b = torch.randn(6, 70), torch.randn(50, 6)
    w = (-0.5 * (b @ a) + 1e-3 * torch.randn(50, 70)).to(dtypes[0])
    a, b = a.to(dtypes[1]), b.to(dtypes[1])
    w, a, b = (t.to(backend.device) for t in (w, a, b))
    exact = torch.linalg.vector_norm(w.double() + 0.5 * (b.double() @ a.double()), dim=1)
    plain = torch.linalg.vector_norm(w.float() + 0.5 * (b @ a), dim=1)
    assert_right("norm", _dora_norm(w, a, b, 0.5), plain, exact)


def test_weights_change_in_place_and_through_data(backend):
    """As PEFT's merges do: nothing of the weights is kept from one call to the next."""
    inputs = make((5, 19, 23, 4), device=backend.device)
    for _ in range(2):
        compare(inputs)
        inputs["w"].data.mul_(3)
        inputs["a"].data.mul_(-2)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=shape_id)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_bit_for_bit(backend, p, dtype):
    seed = draw_seed(backend.device)
    x = torch.randn(50, 261).to(backend.device, dtype)
    mask = keep_mask(int(seed), torch.arange(50, device=backend.device), 261, p)
    expected = torch.where(mask, (x.float() * kept_scale(p)).to(dtype), 0)
    assert torch.equal(_dora_dropout(x, p, seed), expected)
    assert torch.equal(_dora_dropout(x[:, 3:], p, seed), _dora_dropout(x[:, 3:].contiguous(), p, seed))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_saves_products_of_the_rank_and_one_of_the_output(backend, dropout_p):
    inputs = make((70, 19, 23, 4), device=backend.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = dora_linear(**inputs, scale=0.5, dropout_p=dropout_p)
    given = {t.data_ptr() for t in inputs.values()}
    kept = {t.data_ptr(): t for t in saved if t.data_ptr() not in given and t.numel() > 23}
    assert sorted(t.numel() for t in kept.values()) == [70 * 4, 70 * 23]
    y.sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_one_frozen_product_without_dropout_and_two_with(backend, monkeypatch, dropout_p):
    calls = []
    addmm = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, *args, **options: calls.append(self.shape) or addmm(self, *args, **options)
    )
    y = dora_linear(**make((7, 19, 23, 4), device=backend.device), scale=0.5, dropout_p=dropout_p)
    assert calls == [(7, 23)] * (2 if dropout_p else 1)
    calls.clear()
    y.sum().backward()
    assert calls == [(7, 19)] * (2 if dropout_p else 1)


def test_the_same_bits_each_time_and_on_any_number_of_threads(backend, set_threads):
    inputs, dy = make((130, 140, 70, 9), device=backend.device), torch.randn(130, 70, device=backend.device)

    def run():
        torch.manual_seed(3)
        return gradients(lambda **t: dora_linear(**t, scale=0.5, dropout_p=0.2), inputs, dy)

    set_threads(1)
    first = run()
    for threads in (1, 2, 5):
        set_threads(threads)
        again = run()
        assert all(torch.equal(first[name], again[name]) for name in ("out", "da", "db", "dmagnitude", "dbias"))


def test_backward_twice_and_checkpointed(backend):
    inputs = make((30, 19, 23, 4), device=backend.device)

    def layer(*tensors):
        return dora_linear(**dict(zip(inputs, tensors, strict=True)), scale=0.5, dropout_p=0.4)

    def gradients_of(function, times=1):
        torch.manual_seed(3)
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs.values()]
        y = function(*leaves)
        for i in range(times):
            y.sum().backward(retain_graph=i + 1 < times)
        return [t.grad / times for t in leaves if t.requires_grad]

    expected = gradients_of(layer)
    assert all(map(torch.equal, gradients_of(layer, times=2), expected))
    for reentrant in (False, True):
        got = gradients_of(lambda *leaves, r=reentrant: checkpoint(layer, *leaves, use_reentrant=r))
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=shape_id)
@pytest.mark.parametrize("shape", [(0, 9), (5, 1), (49, 513), (3100, 7)], ids=shape_id)
def test_scaling_of_columns(backend, shape, dtype):
    pre, dy, rest = (torch.randn(shape).to(backend.device, dtype) for _ in range(3))
    g, bias = (torch.randn(shape[1], device=backend.device) for _ in range(2))
    exact = g.double() * pre.double()
    for given in ((None, None), (bias, None), (None, rest), (bias, rest)):
        more = sum((t.double() for t in given if t is not None), torch.zeros_like(exact))
        y = _dora_forward(pre, g, *given)
        if y.numel():
            floor = 2 * torch.finfo(FP32).eps * (exact.abs() + more.abs()).max().item()
            assert_right("y", y, (exact + more).to(dtype), exact + more, floor)
    terms = dy.double() * pre.double()
    for out, expected, rounded in zip(
        _dora_backward(dy, pre, g),
        (g.double() * dy.double(), terms.sum(0), dy.double().sum(0)),
        (dtype, FP32, FP32),
        strict=True,
    ):
        floor = 2 * torch.finfo(FP32).eps * terms.abs().sum(0).max().item()
        assert_right("backward", out, expected.to(rounded), expected, floor)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=shape_id)
def test_autocast(cpu_backend, dtype):
    inputs = make((17, 37, 29, 8))
    dy = torch.randn(17, 29)

    def run(**tensors):
        with torch.autocast("cpu", dtype):
            return dora_linear(**tensors, scale=0.5)

    def plain(**tensors):
        with torch.autocast("cpu", dtype):
            return dora_linear_reference(**tensors, scale=0.5).to(dtype)

    got, yardstick = gradients(run, inputs, dy), gradients(plain, inputs, dy)
    exact = gradients(lambda **t: dora_linear_reference(**t, scale=0.5), to_double(inputs), dy)
    assert got["out"].dtype == dtype
    for name in exact:
        floor = 2 * torch.finfo(dtype).eps * exact[name].abs().max().item()
        assert_right(name, got[name], yardstick[name], exact[name], floor)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compile(dropout_p):
    inputs = make((17, 19, 23, 4))
    dy = torch.randn(17, 23)

    def run(**tensors):
        return dora_linear(**tensors, scale=0.5, dropout_p=dropout_p)

    torch.manual_seed(3)
    expected = gradients(run, inputs, dy)
    torch.manual_seed(3)
    got = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, dy)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=shape_id)
def test_opcheck(dtype):
    pre, dy, g = torch.randn(6, 9).to(dtype), torch.randn(6, 9).to(dtype), torch.randn(9)
    w, a, b = torch.randn(9, 7).to(dtype), torch.randn(3, 7), torch.randn(9, 3)
    ops = torch.ops.fusetune
    torch.library.opcheck(ops.dora_norm.default, (w, a, b, 0.5))
    torch.library.opcheck(ops.dora_norm.default, (torch.randn(7, 9).to(dtype).t(), a, b, 0.5))
    torch.library.opcheck(ops.dora_forward.default, (pre, g, None, None))
    torch.library.opcheck(ops.dora_forward.default, (pre, g, g, dy))
    torch.library.opcheck(ops.dora_backward.default, (dy, pre, g))
    torch.library.opcheck(ops.dora_dropout.default, (pre, 0.5, draw_seed(pre.device)))


def test_with_its_norms_for_magnitudes_it_is_lora(backend):
    inputs = make((17, 37, 29, 8), device=backend.device)
    magnitude = _dora_norm(*(inputs[name].detach() for name in "wab"), 0.5)
    lora = {name: t for name, t in inputs.items() if name != "magnitude"}
    expected = lora_linear(**lora, scale=0.5)
    assert torch.allclose(dora_linear(**lora, magnitude=magnitude, scale=0.5), expected, atol=1e-5)


BAD = {
    "x int": ("x", lambda t: t.long(), TypeError, r"x must be float32, bfloat16, float16, got int64"),
    "x scalar": ("x", lambda t: t[0, 0], ValueError, r"x must have at least 1 dimension, got 0"),
    "w dtype": ("w", lambda t: t.half(), TypeError, r"w must be float32, got float16"),
    "w shape": ("w", lambda t: t[:, 1:], ValueError, r"w must have shape \[N, 7\], got \[9, 6\]"),
    "w trained": ("w", lambda t: t.clone().requires_grad_(), ValueError, r"w must be frozen, got requires_grad=True;"),
    "a shape": ("a", lambda t: t[:, 1:], ValueError, r"a must have shape \[R, 7\], got \[3, 6\]"),
    "b rank": ("b", lambda t: t[:, 1:], ValueError, r"b must have shape \[9, 3\], got \[9, 2\]"),
    "b dtype": ("b", lambda t: t.half(), TypeError, r"b must be float32, got float16"),
    "magnitude": ("magnitude", lambda t: t[1:], ValueError, r"magnitude must have shape \[9\], got \[8\]"),
    "magnitude dtype": ("magnitude", lambda t: t.half(), TypeError, r"magnitude must be float32, got float16"),
    "bias": ("bias", lambda t: t[None], ValueError, r"bias must have shape \[9\], got \[1, 9\]"),
    "device": ("a", lambda t: t.to("meta"), ValueError, r"a must be on cpu, got meta"),
    "scale": ("scale", lambda _: float("nan"), ValueError, r"scale must be finite, got nan"),
    "dropout_p": ("dropout_p", lambda _: 1.5, ValueError, r"dropout_p must be between 0 and 1, got 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    name, change, error, message = BAD[case]
    arguments = {**make((5, 7, 9, 3)), "scale": 0.5, "dropout_p": 0.0}
    arguments = {key: t.detach() if isinstance(t, torch.Tensor) else t for key, t in arguments.items()}
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=rf"^dora_linear: {message}"):
        dora_linear(**arguments)
