"""PEFT's LoRA layer with its forward in one op."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fusetune import ops
from fusetune._check import FLOATS
from fusetune.backend import choose


class LoraLinear(Linear):
    """PEFT's LoRA layer around nn.Linear or Conv1D, computed by `fusetune.ops.lora_linear`.

    An instance becomes one by assignment to its `__class__`: it keeps its parameters, their names and its hooks, and
    PEFT merges, saves and switches it as before. A call that the op cannot take is PEFT's own.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or why_not(self, x) is not None:
            return super().forward(x, *args, **kwargs)
        (name,) = _active(self)
        base: Any = self.base_layer
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        dropout = self.lora_dropout[name]
        return ops.lora_linear(
            x,
            base.weight.t() if type(base) is Conv1D else base.weight,
            down.weight,
            up.weight,
            self.scaling[name],
            base.bias,
            dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
        )


def why_not(layer: Linear, x: Tensor | None = None) -> str | None:
    """Why `layer` must be computed by PEFT now, or None.

    Args:
        layer: a PEFT LoRA layer.
        x: its input; without it, what depends on the input is not asked.
    """
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapter is merged"
    active = _active(layer)
    if len(active) != 1:
        return f"{len(active)} of its adapters are active, not one"
    (name,) = active
    if name in layer.lora_variant:
        return f"its adapter is of the kind {type(layer.lora_variant[name]).__name__}"
    base: Any = layer.base_layer
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is {type(base).__name__}, not Linear or Conv1D"
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"its adapter is made of {type(down).__name__} and {type(up).__name__}, not of Linear"
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"its dropout is {type(dropout).__name__}, not Dropout"
    if down.bias is not None or up.bias is not None:
        return "its adapter has a bias"
    # The op reads the weights of these modules without calling them.
    if _hooked(base) or _hooked(down) or _hooked(up) or _hooked(dropout):
        return "a module inside of it has hooks or a replaced forward"
    if base.weight.requires_grad:
        return "its base weight is trained"
    for weight in (base.weight, down.weight, up.weight):
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return f"it has a weight of type {type(weight).__name__}"
    try:
        choose("lora", base.weight.device if x is None else x.device)
    except NotImplementedError as error:
        return str(error)
    dtype, cast = base.weight.dtype, False
    if x is not None:
        if x.dtype not in FLOATS:
            return f"its input is {_short(x.dtype)}"
        cast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
        if not layer.cast_input_dtype_enabled and x.dtype != down.weight.dtype:
            return "the cast of its input is disabled"
    if (
        dtype not in FLOATS
        or base.weight.dtype not in (FLOATS if cast else (dtype,))
        or (base.bias is not None and base.bias.dtype != base.weight.dtype)
        or down.weight.dtype not in (dtype, torch.float32)
        or up.weight.dtype != down.weight.dtype
    ):
        dtypes = ", ".join(_short(t.dtype) for t in (base.weight, down.weight, up.weight))
        return f"its weights are {dtypes}" + ("" if x is None else f" and it computes in {_short(dtype)}")
    return None


def _active(layer: Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # as accelerate and other patches do it
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
