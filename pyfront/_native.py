"""The only importer of the compiled extension: addresses, dtype codes, and why something is missing."""

from __future__ import annotations

import contextlib
import functools
import os
from array import array
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch  # before the extension: its libgomp is then the process's only OpenMP runtime
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/dtype.h


@functools.cache
def extension() -> ModuleType:
    """The extension `fusetune._C`, its ISA level set from FUSETUNE_ISA.

    Raises:
        ImportError: the extension was not built, or not for this Python.
        ValueError: FUSETUNE_ISA names a level that this build or this CPU lacks.
    """
    try:
        from fusetune import _C
    except ImportError as error:
        raise ImportError(
            f"fusetune: the compiled extension cannot be imported ({error}); reinstall with `pip install fusetune`"
        ) from error
    if level := os.environ.get("FUSETUNE_ISA"):
        _C.set_isa(level)
    return _C


def why_not() -> str | None:
    """Why the extension cannot be used here, or None."""
    try:
        extension()
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def address(tensor: Tensor | None) -> int:
    """The data pointer, 0 for None. The caller keeps the tensor alive until the native call returns."""
    return 0 if tensor is None else tensor.data_ptr()


READ_FIELDS = 3


def read_tensors(objects: list[Any], out: array[int]) -> bool:
    """Reads where the memory of many tensors is and what it holds, without a call in Python for each.

    Args:
        objects: tensors and parameters, and dicts that stand for their values.
        out: [READ_FIELDS, tensors] is written here: addresses; numbers of elements; kinds, which are equal for equal
            dtype, device and contiguity.

    Returns:
        False where something else is among them, a subclass perhaps, or a tensor without memory, or their number is
        not that of `out`. Then `out` is undefined.
    """
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    room = len(out) // READ_FIELDS
    if api is not None:
        address = out.buffer_info()[0]
        return bool(extension().read_tensors(api, torch.Tensor, torch.nn.Parameter, objects, address, room))
    # a torch that lacks the API
    tensors = [t for o in objects for t in (o.values() if isinstance(o, dict) else (o,))]
    if len(tensors) != room or not all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors):
        return False
    try:
        out[:room] = array("q", [t.data_ptr() for t in tensors])
    except RuntimeError:
        return False
    out[room : 2 * room] = array("q", [t.numel() for t in tensors])
    out[2 * room :] = array("q", [hash((t.dtype, t.device, t.is_contiguous())) for t in tensors])
    return True


def code(dtype: torch.dtype) -> int:
    return DTYPES[dtype]


def threads() -> int:
    return torch.get_num_threads()


@contextlib.contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """Makes a CUDA device the current one; gives the stream that torch uses there, which is asked for at each call."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
