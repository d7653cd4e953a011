"""Backends and devices of the tests.

A test that takes the fixture `backend` runs once for each backend of its module's op (`OP`): the CPU kernels at every
ISA level, Triton in its interpreter, the CUDA kernels on the host (cuda_host/README.md), and on a GPU Triton and CUDA.
One that takes `cpu_backend` runs at the ISA levels, one that takes `gpu_backend` in the other rows, and one that takes
`device` with the backend that users get there.
Rows that cannot run here are skipped, and the reason is the one that `fusetune info` gives.

Markers: `gpu` needs a CUDA device; `large` takes Triton's interpreter too long, and is left out of its rows, as
`large_on_host` is of those of the CUDA kernels on the host; `beyond_cuda` names what the op's CUDA kernels lack.
"""

import os
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from cuda_host import harness

from fusetune import _native
from fusetune.backend import BACKENDS, why_not

# Those that this CPU lacks are skipped. `emulated` is the 16-lane code without AVX-512 instructions.
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "emulated")
INTERPRETED = "triton-interpreted"
HOST = "cuda-host"


class Backend(NamedTuple):
    name: str
    device: torch.device


def pytest_configure(config):
    config.addinivalue_line("markers", "large: takes Triton's interpreter too long, and is left out of its rows")
    config.addinivalue_line("markers", "large_on_host: takes the CUDA kernels on the host too long")
    config.addinivalue_line("markers", "beyond_cuda(*features): needs what the op's CUDA kernels lack")


def pytest_generate_tests(metafunc):
    levels = [f"cpu-{level}" for level in LEVELS]
    for fixture, others in (("backend", levels), ("gpu_backend", [])):
        if fixture in metafunc.fixturenames:
            on_gpu = BACKENDS[metafunc.module.OP]["cuda"]
            gpu = [pytest.param(f"{name}-gpu", marks=pytest.mark.gpu) for name in on_gpu]
            host = [HOST] if "cuda" in on_gpu else []
            metafunc.parametrize(fixture, [*others, INTERPRETED, *host, *gpu], indirect=True)
    if "cpu_backend" in metafunc.fixturenames:
        metafunc.parametrize("cpu_backend", levels, indirect=True)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def pytest_collection_modifyitems(config, items):
    left_out = []
    for item in items:
        call = getattr(item, "callspec", None)
        row = next((call.params[name] for name in ("backend", "gpu_backend") if call and name in call.params), None)
        without = {INTERPRETED: ("large",), HOST: ("large_on_host", "beyond_cuda"), "cuda-gpu": ("beyond_cuda",)}
        if any(item.get_closest_marker(name) for name in without.get(row, ())):
            left_out.append(item)
        if item.get_closest_marker("gpu") and (reason := why_not("triton", "cuda")):
            item.add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mentions(value, dtype):
    """Of AdamW's formats, what they round to nearest counts (steps.py)."""
    value = getattr(value, "rounded_to", value)
    return value is dtype or (isinstance(value, tuple) and dtype in value)


@pytest.fixture
def backend(request, monkeypatch):
    """Forces the backend of one row; gives its name and the device of its tensors."""
    name, _, row = request.param.partition("-")
    device = torch.device("cuda" if row == "gpu" else "cpu")
    extension = _native.extension()
    before = extension.isa()
    if name == "cpu":
        if row not in extension.isa_built():
            pytest.skip(f"{row} is not built" + "; FUSETUNE_TEST_LEVELS=1 builds it" * (row == "emulated"))
        if row not in extension.isa_available():
            pytest.skip(f"this CPU lacks {row}")
        extension.set_isa(row)
    elif request.param == HOST:
        request.getfixturevalue("cuda_on_host")
    elif reason := why_not(name, device.type):
        pytest.skip(reason)
    parameters = request.node.callspec.params.values()
    if request.param == INTERPRETED and any(mentions(value, torch.bfloat16) for value in parameters):
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly, and truncates to bfloat16")
    monkeypatch.setenv("FUSETUNE_BACKEND", name)
    yield Backend(name, device)
    extension.set_isa(before)


cpu_backend = gpu_backend = backend


@pytest.fixture(scope="session")
def host():
    """The harness's module. Where it does not compile, all that need it fail by one attempt, which pytest remembers."""
    if reason := harness.why_not():
        pytest.skip(reason)
    return harness.load()


@pytest.fixture
def cuda_on_host(monkeypatch, host):
    """Has the ops take the CUDA backend for CPU tensors, and the harness run its kernels."""
    with harness.cuda_on_host(monkeypatch, host):
        yield


@pytest.fixture
def device(request):
    return torch.device(request.param)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """For models that are too small to share out: waiting threads only slow a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
