"""The stock training step beside ours."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusetune.optim import AdamW


@dataclass
class Contender:
    """A model in training, and the arithmetic of its step."""

    model: nn.Module
    optimizer: Any
    dtype: torch.dtype
    max_grad_norm: float | None  # None: the optimizer clips

    def step(self, batch: Mapping[str, Any]) -> tuple[float, float]:
        """Forward, backward, clipping and AdamW: loss, and norm of the gradients before they are clipped."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(**batch).loss
        loss.backward()
        if self.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        if self.max_grad_norm is None:
            norm = self.optimizer.grad_norm
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def contenders(
    model: nn.Module, dtype: torch.dtype, max_grad_norm: float = 1.0, options: Mapping[str, Any] | None = None
) -> tuple[Contender, Contender]:
    """Stock with clip_grad_norm_ and torch.optim.AdamW(fused=True), and ours, which clips in the step of a
    fusetune.AdamW with `options`: two copies of `model` that share its frozen weights."""
    from fusetune.patching import patch

    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    stock, ours = (copy.deepcopy(model, dict(shared)) for _ in range(2))
    patch(ours)
    max_grad_norm = max_grad_norm or torch.inf
    return (
        Contender(stock, torch.optim.AdamW(trained(stock), lr=1e-4, fused=True), dtype, max_grad_norm),
        Contender(ours, AdamW(trained(ours), lr=1e-4, max_grad_norm=max_grad_norm, **options or {}), dtype, None),
    )


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def agreement(stock: Contender, ours: Contender, batch: Mapping[str, Any]) -> dict[str, float]:
    """Loss and gradient norm of both in a first step, without dropout, whose masks differ: both compute the same."""
    seen = {}
    for name, contender in (("stock", stock), ("fusetune", ours)):
        contender.model.eval()
        seen[f"{name}_loss"], seen[f"{name}_grad_norm"] = contender.step(batch)
        contender.model.train()
    return seen


def compare_steps(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    max_grad_norm: float = 1.0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Times the training step of the unpatched `model`, as it is and patched, in turn; the first batch warms up.

    Args:
        model: without patches; stays as it is.
        batches: at least 2.
        options: of our AdamW.

    Returns:
        `speedup`, the median over the batches of stock's time over ours; the median `stock_seconds` and
        `fusetune_seconds`; `stock_loss`, `fusetune_loss`, `stock_grad_norm`, `fusetune_grad_norm`; and `pairs`.
    """
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    stock, ours = contenders(model, dtype, max_grad_norm, options)
    seen = agreement(stock, ours, batches[0])
    times: list[tuple[float, float]] = []
    for batch in batches:
        pair = []
        for contender in (stock, ours):
            synchronize(device)
            start = time.perf_counter()
            contender.step(batch)
            synchronize(device)
            pair.append(time.perf_counter() - start)
        times.append((pair[0], pair[1]))
    times = times[1:]
    return {
        "speedup": statistics.median(a / b for a, b in times),
        "stock_seconds": statistics.median(a for a, _ in times),
        "fusetune_seconds": statistics.median(b for _, b in times),
        **seen,
        "pairs": len(times),
    }


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of a large square matrix product: the best of those done in a second, six at most."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 6 and sum(times) < 1:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
