"""Flash attention on Hopper's own instructions, in the emulation of cuda_host/sm90: against the reference, whatever the
order in which threads run; the calls that it does not take; and that the emulation notices what is broken."""

import concurrent.futures
import re

import cuda_compile
import pytest
import torch
from cuda_host import harness, harness_sm90
from oracle import assert_right

from fusetune.ops import _flash_attention_backends as backends
from fusetune.ops import flash_attention_reference
from fusetune.ops.flash_attention import Arguments

if reason := harness.why_not():
    pytest.skip(reason, allow_module_level=True)

BF16, FP16 = torch.bfloat16, torch.float16
SOURCE = harness.ROOT / "csrc" / "cuda" / "flash_attention_sm90.cu"
NOTHING = Arguments(None, None, None, None, None, None, None, 0.125, 0.0, -1, -1, False, 0.0, None)


@pytest.fixture(scope="module")
def host():
    return harness_sm90.load()


def make(shape, dtype, layout="bhsd"):
    """q, k, v. shape: B, H, Hkv, Sq, Sk, D."""
    B, H, Hkv, Sq, Sk, D = shape
    if layout == "packed":
        qkv = torch.randn(B, Sq, 3, H, D).to(dtype)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k, v = (torch.randn(B, heads, S, D).to(dtype) for heads, S in ((H, Sq), (Hkv, Sk), (Hkv, Sk)))
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    return q, k, v


def run(host, q, k, v, do, dlse, arguments):
    """o, lse, dq, dk and dv, NaN where the kernels have not written."""
    o, dq, dk, dv = (torch.full_like(t, torch.nan) for t in (q, q, k, v))
    lse = torch.full(q.shape[:3], torch.nan)
    assert backends.refuses("cuda_sm90", q, k, v, arguments) is None
    extra = [torch.empty(0)] * 3
    with pytest.MonkeyPatch.context() as patch, harness.cuda_on_host(patch, host):
        backends.forward("cuda_sm90", q, k, v, arguments, o, lse)
        backends.backward("cuda_sm90", do, dlse, q, k, v, arguments, o, lse, [dq, dk, dv, *extra])
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def reference(q, k, v, do, dlse, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o, lse = flash_attention_reference(*leaves, **options, return_lse=True)
    seen = lse != -torch.inf
    gradients = torch.autograd.grad([o, lse[seen]], leaves, [do.to(o.dtype), dlse[seen].to(lse.dtype)])
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def assert_equal(results, others):
    for name, t in results.items():
        assert torch.equal(t, others[name]), name


def check(host, q, k, v, causal=False, align="bottom_right", scale=0.125):
    """All results against the reference; gives them."""
    arguments = NOTHING._replace(scale=scale, right=0 if causal else -1, top_left=align == "top_left")
    do, dlse = torch.randn(q.shape).to(q), torch.randn(q.shape[:3])
    do = torch.empty_like(q).copy_(do)
    got = run(host, q, k, v, do, dlse, arguments)
    options = {"causal": causal, "align": align, "scale": scale}
    plain = reference(q, k, v, do, dlse, **options)
    exact = reference(q.double(), k.double(), v.double(), do, dlse, **options)
    torch.testing.assert_close(got["lse"], exact["lse"].float(), rtol=2e-6, atol=2e-5)
    for name in ("o", "dq", "dk", "dv"):
        assert_right(name, got[name], plain[name], exact[name])
    return got


SHAPES = [
    ((1, 1, 1, 1, 1, 64), False),
    ((2, 2, 1, 65, 129, 64), False),
    ((1, 2, 1, 130, 400, 128), False),
    ((1, 2, 2, 128, 128, 128), True),
    ((1, 2, 1, 257, 255, 64), True),
    ((2, 2, 1, 100, 257, 128), True),
    ((1, 1, 1, 300, 120, 64), True),
]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("shape", "causal"), SHAPES, ids=str)
def test_results(host, shape, causal, dtype):
    check(host, *make(shape, dtype), causal)


@pytest.mark.parametrize("shape", [(1, 2, 1, 200, 300, 64), (1, 1, 1, 300, 120, 128)], ids=str)
def test_top_left(host, shape):
    check(host, *make(shape, BF16), causal=True, align="top_left")


@pytest.mark.parametrize("layout", ["bshd", "packed"])
def test_layouts(host, layout):
    check(host, *make((2, 2, 2, 190, 190, 64), BF16, layout), causal=True)


def test_a_query_that_sees_no_key(host):
    """A whole tile of them, and some of a tile."""
    got = check(host, *make((1, 1, 1, 300, 150, 64), BF16), causal=True)
    assert (got["o"][:, :, :150] == 0).all()
    assert (got["dq"][:, :, :150] == 0).all()
    assert (got["lse"][:, :, :150] == -torch.inf).all()


@pytest.mark.parametrize("scale", [1e-3, 4.0])
def test_scale(host, scale):
    """With 4 most weights are 0 or 1."""
    check(host, *make((1, 1, 1, 64, 256, 64), FP16), scale=scale)


def test_logits_far_below_zero(host):
    q, k, v = make((1, 1, 1, 64, 200, 64), BF16)
    check(host, q.abs() * 8, -k.abs() * 8, v)


def test_results_do_not_depend_on_the_order_of_threads(host):
    q, k, v = make((1, 2, 1, 200, 400, 64), BF16)
    do, dlse, causal = torch.randn_like(q), torch.randn(q.shape[:3]), NOTHING._replace(right=0)
    expected = run(host, q, k, v, do, dlse, causal)
    with harness.reversed_order(host):
        assert_equal(run(host, q, k, v, do, dlse, causal), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "q must be bfloat16 or float16, got float32"),
        ({"D": 96}, "D and Dv must be equal, 64 or 128, got 96, 96"),
        ({"Sq": 0}, "sizes must be from 1"),
        ({"mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, "mask must be None"),
        ({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"),
        ({"left": 7}, r"window must be none or causal, got \(7, -1\)"),
        ({"scale": -1.0}, "scale must be positive, got -1.0"),
    ],
    ids=str,
)
def test_calls_that_it_does_not_take(change, message):
    fields = {name: change[name] for name in change if name in Arguments._fields}
    q, k, v = make((1, 2, 2, change.get("Sq", 10), 10, change.get("D", 64)), change.get("dtype", BF16))
    assert re.match(message, backends.refuses("cuda_sm90", q, k, v, NOTHING._replace(**fields)))


START = "  const Block block(problem, problem.H);"
TURN, KEYS = "      take_turn();\n", "      barrier_wait(&shared.k_full[stage], parity_of(n));\n"
WAIT, RELEASE = "      products_wait<0>();\n      hold(o);\n", "      thread.release(&shared.v_empty[before]);\n"
FIRST_TURN = "if (w == 1) named_barrier_arrive(kTurn, kConsumerThreads);"
STORE = "  fence_async();\n  thread.sync_warpgroup();\n"
SUMMED, NEXT = "    products_wait<0>();\n    hold(da);\n", "    thread.release(&shared.empty[stage]);\n"
# What is changed, and what is said of it; None where the emulation sees nothing, and the result is wrong.
BREAKAGES = {
    "keys not waited for": (KEYS, "", "was not told that the copy is there"),
    "values released too soon": (WAIT + RELEASE, RELEASE + WAIT, "race: copy to"),
    "no first turn": (FIRST_TURN, "", "waits for ever"),
    "no fence of products": (f"{TURN}      products_fence();", TURN, "a product with no products_fence since"),
    "p while it is read": (WAIT, f"      pack<T>(p, s);\n{WAIT}", None),
    "o with no fence": (STORE, "  thread.sync_warpgroup();\n", "wrote with no fence_async since"),
    "o with no barrier": (STORE, "  fence_async();\n", "wrote with no (barrier between|fence_async since)"),
    "barriers with no fence": (
        f"    fence_async();\n  }}\n  __syncthreads();\n{START}",
        f"  }}\n  __syncthreads();\n{START}",
        "the barrier was made with no fence_async since",
    ),
    "tiles released too soon": (SUMMED, NEXT + SUMMED, "race: copy to|more threads arrive"),
    "smaller sections": ("24 << 20", "1", None),
}


def broken(name):
    """The module with that change in the kernels, which are compiled for bfloat16 and D = 64 alone."""
    old, new, _ = BREAKAGES[name]
    texts = {path.name: path.read_text() for path in (SOURCE, SOURCE.with_suffix(".cuh"))}
    assert sum(text.count(old) for text in texts.values()) == 1, old
    texts = {file: text.replace(old, new) for file, text in texts.items()}
    texts[SOURCE.name] = re.sub(
        r"\n  if \(call\.dtype == kBFloat16\)\n    \(.*? (\w+<__nv_bfloat16, 64>) : .*?\)(\(.*\);)\n  else\n.*",
        r"\n  \1\2",
        texts[SOURCE.name],
    )
    assert "__half, 64" not in texts[SOURCE.name]
    folder = harness_sm90.CACHE / f"broken-{name.replace(' ', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        path = SOURCE.parent.as_posix()
        (folder / file).write_text(re.sub(r'#include "(?!flash_attention_sm90)(?=.*")', f'#include "{path}/', text))
    harness.compile_object(folder / SOURCE.name, folder / "kernel.o", *harness_sm90.OPTIONS, "-O1")
    objects = harness_sm90.objects() | {SOURCE.name: folder / "kernel.o"}
    harness.link(list(objects.values()), folder / "module.so")
    return harness_sm90.load(folder / "module.so")


@pytest.fixture(scope="module")
def breakages(host):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(BREAKAGES, pool.map(broken, BREAKAGES), strict=True))


@pytest.mark.parametrize("name", [name for name in BREAKAGES if name != "smaller sections"])
def test_a_broken_kernel_is_noticed(breakages, name):
    """By the emulation, with the kernel's line, in one of the orders of threads; or by the result."""
    q, k, v = make((1, 1, 1, 128, 640, 64), BF16)
    message = BREAKAGES[name][2]
    expected = (
        pytest.raises(
            RuntimeError, match=rf"^flash_attention_sm90\.cuh?:\d+: .*({message}).*; (forward|backward)_sm90<"
        )
        if message
        else pytest.raises(AssertionError)
    )
    with expected:
        check(breakages[name], q, k, v, causal=True)
        with harness.reversed_order(breakages[name]):
            check(breakages[name], q, k, v, causal=True)


def test_sections_of_heads(host, breakages):
    """Several of 24 MiB of k and v would take long: what they change is the order of blocks."""
    q, k, v = make((3, 4, 2, 200, 130, 64), BF16)
    do, dlse = torch.randn_like(q), torch.randn(q.shape[:3])
    expected = run(host, q, k, v, do, dlse, NOTHING)
    assert_equal(run(breakages["smaller sections"], q, k, v, do, dlse, NOTHING), expected)


@pytest.mark.skipif(not cuda_compile.nvcc(), reason="no nvcc 12 or later on PATH or in CUDACXX")
def test_products_that_the_assembler_serialises_are_an_error(tmp_path):
    source = tmp_path / "planted_sm90.cu"
    source.write_text(f"""#include "{SOURCE.parent}/wgmma.cuh"
        using namespace fusetune::cuda;
        __global__ void __launch_bounds__(128) kernel(float* out, uint64_t a, uint64_t b) {{
          float d[32];
          multiply_abt<__half, 64>(d, a, b, false);
          for (int i = 0; i < 32; i++) out[threadIdx.x * 32 + i] = d[i];
          products_wait<0>();
        }}""")
    with pytest.raises(RuntimeError, match=r"\(C75\d\d\)"):
        cuda_compile.compile_file(source, cuda_compile.SM90A)
