"""AdamW step over many tensors in one call. The maths and its costs are in csrc/adamw.h."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fusetune import _native
from fusetune._check import check, check_device, check_dtype
from fusetune._register import register
from fusetune.backend import choose

# Columns of the table of tensors and of the hyper-parameters: csrc/adamw.h.
COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "numel", "dtype", "group")
HYPERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step in place (Loshchilov & Hutter, arXiv 1711.05101), the functional form of `fusetune.AdamW`.

    Arguments as in torch._fused_adamw_, except that gradients are left as they are.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: tensors of one device; those of one index have one shape and dtype
            (float32, bfloat16 or float16).
        max_exp_avg_sqs: the same with amsgrad, else empty.
        state_steps: one-element float32 tensors, incremented.
        lr, beta1, beta2, weight_decay, eps, amsgrad, maximize: as in torch.optim.AdamW.
        grad_scale: one-element float32; gradients are divided by it.
        found_inf: one-element float32; where it is not 0 nothing is updated, the step counts included.

    Raises:
        TypeError: a dtype other than these, or sparse gradients.
        ValueError: lists of different lengths, or tensors that do not match.
        NotImplementedError: no backend works on the tensors' device.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else exp_avgs, state_steps)
    _adamw_step(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(state_steps),
        *(float(lr), float(beta1), float(beta2), float(weight_decay), float(eps)),
        *(amsgrad, maximize, grad_scale, found_inf),
    )


def adamw_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`adamw_step` in plain torch, tensor by tensor, at the tensors' own precision. Any floating dtype."""
    if found_inf is not None and found_inf.item() != 0:
        return
    for i, (p, grad, m, v, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True)):
        step += 1
        g = -grad if maximize else grad
        if grad_scale is not None:
            wide = torch.promote_types(g.dtype, torch.float32)  # in which GradScaler's first scale, 65536, is finite
            g = (g.to(wide) / grad_scale.to(wide)).to(g.dtype)
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        largest = torch.maximum(max_exp_avg_sqs[i], v, out=max_exp_avg_sqs[i]) if amsgrad else v
        t = step.item()
        denominator = largest.sqrt() / (1 - beta2**t) ** 0.5 + eps
        p.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
) -> None:
    op = "adamw_step"
    columns = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    lengths = [len(column) for column in columns]
    check(len(set(lengths)) == 1, ValueError, f"{op}: lists must have one length, got {lengths}")
    for p, g, m, v, largest, step in zip(*columns, strict=True):
        check_dtype(op, "params", p)
        check(
            g.layout == torch.strided,
            TypeError,
            f"{op}: grads must be dense, got {g.layout}; use torch.optim.SparseAdam",
        )
        for name, tensor in (("grads", g), ("exp_avgs", m), ("exp_avg_sqs", v), ("max_exp_avg_sqs", largest)):
            check_dtype(op, name, tensor, [p.dtype])
            check(
                tensor.shape == p.shape,
                ValueError,
                f"{op}: {name} must have the parameter's shape {list(p.shape)}, got {list(tensor.shape)}",
            )
            check_device(op, name, tensor, params[0].device)
        check_device(op, "params", p, params[0].device)
        check_device(op, "state_steps", step, params[0].device)
        check_dtype(op, "state_steps", step, [torch.float32])


class Table:
    """The kernel's table of tensors: one row each, [rows, COLUMNS] int64 (csrc/adamw.h).

    The kernel walks p, grad, m, v and v' element by element in memory order. Tensors that are not laid out alike are
    copied into the parameter's order; `launch` writes the copies back.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]] = []  # kept alive
        self._copies: list[tuple[Tensor, Tensor]] = []  # original, copy

    def add(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        largest: Tensor | None,
        step: Tensor,
        group: int,
    ) -> None:
        """Adds a row. Raises as `adamw_step` does."""
        # In single expressions, because a step pays for them once for each tensor.
        shape, dtype, device = param.shape, param.dtype, param.device
        fits = (
            grad.shape == exp_avg.shape == exp_avg_sq.shape == shape
            and grad.dtype is exp_avg.dtype is exp_avg_sq.dtype is dtype
            and grad.device == exp_avg.device == exp_avg_sq.device == device
            and (largest is None or (largest.shape == shape and largest.dtype is dtype and largest.device == device))
            and grad.layout is torch.strided
            and dtype in _native.DTYPES
        )
        in_order = (
            fits
            and param.is_contiguous()
            and grad.is_contiguous()
            and exp_avg.is_contiguous()
            and exp_avg_sq.is_contiguous()
            and (largest is None or largest.is_contiguous())
        )
        if not fits:
            _check([param], [grad], [exp_avg], [exp_avg_sq], [exp_avg if largest is None else largest], [step])
        if not in_order:
            # empty_like keeps a dense layout, whatever the order of its dimensions, and else is contiguous
            like = torch.empty_like(param)
            param, exp_avg, exp_avg_sq = (self._in_order(t, like) for t in (param, exp_avg, exp_avg_sq))
            largest = None if largest is None else self._in_order(largest, like)
            if grad.stride() != like.stride():
                grad = like.copy_(grad)
        self._tensors.append((param, grad, exp_avg, exp_avg_sq, largest, step))
        self._rows += (
            param.data_ptr(),
            grad.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            0 if largest is None else largest.data_ptr(),
            step.data_ptr(),
            param.numel(),
            _native.DTYPES[dtype],
            group,
        )

    def _in_order(self, tensor: Tensor, like: Tensor) -> Tensor:
        if tensor.stride() == like.stride():
            return tensor
        copy = torch.empty_like(like).copy_(tensor)
        self._copies.append((tensor, copy))
        return copy

    def launch(
        self,
        hypers: Sequence[Sequence[float]],
        device: torch.device,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Steps every tensor of the table.

        Args:
            hypers: the values of HYPERS for each group.
            device: where the tensors are.
            grad_scale, found_inf: as in `adamw_step`.
        """
        table = torch.frombuffer(array("q", self._rows), dtype=torch.int64).view(-1, len(COLUMNS))
        scalars = torch.tensor(hypers, dtype=torch.float64)
        backend = choose("adamw", device)
        if backend == "cpu":
            _native.extension().adamw_step(
                table.data_ptr(),
                table.shape[0],
                scalars.data_ptr(),
                _native.address(grad_scale),
                _native.address(found_inf),
                _native.threads(),
            )
        elif backend == "cuda":
            with _native.current_stream(device) as stream:
                table, scalars = table.to(device), scalars.to(device)
                _native.extension().cuda_adamw_step(
                    table.data_ptr(),
                    table.shape[0],
                    scalars.data_ptr(),
                    _native.address(grad_scale),
                    _native.address(found_inf),
                    stream,
                )
        elif backend == "triton":
            from fusetune.kernels import adamw as triton_adamw

            triton_adamw.step(table, scalars, device, grad_scale, found_inf)
        else:
            self._reference(hypers, grad_scale, found_inf)
        for original, copy in self._copies:
            original.copy_(copy)

    def _reference(
        self, hypers: Sequence[Sequence[float]], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        groups = self._rows[len(COLUMNS) - 1 :: len(COLUMNS)]
        for (p, g, m, v, largest, step), group in zip(self._tensors, groups, strict=True):
            lr, beta1, beta2, eps, weight_decay, maximize = hypers[group]
            adamw_step_reference(
                *([p], [g], [m], [v], [] if largest is None else [largest], [step]),
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=largest is not None,
                maximize=bool(maximize),
                grad_scale=grad_scale,
                found_inf=found_inf,
            )


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    if not params:
        return
    table = Table()
    for i, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        table.add(*tensors, max_exp_avg_sqs[i] if amsgrad else None, state_steps[i], 0)
    table.launch([(lr, beta1, beta2, eps, weight_decay, float(maximize))], params[0].device, grad_scale, found_inf)


_adamw_step = register(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, float lr, float beta1, float beta2, float weight_decay,"
    " float eps, bool amsgrad, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    _step,
    lambda *arguments: None,
)
