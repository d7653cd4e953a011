"""DTensors in an optimizer step: it is local, but for the norm of the gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusetune._check import check


class Layout(NamedTuple):
    """What the tensors of one table have in common."""

    device: torch.device
    mesh: Any = None  # of DTensors
    placements: tuple[Any, ...] = ()


def is_dtensor(t: Any) -> bool:
    if type(t) is torch.Tensor or type(t) is torch.nn.Parameter:
        return False
    return hasattr(t, "device_mesh")  # without importing torch.distributed.tensor, which takes a second


def layout(p: Any) -> Layout:
    return Layout(p.device, p.device_mesh, tuple(p.placements)) if is_dtensor(p) else Layout(p.device)


def local(t: Any) -> Any:
    """The tensor that this process steps."""
    if not is_dtensor(t):
        return t
    check(
        not any(placement.is_partial() for placement in t.placements),
        ValueError,
        f"AdamW: DTensors must be sharded or replicated, got {t.placements}",
    )
    return t.to_local()


def local_grad(grad: Any, p: Any) -> Any:
    """That of a gradient, which may be placed otherwise than its parameter."""
    if is_dtensor(grad) and is_dtensor(p) and tuple(grad.placements) != tuple(p.placements):
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def like(p: Any, t: Tensor) -> Tensor:
    """`t`, of this process, as a tensor that is placed as p is."""
    if not is_dtensor(p):
        return t
    placing = {"run_check": False, "shape": p.shape, "stride": p.stride()}
    return type(p.detach()).from_local(t, p.device_mesh, p.placements, **placing)  # type: ignore[no-any-return]


def combined_norm(norms: Iterable[tuple[Layout, Tensor]]) -> Tensor:
    """The norm of all gradients, from those of each layout's local ones: shards of other processes are added. Every
    process must have the same layouts in the same order."""
    total = None
    for where, norm in norms:
        square = norm.double().square()
        for dim, placement in enumerate(where.placements):
            if not placement.is_replicate():
                torch.distributed.all_reduce(square, group=where.mesh.get_group(dim))
        total = square if total is None else total + square.to(total.device)
    return torch.zeros(()) if total is None else total.sqrt().float()
