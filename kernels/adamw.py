"""AdamW step over many tensors in Triton: the contract is csrc/adamw.h, the caller pyfront/ops/adamw.py.

For each storage type, with and without amsgrad, a step is two launches over all of its tensors: one for the scalars,
bias corrections and step counts among them, and one for the elements, of which a program takes ITEM of one tensor,
found by a binary search in the table. The table reaches the device in one copy from pinned memory, and nothing
synchronizes. Divisions and roots are rounded as IEEE 754 has it, and products and sums are not contracted, so that
results are those of the CPU kernel bit by bit where the scalars are.

Floor: the contract's bytes over the stream rate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusetune.kernels.device import guard

# Columns of the table and of the hyper-parameters: csrc/adamw.h.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_SQ, STEP, NUMEL, DTYPE, GROUP, COLUMNS = map(tl.constexpr, range(10))
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, MAXIMIZE, HYPERS = map(tl.constexpr, range(7))
# Columns of the scalars, float32 [rows, SCALARS].
DECAY, BETA1_COMPLEMENT, KEPT_BETA2, BETA2_COMPLEMENT, SQRT_BIAS2, ADDED, STEP_SIZE, SIGN, SCALARS = map(
    tl.constexpr, range(9)
)
DTYPES = (tl.float32, tl.bfloat16, tl.float16)  # by the table's code

SCALAR_ROWS = 128
ITEM = tl.constexpr(8192)  # elements of a program,
BLOCK = tl.constexpr(1024)  # and of one turn of its loop: 16 bytes a thread in 16-bit types


@triton.jit(do_not_specialize=["rows"])
def scalars_kernel(table, rows, hypers, scalars, found_inf, ROWS: tl.constexpr):
    """Scalars of every row of the table, in float64 and rounded once; increments the step counts."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    row = table + r * COLUMNS
    hyper = hypers + tl.load(row + GROUP, inside, 0) * HYPERS
    lr = tl.load(hyper + LR, inside, 0.0)
    beta1 = tl.load(hyper + BETA1, inside, 0.5)
    beta2 = tl.load(hyper + BETA2, inside, 0.5)
    eps = tl.load(hyper + EPS, inside, 0.0)
    weight_decay = tl.load(hyper + WEIGHT_DECAY, inside, 0.0)
    maximize = tl.load(hyper + MAXIMIZE, inside, 0.0)

    count = tl.load(row + STEP, inside, 0).to(tl.pointer_type(tl.float32))
    step = tl.load(count, inside, 0.0) + 1
    bias1 = 1 - tl.exp2(step.to(tl.float64) * tl.log2(beta1))
    bias2 = 1 - tl.exp2(step.to(tl.float64) * tl.log2(beta2))
    out = scalars + r * SCALARS
    tl.store(out + DECAY, (1 - lr * weight_decay).to(tl.float32), inside)
    tl.store(out + BETA1_COMPLEMENT, (1 - beta1).to(tl.float32), inside)
    tl.store(out + KEPT_BETA2, beta2.to(tl.float32), inside)
    tl.store(out + BETA2_COMPLEMENT, (1 - beta2).to(tl.float32), inside)
    tl.store(out + SQRT_BIAS2, tl.sqrt(bias2).to(tl.float32), inside)
    tl.store(out + ADDED, eps.to(tl.float32), inside)
    tl.store(out + STEP_SIZE, (-lr / bias1).to(tl.float32), inside)
    tl.store(out + SIGN, tl.where(maximize == 0, 1.0, -1.0), inside)
    if found_inf is not None:
        rows = tl.where(tl.load(found_inf) != 0, 0, rows)
    tl.store(count, step, r < rows)


@triton.jit(do_not_specialize=["rows"])
def update_kernel(
    table, rows, first_item, scalars, grad_scale, found_inf,
    STORAGE: tl.constexpr, AMSGRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One item of one row; first_item [rows] numbers the items of the rows."""
    item = tl.program_id(0)
    low, high = 0, rows  # the row whose items include this one
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(first_item + middle) <= item
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)

    row = table + low * COLUMNS
    begin = (item - tl.load(first_item + low)) * ITEM
    end = tl.minimum(begin + ITEM, tl.load(row + NUMEL))
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) != 0, begin, end)
    param = tl.load(row + PARAM).to(tl.pointer_type(STORAGE))
    grad = tl.load(row + GRAD).to(tl.pointer_type(STORAGE))
    exp_avg = tl.load(row + EXP_AVG).to(tl.pointer_type(STORAGE))
    exp_avg_sq = tl.load(row + EXP_AVG_SQ).to(tl.pointer_type(STORAGE))
    max_sq = tl.load(row + MAX_SQ).to(tl.pointer_type(STORAGE))
    if ALIGNED:
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
        exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
        max_sq = tl.multiple_of(max_sq, 16)
    scalars += low * SCALARS
    decay = tl.load(scalars + DECAY)
    weight = tl.load(scalars + BETA1_COMPLEMENT)
    from_grad = weight >= 0.5  # m' = m + weight (g - m) from the nearer end, as torch's lerp
    weight = tl.where(from_grad, weight - 1, weight)
    beta2 = tl.load(scalars + KEPT_BETA2)
    beta2_complement = tl.load(scalars + BETA2_COMPLEMENT)
    sqrt_bias2 = tl.load(scalars + SQRT_BIAS2)
    eps = tl.load(scalars + ADDED)
    step_size = tl.load(scalars + STEP_SIZE)
    sign = tl.load(scalars + SIGN)
    if grad_scale is not None:
        grad_scale = tl.load(grad_scale)

    whole = begin + (end - begin) // BLOCK * BLOCK
    for TAIL in tl.static_range(2):
        for start in range(whole if TAIL else begin, end if TAIL else whole, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < end if TAIL else None
            g = tl.load(grad + i, inside).to(tl.float32) * sign
            if grad_scale is not None:
                g = tl.div_rn(g, grad_scale)
            p = tl.load(param + i, inside).to(tl.float32) * decay
            m = tl.load(exp_avg + i, inside).to(tl.float32)
            m = tl.fma(weight, g - m, tl.where(from_grad, g, m))
            v = tl.load(exp_avg_sq + i, inside).to(tl.float32)
            v = tl.fma(beta2_complement * g, g, v * beta2)
            largest = v
            if AMSGRAD:
                largest = tl.maximum(tl.load(max_sq + i, inside).to(tl.float32), v, propagate_nan=tl.PropagateNan.ALL)
                tl.store(max_sq + i, largest.to(STORAGE), inside)
            p += tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(largest), sqrt_bias2) + eps)
            tl.store(param + i, p.to(STORAGE), inside)
            tl.store(exp_avg + i, m.to(STORAGE), inside)
            tl.store(exp_avg_sq + i, v.to(STORAGE), inside)


def step(
    table: Tensor, hypers: Tensor, device: torch.device, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Steps every tensor of the table.

    Args:
        table: int64 [rows, COLUMNS] on the CPU, as csrc/adamw.h has it.
        hypers: float64 [groups, HYPERS] on the CPU.
        device: where the tensors are.
        grad_scale, found_inf: one-element float32 on `device`, or None.
    """
    for code, dtype in enumerate(DTYPES):
        for amsgrad in (False, True):
            rows = table[(table[:, DTYPE.value] == code) & ((table[:, MAX_SQ.value] != 0) == amsgrad)]
            if len(rows):
                launch(rows, hypers, device, grad_scale, found_inf, dtype, amsgrad)


def launch(
    rows: Tensor,
    hypers: Tensor,
    device: torch.device,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    dtype: tl.dtype,
    amsgrad: bool,
) -> None:
    """`step` for rows of one storage type, all with or all without v'."""
    items = (rows[:, NUMEL.value] + ITEM.value - 1) // ITEM.value
    buffer = torch.cat([rows.flatten(), items.cumsum(0) - items, hypers.view(torch.int64).flatten()])
    if device.type == "cuda":
        buffer = buffer.pin_memory().to(device, non_blocking=True)
    table, first_item, hypers = buffer.split([rows.numel(), len(rows), hypers.numel()])
    scalars = torch.empty(len(rows), SCALARS.value, device=device)
    with guard(device):
        scalars_kernel[(triton.cdiv(len(rows), SCALAR_ROWS),)](
            *(table, len(rows), hypers.view(torch.float64), scalars, found_inf),
            ROWS=SCALAR_ROWS,
            enable_fp_fusion=False,
        )
        update_kernel[(int(items.sum()),)](
            *(table, len(rows), first_item, scalars, grad_scale, found_inf),
            STORAGE=dtype,
            AMSGRAD=amsgrad,
            ALIGNED=not (rows[:, : STEP.value] % 16).any(),
            enable_fp_fusion=False,
        )
