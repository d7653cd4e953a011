"""The AdamW step in every storage format: narrow states, 8-bit codes, masters, halves and stochastic rounding."""

import math
import os

import pytest
import torch
from oracle import transposed, unaligned
from steps import (
    BF16,
    BLOCK,
    FORMATS,
    FP32,
    HYPERS,
    INT8,
    LARGE,
    MASTER,
    PLAIN,
    SIZES,
    SPLIT,
    STOCHASTIC,
    Format,
    assert_codes,
    assert_stored,
    code_rounding,
    copied,
    exact_step,
    map_values,
    nearest_code,
    one_step,
    random_row,
    spread,
    step_rows,
    table_row,
    value,
)

from fusetune.ops import adamw_grad_norm
from fusetune.ops._adamw_table import Table
from fusetune.ops.philox import random_bits
from fusetune.ops.quantize import dynamic_map

OP = "adamw"
# m = g and v = g^2, rounded once, whatever they were.
NO_MOMENTUM = {"beta1": 0.0, "beta2": 0.0}
CODED = Format(FP32, INT8)

forms = pytest.mark.parametrize("form", FORMATS, ids=str)
stochastic_forms = pytest.mark.parametrize("form", STOCHASTIC, ids=str)


@pytest.fixture(scope="session")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes, which the dev extra has, is not installed")


@forms
def test_one_step_rounds_no_more_than_its_formula_and_storage(backend, form):
    one_step(backend.device, form, SIZES)


@forms
def test_one_step_of_unaligned_tensors(backend, form):
    one_step(backend.device, form, [1, 17, 300], layout=unaligned)


@forms
@pytest.mark.large
def test_one_step_of_many_work_items(backend, form):
    one_step(backend.device, form, [16383, 16385, 33001])


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"maximize": True, "weight_decay": 0.0, "t": 1},
        {"beta1": 0.3, "beta2": 0.95, "eps": 1e-3, "grad_scale": 3.0},
        {"clip": (7.0, 1.0)},
        {"clip": (0.5, 1.0), "t": 1_000_000},
        {"grad_scale": 65536.0, "clip": (7.0, 1.0), "amsgrad": True, "maximize": True},
    ],
    ids=str,
)
@forms
def test_one_step_with_options(backend, form, options):
    if form.state == INT8:
        options = options | {"amsgrad": False}
    one_step(backend.device, form, [300, 33, ()], **options)


@forms
def test_reference_rounds_no_more_than_its_formula_and_storage(device, form, monkeypatch):
    monkeypatch.setenv("FUSETUNE_BACKEND", "reference")
    one_step(device, form, SIZES, grad_scale=3.0, clip=(7.0, 1.0), amsgrad=form.state != INT8)


@forms
def test_a_tensor_lr_is_a_number(backend, form):
    """Of float32, which the number is rounded to."""
    first = random_row(form, 300, backend.device)
    second = copied(first)
    keys = [5] if form.weights == "stochastic" else []
    step_rows([first], lr=torch.tensor(0.0625, device=backend.device), keys=keys)
    step_rows([second], lr=0.0625, keys=keys)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_rows_of_all_formats_step_together_as_they_do_alone(backend):
    """With groups and times of their own."""
    rows = [random_row(form, 200 + 7 * i, backend.device, t=1 + i % 4) for i, form in enumerate(FORMATS)]
    keys = [i if form.weights == "stochastic" else None for i, form in enumerate(FORMATS)]
    alone = [copied(row) for row in rows]
    groups = [{**HYPERS, "maximize": False}, {**HYPERS, "lr": 0.1, "beta1": 0.4, "weight_decay": 0.0, "maximize": True}]
    table = Table([table_row(row, group=i % 2, key=key) for i, (row, key) in enumerate(zip(rows, keys, strict=True))])
    table.step(
        [
            [float(group[name]) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")]
            for group in groups
        ]
    )
    for i, (row, other, key) in enumerate(zip(rows, alone, keys, strict=True)):
        step_rows([other], amsgrad="largest" in other, keys=[] if key is None else [key], **groups[i % 2])
        for name, x in row.items():
            assert torch.equal(x, other[name]), f"{name} of {FORMATS[i]}"


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": transposed,
    "with gaps": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("odd", ["p", "g", "v", "master", "all"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", [PLAIN[2], PLAIN[3], *MASTER[1:3], *SPLIT], ids=str)
def test_layouts_step_as_contiguous_tensors_do(device, form, layout, odd):
    plain = random_row(form, (4, 6, 5, 3), device)
    odd = odd if odd in plain else "all"
    others = {name: layout(x) if x.dim() == 4 and odd in (name, "all") else x.clone() for name, x in plain.items()}
    strides = {name: x.stride() for name, x in others.items()}
    step_rows([plain])
    step_rows([others])
    for name, x in plain.items():
        assert torch.equal(x, others[name]), name
        assert others[name].stride() == strides[name], name


@pytest.mark.parametrize("found", [0.0, 1.0])
@forms
def test_found_inf_leaves_everything_untouched(backend, form, found):
    row = random_row(form, 300, backend.device)
    before = copied(row)
    keys = [5] if form.weights == "stochastic" else []
    step_rows([row], keys=keys, found_inf=torch.tensor([found], device=backend.device))
    for name, x in row.items():
        changes = not found and name not in ("g", "largest")
        assert torch.equal(x, before[name]) != changes, name


@forms
@pytest.mark.usefixtures("cpu_backend")
def test_result_does_not_depend_on_the_thread_count(form, set_threads):
    initial = [random_row(form, size) for size in (*LARGE, *SIZES)]
    keys = list(range(len(initial))) if form.weights == "stochastic" else []
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        rows = [copied(row) for row in initial]
        step_rows(rows, keys=keys)
        results.append([x for row in rows for x in row.values()])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@forms
def test_a_gradient_that_is_not_finite_spoils_its_own_element_only(backend, form, poison):
    """And not the block's codes: m and v are 0 there."""
    row = random_row(form, 600, backend.device)
    clean, old = copied(row), copied(row)
    row["g"][37] = poison
    keys = [5] if form.weights == "stochastic" else []
    for each in (row, clean):
        step_rows([each], keys=keys)
    exact = exact_step(old, **HYPERS)
    for name in "pmv":
        got, expected = value(row, name), value(clean, name)
        if row[name].dtype == INT8:
            x, error = exact[name]
            x[37] = 0
            assert_codes(row, name, x, error)
        else:
            assert (
                got[37].isnan()
                if name == "p" or math.isnan(poison)
                else got[37] == (poison if name == "m" else math.inf)
            )
            got[37] = expected[37] = 0
            assert torch.equal(got, expected), name
    assert row["p"][37].isnan()


# Stochastic rounding


def rounded(x, key, kind, t):
    """csrc/adamw.h: bfloat16 of float32 x; NaN aside."""
    random = random_bits(key, torch.tensor(kind << 56 | t, device=x.device), x.numel()).view(x.shape)
    bits = (x.view(torch.int32).long() & 0xFFFFFFFF) + random >> 16
    return (bits - (bits >> 15 << 16)).to(torch.int16).view(BF16)


def walking_row(form, p, device, t=3):
    """A row whose step without momentum, decay and eps moves p by lr against the sign of g, in float32 exactly."""
    row = random_row(form, p.shape, device, t)
    row["p"] = p.to(device)
    row["g"] = (2.0 ** torch.randint(-8, 8, p.shape)).copysign(torch.randn(p.shape)).to(device, BF16)
    return row


@stochastic_forms
@pytest.mark.parametrize("size", [1, 15, 127, 128, 129, 4097, pytest.param(33001, marks=pytest.mark.large)])
def test_parameters_are_rounded_by_the_documented_bits(backend, form, size):
    rows = [walking_row(form, torch.randn(size).to(BF16), backend.device, t) for t in (1, 2, 100_000)]
    keys = [0, 2**63 - 1, 0x123456789ABCDEF]
    lr = torch.tensor(0.01)
    exact = [row["p"].float() - lr.to(backend.device) * row["g"].float().sign() for row in rows]
    step_rows(rows, keys=keys, lr=0.01, eps=0.0, weight_decay=0.0, **NO_MOMENTUM)
    for row, x, key in zip(rows, exact, keys, strict=True):
        assert torch.equal(row["p"], rounded(x, key, 0, int(row["step"])))


@pytest.mark.parametrize("size", [1, 15, 127, 128, 129, 4097, pytest.param(33001, marks=pytest.mark.large)])
@pytest.mark.parametrize("form", [STOCHASTIC[1]], ids=str)
def test_moments_are_rounded_by_bits_of_their_own(backend, form, size):
    """With beta = 1/2, (g + m) / 2 and (g^2 + v) / 2 of 8 bits each are exact in float32."""
    row = random_row(form, size, backend.device)
    for name in ("g", "m"):
        row[name] = (1 + torch.rand(size)).copysign(torch.randn(size)).to(backend.device, BF16)
    for name in ("v", "largest"):
        row[name] = (1 + 3 * torch.rand(size)).to(backend.device, BF16)
    g, m, v = (row[name].float() for name in "gmv")
    m, v = (g + m) / 2, (g * g + v) / 2
    largest = torch.maximum(row["largest"].float(), v)
    step_rows([row], keys=[77], beta1=0.5, beta2=0.5, amsgrad=True)
    for kind, (name, x) in enumerate({"m": m, "v": v, "largest": largest}.items(), 1):
        assert torch.equal(row[name], rounded(x, 77, kind, 3)), name


@pytest.mark.parametrize("form", [STOCHASTIC[0]], ids=str)
def test_elements_are_counted_as_they_lie_in_memory(backend, form):
    row = random_row(form, (40, 30), backend.device)
    across = {name: transposed(x) if x.dim() == 2 else x.clone() for name, x in row.items()}
    down = {name: x.mT.contiguous() if x.dim() == 2 else x.clone() for name, x in row.items()}
    step_rows([row, across], keys=[5, 5])
    step_rows([down], keys=[5])
    assert torch.equal(across["p"], down["p"].mT)
    assert not torch.equal(across["p"], row["p"])


@stochastic_forms
def test_keys_and_steps_have_bits_of_their_own(backend, form):
    start = random_row(form, 1000, backend.device)
    rows = [copied(start) for _ in range(4)]
    rows[3]["step"] += 2**20  # bias corrections are 1 from here on
    rows[2]["step"] += 2**20 + 1
    step_rows(rows, keys=[1, 2, 1, 1])
    assert not torch.equal(rows[0]["p"], rows[1]["p"])
    assert not torch.equal(rows[2]["p"], rows[3]["p"])


@stochastic_forms
def test_what_bfloat16_has_stays(backend, form):
    values = [0.0, 1.0, -1.5, 1e-40, -1e-40, 2.0**-126, math.inf, -math.inf, math.nan, *(BF16_MAX, -BF16_MAX)]
    p = torch.tensor(values).to(BF16)
    row = random_row(form, p.shape, backend.device)
    row["p"] = p.to(backend.device)
    step_rows([row], keys=[5], lr=0.0)
    torch.testing.assert_close(row["p"].cpu(), p, rtol=0, atol=0, equal_nan=True)


BF16_MAX = torch.finfo(BF16).max


@stochastic_forms
def test_above_the_largest_number_is_infinity_as_often_as_it_is_near(backend, form):
    """A quarter of the way from it to 2^128, and never NaN."""
    p = torch.full((4096,), BF16_MAX).copysign(torch.randn(4096)).to(BF16)
    row = walking_row(form, p, backend.device)
    row["g"] = -row["p"].sign()
    step_rows([row], keys=[5], lr=2.0**118, eps=0.0, weight_decay=0.0, **NO_MOMENTUM)
    assert torch.equal(row["p"].sign(), p.to(backend.device).sign())
    beyond = row["p"].isinf()
    assert (row["p"][~beyond].abs() == BF16_MAX).all()
    assert abs(beyond.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(p))


@pytest.mark.parametrize("part", [2**-12, 0.25, 0.5, 0.9])
def test_mean_and_variance_over_keys_and_steps(device, part):
    """1 + part / 128 is 1 or 1 + 1 / 128: sums over keys, over steps and over elements are of independent throws."""
    n, rounds = 4096, 256
    part = round(part * 65536) / 65536
    for keys, times in ((range(rounds), [1] * rounds), ([7] * rounds, range(1, rounds + 1))):
        rows = [walking_row(STOCHASTIC[0], torch.ones(n).to(BF16), device, t) for t in times]
        for row in rows:
            row["g"] = -row["g"].abs()
        step_rows(rows, keys=list(keys), lr=part / 128, eps=0.0, weight_decay=0.0, **NO_MOMENTUM)
        up = (torch.stack([row["p"] for row in rows]).double() - 1) * 128
        assert ((up == 0) | (up == 1)).all()
        variance = part * (1 - part)
        assert abs(up.mean() - part) < 4 * math.sqrt(variance / up.numel())
        for dim, count in ((0, rounds), (1, n)):
            sums = up.sum(dim)
            # of a sum of Bernoulli variables, by its fourth moment
            spread_of_square = math.sqrt((2 * count**2 * variance**2 + count * variance) / len(sums))
            assert abs(sums.var() - count * variance) < 5 * spread_of_square


def test_updates_below_half_a_unit_add_up(device):
    """64 of them, of 1/64 unit, where rounding to nearest would stay."""
    n, steps = 4096, 64
    rows = [walking_row(form, torch.ones(n).to(BF16), device, 1) for form in (STOCHASTIC[0], PLAIN[3])]
    for row, keys in zip(rows, ([9], []), strict=True):
        row["g"] = -row["g"].abs()
        for _ in range(steps):
            step_rows([row], keys=keys, lr=2.0**-13, eps=0.0, weight_decay=0.0, **NO_MOMENTUM)
    walked, stayed = ((row["p"].double() - 1) * 128 for row in rows)
    assert (stayed == 0).all()
    assert abs(walked.mean() - 1) < 4 * math.sqrt(steps / 64 * 63 / 64 / n)


# Masters and halves


@pytest.mark.parametrize("form", MASTER[:3], ids=str)
def test_masters_and_halves_train_as_float32(backend, form):
    """Halves as masters bit for bit. Parameters of float32 alike but where states are float32 too: those are divided by
    sqrt(1 - beta2^t), and masters multiplied by its reciprocal, so that each is off by its own bound."""
    plain = random_row(Format(FP32, form.state), 1000, backend.device, t=1)
    plain["g"] = plain["g"].to(BF16).float()
    master, split = copied(plain), copied(plain)
    master["master"] = plain["p"].clone()
    low = plain["p"].view(torch.int32).to(torch.int16)
    split["p"] = ((plain["p"].view(torch.int32) - low >> 16).to(torch.int16)).view(BF16)
    split["master"] = low
    master["p"] = plain["p"].to(BF16)
    apart = torch.zeros(1000, device=backend.device, dtype=torch.float64)
    for _ in range(8):
        g = torch.randn(1000).to(backend.device, BF16)
        plain["g"], master["g"], split["g"] = g.float(), g, g
        apart += 2 * exact_step(plain, **HYPERS)["p"][1]
        for row in (plain, master, split):
            step_rows([row])
        assert torch.equal(master["master"], value(split, "p").float())
        assert torch.equal(master["p"], master["master"].to(BF16))
        for name in plain.keys() - {"p", "g"}:
            assert torch.equal(plain[name], master[name]), name
            assert torch.equal(plain[name], split[name]), name
        if form.state == FP32:
            assert ((plain["p"].double() - master["master"].double()).abs() <= 1.001 * apart).all()
        else:
            assert torch.equal(plain["p"], master["master"])


# 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_those_of_the_formulas_and_of_bitsandbytes(bnb, signed):
    """The table, of float32 roundings: of 0.1 and 0.9 j, the sum, 10^k and the product, and those of the middle."""
    expected = map_values(signed)
    assert (expected.diff() > 0).all()
    values = dynamic_map(signed)
    assert ((values.double() - expected).abs() <= 5 * torch.finfo(FP32).eps / 2 * expected.abs()).all()
    assert torch.equal(values, bnb.functional.create_dynamic_map(signed=signed).float())


NEAR = 21


def targets(signed):
    """Numbers of [-1, 1] or [0, 1]: the map, about its midpoints, and of every magnitude."""
    values = map_values(signed)
    middles = (values[:-1] + values[1:]) / 2
    near = [middles * (1 + k * torch.finfo(FP32).eps) for k in range(-(NEAR // 2) * 4, NEAR // 2 * 4 + 1, 4)]
    random = 10 ** (-8 * torch.rand(8000, dtype=torch.float64))
    x = torch.cat([values, *near, random, -random])
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False], ids=["m", "v"])
def test_codes_are_the_nearest_and_absmax_the_largest(backend, signed):
    """Exactly, but for what is within the map's and the division's roundings of the middle of two codes."""
    x = targets(signed).float()
    x = x[torch.randperm(len(x))]
    scale = spread(10 ** (8 * torch.rand(-(-len(x) // BLOCK)) - 4), x)
    x[::BLOCK] = 1  # of each block its largest
    x = (x * scale) if signed else (x * scale).sqrt()
    row = random_row(CODED, len(x), backend.device)
    row["g"] = x.to(backend.device)
    step_rows([row], **NO_MOMENTUM)
    got, absmax = (row["m"], row["absmax"]) if signed else (row["v"], row["absmax_sq"])
    exact = (x if signed else x * x).to(backend.device)
    padded = torch.nn.functional.pad(exact, (0, -len(exact) % BLOCK)).view(-1, BLOCK)
    assert torch.equal(absmax, padded.abs().amax(1))

    scaled = exact.double() / spread(absmax, exact).double()
    values = map_values(signed).to(backend.device)
    middles = (values[:-1] + values[1:]) / 2
    nearest = (scaled[:, None] - values).abs().argmin(1)
    doubtful = ((scaled[:, None] - middles).abs() <= code_rounding(middles)).any(1)
    assert torch.equal(got[~doubtful].long(), nearest[~doubtful])
    assert ((got.long() - nearest).abs() <= doubtful.long()).all()
    assert doubtful.sum() < NEAR / 4 * len(middles)  # a quarter of those that were made to be near


def test_blocks_of_zeros_and_one_huge_element(backend):
    row = random_row(CODED, 4 * BLOCK + 3, backend.device)
    row["g"].zero_()
    row["m"].fill_(127)
    row["v"].zero_()
    row["absmax"][0] = row["absmax_sq"][0] = 0
    p = row["p"].clone()
    step_rows([row])
    assert (row["m"] == 127).all()
    assert not row["v"].any()
    assert not row["absmax"].any()
    assert not row["absmax_sq"].any()
    decay = torch.tensor(1 - HYPERS["lr"] * HYPERS["weight_decay"], dtype=FP32, device=backend.device)
    assert torch.equal(row["p"], p * decay)

    row = random_row(CODED, 4 * BLOCK + 3, backend.device)
    row["g"][300] = 1e15
    row["g"][-1] = -1e15  # of the last block, of 3
    old = copied(row)
    step_rows([row])
    exact = exact_step(old, **HYPERS)
    assert_stored(row, exact)
    assert row["m"][300] == 255
    assert row["v"][[300, -1]].eq(255).all()
    assert row["m"][-1] == nearest_code(torch.tensor(-1.0), signed=True)


def test_a_v_that_overflows_is_left_out_of_its_block(backend):
    row = random_row(CODED, 300, backend.device)
    row["g"][7] = 1e30
    old = copied(row)
    step_rows([row])
    exact = exact_step(old, **HYPERS)
    exact["v"][0][7] = 0
    assert_codes(row, "v", *exact["v"])
    assert row["m"][7] == 255
    assert row["p"].isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.usefixtures("cpu_backend")
def test_bitsandbytes_step_from_the_same_state(bnb, dtype):
    """p within its float32 roundings. Codes but where a midpoint is within what bitsandbytes' CPU kernel rounds values
    to before it looks them up, 65536 parts of [-1, 1]."""
    n = 4097
    theirs = random_row(Format(dtype, INT8), n, t=1)
    theirs["m"].fill_(127)
    theirs["v"].zero_()
    maps = [dynamic_map(signed) for signed in (True, False)]
    for t in range(1, 8):
        theirs["g"] = (0.01 * torch.randn(n)).to(dtype)
        ours = copied(theirs)
        old = copied(theirs)
        step_rows([ours])
        bnb.functional.optimizer_update_8bit_blockwise(
            *("adam", theirs["g"], theirs["p"], theirs["m"], theirs["v"]),
            *(HYPERS["beta1"], HYPERS["beta2"], 0.0, 0.0, HYPERS["eps"], t, HYPERS["lr"], *maps),
            *(theirs["absmax"], theirs["absmax_sq"], HYPERS["weight_decay"]),
        )
        theirs["step"] += 1
        exact = exact_step(old, **HYPERS)
        x, error = exact["p"]
        bound = 4 * error + torch.finfo(dtype).eps * x.abs()
        assert ((ours["p"].double() - theirs["p"].double()).abs() <= bound).all()
        for name, absmax, signed in (("m", "absmax", True), ("v", "absmax_sq", False)):
            torch.testing.assert_close(ours[absmax], theirs[absmax], rtol=1e-6, atol=0)
            scaled = exact[name][0] / spread(theirs[absmax], ours[name]).double()
            values = map_values(signed)
            gap = (scaled[:, None] - (values[:-1] + values[1:]) / 2).abs().amin(1)
            clear = gap > 1.1 / 65535
            assert clear.double().mean() > 0.5
            assert torch.equal(ours[name][clear], theirs[name][clear]), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.usefixtures("cpu_backend")
def test_8_bits_follow_32_within_the_limits_of_bitsandbytes_own_tests(dtype):
    """test_optimizer8bit of its tests/test_optim.py: data, steps, limits, and that 32 bits go on from the 8."""
    shape = (1024, 32)
    ours = random_row(Format(dtype, INT8), shape, t=1)
    ours["p"] = (0.1 * torch.randn(shape)).to(dtype)
    ours["m"].fill_(127)
    ours["v"].zero_()
    theirs = ours["p"].float().clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs])
    for _ in range(50):
        ours["g"] = (0.01 * torch.randn(shape)).to(dtype)
        theirs.grad = ours["g"].float()
        step_rows([ours], lr=1e-3)
        optimizer.step()
        error = (ours["p"].float() - theirs.detach()).abs()
        assert error.mean() < (0.00017 if dtype == BF16 else 0.00006)
        assert (error / (theirs.detach().abs() + 1e-9)).mean() < (0.0016 if dtype == BF16 else 0.0006)
        ours["p"].copy_(theirs.detach())
        theirs.data.copy_(ours["p"])
        for name, state in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            expected = optimizer.state[theirs][state]
            assert (~torch.isclose(value(ours, name).float(), expected, rtol=1e-3, atol=3e-3)).sum() < 20
            expected.copy_(value(ours, name))


# Opt-in


def memory_available():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


@pytest.mark.skipif(os.environ.get("FUSETUNE_TEST_HUGE") != "1", reason="FUSETUNE_TEST_HUGE=1 runs it, in 16 GB")
@pytest.mark.parametrize("form", [Format(BF16, INT8), STOCHASTIC[2]], ids=str)
def test_more_than_2_31_elements(form):
    """Blocks at the start, on either side of element 2^31, and the last elements, step as they do by themselves."""
    if memory_available() < 16:
        pytest.skip(f"needs 16 GB of memory, and {memory_available():.0f} are free")
    n = 2**31 + 3 * BLOCK + 5
    row = {name: torch.empty(n, dtype=BF16).fill_(2.0**-10) for name in "pg"}
    row |= {name: torch.empty(n, dtype=INT8).fill_(200) for name in "mv"}
    row |= {name: torch.ones(-(-n // BLOCK)) for name in ("absmax", "absmax_sq")}
    row["step"] = torch.tensor(2.0)
    windows = [slice(0, BLOCK), slice(2**31 - BLOCK, 2**31 + BLOCK), slice(2**31 + 2 * BLOCK, n)]
    for window in windows:
        for name in "pg":
            row[name][window] = torch.randn_like(row[name][window])
    squares = sum(row["g"][window].double().square().sum() for window in windows)
    others = n - sum(row["g"][window].numel() for window in windows)
    norm = (squares + others * 2.0**-20).sqrt().item()
    assert adamw_grad_norm([row["g"]]).item() == pytest.approx(norm, rel=torch.finfo(FP32).eps)

    alone = []
    for window in windows:
        blocks = slice(window.start // BLOCK, -(-window.stop // BLOCK))
        part = {name: row[name][window].clone() for name in "pgmv"} | {"step": row["step"].clone()}
        alone.append((part | {name: row[name][blocks].clone() for name in ("absmax", "absmax_sq")}, blocks))
    keys = [3] if form.weights == "stochastic" else []
    step_rows([row], keys=keys)
    for window, (part, blocks) in zip(windows, alone, strict=True):
        step_rows([part])
        for name in "mv":
            assert torch.equal(row[name][window], part[name]), name
        for name in ("absmax", "absmax_sq"):
            assert torch.equal(row[name][blocks], part[name]), name
        apart = (row["p"][window].double() - part["p"].double()).abs()
        assert (apart <= (torch.finfo(BF16).eps * part["p"].double().abs() if keys else 0)).all()
