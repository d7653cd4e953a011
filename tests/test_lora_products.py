"""The products of which GPUs make LoRA linear, each alone: in Triton's interpreter, by CUDA's kernels on the host, and
on a GPU."""

import pytest
import torch
from oracle import assert_right

from fusetune.ops import _lora_gpu, lora_linear_group, lora_linear_group_reference
from fusetune.ops.lora import Adapter, Projection
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale

OP = "lora"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TYPES = [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]  # of x, and of the product
SHAPES = [  # M, C, R
    (1, 1, 1),
    (19, 40, 8),
    (65, 129, 17),
    pytest.param((70, 257, 131), marks=pytest.mark.large),
    (0, 5, 3),
    (5, 0, 3),
    (5, 3, 0),
]


def ids(value):
    return "x".join(str(size).removeprefix("torch.") for size in value) if isinstance(value, tuple) else None


@pytest.fixture
def products(gpu_backend):
    return _lora_gpu.primitives(gpu_backend.name)


def columns(t, offset=3):
    """t as columns of a wider matrix, whose rows are no multiple of 16 bytes, and whose other columns are 7."""
    wide = torch.full((len(t), t.shape[1] + offset + 4), 7.0, dtype=t.dtype, device=t.device)
    view = wide[:, offset : offset + t.shape[1]]
    view.copy_(t)
    return view


def assert_rest_untouched(view):
    wide = view._base.clone()
    wide.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(7)
    assert (wide == 7).all()


STRIDES = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "neither": lambda t: t.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
    "columns": columns,
}


def masks(seeds, M, C, p, R):
    """[R, M, C]: the mask of each rank, scaled."""
    found = [keep_mask(seed, torch.arange(M), C, p) * kept_scale(p) for seed in seeds.tolist()]
    return torch.stack(found).double().repeat_interleave(R // len(seeds), 0)


def dropout(count, device):
    return {0: (0.0, None), 1: (0.25, draw_seed(device, 3)[1:2]), 3: (0.25, draw_seed(device, 4)[1:])}[count]


@pytest.mark.parametrize("strides", ["transposed", "neither"])
@pytest.mark.parametrize("types", TYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_down(products, gpu_backend, shape, types, strides):
    (M, C, R), (dtype, dot) = shape, types
    t, w = torch.randn(M, C, dtype=dtype), torch.randn(R, C, dtype=dot)
    out = columns(torch.zeros(M, R).to(gpu_backend.device))
    products.down(columns(t.to(gpu_backend.device)), STRIDES[strides](w.to(gpu_backend.device)), out, -0.5, 0.0, None)
    assert_rest_untouched(out)
    exact = -0.5 * t.double() @ w.double().t()
    assert_right("down", out.cpu(), (-0.5 * t.to(dot) @ w.t()).float(), exact)


@pytest.mark.parametrize(("bias", "accumulate"), [("none", True), ("own", False), ("float32", True)])
@pytest.mark.parametrize("types", TYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_up(products, gpu_backend, shape, types, bias, accumulate):
    (M, C, R), (dtype, dot) = shape, types
    device = gpu_backend.device
    t, w, before = torch.randn(M, R), torch.randn(R, C, dtype=dot), torch.randn(M, C, dtype=dtype)
    added = {"none": None, "own": torch.randn(C, dtype=dtype), "float32": torch.randn(C)}[bias]
    out = columns(before.to(device))
    strides = STRIDES["transposed" if accumulate else "contiguous"]
    products.up(
        *(columns(t.to(device), 5), strides(w.to(device)), None if added is None else added.to(device), out),
        *(0.5, 0.0, None, accumulate),
    )
    assert_rest_untouched(out)

    def judge(t, w, start, added):
        return 0.5 * t.to(w.dtype) @ w + start * accumulate + (0 if added is None else added)

    exact = judge(*(x if x is None else x.double() for x in (t, w, before, added)))
    assert_right("up", out.cpu(), judge(t, w, before, added).to(dtype), exact)


@pytest.mark.parametrize(("strides", "out_dtype"), [("transposed", "own"), ("neither", "own"), ("columns", "float32")])
@pytest.mark.parametrize("types", TYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_outer(products, gpu_backend, shape, types, strides, out_dtype):
    (M, C, R), (dtype, dot) = shape, types
    device = gpu_backend.device
    t, u = torch.randn(M, R), torch.randn(M, C, dtype=dtype)
    out = STRIDES[strides](torch.zeros(R, C, dtype=dtype if out_dtype == "own" else FP32, device=device))
    products.outer(columns(t.to(device)), columns(u.to(device)), out, 0.5, 0.0, None, dot)
    if strides == "columns":
        assert_rest_untouched(out)
    exact = 0.5 * t.double().t() @ u.double()
    assert_right("outer", out.cpu(), (0.5 * t.to(dot).t() @ u.to(dot)).to(out.dtype), exact)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "neither"])
def test_outer_over_parts_of_the_rows(products, gpu_backend, strides):
    t, u = torch.randn(700, 6, device=gpu_backend.device), torch.randn(700, 20, device=gpu_backend.device)
    out, again = (STRIDES[strides](torch.zeros(6, 20, device=gpu_backend.device)) for _ in range(2))
    products.outer(t, u, out, 1.0, 0.0, None, FP32)
    products.outer(t, u, again, 1.0, 0.0, None, FP32)
    assert torch.equal(out, again)
    assert_right("outer", out, t.t() @ u, t.double().t() @ u.double())


@pytest.mark.parametrize("types", [(FP32, FP32), (FP16, FP16), (BF16, FP32)], ids=ids)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("R", [3, 21, pytest.param(201, marks=pytest.mark.large)])
def test_masks(products, gpu_backend, count, R, types):
    """One for all, or for each third of the ranks its own; seeds are a part of a tensor of them."""
    dtype, dot = types
    M, C, device = 37, 150, gpu_backend.device
    p, seed = dropout(count, device)
    kept = masks(seed, M, C, p, R)
    x, t = torch.randn(M, C, dtype=dtype), torch.randn(M, R)
    w, before = torch.randn(R, C, dtype=dot), torch.randn(M, C, dtype=dtype)
    down, up, outer = (
        torch.zeros(M, R, device=device),
        before.clone().to(device),
        torch.zeros(R, C, dtype=dtype, device=device),
    )
    products.down(x.to(device), w.to(device), down, 0.5, p, seed)
    products.up(columns(t.to(device)), w.to(device), None, up, 0.5, p, seed, True)
    products.outer(columns(t.to(device)), x.to(device), outer, 0.5, p, seed, dot)

    def judge(x, w, t, before):
        low = t.to(w.dtype)
        down = torch.einsum("mc,rmc,rc->mr", x.to(w.dtype), kept.to(w.dtype), w)
        up = before + torch.einsum("mr,rmc,rc->mc", low, kept.to(w.dtype), w) / 2
        outer = torch.einsum("mr,mc,rmc->rc", low, x.to(w.dtype), kept.to(w.dtype))
        return down / 2, up, outer / 2

    plain, exact = judge(x, w, t, before), judge(*(x.double() for x in (x, w, t, before)))
    for name, got, yardstick, truth in zip(("down", "up", "outer"), (down, up, outer), plain, exact, strict=True):
        assert_right(name, got.cpu(), yardstick.to(got.dtype), truth)


def test_a_seed_is_not_read_without_dropout(products, gpu_backend):
    """And a probability that rounds to none is none."""
    t, w, out = (torch.ones(size, device=gpu_backend.device) for size in ((4, 8), (2, 8), (4, 2)))
    products.down(t, w, out, 1.0, 1e-6, torch.zeros(2, dtype=torch.int64, device=gpu_backend.device))
    assert (out == 8).all()


# --- The product with the frozen weight in one kernel -----------------------------------------------------------------


@pytest.fixture
def triton_products(products, gpu_backend):
    if gpu_backend.name != "triton":
        pytest.skip("Triton's alone")
    return products


@pytest.mark.parametrize("dot", [FP16, FP32], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (130, 129, 70, 5), (65, 200, 33, 70), (9, 7, 0, 3), (9, 7, 5, 0), (0, 7, 5, 3)], ids=ids
)
def test_linear(triton_products, gpu_backend, shape, p, dot):
    M, C, K, R = shape
    device = gpu_backend.device
    x, v, t, w = torch.randn(M, K).half(), torch.randn(C, K).half(), torch.randn(M, R), torch.randn(R, C, dtype=dot)
    bias = torch.randn(C) if p else None
    seed = draw_seed(device) if p else None
    kept = masks(seed, M, C, p, 1)[0] if p else torch.ones(M, C, dtype=torch.float64)
    for i, tile in enumerate(triton_products.linear_tiles(device)):
        out = columns(torch.zeros(M, C, dtype=FP16, device=device))
        weight = STRIDES["transposed" if i else "contiguous"](v.to(device))
        triton_products.linear(
            *(columns(x.to(device)), weight, columns(t.to(device)), w.to(device)),
            *(None if bias is None else bias.to(device), out, 0.5, p, seed, tile),
        )
        assert_rest_untouched(out)

        def judge(x, v, t, w, bias):
            low = 0.5 * (t.to(w.dtype) @ w) * kept.to(w.dtype)
            return x @ v.t() + low + (0 if bias is None else bias)

        exact = judge(*(s if s is None else s.double() for s in (x, v, t, w, bias)))
        assert_right("linear", out.cpu(), judge(x, v, t, w, bias).to(FP16), exact)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_both_ways_are_offered_and_either_is_right(triton_products, gpu_backend, monkeypatch, p):
    """Forward and backward by each way."""
    device = gpu_backend.device
    x = torch.randn(40, 37, device=device).half().requires_grad_()
    tensors = [torch.randn(size, device=device) / 6 for size in ((29, 37), (4, 37), (29, 4))]
    w, a, b = tensors[0].half(), *(t.requires_grad_() for t in tensors[1:])
    asked = []

    def run(way):
        def fastest(op, case, where, ways):
            asked.append((op, *case))
            return next(name for name in reversed(ways) if way in name)

        monkeypatch.setattr(_lora_gpu, "fastest", fastest)
        torch.manual_seed(7)
        group = [Projection(w, None, [Adapter(a, b, 0.5, p)])]
        return torch.autograd.grad(torch.cat(lora_linear_group(x, group), 1).square().sum(), (x, a, b))

    torch.manual_seed(7)
    seeds = draw_seed(device).tolist()
    doubles = [t.detach().double().requires_grad_() for t in (x, a, b)]
    group = [Projection(w.double(), None, [Adapter(*doubles[1:], 0.5, p)])]
    out = torch.cat(lora_linear_group_reference(doubles[0], group, seeds=seeds), 1)
    exact = torch.autograd.grad(out.square().sum(), doubles)
    plain = run("addmm and up")
    for name, *results in zip(("dx", "da", "db"), run("linear"), plain, exact, strict=True):
        assert_right(name, *results)
    assert len(asked) == 4  # y and dx, each way
    rows, types = 64, (FP16, FP32)
    assert asked[0] == ("lora_linear", *types, rows, 29, 37, "", 4, False)
    assert asked[1] == ("lora_linear", *types, rows, 37, 29, "transposed", 4, p > 0)


def test_rows_are_measured_by_powers_of_two(triton_products, gpu_backend, monkeypatch):
    cases = []
    monkeypatch.setattr(_lora_gpu, "fastest", lambda op, case, where, ways: cases.append(case) or next(iter(ways)))
    w, a, b = (torch.randn(size, device=gpu_backend.device) for size in ((5, 6), (2, 6), (5, 2)))
    for M in (1, 2, 3, 4, 5, 8, 9):
        x = torch.randn(M, 6, device=gpu_backend.device).half()
        lora_linear_group(x, [Projection(w.half(), None, [Adapter(a, b, 0.5)])])
    assert [case[2] for case in cases] == [1, 2, 4, 4, 8, 8, 16]


@pytest.mark.parametrize("change", ["float32", "two adapters", "two masks", "group", "empty"])
def test_one_kernel_is_offered_where_it_can_serve(triton_products, gpu_backend, monkeypatch, change):
    """A group's dx takes `up` for all its masks at once."""
    cases = []
    monkeypatch.setattr(_lora_gpu, "fastest", lambda op, case, where, ways: cases.append(case) or next(iter(ways)))
    w, a, b = (torch.randn(size, device=gpu_backend.device) for size in ((5, 6), (2, 6), (5, 2)))
    x = torch.randn(0 if change == "empty" else 3, 6, device=gpu_backend.device)
    adapter = Adapter(a.requires_grad_(), b, 0.5, 0.1 if change == "two masks" else 0.0)
    if change != "float32":
        x, w = x.half(), w.half()
    group = [Projection(w, None, [adapter, adapter] if change.startswith("two") else [adapter])]
    if change == "group":
        group *= 2
    ys = lora_linear_group(x.requires_grad_(), group)
    forward = len(cases)
    sum(y.sum() for y in ys).backward()
    expected = {"group": (2, 2), "two masks": (1, 1), "two adapters": (1, 2)}
    assert (forward, len(cases)) == expected.get(change, (0, 0))
