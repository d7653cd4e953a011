"""What the GPU kernels take of their targets, as their compilers say, without a GPU.

python benchmarks/cuda_build.py            writes results/cuda-build.md; takes minutes
python benchmarks/cuda_build.py WORD ...   prints the rows of the cases whose name contains a word
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from results import table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cuda_compile  # noqa: E402
import triton_compile  # noqa: E402
from cuda_compile import Usage  # noqa: E402
from cuda_host import harness  # noqa: E402

DOCUMENT = """# What the GPU kernels take

Made by `python benchmarks/cuda_build.py` with nvcc {nvcc} and Triton {triton}. **None of it has run on a device**: this
is what the compilers say. A cell is *threads of a block × registers of a thread, shared memory of a block, blocks that
a multiprocessor (AMD: compute unit) holds at a time*; the last is computed from the others, and in brackets is what
launch bounds promise. Nothing of a thread is kept in memory but where a cell says **spilled**.
`tests/test_cuda_build.py` and `tests/test_triton.py` hold the kernels to it.

## CUDA C++

≤ where a launch adds dynamic shared memory, whose size is not known here: fewer blocks may fit.

{cuda}
## Triton

From least to most over both 16-bit types, the launches of forward and backward, and calls with and without causal mask,
padding, dropout and amsgrad.

{triton_kernels}
## Lines executed on the host

By the tests of small sizes, with `tests/cuda_host/`; of the lines that gcov counts. `mma.cuh` is inline PTX,
and its twin on the host runs instead.

{coverage}"""


def span(values: list[float], form: str = "{}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def cell(usages: list[Usage]) -> str:
    """Rows of one target, as one."""
    if not usages:
        return "–"
    if errors := {usage.error for usage in usages if usage.error}:
        return f"does not compile: {'; '.join(sorted(errors))}"
    parts = [f"{span([usage.threads for usage in usages])} × {span([usage.registers for usage in usages])}"]
    if any(usage.local for usage in usages):
        parts.append(f"**{span([usage.local for usage in usages])} B spilled**")
    dynamic = any(usage.dynamic for usage in usages)
    parts.append(f"{span([usage.shared / 1024 for usage in usages], '{:.3g}')} KiB{' + dynamic' * dynamic}")
    promised = max(usage.promised for usage in usages)
    parts.append("≤ " * dynamic + span([usage.blocks for usage in usages]) + f" (≥ {promised})" * (promised > 1))
    return ", ".join(parts)


def rows(usages: list[Usage]) -> str:
    """A line for each case and kernel, and a column for each target."""
    targets = list(dict.fromkeys(usage.target for usage in usages))
    lines: dict[tuple[str, str], list[Usage]] = defaultdict(list)
    for usage in usages:
        lines[group(usage)].append(usage)
    return table(
        ["case", "kernel", *(target.name for target in targets)],
        (
            [case, f"`{kernel}`", *(cell([usage for usage in found if usage.target == target]) for target in targets)]
            for (case, kernel), found in lines.items()
        ),
    )


def group(usage: Usage) -> tuple[str, str]:
    """Case and kernel of the row that a usage belongs to."""
    case = re.sub(r", (causal|padding|dropout of two masks|dropout|amsgrad|unaligned)", "", usage.case)
    return tuple(re.sub(r"\b(bf16|fp16)\b", "16-bit", name) for name in (case, usage.kernel))


def executed() -> str:
    return table(
        ["file", "lines", "executed"],
        (
            [file, len(lines), sum(count > 0 for count in lines.values())]
            for file, lines in sorted(harness.lines_executed().items())
        ),
    )


def main(words: list[str]) -> None:
    if not cuda_compile.nvcc():
        raise SystemExit("cuda_build.py: needs nvcc 12 or later on PATH or in CUDACXX")

    def wanted(name: str) -> bool:
        return not words or any(word in name for word in words)

    coverage = "" if words else executed()
    cuda = cuda_compile.compile_all(source for source in cuda_compile.SOURCES if wanted(source.name))
    jobs = [(name, target) for name in triton_compile.cases() if wanted(name) for target in triton_compile.TARGETS]
    kernels = triton_compile.compile_all(jobs)
    if words:
        print(f"{rows(cuda)}\n{rows(kernels)}")
        return
    text = DOCUMENT.format(
        coverage=coverage,
        nvcc=cuda_compile.version(cuda_compile.nvcc()),
        triton=triton_compile.triton.__version__,
        cuda=rows(cuda),
        triton_kernels=rows(kernels),
    )
    (ROOT / "benchmarks" / "results" / "cuda-build.md").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
