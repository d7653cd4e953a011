"""What the Triton kernels promise beyond what the ops' tests ask of every backend: masks, tiles and sums, interpreted
or on a GPU; and that they compile for GPUs where there is none."""

import pytest
import torch
from oracle import assert_right, compare

from fusetune import ops
from fusetune.ops import philox
from fusetune.ops.adamw import adamw_grad_norm, join
from fusetune.ops.quantize import dynamic_map

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
import triton_compile  # noqa: E402

from fusetune.kernels import lora  # noqa: E402
from fusetune.kernels.philox import dropped, keep_mask, random_bits  # noqa: E402

# The interpreter computes bfloat16 products wrongly, and truncates to bfloat16: those are compiled only.
FP32, FP16, BF16, CODES = torch.float32, torch.float16, torch.bfloat16, torch.uint8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("FUSETUNE_BACKEND", "triton")


@triton.jit
def mask_kernel(out, seed, threshold, row_high, first_row, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, first_col = tl.arange(0, ROWS), tl.program_id(0) * COLS
    kept = keep_mask(tl.load(seed), first_row + row, row_high, first_col, threshold, COLS)
    pointers = out + row[:, None] * tl.num_programs(0) * COLS + first_col + tl.arange(0, COLS)[None, :]
    tl.store(pointers, kept.to(tl.int8))


@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("cols", [32, 64, 128])
def test_mask_is_the_oracles_bit_for_bit(cols, p):
    for seed, row_high, first_row in ((0, 0, 0), (2**63 - 1, 5, 2**31 - 8), (-(2**40) - 3, 2**31 - 1, 17)):
        out = torch.zeros(16, 384, dtype=torch.int8, device=DEVICE)
        mask_kernel[(384 // cols,)](
            out, torch.tensor([seed], device=DEVICE), dropped(p)[0], row_high, first_row, ROWS=16, COLS=cols
        )
        rows = (row_high << 32) + first_row + torch.arange(16)
        assert torch.equal(out.bool().cpu(), philox.keep_mask(seed, rows, 384, p))


@triton.jit
def bits_kernel(out, seed, row_low, row_high, first_group):
    row = tl.arange(0, 4)[:, None]
    bits = random_bits(tl.load(seed), row_low, row_high, first_group + row)
    tl.store(out + row * 128 + tl.arange(0, 128)[None, :], bits.to(tl.int32))


def test_random_bits_are_the_oracles():
    for seed, row_high, row_low in ((0, 0, 1), (2**63 - 1, 3 << 24, 2**24), (-(2**40) - 3, 1 << 24, 17)):
        out = torch.zeros(512, dtype=torch.int32, device=DEVICE)
        bits_kernel[(1,)](out, torch.tensor([seed], device=DEVICE), row_low, row_high, 5)
        expected = philox.random_bits(seed, torch.tensor(row_high << 32 | row_low), 9 * 128)[5 * 128 :]
        assert torch.equal(out.long().cpu(), expected)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 1.0])
def test_dropped_is_the_oracles(p):
    assert dropped(p) == (philox.threshold(p), philox.kept_scale(p))


def lora_inputs(M, K, N, R, dtype, adapter):
    inputs = {
        "x": torch.randn(M, K).to(DEVICE, dtype),
        "w": (torch.randn(N, K) / K**0.5).to(DEVICE, dtype),
        "a": (torch.randn(R, K) / K**0.5).to(DEVICE, adapter),
        "b": (torch.randn(N, R) / R**0.5).to(DEVICE, adapter),
        "bias": torch.randn(N).to(DEVICE, dtype),
    }
    return {name: t.requires_grad_(name != "w") for name, t in inputs.items()}, torch.randn(M, N).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("M", "K", "N", "R", "dtype", "adapter", "dropout_p"),
    [
        (1, 1, 1, 1, FP32, FP32, 0.5),
        (31, 65, 63, 15, FP32, FP32, 0.1),  # a row and a column about the tiles of 32 x 64
        (33, 63, 129, 17, FP32, FP32, 0.0),
        (65, 129, 127, 8, FP16, FP16, 0.1),  # and of 64 x 128
        (63, 127, 257, 64, FP16, FP32, 0.1),
        (40, 70, 50, 131, FP16, FP16, 0.0),  # more than one program's rank
        (20, 30, 40, 300, FP32, FP32, 0.2),
        (601, 20, 30, 4, FP32, FP32, 0.1),  # parts of the rows
    ],
    ids=str,
)
def test_lora(M, K, N, R, dtype, adapter, dropout_p):
    inputs, dy = lora_inputs(M, K, N, R, dtype, adapter)
    compare(ops.lora_linear, ops.lora_linear_reference, inputs, dy, dropout_p=dropout_p, scale=0.7)


def test_lora_sums_in_a_fixed_order(monkeypatch):
    inputs, dy = lora_inputs(601, 20, 30, 4, FP32, FP32)
    counts = []
    launch = lora.sum_kernel.run
    monkeypatch.setattr(
        lora.sum_kernel, "run", lambda *args, **kwargs: (counts.append(args[2]), launch(*args, **kwargs))
    )
    first, second = (
        compare(ops.lora_linear, ops.lora_linear_reference, inputs, dy, dropout_p=0.1, scale=0.7) for _ in range(2)
    )
    assert min(counts) > 1
    assert all(torch.equal(first[name], second[name]) for name in first)


def padding(kind, B, Sk):
    """[B, Sk] True where a key is kept, or None."""
    j, length = torch.arange(Sk), Sk * torch.arange(1, B + 1)[:, None] // (B + 1)
    masks = {
        "left": j >= length,
        "right": j < length,
        "scattered": j * 7 % 5 > 1,
        "first has none": (j >= 0) & (length > length[0]),
    }
    return masks[kind].expand(B, Sk).to(DEVICE) if kind else None


@pytest.mark.parametrize(
    ("H", "Hkv", "Sq", "Sk", "D", "dtype", "causal", "pad", "dropout_p"),
    [
        (1, 1, 1, 2, 1, FP32, True, None, 0.0),
        (2, 2, 33, 31, 50, FP32, False, None, 0.0),  # a row about the tiles of 32 x 32
        (4, 2, 31, 65, 50, FP32, True, None, 0.1),  # more keys than queries,
        (2, 1, 65, 33, 16, FP32, True, None, 0.0),  # and fewer: the first queries see none
        (2, 1, 129, 129, 32, FP16, True, None, 0.1),  # 128 x 64
        (2, 2, 65, 63, 128, FP16, False, "scattered", 0.5),
        (2, 1, 40, 70, 64, FP16, True, "left", 0.0),
        (3, 1, 40, 70, 64, FP32, False, "right", 0.2),
        (2, 1, 17, 40, 24, FP32, True, "first has none", 0.1),
        (1, 1, 20, 40, 200, FP16, False, None, 1.0),
    ],
    ids=str,
)
def test_attention(H, Hkv, Sq, Sk, D, dtype, causal, pad, dropout_p):
    q, do = (torch.randn(2, Sq, H, D).transpose(1, 2).to(DEVICE, dtype) for _ in range(2))
    k, v = (torch.randn(2, Hkv, Sk, D).to(DEVICE, dtype) for _ in range(2))
    inputs = {name: t.requires_grad_() for name, t in {"q": q, "k": k, "v": v}.items()}
    options = {"causal": causal, "key_padding_mask": padding(pad, 2, Sk)}
    compare(ops.flash_attention, ops.flash_attention_reference, inputs, do, dropout_p=dropout_p, **options)


def adamw_columns(sizes, dtypes, amsgrad, offset=0):
    """Parameters, gradients, averages, largest averages, step counts; addresses are `offset` elements past aligned."""

    def column(value):
        return [value(n + offset).to(DEVICE, dtype)[offset:] for n, dtype in zip(sizes, dtypes, strict=True)]

    averages = [column(torch.zeros) for _ in range(3 if amsgrad else 2)]
    steps = [torch.tensor(float(n), device=DEVICE) for n in range(len(sizes))]
    return [column(torch.randn), column(torch.randn), *averages, *([] if amsgrad else [[]]), steps]


@pytest.mark.parametrize(
    ("sizes", "dtypes", "offset", "amsgrad", "options"),
    [
        ((1, 0, 17, 1023, 1024, 1025, 8191, 8193, 20000), (FP32,), 0, False, {}),  # either side of a block and an item
        ((1, 0, 17, 8192, 9000), (FP32, FP16), 0, True, {"maximize": True, "max_grad_norm": 0.3}),
        ((5, 3000), (FP16, FP32), 1, False, {"beta1": 0.0, "weight_decay": 0.0, "lr": torch.tensor(0.02)}),
        ((0,), (FP32,), 0, False, {"max_grad_norm": 1.0}),
    ],
    ids=str,
)
def test_adamw(sizes, dtypes, offset, amsgrad, options):
    dtypes = [dtypes[i % len(dtypes)] for i in range(len(sizes))]
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": amsgrad} | options
    options = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    options["grad_scale"] = torch.tensor(4.0, device=DEVICE)
    got = adamw_columns(sizes, dtypes, amsgrad, offset)
    for _ in range(3):
        plain = [[t.clone() for t in column] for column in got]
        exact = [[t.double() for t in column] for column in got]
        if "max_grad_norm" in options:
            options["grad_norm"] = adamw_grad_norm(got[1], options["grad_scale"])
        ops.adamw_step(*got, **options)
        ops.adamw_step_reference(*plain, **options)
        ops.adamw_step_reference(*exact, **options)
        names = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        for name, *columns in zip(names, got, plain, exact, strict=True):
            for i, results in enumerate(zip(*columns, strict=True)):
                assert_right(f"{name} {i}", *results)
        for gradient in got[1]:
            gradient.normal_()


def adamw_lists(sizes, dtype, state, kept):
    """Lists of tensors, by the names of the arguments, with states of zero."""
    code_of_zero = {"exp_avgs": 127, "exp_avg_sqs": 0}
    lists = {name: [torch.randn(n).to(DEVICE, dtype) for n in sizes] for name in ("params", "grads")}
    for name, code in code_of_zero.items():
        lists[name] = [torch.full([n], code if state == CODES else 0, dtype=state, device=DEVICE) for n in sizes]
    lists |= {"max_exp_avg_sqs": [], "state_steps": [torch.zeros((), device=DEVICE) for _ in sizes]}
    if kept == "master":
        lists["masters"] = [p.float() for p in lists["params"]]
    if kept == "split":
        lists["masters"] = [torch.randint(-(2**15), 2**15, [n]).to(DEVICE, torch.int16) for n in sizes]
    if kept == "stochastic":
        lists["keys"] = [(-1) ** i * (2**62 - i) for i in range(len(sizes))]
    if state == CODES:
        lists |= {name: [torch.zeros(-(-n // 256), device=DEVICE) for n in sizes] for name in ("absmaxs", "absmax_sqs")}
    return lists


def copied(lists):
    return {name: [t.clone() if torch.is_tensor(t) else t for t in column] for name, column in lists.items()}


def assert_nearest(codes, absmax, x, signed):
    """Seven roundings of value / absmax, and three of the values of codes, make the choice between two codes."""
    y = x.double() / absmax.repeat_interleave(256)[: len(x)].clamp(min=torch.finfo(FP32).tiny)
    error = (dynamic_map(signed).to(DEVICE, torch.float64) - y[:, None]).abs()
    chosen = error.gather(1, codes.long()[:, None])[:, 0]
    assert (chosen <= error.amin(1) + 10 * torch.finfo(FP32).eps * y.abs()).all()


@pytest.mark.parametrize(
    ("dtype", "state", "kept"),
    [
        (FP32, CODES, None),
        (FP16, FP32, "master"),
        (FP16, CODES, "master"),
        (BF16, FP32, "split"),
        (BF16, CODES, "split"),
        (BF16, BF16, "stochastic"),
        (BF16, FP32, "stochastic"),
        (BF16, CODES, "stochastic"),
    ],
    ids=str,
)
def test_adamw_stores_what_the_format_says(dtype, state, kept):
    """Both averages are functions of the gradient alone, with one rounding each, and where that is 0 so is the update;
    what is stored of them is known to the bit."""
    got = adamw_lists((1, 0, 255, 257, 1025, 8193), dtype, state, kept)
    for g in got["grads"]:
        g *= torch.randint(2, g.shape, device=DEVICE) * 10.0 ** torch.randint(-4, 2, g.shape, device=DEVICE)
    plain = copied(got)
    options = {"lr": 2**-7, "beta1": 0.0, "beta2": 0.0, "weight_decay": 0.3, "eps": 1e-8}
    options["grad_scale"] = torch.tensor(3.0, device=DEVICE)
    ops.adamw_step(**got, **options)
    ops.adamw_step_reference(**plain, **options)

    for i, g in enumerate(got["grads"]):
        tensors = [{name: column[i] for name, column in lists.items() if column} for lists in (got, plain)]
        if state == CODES:
            m = g.float() / 3
            assert_nearest(tensors[0]["exp_avgs"], tensors[0]["absmaxs"], m, True)
            assert_nearest(tensors[0]["exp_avg_sqs"], tensors[0]["absmax_sqs"], m * m, False)
        for name in ("absmaxs", "absmax_sqs") if state == CODES else ("exp_avgs", "exp_avg_sqs"):
            assert torch.equal(tensors[0][name], tensors[1][name]), name
        wide = [join(t["params"], t["masters"]) if kept == "split" else t.get("masters", t["params"]) for t in tensors]
        assert torch.equal(wide[0][g == 0], wide[1][g == 0])
        assert_right("p", *wide, wide[1].double())
        if kept == "split":
            assert (tensors[0]["params"].float() - wide[0]).abs().le(wide[0].abs() * torch.finfo(BF16).eps / 2).all()
        elif kept == "master":
            assert torch.equal(tensors[0]["params"], wide[0].to(dtype))


def test_adamw_reads_codes():
    """Halved, an average keeps its codes."""
    got = adamw_lists((1, 256, 8300), FP32, CODES, None)
    for i, g in enumerate(got["grads"]):
        g.zero_()
        for name, absmax in (("exp_avgs", "absmaxs"), ("exp_avg_sqs", "absmax_sqs")):
            got[name][i].random_(0, 256)[::256] = 255
            got[absmax][i].exponential_()
        got["absmax_sqs"][i][-1] = 2.0**-130  # whose reciprocal is not finite
    plain = copied(got)
    options = {"lr": 0.01, "beta1": 0.5, "beta2": 0.5, "weight_decay": 0.1, "eps": 1e-8}
    before = copied(got)
    ops.adamw_step(**got, **options)
    ops.adamw_step_reference(**plain, **options)
    for i, p in enumerate(got["params"]):
        assert_right("p", p, plain["params"][i], plain["params"][i].double())
        assert torch.equal(got["exp_avgs"][i], before["exp_avgs"][i])
        assert torch.equal(got["exp_avg_sqs"][i], before["exp_avg_sqs"][i])
        assert torch.equal(got["absmaxs"][i], before["absmaxs"][i] / 2)
        assert torch.equal(got["absmax_sqs"][i], before["absmax_sqs"][i] / 2)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_adamw_keeps_what_is_not_finite_out_of_its_block(poison):
    got = adamw_lists((600,), FP32, CODES, None)
    got["grads"][0][[3, 599]] = poison
    clean = copied(got)
    clean["grads"][0][[3, 599]] = 0
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}
    ops.adamw_step(**got, **options)
    ops.adamw_step(**clean, **options)
    assert got["params"][0].isnan().nonzero().flatten().tolist() == [3, 599]
    for name in ("exp_avgs", "exp_avg_sqs", "absmaxs", "absmax_sqs"):
        assert torch.equal(got[name][0], clean[name][0])


def test_adamw_leaves_all_as_it_was_where_an_infinity_was_found():
    got = adamw_columns((5, 9000), (FP32, FP16), True)
    before = [[t.clone() for t in column] for column in got]
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True}
    ops.adamw_step(*got, **options, found_inf=torch.ones(1, device=DEVICE))
    assert all(torch.equal(a, b) for old, new in zip(before, got, strict=True) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("offset", [0, 1])
def test_adamw_grad_norm(offset):
    grads = adamw_columns((0, 1, 1023, 1024, 8193, 20000), (FP32, FP16, FP32, FP32, FP16, FP32), False, offset)[1]
    scale = torch.tensor(3.0, device=DEVICE)
    norm, exact = adamw_grad_norm(grads, scale), torch.cat([g.double() for g in grads]).norm() / 3
    assert (norm.double() - exact).abs() <= exact * torch.finfo(FP32).eps / 2 * 1.001  # sums are in float64
    assert torch.equal(adamw_grad_norm(grads, scale), norm)
    grads[4][8000] = torch.nan
    assert adamw_grad_norm(grads, scale).isnan()


def test_adamw_passes_a_norm_that_is_nan_on():
    got = adamw_columns((5, 9), (FP32, FP16), False)
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8, "max_grad_norm": 1.0}
    ops.adamw_step(*got, **options, grad_norm=torch.full([1], torch.nan, device=DEVICE))
    assert all(p.isnan().all() for p in got[0])


def jobs():
    """Cases and the targets that they are compiled for here; benchmarks/cuda_build.py compiles all for all."""
    for name in triton_compile.cases():
        for target in triton_compile.TARGETS:
            left_out = ["R=64", "D=256"] if target.backend == "cuda" else ["R=64", "R=128", "D=128", "D=256"]
            if target.backend != "cuda":  # slow to compile
                left_out += ["relative", "window", "mask"]
            if not any(word in name for word in left_out):
                yield name, target


@pytest.fixture(scope="module")
def usages():
    return triton_compile.compile_all(jobs())


def test_every_kernel_compiles_for_every_target(usages):
    assert {(usage.case, usage.target) for usage in usages} == set(jobs())
    assert not [usage for usage in usages if usage.error or not usage.registers]


def test_no_kernel_spills(usages):
    assert not [usage for usage in usages if usage.local]


def test_every_kernel_fits_the_shared_memory_of_its_target(usages):
    assert not [usage for usage in usages if usage.shared > usage.target.shared_most or not usage.blocks]
