"""The AdamW step at every backend, beside torch.optim.AdamW and a float64 step with its roundings."""

import itertools
import math

import pytest
import torch
from oracle import row_strided, transposed, unaligned
from steps import DTYPES, FP32, OPTIONS, assert_equal, clone, make, train

from fusetune.ops import adamw_step, adamw_step_reference
from fusetune.optim.adamw import AdamW

OP = "adamw"
# either side of the vectors and of the kernels' work items of 16384
SIZES = [0, 1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097]
LARGE = [16383, 16384, 16385, 70001]

options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact_step(p, g, m, v, largest, t, *, lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, grad_scale):
    """csrc/adamw.h in float64, and how far a float32 computation of it may be off.

    u is half a unit in the last place relative to the value. Each bound counts the roundings that its formula has, of
    scalars, of intermediate results and of the result, an FMA as a product and a sum; storage adds one more, or half of
    the smallest subnormal.
    """
    u = torch.finfo(FP32).eps / 2
    storage = torch.finfo(p.dtype)
    p, g, m, v, largest = (x.double() for x in (p, g, m, v, largest))
    g = (-g if maximize else g) / grad_scale
    m_new = m + (1 - beta1) * (g - m)
    m_error = u * (m_new.abs() + (1 - beta1) * (3 * (g - m).abs() + g.abs()))
    v_new = beta2 * v + (1 - beta2) * g * g
    largest_new = torch.maximum(largest, v_new) if amsgrad else v_new
    v_error, largest_error = 6 * u * v_new, 6 * u * largest_new
    denominator = largest_new.sqrt() / math.sqrt(1 - beta2**t) + eps
    step_size = lr / (1 - beta1**t)
    update = -step_size * m_new / denominator
    p_new = p * (1 - lr * weight_decay) + update
    p_error = u * (2 * p.abs() + p_new.abs() + 10 * update.abs()) + step_size * m_error / denominator
    stored = {
        "p": (p_new, p_error),
        "m": (m_new, m_error),
        "v": (v_new, v_error),
        "largest": (largest_new, largest_error),
    }
    subnormal = storage.smallest_normal * storage.eps
    narrow = 0 if storage.dtype == "float32" else storage.eps / 2
    return {name: (x, 1.001 * error + narrow * x.abs() + subnormal) for name, (x, error) in stored.items()}


def one_step(device, dtype, sizes, grad_scale=None, t=3, layout=torch.clone, **changes):
    """Runs adamw_step from random states, of t, t + 1 and t + 2 steps in turn, and holds every element of every result
    to exact_step."""
    hypers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}
    hypers |= {"maximize": False, **changes}
    lists = {name: [torch.randn(size).to(device, dtype) for size in sizes] for name in ("p", "g", "m")}
    lists |= {name: [torch.rand(size).to(device, dtype) for size in sizes] for name in ("v", "largest")}
    if grad_scale:
        lists["g"] = [g * min(grad_scale, 1000) for g in lists["g"]]
    lists = {name: [layout(x) for x in column] for name, column in lists.items()}
    before = [tuple(x.clone() for x in row) for row in zip(*lists.values(), strict=True)]
    times = [t + i % 3 for i in range(len(sizes))]
    steps = [torch.tensor(float(time - 1), device=device) for time in times]
    scale = None if grad_scale is None else torch.tensor([grad_scale], device=device)
    columns = list(lists.values()) if hypers["amsgrad"] else [*list(lists.values())[:4], []]
    adamw_step(*columns, steps, **hypers, grad_scale=scale)

    for i, row in enumerate(before):
        assert steps[i] == times[i]
        assert torch.equal(lists["g"][i], row[1]), "the gradient was changed"
        exact = exact_step(*row, times[i], **hypers, grad_scale=grad_scale or 1.0)
        for name, (value, bound) in exact.items():
            if name == "largest" and not hypers["amsgrad"]:
                continue
            error = (lists[name][i].double() - value).abs()
            worst = (error / bound).max().item() if error.numel() else 0
            assert worst <= 1, f"{name} of size {sizes[i]}: an error of {worst:.2f} times its bound"


@pytest.mark.parametrize("layout", [torch.clone, unaligned])
@dtypes
def test_one_step_rounds_no_more_than_its_formula(backend, dtype, layout):
    one_step(backend.device, dtype, SIZES, layout=layout)


@dtypes
@pytest.mark.large
def test_one_step_of_many_work_items(backend, dtype):
    one_step(backend.device, dtype, LARGE)


@pytest.mark.large
def test_one_step_of_many_tensors(backend):
    """Of which CUDA's blocks look at 256 at a time."""
    one_step(backend.device, FP32, [20000, *(i % 7 for i in range(250)), 40000, *(i % 5 for i in range(300))])


@pytest.mark.parametrize("t", [1, 1000, 1_000_000])
@pytest.mark.parametrize("grad_scale", [None, 65536.0, 3.0])
@dtypes
def test_one_step_at_any_time_and_scale(backend, dtype, grad_scale, t):
    one_step(backend.device, dtype, [33, 100], grad_scale, t)


@pytest.mark.parametrize(
    ("amsgrad", "maximize", "weight_decay", "beta1", "beta2", "eps"),
    [
        *itertools.product([False, True], [False, True], [0.0, 0.1], [0.0, 0.9], [0.99], [1e-8]),
        (True, True, 0, 0, 0, 1),
    ],
)
def test_one_step_with_options(backend, amsgrad, maximize, weight_decay, beta1, beta2, eps):
    hypers = {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": weight_decay}
    one_step(backend.device, FP32, [37], 8.0, beta1=beta1, beta2=beta2, eps=eps, **hypers)


@options
@dtypes
@pytest.mark.usefixtures("cpu_backend")
def test_equals_torchs_fused_step_bitwise(dtype, options):
    """Whatever the instruction set here and there, but for torch's tails, which it rounds as scalars without FMA."""
    if (capability := torch.backends.cpu.get_cpu_capability()) not in ("AVX2", "AVX512"):
        pytest.skip(f"torch's kernel has no FMA at {capability}")
    params = make([*SIZES[1:], *LARGE, (3, 5, 7)], dtype)
    ours, theirs = params, clone(params)
    optimizers = AdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for optimizer, p in zip(optimizers, (ours, theirs), strict=True):
        train(optimizer, p, 6)
    for p, q in zip(ours, theirs, strict=True):
        state, expected = ({"p": t, **o.state[t]} for o, t in zip(optimizers, (p, q), strict=True))
        assert state.keys() == expected.keys()
        assert torch.equal(state.pop("step"), expected["step"])
        body = p.numel() // 32 * 32  # of the longest vector of 16-bit elements
        for name, t in state.items():
            differ = (t.view(-1)[:body] != expected[name].view(-1)[:body]).sum().item()
            assert differ == 0, f"{name} of {p.numel()} differs in {differ} elements"


@options
def test_against_torchs_for_loop(backend, options):
    """An independent formula. In m + (1 - beta1)(g - m), m may be 1000 times the gradient that `train` gives: steps,
    of a size lr, are then as many times less exact."""
    params = make([1, 17, 300, (5, 7)], device=backend.device)
    ours, theirs = params, clone(params)
    train(AdamW(ours, **options), ours, 6)
    train(torch.optim.AdamW(theirs, foreach=False, **options), theirs, 6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=4000 * torch.finfo(FP32).eps * float(options.get("lr", 1e-3)))


@options
def test_reference_is_torchs_for_loop_in_float64(options):
    options = {
        name: value.double() if name == "lr" and torch.is_tensor(value) else value for name, value in options.items()
    }
    theirs = [p.detach().double().requires_grad_() for p in make([1, 17, (5, 7)])]
    ours = [p.detach().clone() for p in theirs]
    optimizer = torch.optim.AdamW(theirs, foreach=False, **options)
    m, v, largest = ([torch.zeros_like(p) for p in ours] for _ in range(3))
    steps, d = [torch.zeros(()) for _ in ours], optimizer.defaults
    hypers = {name: d[name] for name in ("weight_decay", "eps", "amsgrad", "maximize")}
    hypers |= {"lr": float(d["lr"]), "beta1": d["betas"][0], "beta2": d["betas"][1]}
    for step in range(4):
        train(optimizer, theirs, 1, first=step)
        adamw_step_reference(ours, [p.grad for p in theirs], m, v, largest, steps, **hypers)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-12, atol=1e-14)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": transposed,
    "row_strided": row_strided,
    "unaligned": unaligned,
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
}


@pytest.mark.parametrize(
    ("layout", "grads"),
    [
        *(("contiguous", grads) for grads in ("contiguous", "expanded", *LAYOUTS)),
        *((layout, "contiguous") for layout in LAYOUTS),
        *(pytest.param(*pair, marks=pytest.mark.large) for pair in itertools.product(LAYOUTS, ["expanded", *LAYOUTS])),
    ],
)
def test_layouts_step_as_contiguous_tensors_do(backend, layout, grads):
    """torch's fused kernel walks raw memory here and is wrong; its for-loop is not."""
    value = torch.randn(4, 6, 5, 3, device=backend.device)
    p = LAYOUTS[layout](value) if layout in LAYOUTS else value.clone()
    p, q, r = (t.detach().requires_grad_() for t in (p, value.clone(), value.clone()))
    options = {"amsgrad": True, "weight_decay": 0.1}
    ours, contiguous, theirs = AdamW([p], **options), AdamW([q], **options), torch.optim.AdamW([r], **options)
    strides = p.stride()
    for step in range(3):
        torch.manual_seed(step)
        g = torch.randn(value.shape).to(value)
        p.grad = g[:, :1].expand(g.shape) if grads == "expanded" else LAYOUTS.get(grads, torch.clone)(g)
        q.grad, r.grad = p.grad.contiguous(), p.grad.contiguous()
        for optimizer in (ours, contiguous, theirs):
            optimizer.step()
    assert p.stride() == strides
    assert torch.equal(p, q)
    for name, state in ours.state[p].items():
        assert torch.equal(state, contiguous.state[q][name]), name
    torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-9)


def half_aligned(t):
    """t 8 bytes past an address that is a multiple of 16."""
    return torch.cat([t.new_zeros(8 // t.element_size()), t.reshape(-1)])[8 // t.element_size() :].view(t.shape)


@pytest.mark.parametrize("layout", [transposed, unaligned, half_aligned])
@pytest.mark.parametrize("odd", ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_any_list_may_have_a_layout_of_its_own(backend, odd, layout):
    hypers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True}
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"]
    plain = {name: torch.rand(6, 5, device=backend.device) for name in names}
    others = {name: layout(t) if name == odd else t.clone() for name, t in plain.items()}
    for tensors in (plain, others):
        adamw_step(*([t] for t in tensors.values()), [torch.zeros((), device=backend.device)], **hypers)
    for name in names:
        assert torch.equal(plain[name], others[name]), name


def test_no_gradients_at_all(backend):
    params = make([16], device=backend.device)
    before = clone(params)
    AdamW(params).step()
    assert_equal(params, before)
    adamw_step([], [], [], [], [], [], lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_leaves_everything_untouched(backend, found):
    tensors = [torch.rand(100, device=backend.device) for _ in range(5)]
    step, before = torch.tensor(3.0, device=backend.device), [t.clone() for t in tensors]
    hypers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True}
    adamw_step(*([t] for t in tensors), [step], **hypers, found_inf=torch.tensor([found], device=backend.device))
    changed = [not torch.equal(t, b) for t, b in zip(tensors, before, strict=True)]
    assert changed == ([False] * 5 if found else [True, False, True, True, True])
    assert step == (3 if found else 4)


@pytest.mark.parametrize("amsgrad", [False, True])
@dtypes
@pytest.mark.usefixtures("cpu_backend")
def test_result_does_not_depend_on_the_thread_count(dtype, amsgrad, set_threads):
    initial = make([*LARGE, 100_000, *SIZES], dtype)
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        params = clone(initial)
        optimizer = AdamW(params, amsgrad=amsgrad)
        train(optimizer, params, 3)
        results.append([*params, *(state[name] for state in optimizer.state.values() for name in state)])
    for other in results[1:]:
        assert_equal(other, results[0])


def test_order_of_parameters_does_not_matter(backend):
    params = make([300, 17, 4097, 1], device=backend.device)
    grads = [torch.randn_like(p) for p in params]
    results = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        copies = clone(params)
        optimizer = AdamW([copies[i] for i in order])
        for p, g in zip(copies, grads, strict=True):
            p.grad = g
        optimizer.step()
        results.append(copies)
    assert_equal(*results)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@dtypes
def test_a_gradient_that_is_not_finite_spoils_its_own_element_only(backend, dtype, poison, amsgrad):
    params = make([40], dtype, backend.device)
    ours, theirs = params, clone(params)
    optimizers = AdamW(ours, amsgrad=amsgrad), torch.optim.AdamW(theirs, amsgrad=amsgrad, foreach=False)
    for p, optimizer in zip((ours[0], theirs[0]), optimizers, strict=True):
        p.grad = torch.ones_like(p)
        p.grad[37] = poison
        optimizer.step()
        optimizer.step()
    assert torch.equal(ours[0].isfinite(), theirs[0].isfinite())
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    for name, state in optimizers[0].state[ours[0]].items():
        expected = optimizers[1].state[theirs[0]][name]
        assert torch.equal(state.isnan(), expected.isnan()), name


def test_tiny_and_huge_gradients(backend):
    """Squares that underflow or overflow float32 do as torch's do."""
    g = torch.tensor([0.0, 1e-45, 1e-30, 1e-20, 1e10, 1e19, 3e38], device=backend.device)
    params = [torch.ones_like(g).requires_grad_()]
    ours, theirs = params, clone(params)
    for p, optimizer in ((ours[0], AdamW(ours)), (theirs[0], torch.optim.AdamW(theirs, foreach=False))):
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)


def test_opcheck(device):
    def arguments(amsgrad, scaled):
        tensors = [[torch.rand(5, 3, device=device), torch.rand(7, device=device)] for _ in range(5)]
        tensors[4] = tensors[4] if amsgrad else []
        scalars = torch.ones(1, device=device), torch.zeros(1, device=device)
        steps = [torch.zeros((), device=device) for _ in range(2)]
        return (*tensors, steps, 0.1, 0.9, 0.99, 0.1, 1e-8, amsgrad, False, *(scalars if scaled else (None, None)))

    for amsgrad, scaled in ((False, False), (True, True)):
        torch.library.opcheck(torch.ops.fusetune.adamw_step.default, arguments(amsgrad, scaled))


def test_lists_that_do_not_match_raise():
    hypers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}

    def columns():
        return [*([torch.zeros(3), torch.zeros(4)] for _ in range(4)), [], [torch.zeros(()), torch.zeros(())]]

    lists = columns()
    lists[1].pop()
    with pytest.raises(ValueError, match=r"adamw_step: lists must have one length, got \[2, 1, 2, 2, 2, 2\]"):
        adamw_step(*lists, **hypers)
    with pytest.raises(ValueError, match=r"adamw_step: lists must have one length, got \[2, 2, 2, 2, 0, 2\]"):
        adamw_step(*columns(), **hypers, amsgrad=True)
    lists = columns()
    lists[2][1] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"adamw_step: exp_avgs must have the parameter's shape \[4\], got \[5\]"):
        adamw_step(*lists, **hypers)
    lists = columns()
    lists[5][0] = torch.zeros((), dtype=torch.float64)
    with pytest.raises(TypeError, match="adamw_step: state_steps must be float32, got float64"):
        adamw_step(*lists, **hypers)
