"""Compiles the Triton kernels for GPUs that need not be there, and reads what the compiler says of the result.

A case's kernels are those that its launch functions launch, with the tiles and options that they choose for the target.
Targets and rows are those of tests/cuda_compile.py; benchmarks/cuda_build.py makes a table of both.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from cuda_compile import GFX942, SM80, SM90, Target, Usage
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fusetune._native import DTYPES
from fusetune.kernels import adamw, device, dora, flash_attention, lora, quantize
from fusetune.ops._adamw_table import INT8, MASTER, PLAIN, SPLIT, STOCHASTIC
from fusetune.ops._flash_attention_backends import Arguments

# Of the AMD code object: registers with the accumulation registers, and bytes of scratch memory a thread.
HIP_METADATA = ("vgpr_count", "private_segment_fixed_size")
TARGETS = (SM80, SM90, GFX942)


def lora_case(
    dtype: torch.dtype, adapter: torch.dtype, M: int, K: int, N: int, R: int, p: float, masks: int = 1
) -> None:
    """Both passes of a layer. s and ds are columns of a wider matrix, whose rows are not aligned where there are masks;
    gradients are float32, as those of compute="fast" are."""
    x, dy = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
    a, b = torch.empty(R, K, dtype=adapter), torch.empty(N, R, dtype=adapter)
    s, bias = torch.empty(M, R + (5 if masks > 1 else R))[:, :R], torch.empty(N)
    seed = torch.zeros(masks, dtype=torch.int64) if p else None
    lora.down(x, a, s, 1.0, p, seed)
    lora.up(s, b.t(), bias, dy, 2.0, 0.0, None, masks > 1)
    lora.down(dy, b.t(), s, 2.0, 0.0, None)
    lora.up(s, a, None, x, 1.0, p, seed, False)
    lora.outer(s, x, torch.empty(R, K), 1.0, p, seed, adapter)
    lora.outer(s, dy, torch.empty(N, R, dtype=adapter).t(), 2.0, 0.0, None, adapter)
    if dtype != torch.float32 and masks > 1:  # unaligned rows take the most registers
        w = torch.empty(N, K, dtype=dtype)
        for tile in lora.linear_tiles(x.device):
            lora.linear(x, w, s, b.t(), bias, dy, 2.0, 0.0, None, tile)
            lora.linear(dy, w.t(), s, a, None, x, 1.0, p, seed[:1], tile)


def dora_case(dtype: torch.dtype, adapter: torch.dtype, M: int, K: int, N: int, R: int) -> None:
    x, w, y = torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
    g = torch.empty(N)
    dora.norm(w, torch.empty(R, K, dtype=adapter), torch.empty(N, R, dtype=adapter), g, 2.0)
    dora.forward(y, g, g, y, y)
    dora.backward(y, y, g, y, g, g)
    dora.dropout(x, x, 0.1, torch.zeros(1, dtype=torch.int64))


ATTENTION = {  # options of a case, by name
    "": {},
    ", causal": {"right": 0},
    ", causal, padding, dropout": {"right": 0, "keep": True, "dropout_p": 0.1},
    ", bias, dropout": {"bias": True, "dropout_p": 0.1},
    ", relative, dropout": {"relative": True, "dropout_p": 0.1},
    ", packed, causal": {"packed": True, "right": 0},
    ", window, softcap, sinks": {"left": 127, "right": 0, "softcap": 50.0, "sinks": True},
    ", mask": {"mask": True},
}
FEATURES = list(ATTENTION)


def attention_case(dtype: torch.dtype, B: int, H: int, Hkv: int, S: int, D: int, **options: Any) -> None:
    """Both passes, with the gradients of all that has one."""
    has = {name: options.pop(name, False) for name in ("keep", "mask", "bias", "relative", "sinks", "packed")}
    q, k, v = (torch.empty(B, S, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, Hkv, Hkv))
    lse, starts = torch.empty(B, H, S), torch.empty(9, dtype=torch.int32) if has["packed"] else None
    dbias, drelative, dsinks = torch.empty(1, H, S, S), torch.empty(H, 2 * S - 1), torch.empty(H)
    arguments = Arguments(
        torch.empty(B, S, dtype=torch.bool) if has["keep"] else None,
        torch.empty(B, 1, S, S, dtype=torch.bool) if has["mask"] else None,
        dbias.to(dtype) if has["bias"] else None,
        drelative if has["relative"] else None,
        dsinks if has["sinks"] else None,
        *(starts, starts, D**-0.5),
        **{"softcap": 0.0, "left": -1, "right": -1, "top_left": False, "dropout_p": 0.0, **options},
        seed=torch.zeros(1, dtype=torch.int64) if options.get("dropout_p") else None,
    )
    flash_attention.forward(q, k, v, arguments, q, lse)
    needed = [t if has[name] else t[:0] for name, t in (("bias", dbias), ("relative", drelative), ("sinks", dsinks))]
    flash_attention.backward(q, None, q, k, v, arguments, q, lse, q, k, v, *needed)


ADAMW = {  # dtype, m and v's code, how the parameter is kept, amsgrad, aligned
    "adamw fp32": (torch.float32, 0, PLAIN, False, True),
    "adamw fp32, amsgrad, unaligned": (torch.float32, 0, PLAIN, True, False),
    "adamw fp32, 8 bits": (torch.float32, INT8, PLAIN, False, True),
    "adamw fp32, bf16 states": (torch.float32, 1, PLAIN, True, True),
    "adamw bf16": (torch.bfloat16, 1, PLAIN, False, True),
    "adamw bf16, stochastic": (torch.bfloat16, 1, STOCHASTIC, True, True),
    "adamw bf16, stochastic, unaligned": (torch.bfloat16, 1, STOCHASTIC, True, False),
    "adamw bf16, fp32 states, split": (torch.bfloat16, 0, SPLIT, True, True),
    "adamw bf16, 8 bits": (torch.bfloat16, INT8, PLAIN, False, True),
    "adamw bf16, 8 bits, stochastic, unaligned": (torch.bfloat16, INT8, STOCHASTIC, False, False),
    "adamw bf16, 8 bits, split": (torch.bfloat16, INT8, SPLIT, False, True),
    "adamw fp16, amsgrad, unaligned": (torch.float16, 2, PLAIN, True, False),
    "adamw fp16, fp32 states, master": (torch.float16, 0, MASTER, True, True),
}


def adamw_case(dtype: torch.dtype, state: int, weights: int, amsgrad: bool, aligned: bool) -> None:
    address = 16 if aligned else 2
    row = [address] * 4 + [address if amsgrad else 0] + [address] * 5
    row += [4096, DTYPES[dtype] | state << 4 | weights << 8, 0, 1]
    table, one = torch.tensor(row)[:, None], torch.ones(1)
    adamw.step(table, torch.zeros(1, 6, dtype=torch.float64), torch.zeros(2, 256), one.device, one, one, one, 1.0)
    adamw.grad_norm(table, one.device, one, one)


def quantize_case(dtype: torch.dtype, bits: int) -> None:
    codes = torch.empty(1 << 20, dtype=torch.uint8 if bits == 4 else torch.int8)
    absmax = torch.empty(1 << 15, dtype=torch.uint8 if bits == 4 else torch.float32)
    nested = torch.empty(385) if bits == 4 else None
    block = 64 if bits == 4 else 1024
    quantize.dequantize(
        codes, absmax, nested, torch.empty(16), torch.empty(512, 512, dtype=dtype), 0, 512, 1024, block, bits
    )


def cases() -> dict[str, Callable[[], None]]:
    """Calls of launch functions, by name."""
    found: dict[str, Callable[[], None]] = {}
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    for dtype, name in short.items():
        for adapter, R in itertools.product(dict.fromkeys([dtype, torch.float32]), (16, 64, 128)):
            mixed = "" if adapter is dtype else f", {short[adapter]} adapter"
            found[f"lora {name}{mixed}, R={R}, dropout"] = lambda d=dtype, a=adapter, R=R: lora_case(
                d, a, 2048, 1024, 768, R, 0.1
            )
            if R == 64:  # between the others, and each case takes seconds
                continue
            found[f"lora {name}{mixed}, R={R}, dropout of two masks"] = lambda d=dtype, a=adapter, R=R: lora_case(
                d, a, 2048, 1024, 768, 2 * R, 0.1, 2
            )
        for adapter in dict.fromkeys([dtype, torch.float32]):
            mixed = "" if adapter is dtype else f", {short[adapter]} adapter"
            found[f"dora {name}{mixed}"] = lambda d=dtype, a=adapter: dora_case(d, a, 2048, 1024, 768, 16)
        for D, (features, options) in itertools.product((64, 128, 256), ATTENTION.items()):
            if dtype == torch.float16 and not features.startswith(", causal"):  # as bfloat16
                continue
            if FEATURES.index(features) > 2 and (dtype == torch.float32 or D == 256):  # slow to compile, and rare
                continue
            found[f"attention {name}, D={D}{features}"] = lambda d=dtype, D=D, options=options: attention_case(
                d, 1 if "packed" in options else 2, 8, 2, 1024, D, **options
            )
        for bits, quantized in ((4, "nf4"), (8, "int8")):
            found[f"quantize {quantized}, {name}"] = lambda d=dtype, bits=bits: quantize_case(d, bits)
    for name, options in ADAMW.items():
        found[name] = lambda options=options: adamw_case(*options)
    # Sizes of one become constants of the kernel.
    found["lora fp32, sizes of one"] = lambda: lora_case(torch.float32, torch.float32, 1, 1, 1, 1, 0.0)
    found["dora fp32, sizes of one"] = lambda: dora_case(torch.float32, torch.float32, 1, 1, 1, 1)
    found["attention fp32, sizes of one"] = lambda: attention_case(torch.float32, 1, 1, 1, 1, 1, right=0)
    return found


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def launches(call: Callable[[], None], target: Target) -> list[Launch]:
    """What `call` launches on a target, without launching it."""
    found = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
        found.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    capability = device.AMD if target.backend == "hip" else target.arch // 10
    patch = mock.patch.object(device, "capability", return_value=capability)
    with mock.patch.object(JITFunction, "run", record), patch:
        call()
    return found


def specialize(value: Any) -> tuple[Any, Any]:
    """The type of an argument, and whether 16 is known to divide it, as Triton's launcher has them."""
    if isinstance(value, tuple):
        types, divisible = zip(*map(specialize, value), strict=True)
        return value._make(types) if hasattr(value, "_make") else types, divisible
    if isinstance(value, torch.Tensor):
        kind, bits = re.fullmatch(r"torch\.([a-z]+)(\d*)", str(value.dtype)).groups()
        return "*" + {"float": "fp", "bfloat": "bf", "int": "i", "uint": "u", "bool": "i1"}[
            kind
        ] + bits, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if value is None or value == 1:
        return "constexpr", False
    return "i32" if abs(value) < 2**31 else "i64", value % 16 == 0


@contextlib.contextmanager
def collect_stderr() -> Iterator[list[str]]:
    """Lines that are written to stderr, by native code too; there are none before the end."""
    lines: list[str] = []
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_launch(case: str, target: Target, launch: Launch) -> Usage:
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def walk(path: tuple[int, ...], kind: Any, divisible: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for i, parts in enumerate(zip(kind, divisible, value, strict=True)):
                walk((*path, i), *parts)
        elif kind == "constexpr":
            constants[path] = value
        elif divisible:
            attributes[path] = [["tt.divisibility", 16]]

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, divisible = specialize(value) if not parameter.is_constexpr else ("constexpr", False)
        if parameter.do_not_specialize:
            kind, divisible = "i32", False
        signature[parameter.name] = kind
        walk((i,), kind, divisible, value)

    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    usage = Usage(case, launch.kernel.__name__, target)
    try:
        with collect_stderr() as lines:
            compiled = triton.compile(
                source, target=GPUTarget(target.backend, target.arch, target.lanes), options=launch.options
            )
    except Exception as error:  # of the frontend, with the line that it concerns; or of a pass, which has said why
        reasons = [line.partition("error: ")[2] for line in lines if "error: " in line]
        return usage._replace(error=[*reasons, str(error).splitlines()[-1]][0])
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, local = (re.search(rf"\.{name}:\s+(\d+)", text)[1] for name in HIP_METADATA)
    else:
        report = disassemble(compiled.asm["cubin"])
        registers = re.search(r"REG:(\d+)", report)[1]
        local = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", report)))
    return usage._replace(
        threads=compiled.metadata.num_warps * target.lanes,
        registers=int(registers),
        local=int(local),
        shared=compiled.metadata.shared,
    )


def compile_case(job: tuple[str, Target]) -> list[Usage]:
    case, target = job
    return [compile_launch(case, target, launch) for launch in launches(cases()[case], target)]


def compile_all(jobs: Iterable[tuple[str, Target]]) -> list[Usage]:
    """Compiles cases for targets, in processes of their own: Triton compiles nothing where it interprets."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        os.environ.pop("TRITON_INTERPRET", None)
        spawn = multiprocessing.get_context("spawn")
        pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn))
        return [usage for usages in pool.map(compile_case, jobs) for usage in usages]
