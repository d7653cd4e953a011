"""AdamW with one kernel call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from fusetune.ops.adamw import Table


class AdamW(torch.optim.AdamW):
    """Drop-in replacement for torch.optim.AdamW: the same arguments, defaults, state and state_dict.

    `step` updates all parameters of all groups in one parallel region (CPU) or launch (GPU), in the arithmetic of
    torch's fused implementation (csrc/adamw.h). `foreach` and `fused` select among torch's own implementations and mean
    nothing here; they are accepted so that scripts and saved states carry over.

    Parameters are float32, bfloat16 or float16, on the CPU or CUDA; a group may mix them. GradScaler's scale is taken
    inside the kernel, and gradients are left as they are, scaled.

    Raises:
        NotImplementedError: `capturable` or `differentiable`, or a device without a backend.
        TypeError: complex or float64 parameters. ValueError and RuntimeError as in torch.
    """

    _step_supports_amp_scaling = True  # the GradScaler protocol: it sets grad_scale and found_inf

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for option in ("capturable", "differentiable"):
            if param_group.get(option, self.defaults[option]):
                raise NotImplementedError(f"AdamW: {option} must be False, got True; torch.optim.AdamW has it")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables: dict[torch.device, Table] = {}
        for index, group in enumerate(self.param_groups):
            amsgrad = group["amsgrad"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, device = self.state[p], p.device
                if not state or state["step"].device != device or state["step"].dtype is not torch.float32:
                    self._prepare_state(p, amsgrad)
                if device not in tables:
                    tables[device] = Table()
                largest = state["max_exp_avg_sq"] if amsgrad else None
                tables[device].add(p, p.grad, state["exp_avg"], state["exp_avg_sq"], largest, state["step"], index)
        hypers = [
            (float(g["lr"]), *map(float, g["betas"]), g["eps"], g["weight_decay"], float(g["maximize"]))
            for g in self.param_groups
        ]
        for device, table in tables.items():
            table.launch(hypers, device, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    def _prepare_state(self, p: Tensor, amsgrad: bool) -> None:
        """Makes p's state as torch does, or repairs one that was saved by another implementation."""
        state = self.state[p]
        step = state.get("step", 0.0)
        state["step"] = torch.as_tensor(step, dtype=torch.float32, device=p.device)
        for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())):
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
