"""One-line errors: `<op>: <argument> must <condition>, got <value>[; <remedy>]`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, error: type[Exception], message: str) -> None:
    if not condition:
        raise error(message)


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int | str], **sizes: int) -> None:
    """`shape` mixes known sizes and letters; a letter's size is in `sizes` or free."""
    expected = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_probability(op: str, name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {p}")
