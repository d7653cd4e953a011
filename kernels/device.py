"""What the launch functions need to know of a device."""

from __future__ import annotations

import contextlib
import functools

import torch

AMD = 0  # in place of a compute capability


@functools.cache
def capability(device: torch.device) -> int:
    """The major compute capability, which rows of the tile tables go by; 8 for the interpreter's CPU."""
    if device.type != "cuda":
        return 8
    return AMD if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: makes `device` that."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


_captured: list[torch.Tensor] = []


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, copied from pinned memory so that nothing synchronises. A CUDA graph copies at each
    replay, so what is copied while one is captured is kept for good."""
    if device.type != "cuda":
        return tensor
    pinned = tensor.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)
