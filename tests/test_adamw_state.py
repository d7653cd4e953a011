"""fusetune.AdamW's state: resumed in every form, and converted from that of other optimizers and back."""

import copy
import io
import math

import pytest
import torch
from steps import BF16, FP16, FP32, assert_equal, clone, make, train

from fusetune.ops.quantize import dynamic_map
from fusetune.optim.adamw import AdamW

OP = "adamw"
FORMS = {
    "plain": (FP32, {}),
    "plain bfloat16": (BF16, {}),
    "amsgrad": (FP32, {"amsgrad": True}),
    "bfloat16 states": (FP32, {"state_dtype": "bfloat16"}),
    "float32 states": (BF16, {"state_dtype": "float32", "amsgrad": True}),
    "8-bit states": (FP32, {"state_dtype": "int8"}),
    "8-bit states of bfloat16": (BF16, {"state_dtype": torch.int8}),
    "master": (BF16, {"master_weights": "fp32", "state_dtype": "float32"}),
    "master of float16": (FP16, {"master_weights": "fp32", "state_dtype": "int8"}),
    "split": (BF16, {"master_weights": "split16"}),
    "stochastic": (BF16, {"stochastic_rounding": True}),
    "stochastic with float32 states": (BF16, {"stochastic_rounding": True, "state_dtype": "float32"}),
    "clipped": (FP32, {"max_grad_norm": 0.5}),
}
forms = pytest.mark.parametrize(("dtype", "options"), FORMS.values(), ids=FORMS)


def saved(optimizer):
    """What torch.save keeps of its state_dict."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Run:
    """A regression by a small model, whose first weight has more than 4096 elements, and in the end a partial block."""

    def __init__(self, dtype=FP32, make_optimizer=AdamW, **options):
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Linear(67, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32)).to(dtype)
        self.dtype, self.step = dtype, 0
        self.optimizer = make_optimizer(self.model.parameters(), lr=3e-3, **options)

    def losses(self, steps):
        found = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            x = torch.randn(16, 67, generator=generator).to(self.dtype)
            loss = (self.model(x) - x[:, :32].sin()).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            found.append(loss.item())
            self.step += 1
        return found

    def resumed(self, make_optimizer=AdamW, **options):
        """Another that goes on from here, of what torch.save keeps."""
        other = Run(self.dtype, make_optimizer, **options)
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer.load_state_dict(saved(self.optimizer))
        other.step = self.step
        return other


@forms
@pytest.mark.usefixtures("one_thread")
def test_resumes_bit_by_bit(dtype, options):
    torch.manual_seed(1)
    whole, first = Run(dtype, **options), Run(dtype, **options)
    expected, losses = whole.losses(20), first.losses(7)
    second = first.resumed(**options)
    losses += second.losses(6)
    losses += second.resumed(**options).losses(7)
    assert losses == expected


@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW], ids=["from ours", "from torch"])
@pytest.mark.usefixtures("one_thread")
def test_goes_on_as_torchs_fused_step_bit_by_bit(first):
    """Of sizes without tails, which torch rounds otherwise."""
    if (capability := torch.backends.cpu.get_cpu_capability()) not in ("AVX2", "AVX512"):
        pytest.skip(f"torch's kernel has no FMA at {capability}")
    second = torch.optim.AdamW if first is AdamW else AdamW
    expected = Run(make_optimizer=torch.optim.AdamW, fused=True).losses(20)
    run = Run(make_optimizer=first, fused=True)
    losses = run.losses(7)
    losses += run.resumed(second, fused=True).losses(13)
    assert losses == expected


# What a state holds, by other means: float64 values of its moments.
def decoded(state, number):
    x = state[f"state{number}"] if "state1" in state else state[("exp_avg", "exp_avg_sq")[number - 1]]
    if x.dtype != torch.uint8:
        return x.double()
    blocks = [block.long() for block in x.flatten().split(256)]
    scales = state[f"absmax{number}"].double()
    values = [state[f"qmap{number}"].double()[codes] * scale for codes, scale in zip(blocks, scales, strict=True)]
    return torch.cat(values).view(x.shape)


def rounding(x, state, number):
    """The most by which the form of `state` may be off where it stands for x, with room for a float32 rounding."""
    kept = state.get(f"state{number}", state.get(("exp_avg", "exp_avg_sq")[number - 1]))
    if kept.dtype != torch.uint8:
        info = torch.finfo(kept.dtype)
        return x.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2
    errors = []
    for block in x.flatten().split(256):
        scale = block.abs().max()
        nearest = (block[:, None] - dynamic_map(number == 1).double() * scale).abs().amin(1)
        errors.append(nearest + 4 * torch.finfo(FP32).eps * scale)
    return torch.cat(errors).view(x.shape)


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_forms_convert_into_each_other(source, target):
    """The moments are rounded once to what is nearest, and whoever goes on does so from the same weights."""
    dtype, options = FORMS[target]
    if FORMS[source][1].get("amsgrad") and options.get("state_dtype") in ("int8", torch.int8):
        pytest.skip("amsgrad has no 8 bits: test_a_state_with_amsgrad_does_not_load_into_8_bits")
    first_params = make([(67, 64), 300, 0], FORMS[source][0])
    first = AdamW(first_params, **FORMS[source][1])
    train(first, first_params, 3)
    params = [p.detach().to(dtype).requires_grad_() for p in first_params]
    before = clone(params)
    optimizer = AdamW(params, **options)
    optimizer.load_state_dict(saved(first))
    assert_equal(params, before)
    for p, q in zip(first_params, params, strict=True):
        old, new = first.state[p], optimizer.state[q]
        assert new["step"] == 3
        assert new["step"].dtype == FP32
        for number in (1, 2) if p.numel() else ():
            x = decoded(old, number)
            error = (decoded(new, number) - x).abs()
            assert (error <= rounding(x, new, number)).all(), number
        if "max_exp_avg_sq" in old:
            torch.testing.assert_close(new["max_exp_avg_sq"].float(), old["max_exp_avg_sq"].float(), rtol=2**-8, atol=0)

    names = {
        "step",
        *(("state1", "state2") if "int8" in str(options.get("state_dtype")) else ("exp_avg", "exp_avg_sq")),
    }
    names |= {"max_exp_avg_sq"} if FORMS[source][1].get("amsgrad") else set()
    names |= {"fp32": {"master"}, "split16": {"param_lo"}}.get(options.get("master_weights"), set())
    train(optimizer, params, 2, first=3)
    assert set(optimizer.state[params[1]]) == names
    assert all(p.isfinite().all() for p in params)
    assert set(optimizer.param_groups[0]) == set(AdamW(params, **options).param_groups[0])


def full_precision(p, state):
    if "master" in state:
        return state["master"]
    bits = (p.detach().view(torch.int16).long() << 16) + state["param_lo"].long()
    return bits.int().view(FP32)


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize(("first", "second"), [("fp32", "split16"), ("split16", "fp32")])
def test_masters_convert_into_each_other(first, second, model_first):
    """Whichever of model and optimizer is loaded first."""
    params = make([(5, 7), 4096], BF16)
    optimizer = AdamW(params, master_weights=first, state_dtype="float32", lr=1e-3)
    train(optimizer, params, 3)
    others = make([(5, 7), 4096], BF16)
    other = AdamW(others, master_weights=second, state_dtype="float32", lr=1e-3)
    loads = [lambda: other.load_state_dict(saved(optimizer)), lambda: torch._foreach_copy_(list(others), params)]
    with torch.no_grad():
        for load in reversed(loads) if model_first else loads:
            load()
    for p in others:  # a step that changes nothing
        p.grad = torch.zeros_like(p)
    for group in other.param_groups:
        group["lr"] = 0.0
    other.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(full_precision(p, optimizer.state[p]), full_precision(q, other.state[q]))


def test_a_tie_of_a_master_loses_one_unit_and_never_moves_the_parameter():
    """Half way between two bfloat16 numbers, which fp32 masters round to even and split16 away from 0."""
    master = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(FP32)
    p = master.bfloat16().requires_grad_()
    before = p.detach().clone()
    optimizer = AdamW([p], lr=0.0, master_weights="split16", state_dtype="float32")
    state = {"step": 1.0, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "master": master}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    difference = full_precision(p, optimizer.state[p]).view(torch.int32) - master.view(torch.int32)
    assert difference.tolist() == [-1, 0]


@pytest.mark.parametrize("weights", ["fp32", "split16"])
def test_masters_that_torch_did_not_step_are_made_anew(weights):
    """torch.optim.AdamW keeps what it does not know, in the parameter's dtype."""
    params = make([(5, 7)], BF16)
    optimizer = AdamW(params, master_weights=weights)
    train(optimizer, params, 2)
    stock = torch.optim.AdamW(params)
    stock.load_state_dict(saved(optimizer))
    train(stock, params, 2, first=2)
    optimizer = AdamW(params, master_weights=weights, lr=0.0)
    optimizer.load_state_dict(saved(stock))
    optimizer.param_groups[0]["lr"] = 0.0
    before = clone(params)
    train(optimizer, params, 1, first=4)
    assert_equal(params, before)


# States of other optimizers: of m, v, the step count and the parameter's number.
def of_torch(step):
    return lambda m, v: {"step": step, "exp_avg": m, "exp_avg_sq": v}


class LowBit(torch.Tensor):
    """As torchao's: a tensor whose values are what `dequantize` gives."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __init__(self, x):
        self.x = x

    def dequantize(self, output_dtype=None):
        return self.x.clone()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].x)
        raise NotImplementedError(func)


GROUP = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SOURCES = {
    "a tensor": (of_torch(torch.tensor(5.0)), {}),
    "a number": (of_torch(5), {}),
    "a float": (of_torch(5.0), {}),
    "other dtypes": (of_torch(torch.tensor([5], dtype=torch.int64)), {}),
    "apex": (lambda m, v: {"exp_avg": m, "exp_avg_sq": v}, {"step": 5, "bias_correction": True}),
    "apex, capturable": (
        lambda m, v: {"exp_avg": m, "exp_avg_sq": v},
        {"step": torch.tensor([5], dtype=torch.int32), "bias_correction": 1, "adam_w_mode": 1},
    ),
    "DeepSpeed": (of_torch(5), {"bias_correction": True, "amsgrad": False}),
    "bitsandbytes, 32 bits": (lambda m, v: {"step": 5, "state1": m, "state2": v}, {"alpha": 0.0, "t_alpha": None}),
    "bitsandbytes, wrapped": (
        lambda m, v: {"step": 5, "__bnb_optimizer_quant_state__": {"state1": m, "state2": v}},
        {},
    ),
    "torchao": (lambda m, v: {"step": torch.tensor(5.0), "exp_avg": LowBit(m), "exp_avg_sq": LowBit(v)}, {}),
    "torch.optim.Adam": (of_torch(torch.tensor(5.0)), {"decoupled_weight_decay": False}),
}


@pytest.mark.parametrize(("state", "group"), SOURCES.values(), ids=SOURCES)
def test_states_of_other_optimizers(state, group):
    """Two steps from them are as two of torch's, from its own state. What a group lacks is as this optimizer has it."""
    params = make([64, (32, 3)])
    theirs = clone(params)
    moments = [(torch.randn_like(p).detach(), torch.rand_like(p).detach()) for p in params]
    states = {i: of_torch(torch.tensor(5.0))(*(x.clone() for x in pair)) for i, pair in enumerate(moments)}
    stock = torch.optim.AdamW(theirs, **GROUP, fused=True)
    stock.load_state_dict({"state": states, "param_groups": stock.state_dict()["param_groups"]})
    optimizer = AdamW(params, **GROUP)
    own = GROUP if "alpha" in group else {}
    saved_group = {**own, **group, "params": [0, 1]}
    optimizer.load_state_dict(
        {"state": dict(enumerate(state(*pair) for pair in moments)), "param_groups": [saved_group]}
    )
    assert optimizer.param_groups[0]["decoupled_weight_decay"]
    assert "step" not in optimizer.param_groups[0]
    kept = [[x.clone() for x in pair] for pair in moments]
    train(optimizer, params, 2)
    train(stock, theirs, 2)
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert optimizer.state[p]["step"] == 7
        assert optimizer.state[p]["step"].shape == ()
    for pair, before in zip(moments, kept, strict=True):
        assert_equal(pair, before, "saved state")


def test_a_missing_step_count_is_0_and_a_missing_state_new():
    params = make([3, 4, 5])
    optimizer = AdamW(params)
    states = {0: {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}, 1: {}}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    train(optimizer, params, 1)
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 1, 1]
    assert optimizer.state[params[0]]["exp_avg"].mean() > 0.5


def test_amsgrad_begins_where_a_state_lacks_it():
    """torch.optim.AdamW raises a KeyError in its step; 0 is what the maximum begins with."""
    params = make([40])
    optimizer = AdamW(params)
    train(optimizer, params, 2)
    state_dict = saved(optimizer)
    state_dict["param_groups"][0]["amsgrad"] = True
    optimizer.load_state_dict(state_dict)
    train(optimizer, params, 1, first=2)
    state = optimizer.state[params[0]]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


def bitsandbytes():
    return pytest.importorskip("bitsandbytes").optim


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit", "PagedAdamW"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_goes_on_here_and_there(name, dtype):
    params = make([(64, 65), (300,)], dtype)
    optimizer = getattr(bitsandbytes(), name)(params, lr=0.01)
    train(optimizer, params, 3)
    ours = AdamW(params, state_dtype="int8" if name == "AdamW8bit" else "float32")
    ours.load_state_dict(saved(optimizer))
    for i, p in enumerate(params):
        old, new = optimizer.state[p], ours.state[p]
        assert new["step"] == old["step"]
        for number in (1, 2):
            moment = new.get(f"state{number}", new.get(("exp_avg", "exp_avg_sq")[number - 1]))
            assert torch.equal(moment, old[f"state{number}"]), (i, number)
            if name == "AdamW8bit" and i == 0:
                assert torch.equal(new[f"absmax{number}"], old[f"absmax{number}"])
    train(ours, params, 300, first=3)  # further than bfloat16 counts

    ours.param_groups[0]["lr"] = 0.01
    back = getattr(bitsandbytes(), name)(others := clone(params))
    if name != "AdamW8bit":
        ours, plain = AdamW(params, state_dtype="int8"), ours  # its names
        ours.load_state_dict(saved(plain))
    back.load_state_dict(saved(ours))
    assert back.state[others[0]]["step"] == 303
    if name == "AdamW8bit":
        train(back, others, 1, first=303)
        train(ours, params, 1, first=303)
        for p, q in zip(params, others, strict=True):
            # bitsandbytes decays after its update, of a size lr each: lr^2 weight_decay, beside its roundings
            torch.testing.assert_close(p, q, rtol=torch.finfo(dtype).eps, atol=5e-6)


@pytest.mark.parametrize("blocksize", [64, 256, 2048])
@pytest.mark.parametrize("wrapped", [False, True])
def test_codes_of_another_map_and_block(blocksize, wrapped):
    values = [torch.linspace(-1, 1, 256) ** 3, torch.linspace(0, 1, 256) ** 2]
    codes = [torch.randint(256, (90, 100), dtype=torch.uint8) for _ in values]
    scales = [torch.rand(-(-9000 // blocksize)) + 0.5 for _ in values]
    quantized = {}
    for number in (1, 2):
        quantized |= {f"state{number}": codes[number - 1], f"qmap{number}": values[number - 1]}
        quantized |= {f"absmax{number}": scales[number - 1]}
    state = {"step": 4, **({"__bnb_optimizer_quant_state__": quantized} if wrapped else quantized)}
    for options in ({}, {"state_dtype": "int8"}):
        (p,) = make([(90, 100)])
        optimizer = AdamW([p], **options)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        for number in (1, 2):
            scale = scales[number - 1].double().repeat_interleave(blocksize)[:9000].view(90, 100)
            x = values[number - 1].double()[codes[number - 1].long()] * scale
            new = optimizer.state[p]
            assert ((decoded(new, number) - x).abs() <= rounding(x, new, number) + 2**-24 * x.abs()).all()


def broken(optimizer, change):
    state_dict = saved(optimizer)
    change(state_dict)
    return state_dict


def without(*names):
    def change(state_dict):
        for name in names:
            del state_dict["state"][1][name]

    return change


def with_state(**tensors):
    return lambda state_dict: state_dict["state"][1].update(tensors)


def with_group(**options):
    return lambda state_dict: state_dict["param_groups"][0].update(options)


MISFITS = {
    "fewer groups": (lambda s: s["param_groups"].pop(), "loaded state dict has a different number of parameter groups"),
    "fewer parameters": (
        lambda s: s["param_groups"][0]["params"].pop(),
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
    ),
    "another shape": (
        with_state(exp_avg_sq=torch.zeros(5, 7)),
        r"AdamW: exp_avg_sq of parameter 1 \(bias\) must have the parameter's shape \[7, 5\], got \[5, 7\]",
    ),
    "a maximum of another shape": (
        with_state(max_exp_avg_sq=torch.zeros(5)),
        r"AdamW: max_exp_avg_sq of parameter 1 \(bias\) must have the parameter's shape \[7, 5\], got \[5\]",
    ),
    "one moment": (
        without("exp_avg_sq"),
        r"AdamW: state of parameter 1 \(bias\) must have both moments, got step, exp_avg",
    ),
    "not in blocks": (
        with_state(new_max1=torch.zeros(1)),
        r"AdamW: 8-bit states of parameter 1 \(bias\) must be in blocks, got bitsandbytes' new_max1",
    ),
    "codes without a map": (
        with_state(exp_avg=torch.zeros(7, 5, dtype=torch.uint8), absmax1=torch.zeros(1)),
        r"AdamW: qmap1 must be given with 8-bit exp_avg of parameter 1 \(bias\), got none",
    ),
    "blocks of no size": (
        with_state(exp_avg=torch.zeros(7, 5, dtype=torch.uint8), absmax1=torch.zeros(9), qmap1=torch.zeros(256)),
        r"AdamW: absmax1 of parameter 1 \(bias\) must have 1 elements, one for each 256, got 9",
    ),
    "L2 decay": (with_group(adam_w_mode=False), "AdamW: adam_w_mode must be True in a saved group, got False"),
    "no bias correction": (
        with_group(bias_correction=0),
        "AdamW: bias_correction must be True in a saved group, got 0",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_raises_and_changes_nothing(change, message):
    params = make([4, (7, 5), 3])
    optimizer = AdamW(
        [{"params": [("weight", params[0]), ("bias", params[1])]}, {"params": [("last", params[2])]}], amsgrad=True
    )
    train(optimizer, params, 2)
    before, groups = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups
    with pytest.raises(ValueError, match=f"^{message}"):
        optimizer.load_state_dict(broken(optimizer, change))
    assert optimizer.param_groups is groups
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        assert_equal(after["state"][i].values(), state.values())


def test_a_state_with_amsgrad_does_not_load_into_8_bits():
    params = make([4])
    optimizer = AdamW(params, amsgrad=True)
    train(optimizer, params, 1)
    with pytest.raises(NotImplementedError, match=r"^AdamW: amsgrad must be False with state_dtype=int8, got True"):
        AdamW(params, state_dtype="int8").load_state_dict(optimizer.state_dict())


def test_a_saved_group_that_is_differentiable_is_refused():
    params = make([4])
    with pytest.raises(
        NotImplementedError, match=r"^AdamW: differentiable must be False, got True; torch\.optim\.AdamW"
    ):
        AdamW(params).load_state_dict(torch.optim.AdamW(params, differentiable=True).state_dict())


def test_load_hooks_see_what_torchs_do():
    """A pre-hook may put another state_dict in place; a post-hook sees the loaded state."""
    params = make([4])
    first = AdamW(params)
    train(first, params, 3)
    optimizer, seen = AdamW(clone(params)), []
    (q,) = optimizer.param_groups[0]["params"]

    def replace(optimizer, state_dict):
        seen.append(sorted(state_dict["state"]))
        return first.state_dict()

    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[q]["step"].item()))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[q]["exp_avg"].clone()), prepend=True)
    for _ in range(2):  # no hook of ours is left over
        empty = AdamW(params).state_dict()
        optimizer.load_state_dict(empty)
        assert empty["state"] == {}
        assert seen[0] == []
        assert torch.equal(seen[1], first.state[params[0]]["exp_avg"])
        assert seen[2:] == [3.0]
        seen.clear()


def test_entries_of_a_state_that_are_not_adamws_stay():
    """As in torch: those of a parameter in its dtype, others as they are."""
    params = make([4], BF16)
    optimizers = AdamW(params), torch.optim.AdamW(params)
    train(optimizers[0], params, 1)
    state_dict = saved(optimizers[0])
    state_dict["state"][0]["average"] = torch.ones(4)
    state_dict["state"]["run"] = {"name": "first"}
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(state_dict))
        assert optimizer.state[params[0]]["average"].dtype == BF16
        assert optimizer.state["run"] == {"name": "first"}
    assert optimizers[0].state[params[0]].keys() == optimizers[1].state[params[0]].keys()
    train(optimizers[0], params, 1)


def test_loaded_tensors_are_copies():
    params = make([(70, 64)])
    for options in ({}, {"state_dtype": "int8"}):
        first, second = AdamW(params, **options), AdamW(clone(params), **options)
        train(first, params, 1)
        before = copy.deepcopy(first.state_dict())
        second.load_state_dict(first.state_dict())
        train(second, second.param_groups[0]["params"], 2)
        for name, x in first.state_dict()["state"][0].items():
            assert name == "step" or torch.equal(x, before["state"][0][name]), name


def test_own_options_are_the_constructors_and_hyper_parameters_the_saved_ones():
    params = make([4097], BF16)
    first = AdamW(params, lr=0.5, betas=(0.5, 0.6), state_dtype="int8", stochastic_rounding=True, max_grad_norm=1.0)
    train(first, params, 1)
    second = AdamW(params, lr=0.1, master_weights="fp32")
    second.load_state_dict(saved(first))
    (group,) = second.param_groups
    assert (group["lr"], group["betas"]) == (0.5, (0.5, 0.6))
    assert group["master_weights"] == "fp32"
    assert not {"state_dtype", "stochastic_rounding", "rounding_seed", "max_grad_norm"} & group.keys()
    third = AdamW(params, stochastic_rounding=True)
    own = third.param_groups[0]["rounding_seed"]
    third.load_state_dict(saved(second))
    assert third.param_groups[0]["rounding_seed"] == own
    third.load_state_dict(saved(first))
    assert third.param_groups[0]["rounding_seed"] == first.param_groups[0]["rounding_seed"] != own


def test_float32_is_the_way_out_of_8_bits():
    params = make([(65, 64)])
    narrow = AdamW(params, state_dtype="int8")
    train(narrow, params, 2)
    plain = AdamW(params)
    plain.load_state_dict(saved(narrow))
    stock = torch.optim.AdamW(params)
    stock.load_state_dict(saved(plain))
    assert torch.equal(stock.state[params[0]]["exp_avg"].double(), decoded(narrow.state[params[0]], 1).float().double())
    assert math.isclose(stock.state[params[0]]["step"].item(), 2)
    train(stock, params, 1, first=2)
