"""Parameters, gradients, options and storage formats of the AdamW tests, and the step in float64."""

import math
from typing import NamedTuple

import torch

from fusetune.ops import adamw_step
from fusetune.ops._adamw_table import Row

FP32, BF16, FP16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
DTYPES = [FP32, BF16, FP16]
# either side of the vectors, of the blocks of 8-bit states, and of the kernels' work items of 16384
SIZES = [0, 1, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097]
LARGE = [16383, 16384, 16385, 70001]
BLOCK = 256  # elements of 8-bit states that share an absmax
U = torch.finfo(FP32).eps / 2  # half a unit in the last place, relative to the value
COLUMNS = ("p", "g", "m", "v", "largest", "step", "master", "absmax", "absmax_sq")
HYPERS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "amsgrad and maximize": {"amsgrad": True, "maximize": True},
    "no decay": {"weight_decay": 0.0},
    "no momentum": {"betas": (0.0, 0.0)},
    "everything": {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.5, "amsgrad": True, "maximize": True},
    "lr is a tensor": {"lr": torch.tensor(0.05)},
    "lr is 0": {"lr": 0.0},
}


class Format(NamedTuple):
    """How p, and m, v and v', are stored (csrc/adamw.h)."""

    param: torch.dtype
    state: torch.dtype  # INT8: codes
    weights: str = "plain"  # or stochastic, master, split

    @property
    def rounded_to(self):
        """The dtypes of what is rounded to nearest."""
        if self.weights == "stochastic":
            return ()
        return (self.state,) if self.weights == "split" else (self.param, self.state)

    def __str__(self):
        dtypes = ["int8" if dtype == INT8 else str(dtype).removeprefix("torch.") for dtype in self[:2]]
        return "-".join([*dtypes, self.weights])


STATES = {FP32: (FP32, BF16, INT8), BF16: (FP32, BF16, INT8), FP16: (FP32, BF16, FP16, INT8)}
PLAIN = [Format(dtype, state) for dtype in DTYPES for state in STATES[dtype]]
MASTER = [Format(dtype, state, "master") for dtype in (BF16, FP16) for state in STATES[dtype]]
STOCHASTIC, SPLIT = ([Format(BF16, state, weights) for state in STATES[BF16]] for weights in ("stochastic", "split"))
FORMATS = [*PLAIN, *STOCHASTIC, *MASTER, *SPLIT]


def make(shapes, dtype=FP32, device="cpu"):
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def clone(params):
    return [p.detach().clone().requires_grad_(p.requires_grad) for p in params]


def train(optimizer, params, steps, seed=1, first=0):
    """Steps with gradients that depend on the step's number only. Every third step has small ones."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for p in params:
            g = torch.randn(p.shape, generator=generator) * (1e-3 if step % 3 == 2 else 1)
            p.grad = g.to(p.device, p.dtype) if p.requires_grad else None
        optimizer.step()


def assert_equal(got, expected, what="parameter"):
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        differ = (x != y).sum().item()
        assert differ == 0, f"{what} {i} of shape {list(x.shape)} differs in {differ} elements"


def random_row(form, shape, device="cpu", t=3):
    """A tensor's p, g, m, v, v' and what else the format has, before step t."""
    wide = torch.randn(shape)
    row = {"p": wide.to(form.param), "g": torch.randn(shape).to(form.param)}
    if form.state == INT8:
        row |= {name: torch.randint(256, wide.shape, dtype=INT8) for name in ("m", "v")}
        row |= {name: 0.5 + torch.rand(-(-wide.numel() // BLOCK)) for name in ("absmax", "absmax_sq")}
    else:
        row["m"] = torch.randn(shape).to(form.state)
        row |= {name: torch.rand(shape).to(form.state) for name in ("v", "largest")}
    if form.weights == "master":
        row["master"] = wide
    elif form.weights == "split":
        row["p"], row["master"] = halves(wide)
    row["step"] = torch.tensor(t - 1.0)
    return {name: x.to(device) for name, x in row.items()}


def table_row(row, **more):
    """The Row of such a row."""
    return Row(*map(row.get, COLUMNS), **more)


def copied(row):
    return {name: x.clone() for name, x in row.items()}


def step_rows(rows, amsgrad=False, **options):
    """adamw_step of rows, as `random_row` makes them, with HYPERS but for the options."""
    columns = {name: [row[name] for row in rows if name in row] for name in COLUMNS}
    largest = columns["largest"] if amsgrad else []
    adamw_step(
        *(columns[name] for name in "pgmv"),
        *(largest, columns["step"]),
        amsgrad=amsgrad,
        masters=columns["master"],
        absmaxs=columns["absmax"],
        absmax_sqs=columns["absmax_sq"],
        **HYPERS | options,
    )


def halves(x):
    """The bfloat16 and the int16 of which split weights have the float32 x."""
    bits = x.view(torch.int32).long()
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(BF16), (bits - (high << 16)).to(torch.int16)


def joined(p, low):
    bits = (p.view(torch.int16).long() << 16) + low
    return bits.to(torch.int32).view(FP32)


def map_values(signed):
    """The values of 8-bit codes by the formulas of csrc/adamw.h, in float64."""
    values = [0.0] * 255 + [1.0]
    for code in range(255):
        place = abs(code - 127) if signed else code + 1
        d = place.bit_length() - (1 if signed else 2)
        if d >= 0:
            parts = 1 << place.bit_length() - 1
            magnitude = 10.0 ** (d - 6) * (0.1 + 0.9 * (place - parts + 0.5) / parts)
            values[code] = -magnitude if signed and code < 127 else magnitude
    return torch.tensor(values, dtype=torch.float64)


def spread(absmax, x):
    """Of each element of x, that of its block."""
    return absmax.repeat_interleave(BLOCK)[: x.numel()].view(x.shape)


def value(row, name):
    """In float64, of what was stored for p, g, m, v or largest."""
    if name == "p" and "master" in row:
        master = row["master"]
        return (master if master.dtype == FP32 else joined(row["p"], master)).double()
    if row[name].dtype == INT8:
        absmax = row["absmax" if name == "m" else "absmax_sq"]
        return map_values(signed=name == "m").to(absmax.device)[row[name].int()] * spread(absmax, row[name]).double()
    return row[name].double()


def exact_step(
    row, *, lr, beta1, beta2, eps, weight_decay, amsgrad=False, maximize=False, grad_scale=None, grad_norm=None,
    max_grad_norm=0.0,
):  # fmt: skip
    """csrc/adamw.h in float64, and how far a float32 computation of it may be off before it is stored.

    Each bound counts the roundings that its formula has, of scalars, of intermediate results and of the result, an FMA
    as a product and a sum. Of g they are 1 where it is divided by a scale, and 5 where it is clipped: that of 1e-6, the
    sum, the reciprocal, the product with the largest norm, and that with g. The value of a code has 6: 0.1 and 0.9, its
    product, its sum, 10^k, and the products with that and with absmax.
    """
    t = row["step"].item() + 1
    p, g, m, v = (value(row, name) for name in "pgmv")
    largest = value(row, "largest") if amsgrad else v
    g, g_roundings = -g if maximize else g, 0
    if grad_scale is not None:
        g, g_roundings = g / grad_scale, 1
    if grad_norm is not None and (clip := max_grad_norm / (grad_norm + 1e-6)) < 1:
        g, g_roundings = g * clip, g_roundings + 5
    read = 6 * U if row["m"].dtype == INT8 else 0.0
    m_new = m + (1 - beta1) * (g - m)
    m_error = U * (m_new.abs() + (1 - beta1) * (3 * (g - m).abs() + g_roundings * g.abs())) + beta1 * read * m.abs()
    v_new = beta2 * v + (1 - beta2) * g * g
    v_error = U * (3 * v_new + 2 * g_roundings * (1 - beta2) * g * g) + beta2 * read * v
    largest_new = torch.maximum(largest, v_new) if amsgrad else v_new
    largest_error = torch.maximum(v_error, 3 * U * largest_new)
    denominator = largest_new.sqrt() / math.sqrt(1 - beta2**t) + eps
    step_size = lr / (1 - beta1**t)
    update = -step_size * m_new / denominator
    p_new = p * (1 - lr * weight_decay) + update
    # Of the update's own: the root, 1 / sqrt(1 - beta2^t), its product, eps and the sum, the step size, its product and
    # the division.
    update_error = update.abs() * (7 * U + largest_error / (2 * largest_new).clamp(min=1e-300))
    p_error = U * (2 * p.abs() + p_new.abs()) + update_error + step_size * m_error / denominator
    exact = {"p": (p_new, p_error), "m": (m_new, m_error), "v": (v_new, v_error)}
    return exact | ({"largest": (largest_new, largest_error)} if amsgrad else {})


def assert_stored(row, exact, stochastic=False):
    """Every element of a row after a step is what exact_step gives, within its bound and that of its storage."""
    exact = dict(exact)
    if "master" in row:
        wide = value(row, "p").float()
        nearest = halves(wide)[0] if row["master"].dtype == torch.int16 else wide.to(row["p"].dtype)
        assert torch.equal(row["p"], nearest), "p is not its master, rounded"
        assert_within("master", wide, *exact.pop("p"))
    for name, (x, error) in exact.items():
        if row[name].dtype == INT8:
            assert_codes(row, name, x, error)
        else:
            assert_within(name, row[name], x, error, stochastic and row[name].dtype == BF16)


def assert_within(name, got, exact, error, stochastic=False):
    """Storage adds half a unit in the last place, or with stochastic rounding a whole one, or a subnormal's."""
    storage = torch.finfo(got.dtype)
    rounding = 0 if got.dtype == FP32 else storage.eps * (1 if stochastic else 0.5)
    bound = 1.001 * error + rounding * exact.abs() + storage.smallest_normal * storage.eps
    worst = ((got.double() - exact).abs() / bound).max().item() if got.numel() else 0
    assert worst <= 1, f"{name} of size {got.numel()}: an error of {worst:.2f} times its bound"


def assert_codes(row, name, exact, error):
    """absmax is the blocks' largest, and codes the nearest; where a value is as near to a midpoint as its error and the
    roundings of the code, either of two."""
    absmax = row["absmax" if name == "m" else "absmax_sq"]
    if not len(absmax):
        return
    padding = (0, -exact.numel() % BLOCK)
    largest, slack = (
        torch.nn.functional.pad(x.abs().flatten(), padding).view(-1, BLOCK).amax(1) for x in (exact, error)
    )
    assert ((absmax.double() - largest).abs() <= 1.001 * slack).all(), f"absmax of {name}"
    scale = spread(absmax, exact).double()
    scaled, slack = exact / scale, 1.001 * error / scale + code_rounding(exact / scale)
    low, high = (nearest_code(x, signed=name == "m") for x in (scaled - slack, scaled + slack))
    wrong = ((row[name] < low) | (row[name] > high)).sum().item()
    assert wrong == 0, f"{name} of size {exact.numel()}: {wrong} codes are not the nearest"
    assert (low < high).double().mean() < 0.01, "the bound is too wide to tell codes apart"


def code_rounding(scaled):
    """How far a code's number, slope x + offset, may be off, in x: it goes from n to 2 n while x goes from a tenth of
    the decade's top to that, with an offset of 8 n / 9. Roundings of the slope and of x, by a reciprocal, are 3 u x, of
    the offset 0.8 u top, and of the sum 1.8 u top."""
    return 6 * U * 10.0 ** scaled.abs().clamp(min=1e-7).log10().ceil()


def nearest_code(scaled, *, signed):
    """By float64 values in [-1, 1]; of two as near, the lower."""
    values = map_values(signed).to(scaled.device)
    return torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)


def one_step(device, form, sizes, grad_scale=None, t=3, layout=torch.clone, clip=None, **options):
    """Runs adamw_step from random states, of t, t + 1 and t + 2 steps in turn, and holds every element of every result
    to exact_step. `clip` is the norm of the gradients and the largest that it may be."""
    rows = [random_row(form, size, device, t + i % 3) for i, size in enumerate(sizes)]
    if grad_scale:
        for row in rows:
            row["g"] *= min(grad_scale, 1000)
    rows = [{name: layout(x) for name, x in row.items()} for row in rows]
    before = [copied(row) for row in rows]
    keys = [31 + i for i in range(len(rows))] if form.weights == "stochastic" else []
    exact_options, scalars = dict(options), {}
    if grad_scale:
        exact_options["grad_scale"] = grad_scale
        scalars["grad_scale"] = torch.tensor([grad_scale], device=device)
    if clip:
        exact_options |= dict(zip(("grad_norm", "max_grad_norm"), clip, strict=True))
        scalars |= {"grad_norm": torch.tensor(clip[0], device=device), "max_grad_norm": clip[1]}
    step_rows(rows, keys=keys, **options, **scalars)
    for row, old in zip(rows, before, strict=True):
        assert row["step"] == old["step"] + 1
        assert torch.equal(row["g"], old["g"]), "the gradient was changed"
        assert_stored(row, exact_step(old, **HYPERS | exact_options), form.weights == "stochastic")
