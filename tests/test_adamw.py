"""The AdamW step at every backend, beside torch.optim.AdamW and a float64 step with its roundings."""

import itertools
import math
import re

import pytest
import torch
from oracle import row_strided, transposed, unaligned
from steps import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    HYPERS,
    INT8,
    LARGE,
    MASTER,
    OPTIONS,
    PLAIN,
    SIZES,
    SPLIT,
    STOCHASTIC,
    Format,
    assert_equal,
    clone,
    copied,
    exact_step,
    make,
    one_step,
    random_row,
    step_rows,
    table_row,
    train,
)

from fusetune.ops import adamw_step, adamw_step_reference
from fusetune.ops._adamw_table import Table
from fusetune.optim.adamw import AdamW

OP = "adamw"

options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("layout", [torch.clone, unaligned])
@dtypes
def test_one_step_rounds_no_more_than_its_formula(backend, dtype, layout):
    one_step(backend.device, Format(dtype, dtype), SIZES, layout=layout)


@dtypes
@pytest.mark.large
def test_one_step_of_many_work_items(backend, dtype):
    one_step(backend.device, Format(dtype, dtype), LARGE)


@pytest.mark.large
def test_one_step_of_many_tensors(backend):
    """Of which CUDA's blocks look at 256 at a time."""
    one_step(
        backend.device, Format(FP32, FP32), [20000, *(i % 7 for i in range(250)), 40000, *(i % 5 for i in range(300))]
    )


@pytest.mark.parametrize("t", [1, 1000, 1_000_000])
@pytest.mark.parametrize("grad_scale", [None, 65536.0, 3.0])
@dtypes
def test_one_step_at_any_time_and_scale(backend, dtype, grad_scale, t):
    one_step(backend.device, Format(dtype, dtype), [33, 100], grad_scale, t)


@pytest.mark.parametrize(
    ("amsgrad", "maximize", "weight_decay", "beta1", "beta2", "eps"),
    [
        *itertools.product([False, True], [False, True], [0.0, 0.1], [0.0, 0.9], [0.99], [1e-8]),
        (True, True, 0, 0, 0, 1),
    ],
)
def test_one_step_with_options(backend, amsgrad, maximize, weight_decay, beta1, beta2, eps):
    hypers = {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": weight_decay}
    one_step(backend.device, Format(FP32, FP32), [37], 8.0, beta1=beta1, beta2=beta2, eps=eps, **hypers)


@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.large
@pytest.mark.large_on_host
def test_float32_is_within_two_units_in_the_last_place(backend, beta1):
    """Of the largest of the numbers that a sum may cancel from: p before and after, m before and after, and g. Of an
    update, which has more roundings, p has few bits: it is small beside p."""
    row = random_row(Format(FP32, FP32), 1_000_000, backend.device)
    row["p"] += row["p"].sign()
    old = copied(row)
    step_rows([row], beta1=beta1)
    for name, (x, _) in exact_step(old, **HYPERS | {"beta1": beta1}).items():
        operands = [x, old[name], *([old["g"]] if name == "m" else [])]
        largest = torch.stack([operand.abs().double() for operand in operands]).amax(0)
        ulp = 2.0 ** (largest.frexp().exponent - 24).double()
        worst = ((row[name].double() - x).abs() / ulp).max().item()
        assert worst <= 2, f"{name}: {worst:.2f}"


def skip_without_fma():
    if (capability := torch.backends.cpu.get_cpu_capability()) not in ("AVX2", "AVX512"):
        pytest.skip(f"torch's kernel has no FMA at {capability}")


@options
@pytest.mark.usefixtures("cpu_backend")
def test_equals_torchs_fused_step_bitwise(options):
    """Whatever the instruction set here and there, but for torch's tails, which it rounds as scalars without FMA."""
    skip_without_fma()
    params = make([*SIZES[1:], *LARGE, (3, 5, 7)])
    ours, theirs = params, clone(params)
    optimizers = AdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for optimizer, p in zip(optimizers, (ours, theirs), strict=True):
        train(optimizer, p, 6)
    for p, q in zip(ours, theirs, strict=True):
        state, expected = ({"p": t, **o.state[t]} for o, t in zip(optimizers, (p, q), strict=True))
        assert state.keys() == expected.keys()
        assert torch.equal(state.pop("step"), expected["step"])
        body = p.numel() // 16 * 16  # of the longest vector
        for name, t in state.items():
            differ = (t.view(-1)[:body] != expected[name].view(-1)[:body]).sum().item()
            assert differ == 0, f"{name} of {p.numel()} differs in {differ} elements"


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.usefixtures("cpu_backend")
def test_equals_torchs_fused_step_in_16_bits_but_for_a_few_roundings(dtype, amsgrad):
    """Of m and v every bit. p before it is rounded differs by the reciprocal, as far as it may be off here and there;
    between two numbers that near lies the middle of two of 16 bits as often as they are shares of its ulp apart."""
    skip_without_fma()
    n = 131072
    row = random_row(Format(dtype, dtype), n)
    theirs = copied(row)
    for _ in range(6):
        before = copied(row)
        step_rows([row], amsgrad=amsgrad)
        columns = [*([theirs[name]] for name in "pgmv"), [theirs["largest"]] if amsgrad else []]
        torch._fused_adamw_(*columns, [theirs["step"].add_(1)], **HYPERS, amsgrad=amsgrad, maximize=False)
        for name in ("m", "v", "largest"):
            assert torch.equal(row[name], theirs[name]), name
        exact, error = exact_step(before, **HYPERS, amsgrad=amsgrad)["p"]
        ulp = torch.finfo(dtype).eps * 2.0 ** (exact.frexp().exponent - 1).double()
        expected = (2 * error / ulp).clamp(max=1).sum().item()
        differ = row["p"] != theirs["p"]
        assert differ.sum() <= expected + 4 * expected**0.5
        apart = (row["p"].double() - theirs["p"].double()).abs()
        assert (apart <= 1.01 * ulp + 2 * error).all()
        row["p"].copy_(theirs["p"])
        row["g"].copy_(torch.randn(n))
        theirs["g"].copy_(row["g"])


@options
def test_against_torchs_for_loop(backend, options):
    """An independent formula. In m + (1 - beta1)(g - m), m may be 1000 times the gradient that `train` gives: steps,
    of a size lr, are then as many times less exact."""
    params = make([1, 17, 300, (5, 7)], device=backend.device)
    ours, theirs = params, clone(params)
    train(AdamW(ours, **options), ours, 6)
    train(torch.optim.AdamW(theirs, foreach=False, **options), theirs, 6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=4000 * torch.finfo(FP32).eps * float(options.get("lr", 1e-3)))


@options
def test_reference_is_torchs_for_loop_in_float64(options):
    options = {
        name: value.double() if name == "lr" and torch.is_tensor(value) else value for name, value in options.items()
    }
    theirs = [p.detach().double().requires_grad_() for p in make([1, 17, (5, 7)])]
    ours = [p.detach().clone() for p in theirs]
    optimizer = torch.optim.AdamW(theirs, foreach=False, **options)
    m, v, largest = ([torch.zeros_like(p) for p in ours] for _ in range(3))
    steps, d = [torch.zeros(()) for _ in ours], optimizer.defaults
    hypers = {name: d[name] for name in ("weight_decay", "eps", "amsgrad", "maximize")}
    hypers |= {"lr": float(d["lr"]), "beta1": d["betas"][0], "beta2": d["betas"][1]}
    for step in range(4):
        train(optimizer, theirs, 1, first=step)
        adamw_step_reference(ours, [p.grad for p in theirs], m, v, largest, steps, **hypers)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-12, atol=1e-14)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": transposed,
    "row_strided": row_strided,
    "unaligned": unaligned,
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
}


@pytest.mark.parametrize(
    ("layout", "grads"),
    [
        *(("contiguous", grads) for grads in ("contiguous", "expanded", *LAYOUTS)),
        *((layout, "contiguous") for layout in LAYOUTS),
        *(pytest.param(*pair, marks=pytest.mark.large) for pair in itertools.product(LAYOUTS, ["expanded", *LAYOUTS])),
    ],
)
def test_layouts_step_as_contiguous_tensors_do(backend, layout, grads):
    """torch's fused kernel walks raw memory here and is wrong; its for-loop is not."""
    value = torch.randn(4, 6, 5, 3, device=backend.device)
    p = LAYOUTS[layout](value) if layout in LAYOUTS else value.clone()
    p, q, r = (t.detach().requires_grad_() for t in (p, value.clone(), value.clone()))
    options = {"amsgrad": True, "weight_decay": 0.1}
    ours, contiguous, theirs = AdamW([p], **options), AdamW([q], **options), torch.optim.AdamW([r], **options)
    strides = p.stride()
    for step in range(3):
        torch.manual_seed(step)
        g = torch.randn(value.shape).to(value)
        p.grad = g[:, :1].expand(g.shape) if grads == "expanded" else LAYOUTS.get(grads, torch.clone)(g)
        q.grad, r.grad = p.grad.contiguous(), p.grad.contiguous()
        for optimizer in (ours, contiguous, theirs):
            optimizer.step()
    assert p.stride() == strides
    assert torch.equal(p, q)
    for name, state in ours.state[p].items():
        assert torch.equal(state, contiguous.state[q][name]), name
    torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-9)


def half_aligned(t):
    """t 8 bytes past an address that is a multiple of 16."""
    return torch.cat([t.new_zeros(8 // t.element_size()), t.reshape(-1)])[8 // t.element_size() :].view(t.shape)


@pytest.mark.parametrize("layout", [transposed, unaligned, half_aligned])
@pytest.mark.parametrize("odd", ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_any_list_may_have_a_layout_of_its_own(backend, odd, layout):
    hypers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True}
    names = ["params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"]
    plain = {name: torch.rand(6, 5, device=backend.device) for name in names}
    others = {name: layout(t) if name == odd else t.clone() for name, t in plain.items()}
    for tensors in (plain, others):
        adamw_step(*([t] for t in tensors.values()), [torch.zeros((), device=backend.device)], **hypers)
    for name in names:
        assert torch.equal(plain[name], others[name]), name


def test_no_gradients_at_all(backend):
    params = make([16], device=backend.device)
    before = clone(params)
    AdamW(params).step()
    assert_equal(params, before)
    adamw_step([], [], [], [], [], [], lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_leaves_everything_untouched(backend, found):
    tensors = [torch.rand(100, device=backend.device) for _ in range(5)]
    step, before = torch.tensor(3.0, device=backend.device), [t.clone() for t in tensors]
    hypers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True}
    adamw_step(*([t] for t in tensors), [step], **hypers, found_inf=torch.tensor([found], device=backend.device))
    changed = [not torch.equal(t, b) for t, b in zip(tensors, before, strict=True)]
    assert changed == ([False] * 5 if found else [True, False, True, True, True])
    assert step == (3 if found else 4)


@pytest.mark.parametrize("amsgrad", [False, True])
@dtypes
@pytest.mark.usefixtures("cpu_backend")
def test_result_does_not_depend_on_the_thread_count(dtype, amsgrad, set_threads):
    initial = make([*LARGE, 100_000, *SIZES], dtype)
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        params = clone(initial)
        optimizer = AdamW(params, amsgrad=amsgrad)
        train(optimizer, params, 3)
        results.append([*params, *(state[name] for state in optimizer.state.values() for name in state)])
    for other in results[1:]:
        assert_equal(other, results[0])


def test_order_of_parameters_does_not_matter(backend):
    params = make([300, 17, 4097, 1], device=backend.device)
    grads = [torch.randn_like(p) for p in params]
    results = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        copies = clone(params)
        optimizer = AdamW([copies[i] for i in order])
        for p, g in zip(copies, grads, strict=True):
            p.grad = g
        optimizer.step()
        results.append(copies)
    assert_equal(*results)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@dtypes
def test_a_gradient_that_is_not_finite_spoils_its_own_element_only(backend, dtype, poison, amsgrad):
    params = make([40], dtype, backend.device)
    ours, theirs = params, clone(params)
    optimizers = AdamW(ours, amsgrad=amsgrad), torch.optim.AdamW(theirs, amsgrad=amsgrad, foreach=False)
    for p, optimizer in zip((ours[0], theirs[0]), optimizers, strict=True):
        p.grad = torch.ones_like(p)
        p.grad[37] = poison
        optimizer.step()
        optimizer.step()
    assert torch.equal(ours[0].isfinite(), theirs[0].isfinite())
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    for name, state in optimizers[0].state[ours[0]].items():
        expected = optimizers[1].state[theirs[0]][name]
        assert torch.equal(state.isnan(), expected.isnan()), name


def test_tiny_and_huge_gradients(backend):
    """Squares that underflow or overflow float32 do as torch's do."""
    g = torch.tensor([0.0, 1e-45, 1e-30, 1e-20, 1e10, 1e19, 3e38], device=backend.device)
    params = [torch.ones_like(g).requires_grad_()]
    ours, theirs = params, clone(params)
    for p, optimizer in ((ours[0], AdamW(ours)), (theirs[0], torch.optim.AdamW(theirs, foreach=False))):
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [PLAIN[0], PLAIN[5], STOCHASTIC[1], SPLIT[2], MASTER[4]], ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(device, form, extras):
    rows = [random_row(form, shape, device) for shape in ((5, 3), 7)]
    columns = [[row[name] for row in rows if name in row] for name in ("p", "g", "m", "v", "largest", "step")]
    late = [[row[name] for row in rows if name in row] for name in ("master", "absmax", "absmax_sq")]
    amsgrad = extras and form.state != INT8
    columns[4] = columns[4] if amsgrad else []
    lr, scalars = None, (None, None, None, 0.0)
    if extras:
        one = torch.ones((), device=device)
        lr, scalars = one / 8, (one.view(1), torch.zeros_like(one), one * 3, 2.0)
    keys = [3, 4] if form.weights == "stochastic" else []
    arguments = (*columns, 0.1, lr, 0.9, 0.99, 0.1, 1e-8, amsgrad, False, *scalars, *late, keys)
    torch.library.opcheck(torch.ops.fusetune.adamw_step.default, arguments)


def test_lists_that_do_not_match_raise():
    rows = [random_row(SPLIT[2], 3), random_row(SPLIT[2], 4)]
    columns = [[row[name] for row in rows] for name in ("p", "g", "m", "v")]
    columns += [[], [row["step"] for row in rows]]
    for i in (1, 2, 3, 5):
        shorter = [column[:1] if i == j else column for j, column in enumerate(columns)]
        lengths = [1 if i == j else 2 for j in range(6)]
        with pytest.raises(ValueError, match=re.escape(f"adamw_step: lists must have one length, got {lengths}")):
            adamw_step(*shorter, **HYPERS)
    with pytest.raises(ValueError, match=r"adamw_step: lists must have one length, got \[2, 2, 2, 2, 0, 2\]"):
        adamw_step(*columns, **HYPERS, amsgrad=True)
    names = {"masters": "master", "absmaxs": "absmax", "absmax_sqs": "absmax_sq"}
    late = {name: [row[short] for row in rows] for name, short in names.items()} | {"keys": [1, 2]}
    for name, column in late.items():
        with pytest.raises(ValueError, match=r"adamw_step: lists must have one length, got \[2, 2, 2, 2, 2, 2, 1\]"):
            adamw_step(*columns, **HYPERS, **{name: column[:1]})


# The format of a row, what is put in it, and the error.
WRONG = {
    "parameters of another dtype": (
        PLAIN[0],
        {"p": torch.zeros(5).double()},
        "TypeError: params must be float32, bfloat16, float16, got float64",
    ),
    "sparse gradients": (
        PLAIN[0],
        {"g": torch.zeros(5).to_sparse()},
        "TypeError: grads must be dense, got torch.sparse_coo; use torch.optim.SparseAdam",
    ),
    "complex gradients": (
        PLAIN[0],
        {"g": torch.zeros(5, dtype=torch.complex64)},
        "TypeError: grads must be float32, got complex64",
    ),
    "gradients of another dtype": (
        PLAIN[3],
        {"g": torch.zeros(5)},
        "TypeError: grads must be bfloat16, got float32",
    ),
    "float16 states of bfloat16": (
        PLAIN[3],
        {"m": torch.zeros(5).half()},
        "TypeError: exp_avgs must be float32, bfloat16, got float16",
    ),
    "signed codes": (
        PLAIN[6],
        {"m": torch.zeros(5, dtype=torch.int8)},
        "TypeError: exp_avgs must be float32, bfloat16, float16, got int8",
    ),
    "states of two dtypes": (
        PLAIN[0],
        {"v": torch.zeros(5).bfloat16()},
        "TypeError: exp_avg_sqs must be float32, got bfloat16",
    ),
    "codes of one state only": (PLAIN[2], {"v": torch.zeros(5)}, "TypeError: exp_avg_sqs must be uint8, got float32"),
    "largest of another dtype": (
        PLAIN[1],
        {"largest": torch.zeros(5)},
        "TypeError: max_exp_avg_sqs must be bfloat16, got float32",
    ),
    "masters of another dtype": (
        MASTER[0],
        {"master": torch.zeros(5).half()},
        "TypeError: masters must be float32, got float16",
    ),
    "masters of float32": (
        PLAIN[0],
        {"master": torch.zeros(5)},
        "TypeError: params with masters must be bfloat16, float16, got float32",
    ),
    "halves of float16": (
        PLAIN[6],
        {"master": torch.zeros(5).short()},
        "TypeError: params with int16 masters must be bfloat16, got float16",
    ),
    **{
        f"{name} of another shape": (
            MASTER[0],
            {short: torch.zeros(4, 1).to(MASTER[0].param if short == "g" else FP32)},
            f"ValueError: {name} must have the parameter's shape [5], got [4, 1]",
        )
        for name, short in {
            "grads": "g",
            "exp_avgs": "m",
            "exp_avg_sqs": "v",
            "max_exp_avg_sqs": "largest",
            "masters": "master",
        }.items()
    },
    "absmax without codes": (
        PLAIN[0],
        {"absmax": torch.zeros(1)},
        "ValueError: absmaxs must be given with 8-bit states, and only then",
    ),
    "absmax of v without codes": (
        PLAIN[0],
        {"absmax_sq": torch.zeros(1)},
        "ValueError: absmax_sqs must be given with 8-bit states, and only then",
    ),
    "codes without absmax": (
        PLAIN[2],
        {"absmax": None},
        "ValueError: absmaxs must be given with 8-bit states, and only then",
    ),
    "codes without absmax of v": (
        PLAIN[2],
        {"absmax_sq": None},
        "ValueError: absmax_sqs must be given with 8-bit states, and only then",
    ),
    "absmax of another dtype": (
        PLAIN[2],
        {"absmax": torch.zeros(1).half()},
        "TypeError: absmaxs must be float32, got float16",
    ),
    "too many blocks": (
        PLAIN[2],
        {"absmax_sq": torch.zeros(2)},
        "ValueError: absmax_sqs must be contiguous of shape [1], got [2]",
    ),
    "a step count in float64": (
        PLAIN[0],
        {"step": torch.zeros(()).double()},
        "TypeError: state_steps must be float32, got float64",
    ),
}


@pytest.mark.parametrize(("form", "changes", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_raises_and_nothing_has_changed(form, changes, message):
    rows = [random_row(form, 5) for _ in range(2)]
    before = [copied(row) for row in rows]
    wrong = {name: x for name, x in {**rows[1], **changes}.items() if x is not None}
    # A list that only the wrong row has an entry of would have another length.
    first = rows[0] | {name: changes[name] for name in changes.keys() - rows[0].keys()}
    first = {name: x for name, x in first.items() if name in wrong}
    kind, _, text = message.partition(": ")
    error = {"TypeError": TypeError, "ValueError": ValueError}[kind]
    with pytest.raises(error, match=re.escape(f"adamw_step: {text}")):
        step_rows([first, wrong], amsgrad="largest" in wrong and form.state != INT8)
    for row, old in zip(rows, before, strict=True):
        for name, x in old.items():
            assert torch.equal(row[name], x), name


def test_codes_with_amsgrad_raise():
    row = random_row(PLAIN[2], 5)
    row["largest"] = row["v"].clone()
    with pytest.raises(NotImplementedError, match="adamw_step: amsgrad must be False with 8-bit states"):
        step_rows([row], amsgrad=True)


def test_a_learning_rate_of_another_dtype_raises():
    with pytest.raises(TypeError, match="adamw_step: lr must be float32, got float64"):
        step_rows([random_row(PLAIN[0], 5)], lr=torch.zeros((), dtype=torch.float64))


NAMES = {
    "param": "params",
    "grad": "grads",
    "exp_avg": "exp_avgs",
    "exp_avg_sq": "exp_avg_sqs",
    "largest": "max_exp_avg_sqs",
    "step": "state_steps",
    "master": "masters",
    "absmax": "absmaxs",
    "absmax_sq": "absmax_sqs",
    "lr": "lr",
}


@pytest.mark.parametrize("field", NAMES)
def test_tensors_on_another_device_raise(field):
    """Of the table: a call with a tensor on the meta device is traced, and computes nothing."""
    row = random_row(MASTER[2 if field.startswith("absmax") else 0], 5)
    row = table_row(row, lr=torch.zeros(()))
    wrong = row._replace(**{field: getattr(row, field).to("meta")})
    with pytest.raises(ValueError, match=f"adamw_step: {NAMES[field]} must be on cpu, got meta"):
        Table([row, wrong])
