"""lora_linear_group at every backend: several projections, any number of adapters, quantised weights."""

import math

import oracle
import pytest
import torch
from oracle import assert_right, gradients, to_double
from test_lora import BF16, FP16, FP32, assert_same, make, shape_id

from fusetune.ops import (
    Adapter,
    Projection,
    lora_linear,
    lora_linear_group,
    lora_linear_group_reference,
    lora_linear_reference,
    quantize_int8,
    quantize_nf4,
)
from fusetune.ops.philox import draw_seed, keep_mask
from fusetune.ops.quantize import dequantize_reference

OP = "lora"


# Of each projection its N, and of each of its adapters R, scale, dropout_p and which of a and b are trained.
GROUPS = {
    "query, key, value": [(24, [(4, 0.5, 0.0, "ab")]), (8, [(4, 0.5, 0.0, "ab")]), (8, [(4, 0.5, 0.0, "ab")])],
    "two adapters": [(19, [(3, 0.5, 0.0, "ab"), (17, -2.0, 0.0, "ab")])],
    "own masks": [(24, [(8, 0.5, 0.25, "ab")]), (13, [(8, 1.0, 0.25, "ab"), (2, 1.0, 0.5, "ab")])],
    "some masked": [(9, [(5, 1.0, 0.0, "ab"), (3, 1.0, 0.3, "ab"), (4, 2.0, 0.0, "ab")]), (6, [(1, 1.0, 0.0, "ab")])],
    "some without": [(9, []), (130, [(5, 1.0, 0.1, "ab")]), (7, [])],
    "all without": [(9, []), (7, [])],
    "some frozen": [(9, [(5, 1.0, 0.2, "a"), (3, 1.0, 0.0, "")]), (6, [(4, 1.0, 0.0, "b"), (2, 1.0, 0.0, "ab")])],
    "empty": [(0, [(4, 0.5, 0.1, "ab")]), (8, [(0, 0.5, 0.0, "ab")])],
}


def make_group(group, M, K, dtype, adapter, device, bias_dtype):
    """The tensors of a group by name, and a function that makes projections of them."""
    tensors = {"x": torch.randn(M, K)}
    for p, (N, adapters) in enumerate(group):
        tensors[f"w{p}"] = torch.randn(N, K) / K**0.5
        if p != 1:
            tensors[f"bias{p}"] = torch.randn(N)
        for j, (R, *_) in enumerate(adapters):
            tensors[f"a{p}{j}"] = torch.randn(R, K) / K**0.5
            tensors[f"b{p}{j}"] = torch.randn(N, R) / max(R, 1) ** 0.5
    dtypes = {"a": adapter, "b": adapter, "bias": bias_dtype}
    for name, t in tensors.items():
        tensors[name] = t.to(device, dtypes.get(name.rstrip("0123456789"), dtype)).requires_grad_(name[0] != "w")
    for p, (_, adapters) in enumerate(group):
        for j, (*_, trained) in enumerate(adapters):
            for letter in "ab":
                tensors[f"{letter}{p}{j}"].requires_grad_(letter in trained)

    def projections(tensors):
        return [
            Projection(
                tensors[f"w{p}"],
                tensors.get(f"bias{p}"),
                [Adapter(tensors[f"a{p}{j}"], tensors[f"b{p}{j}"], *row[1:3]) for j, row in enumerate(adapters)],
            )
            for p, (_, adapters) in enumerate(group)
        ]

    return tensors, projections


def compare_group(group, shape, dtypes, device, compute="match", bias_dtype=None):
    """Judges the sum of all results, each by weights of its own, and every gradient."""
    dtype, adapter = dtypes
    tensors, projections = make_group(group, *shape, dtype, adapter, device, bias_dtype or dtype)
    weights = [torch.randn(shape[0], N, device=device) for N, _ in group]
    count = sum(len(adapters) for _, adapters in group)
    drops = any(row[2] for _, adapters in group for row in adapters)
    torch.manual_seed(7)
    seeds = draw_seed(tensors["x"].device, count).tolist() if drops else [0] * count
    torch.manual_seed(7)

    def joined(ys):
        return torch.cat([y * weight.to(y.dtype) for y, weight in zip(ys, weights, strict=True)], 1)

    def reference(**t):
        if compute == "fast" and t["x"].dtype == dtype:
            t = {name: v.to(dtype) if name[0] in "ab" and name[1].isdigit() else v for name, v in t.items()}
        return joined(lora_linear_group_reference(t["x"], projections(t), seeds=seeds))

    got = gradients(lambda **t: joined(lora_linear_group(t["x"], projections(t), compute=compute)), tensors)
    plain, exact = gradients(reference, tensors), gradients(reference, to_double(tensors))
    for name in exact:
        assert_right(name, got[name], plain[name], exact[name])
    return got


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP32)], ids=shape_id)
@pytest.mark.parametrize("shape", [(5, 37), pytest.param((210, 300), marks=pytest.mark.large)], ids=shape_id)
@pytest.mark.parametrize("group", GROUPS)
def test_groups(backend, group, shape, dtypes):
    compare_group(GROUPS[group], shape, dtypes, backend.device)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=shape_id)
@pytest.mark.parametrize("group", ["query, key, value", "own masks", "some frozen"])
def test_fast_may_round_adapters_to_the_type_of_x(backend, group, dtype):
    compare_group(GROUPS[group], (70, 45), (dtype, FP32), backend.device, compute="fast")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=shape_id)
@pytest.mark.parametrize("compute", ["match", "fast"])
def test_float32_bias(backend, compute, dtype):
    got = compare_group(GROUPS["own masks"], (49, 45), (dtype, FP32), backend.device, compute, bias_dtype=FP32)
    assert got["dbias0"].dtype == FP32


def test_adapters_of_a_group_have_masks_of_their_own(backend):
    eye = torch.eye(40, device=backend.device)
    x = torch.ones(30, 40, device=backend.device)
    adapters = [Adapter(eye, eye, 1.0, 0.5) for _ in range(3)]
    zero = torch.zeros_like(eye)
    torch.manual_seed(3)
    first, both = lora_linear_group(x, [Projection(zero, None, adapters[:1]), Projection(zero, None, adapters[1:])])
    torch.manual_seed(3)
    seeds = draw_seed(x.device, 3).tolist()
    masks = [keep_mask(seed, torch.arange(30, device=x.device), 40, 0.5) * 2.0 for seed in seeds]
    assert torch.equal(first, masks[0].float())
    assert torch.equal(both, (masks[1] + masks[2]).float())


def test_a_group_is_its_projections_one_by_one(device):
    tensors, projections = make_group(GROUPS["some masked"], 9, 37, FP32, FP32, device, FP32)
    group = [
        Projection(w, bias, [t._replace(dropout_p=0.0) for t in adapters]) for w, bias, adapters in projections(tensors)
    ]
    for y, projection in zip(lora_linear_group(tensors["x"], group), group, strict=True):
        assert torch.equal(y, lora_linear_group(tensors["x"], [projection])[0])
    used = lora_linear_group(tensors["x"], group)[0].sum()  # no gradient reaches the second projection, as in PEFT
    assert torch.autograd.grad(used, [tensors["a10"]], allow_unused=True) == (None,)


def test_groups_compile(device):
    tensors, projections = make_group(GROUPS["query, key, value"], 9, 37, FP32, FP32, device, FP32)
    tensors.pop("bias0"), tensors.pop("bias2")  # their gradients are sums of the compiler's, in an order of its own

    def layers(**t):
        return torch.cat(lora_linear_group(t["x"], projections(t)), 1)

    assert_same(gradients(layers, tensors), gradients(torch.compile(layers, fullgraph=True), tensors))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: [], ValueError, r"projections must not be empty, got \[\]"),
        (
            lambda p: [p[0], p[1]._replace(w=torch.randn(8, 36))],
            ValueError,
            r"w must have shape \[N, 37\], got \[8, 36\]",
        ),
        (
            lambda p: [p[0], p[1]._replace(adapters=[Adapter(torch.randn(4, 37), torch.randn(8, 4), 1.0)])],
            TypeError,
            "a must be bfloat16, got float32",
        ),
        (lambda p: [p[0]._replace(adapters=[p[0].adapters[0]._replace(scale=math.nan)])], ValueError, "scale must be"),
    ],
)
def test_group_errors(change, error, message):
    dtype = BF16 if error is TypeError else FP32
    tensors, projections = make_group(GROUPS["query, key, value"], 9, 37, dtype, dtype, "cpu", dtype)
    with pytest.raises(error, match=f"^lora_linear: {message}"):
        lora_linear_group(tensors["x"], change(projections({n: t.detach() for n, t in tensors.items()})))


def test_compute_must_be_known():
    with pytest.raises(ValueError, match=r"^lora_linear: compute must be 'match' or 'fast', got 'quick'"):
        lora_linear(**make((9, 19, 23, 4)), scale=0.5, compute="quick")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=shape_id)
@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_quantised_weights(backend, quantize, dtype, monkeypatch):
    """As with the weight that they stand for, in float64; its blocks do not all fit in the scratch at once."""
    monkeypatch.setattr("fusetune.ops.quantize.SCRATCH_BYTES", {"cpu": 4 * 64 * 70})
    inputs = make((9, 64, 150, 5), dtype, FP32, backend.device)
    q = quantize(inputs.pop("w"))
    dy = torch.randn(9, 150, device=backend.device, dtype=dtype)

    def op(x, a, b, bias, **options):
        first, second = lora_linear_group(
            x, [Projection(q, bias, [Adapter(a, b, 0.5)]), Projection(q, None, [Adapter(a, b, 1.0, 0.0)])]
        )
        return first - second

    def reference(x, a, b, bias, **options):
        w = dequantize_reference(q, x.dtype)
        adapter = Adapter(a, b, 0.5)
        first, second = lora_linear_group_reference(
            x, [Projection(w, bias, [adapter]), Projection(w, None, [adapter._replace(scale=1.0)])]
        )
        return first - second

    oracle.compare(op, reference, inputs, dy)


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_quantised_weights_are_saved_as_they_are(device, quantize):
    inputs = make((9, 64, 150, 5), device=device)
    q = quantize(inputs.pop("w"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(inputs["x"], q, inputs["a"], inputs["b"], 0.5)
    known = {t.data_ptr() for t in (*q[:3], *inputs.values()) if t is not None}
    assert [list(t.shape) for t in saved if t.data_ptr() not in known] == [[9, 5]]
    with pytest.raises(ValueError, match=r"^lora_linear: w must have shape \[N, 63\], got \[150, 64\]"):
        lora_linear(inputs["x"][:, :63], q, inputs["a"][:, :63], inputs["b"], 0.5)


def test_reference_without_columns_drops_nothing():
    inputs = make((5, 0, 4, 2))
    y = lora_linear_reference(**inputs, scale=1.0, dropout_p=0.5, seed=3)
    assert torch.equal(y, inputs["bias"].expand(5, 4))
