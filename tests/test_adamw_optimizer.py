"""fusetune.AdamW as an optimizer at every backend: groups, state_dict, GradScaler, schedulers, hooks, errors."""

import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
from steps import BF16, DTYPES, OPTIONS, assert_equal, clone, make, train

from fusetune.optim.adamw import AdamW

OP = "adamw"


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
    assert AdamW(params, capturable=True).defaults["capturable"]
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


def test_differentiable_is_refused():
    message = r"^AdamW: differentiable must be False, got True; torch\.optim\.AdamW has it"
    with pytest.raises(NotImplementedError, match=message):
        AdamW(make([3]), differentiable=True)
    optimizer = AdamW(make([3]))
    with pytest.raises(NotImplementedError, match=message):
        optimizer.add_param_group({"params": make([3]), "differentiable": True})


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
        (lambda t: t.double(), TypeError, r"must be float32(, bfloat16)?, got float64"),
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
