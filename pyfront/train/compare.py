"""The stock training step beside ours."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def compare_steps(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    max_grad_norm: float = 1.0,
) -> dict[str, Any]:
    """Times forward, backward, clipping and AdamW of the unpatched `model`, as it is and patched, in turn.

    Both train copies of the same weights (frozen ones are shared) on the same batches, stock with
    torch.optim.AdamW(fused=True). The first batch warms up. Before that, loss and gradient norm of the two are taken on
    it without dropout, whose masks differ, to show that they compute the same.

    Args:
        model: without patches; stays as it is.
        batches: at least 2.

    Returns:
        `speedup`, the median over the batches of stock's time over ours; the median `stock_seconds` and
        `fusetune_seconds`; `stock_loss`, `fusetune_loss`, `stock_grad_norm`, `fusetune_grad_norm`; and `pairs`.
    """
    from fusetune.optim import AdamW
    from fusetune.patching import patch

    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    stock, ours = (copy.deepcopy(model, dict(shared)) for _ in range(2))
    patch(ours)

    def forward(copied: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss: torch.Tensor = copied(**batch).loss
        return loss

    def backward(copied: nn.Module, batch: dict[str, Any]) -> tuple[float, float]:
        loss = forward(copied, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(copied.parameters(), max_grad_norm or torch.inf)
        return float(loss.detach()), float(norm)

    seen = {}
    for name, copied in (("stock", stock), ("fusetune", ours)):
        copied.eval()
        seen[f"{name}_loss"], seen[f"{name}_grad_norm"] = backward(copied, batches[0])
        copied.zero_grad()
        copied.train()

    optimizers = (
        torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-4, fused=True),
        AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-4),
    )
    times: list[tuple[float, float]] = []
    for batch in batches:
        pair = []
        for copied, optimizer in zip((stock, ours), optimizers, strict=True):
            synchronize(device)
            start = time.perf_counter()
            backward(copied, batch)
            optimizer.step()
            optimizer.zero_grad()
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
    """Flops per second of a large square matrix product: the best of five."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
