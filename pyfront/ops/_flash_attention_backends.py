"""Attention's backends: how each is called, and on a GPU which of them, or torch's own, is the fastest."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusetune import _native
from fusetune._tune import fastest
from fusetune.backend import choose, why_not

# On a GPU. The first takes every call, and is taken until a measurement favours another that agrees with it.
ON_GPU = ("triton", "cuda", "cuda_sm90")
_NATIVE = {"cuda": "cuda_flash_attention", "cuda_sm90": "cuda_flash_attention_sm90"}
_LARGEST = 2**31 - 1

Trial = Callable[[str], Sequence[Tensor]]


class Arguments(NamedTuple):
    """What the backends get besides q, k and v: the arguments of `flash_attention` in the form of the contract."""

    keep: Tensor | None  # [B, Sk] bool
    mask: Tensor | None  # [B|1, H|1, Sq|1, Sk|1] bool
    bias: Tensor | None  # the same, of any float dtype
    relative: Tensor | None  # [H, 2N - 1] float32, contiguous
    sinks: Tensor | None  # [H] float32, contiguous
    q_starts: Tensor | None  # [members + 1] int32, contiguous
    k_starts: Tensor | None
    scale: float
    softcap: float  # 0: none
    left: int  # -1: unbounded
    right: int
    top_left: bool
    dropout_p: float
    seed: Tensor | None  # [1] int64


def forward(backend: str, q: Tensor, k: Tensor, v: Tensor, a: Arguments, o: Tensor, lse: Tensor) -> None:
    """Writes o and lse, by a backend that takes the call."""
    if backend == "triton":
        from fusetune.kernels import flash_attention as triton_attention

        triton_attention.forward(q, k, v, a, o, lse)
        return
    extension = _native.extension()
    if backend == "cpu":
        extension.flash_attention_forward(_call(q, k, v, a, o, lse), _native.threads())
        return
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    with _native.current_stream(q.device) as stream:
        getattr(extension, f"{_NATIVE[backend]}_forward")(_call(q, k, v, a, o, lse), stream)


def backward(
    backend: str,
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Arguments,
    o: Tensor,
    lse: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    """Writes the gradients of q, k, v, and adds those of bias, relative and sinks, empty where they are not wanted."""
    if backend == "triton":
        from fusetune.kernels import flash_attention as triton_attention

        triton_attention.backward(grad_o, grad_lse, q, k, v, a, o, lse, *gradients)
        return
    extension = _native.extension()
    if backend != "cpu":
        grad_o, q, k, v, o = (_aligned(t) for t in (grad_o, q, k, v, o))
    call = _call(q, k, v, a, o, lse)
    call.grad_o, call.grad_o_stride, call.grad_lse = grad_o.data_ptr(), grad_o.stride()[:3], _native.address(grad_lse)
    dq, dk, dv, dbias, drelative, dsinks = gradients
    call.dq, call.dk, call.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    call.dq_stride, call.dk_stride, call.dv_stride = dq.stride()[:3], dk.stride()[:3], dv.stride()[:3]
    call.dbias, call.drelative, call.dsinks = (t.data_ptr() if t.numel() else 0 for t in (dbias, drelative, dsinks))
    if dbias.numel():
        call.dbias_stride = _broadcast_strides(dbias)
    if backend == "cpu":
        extension.flash_attention_backward(call, _native.threads())
        return
    with _native.current_stream(q.device) as stream:
        if backend == "cuda":
            workspace = q.new_empty(*lse.shape, 2, dtype=torch.float32)
            call.workspace = workspace.data_ptr()
            extension.cuda_flash_attention_backward(call, stream)
        else:
            size = extension.cuda_flash_attention_sm90_workspace(*lse.shape)
            workspace = q.new_empty(size, dtype=torch.float32)
            extension.cuda_flash_attention_sm90_backward(call, workspace.data_ptr(), stream)


def choose_for(q: Tensor, k: Tensor, v: Tensor, a: Arguments, trial: Trial) -> str:
    """The backend for a call.

    Args:
        trial: runs forward and backward by one of the backends on a GPU; gives the results.

    Raises:
        NotImplementedError: FUSETUNE_BACKEND forces one that does not take the call.
    """
    backend = choose("flash_attention", q.device)
    if backend in ("cpu", "reference"):
        return backend
    if os.environ.get("FUSETUNE_BACKEND"):
        if reason := refuses(backend, q, k, v, a):
            raise NotImplementedError(f"flash_attention: {reason}; FUSETUNE_BACKEND must not be {backend}")
        return backend
    candidates = [name for name in ON_GPU if works(name, q.device) and not refuses(name, q, k, v, a)]
    return fastest_of(candidates, q, k, v, a, trial) if len(candidates) > 1 else candidates[0]


def refuses(backend: str, q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> str | None:
    """Why a backend does not take a call, or None. Triton takes all."""
    if backend == "triton":
        return None
    if q.dtype == torch.float32:
        return "q must be bfloat16 or float16, got float32, which Triton takes"
    hopper = backend == "cuda_sm90"
    for name, given in (
        ("mask", a.mask is not None),
        ("bias", a.bias is not None),
        ("relative_bias", a.relative is not None),
        ("sinks", a.sinks is not None),
        ("softcap", a.softcap != 0),
        ("key_padding_mask", hopper and a.keep is not None),
        ("cu_seqlens_q", hopper and a.q_starts is not None),
    ):
        if given:
            return f"{name} must be None, which Triton takes"
    if hopper and a.dropout_p:
        return f"dropout_p must be 0, got {a.dropout_p}, which Triton takes"
    if not a.scale > 0:
        return f"scale must be positive, got {a.scale}, which Triton takes"
    D, Dv = q.shape[3], v.shape[3]
    if backend == "cuda":
        if D % 8 or Dv % 8 or not (8 <= D <= 128 and 8 <= Dv <= 128):
            return f"D and Dv must be multiples of 8 from 8 to 128, got {D}, {Dv}, which Triton takes"
        return None
    if D != Dv or D not in (64, 128):
        return f"D and Dv must be equal, 64 or 128, got {D}, {Dv}, which Triton takes"
    if a.left != -1 or a.right not in (-1, 0):
        return f"window must be none or causal, got ({a.left}, {a.right}), which Triton takes"
    if not all(0 < t.numel() and max(t.shape) <= _LARGEST for t in (q, k, v)):
        return f"sizes must be from 1 to {_LARGEST}, which Triton takes"
    return None


def works(backend: str, device: torch.device) -> bool:
    """Whether a backend runs here."""
    if why_not("cuda" if backend == "cuda_sm90" else backend, device.type):
        return False
    if backend != "cuda_sm90":
        return True
    return torch.cuda.get_device_capability(device)[0] == 9 and hasattr(
        _native.extension(), "cuda_flash_attention_sm90_forward"
    )


def _aligned(x: Tensor) -> Tensor:
    """x with rows at multiples of 16 bytes that do not overlap, as the CUDA kernels read it."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    if x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 and s >= x.shape[-1] for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def fastest_of(candidates: Sequence[str], q: Tensor, k: Tensor, v: Tensor, a: Arguments, trial: Trial) -> str:
    """Which backend is the fastest for calls like this one.

    Args:
        candidates: the backends that take the call.
        trial: runs forward and backward by one of them; gives the results. What it gives for another candidate than the
            first must agree with that, or the candidate is out.
    """
    expected: list[Tensor] = []
    agreed = set(candidates[:1])

    def way(backend: str) -> None:
        results = trial(backend)
        if not expected:
            expected.extend(results)
        if backend not in agreed:
            _check_agreement(backend, results, expected)
            agreed.add(backend)

    return fastest("flash_attention", case(q, k, v, a), q.device, {b: functools.partial(way, b) for b in candidates})


def torch_is_faster(q: Tensor, k: Tensor, v: Tensor, a: Arguments, ours: Callable[..., Tensor]) -> bool:
    """Whether torch's own attention beats `ours`, forward and backward, at a call that it can take."""
    if os.environ.get("FUSETUNE_BACKEND"):
        return False
    causal = a.right == 0
    given = any(t is not None for t in a[:7]) or a.softcap or a.dropout_p
    if given or a.left != -1 or a.right > 0 or (causal and q.shape[2] != k.shape[2]) or not q.numel() or not k.numel():
        return False
    if not _on_gpu(q):  # one new token: packing the keys costs more than the product (bench_flash_attention's decoding)
        return q.device.type == "cpu" and q.shape[2] == 1 and not _trains(q, k, v)

    def run(attend: Callable[..., Tensor]) -> Callable[[], None]:
        def way() -> None:
            leaves = [t.detach().requires_grad_(torch.is_grad_enabled()) for t in (q, k, v)]
            o = attend(*leaves)
            if o.requires_grad:
                torch.autograd.grad(o, leaves, o.detach())

        return way

    ways = {"fusetune": run(ours), "torch": run(lambda q, k, v: torch_attention(q, k, v, a))}
    passes = "both passes" if _trains(q, k, v) else "forward"
    return fastest("flash_attention or torch", (*case(q, k, v, a), passes), q.device, ways) == "torch"


def torch_attention(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> Tensor:
    """The call by torch's scaled_dot_product_attention, which chooses among flash, cuDNN and efficient attention."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=a.right == 0, scale=a.scale, enable_gqa=gqa)


def case(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> tuple[object, ...]:
    """What a choice depends on. Sizes are rounded up to powers of 2, so that not every length is measured."""
    B, Sq, Sk = (1 << (size - 1).bit_length() if size else 0 for size in (q.shape[0], q.shape[2], k.shape[2]))
    features = [name for name in a._fields[:7] if getattr(a, name) is not None]
    features += ["softcap"] * (a.softcap != 0) + ["dropout"] * (a.dropout_p != 0) + ["top left"] * a.top_left
    features += [f"window {a.left} {a.right}"] * ((a.left, a.right) != (-1, -1))
    return (q.dtype, B, *q.shape[1:2], *k.shape[1:2], Sq, Sk, q.shape[3], v.shape[3], *features)


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _check_agreement(backend: str, results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for got, want in zip(results, expected, strict=True):
        if not want.numel():  # the gradient of what was not given
            continue
        error, size = (got.float() - want.float()).abs().max(), want.float().abs().max()
        if not error <= 0.03 * size:
            raise RuntimeError(f"flash_attention: {backend} differs from {ON_GPU[0]} by {error:.3g} at {size:.3g}")


def _call(q: Tensor, k: Tensor, v: Tensor, a: Arguments, o: Tensor, lse: Tensor) -> Any:
    """The arguments of the native launchers. Every tensor is its caller's, who keeps it alive."""
    call = _native.extension().FlashAttention()
    call.q, call.k, call.v, call.o, call.lse = (t.data_ptr() for t in (q, k, v, o, lse))
    call.q_stride, call.k_stride, call.v_stride, call.o_stride = (t.stride()[:3] for t in (q, k, v, o))
    call.B, call.H, call.Sq, call.D = q.shape
    _, call.Hkv, call.Sk, call.Dv = v.shape
    call.dtype = _native.code(q.dtype)
    call.scale, call.softcap, call.left, call.right, call.top_left = a[7:12]
    if a.keep is not None:
        call.keep, call.keep_row = a.keep.data_ptr(), a.keep.stride(0)
    if a.mask is not None:
        call.mask, call.mask_stride = a.mask.data_ptr(), _broadcast_strides(a.mask)
    if a.bias is not None:
        call.bias, call.bias_stride = a.bias.data_ptr(), _broadcast_strides(a.bias)
        call.bias_dtype = _native.code(a.bias.dtype)
    if a.relative is not None:
        call.relative, call.N = a.relative.data_ptr(), (a.relative.shape[1] + 1) // 2
    call.sinks = _native.address(a.sinks)
    if a.q_starts is not None and a.k_starts is not None:
        call.q_starts, call.k_starts = a.q_starts.data_ptr(), a.k_starts.data_ptr()
        call.members = len(a.q_starts) - 1
    call.dropout_p = a.dropout_p
    if a.seed is not None:
        if q.device.type == "cpu":
            call.seed = int(a.seed)
        call.seed_cell = a.seed.data_ptr()
    return call


def _broadcast_strides(mask: Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
