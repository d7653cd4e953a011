"""`fusetune info`: versions, the machine, and which backend each op takes here, or why it has none.

`--ops` says of each op why it takes that one, and what was measured on this GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fusetune

PACKAGES = ("torch", "transformers", "peft", "triton")
DEVICES = ("cpu", "cuda")


def report() -> dict[str, Any]:
    """What `fusetune info --json` prints; `problems` says what to mend, one line each.

    What depends on torch or on the extension is None or empty where they are missing.
    """
    problems: list[str] = []
    result: dict[str, Any] = {
        "fusetune": fusetune.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"name": _cpu_name(), "cores": _cores(), "threads": None},
        "isa": {"in_use": None, "available": [], "built": [], "forced": os.environ.get("FUSETUNE_ISA")},
        "extension": {"compiler": None, "cuda_archs": []},
        "openmp": [],
        "gpu": {"devices": [], "why_not": None},
        "backends": {},
        "measured": {},
        "gemm_dtype": {},
        "problems": problems,
    }
    try:
        import torch

        from fusetune import _native
    except (ImportError, OSError) as error:  # OSError: one of torch's libraries
        installed = result["packages"]["torch"] is not None
        missing = f"torch cannot be imported: {error}" if installed else "torch is not installed"
        problems.append(f"{missing}; `pip install 'torch>=2.9'`")
        result["gpu"]["why_not"] = missing
        return result

    result["cpu"]["threads"] = torch.get_num_threads()
    if reason := _native.why_not():
        problems.append(reason)
    else:
        native = _native.extension()
        result["isa"].update(in_use=native.isa(), available=native.isa_available(), built=native.isa_built())
        result["extension"] = {
            "compiler": native.compiler,
            "cuda_archs": native.cuda_archs.split(",") if native.with_cuda else [],
        }
        result["gemm_dtype"] = _gemm_dtypes()
    result["openmp"] = _openmp_runtimes()
    if len(result["openmp"]) > 1:
        problems.append(
            f"{len(result['openmp'])} OpenMP runtimes are loaded, each with threads of its own: "
            f"{', '.join(result['openmp'])}; import torch before other packages that bring one"
        )
    result["gpu"] = _gpu()
    result["backends"] = _backends(problems)
    if result["gpu"]["devices"]:
        from fusetune import _tune

        result["measured"] = _tune.measured(torch.device("cuda", torch.cuda.current_device()))
    return result


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return match[1]
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _openmp_runtimes() -> list[str]:
    """The OpenMP runtimes in this process, where the system shows them."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    return sorted(set(re.findall(r"/\S*/lib[gi]?omp\d*[^/\s]*\.so[.\d]*", maps.read_text())))


def _gpu() -> dict[str, Any]:
    import torch

    from fusetune import backend

    if not torch.cuda.is_available():
        return {"devices": [], "why_not": backend.why_not("cuda", "cuda")}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"devices": devices, "why_not": None}


def _gemm_dtypes() -> dict[str, str]:
    """In which dtype large products of 16-bit tensors run on the CPU."""
    import torch

    from fusetune import backend

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return {name: str(backend.gemm_dtype("cpu", dtype)).removeprefix("torch.") for name, dtype in dtypes.items()}


def _backends(problems: list[str]) -> dict[str, dict[str, Any]]:
    """By op and device: the backend that it takes, and why not the others."""
    import torch

    from fusetune import backend

    result: dict[str, dict[str, Any]] = {}
    for op, candidates in backend.BACKENDS.items():
        result[op] = {}
        for device in DEVICES:
            reasons = {name: backend.why_not(name, device) for name in candidates.get(device, ())}
            taken = None
            try:
                taken = backend.choose(op, torch.device(device))
            except NotImplementedError as error:
                if device == "cpu":
                    problems.append(str(error))
            except ValueError as error:  # FUSETUNE_BACKEND
                problems.append(str(error))
            why_not = {name: why for name, why in reasons.items() if why}
            result[op][device] = {"takes": taken, "why": _why(op, device, taken, reasons), "why_not": why_not}
    return result


def _why(op: str, device: str, taken: str | None, reasons: dict[str, str | None]) -> str:
    """Why an op takes its backend."""
    if taken is None:
        return "none of its backends works here"
    if os.environ.get("FUSETUNE_BACKEND"):
        return "FUSETUNE_BACKEND forces it"
    working = [name for name, reason in reasons.items() if reason is None]
    if op == "flash_attention" and device == "cuda":
        return "for each kind of call the fastest of its kernels and torch's attention, measured at the first such call"
    if op == "flash_attention":
        return "faster than torch's attention in all measured cells; torch's decodes single tokens"
    return "the only one that works here" if len(working) == 1 else f"the first of {', '.join(working)}"


def _ops_text(info: dict[str, Any]) -> str:
    """What `--ops` prints."""
    rows = [("op", "on", "takes", "because")]
    for op, devices in info["backends"].items():
        rows += [(op, device, choice["takes"] or "none", choice["why"]) for device, choice in devices.items()]
        for device, choice in devices.items():
            rows += [("", device, f"not {name}", why) for name, why in choice["why_not"].items()]
    lines = _columns(rows)
    if info["measured"]:
        lines += ["", *_columns([("measured on this GPU", "fastest"), *info["measured"].items()])]
    return "\n".join([*lines, *(f"problem: {problem}" for problem in info["problems"])])


def _text(info: dict[str, Any]) -> str:
    cpu, isa, gpu, extension = info["cpu"], info["isa"], info["gpu"], info["extension"]
    gpus = [f"{d['name']} (sm_{d['capability'].replace('.', '')}, {d['memory_gib']} GiB)" for d in gpu["devices"]]
    forced = f"; FUSETUNE_ISA={isa['forced']}" if isa["forced"] else ""
    rows = [
        ("fusetune", info["fusetune"]),
        ("python", f"{info['python']} on {info['platform']}"),
        *((name, version or "not installed") for name, version in info["packages"].items()),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores" + (f", {cpu['threads']} threads" if cpu["threads"] else "")),
        ("isa", f"{isa['in_use']} of {', '.join(isa['available'])} (built: {', '.join(isa['built'])}){forced}"),
        ("products", ", ".join(f"{name} in {dtype}" for name, dtype in info["gemm_dtype"].items())),
        ("openmp", ", ".join(info["openmp"])),
        ("gpu", ", ".join(gpus) or f"none: {gpu['why_not']}"),
        ("extension", f"{extension['compiler']}; CUDA kernels: {', '.join(extension['cuda_archs']) or 'none'}"),
    ]
    if isa["in_use"] is None:
        rows = [row for row in rows if row[0] not in ("isa", "products", "extension")]
    lines = _columns([row for row in rows if row[1]])
    if info["backends"]:
        table = [("op", *(f"on {device}" for device in DEVICES))]
        for op, devices in info["backends"].items():
            table.append((op, *(devices[device]["takes"] or "none" for device in DEVICES)))
        lines += ["", *_columns(table)]
        why_not = {
            f"{backend} on {device}": why
            for devices in info["backends"].values()
            for device, choice in devices.items()
            for backend, why in choice["why_not"].items()
        }
        if why_not:
            lines += ["", *_columns(list(why_not.items()))]
    lines += ["", *(f"problem: {problem}" for problem in info["problems"])] if info["problems"] else []
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fusetune info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--ops", action="store_true", help="print of each op which backend it takes, and why")
    arguments = parser.parse_args(argv)
    info = report()
    print(json.dumps(info, indent=2) if arguments.json else _ops_text(info) if arguments.ops else _text(info))
    return 0
