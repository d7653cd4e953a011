"""What a results file says besides the rows: the machine, its ceilings, and the versions."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import results
import timer
import torch

from fusetune import __version__


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(
        device=results.device_name(),
        gemm_gflops={str(dtype)[6:]: round(timer.gemm_gflops(dtype)) for dtype in (torch.float32, torch.bfloat16)},
        stream_gbs=round(timer.stream_gbs(), 1),
        torch=torch.__version__,
        fusetune=__version__,
        python=platform.python_version(),
    )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """One short row a benchmark; no host names, no raw timings."""
    output_json["benchmarks"] = [
        {"name": row["name"], **row["extra_info"], "rounds": row["stats"]["rounds"]}
        for row in output_json["benchmarks"]
    ]
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "time")}
