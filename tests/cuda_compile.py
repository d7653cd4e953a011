"""Compiles the CUDA C++ kernels for GPUs that need not be there, and reads what nvcc says of the result.

Targets and rows are also those of tests/triton_compile.py; benchmarks/cuda_build.py makes a table of both.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


class Target(NamedTuple):
    """What code is compiled for, and what one multiprocessor of it has for the blocks that it holds at a time.

    CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA reference.
    """

    name: str
    backend: str  # Triton's name of it
    arch: int | str
    lanes: int  # threads of a warp
    registers: int  # of 32 bits, in four parts, each of which holds whole warps
    shared: int  # bytes of shared memory,
    shared_unit: int  # given out in multiples of this,
    shared_reserved: int  # this many to each block besides its own
    shared_most: int  # that a block can have
    blocks: int
    threads: int = 2048


# An A100 gives a block 163 KiB, but the same code runs on compute capabilities 8.6, 8.9 and 12.0.
SM80 = Target("sm_80", "cuda", 80, 32, 65536, 164 << 10, 128, 1024, 99 << 10, 32)
SM90 = Target("sm_90", "cuda", 90, 32, 65536, 228 << 10, 128, 1024, 227 << 10, 32)
SM90A = SM90._replace(name="sm_90a")
GFX942 = Target("gfx942", "hip", "gfx942", 64, 131072, 64 << 10, 512, 0, 64 << 10, 16)


class Usage(NamedTuple):
    """What one kernel takes of one target."""

    case: str  # the kernel's file, or what Triton compiled it for
    kernel: str
    target: Target
    threads: int = 0  # of a block: those of its launch bounds; 0 where it states none
    promised: int = 1  # blocks a multiprocessor, of its launch bounds
    registers: int = 0
    local: int = 0  # bytes of a thread that are in memory: spilled registers, arrays, frames of calls
    shared: int = 0  # bytes of a block
    dynamic: bool = False  # whether it has more shared memory, whose size the launch gives
    parameters: tuple[str, ...] = ()
    error: str = ""  # why there is no code, and no numbers

    @property
    def blocks(self) -> int:
        """How many a multiprocessor holds at a time, dynamic shared memory left aside; 0 where that is not known."""
        if not self.registers or not self.threads:
            return 0
        target = self.target
        warps = math.ceil(self.threads / target.lanes)
        taken = math.ceil(self.registers / 8) * 8 * target.lanes  # registers are given to warps in eights a thread
        shared = math.ceil(self.shared / target.shared_unit) * target.shared_unit + target.shared_reserved
        return min(
            target.blocks,
            target.threads // (warps * target.lanes),
            target.registers // 4 // taken * 4 // warps,
            target.shared // shared if shared else target.blocks,
        )

    def problems(self) -> list[str]:
        """What no kernel may do."""
        if self.error:
            return [self.error]
        if not self.threads:
            return ["must state __launch_bounds__(threads, blocks)"]
        found = []
        if self.local:
            found.append(f"keeps {self.local} bytes of a thread in memory")
        if self.shared > self.target.shared_most:
            found.append(f"takes {self.shared} bytes of shared memory where a block has {self.target.shared_most}")
        if self.blocks < self.promised:
            found.append(f"promises {self.promised} blocks a multiprocessor where {self.blocks} fit")
        # Sizes and strides are int64 (csrc/*.h); counts of dropout's threshold are unsigned.
        if narrow := {"int", "short", "signed char"} & set(self.parameters):
            found.append(f"has a parameter of type {', '.join(sorted(narrow))}, where sizes and strides are int64_t")
        return found


@functools.cache
def nvcc() -> str | None:
    """The compiler that CMake takes, where it is of version 12 or later."""
    found = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    return found if found and int(version(found).split(".")[0]) >= 12 else None


def version(compiler: str) -> str:
    said = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", said)[1]


def flags(source: Path) -> list[str]:
    """Those of CMakeLists.txt for a file of csrc/cuda."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (standard,) = re.findall(r"set\(CMAKE_CUDA_STANDARD (\d+)\)", text)
    of_all = re.findall(r"^ *target_compile_options\(cuda_kernels PRIVATE ([^)]*)\)", text, re.MULTILINE)[0]
    of_file = re.findall(rf"csrc/cuda/{source.name} PROPERTIES COMPILE_OPTIONS ([^)]*)\)", text)
    return [f"-std=c++{standard}", "-O3", *" ".join([of_all, *of_file]).replace(";", " ").replace('"', "").split()]


def targets(source: Path) -> tuple[Target, ...]:
    """A file whose name ends in _sm90 is for that architecture only."""
    return (SM90A,) if source.stem.endswith("_sm90") else (SM80, SM90A)


def kernels(source: Path) -> list[str]:
    """Names of the kernels that a file defines."""
    return re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s+)?(\w+)", source.read_text())


def split(mangled: str) -> tuple[str, tuple[str, ...]]:
    """Short name and parameters' types of a kernel, its name as the compiler has it: `down<bf16, 32>`."""
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
    name = re.sub(r"(\w+|\(anonymous namespace\))::", "", name.removeprefix("void "))
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        name = re.sub(rf"\b{long}\b", short, name)
    kernel, parameters = re.fullmatch(r"(.*)\((.*)\)", name).groups()
    return kernel, tuple(parameters.split(", "))


def compile_file(source: Path, target: Target) -> list[Usage]:
    """Compiles a file with its flags, warnings being errors.

    Raises:
        RuntimeError: it does not compile; the compiler's message.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), *flags(source), f"-arch={target.name}", "-cubin"]
        command += ["-Werror=all-warnings", "-Xptxas=-v", "-Xptxas=-Werror"]
        command += ["-keep", f"-keep-dir={folder}", f"-o={folder}/out.cubin", source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # What the assembler says of wgmma: products that it serialised, setmaxnreg that it ignored. No warnings to it.
        if done.returncode or re.search(r"\(C75\d\d\)", done.stderr):
            raise RuntimeError(f"{source.name}: {done.stdout}{done.stderr}")
        ptx = Path(folder, f"{source.stem}.ptx").read_text()
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry |\Z)", ptx, re.DOTALL))
    usages = []
    for report in done.stderr.split("Compiling entry function '")[1:]:
        mangled = report.partition("'")[0]
        kernel, parameters = split(mangled)
        directives, _, body = entries[mangled].partition("{")
        bounds = re.search(r"\.(?:max|req)ntid ([\d, ]+)", directives)
        promised = re.search(r"\.minnctapersm (\d+)", directives)
        shared = re.search(r"(\d+) bytes smem", report)
        usages.append(
            Usage(
                source.name,
                kernel,
                target,
                math.prod(map(int, bounds[1].split(","))) if bounds else 0,
                int(promised[1]) if promised else 1,
                int(re.search(r"Used (\d+) registers", report)[1]),
                sum(map(int, re.findall(r"(\d+) bytes stack frame", report))),
                int(shared[1]) if shared else 0,
                "dynamic_shared" in body,
                parameters,
            )
        )
    return sorted(usages, key=lambda usage: usage.kernel)


def compile_all(sources: Iterable[Path] = SOURCES) -> list[Usage]:
    """Compiles files for each of their targets."""
    jobs = [(source, target) for source in sources for target in targets(source)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [usage for usages in pool.map(lambda job: compile_file(*job), jobs) for usage in usages]
