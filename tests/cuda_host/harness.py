"""Compiles the CUDA kernels for the host, with the checks of the harness (README.md), and has the ops call them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_compile
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fusetune.backend
from fusetune import _native

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "cuda_host"
MODULE = "fusetune_cuda_host"
INCLUDE = "tests/cuda_host/include"
ON_GPU = ("products.cu", "fragments.cu")

COMMON = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden"]
# As nvcc has it: no contraction beyond explicit FMAs (AdamW is compiled so), type punning by pointers.
KERNELS = [
    *("-x", "c++", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{INCLUDE}", "-ftrack-macro-expansion=0"),
]
# Either the checks, or a count of the lines executed, which together would take three times as long.
COUNT = "FUSETUNE_COUNT_LINES"
CHECKED = ["-O2", "-fsanitize=thread,alignment,bounds,integer-divide-by-zero"]
COUNTED = ["-O1", "--coverage"]


def shipped() -> list[Path]:
    """The kernels that the harness runs. Those of one architecture, as <op>_sm90.cu, have a harness of their own."""
    return [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if not re.search(r"_sm\d+a?$", path.stem)]


def compiler() -> str | None:
    """g++, or where CXX names one of several, that."""
    chosen = os.environ.get("CXX", "")
    return shutil.which(chosen if re.search(r"\bg\+\+", Path(chosen).name) else "g++")


def why_not() -> str | None:
    """Why the harness cannot run here, or None."""
    if not sys.platform.startswith("linux"):
        return "the harness of the CUDA kernels needs Linux"
    return (
        None if compiler() and shutil.which("addr2line") else "the harness of the CUDA kernels needs g++ and binutils"
    )


def counting() -> bool:
    return COUNT in os.environ


def sources() -> list[Path]:
    # Of an inline function that several objects have, the linker takes the first: the harness's, without checks.
    return [*sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.cu")), *shipped()]


def cached(name: str, parts: list[Path]) -> Path:
    """Where what is made of these sources and of all headers lies, but for a suffix; elsewhere when one has changed."""
    headers = [path for root in (ROOT / "csrc", HERE) for path in root.rglob("*") if path.suffix in (".h", ".cuh")]
    settings = compiler(), COMMON, KERNELS, CHECKED, COUNTED, sysconfig.get_config_var("SOABI")
    found = hashlib.sha256(repr(settings).encode())
    for path in [*sorted(headers), *parts]:
        found.update(path.name.encode() + path.read_bytes())
    return CACHE / f"{name}-{found.hexdigest()[:16]}"


def compile_object(source: Path, target: Path, *options: str) -> None:
    """Compiles a kernel or a file of the harness.

    Raises:
        RuntimeError: the compiler's errors; where a kernel uses a primitive that the harness lacks, its name and where
            to add it.
    """
    import pybind11

    if source.suffix == ".cu":
        flags = [*KERNELS, *(COUNTED if counting() else CHECKED)]
    else:
        flags = ["-O1", "-Wall", "-Wextra", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source)
    command = [compiler() or "g++", *COMMON, *flags, *options, "-c", name, "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    unknown = re.search(
        r"^(\S+:\d+):\d+: error: .(\w+). (?:was not declared|has not been declared|does not name)", done.stderr, re.M
    )
    if unknown:
        line, primitive = unknown.groups()
        if primitive.startswith("inline_PTX"):
            raise RuntimeError(
                f"cuda_host: {line} has inline PTX; put it behind a name in csrc/cuda/mma.cuh, with its twin in"
                f" {INCLUDE}/mma_host.h"
            )
        raise RuntimeError(
            f"cuda_host: {line} uses {primitive}, which the harness lacks; add it to {INCLUDE}/, with a test in"
            " tests/test_cuda_host.py"
        )
    raise RuntimeError(f"cuda_host: {name} does not compile for the host\n{done.stderr}")


def objects() -> dict[str, Path]:
    """What the module is linked from, by the name of the source."""
    kinds = {".cpp": ".o", ".cu": ".counted.o" if counting() else ".o"}
    return {path.name: Path(f"{cached(path.stem, [path])}{kinds[path.suffix]}") for path in sources()}


def build() -> Path:
    """The module; what has changed is compiled, and what was made of earlier sources deleted."""
    found = cached(MODULE, sources())
    module = Path(f"{found}{'.counted' * counting()}.so")
    if module.exists():
        return module
    CACHE.mkdir(parents=True, exist_ok=True)
    current = {path.name.partition(".")[0] for path in [found, *objects().values()]}
    for path in CACHE.iterdir():
        if path.is_file() and path.name.partition(".")[0] not in current:
            path.unlink()
    missing = [path for path in sources() if not objects()[path.name].exists()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_object, missing, [objects()[path.name] for path in missing]))
    link(list(objects().values()), module)
    return module


def link(objects: list[Path], module: Path) -> None:
    flags = ["--coverage"] if counting() else []
    command = [compiler() or "g++", "-shared", *flags, *map(str, objects), "-o"]
    partial = module.with_suffix(".partial")  # another process may build the same
    subprocess.run([*command, str(partial)], check=True)
    partial.rename(module)


@functools.cache
def load(module: Path | None = None) -> ModuleType:
    """The module: fusetune's CUDA launchers by their names in the extension, and the kernels of this folder."""
    path = module or build()
    name = f"{path.parent.name}.{MODULE}"  # a module of its own for each path
    loader = ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


def lines_executed() -> dict[str, dict[int, int]]:
    """How often the tests of small sizes execute each line of csrc/cuda: {file: {line: count}}. Runs those tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(COUNT, "1")
        build()
        for data in CACHE.glob("*.gcda"):  # of earlier runs
            data.unlink()
        tests = [
            "test_cuda_products.py",
            "test_cuda_attention.py",
            "test_lora_products.py",
            *(f"test_{path.stem}.py" for path in shipped()),
            *(path.name for path in (ROOT / "tests").glob("test_adamw_*.py")),
        ]
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-k",
                "cuda-host",
                "-m",
                "not large",
                *(f"tests/{name}" for name in tests),
            ],
            cwd=ROOT,
            check=True,
        )
    counts: dict[str, dict[int, int]] = {}
    for data in CACHE.glob("*.gcda"):
        report = subprocess.run(
            ["gcov", "--json-format", "--stdout", str(data)], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for file in json.loads(report)["files"]:
            if file["file"].startswith("csrc/cuda/"):
                of_file = counts.setdefault(file["file"], {})
                for line in file["lines"]:
                    of_file[line["line_number"]] = of_file.get(line["line_number"], 0) + line["count"]
    return counts


def compile_for_gpu(arch: str, module: Path) -> None:
    """Compiles those kernels of this folder that also run on a GPU; `arch` is nvcc's option.

    Raises:
        RuntimeError: nvcc's errors and warnings, of which spilled registers are one.
    """
    import pybind11

    options = [
        *("-std=c++17", f"-arch={arch}", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DON_GPU"),
        *("-Xptxas=-warn-spills", "-Werror=all-warnings"),
        *(f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"),
    ]
    sources = [str(HERE / name) for name in ("bindings.cpp", *ON_GPU)]
    command = [cuda_compile.nvcc() or "nvcc", *options, *sources, "-o", str(module)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuda_host: {', '.join(ON_GPU)} do not compile for {arch}\n{done.stdout}{done.stderr}")


def load_for_gpu() -> ModuleType:
    """The kernels of this folder on the GPU that is here."""
    module = cached("gpu", sources()) / f"{MODULE}.so"
    if not module.exists():
        module.parent.mkdir(parents=True)
        partial = module.with_suffix(".partial")
        compile_for_gpu("native", partial)
        partial.rename(module)
    return load(module)


class HostExtension:
    """The extension, with the CUDA launchers of the harness."""

    with_cuda = True

    def __init__(self, extension: ModuleType, host: ModuleType) -> None:
        self._extension, self._host = extension, host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host if name.startswith("cuda_") else self._extension, name)


@contextlib.contextmanager
def reversed_order(host: ModuleType) -> Iterator[None]:
    """Runs blocks, and the threads of a block, from last to first."""
    host.reverse_order(True)
    try:
        yield
    finally:
        host.reverse_order(False)


@contextlib.contextmanager
def cuda_on_host(monkeypatch: pytest.MonkeyPatch, host: ModuleType) -> Iterator[None]:
    """Has the ops take the CUDA backend for CPU tensors; a kernel may touch those whose address was asked for."""
    extension = HostExtension(_native.extension(), host)
    address_of = torch.Tensor.data_ptr
    storages = {}  # weak references: while there is one, no other storage takes its number

    def data_ptr(tensor: torch.Tensor) -> int:
        begin = address_of(tensor)
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            storage = StorageWeakRef(tensor.untyped_storage())
            storages[storage.cdata] = storage
            host.allow(begin, (last + 1) * tensor.element_size(), storage.cdata)
        return begin

    monkeypatch.setattr(torch.Tensor, "data_ptr", data_ptr)
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None, raising=False)  # another way to addresses
    monkeypatch.setattr(_native, "extension", lambda: extension)
    monkeypatch.setattr(_native, "current_stream", lambda device: contextlib.nullcontext(0))
    monkeypatch.setattr(fusetune.backend, "why_not", lambda backend, device_type: None)
    for op, backends in fusetune.backend.BACKENDS.items():
        monkeypatch.setitem(fusetune.backend.BACKENDS, op, {**backends, "cpu": backends["cuda"]})
    try:
        yield
    finally:
        host.forget_allowed()
