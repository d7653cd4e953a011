"""The one timer of the benchmarks: contenders in turn, A B A B ..., and the median of the ratios round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]


def stream_gbs() -> float:
    """The machine's rate on an in-place update y += c x, in GB/s: the ceiling of bandwidth-bound ops."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.randn(64 * 2**20, device=device) for _ in range(2))
    return 3 * x.numel() * 4 / min(_seconds(lambda: y.add_(x, alpha=1e-3)) for _ in range(7)) / 1e9


def _seconds(step: Step) -> float:
    _finish()
    start = time.perf_counter()
    step()
    _finish()
    return time.perf_counter() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(benchmark: Any, ours: Step, others: dict[str, Step], **info: Any) -> dict[str, float]:
    """Times `ours` against each of `others`.

    Every round runs all contenders once, so that a drift of the machine's speed meets them alike. Two rounds warm up;
    of those that count there are as many as ten seconds hold, but at least 7 and at most 51.

    Args:
        benchmark: pytest-benchmark's fixture; receives the timings of `ours`, and everything below as extra_info.
        ours, others: what to time; the results were compared before.
        info: what the row is about.

    Returns:
        By name of `others`: the median over the rounds of its time over ours. More than 1 means that ours is faster.
    """
    times: dict[str, list[float]] = {name: [] for name in others}

    def run_others() -> None:
        for name, step in others.items():
            times[name].append(_seconds(step))
        _finish()

    def run_ours() -> None:
        ours()
        _finish()

    for _ in range(2):
        run_others()
        last = _seconds(ours) + sum(seconds[-1] for seconds in times.values())
    rounds = int(min(max(10 / last, 7), 51))
    benchmark.pedantic(run_ours, setup=run_others, rounds=rounds)
    mine = benchmark.stats.stats.data
    speedups = {}
    for name, seconds in times.items():
        counted = seconds[-rounds:]
        speedups[name] = statistics.median(other / own for other, own in zip(counted, mine, strict=True))
        info[f"{name}_ms"] = round(1e3 * statistics.median(counted), 3)
        info[f"speedup_over_{name}"] = round(speedups[name], 3)
    info["ours_ms"] = round(1e3 * statistics.median(mine), 3)
    benchmark.extra_info.update(info)
    return speedups
