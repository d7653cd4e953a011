"""Frozen weights in 4 and 8 bits, and the linear layer over them. Formats and costs are in csrc/quantize.h."""

from __future__ import annotations

import functools
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusetune import _native
from fusetune._check import FLOATS, check, check_device, check_dtype, check_shape
from fusetune._register import register
from fusetune.backend import choose, gemm_dtype

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # csrc/quantize.h
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
LEAST_ABSMAX = 1e-38


class QuantizedWeight(NamedTuple):
    """A frozen weight [N, K] in 4 or 8 bits, as csrc/quantize.h has it: two tensors, one that may miss, and ints."""

    codes: Tensor  # NF4: uint8 [ceil(N K / 2), 1], two elements each; int8: [N, K]
    absmax: Tensor  # scale of each block: float32 [ceil(N K / blocksize)], or uint8 where it is `nested`
    nested: Tensor | None  # the mean of absmax, the map of its codes, their scales: float32 [257 + ceil(blocks / 256)]
    shape: tuple[int, int]  # (N, K)
    blocksize: int  # elements of a block: K in int8

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.absmax, self.nested) if t is not None)


def quantize_nf4(w: Tensor, *, double_quant: bool = True, blocksize: int = 64) -> QuantizedWeight:
    """A weight in NF4 (Dettmers et al., arXiv 2305.14314, section 3), with the codes of bitsandbytes.

    Args:
        w: [N, K] float32, bfloat16 or float16.
        double_quant: also stores the scales in 8 bits.
        blocksize: elements that share a scale: 32, 64, ... or 4096.

    Raises:
        TypeError: a dtype other than these.
        ValueError: w has not two dimensions, or another blocksize.
        NotImplementedError: no backend works on w's device.
    """
    return _quantize_nf4(w, double_quant, blocksize, reference=choose("quantize", w.device) != "cpu")


def quantize_nf4_reference(w: Tensor, *, double_quant: bool = True, blocksize: int = 64) -> QuantizedWeight:
    """`quantize_nf4` in plain torch."""
    return _quantize_nf4(w, double_quant, blocksize, reference=True)


def quantize_int8(w: Tensor) -> QuantizedWeight:
    """A weight in 8 bits by rows (Dettmers et al., arXiv 2208.07339, section 3.1), in plain torch.

    Args:
        w: [N, K] float32, bfloat16 or float16. It is rounded to float16 first, as bitsandbytes does.

    Raises:
        TypeError: a dtype other than these.
        ValueError: w has not two dimensions.
    """
    _check_weight("quantize_int8", w)
    w = w.detach().to(torch.float16)
    absmax = w.abs().amax(1).float() if w.shape[1] else w.new_zeros(w.shape[0], dtype=torch.float32)
    codes = (w * (127.0 / absmax)[:, None]).round().nan_to_num(0.0).to(torch.int8)
    return QuantizedWeight(codes, absmax, None, (w.shape[0], w.shape[1]), w.shape[1])


def dequantize(q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that q stands for, rounded to dtype.

    Raises:
        TypeError: dtype is not float32, bfloat16 or float16, or q has tensors of other dtypes than its format's.
        ValueError: q's tensors do not fit its shape, or are on different devices.
        NotImplementedError: no backend works on q's device.
    """
    check_quantized("dequantize", "q", q)
    check(dtype in FLOATS, TypeError, f"dequantize: dtype must be float32, bfloat16, float16, got {_short(dtype)}")
    w: Tensor = _dequantize_op(q.codes, q.absmax, q.nested, *q.shape, q.blocksize, dtype)
    return w


def dequantize_reference(q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize` in plain torch."""
    count = q.shape[0] * q.shape[1]
    if q.bits == 8:
        return (q.codes * q.absmax[:, None] * (1 / 127)).to(dtype)
    packed = q.codes.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()
    scale = _scales(q).repeat_interleave(q.blocksize)[:count]
    return (_table(q.device)[codes] * scale).to(dtype).view(q.shape)


def quantized_linear(x: Tensor, q: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x dequantize(q)^T + bias. The weight is dequantised block by block, for forward and again for backward, which
    keeps nothing.

    Args:
        x: [..., K] float32, bfloat16 or float16. Under autocast it is cast first.
        q: [N, K], frozen.
        bias: [N], cast to x's dtype.

    Returns:
        [..., N], of x's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as `dequantize`, or x or bias do not fit.
    """
    op = "quantized_linear"
    check_quantized(op, "q", q)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    check_dtype(op, "x", x)
    check(x.dim() >= 1, ValueError, f"{op}: x must have at least 1 dimension, got 0")
    check_shape(op, "x", x[(0,) * (x.dim() - 1)] if x.numel() else x.new_empty(x.shape[-1]), [q.shape[1]])
    check_device(op, "q", q.codes, x.device)
    if bias is not None:
        check_dtype(op, "bias", bias)
        check_shape(op, "bias", bias, [q.shape[0]])
        check_device(op, "bias", bias, x.device)
        bias = bias.to(x.dtype)
    y: Tensor = _QuantizedLinear.apply(x[None].flatten(0, -2), *q[:3], *q.shape, q.blocksize, bias)
    return y.view(*x.shape[:-1], q.shape[0])


def accumulate(y: Tensor, x: Tensor, w: Tensor | QuantizedWeight, beta: float = 1) -> None:
    """y [M, N] = beta y + x [M, K] w^T, computed in y's dtype; by blocks of rows of w where it is quantised. Not
    differentiable."""
    x = _to(x, y.dtype)
    if isinstance(w, Tensor):
        y.addmm_(x, _to(w, y.dtype).t(), beta=beta)
        return
    N, K = w.shape
    for n0, n1 in _blocks(N, K, y):
        y[:, n0:n1].addmm_(x, _dequantized_block(w, n0, n1, 0, K, y.dtype).t(), beta=beta)


def accumulate_t(dx: Tensor, dy: Tensor, w: Tensor | QuantizedWeight, beta: float = 1) -> None:
    """dx [M, K] = beta dx + dy [M, N] w, computed in dx's dtype; by blocks of columns of w where it is quantised,
    so that each element of dx is rounded once. Not differentiable."""
    dy = _to(dy, dx.dtype)
    if isinstance(w, Tensor):
        dx.addmm_(dy, _to(w, dx.dtype), beta=beta)
        return
    N, K = w.shape
    for k0, k1 in _blocks(K, N, dx):
        dx[:, k0:k1].addmm_(dy, _dequantized_block(w, 0, N, k0, k1, dx.dtype), beta=beta)


def _to(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # half the cost of a call of `to`


def check_quantized(op: str, name: str, q: QuantizedWeight) -> None:
    """Raises where q's tensors are not those of its format, shape and blocksize."""
    N, K = q.shape
    check_dtype(op, f"{name}.codes", q.codes, [torch.uint8, torch.int8])
    if q.bits == 8:
        check_shape(op, f"{name}.codes", q.codes, [N, K])
        check(q.blocksize == K, ValueError, f"{op}: {name}.blocksize must be {K}, got {q.blocksize}")
        blocks = N
    else:
        check_shape(op, f"{name}.codes", q.codes, [(N * K + 1) // 2, 1])
        check(
            q.blocksize in BLOCKSIZES,
            ValueError,
            f"{op}: {name}.blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {q.blocksize}",
        )
        blocks = -(-N * K // q.blocksize)
    check_dtype(op, f"{name}.absmax", q.absmax, [torch.float32 if q.nested is None else torch.uint8])
    check_shape(op, f"{name}.absmax", q.absmax, [blocks])
    check_device(op, f"{name}.absmax", q.absmax, q.device)
    if q.nested is not None:
        check_dtype(op, f"{name}.nested", q.nested, [torch.float32])
        check_shape(op, f"{name}.nested", q.nested, [1 + 256 - (-blocks // NESTED_BLOCKSIZE)])
        check_device(op, f"{name}.nested", q.nested, q.device)
    for tensor in (q.codes, q.absmax, q.nested):
        check(tensor is None or tensor.is_contiguous(), ValueError, f"{op}: {name} must be contiguous, got strides")


def _check_weight(op: str, w: Tensor) -> None:
    check_dtype(op, "w", w)
    check_shape(op, "w", w, ["N", "K"])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The values of bitsandbytes' 8-bit codes (Dettmers, arXiv 1511.04561, section 2.3): for each exponent i of seven,
    10^(i - 6) times the centres of 2^i equal parts of [0.1, 1], of either sign, or of twice as many; 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        scaled = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*scaled.tolist(), *(-scaled).tolist()] if signed else scaled.tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize_nf4(w: Tensor, double_quant: bool, blocksize: int, reference: bool) -> QuantizedWeight:
    _check_weight("quantize_nf4", w)
    check(
        blocksize in BLOCKSIZES,
        ValueError,
        f"quantize_nf4: blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize}",
    )
    w = w.detach()
    codes, absmax = (_nf4_reference if reference else _quantize_nf4_op)(w, blocksize)
    nested = None
    if double_quant:
        absmax, nested = _quantize_absmax(absmax)
    return QuantizedWeight(codes, absmax, nested, (w.shape[0], w.shape[1]), blocksize)


def _nf4_reference(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    flat, count = w.reshape(-1).float(), w.numel()
    whole = count // blocksize * blocksize
    blocks = flat[:whole].view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=LEAST_ABSMAX))[:, None]).flatten()
    if whole < count:
        last = flat[whole:].abs().amax().clamp(min=LEAST_ABSMAX)
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, flat[whole:] / last])
    table = _table(w.device)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8)  # a NaN is past all midpoints
    if count % 2:
        codes = torch.cat([codes, codes.new_full([1], 7)])
    return (codes[::2] << 4 | codes[1::2])[:, None], absmax


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of scales, and `nested`. On the CPU bitsandbytes rounds to one of 65536 steps from -1 to 1 first, so
    that its code is not always the nearest; on GPUs it is."""
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    values = dynamic_map().to(absmax.device)
    blocks = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCKSIZE)).view(
        -1, NESTED_BLOCKSIZE
    )
    largest = blocks.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax(1)
    scaled = (blocks * (1.0 / largest)[:, None]).nan_to_num(-1.0).clamp(-1, 1)
    if absmax.device.type == "cpu":
        step = ((scaled + 1.0) * 0.5 * 65535 + 0.5).int()
        scaled = -1.0 + 2.0 * step / 65535
    codes = torch.bucketize(scaled, (values[:-1] + values[1:]) * 0.5)
    codes = torch.where(largest[:, None] == 0, 0, codes).to(torch.uint8).flatten()[: absmax.numel()]
    return codes.contiguous(), torch.cat([offset[None], values, largest])


def _scales(q: QuantizedWeight) -> Tensor:
    """Of each block of NF4: float32 [blocks]."""
    if q.nested is None:
        return q.absmax
    offset, values, largest = q.nested.split([1, 256, q.nested.numel() - 257])
    scales: Tensor = values[q.absmax.long()] * largest.repeat_interleave(NESTED_BLOCKSIZE)[: q.absmax.numel()] + offset
    return scales


# Where a block of the weight is dequantised to, of a size that caches hold. The CPU's is kept by each thread: pages
# fresh from the system would cost more to touch than the block does to make. Others come from torch's allocator, which
# knows streams and graphs.
SCRATCH_BYTES = {"cpu": 8 * 2**20}
OTHER_SCRATCH_BYTES = 32 * 2**20
_thread = threading.local()


def _blocks(count: int, width: int, out: Tensor) -> list[tuple[int, int]]:
    """Ranges of `count` rows or columns of `width` elements that fit in the scratch; by 64 where as many do."""
    limit = SCRATCH_BYTES.get(out.device.type, OTHER_SCRATCH_BYTES) // out.element_size()
    step = max(1, limit // max(1, width))
    step -= step % 64 if step > 64 else 0
    return [(begin, min(begin + step, count)) for begin in range(0, count, step)]


def _scratch(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(rows, width, dtype=dtype, device=device)
    needed = rows * width * dtype.itemsize
    buffer: Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.numel() < needed:
        with torch.inference_mode(False):  # a tensor of inference mode could not be used outside of it
            buffer = _thread.buffer = torch.empty(needed + -needed % 4096, dtype=torch.uint8)
    return buffer[:needed].view(dtype).view(rows, width)


def _dequantized_block(q: QuantizedWeight, n0: int, n1: int, k0: int, k1: int, dtype: torch.dtype) -> Tensor:
    """Rows n0 .. n1 and columns k0 .. k1 of the weight, in the scratch: valid until this thread asks for the next."""
    out = _scratch(n1 - n0, k1 - k0, dtype, q.device)
    _dequantize_into(out, q, n0, k0)
    return out


def _dequantize_into(out: Tensor, q: QuantizedWeight, n0: int, k0: int) -> None:
    (rows, width), K = out.shape, q.shape[1]
    backend = choose("quantize", q.device)
    if backend == "reference":
        out.copy_(dequantize_reference(q, out.dtype)[n0 : n0 + rows, k0 : k0 + width])
        return
    tensors = [_native.address(t) for t in (q.codes, q.absmax, q.nested, out)]
    sizes = (n0, n0 + rows, k0, k0 + width, K, max(1, q.blocksize), q.bits, _native.code(out.dtype))
    if backend == "cpu":
        _native.extension().dequantize(*tensors, *sizes, _native.threads())
    elif backend == "cuda":
        with _native.current_stream(q.device) as stream:
            _native.extension().cuda_dequantize(*tensors, *sizes, stream)
    else:
        from fusetune.kernels import quantize as triton_quantize

        triton_quantize.dequantize(
            q.codes, q.absmax, q.nested, _table(q.device), out, n0, k0, K, max(1, q.blocksize), q.bits
        )


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        absmax: Tensor,
        nested: Tensor | None,
        N: int,
        K: int,
        blocksize: int,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, absmax, nested)
        ctx.sizes = N, K, blocksize
        y: Tensor = _linear_op(x, codes, absmax, nested, N, K, blocksize, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = _linear_dx_op(dy, *ctx.saved_tensors, *ctx.sizes) if ctx.needs_input_grad[0] else None
        return dx, *[None] * 6, dy.sum(0) if ctx.needs_input_grad[7] else None


def _product_dtype(x: Tensor) -> torch.dtype:
    return gemm_dtype("cpu", x.dtype) if choose("quantize", x.device) == "cpu" else x.dtype


def _linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    N: int,
    K: int,
    blocksize: int,
    bias: Tensor | None,
) -> Tensor:
    y = x.new_zeros(x.shape[0], N, dtype=_product_dtype(x))
    if bias is not None:
        y += bias
    accumulate(y, x, QuantizedWeight(codes, absmax, nested, (N, K), blocksize))
    return y.to(x.dtype)


def _linear_dx(
    dy: Tensor, codes: Tensor, absmax: Tensor, nested: Tensor | None, N: int, K: int, blocksize: int
) -> Tensor:
    dx = dy.new_zeros(dy.shape[0], K, dtype=_product_dtype(dy))
    accumulate_t(dx, dy, QuantizedWeight(codes, absmax, nested, (N, K), blocksize))
    return dx.to(dy.dtype)


def _dequantize(
    codes: Tensor, absmax: Tensor, nested: Tensor | None, N: int, K: int, blocksize: int, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(N, K, dtype=dtype, device=codes.device)
    _dequantize_into(out, QuantizedWeight(codes, absmax, nested, (N, K), blocksize), 0, 0)
    return out


def _nf4(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    w = w.contiguous()
    codes, absmax = _fake_nf4(w, blocksize)
    _native.extension().quantize_nf4(
        *map(_native.address, (w, codes, absmax)), w.numel(), blocksize, _native.code(w.dtype), _native.threads()
    )
    return codes, absmax


def _fake_nf4(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return (
        w.new_empty((w.numel() + 1) // 2, 1, dtype=torch.uint8),
        w.new_empty((w.numel() + blocksize - 1) // blocksize, dtype=torch.float32),
    )


_WEIGHT = "Tensor codes, Tensor absmax, Tensor? nested, int N, int K, int blocksize"
_quantize_nf4_op = register("quantize_nf4(Tensor w, int blocksize) -> (Tensor, Tensor)", _nf4, _fake_nf4)
_dequantize_op = register(
    f"dequantize({_WEIGHT}, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda codes, absmax, nested, N, K, blocksize, dtype: codes.new_empty(N, K, dtype=dtype),
)
_linear_op = register(
    f"quantized_linear(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor",
    _linear,
    lambda x, codes, absmax, nested, N, K, blocksize, bias: x.new_empty(x.shape[0], N),
)
_linear_dx_op = register(
    f"quantized_linear_dx(Tensor dy, {_WEIGHT}) -> Tensor",
    _linear_dx,
    lambda dy, codes, absmax, nested, N, K, blocksize: dy.new_empty(dy.shape[0], K),
)
