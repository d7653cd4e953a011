"""What the launch functions need to know of a device."""

from __future__ import annotations

import contextlib
import functools

import torch


@functools.cache
def capability(device: torch.device) -> int:
    """The major compute capability, which rows of the tile tables go by; 8 for the interpreter's CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: makes `device` that."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
