"""Backends and devices of the tests.

A test that takes the fixture `backend` runs once for each backend of its module's op (`OP`): the CPU kernels at every
ISA level, Triton in its interpreter, and on a GPU Triton and CUDA. One that takes `device` runs with the backend that
users get there. Rows that cannot run here are skipped, and the reason is the one that `fusetune info` gives.

Markers: `gpu` needs a CUDA device; `large` takes Triton's interpreter too long, and is left out of its rows.
"""

import importlib.util
import os
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from fusetune import _native
from fusetune.backend import BACKENDS, why_not

# Those that this CPU lacks are skipped. `emulated` is the 16-lane code without AVX-512 instructions.
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "emulated")
INTERPRETED = "triton-interpreted"


class Backend(NamedTuple):
    name: str
    device: torch.device


def pytest_configure(config):
    config.addinivalue_line("markers", "large: takes Triton's interpreter too long, and is left out of its rows")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        backends = BACKENDS[metafunc.module.OP]
        rows = [f"cpu-{level}" for level in LEVELS if "cpu" in backends["cpu"]]
        rows += [INTERPRETED] if "triton" in backends["cpu"] else []
        rows += [pytest.param(f"{name}-gpu", marks=pytest.mark.gpu) for name in backends["cuda"]]
        metafunc.parametrize("backend", rows, indirect=True)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def pytest_collection_modifyitems(config, items):
    left_out = []
    for item in items:
        call = getattr(item, "callspec", None)
        if item.get_closest_marker("large") and call and call.params.get("backend") == INTERPRETED:
            left_out.append(item)
        if item.get_closest_marker("gpu") and (reason := why_not("triton", "cuda")):
            item.add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def backend(request, monkeypatch):
    """Forces the backend of one row; gives its name and the device of its tensors."""
    name, _, row = request.param.partition("-")
    device = torch.device("cuda" if row == "gpu" else "cpu")
    if name == "cpu":
        extension, level = _native.extension(), row
        if level not in extension.isa_available():
            built = level in extension.isa_built()
            pytest.skip(f"this CPU lacks {level}" if built else f"{level} is not built; FUSETUNE_TEST_LEVELS=1 builds it")
        before = extension.isa()
        extension.set_isa(level)
        request.addfinalizer(lambda: extension.set_isa(before))
    elif reason := why_not(name, device.type):
        pytest.skip(reason)
    if name == "triton":
        module = f"fusetune.kernels.{request.module.OP}"
        kernels = importlib.import_module(module) if importlib.util.find_spec(module) else None
        if not (hasattr(kernels, "forward") or hasattr(kernels, "step")):
            pytest.skip(f"{module} has no launcher")
    monkeypatch.setenv("FUSETUNE_BACKEND", name)
    return Backend(name, device)


@pytest.fixture
def device(request):
    return torch.device(request.param)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
