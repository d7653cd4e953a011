"""The table of tensors that an AdamW step walks (csrc/adamw.h): its checks, its layout, and the kernels' launches."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fusetune import _native
from fusetune._check import check, check_device, check_dtype
from fusetune.backend import choose
from fusetune.kernels import device as kernel_device
from fusetune.ops.quantize import dynamic_map

OP = "adamw_step"
INT8 = 3  # code of 8-bit states, beside those of csrc/dtype.h
PLAIN, STOCHASTIC, MASTER, SPLIT = range(4)  # how a parameter is kept
BLOCK = 256  # elements that share an absmax, as in bitsandbytes


class Row(NamedTuple):
    """One tensor of a step. The first ten are the table's columns of addresses, in its order."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    largest: Tensor | None
    step: Tensor
    master: Tensor | None = None  # float32, or int16 for split weights
    absmax: Tensor | None = None
    absmax_sq: Tensor | None = None
    lr: Tensor | None = None
    group: int = 0
    key: int | None = None  # of stochastic rounding


ADDRESSES = 10
COLUMNS = ADDRESSES + 4  # and the number of elements, the format, group and key


def row_format(row: Row) -> int:
    """adamw_format of csrc/adamw.h."""
    weights = PLAIN
    if row.master is not None:
        weights = SPLIT if row.master.dtype == torch.int16 else MASTER
    elif row.key is not None:
        weights = STOCHASTIC
    state = INT8 if row.exp_avg.dtype == torch.uint8 else _native.DTYPES[row.exp_avg.dtype]
    return _native.DTYPES[row.param.dtype] | state << 4 | weights << 8


def check_row(row: Row, device: torch.device) -> None:
    """Raises as `adamw_step` documents."""
    p, grad = row.param, row.grad
    check_dtype(OP, "params", p)
    check_device(OP, "params", p, device)
    check(
        grad.layout == torch.strided,
        TypeError,
        f"{OP}: grads must be dense, got {grad.layout}; use torch.optim.SparseAdam",
    )
    coded = row.exp_avg.dtype == torch.uint8
    states = [torch.uint8] if coded else [d for d in _native.DTYPES if d in (p.dtype, torch.float32, torch.bfloat16)]
    halves = row.master is not None and row.master.dtype == torch.int16
    for name, tensor, dtypes in (
        ("grads", grad, [p.dtype]),
        ("exp_avgs", row.exp_avg, states),
        ("exp_avg_sqs", row.exp_avg_sq, [row.exp_avg.dtype]),
        ("max_exp_avg_sqs", row.largest, [row.exp_avg.dtype]),
        ("masters", row.master, [torch.int16] if halves else [torch.float32]),
    ):
        if tensor is not None:
            check_dtype(OP, name, tensor, dtypes)
            check(
                tensor.shape == p.shape,
                ValueError,
                f"{OP}: {name} must have the parameter's shape {list(p.shape)}, got {list(tensor.shape)}",
            )
            check_device(OP, name, tensor, device)
    narrow = [torch.bfloat16, torch.float16]
    if row.master is not None:
        check_dtype(
            OP, "params with int16 masters" if halves else "params with masters", p, narrow[:1] if halves else narrow
        )
    if row.key is not None:
        check_dtype(OP, "params with keys", p, narrow[:1])
        check(row.master is None, ValueError, f"{OP}: keys must be empty with masters, which round nothing away")
    check(
        not coded or row.largest is None,
        NotImplementedError,
        f"{OP}: amsgrad must be False with 8-bit states, got True",
    )
    blocks = -(-p.numel() // BLOCK)
    for name, tensor in (("absmaxs", row.absmax), ("absmax_sqs", row.absmax_sq)):
        check((tensor is not None) == coded, ValueError, f"{OP}: {name} must be given with 8-bit states, and only then")
        if tensor is not None:
            check_dtype(OP, name, tensor, [torch.float32])
            check(
                tensor.shape == (blocks,) and tensor.is_contiguous(),
                ValueError,
                f"{OP}: {name} must be contiguous of shape [{blocks}], got {list(tensor.shape)}",
            )
            check_device(OP, name, tensor, device)
    for name, tensor in (("state_steps", row.step), ("lr", row.lr)):
        check_scalar(OP, name, tensor, device)


def check_scalar(op: str, name: str, tensor: Tensor | None, device: torch.device) -> None:
    """Of a float32 number that a kernel reads where it is."""
    if tensor is not None:
        check_dtype(op, name, tensor, [torch.float32])
        check(tensor.numel() == 1, ValueError, f"{op}: {name} must have one element, got {tensor.numel()}")
        check_device(op, name, tensor, device)


class Table:
    """The tensors of one step on one device.

    It keeps its tensors alive. The kernels walk p, grad, m, v, v' and the master element by element in memory order.
    Tensors that are not laid out alike are copied into the parameter's order; `step` writes the copies back.

    Raises:
        As `adamw_step`, from the constructor, when nothing has changed.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.device = rows[0].param.device
        self._copies: list[tuple[Tensor, Tensor]] = []  # original, copy
        for row in rows:
            check_row(row, self.device)
        self.rows = [self._laid_out(row) for row in rows]
        self._lay()
        self.contiguous = all(map(operator.is_, self.rows, rows))  # all tensors of all rows
        self.rows = [row._replace(grad=row.param) for row in self.rows]  # `forget_grads` has one place to look

    @classmethod
    def of_grads(cls, grads: Sequence[Tensor]) -> Table:
        """A table for `grad_norm` alone."""
        table = cls.__new__(cls)
        table.device, table._copies = grads[0].device, []
        for g in grads:
            check(g.layout == torch.strided, TypeError, f"adamw_grad_norm: grads must be dense, got {g.layout}")
            check_dtype("adamw_grad_norm", "grads", g)
            check_device("adamw_grad_norm", "grads", g, table.device)
        dense = [g.contiguous() for g in grads]
        table.rows = [Row(g, g, g, g, None, g) for g in dense]
        table._lay()
        return table

    def _lay(self) -> None:
        self._grads = [row.grad for row in self.rows]
        columns = list(zip(*self.rows, strict=True))
        values = [address for column in columns[:ADDRESSES] for address in map(_native.address, column)]
        values += [p.numel() for p in columns[0]]
        values += map(row_format, self.rows)
        values += columns[ADDRESSES]
        values += [key or 0 for key in columns[ADDRESSES + 1]]
        self._values = array("q", values)

    def _laid_out(self, row: Row) -> Row:
        coded = row.exp_avg.dtype == torch.uint8
        tensors = {name: getattr(row, name) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "largest", "master")}
        if all(t is None or t.is_contiguous() for t in tensors.values()):
            return row
        # empty_like keeps a dense layout, whatever the order of its dimensions, and else is contiguous; blocks of 8-bit
        # states are in row-major order.
        like = torch.empty_like(row.param, memory_format=torch.contiguous_format if coded else torch.preserve_format)
        for name, t in tensors.items():
            if t is not None and t.stride() != like.stride():
                tensors[name] = torch.empty_strided(t.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)
                if name != "grad":
                    self._copies.append((t, tensors[name]))
        return row._replace(**tensors)

    def set_grads(self, grads: list[Tensor], addresses: array[int]) -> None:
        """Takes other gradients, contiguous, of the same shapes and dtypes."""
        count = len(self.rows)
        self._values[count : 2 * count] = addresses
        self._grads = grads

    def forget_grads(self) -> None:
        """Keeps them alive no longer; `set_grads` comes before the next step."""
        self._grads = []

    def _tensor(self) -> Tensor:
        return torch.frombuffer(self._values, dtype=torch.int64).view(COLUMNS, -1)

    def grad_norm(self, grad_scale: Tensor | None = None) -> Tensor:
        """The norm of all gradients: `adamw_grad_norm`."""
        check_scalar("adamw_grad_norm", "grad_scale", grad_scale, self.device)
        backend = choose("adamw", self.device)
        norm = torch.empty((), dtype=torch.float32, device=self.device)
        scale = _native.address(grad_scale)
        if backend == "cpu":
            address = self._values.buffer_info()[0]
            _native.extension().adamw_grad_norm(address, len(self.rows), scale, norm.data_ptr(), _native.threads())
        elif backend == "cuda":
            extension = _native.extension()
            with _native.current_stream(self.device) as stream:
                table = kernel_device.to_device(self._tensor(), self.device)
                size = extension.cuda_adamw_grad_norm_workspace()
                workspace = torch.empty(size, dtype=torch.float64, device=self.device)
                extension.cuda_adamw_grad_norm(
                    table.data_ptr(), len(self.rows), scale, norm.data_ptr(), workspace.data_ptr(), stream
                )
        elif backend == "triton":
            from fusetune.kernels import adamw as triton_adamw

            triton_adamw.grad_norm(self._tensor(), self.device, grad_scale, norm)
        else:
            from fusetune.ops.adamw import adamw_grad_norm_reference

            norm = adamw_grad_norm_reference(self._grads, grad_scale)
        return norm

    def step(
        self,
        hypers: Sequence[Sequence[float]],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | None = None,
        max_grad_norm: float = 0.0,
    ) -> None:
        """Steps every tensor of the table.

        Args:
            hypers: lr, beta1, beta2, eps, weight_decay and maximize of each group.
            grad_scale, found_inf, grad_norm, max_grad_norm: as in `adamw_step`.
        """
        for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf), ("grad_norm", grad_norm)):
            check_scalar(OP, name, scalar, self.device)
        backend = choose("adamw", self.device)
        if backend == "reference":
            self._reference(hypers, grad_scale, found_inf, grad_norm, max_grad_norm)
        elif backend == "triton":
            from fusetune.kernels import adamw as triton_adamw

            scalars = torch.tensor(hypers, dtype=torch.float64)
            maps = torch.stack([dynamic_map(True), dynamic_map(False)])
            scaling = grad_scale, found_inf, grad_norm, max_grad_norm
            triton_adamw.step(self._tensor(), scalars, maps, self.device, *scaling)
        else:
            options = (*map(_native.address, (grad_scale, found_inf, grad_norm)), max_grad_norm)
            rows, flat = len(self.rows), array("d", chain.from_iterable(hypers))
            if backend == "cpu":  # without a torch function, which costs tens of microseconds where it is in no cache
                addresses = self._values.buffer_info()[0], rows, flat.buffer_info()[0]
                _native.extension().adamw_step(*addresses, *options, _native.threads())
            else:
                with _native.current_stream(self.device) as stream:
                    table, scalars = (
                        kernel_device.to_device(t, self.device)
                        for t in (self._tensor(), torch.frombuffer(flat, dtype=torch.float64))
                    )
                    workspace = torch.empty(rows, WORKSPACE, dtype=torch.uint8, device=self.device)
                    _native.extension().cuda_adamw_step(
                        *(table.data_ptr(), rows, scalars.data_ptr(), *options, workspace.data_ptr(), stream)
                    )
        for original, copy in self._copies:
            original.copy_(copy)

    def _reference(
        self,
        hypers: Sequence[Sequence[float]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        grad_norm: Tensor | None,
        max_grad_norm: float,
    ) -> None:
        from fusetune.ops.adamw import adamw_step_reference

        for row, grad in zip(self.rows, self._grads, strict=True):
            lr, beta1, beta2, eps, weight_decay, maximize = hypers[row.group]
            adamw_step_reference(
                *([row.param], [grad], [row.exp_avg], [row.exp_avg_sq]),
                *([] if row.largest is None else [row.largest], [row.step]),
                masters=[] if row.master is None else [row.master],
                absmaxs=[] if row.absmax is None else [row.absmax],
                absmax_sqs=[] if row.absmax_sq is None else [row.absmax_sq],
                keys=[] if row.key is None else [row.key],
                lr=lr if row.lr is None else row.lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=row.largest is not None,
                maximize=bool(maximize),
                grad_scale=grad_scale,
                found_inf=found_inf,
                grad_norm=grad_norm,
                max_grad_norm=max_grad_norm,
            )


WORKSPACE = 64  # bytes of AdamwScalars, rounded up
