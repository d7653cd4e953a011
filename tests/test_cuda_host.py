"""The harness that runs CUDA kernels on the host: it finds a planted bug of each kind, with its line, block and thread,
computes what a GPU computes, and reaches every line of the kernels that are shipped."""

import concurrent.futures
import itertools
import re

import pytest
import torch
from cuda_host import harness
from oracle import unaligned
from steps import DTYPES, OPTIONS, assert_equal, make, train

from fusetune.ops import dequantize, quantize_int8, quantize_nf4_reference
from fusetune.optim.adamw import AdamW

if reason := harness.why_not():
    pytest.skip(reason, allow_module_level=True)

ADAMW = harness.ROOT / "csrc" / "cuda" / "adamw.cu"


def run(host, name, out, threads=64):
    """Runs a kernel of planted.cu, which may touch `out` only."""
    host.allow(out.data_ptr(), out.numel() * out.element_size(), 0)
    try:
        host.planted(name, out.data_ptr(), threads)
    finally:
        host.forget_allowed()
    return out


def line_of(kernel, text):
    """Number of the first line of a kernel of planted.cu that contains `text`."""
    lines = (harness.HERE / "planted.cu").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if f" {kernel}(" in line)
    return next(i + 1 for i in range(start, len(lines)) if text in lines[i])


# kernel, a part of the line that is reported, what is said of it, the thread
BUGS = [
    ("barrier_of_some", "!= 3", "__syncthreads is reached by 63 threads, but thread (3, 0, 0) has returned", 0),
    ("barriers_of_two_branches", "another one", "__syncthreads meets another: thread (0, 0, 0) is in ", 63),
    ("shuffle_without_a_lane", "xor", "__shfl_xor_sync is reached by 31 threads, but thread (5, 0, 0) has returned", 0),
    ("shuffle_from_an_inactive_lane", "shfl", "lane 0 shuffles from inactive lane 20", 15),
    ("shuffle_outside_its_mask", "shfl", "__shfl_sync is called by lane 16, which its mask lacks", 16),
    (
        "two_shuffles_at_once",
        "2.0f",
        "__shfl_sync is reached by 16 threads, but thread (1, 0, 0) is in __shfl_sync at",
        0,
    ),
    ("misaligned_global", "out + 1", "misaligned: an access that needs a multiple of 16 bytes, 4 past one", 0),
    ("misaligned_shared", "tile + 1", "misaligned: an access that needs a multiple of 16 bytes, 4 past one", 2),
    ("index_beyond_a_shared_array", "= 1", "out of bounds: index 16", 16),
    ("row_beyond_a_shared_array", "[threadIdx.x / 8]", "out of bounds: index 4", 32),
    ("beyond_dynamic_shared", "= 1", "write of 4 bytes out of bounds: byte 256 of dynamic shared memory", 63),
    ("beyond_global", "= 1", "write of 4 bytes out of bounds: 256 bytes into a tensor of 256", 63),
    ("before_global", "= 1", "write of 4 bytes out of bounds: 4 bytes before a tensor of 256", 0),
    ("unwritten_shared", "= tile", "read of 4 bytes: nobody has written shared memory yet", 7),
    ("no_barrier_before_a_read", "= tile", "race: read of 4 bytes at shared memory, which thread (0, 0, 0) wrote", 1),
    ("no_barrier_before_a_write", "= 2", "race: write of 4 bytes at shared memory, which thread (63, 0, 0) read", 0),
    ("two_writers", "value = ", "race: write of 4 bytes at shared memory, which thread (0, 0, 0) wrote", 1),
    ("no_warp_barrier", "= tile", "race: read of 4 bytes at shared memory, which thread (0, 0, 0) wrote", 1),
    (
        "warp_barrier_between_warps",
        "= tile",
        "race: read of 4 bytes at shared memory, which thread (31, 0, 0) wrote",
        63,
    ),
    ("atomic_beside_a_write", "atomicAdd", "race: atomic of 4 bytes at shared memory, which thread (0, 0, 0) wrote", 1),
    ("write_under_a_copy", "tile[1]", "write of 4 bytes: a cp.async to shared memory was not waited for, that of", 0),
    ("local_memory_of_another", "= *where", "read of 4 bytes in the local memory of another thread", 63),
    ("division_by_zero", "size / 128", "division by zero", 0),
]


@pytest.mark.parametrize(("kernel", "line", "what", "thread"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_found(host, kernel, line, what, thread):
    expected = f"planted.cu:{line_of(kernel, line)}: {what}"
    with pytest.raises(RuntimeError) as error:
        run(host, kernel, torch.zeros(64))
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith(f"; {kernel}, block (0, 0, 0), thread ({thread}, 0, 0)")
    assert torch.equal(run(host, "twenty_barriers", torch.zeros(64)), torch.full([64], 20.0)), "the harness is spoilt"


def test_a_bug_in_a_helper_is_told_with_the_line_of_the_kernel(host):
    kernel = "unwritten_in_a_helper"
    with pytest.raises(RuntimeError) as error:
        run(host, kernel, torch.zeros(64))
    assert str(error.value).startswith(f"planted.cu:{line_of(kernel, 'return')}: read of 4 bytes: nobody has written")
    assert f"; called from planted.cu:{line_of(kernel, '= load(')}; {kernel}, block" in str(error.value)


def test_a_bug_of_the_second_block_is_told_with_its_number(host):
    with pytest.raises(RuntimeError, match=r"; written_by_another_block, block \(1, 0, 0\), thread"):
        run(host, "written_by_another_block", torch.zeros(64))


def test_memory_of_a_tensor_that_was_freed_is_out_of_bounds(host):
    """Where another tensor has taken the place of a larger one."""
    memory = torch.zeros(65)
    begin, bytes_of_64 = memory.data_ptr(), 64 * memory.element_size()
    try:
        host.allow(begin, bytes_of_64 + 4, 1)
        host.allow(begin + 8, bytes_of_64 - 4, 1)  # a view
        host.planted("beyond_global", begin, 64)
        host.allow(begin, bytes_of_64, 2)
        with pytest.raises(RuntimeError, match="256 bytes into a tensor of 256"):
            host.planted("beyond_global", begin, 64)
    finally:
        host.forget_allowed()


def test_any_thread_of_the_process_may_launch(host):
    got = torch.zeros(64)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(run, host, "ordered", got).result()
    assert torch.equal(got, run(host, "ordered", torch.zeros(64)))


def test_blocks_of_1024_threads(host):
    assert (run(host, "twenty_barriers", torch.zeros(1024), 1024) == 20).all()


def test_lanes_that_the_block_lacks(host):
    with pytest.raises(
        RuntimeError, match=r"reached by 16 threads, but its mask names lanes that the block does not have"
    ):
        run(host, "shuffle_of_half_a_warp", torch.zeros(64), 48)


def test_every_planted_kernel_is_tested():
    kernels = re.findall(r"^    KERNEL\((\w+)\),$", (harness.HERE / "planted.cu").read_text(), re.M)
    text = (harness.ROOT / "tests" / "test_cuda_host.py").read_text()
    assert not [kernel for kernel in kernels if f'"{kernel}"' not in text]


def test_shuffles_and_votes(host):
    t = torch.arange(64)
    lane, warp = t % 32, t // 32 * 32
    got = run(host, "shuffles_and_votes", torch.zeros(10, 64))
    sources = [
        warp + 3,
        warp + lane // 8 * 8 + (lane + 1) % 8,
        torch.where(lane >= 2, t - 2, t),
        torch.where(lane % 16 >= 3, t - 3, t),
        torch.where(lane < 27, t + 5, t),
        t ^ 17,
    ]
    for row, source in zip(got, sources, strict=False):
        assert torch.equal(row, 100.0 * source)
    assert (got[6] == sum(1 << i for i in range(0, 32, 3)) >> 1).all()
    assert torch.equal(got[7], (t >= 32).float())
    assert torch.equal(got[8], (t < 32).float())
    assert torch.equal(got[9], 100.0 * (warp + torch.where(lane < 12, 11, 12)))


def test_atomics(host):
    got = run(host, "atomics", torch.zeros(7))
    assert got.tolist() == [2016, 63, -63, 31, 0, 7 + 128, 7 + 128 + 1]


def test_least_and_largest_are_not_nan(host):
    values = torch.tensor([1.0, -2.0, torch.inf, -torch.inf, torch.nan])
    a, b = torch.cartesian_prod(values, values).T
    got = run(host, "least_and_largest", torch.stack([a, b, a, b]), 25)
    expected = [torch.fmin(a, b), torch.fmin(a, b), torch.fmax(a, b), torch.fmax(a, b)]
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=0, equal_nan=True)


def test_indices_of_three_dimensions(host):
    assert torch.equal(run(host, "indices", torch.zeros(12 * 24)), torch.arange(12 * 24.0))


def test_barriers_order_shared_memory(host):
    t = torch.arange(64)
    expected = 1000.0 * ((t ^ 1) + 2) + (63 - t) + 2
    assert torch.equal(run(host, "ordered", torch.zeros(64)), expected)
    with harness.reversed_order(host):
        assert torch.equal(run(host, "ordered", torch.zeros(64)), expected)


def test_roundings_are_those_of_torch(host):
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = torch.cat(
        [halves, torch.nextafter(halves, torch.tensor(0.0)), torch.nextafter(halves, torch.tensor(1e9))]
    )
    ties = (halves[:-1] + halves[1:]) / 2
    every = torch.cat([between, ties, torch.randn(20000) * 10 ** (torch.rand(20000) * 90 - 50)])
    every = torch.cat([every, torch.tensor([65519.99, 65520.0, -65520.0, 3.4e38, float("inf"), float("nan")])])
    for numbers in every.split(128 * 64):
        numbers = torch.nn.functional.pad(numbers, (0, 128 * 64 - len(numbers)))
        got = run(host, "roundings", torch.stack([numbers, numbers]))
        expected = torch.stack([numbers.bfloat16().float(), numbers.half().float()])
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got[~got.isnan()], expected[~got.isnan()])
        assert torch.equal(got.signbit()[~got.isnan()], expected.signbit()[~got.isnan()])


def planted_source(folder, body):
    source = folder / "kernel.cu"
    source.write_text(f"#include <cuda_runtime.h>\n__global__ void kernel(float* p) {{\n  {body}\n}}\n")
    return source


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("__sync_nothing(10);", "__sync_nothing"),  # names that CUDA lacks too: nobody will add them
        ("p[0] = __reduce_nothing_sync(~0u, 1);", "__reduce_nothing_sync"),
        ("nothing4 x = {1, 2, 3, 4};", "nothing4"),
    ],
)
def test_a_primitive_that_the_harness_lacks_is_named(tmp_path, body, name):
    message = rf"kernel\.cu:3 uses {name}, which the harness lacks; add it to tests/cuda_host/include/, with a test"
    with pytest.raises(RuntimeError, match=message) as error:
        harness.compile_object(planted_source(tmp_path, body), tmp_path / "kernel.o")
    assert "\n" not in str(error.value)


def test_inline_ptx_is_sent_to_its_place(tmp_path):
    with pytest.raises(RuntimeError, match=r"kernel\.cu:3 has inline PTX; put it behind a name in csrc/cuda/mma\.cuh"):
        harness.compile_object(planted_source(tmp_path, 'asm volatile("bar.sync 1, 64;");'), tmp_path / "kernel.o")


def test_what_does_not_compile_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"kernel\.cu does not compile for the host\n(.|\n)*invalid conversion"):
        harness.compile_object(planted_source(tmp_path, 'int i = "p";'), tmp_path / "kernel.o")


def test_an_atomic_that_cuda_lacks_does_not_compile(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA has no atomicMax of this type"):
        harness.compile_object(planted_source(tmp_path, "atomicMax(p, 1.0f);"), tmp_path / "kernel.o")


def test_a_compiler_that_is_set_to_check_longjmp(tmp_path, monkeypatch):
    """As Ubuntu's is: longjmp to the stack of a fiber would end the process."""
    fortified = tmp_path / "g++-fortified"
    fortified.write_text(f'#!/bin/sh\nexec {harness.compiler()} -D_FORTIFY_SOURCE=2 "$@"\n')
    fortified.chmod(0o755)
    monkeypatch.setenv("CXX", str(fortified))
    harness.compile_object(harness.HERE / "scheduler.cpp", tmp_path / "scheduler.o")
    assert b"longjmp_chk" not in (tmp_path / "scheduler.o").read_bytes()


# What is broken in csrc/cuda/adamw.cu, and what is said of it.
BREAKAGES = {
    "a barrier less": (
        "    __syncthreads();\n\n    const int64_t chunks",
        "    const int64_t chunks",
        "nobody has written shared memory",
    ),
    "a tail too long": (
        "return offset(k) < count;",
        "return offset(k) <= count;",
        "bytes (into|before) a tensor of",
    ),
    "runs at any address": (" && addresses % 16 == 0", "", "misaligned: an access that needs"),
    "a chunk too far": (
        "const int64_t end = min(column(kNumel), begin + kChunk);",
        "const int64_t end = begin + kChunk;",
        "bytes (into|before) a tensor of",
    ),
    "a warp's barrier less": (
        "  __syncwarp();\n  const uint16_t* const pieces",
        "  const uint16_t* const pieces",
        "nobody has written shared memory",
    ),
    "pieces overwritten": ("  __syncwarp();\n  exchange[lane]", "  exchange[lane]", "race: write of 16 bytes"),
    "a shuffle of some": (
        "    largest = max(largest, __shfl_xor_sync(",
        "    if (span.count > 0) largest = max(largest, __shfl_xor_sync(",
        "__shfl_xor_sync is reached by",
    ),
    "codes not waited for": ("sizeof codes / 4; i", "sizeof codes / 8; i", "nobody has written shared memory"),
}


@pytest.mark.parametrize(("text", "instead", "what"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_broken_kernel_is_noticed_with_its_line(host, tmp_path, text, instead, what):
    source = ADAMW.read_text()
    assert source.count(text) == 1
    broken = tmp_path / "adamw.cu"
    broken.write_text(source.replace(text, instead).replace('#include "', f'#include "{ADAMW.parent}/'))
    harness.compile_object(broken, tmp_path / "adamw.o")
    objects = harness.objects() | {"adamw.cu": tmp_path / "adamw.o"}
    harness.link(list(objects.values()), tmp_path / "broken.so")
    params = [unaligned(p).detach().requires_grad_() for p in make([17, 4097, 16385, *range(1, 9)])]
    halves = make([300], torch.bfloat16)
    groups = [
        {"params": params[:6]},
        {"params": params[6:], "lr": 0.1},
        {"params": halves, "stochastic_rounding": True},
        {"params": make([4100]), "state_dtype": "int8"},
    ]
    everything = [p for group in groups for p in group["params"]]
    with pytest.MonkeyPatch.context() as patch, harness.cuda_on_host(patch, harness.load(tmp_path / "broken.so")):
        patch.setenv("FUSETUNE_BACKEND", "cuda")
        with pytest.raises(
            RuntimeError,
            match=rf"^adamw\.cu:\d+: .*{what}.*; update_tensors, block \(\d, 0, 0\), thread \(\d+, 0, 0\)$",
        ):
            train(AdamW(groups), everything, 2)


def adamw_states(dtype, device="cpu", **options):
    """Parameters and states after three steps, from the same start each time."""
    torch.manual_seed(0)
    params = make([1, 15, 257, 4097, 16385, (3, 5, 7)], dtype, device)
    optimizer = AdamW(params, **options)
    train(optimizer, params, 3)
    return [*params, *(t for state in optimizer.state.values() for t in state.values())]


def lora_results(x_dtype, dtype, device="cpu"):
    """What the LoRA kernels alone compute, of two projections: w is 0."""
    torch.manual_seed(0)
    M, K, N, R = 300, 140, 150, 20
    x, *dys = (torch.randn(M, size).to(device, x_dtype) for size in (K, N, N))
    a, b = ([torch.randn(shape).to(device, dtype) for _ in range(2)] for shape in ((R, K), (N, R)))
    w, bias = [torch.zeros(N, K, dtype=x_dtype, device=device), None, None] * 2, [torch.randn(N).to(device), None]
    options = [N, 0, N, 0], [1, 1], [0.5, 2.0], [0.1, 0.1], torch.tensor([12345, 67], device=device), False
    ys, s = torch.ops.fusetune.lora_forward(x, w, bias, a, b, *options)
    needs = True, [True, True], [True, True]
    dx, da, db = torch.ops.fusetune.lora_backward(x, dys, w, a, b, s, *options, *needs)
    return [*ys, s, dx, *da, *db]


def dequantized(dtype, quantize, device="cpu"):
    torch.manual_seed(0)
    q = quantize(torch.randn(70, 530))
    q = q._replace(**{name: t.to(device) for name, t in q._asdict().items() if isinstance(t, torch.Tensor)})
    return [dequantize(q, dtype)]


CALLS = {
    "AdamW, float32": lambda device: adamw_states(torch.float32, device, amsgrad=True),
    "AdamW, bfloat16": lambda device: adamw_states(torch.bfloat16, device, maximize=True),
    "AdamW, 8 bits": lambda device: adamw_states(torch.bfloat16, device, state_dtype="int8", stochastic_rounding=True),
    "AdamW, split and clipped": lambda device: adamw_states(
        torch.bfloat16, device, master_weights="split16", max_grad_norm=1.0
    ),
    "LoRA, float32": lambda device: lora_results(torch.float32, torch.float32, device),
    "LoRA, bfloat16 with a float32 adapter": lambda device: lora_results(torch.bfloat16, torch.float32, device),
    "NF4, bfloat16": lambda device: dequantized(torch.bfloat16, quantize_nf4_reference, device),
    "int8, float16": lambda device: dequantized(torch.float16, quantize_int8, device),
    "LoRA, float16": lambda device: lora_results(torch.float16, torch.float16, device),
}


@pytest.fixture
def cuda_backend(monkeypatch):
    monkeypatch.setenv("FUSETUNE_BACKEND", "cuda")


WEIGHTS = [
    *((dtype, {}) for dtype in DTYPES),
    (torch.bfloat16, {"stochastic_rounding": True}),
    (torch.bfloat16, {"master_weights": "split16"}),
    *((dtype, {"master_weights": "fp32"}) for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *itertools.product(DTYPES, OPTIONS.values()),
        *((dtype, form | {"state_dtype": "int8"}) for dtype, form in WEIGHTS),
        *(
            (dtype, form | {"state_dtype": state_dtype, "amsgrad": amsgrad})
            for dtype, form in WEIGHTS
            for state_dtype in ("float32", "bfloat16")
            for amsgrad in (False, True)
        ),
    ],
    ids=str,
)
def test_adamw_has_the_bits_of_the_cpu_kernel(host, dtype, options, cuda_backend):
    with pytest.MonkeyPatch.context() as patch, harness.cuda_on_host(patch, host):
        ours = adamw_states(dtype, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSETUNE_BACKEND", "cpu")
        assert_equal(ours, adamw_states(dtype, **options))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_do_not_depend_on_the_order_of_threads(host, call, cuda_on_host, cuda_backend):
    forwards = call("cpu")
    with harness.reversed_order(host):
        assert_equal(call("cpu"), forwards, "result")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CALLS if "LoRA" not in name])
def test_device_has_the_bits_of_the_host(host, name, cuda_backend):
    """But for LoRA's, from tensor cores, whose sums round in their own way."""
    with pytest.MonkeyPatch.context() as patch, harness.cuda_on_host(patch, host):
        expected = CALLS[name]("cpu")
    assert_equal([t.cpu() for t in CALLS[name]("cuda")], expected, "result")


def test_every_line_of_the_kernels_is_executed():
    counts = harness.lines_executed()
    assert {f"csrc/cuda/{path.name}" for path in harness.shipped()} <= counts.keys()
    missed = {file: [line for line, count in lines.items() if not count] for file, lines in counts.items()}
    assert not [f"{file}:{line}" for file, lines in missed.items() for line in lines]
