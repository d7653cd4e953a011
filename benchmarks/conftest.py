"""What a results file says besides the rows: the machine, its ceilings, and the versions."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import results
import timer
import torch

from fusetune import __version__
from fusetune.train.compare import gemm_rate


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {str(dtype)[6:]: gemm_rate(here, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    machine_info.clear()
    machine_info.update(
        device=results.device_name(),
        gemm_gflops={dtype: float(f"{rate:.3g}") for dtype, rate in rates.items()},
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
