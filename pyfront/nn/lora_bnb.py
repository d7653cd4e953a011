"""PEFT's LoRA layer around bitsandbytes' Linear4bit with its forward in one op; imported where there is one."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from fusetune.nn.lora import fused


class LoraLinear4bit(Linear4bit):
    """As fusetune.nn.lora.LoraLinear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs else fused(self, x)
        result: Tensor = super().forward(x, *args, **kwargs) if y is None else y
        return result
