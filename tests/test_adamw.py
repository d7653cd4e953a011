"""fusetune.AdamW and adamw_step at every backend, beside torch.optim.AdamW and a float64 step with its roundings."""

import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
from oracle import row_strided, transposed, unaligned

from fusetune.ops import adamw_step, adamw_step_reference
from fusetune.optim.adamw import AdamW

OP = "adamw"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
# either side of the vectors and of the kernels' work items of 16384
SIZES = [0, 1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097]
LARGE = [16383, 16384, 16385, 70001]

OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "amsgrad and maximize": {"amsgrad": True, "maximize": True},
    "no decay": {"weight_decay": 0.0},
    "no momentum": {"betas": (0.0, 0.0)},
    "everything": {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.5, "amsgrad": True, "maximize": True},
    "lr is a tensor": {"lr": torch.tensor(0.05)},
    "lr is 0": {"lr": 0.0},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(shapes, dtype=FP32, device="cpu"):
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def clone(params):
    return [p.detach().clone().requires_grad_(p.requires_grad) for p in params]


def train(optimizer, params, steps, seed=1, first=0):
    """Steps with gradients that depend on the step's number only. Every third step has small ones."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for p in params:
            g = torch.randn(p.shape, generator=generator) * (1e-3 if step % 3 == 2 else 1)
            p.grad = g.to(p.device, p.dtype) if p.requires_grad else None
        optimizer.step()


def assert_equal(got, expected, what="parameter"):
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        differ = (x != y).sum().item()
        assert differ == 0, f"{what} {i} of shape {list(x.shape)} differs in {differ} elements"


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
    """Runs adamw_step from random states and holds every element of every result to exact_step."""
    hypers = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}
    hypers |= {"maximize": False, **changes}
    lists = {name: [torch.randn(size).to(device, dtype) for size in sizes] for name in ("p", "g", "m")}
    lists |= {name: [torch.rand(size).to(device, dtype) for size in sizes] for name in ("v", "largest")}
    if grad_scale:
        lists["g"] = [g * min(grad_scale, 1000) for g in lists["g"]]
    lists = {name: [layout(x) for x in column] for name, column in lists.items()}
    before = [tuple(x.clone() for x in row) for row in zip(*lists.values(), strict=True)]
    steps = [torch.tensor(float(t - 1), device=device) for _ in sizes]
    scale = None if grad_scale is None else torch.tensor([grad_scale], device=device)
    columns = list(lists.values()) if hypers["amsgrad"] else [*list(lists.values())[:4], []]
    adamw_step(*columns, steps, **hypers, grad_scale=scale)

    assert all(step == t for step in steps)
    for i, row in enumerate(before):
        assert torch.equal(lists["g"][i], row[1]), "the gradient was changed"
        exact = exact_step(*row, t, **hypers, grad_scale=grad_scale or 1.0)
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


@pytest.mark.parametrize("amsgrad", [False, True])
def test_reference_backend_steps_the_optimizer(device, amsgrad, monkeypatch):
    ours = make([17, (5, 7)], device=device)
    theirs = clone(ours)
    monkeypatch.setenv("FUSETUNE_BACKEND", "reference")
    train(AdamW([{"params": ours[:1], "lr": 0.1}, {"params": ours[1:]}], amsgrad=amsgrad), ours, 4)
    groups = [{"params": theirs[:1], "lr": 0.1}, {"params": theirs[1:]}]
    train(torch.optim.AdamW(groups, amsgrad=amsgrad, foreach=False), theirs, 4)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_groups_have_their_own_options_and_dtypes_may_mix(backend):
    """One optimizer of five groups steps as ten of one parameter each."""
    names = ["defaults", "everything", "no momentum", "maximize", "no decay"]
    sizes = [64, 33, 96, 32, 160, 1, 32, 17, 64, 320]
    together = [make([s], dtype, backend.device)[0] for s, dtype in zip(sizes, itertools.cycle(DTYPES), strict=False)]
    apart = clone(together)
    optimizer = AdamW([{"params": together[2 * i : 2 * i + 2], **OPTIONS[name]} for i, name in enumerate(names)])
    optimizers = [AdamW([p], **OPTIONS[names[i // 2]]) for i, p in enumerate(apart)]
    for step in range(4):
        train(optimizer, together, 1, first=step)
        for p, q, single in zip(together, apart, optimizers, strict=True):
            q.grad = p.grad.clone()
            single.step()
    assert_equal(together, apart)


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


@pytest.mark.parametrize("odd", ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_any_list_may_be_strided(backend, odd):
    hypers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True}
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"]
    plain = {name: torch.rand(6, 5, device=backend.device) for name in names}
    strided = {name: transposed(t) if name == odd else t.clone() for name, t in plain.items()}
    for tensors in (plain, strided):
        adamw_step(*([t] for t in tensors.values()), [torch.zeros((), device=backend.device)], **hypers)
    for name in names:
        assert torch.equal(plain[name], strided[name]), name


def test_parameters_without_gradient_are_skipped(backend):
    params = make([16, 17, 18], device=backend.device)
    params[1].requires_grad_(False)
    before = clone(params)
    optimizer = AdamW(params, lr=0.1)
    train(optimizer, params, 2)
    assert torch.equal(params[1], before[1])
    assert params[1] not in optimizer.state
    params[1].requires_grad_(True)  # thawed, and another frozen, between steps
    params[0].requires_grad_(False)
    frozen = params[0].detach().clone()
    train(optimizer, params, 3)
    assert torch.equal(params[0], frozen)
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 3, 5]


def test_no_gradients_at_all(backend):
    params = make([16], device=backend.device)
    before = clone(params)
    AdamW(params).step()
    assert_equal(params, before)
    adamw_step([], [], [], [], [], [], lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)


def test_groups_added_between_steps(backend):
    params = make([16, 17], device=backend.device)
    alone = clone(params)
    optimizer = AdamW(params[:1])
    train(optimizer, params[:1], 2)
    optimizer.add_param_group({"params": params[1:], "lr": 0.1})
    first = AdamW(alone[:1])
    train(first, alone[:1], 2)
    train(optimizer, params, 2, first=2)
    train(first, alone[:1], 2, first=2)
    assert torch.equal(params[0], alone[0])
    assert optimizer.state[params[1]]["step"] == 2
    assert not torch.equal(params[1], alone[1])


def test_gradients_of_one_step_may_lie_elsewhere_in_the_next(backend):
    p = make([1000], device=backend.device)
    q = clone(p)
    keep = []
    ours, theirs = AdamW(p), AdamW(q)
    for step in range(4):
        train(ours, p, 1, first=step)
        keep.append(p[0].grad)
        q[0].grad = q[0].grad if step else torch.empty_like(q[0])
        with torch.no_grad():
            q[0].grad.copy_(p[0].grad)
        theirs.step()
    assert_equal(p, q)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW], ids=["from ours", "from torch"])
@pytest.mark.parametrize("second", [AdamW, torch.optim.AdamW], ids=["to ours", "to torch"])
def test_state_dicts_carry_on_both_ways(backend, first, second, kind, amsgrad):
    """Three steps of one, saved, and three of the other are as six of torch's."""
    options = {"lr": 0.01, "amsgrad": amsgrad, "weight_decay": 0.1, **kind}
    params = make([64, (32, 3)], device=backend.device)
    moved, unbroken = clone(params), clone(params)
    optimizer = first(moved, **options)
    train(optimizer, moved, 3)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))  # as torch.save does
    optimizer = second(moved, **options)
    optimizer.load_state_dict(saved)
    train(optimizer, moved, 3, first=3)
    stock = torch.optim.AdamW(unbroken, **options)
    train(stock, unbroken, 6)

    for p, q in zip(moved, unbroken, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
        if backend.name == "cpu" and kind == {"fused": True}:
            assert torch.equal(p, q)
        state, expected = optimizer.state[p], stock.state[q]
        assert state.keys() == expected.keys()
        assert state["step"] == 6
        assert state["step"].dtype == torch.float32
        assert all(state[name].dtype == p.dtype and state[name].device == p.device for name in state.keys() - {"step"})
    assert optimizer.state_dict()["param_groups"] == stock.state_dict()["param_groups"]


def test_state_of_other_dtypes_is_taken_as_torch_takes_it():
    """Half-precision parameters load a float32 state; a step count that is a number becomes a tensor."""
    params = make([64], BF16)
    saved = AdamW(clone(params)).state_dict()
    saved["state"] = {0: {"step": 5, "exp_avg": torch.rand(64), "exp_avg_sq": torch.rand(64)}}
    optimizer = AdamW(params)
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1)
    state = optimizer.state[params[0]]
    assert state["step"].item() == 6
    assert state["exp_avg"].dtype == BF16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_carry_on_alike(backend, copied):
    params = make([64, 17], device=backend.device)
    optimizer = AdamW(params, lr=0.01)
    train(optimizer, params, 2)
    their_params, theirs = copied((params, optimizer))
    assert type(theirs) is AdamW
    train(optimizer, params, 2, first=2)
    train(theirs, their_params, 2, first=2)
    assert_equal(params, their_params)
    # still the one that takes the scale itself, so that GradScaler leaves gradients alone
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=4.0)
    scaler.scale(their_params[0].sum()).backward()
    before = [p.grad.clone() for p in their_params]
    scaler.step(theirs)
    assert_equal([p.grad for p in their_params], before, "gradient")


def test_is_torchs_adamw_to_others():
    params = make([3])
    ours, theirs = AdamW(params), torch.optim.AdamW(params)
    assert isinstance(ours, torch.optim.AdamW)
    assert ours.defaults == theirs.defaults
    assert ours.state_dict() == theirs.state_dict()
    positional = (0.1, (0.5, 0.6), 1e-3, 0.2, True)
    assert AdamW(params, *positional).defaults == torch.optim.AdamW(params, *positional).defaults
    assert "closure" in inspect.signature(ours.step).parameters
    assert AdamW(params, foreach=True).defaults["foreach"]
    assert AdamW(params, fused=True).defaults["fused"]
    assert AdamW([("weight", params[0])]).state_dict()["param_groups"][0]["param_names"] == ["weight"]


def test_closure(backend):
    (p,) = make([16], device=backend.device)
    optimizer = AdamW([p], lr=0.1)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.step() is None


def test_hooks_run_once_and_in_order(backend):
    (p,) = make([16], device=backend.device)
    optimizer, calls = AdamW([p]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append(("before", p.detach().clone())))
    optimizer.register_step_post_hook(lambda *_: calls.append(("after", p.detach().clone())))
    train(optimizer, [p], 1)
    assert [name for name, _ in calls] == ["before", "after"]
    assert not torch.equal(calls[0][1], calls[1][1])
    assert torch.equal(calls[1][1], p)


def test_stepping_in_backward(backend):
    params = make([16, 17], device=backend.device)
    expected = clone(params)
    optimizers = {p: AdamW([p], lr=0.1) for p in params}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in params:
        p.register_post_accumulate_grad_hook(step)
    sum(p.square().sum() for p in params).backward()
    optimizer = AdamW(expected, lr=0.1)
    sum(p.square().sum() for p in expected).backward()
    optimizer.step()
    assert_equal(params, expected)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    params = make([16])
    optimizer = AdamW(params)
    train(optimizer, params, 1)
    optimizer.zero_grad(set_to_none)
    assert params[0].grad is None if set_to_none else not params[0].grad.any()


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),  # cycles beta1 as well
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
}


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(backend, scheduler, lr):
    params = make([64], device=backend.device)
    ours, theirs = params, clone(params)
    for p, optimizer in (
        (ours, AdamW(ours, lr=copy.deepcopy(lr))),
        (theirs, torch.optim.AdamW(theirs, lr=copy.deepcopy(lr), foreach=False)),
    ):
        schedule = SCHEDULERS[scheduler](optimizer)
        for step in range(6):
            train(optimizer, p, 1, first=step)
            schedule.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-8)


def test_grad_scaler_skips_a_step_with_an_infinite_gradient(backend):
    kind = backend.device.type
    params = make([64, 17], device=backend.device)
    plain = clone(params)
    scaler, optimizer = torch.amp.GradScaler(kind, init_scale=2.0**14, growth_interval=2), AdamW(params, lr=0.1)
    expected = AdamW(plain, lr=0.1)
    factors, scales = [1.0, 2.0, math.inf, 3.0], []
    for factor in factors:
        optimizer.zero_grad()
        scaler.scale(factor * sum(p.square().sum() for p in params)).backward()
        before = clone(params), copy.deepcopy(optimizer.state_dict()["state"]), [p.grad.clone() for p in params]
        scaler.step(optimizer)
        assert_equal([p.grad for p in params], before[2], "scaled gradient")
        if factor == math.inf:
            assert_equal(params, before[0])
            for i, state in optimizer.state_dict()["state"].items():
                assert all(torch.equal(state[name], before[1][i][name]) for name in state)
        else:
            expected.zero_grad()
            (factor * sum(p.square().sum() for p in plain)).backward()
            expected.step()
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [2.0**14, 2.0**15, 2.0**14, 2.0**14]
    assert_equal(params, plain)  # scales are powers of two, which divide without rounding
    assert not hasattr(optimizer, "grad_scale")
    assert optimizer.state[params[0]]["step"] == 3


def test_grad_scaler_after_unscaling_and_clipping(backend):
    params = make([64], device=backend.device)
    plain = clone(params)
    scaler, optimizer = torch.amp.GradScaler(backend.device.type, init_scale=2.0**10), AdamW(params, lr=0.1)
    scaler.scale(params[0].square().sum()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    scaler.step(optimizer)
    plain[0].square().sum().backward()
    torch.nn.utils.clip_grad_norm_(plain, 1.0)
    AdamW(plain, lr=0.1).step()
    assert_equal(params, plain)


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


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_unsupported_options(option):
    with pytest.raises(
        NotImplementedError, match=f"^AdamW: {option} must be False, got True; torch.optim.AdamW has it"
    ):
        AdamW(make([3]), **{option: True})
    optimizer = AdamW(make([3]))
    with pytest.raises(NotImplementedError, match=f"^AdamW: {option} must be False"):
        optimizer.add_param_group({"params": make([3]), option: True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ],
)
def test_invalid_options_raise_as_in_torch(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW(make([3]), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_unsupported_dtypes(dtype):
    p = torch.zeros(3, dtype=dtype, requires_grad=True)
    p.grad = torch.ones_like(p)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"adamw_step: params must be float32, bfloat16, float16, got {name}"):
        AdamW([p]).step()


def test_sparse_gradients_raise():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"adamw_step: grads must be dense, got torch\.sparse_coo; use torch.optim.SparseAdam"
    ):
        AdamW(embedding.parameters()).step()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda t: t[:2], ValueError, r"must have the parameter's shape \[4, 3\], got \[2, 3\]"),
        (lambda t: t.T.contiguous(), ValueError, r"must have the parameter's shape \[4, 3\], got \[3, 4\]"),
        (lambda t: t.bfloat16(), TypeError, "must be float32, got bfloat16"),
        (lambda t: t.to("meta"), ValueError, "must be on cpu, got meta"),
    ],
    ids=["shorter", "other shape", "other dtype", "other device"],
)
def test_a_state_that_does_not_fit_its_parameter_raises(name, broken, error, message):
    """As after loading the checkpoint of another rank, or after model.half() or model.to() between steps."""
    params = make([(4, 3)])
    optimizer = AdamW(params, amsgrad=True)
    train(optimizer, params, 1)
    optimizer.state[params[0]][name] = broken(optimizer.state[params[0]][name])
    with pytest.raises(error, match=f"adamw_step: {name}s {message}"):
        train(optimizer, params, 1)


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
