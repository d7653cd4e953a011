"""DTensors in an optimizer step: it is local, but for the norm of the gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusetune._check import check


class Layout(NamedTuple):
    """What the tensors of one table have in common."""

    device: torch.device
    mesh: Any = None  # of DTensors
    placements: tuple[Any, ...] = ()


def _is_dtensor(t: Tensor) -> bool:
    if type(t) is torch.Tensor or type(t) is torch.nn.Parameter:
        return False
    return hasattr(t, "device_mesh")  # without importing torch.distributed.tensor, which takes a second


def layout(p: Any) -> Layout:
    return Layout(p.device, p.device_mesh, tuple(p.placements)) if _is_dtensor(p) else Layout(p.device)


def local(t: Any) -> Any:
    """The tensor that this process steps."""
    if t is None or not _is_dtensor(t):
        return t
    check(
        not any(placement.is_partial() for placement in t.placements),
        ValueError,
        f"AdamW: DTensors must be sharded or replicated, got {t.placements}",
    )
    return t.to_local()


def combined_norm(norms: list[Tensor], layouts: list[Layout]) -> Tensor:
    """The norm of all gradients, from those of the tables' local ones: shards of other processes are added."""
    total = None
    for norm, where in zip(norms, layouts, strict=True):
        if where.mesh is not None:
            square = norm.double().square()
            for dim, placement in enumerate(where.placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(square, group=where.mesh.get_group(dim))
            norm = square.sqrt().float()
        total = norm if total is None else torch.hypot(total.double(), norm.to(total.device).double()).float()
    return torch.zeros(()) if total is None else total
