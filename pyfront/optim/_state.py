"""The optimizer's state: its form by the options, new, completed, and converted from that of other optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusetune._check import check
from fusetune.ops._adamw_table import BLOCK
from fusetune.ops.adamw import join, quantize_state
from fusetune.ops.quantize import dynamic_map
from fusetune.optim._distributed import is_dtensor, like, local

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8", torch.uint8: "int8"}
MASTERS = {"none": "", "fp32": "master", "split16": "param_lo"}
SMALL = 4096  # parameters of fewer elements keep float32 states, as in bitsandbytes
_OPTIONS = ("state_dtype", "master_weights", "stochastic_rounding", "rounding_seed")
_WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes' state_dict hides from FSDP what has not p's shape
_MAXIMA = ("max1", "max2", "new_max1", "new_max2")  # of bitsandbytes' 8 bits without blocks
_FOREIGN_BLOCKS = (2048, 64, 128, 512, 1024, 4096)
_NAMED = {
    *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "param_lo", _WRAPPED, *_MAXIMA),
    *(name + number for name in ("state", "absmax", "qmap") for number in "12"),
}


class Form(NamedTuple):
    """How the parameters of a group keep their state."""

    state_dtype: str | None
    master_weights: str
    amsgrad: bool
    seed: int | None  # of stochastic rounding

    @staticmethod
    def of(group: Mapping[str, Any]) -> Form:
        seed = group.get("rounding_seed", 0) if group.get("stochastic_rounding") else None
        return Form(group.get("state_dtype"), group.get("master_weights") or "none", group["amsgrad"], seed)

    @property
    def master_name(self) -> str:
        """Of the state beside the parameter, or ""."""
        return MASTERS[self.master_weights]

    def moments(self, p: Tensor) -> tuple[str, str]:
        """The names of m and v."""
        return ("state1", "state2") if self.state_dtype == "int8" else ("exp_avg", "exp_avg_sq")

    def dtype(self, p: Tensor) -> torch.dtype:
        """Of m and v; uint8 for 8-bit codes."""
        if self.state_dtype is None:
            return p.dtype
        if self.state_dtype == "int8" and p.numel() < SMALL:
            return torch.float32
        check(
            self.state_dtype != "int8" or not is_dtensor(p),
            NotImplementedError,
            "AdamW: state_dtype must be float32 or bfloat16 with DTensors, got int8, whose blocks are not sharded",
        )
        return STATE_DTYPES[self.state_dtype]


def check_options(group: dict[str, Any]) -> None:
    """Puts a group's options in their form. Raises ValueError and NotImplementedError as AdamW documents."""
    if (dtype := group.get("state_dtype")) is not None:
        name = _NAMES.get(dtype, dtype) if isinstance(dtype, torch.dtype) else dtype
        check(
            name in STATE_DTYPES,
            ValueError,
            f"AdamW: state_dtype must be one of {', '.join(STATE_DTYPES)}, or None for the parameter's, got {dtype}",
        )
        group["state_dtype"] = name
    master = group.get("master_weights") or "none"
    check(
        master in MASTERS,
        ValueError,
        f"AdamW: master_weights must be one of {', '.join(MASTERS)}, got {master}",
    )
    if "master_weights" in group:
        group["master_weights"] = master
    check(
        not (group.get("stochastic_rounding") and master != "none"),
        ValueError,
        f"AdamW: stochastic_rounding must be False with master_weights={master}, which rounds nothing away",
    )
    check(
        not (group["amsgrad"] and group.get("state_dtype") == "int8"),
        NotImplementedError,
        "AdamW: amsgrad must be False with state_dtype=int8, got True; float32 and bfloat16 have it",
    )
    for p in group["params"]:
        name = str(p.dtype).removeprefix("torch.")
        if master != "none":
            allowed = ("bfloat16",) if master == "split16" else ("bfloat16", "float16")
            check(
                name in allowed,
                ValueError,
                f"AdamW: parameters must be {' or '.join(allowed)} with master_weights={master}, got {name}",
            )
        if group.get("stochastic_rounding"):
            check(
                name == "bfloat16",
                ValueError,
                f"AdamW: parameters must be bfloat16 with stochastic_rounding, got {name}",
            )


def complete(have: Mapping[str, Any], p: Any, form: Form, number: int) -> Mapping[str, Any]:
    """`have` itself where it is all that the state of p, the parameter of this number, must be, else a new dict."""
    m, v = form.moments(p)
    dtype = form.dtype(p)
    optional = ("max_exp_avg_sq" if form.amsgrad else "", form.master_name)
    names = ["step", m, v, *filter(None, optional)]
    if dtype == torch.uint8:
        names += ["qmap1", "qmap2", "absmax1", "absmax2"]
    step = have.get("step")
    fits = isinstance(step, Tensor) and step.device == p.device and step.dtype is torch.float32
    fits = fits and all((name in have) == (name == form.master_name) for name in ("master", "param_lo"))
    if fits and all(name in have for name in names):
        return have
    state = dict(have)
    if m not in have or v not in have:
        state = {name: x for name, x in have.items() if name not in _NAMED}
        state |= convert(have, p, form, f"parameter {number}")
    dtype = state[v].dtype if v in state else dtype  # max_exp_avg_sq has that
    new = {name: _new(name, p, dtype, state) for name in names if name not in state}
    state = {name: x for name, x in state.items() if name == form.master_name or name not in ("master", "param_lo")}
    state |= new
    state["step"] = _step(state["step"], p)
    return state


def _step(step: Any, p: Tensor) -> Tensor:
    return torch.as_tensor(step, dtype=torch.float32, device=p.device).reshape(())


def _new(name: str, p: Any, dtype: torch.dtype, state: Mapping[str, Any]) -> Tensor:
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=p.device)
    if name == "master":
        if "param_lo" in state and p.dtype == torch.bfloat16:
            return like(p, join(local(p.detach()), local(state["param_lo"])))
        return p.detach().float()  # type: ignore[no-any-return]
    if name == "param_lo":
        if "master" in state:
            return like(p, _lower_half(local(state["master"]), local(p.detach())))
        return torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
    if name.startswith("absmax"):
        return torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)
    if name.startswith("qmap"):
        return _map(name == "qmap1", p.device)
    if dtype == torch.uint8:
        zero = 127 if name == "state1" else 0  # the code of 0
        return torch.full_like(p, zero, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def _lower_half(master: Tensor, p: Tensor) -> Tensor:
    """What makes p the float32 that is nearest to `master` of those that round to p. At a tie that was rounded towards
    0 that is the number before it."""
    low = master.view(torch.int32).long() - (p.view(torch.int16).long() << 16)
    return low.clamp(-(2**15), 2**15 - 1).short()


_maps: dict[tuple[bool, torch.device], Tensor] = {}


def _map(signed: bool, device: torch.device) -> Tensor:
    """One tensor for all parameters: the state_dict holds it once."""
    key = signed, device
    if key not in _maps:
        _maps[key] = dynamic_map(signed).to(device)
    return _maps[key]


def convert(saved: Mapping[str, Any], p: Any, form: Form, where: str) -> dict[str, Tensor]:
    """The state of p in `form`, in tensors of its own, from that of any optimizer in `load`'s list. What `saved` lacks
    is left out, and a master stays in its form, as p may still be loaded: both is up to `complete`.

    Raises:
        ValueError: `saved` does not fit p, which is named by `where`.
    """
    wrapped = saved.get(_WRAPPED)
    saved = {name: x for name, x in {**saved, **(wrapped or {})}.items() if not isinstance(x, dict)}
    old = [name for name in _MAXIMA if name in saved]
    check(
        not old,
        ValueError,
        f"AdamW: 8-bit states of {where} must be in blocks, got bitsandbytes' {', '.join(old)}; save them in 32 bits",
    )
    state = {}
    if "step" in saved:
        state["step"] = _step(saved["step"], p).clone()
    moments = [_moment(saved, number, p, form, where) for number in (1, 2)]
    check(
        bool(moments[0]) == bool(moments[1]),
        ValueError,
        f"AdamW: state of {where} must have both moments, got {', '.join(saved)}",
    )
    state |= moments[0] | moments[1]
    if form.amsgrad and "max_exp_avg_sq" in saved:
        x = _local(saved["max_exp_avg_sq"], "max_exp_avg_sq", p, where)
        state["max_exp_avg_sq"] = like(p, x.to(p.device, form.dtype(p), copy=True))
    # torch.optim.AdamW does not step masters, and gives what it has loaded the dtype of p.
    for name, dtype in (("master", torch.float32), ("param_lo", torch.int16)):
        if form.master_name and name in saved and saved[name].dtype == dtype:
            state[name] = like(p, _local(saved[name], name, p, where).to(p.device, copy=True))
    return state


def _moment(saved: Mapping[str, Any], number: int, p: Any, form: Form, where: str) -> dict[str, Tensor]:
    """m (number 1) or v (2), with what belongs to it; {} where `saved` has none."""
    signed, out, dtype = number == 1, form.moments(p)[number - 1], form.dtype(p)
    name = next((name for name in ("exp_avg" + "_sq" * (number == 2), f"state{number}") if name in saved), "")
    if not name:
        return {}
    x = _local(saved[name], name, p, where)
    absmax_name, map_name = f"absmax{number}", f"qmap{number}"
    blocks = -(-p.numel() // BLOCK)
    if x.dtype == torch.uint8:
        for other in (absmax_name, map_name):
            check(other in saved, ValueError, f"AdamW: {other} must be given with 8-bit {name} of {where}, got none")
        x, absmax, values = (t.to(p.device) for t in (x, saved[absmax_name], saved[map_name]))
        if dtype == torch.uint8 and absmax.numel() == blocks and torch.equal(values, _map(signed, p.device)):
            absmax = absmax.to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(-1)
            return {out: x.clone(), absmax_name: absmax, map_name: _map(signed, p.device)}
        size = next((b for b in (BLOCK, *_FOREIGN_BLOCKS) if -(-p.numel() // b) == absmax.numel()), 0)
        check(
            size > 0,
            ValueError,
            f"AdamW: {absmax_name} of {where} must have {blocks} elements, one for each {BLOCK}, got {absmax.numel()}",
        )
        scale = absmax.flatten().float().repeat_interleave(size)[: x.numel()]
        x = (values.float()[x.flatten().int()] * scale).view(x.shape)
    if dtype != torch.uint8:
        return {out: like(p, x.to(p.device, dtype, copy=True))}
    codes = torch.empty_like(x, dtype=dtype, device=p.device, memory_format=torch.contiguous_format)
    absmax = torch.empty(blocks, dtype=torch.float32, device=p.device)
    quantize_state(x.to(p.device, torch.float32), codes, absmax, signed=signed)
    return {out: codes, absmax_name: absmax, map_name: _map(signed, p.device)}


def _local(x: Any, name: str, p: Any, where: str) -> Tensor:
    """The plain tensor of this process, of a state that has p's shape and placement."""
    shape = list(x.shape)
    check(
        shape == list(p.shape),
        ValueError,
        f"AdamW: {name} of {where} must have the parameter's shape {list(p.shape)}, got {shape}",
    )
    placements = [tuple(t.placements) if is_dtensor(t) else None for t in (p, x)]
    check(
        placements[0] == placements[1],
        ValueError,
        f"AdamW: {name} of {where} must be placed as the parameter, {placements[0]}, got {placements[1]};"
        " use torch.distributed.checkpoint.state_dict",
    )
    x = local(x.detach())
    if type(x) is not Tensor and type(x).dequantize is not Tensor.dequantize:  # torchao's
        x = x.dequantize()
    return x  # type: ignore[no-any-return]


def load(optimizer: Any, load_groups: Callable[[dict[str, Any]], None], state_dict: Mapping[str, Any]) -> None:
    """`load_state_dict`, in which `load_groups` is torch's. That casts every state to the parameter's dtype, so it sees
    only those that are not an AdamW's; ours are ready before it changes anything, and in place before hooks see them.
    """
    loaded: dict[Tensor, dict[str, Tensor]] = {}

    def take(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups, here = state_dict["param_groups"], optimizer.param_groups
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in here]:
            return state_dict  # and torch raises
        groups = [_with_options(group, saved) for group, saved in zip(here, groups, strict=True)]
        states, number = dict(state_dict["state"]), 0
        for group, saved in zip(here, groups, strict=True):
            form = Form.of(saved)
            for i, (p, index) in enumerate(zip(group["params"], saved["params"], strict=True)):
                if index in states:
                    names = group.get("param_names")
                    where = f"parameter {number}" + (f" ({names[i]})" if names else "")
                    state = states[index]
                    if state and "step" not in state:  # apex has one of the group
                        state = {"step": saved.get("step", 0.0), **state}
                    loaded[p] = convert(state, p, form, where)
                    others = {name: x for name, x in state.items() if name not in _NAMED}
                    states[index] = {"step": loaded[p]["step"], **others} if others else {}
                number += 1
            saved.pop("step", None)
        return {**state_dict, "state": states, "param_groups": groups}

    def put(_: Any) -> None:
        for p, state in loaded.items():
            optimizer.state[p].update(state)

    with (
        optimizer.register_load_state_dict_pre_hook(take),  # the last
        optimizer.register_load_state_dict_post_hook(put, prepend=True),
    ):
        load_groups(dict(state_dict))


def _with_options(here: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with this optimizer's own options, and its hyper-parameters where the saved one has none."""
    for name in ("bias_correction", "adam_w_mode"):  # apex's and DeepSpeed's
        check(
            bool(saved.get(name, True)),
            ValueError,
            f"AdamW: {name} must be True in a saved group, got {saved.get(name)}; AdamW has no other",
        )
    check(
        not saved.get("differentiable"),
        NotImplementedError,
        "AdamW: differentiable must be False, got True; torch.optim.AdamW has it",
    )
    group = {name: here[name] for name in ("lr", "betas", "eps", "weight_decay")} | {"amsgrad": False}
    group |= {name: x for name, x in saved.items() if name not in _OPTIONS}
    group |= {name: here[name] for name in _OPTIONS if name in here}
    if here.get("stochastic_rounding") and "rounding_seed" in saved:
        group["rounding_seed"] = saved["rounding_seed"]
    check_options({**group, "params": here["params"]})
    return group


def saved_form(state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with step counts that are numbers where states have bitsandbytes' names: it would round a tensor to
    the parameter's dtype."""
    states = {
        index: {**state, "step": int(state["step"])} if isinstance(state, dict) and "state1" in state else state
        for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}
