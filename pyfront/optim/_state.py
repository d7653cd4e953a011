"""The optimizer's state: its form by the options, new, completed, and converted from that of other optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusetune._check import check
from fusetune.ops.adamw import BLOCK
from fusetune.ops.quantize import dynamic_map

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8", torch.uint8: "int8"}
MASTERS = {"none": "", "fp32": "master", "split16": "param_lo"}
SMALL = 4096  # parameters of fewer elements keep float32 states, as in bitsandbytes


class Form(NamedTuple):
    """How the parameters of a group keep their state."""

    state_dtype: str | None
    master_weights: str
    amsgrad: bool

    @staticmethod
    def of(group: Mapping[str, Any]) -> Form:
        return Form(group.get("state_dtype"), group.get("master_weights", "none"), group["amsgrad"])

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
        return torch.float32 if self.state_dtype == "int8" and p.numel() < SMALL else STATE_DTYPES[self.state_dtype]


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


def complete(have: Mapping[str, Any], p: Tensor, form: Form) -> Mapping[str, Any]:
    """`have` itself where it has all that p's state must have, else a new dict with what it lacks."""
    m, v = form.moments(p)
    dtype = form.dtype(p)
    names = [
        "step",
        m,
        v,
        *(["max_exp_avg_sq"] if form.amsgrad else []),
        *([form.master_name] * bool(form.master_name)),
    ]
    if dtype == torch.uint8:
        names += ["qmap1", "qmap2", "absmax1", "absmax2"]
    step = have.get("step")
    fits = isinstance(step, Tensor) and step.device == p.device and step.dtype is torch.float32
    if fits and all(name in have for name in names):
        return have
    state = {name: have[name] if name in have else _new(name, p, dtype) for name in names}
    if not fits:
        state["step"] = torch.as_tensor(0.0 if step is None else step, dtype=torch.float32, device=p.device)
    return {**have, **state}


def _new(name: str, p: Any, dtype: torch.dtype) -> Tensor:
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=p.device)
    if name == "master":
        return p.detach().clone().float()  # type: ignore[no-any-return]
    if name == "param_lo":
        return torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
    if name.startswith("absmax"):
        return torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)
    if name.startswith("qmap"):
        return _map(name == "qmap1", p.device)
    if dtype == torch.uint8:
        zero = 127 if name == "state1" else 0  # the code of 0
        return torch.full_like(p, zero, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


_maps: dict[tuple[bool, torch.device], Tensor] = {}


def _map(signed: bool, device: torch.device) -> Tensor:
    """One tensor for all parameters: the state_dict holds it once."""
    return _maps.setdefault((signed, device), dynamic_map(signed).to(device))


def load(optimizer: Any, load_groups: Callable[[dict[str, Any]], None], state_dict: Mapping[str, Any]) -> None:
    load_groups(dict(state_dict))
