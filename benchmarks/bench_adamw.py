"""AdamW step against torch.optim.AdamW, fused and default. Bytes a parameter: 28 in float32, 14 in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import timer
import torch

from fusetune.optim import AdamW

SETS = {
    "4x16M": [16 * 2**20] * 4,
    "LoRA r=16, 144 tensors": [12288] * 144,
    "LoRA r=8, 448 tensors": [4096] * 448,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", SETS)
def test_adamw(benchmark: Any, device: torch.device, name: str, dtype: torch.dtype) -> None:
    def optimizer(make: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, device=device).to(dtype)) for n in SETS[name]]
        for p in params:
            p.grad = torch.randn_like(p)
        return make(params, **options)

    ours, fused = optimizer(AdamW), optimizer(torch.optim.AdamW, fused=True)
    default = optimizer(torch.optim.AdamW)
    for contender in (ours, fused, default):
        contender.step()
    for p, expected in zip(ours.param_groups[0]["params"], fused.param_groups[0]["params"], strict=True):
        assert (p - expected).norm() <= 1e-6 * expected.norm()
    timer.compare(
        *(benchmark, ours.step, {"fused": fused.step, "default": default.step}),
        **dict(op="adamw", shape=name, dtype=str(dtype)[6:]),
    )
    moved = 7 * dtype.itemsize * sum(SETS[name])
    benchmark.extra_info["gbs"] = round(moved / benchmark.extra_info["ours_ms"] / 1e6, 1)
