"""Which of several ways to compute the same thing is the fastest on this GPU: measured once for each case, and kept.

A measurement waits for the GPU, once for each case and machine. None is made while a CUDA graph is captured, while
torch.compile traces, or where torch is set to use deterministic algorithms, as results must not depend on a clock then:
the first way is taken. `FUSETUNE_TUNE=0` has that taken always.

Choices are kept for the process, and for later ones in `fastest.json` in the folder `fusetune` of XDG_CACHE_HOME, or of
~/.cache. A file that cannot be read or written is passed over.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROUNDS = 7  # in each of which all ways take their turn
CALLS = 3  # of a way, one after another: the later ones hide how long the CPU takes to launch
GAIN = 0.98  # of the time of the first way, that another may take to be chosen: closer than that, the clock decides

_lock = threading.Lock()
_choices: dict[str, dict[str, str]] = {}  # of this process: {machine: {case: way}}


def fastest(op: str, case: Sequence[object], device: torch.device, ways: dict[str, Callable[[], None]]) -> str:
    """Name of the fastest of `ways`, of the first where that is not known and cannot be measured now.

    Args:
        op: the op that asks.
        case: what the choice depends on, such as dtypes and sizes.
        device: where the ways run.
        ways: compute the same thing into the same memory, whatever is in it. The first must always work; another that
            raises, because it does not compile for this GPU or finds no room there, is not chosen.
    """
    default = next(iter(ways))
    if os.environ.get("FUSETUNE_TUNE") == "0" or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return default
    key = ", ".join(map(str, (op, *case)))
    known = _known(_machine(device))
    if known.get(key) not in ways:
        if not _may_measure(device):
            return default
        with _lock:
            if known.get(key) not in ways:  # which another thread may have measured meanwhile
                times = _measure(ways, device)
                best = min(times, key=lambda name: times[name])
                known[key] = best if times[best] < GAIN * times[default] else default
                _store(_machine(device), key, known[key])
    return known[key]


def measured(device: torch.device) -> dict[str, str]:
    """What is known of a GPU: {"op, case": way}."""
    return dict(sorted(_known(_machine(device)).items()))


def _may_measure(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def _measure(ways: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Median time of each way, in ms; of one that raises, infinity."""
    with torch.cuda.device(device):
        found: dict[str, list[float]] = {}
        for i, (name, way) in enumerate(ways.items()):
            try:
                way()  # compiles what it needs
                found[name] = []
            except Exception:
                if i == 0:
                    raise
        for _ in range(ROUNDS):
            for name in found:
                found[name].append(_time(ways[name]))
    return {name: statistics.median(found[name]) if name in found else float("inf") for name in ways}


def _time(way: Callable[[], None]) -> float:
    """Time of CALLS calls on the current stream, in ms."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        way()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@functools.cache
def _machine(device: torch.device) -> str:
    """What a measurement holds for."""
    versions = (f"{package} {_version(package)}" for package in ("fusetune", "torch", "triton"))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return ", ".join((torch.cuda.get_device_name(device), capability, *versions))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _known(machine: str) -> dict[str, str]:
    """The choices for a machine, to be added to."""
    if machine not in _choices:
        _choices.setdefault(machine, _load().get(machine, {}))  # one dictionary for all threads
    return _choices[machine]


def _file() -> Path:
    """Raises RuntimeError where the user has no home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "fusetune" / "fastest.json"


def _load() -> dict[str, dict[str, str]]:
    """The file's choices; none where it is missing or is not what _store writes."""
    try:
        content = json.loads(_file().read_text())
        return {machine: {str(key): str(way) for key, way in cases.items()} for machine, cases in content.items()}
    except (OSError, RuntimeError, ValueError, AttributeError):
        return {}


def _store(machine: str, key: str, way: str) -> None:
    """Adds a choice to the file, which other processes may read and replace at the same time."""
    content = _load()
    content.setdefault(machine, {})[key] = way
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(descriptor, "w") as stream:
                json.dump(content, stream, indent=1, sort_keys=True)
            os.replace(partial, file)
        except OSError:
            os.unlink(partial)
            raise
    except (OSError, RuntimeError):  # a read-only home, a full disk, or none
        pass
