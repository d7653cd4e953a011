"""AdamW step over many tensors in one call. The maths and its costs are in csrc/adamw.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusetune._check import check
from fusetune._register import register
from fusetune.ops._adamw_table import BLOCK, Row, Table
from fusetune.ops.philox import random_bits
from fusetune.ops.quantize import dynamic_map


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_grad_norm: float = 0.0,
    masters: Sequence[Tensor] = (),
    absmaxs: Sequence[Tensor] = (),
    absmax_sqs: Sequence[Tensor] = (),
    keys: Sequence[int] = (),
) -> None:
    """One AdamW step in place (Loshchilov & Hutter, arXiv 1711.05101), the functional form of `fusetune.AdamW`.

    Arguments as in torch._fused_adamw_, and more; gradients are left as they are.

    Args:
        params, grads: tensors of one device, float32, bfloat16 or float16; those of one index have one shape and dtype.
        exp_avgs, exp_avg_sqs: of the parameters' shapes; the parameter's dtype, float32 or bfloat16, or uint8 codes.
        max_exp_avg_sqs: the same with amsgrad, else empty. Not with codes.
        state_steps: one-element float32 tensors, incremented.
        lr: a number, or a one-element float32 tensor on the device, which is read there.
        beta1, beta2, weight_decay, eps, amsgrad, maximize: as in torch.optim.AdamW.
        grad_scale: one-element float32; gradients are divided by it.
        found_inf: one-element float32; where it is not 0 nothing is updated, the step counts included.
        grad_norm, max_grad_norm: a one-element float32, `adamw_grad_norm` of all gradients, and what it is clipped to
            as by torch.nn.utils.clip_grad_norm_; without `grad_norm` nothing is clipped.
        masters: float32 copies of 16-bit params, from which these are rounded; or int16, the lower halves of the 32
            bits whose upper ones are bfloat16 params. Empty: none.
        absmaxs, absmax_sqs: with codes, float32 [ceil(elements / 256)].
        keys: integers, one a parameter, of bfloat16 params without masters: what of theirs is stored as bfloat16 is
            rounded stochastically. Empty: to nearest.

    Raises:
        TypeError: a dtype other than these, or sparse gradients.
        ValueError: lists of different lengths, or tensors that do not match.
        NotImplementedError: codes with amsgrad, or no backend works on the tensors' device.
    """
    columns = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else params, state_steps)
    lengths = [len(column) for column in columns]
    lengths += [len(column) for column in (masters, absmaxs, absmax_sqs, keys) if len(column)]
    check(len(set(lengths)) == 1, ValueError, f"adamw_step: lists must have one length, got {lengths}")
    _adamw_step(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(state_steps),
        *(0.0 if isinstance(lr, Tensor) else float(lr), lr if isinstance(lr, Tensor) else None),
        *(float(beta1), float(beta2), float(weight_decay), float(eps)),
        *(amsgrad, maximize, grad_scale, found_inf, grad_norm, float(max_grad_norm)),
        *(list(masters), list(absmaxs), list(absmax_sqs), list(keys)),
    )


def adamw_step_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_grad_norm: float = 0.0,
    masters: Sequence[Tensor] = (),
    absmaxs: Sequence[Tensor] = (),
    absmax_sqs: Sequence[Tensor] = (),
    keys: Sequence[int] = (),
) -> None:
    """`adamw_step` in plain torch, tensor by tensor, in float32, or in float64 where parameters are that."""
    if found_inf is not None and found_inf.item() != 0:
        return
    lr = float(lr)
    for i, (p, grad, step) in enumerate(zip(params, grads, state_steps, strict=True)):
        step += 1
        t = int(step.item())
        wide = torch.promote_types(p.dtype, torch.float32)
        g = grad.to(wide)
        if grad_scale is not None:
            g = g / grad_scale.to(wide).squeeze()
        if grad_norm is not None:
            g = g * (max_grad_norm / (grad_norm.to(wide).squeeze() + 1e-6)).clamp(max=1.0)
        if maximize:
            g = -g
        master = masters[i] if masters else None
        w = p.to(wide) if master is None else join(p, master) if master.dtype == torch.int16 else master
        coded = exp_avgs[i].dtype == torch.uint8
        if coded:
            m = dequantize_state(exp_avgs[i], absmaxs[i], signed=True)
            v = dequantize_state(exp_avg_sqs[i], absmax_sqs[i], signed=False)
        else:
            m, v = exp_avgs[i].to(wide), exp_avg_sqs[i].to(wide)
        w = w * (1 - lr * weight_decay)
        m = m.lerp(g, 1 - beta1)
        v = (v * beta2).addcmul(g, g, value=1 - beta2)
        largest = torch.maximum(max_exp_avg_sqs[i].to(wide), v) if amsgrad else v
        denominator = largest.sqrt() / (1 - beta2**t) ** 0.5 + eps
        w = w.addcdiv(m, denominator, value=-lr / (1 - beta1**t))

        key = keys[i] if keys and p.dtype == torch.bfloat16 and master is None else None
        if master is not None and master.dtype == torch.int16:
            split(w, p, master)
        else:
            _store(p, w, key, 0, t)
            if master is not None:
                master.copy_(w)
        if coded:
            quantize_state(m, exp_avgs[i], absmaxs[i], signed=True)
            quantize_state(v, exp_avg_sqs[i], absmax_sqs[i], signed=False)
        else:
            _store(exp_avgs[i], m, key, 1, t)
            _store(exp_avg_sqs[i], v, key, 2, t)
        if amsgrad:
            _store(max_exp_avg_sqs[i], largest, key, 3, t)


def adamw_grad_norm(grads: Sequence[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    """The 2-norm of all gradients together, as torch.nn.utils.get_total_norm gives it, in one pass.

    Args:
        grads: float32, bfloat16 or float16 tensors of one device. Squares are summed in float64.
        grad_scale: one-element float32, by which the norm is divided.

    Returns:
        One-element float32, 0-dimensional.

    Raises:
        TypeError: another dtype, or sparse gradients. ValueError: another device.
        NotImplementedError: no backend works on the device.
    """
    if not grads:
        return torch.zeros(())
    return _adamw_grad_norm(list(grads), grad_scale)  # type: ignore[no-any-return]


def adamw_grad_norm_reference(grads: Sequence[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    """`adamw_grad_norm` in plain torch."""
    squares = [g.double().square().sum() for g in grads]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
    return (norm if grad_scale is None else norm / grad_scale.double().squeeze()).float()


def join(p: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers whose halves are bfloat16 `p` and int16 `low`."""
    return ((p.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split(w: Tensor, p: Tensor, low: Tensor) -> None:
    """Writes the halves of float32 `w`: bfloat16 `p`, the nearest to it (ties away from 0), and int16 `low`."""
    bits = torch.where(w.isnan(), torch.nan, w).view(torch.int32)
    p.copy_(((bits + 0x8000) >> 16).short().view(torch.bfloat16))
    low.copy_(bits.short())  # the lower half


def dequantize_state(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """float32 of the shape of uint8 `codes`, blocks of 256 in row-major order; absmax [blocks]."""
    values = dynamic_map(signed).to(codes.device)[codes.flatten().int()]
    return (values * absmax.repeat_interleave(BLOCK)[: values.numel()]).view(codes.shape)


def quantize_state(x: Tensor, codes: Tensor, absmax: Tensor, *, signed: bool) -> None:
    """Writes the nearest codes of `x` (float32) and the absmax of its blocks; what is not finite counts as 0."""
    flat = torch.where(x.isfinite(), x, 0).flatten().float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax.copy_(blocks.abs().amax(1) if len(blocks) else absmax)
    values = dynamic_map(signed).to(x.device).double()
    scaled = blocks.double() / torch.where(absmax == 0, 1.0, absmax.double())[:, None]
    nearest = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)
    codes.copy_(nearest.to(torch.uint8).flatten()[: flat.numel()].view(codes.shape))


def _store(out: Tensor, x: Tensor, key: int | None, kind: int, t: int) -> None:
    if key is not None and out.dtype == torch.bfloat16:
        row = torch.tensor(kind << 56 | t, device=x.device)
        random = torch.empty_like(out, dtype=torch.int64)
        random.as_strided((out.numel(),), (1,)).copy_(random_bits(key, row, out.numel()))  # in memory order
        rounded = (x.view(torch.int32) + random >> 16).short().view(torch.bfloat16)
        x = torch.where(x.isnan(), torch.nan, rounded)
    out.copy_(x)


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_norm: Tensor | None,
    max_grad_norm: float,
    masters: list[Tensor],
    absmaxs: list[Tensor],
    absmax_sqs: list[Tensor],
    keys: list[int],
) -> None:
    if not params:
        return
    rows = [
        Row(
            *(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], max_exp_avg_sqs[i] if amsgrad else None),
            *(state_steps[i], masters[i] if masters else None),
            *(absmaxs[i] if absmaxs else None, absmax_sqs[i] if absmax_sqs else None, lr_tensor),
            key=keys[i] if keys else None,
        )
        for i in range(len(params))
    ]
    table = Table(rows)
    if lr_tensor is not None and table.device.type == "cpu":
        lr = lr_tensor.item()
    hypers = [(lr, beta1, beta2, eps, weight_decay, float(maximize))]
    table.step(hypers, grad_scale, found_inf, grad_norm, max_grad_norm)


def _norm(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    return Table.of_grads(grads).grad_norm(grad_scale)


_adamw_step = register(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, float lr, Tensor? lr_tensor, float beta1, float beta2,"
    " float weight_decay, float eps, bool amsgrad, bool maximize, Tensor? grad_scale, Tensor? found_inf,"
    " Tensor? grad_norm, float max_grad_norm, Tensor(f!)[] masters, Tensor(g!)[] absmaxs, Tensor(h!)[] absmax_sqs,"
    " int[] keys) -> ()",
    _step,
    lambda *arguments: None,
)
_adamw_grad_norm = register(
    "adamw_grad_norm(Tensor[] grads, Tensor? grad_scale) -> Tensor",
    _norm,
    lambda grads, grad_scale: grads[0].new_empty((), dtype=torch.float32),
)
