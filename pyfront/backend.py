"""Which backends work on this machine, and which one an op takes.

`FUSETUNE_BACKEND` (cpu, cuda, triton or reference) forces one for tests and support.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from fusetune import _native

# The backends of each op, in order of preference, by device type. Triton runs on the CPU only in its interpreter.
BACKENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "lora": {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")},
    "dora": {"cpu": ("cpu", "triton"), "cuda": ("triton",)},
    "flash_attention": {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")},
    "adamw": {"cpu": ("cpu", "triton"), "cuda": ("cuda", "triton")},
    "quantize": {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")},
}


@functools.cache
def why_not(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run for tensors on `device_type` here, or None where it can."""
    if backend == "reference":
        return None
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "torch is built without CUDA"
    if backend == "triton":
        if not importlib.util.find_spec("triton"):
            return "triton is not installed"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton needs a GPU; TRITON_INTERPRET=1 interprets its kernels, slowly"
        return None
    if reason := _native.why_not():
        return reason
    if backend == "cuda" and not _native.extension().with_cuda:
        return "fusetune was built without CUDA; FUSETUNE_CUDA=1 builds it"
    return None


def choose(op: str, device: torch.device) -> str:
    """The backend that `op` takes for tensors on `device`.

    Raises:
        NotImplementedError: no backend of the op works there; says why for each.
        ValueError: FUSETUNE_BACKEND is not a backend of this op on this device.
    """
    candidates = BACKENDS[op].get(device.type, ())
    if forced := os.environ.get("FUSETUNE_BACKEND"):
        if forced not in (*candidates, "reference"):
            options = ", ".join((*candidates, "reference"))
            raise ValueError(f"FUSETUNE_BACKEND: must be one of {options} for {op} on {device.type}, got {forced}")
        candidates = (forced,)
    for backend in candidates:
        if why_not(backend, device.type) is None:
            return backend
    reasons = "; ".join(f"{backend}: {why_not(backend, device.type)}" for backend in candidates)
    raise NotImplementedError(
        f"{op}: no backend works on {device.type} ({reasons or 'no kernel for it'}); FUSETUNE_BACKEND=reference does"
    )


# What torch.compiler.assume_constant_result does, which imports Dynamo and takes seconds. Without it Dynamo traces past
# the caches, and warns of them.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def gemm_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which large products of `dtype` tensors run fastest.

    float32 for 16-bit types on a CPU without instructions for them: torch emulates those products there at a tenth of
    the float32 rate (benchmarks/NOTES.md).
    """
    if device_type != "cpu" or dtype == torch.float32:
        return dtype
    native = (
        "avx512_bf16" in _native.extension().isa_available()
        if dtype == torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported()
    )
    return dtype if native else torch.float32
