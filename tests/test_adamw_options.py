"""fusetune.AdamW's own options, and its tables, which are kept from step to step."""

import copy
import gc
import math
import pickle
import random
import weakref

import pytest
import torch
from steps import BF16, FP16, FP32, assert_equal, clone, make, train

from fusetune.optim.adamw import AdamW

OP = "adamw"


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", FP32), ("bfloat16", BF16), ("int8", torch.int8), ("int8", torch.uint8)]
)
def test_state_dtypes_have_two_names(name, dtype):
    params = make([4096, 4095])
    kept = {"float32": FP32, "bfloat16": BF16, "int8": torch.uint8}[name]
    for option in (name, dtype):
        optimizer = AdamW(params, state_dtype=option)
        train(optimizer, params, 1)
        assert optimizer.param_groups[0]["state_dtype"] == name
        for p, expected in zip(params, (kept, FP32 if name == "int8" else kept), strict=True):
            moments = [
                x for key, x in optimizer.state[p].items() if key in ("exp_avg", "exp_avg_sq", "state1", "state2")
            ]
            assert [x.dtype for x in moments] == [expected, expected]


def test_groups_have_their_own_forms(backend):
    """One optimizer of five groups steps as five optimizers."""
    forms = [
        {},
        {"state_dtype": "float32"},
        {"master_weights": "fp32"},
        {"master_weights": "split16", "state_dtype": "float32"},
        {"stochastic_rounding": True, "rounding_seed": 5},
    ]
    together = [make([100], BF16, backend.device)[0] for _ in forms]
    apart = clone(together)
    optimizer = AdamW([{"params": [p], **form} for p, form in zip(together, forms, strict=True)])
    single = [AdamW([{"params": [p], **form}]) for p, form in zip(apart[:-1], forms, strict=False)]
    for step in range(3):
        train(optimizer, together, 1, first=step)
        for p, q, other in zip(together, apart, single, strict=False):
            q.grad = p.grad.clone()
            other.step()
    assert_equal(together[:-1], apart[:-1])


def test_stochastic_rounding_is_reproducible(backend):
    """By torch's generator, and it differs by parameter, step and seed."""
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        params = [torch.ones(500, dtype=BF16, device=backend.device).requires_grad_() for _ in range(2)]
        optimizer = AdamW(params, lr=1e-3, stochastic_rounding=True)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(params)
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][0], results[0][1])
    assert len(set(results[0][0].tolist())) > 1


def test_copies_keep_options():
    params = make([4097], BF16)
    options = {"state_dtype": "int8", "stochastic_rounding": True, "max_grad_norm": 1.0}
    optimizer = AdamW(params, **options)
    train(optimizer, params, 1)
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        their_params, theirs = copied((params, optimizer))
        assert theirs.defaults == optimizer.defaults
        theirs.add_param_group({"params": make([3], BF16)})
        group = theirs.param_groups[1]
        assert group["rounding_seed"] == optimizer.param_groups[0]["rounding_seed"]
        assert group["state_dtype"] == "int8"
        mine = clone(params)
        continued = AdamW(mine, **options)
        continued.load_state_dict(optimizer.state_dict())
        train(continued, mine, 2, first=1)
        train(theirs, their_params, 2, first=1)
        assert_equal(mine, their_params)


WRONG = {
    "state_dtype": ({"state_dtype": "int4"}, "state_dtype must be one of float32, bfloat16, int8, or None"),
    "state_dtype as a dtype": ({"state_dtype": torch.int32}, "state_dtype must be one of float32, bfloat16, int8"),
    "master_weights": ({"master_weights": "bf16"}, "master_weights must be one of none, fp32, split16, got bf16"),
    "masters of float32": (
        {"master_weights": "fp32"},
        "parameters must be bfloat16 or float16 with master_weights=fp32",
    ),
    "rounding of float32": ({"stochastic_rounding": True}, "parameters must be bfloat16 with stochastic_rounding, got"),
    "rounding of a master": (
        {"stochastic_rounding": True, "master_weights": "split16"},
        "stochastic_rounding must be False with master_weights=split16",
    ),
    "another clip": (
        {"max_grad_norm": 2.0},
        "max_grad_norm must be the same in all groups; give it to the constructor",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(options, message):
    params = make([3, 4])
    optimizer = AdamW(params[:1], max_grad_norm=1.0)
    train(optimizer, params[:1], 1)
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=f"^AdamW: {message}"):
        optimizer.add_param_group({"params": params[1:], **options})
    assert [dict(group) for group in optimizer.param_groups] == groups
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, params, 1)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_norm_to_clip_to_is_positive(bad):
    with pytest.raises(ValueError, match=r"^AdamW: max_grad_norm must be a positive number"):
        AdamW(make([3]), max_grad_norm=bad)


def test_float16_has_no_split_weights():
    with pytest.raises(ValueError, match=r"^AdamW: parameters must be bfloat16 with master_weights=split16"):
        AdamW(make([3], FP16), master_weights="split16")


@pytest.mark.parametrize("bound", [1e-2, 1.0, 1e4])
def test_clipping_is_of_all_groups_together(backend, bound):
    """As clip_grad_norm_ before the step, in float32 and 16 bits; gradients stay as they are."""
    params = make([300, 17], device=backend.device) + make([40], FP16, backend.device)
    expected = clone(params)
    optimizer = AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], max_grad_norm=bound)
    stock = AdamW([{"params": expected[:1], "lr": 0.1}, {"params": expected[1:]}])
    for step in range(3):
        for p, q in zip(params, expected, strict=True):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            q.grad = p.grad.clone()
        exact = torch.cat([p.grad.double().flatten() for p in params]).norm()
        before = [p.grad.clone() for p in params]
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm.double(), exact, rtol=2 * torch.finfo(FP32).eps, atol=0)
        assert optimizer.grad_norm.shape == ()
        assert_equal([p.grad for p in params], before, "gradient")
        torch.nn.utils.clip_grad_norm_(expected[:2], math.inf)  # checks that they are finite, and scales by 1
        factor = min(1.0, bound / (exact.item() + 1e-6))
        for q in expected:
            q.grad.mul_(factor)
        stock.step()
    for p, q in zip(params, expected, strict=True):
        eps = torch.finfo(p.dtype).eps
        lr = 0.1 if p is params[0] else 1e-3
        # a gradient that is rounded here and not there: 10 roundings of three steps of 3^(1/2) lr
        torch.testing.assert_close(p, q, rtol=4 * eps, atol=30 * lr * eps if p.dtype == FP32 else 30 * lr * eps + eps)


def test_scaled_gradients_are_clipped_by_their_true_norm(backend):
    params = make([64, 17], device=backend.device)
    plain = clone(params)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=2.0**10)
    optimizer, expected = AdamW(params, lr=0.1, max_grad_norm=0.5), AdamW(plain, lr=0.1, max_grad_norm=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(sum(p.square().sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
        expected.zero_grad()
        sum(p.square().sum() for p in plain).backward()
        expected.step()
        assert torch.equal(optimizer.grad_norm, expected.grad_norm)
    assert_equal(params, plain)


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_free_after_zero_grad(count):
    params = make([100] * count)
    if count > 1:
        params[1] = torch.randn(10, 10).T.requires_grad_()  # which the kernels copy
    optimizer = AdamW(params)
    for step in range(2):
        train(optimizer, params, 1, first=step)
        grads = [weakref.ref(p.grad) for p in params]
        optimizer.zero_grad()
        gc.collect()
        assert [ref() for ref in grads] == [None] * count


def test_an_lr_tensor_may_change_in_place(backend):
    params = make([40, 7], device=backend.device)
    expected = clone(params)
    lr = torch.tensor(0.1, device=backend.device)
    optimizer, stock = AdamW(params, lr=lr), AdamW(expected, lr=0.1)
    for step in range(4):
        optimizer.param_groups[0]["lr"].fill_(0.1 / (step + 1))
        stock.param_groups[0]["lr"] = lr.item()
        train(optimizer, params, 1, first=step)
        train(stock, expected, 1, first=step)
    assert_equal(params, expected)


def test_parameters_of_one_list_may_move_between_groups():
    params = make([8, 8, 8])
    optimizer = AdamW([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.0, "weight_decay": 0.0}])
    train(optimizer, params, 1)
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    before = clone(params)
    train(optimizer, params, 1, first=1)
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [False, True, True]


# What a script may do between two steps, to an optimizer of two groups and its parameters.
def replace_parameter(optimizer, rng):
    group = rng.choice(optimizer.param_groups)
    i = rng.randrange(len(group["params"]))
    old = group["params"][i]
    group["params"][i] = new = (old.detach() * 0.5).requires_grad_()
    if old in optimizer.state and rng.random() < 0.5:
        optimizer.state[new] = optimizer.state.pop(old)
    else:
        optimizer.state.pop(old, None)


def any_parameter(optimizer, rng):
    return rng.choice([p for group in optimizer.param_groups for p in group["params"]])


def exchange_data(optimizer, rng):
    p = any_parameter(optimizer, rng)
    p.data = p.data * 0.5


def transpose_data(optimizer, rng):
    p = any_parameter(optimizer, rng)
    if p.dim() == 2 and p.shape[0] == p.shape[1]:
        p.grad = None
        p.data = p.data.T


def clear_state(optimizer, rng):
    optimizer.state.pop(any_parameter(optimizer, rng), None)


def clear_all_states(optimizer, rng):
    optimizer.state.clear()


def exchange_states(optimizer, rng):
    p, q = (optimizer.param_groups[0]["params"][i] for i in (0, 1))
    if p.shape == q.shape and p in optimizer.state and q in optimizer.state:
        optimizer.state[p], optimizer.state[q] = optimizer.state[q], optimizer.state[p]


def exchange_entry(optimizer, rng):
    state = optimizer.state.get(any_parameter(optimizer, rng))
    if state:
        name = rng.choice(["exp_avg", "exp_avg_sq", "step"])
        state[name] = state[name] + 1


def exchange_entry_data(optimizer, rng):
    state = optimizer.state.get(any_parameter(optimizer, rng))
    if state:
        state["exp_avg"].data = state["exp_avg"].data * 2


def narrow_entry(optimizer, rng):
    state = optimizer.state.get(any_parameter(optimizer, rng))
    if state:
        state.update({name: x.bfloat16() for name, x in state.items() if name != "step"})


def host_step(optimizer, rng):
    state = optimizer.state.get(any_parameter(optimizer, rng))
    if state:
        state["step"] = int(state["step"])


def change_options(optimizer, rng):
    group = rng.choice(optimizer.param_groups)
    group["lr"] = rng.choice([0.1, 0.01, torch.tensor(0.05), torch.tensor(0.05, dtype=torch.float64)])
    group["maximize"] = rng.random() < 0.5
    group["amsgrad"] = rng.random() < 0.5


def move_between_groups(optimizer, rng):
    first, second = optimizer.param_groups[:2]
    if len(first["params"]) > 2:
        second["params"].insert(0, first["params"].pop())
    else:
        first["params"].append(second["params"].pop(0))


def add_group(optimizer, rng):
    if len(optimizer.param_groups) < 4:
        p = torch.randn(6, generator=torch.Generator().manual_seed(rng.randrange(99))).requires_grad_()
        optimizer.add_param_group({"params": [p]})


def reload(optimizer, rng):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [
    *(replace_parameter, exchange_data, transpose_data, clear_state, clear_all_states, exchange_states, exchange_entry),
    *(exchange_entry_data, narrow_entry, host_step, change_options, move_between_groups, add_group, reload),
    lambda optimizer, rng: None,
]


def random_run(seed, kept):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    params = make([(8, 8), (8, 8), (3, 5), 1, (4, 4)])
    optimizer = AdamW([{"params": params[:3]}, {"params": params[3:]}], lr=0.05, max_grad_norm=3.0)
    frozen = set()
    for step in range(40):
        rng.choice(CHANGES)(optimizer, rng)
        if rng.random() < 0.2:
            frozen ^= {rng.randrange(5)}
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            g = torch.randn(p.shape, generator=generator)
            if i in frozen:
                p.grad = None
            elif p.grad is not None and rng.random() < 0.3:
                p.grad.copy_(g)
            else:
                p.grad = rng.choice([g, g.T.contiguous().T if g.dim() == 2 else g])
        if not kept:
            optimizer.__dict__.pop("_tables", None)
        optimizer.step()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(x for p in params for x in optimizer.state[p].values()), optimizer.grad_norm]


@pytest.mark.parametrize("seed", range(20))
def test_kept_tables_notice_every_change(seed):
    """They step as those that are made anew for each step."""
    for x, y in zip(random_run(seed, kept=True), random_run(seed, kept=False), strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))
