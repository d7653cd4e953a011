"""AdamW with one kernel call per step."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fusetune import _native
from fusetune._check import check
from fusetune.ops._adamw_table import Row, Table
from fusetune.optim import _state
from fusetune.optim._distributed import combined_norm, layout, local, local_grad


class AdamW(torch.optim.AdamW):
    """Drop-in replacement for torch.optim.AdamW: the same arguments, defaults, state and state_dict.

    `step` updates all parameters of all groups in one parallel region (CPU) or launch (GPU), in the arithmetic of
    torch's fused implementation (csrc/adamw.h). `foreach`, `fused` and `capturable` select among torch's own
    implementations and mean nothing here, where the step counts are always on the parameters' device and nothing
    synchronises; they are accepted so that scripts and saved states carry over. `lr` may be a tensor, on a GPU too.

    Parameters are float32, bfloat16 or float16, on the CPU or CUDA, or DTensors of these; a group may mix them.
    GradScaler's scale is taken inside the kernel, and gradients are left as they are, scaled and unclipped.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as torch's.
        max_grad_norm: clips the gradients of all groups together to this 2-norm, as torch.nn.utils.clip_grad_norm_
            does, inside the step. After a step `grad_norm` is the norm before clipping, a 0-dimensional tensor on the
            parameters' device. None or 0: neither.
        state_dtype: of exp_avg and exp_avg_sq: "float32", "bfloat16" or "int8" (blocks of 256 with bitsandbytes' 8-bit
            codes, under its names; parameters of fewer than 4096 elements keep float32), or a torch.dtype. None: the
            parameter's, as in torch.
        master_weights: of 16-bit parameters. "fp32" steps a float32 copy (state "master") and rounds the parameter from
            it; "split16" keeps the lower halves of the same 32 bits (state "param_lo", bfloat16 parameters only), in 2
            bytes instead of 4. None or "none": neither. Who changes parameters by hand must change "master", too.
        stochastic_rounding: rounds bfloat16 parameters without master weights, and bfloat16 states of theirs, up or
            down with the probability that keeps the mean. Reproducible: a step's random numbers are a function of a
            seed, drawn from torch's generator by the constructor and saved in the state_dict, of the parameter's
            number, the element and the step.

    The last three may differ from group to group. What a saved state has in another form is converted by
    `load_state_dict`; the optimizer's own options hold.

    Raises:
        NotImplementedError: `differentiable`, 8-bit states with amsgrad or of DTensors, or a device without a backend.
        TypeError: complex or float64 parameters, sparse gradients. ValueError and RuntimeError as in torch, and for
        options that are not among the above or mean nothing together.
    """

    _step_supports_amp_scaling = True  # the GradScaler protocol: it sets grad_scale and found_inf

    grad_norm: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: str | torch.dtype | None = None,
        master_weights: str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        check(
            not max_grad_norm or max_grad_norm > 0,
            ValueError,
            f"AdamW: max_grad_norm must be a positive number, or None or 0 for no clipping, got {max_grad_norm}",
        )
        options = {
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        # Only what is used stands in the groups and so in the state_dict, which else is torch's own.
        self._options = {name: value for name, value in options.items() if value not in (None, False)}
        super().__init__(
            *(params, lr, betas, eps, weight_decay, amsgrad),
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.defaults |= self.__dict__.pop("_options")  # which, unlike attributes, are pickled and copied
        if max_grad_norm:
            self.defaults["max_grad_norm"] = float(max_grad_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group may have options of this class, too, but for max_grad_norm, which is of all groups."""
        if param_group.get("differentiable", self.defaults["differentiable"]):
            raise NotImplementedError("AdamW: differentiable must be False, got True; torch.optim.AdamW has it")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name, value in self.__dict__.get("_options", {}).items():
                group.setdefault(name, value)
            _state.check_options(group)
            clipped = self.defaults.get("max_grad_norm")
            check(
                group.pop("max_grad_norm", clipped) == clipped,
                ValueError,
                "AdamW: max_grad_norm must be the same in all groups; give it to the constructor",
            )
        except Exception:
            self.param_groups.pop()
            raise
        if group.get("stochastic_rounding") and "rounding_seed" not in group:
            seeds = [g["rounding_seed"] for g in self.param_groups if "rounding_seed" in g]
            group["rounding_seed"] = seeds[0] if seeds else int(torch.randint(2**31, ()))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            As the class; then nothing was changed.
        """
        hooks = (
            *(self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks),
            *(_global_optimizer_pre_hooks, _global_optimizer_post_hooks),
        )
        step = self._step_with_hooks if any(hooks) or torch.autograd._profiler_enabled() else self._step  # type: ignore[attr-defined]
        result: float | None = step() if closure is None else step(closure)
        return result

    # Torch wraps `step` unless it has this mark, for hooks and for the profiler, and the latter costs 0.2 ms a step.
    step.hooked = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        tables: _Tables | None = self.__dict__.get("_tables")
        if tables is None or not tables.take(self, params, grads):
            tables = self._tables = _Tables(self, params, grads)

        devices = {table.device for table in tables.tables}
        hypers = [
            (_number(g["lr"], devices), *map(float, g["betas"]), g["eps"], g["weight_decay"], float(g["maximize"]))
            for g in self.param_groups
        ]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        max_grad_norm = self.defaults.get("max_grad_norm", 0.0)
        norm = None
        if max_grad_norm:
            norm = self.grad_norm = tables.grad_norm(grad_scale)
        for table in tables.tables:
            scale, inf, total = (None if t is None else t.to(table.device) for t in (grad_scale, found_inf, norm))
            table.step(hypers, scale, inf, total, max_grad_norm)
        if not tables.forget_grads():
            del self._tables
        return loss

    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_step)

    def state_dict(self) -> dict[str, Any]:
        """As in torch; with state_dtype="int8" as bitsandbytes' AdamW8bit has it, which loads it."""
        return _state.saved_form(super().state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the state of this optimizer, of torch.optim.AdamW in any form, of apex's FusedAdam, DeepSpeed's
        CPUAdam, torchao's low-bit AdamW or bitsandbytes' AdamW. Devices and dtypes become those of the parameters and
        options here; loaded tensors are copies.

        Raises:
            ValueError: groups or shapes that do not match, or a state of another algorithm.
            NotImplementedError: as the class. Either way nothing was changed.
        """
        _state.load(self, super().load_state_dict, state_dict)


class _Tables:
    """The kernels' tables of one optimizer, kept from step to step; a step compares all addresses."""

    def __init__(self, optimizer: AdamW, params: list[Tensor], grads: list[Tensor | None]) -> None:
        # Everything that may raise comes first, so that a step that raises has changed nothing.
        present = [(p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None]
        rows: dict[Any, list[Row]] = {}
        fresh = {}
        number = 0
        for index, group in enumerate(optimizer.param_groups):
            form = _state.Form.of(group)
            for p in group["params"]:
                grad = grads[number]
                if grad is not None:
                    fresh[p] = state = _state.complete(optimizer.state.get(p, {}), p, form, number)
                    m, v = form.moments(p)
                    row = Row(
                        local(p),
                        local_grad(grad, p),
                        local(state[m]),
                        local(state[v]),
                        local(state["max_exp_avg_sq"]) if form.amsgrad else None,
                        state["step"],
                        local(state.get(form.master_name)),
                        state.get("absmax1"),
                        state.get("absmax2"),
                        lr=_on_gpu(group["lr"], p.device),
                        group=index,
                        key=None if form.seed is None else number << 32 | form.seed,
                    )
                    rows.setdefault(layout(p), []).append(row)
                number += 1
        self._layouts = list(dict.fromkeys(map(layout, params)))  # in one order in all processes
        self._by_layout = {where: Table(r) for where, r in rows.items()}
        self.tables = list(self._by_layout.values())
        for p, state in fresh.items():
            have = optimizer.state[p]
            if have is not state:
                have.clear()
                have.update(state)

        self._params = params
        self._absent = [grad is None for grad in grads]
        self._groups = self._read_groups(optimizer)
        self._lrs = [group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], Tensor)]
        self._states = list(optimizer.state.values())
        # What may change without anything being another object: memory, dtype, device.
        self._objects = [*(p for p, _ in present), *self._states]
        entries = sum(len(state) for state in self._states if isinstance(state, dict))
        self._memory = _room(len(present) + entries)
        self._grad_memory = _room(len(present))
        self._kept = (
            len(self.tables) == 1
            and self.tables[0].contiguous
            and _native.read_tensors(self._objects, self._memory)
            and _native.read_tensors([grad for _, grad in present], self._grad_memory)
            and all(lr.dtype is torch.float32 for lr in self._lrs)  # what else a kernel reads is a copy
        )

    def take(self, optimizer: AdamW, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Takes the gradients of a step; whether the tables then are as new ones would be.

        Everything that a script may exchange between steps is compared: parameters, gradients, states, groups, their
        options, and the memory of all tensors. In loops that run in C, as a step pays for them a tensor at a time.
        """
        if not self._kept or len(params) != len(self._params) or not all(map(operator.is_, params, self._params)):
            return False
        states = list(optimizer.state.values())
        if len(states) != len(self._states) or not all(map(operator.is_, states, self._states)):
            return False
        if self._read_groups(optimizer) != self._groups:
            return False
        lrs = [group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], Tensor)]
        if len(lrs) != len(self._lrs) or not all(map(operator.is_, lrs, self._lrs)):
            return False
        if [grad is None for grad in grads] != self._absent:
            return False
        present = [grad for grad in grads if grad is not None]
        memory, grad_memory = _room(len(self._memory) // 3), _room(len(present))
        if not _native.read_tensors(self._objects, memory) or memory != self._memory:
            return False
        count = len(present)
        if not _native.read_tensors(present, grad_memory) or grad_memory[count:] != self._grad_memory[count:]:
            return False
        self.tables[0].set_grads(present, grad_memory[:count])
        return True

    def forget_grads(self) -> bool:
        """Keeps gradients alive no longer, so that zero_grad frees them; whether the tables may be taken again."""
        for table in self.tables:
            table.forget_grads()
        return self._kept

    @staticmethod
    def _read_groups(optimizer: AdamW) -> list[tuple[_state.Form, int]]:
        return [(_state.Form.of(group), len(group["params"])) for group in optimizer.param_groups]

    def grad_norm(self, grad_scale: Tensor | None) -> Tensor:
        norms = []
        for where in self._layouts:
            if (table := self._by_layout.get(where)) is not None:
                norm = table.grad_norm(None if grad_scale is None else grad_scale.to(where.device))
            else:
                norm = torch.zeros((), device=where.device)
            norms.append((where, norm))
        return combined_norm(norms)


def _room(tensors: int) -> array[int]:
    return array("q", bytes(8 * _native.READ_FIELDS * tensors))


def _on_gpu(lr: float | Tensor, device: torch.device) -> Tensor | None:
    """What the kernel reads on the device, where `lr` is there."""
    return lr.float().view(()) if isinstance(lr, Tensor) and lr.is_cuda and lr.device == device else None


def _number(lr: float | Tensor, devices: set[torch.device]) -> float:
    """lr, or any number where all kernels read it on their device."""
    return 0.0 if isinstance(lr, Tensor) and lr.is_cuda and devices == {lr.device} else float(lr)
