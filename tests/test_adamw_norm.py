"""The norm of all gradients at every backend, beside a float64 one, and clipping by it inside the step."""

import itertools
import math

import pytest
import torch
from oracle import row_strided, transposed, unaligned
from steps import BF16, DTYPES, FP16, FP32, HYPERS, LARGE, PLAIN, SIZES, copied, random_row, step_rows

from fusetune import _native
from fusetune.ops import adamw_grad_norm, adamw_grad_norm_reference

OP = "adamw"

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact_norm(grads, scale=1.0):
    return math.sqrt(math.fsum(g.double().square().sum().item() for g in grads)) / scale


def assert_norm(grads, scale=None):
    """Within a float32 unit in the last place; 2 over a scale."""
    exact = exact_norm(grads, scale or 1.0)
    norm = adamw_grad_norm(grads, None if scale is None else torch.tensor([scale], device=grads[0].device))
    assert norm.shape == ()
    assert norm.dtype == FP32
    assert norm.device == grads[0].device
    ulp = 2.0 ** (math.frexp(exact)[1] - 24)
    assert abs(norm.item() - exact) <= (1 if scale is None else 2) * max(ulp, 2.0**-149)


@dtypes
def test_norm_of_every_size(backend, dtype):
    grads = [torch.randn(size).to(backend.device, dtype) for size in SIZES]
    for g in grads[1:]:
        assert_norm([unaligned(g)], 3.0)
    assert_norm(grads)


@dtypes
@pytest.mark.large
def test_norm_of_many_work_items(backend, dtype):
    assert_norm([torch.randn(size).to(backend.device, dtype) for size in LARGE])


@pytest.mark.large
def test_norm_of_many_tensors(backend):
    sizes = [20000, *(i % 7 for i in range(250)), 40000, *(i % 5 for i in range(300))]
    assert_norm([torch.randn(size).to(backend.device, dtype) for size, dtype in zip(sizes, itertools.cycle(DTYPES))])


def test_norm_of_mixed_dtypes_and_layouts(backend):
    layouts = [torch.clone, transposed, row_strided, unaligned, lambda t: t[:, :1].expand(t.shape), lambda t: t[::2]]
    grads = [
        layout(torch.randn(6, 7).to(backend.device, dtype))
        for layout, dtype in itertools.product(layouts, (FP32, FP16))
    ]
    before = [g.clone() for g in grads]
    assert_norm([*grads, torch.randn((), device=backend.device)])
    assert all(map(torch.equal, grads, before))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e30, 3e37])
def test_squares_neither_overflow_nor_vanish(backend, magnitude):
    """Those of 1e30 are beyond float32, those of 1e-30 below."""
    g = magnitude * torch.linspace(0.5, 1, 50, device=backend.device)
    assert_norm([g, g[:7]])


@pytest.mark.parametrize("position", [0, 4095, 4099])
def test_what_is_not_finite_shows(backend, position):
    nan, inf = math.nan, math.inf
    for values, expected in (([nan], nan), ([inf], inf), ([-inf], inf), ([inf, nan], nan), ([-inf, inf], inf)):
        g = torch.ones(4100, device=backend.device)
        for i, x in enumerate(values):
            g[position - i] = x
        norm = adamw_grad_norm([torch.ones(3, device=backend.device), g]).item()
        assert norm == expected or (math.isnan(norm) and math.isnan(expected))


def test_norm_of_nothing_is_0(backend):
    assert adamw_grad_norm([]).item() == 0
    assert (
        adamw_grad_norm([torch.zeros(0, device=backend.device), torch.zeros(3, 0, device=backend.device)]).item() == 0
    )
    assert adamw_grad_norm([torch.zeros(100, device=backend.device)]).item() == 0
    assert adamw_grad_norm_reference([]).item() == 0


def test_a_norm_beyond_float32_is_infinite(backend):
    assert adamw_grad_norm([torch.full((100,), 3e38, device=backend.device)]).item() == math.inf


@dtypes
def test_norm_does_not_depend_on_threads_or_instruction_set(dtype, set_threads):
    grads = [torch.randn(size).to(dtype) for size in (*LARGE, 200_000, *SIZES)]
    extension = _native.extension()
    level, norms = extension.isa(), set()
    try:
        for name in extension.isa_available():
            extension.set_isa(name)
            for threads in (1, 2, 3, 7):
                set_threads(threads)
                norms.add(adamw_grad_norm(grads).item())
    finally:
        extension.set_isa(level)
    assert len(norms) == 1


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_norm_is_torchs(dtype):
    """torch's squares are float32 sums, and it rounds the norm of each tensor: to its dtype."""
    grads = [torch.randn(size).to(dtype) for size in (100, 300, (7, 5))]
    expected = torch.nn.utils.get_total_norm(grads).item()
    rounding = 2 * torch.finfo(dtype).eps + 400 * torch.finfo(FP32).eps
    assert abs(adamw_grad_norm(grads).item() - expected) <= rounding * expected


def test_opcheck(device):
    grads = [torch.rand(5, 3, device=device), torch.rand(7, device=device).to(BF16)]
    for scale in (None, torch.ones(1, device=device)):
        torch.library.opcheck(torch.ops.fusetune.adamw_grad_norm.default, (grads, scale))


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.zeros(3).double(), TypeError, "grads must be float32, bfloat16, float16, got float64"),
        (torch.zeros(3).to_sparse(), TypeError, "grads must be dense, got torch.sparse_coo"),
    ],
)
def test_wrong_gradients_raise(grad, error, message):
    with pytest.raises(error, match=f"adamw_grad_norm: {message}"):
        adamw_grad_norm([torch.zeros(3), grad])


# Clipping


def clipped_steps(backend, rows, max_norm, poison=None):
    """The rows after adamw_step with the norm of their gradients, and torch's clip_grad_norm_ and step of copies."""
    params = [row["p"].clone().requires_grad_() for row in rows]
    optimizer = torch.optim.AdamW(params, lr=HYPERS["lr"], foreach=False)
    for p, row in zip(params, rows, strict=True):
        if poison is not None:
            row["g"].view(-1)[-1] = poison
        p.grad = row["g"].clone()
        names = {"step": "step", "exp_avg": "m", "exp_avg_sq": "v"}
        optimizer.state[p] = {name: row[ours].clone() for name, ours in names.items()}
    norm = adamw_grad_norm([row["g"] for row in rows])
    step_rows(rows, grad_norm=norm, max_grad_norm=max_norm)
    expected_norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    optimizer.step()
    torch.testing.assert_close(norm, expected_norm.to(norm), rtol=1e-5, atol=0, equal_nan=True)
    return [optimizer.state[p] | {"p": p.detach()} for p in params]


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_is_torchs_clip_and_step(backend, max_norm):
    """Of 600 elements torch's norm in float32 is off by less than 100 u; so are then gradients, m, and half as far v.
    Where nothing is clipped, only the step's own roundings are."""
    rows = [random_row(PLAIN[0], size, backend.device) for size in (300, 17, (20, 14))]
    expected = clipped_steps(backend, rows, max_norm)
    for row, state in zip(rows, expected, strict=True):
        for ours, theirs in (("p", "p"), ("m", "exp_avg"), ("v", "exp_avg_sq")):
            torch.testing.assert_close(row[ours], state[theirs], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_norms_that_are_not_finite_do_as_torchs(backend, poison):
    """A NaN norm makes all NaN; an infinite one makes gradients 0, and those that were infinite NaN."""
    rows = [random_row(PLAIN[0], size, backend.device) for size in (300, 17)]
    expected = clipped_steps(backend, rows, 1.0, poison)
    for row, state in zip(rows, expected, strict=True):
        for ours, theirs in (("p", "p"), ("m", "exp_avg"), ("v", "exp_avg_sq")):
            torch.testing.assert_close(row[ours], state[theirs], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_norm_below_the_largest_changes_nothing(backend):
    row = random_row(PLAIN[0], 300, backend.device)
    clipped = copied(row)
    step_rows([row])
    step_rows([clipped], grad_norm=torch.tensor([0.5], device=backend.device), max_grad_norm=1.0)
    for name, x in row.items():
        assert torch.equal(x, clipped[name]), name


def test_gradients_are_unscaled_before_they_are_clipped(backend):
    rows = [random_row(PLAIN[0], 300, backend.device), random_row(PLAIN[0], 17, backend.device)]
    scaled = [copied(row) for row in rows]
    scale = torch.tensor([1024.0], device=backend.device)
    for row in scaled:
        row["g"] *= scale
    norm, scaled_norm = (adamw_grad_norm([row["g"] for row in r], s) for r, s in ((rows, None), (scaled, scale)))
    assert torch.equal(norm, scaled_norm)
    step_rows(rows, grad_norm=norm, max_grad_norm=1.0)
    step_rows(scaled, grad_norm=norm, max_grad_norm=1.0, grad_scale=scale)
    for row, other in zip(rows, scaled, strict=True):
        for name in "pmv":
            assert torch.equal(row[name], other[name]), name
