"""The harness for kernels of Hopper's own instructions (README.md): a module of its own, because their blocks have more
shared memory, and their instructions an emulation, sm90/hopper.cpp."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import os
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

from cuda_host.harness import HERE, ROOT, cached, compile_object, link

MODULE = "fusetune_cuda_host_sm90"
CACHE = ROOT / ".cache" / "cuda_host_sm90"
OPTIONS = ("-DCUDA_HOST_SM90",)


def sources() -> list[Path]:
    harness = [HERE / "scheduler.cpp", HERE / "memory.cpp", *sorted((HERE / "sm90").glob("*.c*"))]
    return [*harness, *sorted((ROOT / "csrc" / "cuda").glob("*_sm90.cu"))]


def objects() -> dict[str, Path]:
    """What the module is linked from, by the name of the source."""
    return {path.name: CACHE / f"{cached(path.stem, [path]).name}.o" for path in sources()}


def build() -> Path:
    """The module; what has changed is compiled, and what was made of earlier sources deleted."""
    module = CACHE / f"{cached(MODULE, sources()).name}.so"
    if module.exists():
        return module
    CACHE.mkdir(parents=True, exist_ok=True)
    current = {module, *objects().values()}
    for path in CACHE.iterdir():
        if path.is_file() and path not in current:
            path.unlink()
    missing = [path for path in sources() if not objects()[path.name].exists()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: compile_object(path, objects()[path.name], *OPTIONS), missing))
    link(list(objects().values()), module)
    return module


@functools.cache
def load(module: Path | None = None) -> ModuleType:
    path = module or build()
    loader = ExtensionFileLoader(f"{path.parent.name}.{MODULE}", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded
