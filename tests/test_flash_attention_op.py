"""flash_attention as an operation of torch: registration, compilation, memory, modes, and what it refuses."""

import math
import subprocess
import sys

import pytest
import torch
from attention import BF16, FP32, OP, make, padding  # noqa: F401
from oracle import gradients

from fusetune.ops import flash_attention, flash_attention_reference
from fusetune.ops.flash_attention import Arguments
from fusetune.ops.philox import draw_seed

NONE = Arguments(*[None] * 7, 0.3, 0.0, -1, -1, False, 0.0, None)


def options_of(device):
    """Every option of the op, by itself and together, for q [2, 2, 9, 8] and k [2, 1, 12, 8]."""
    keep, mask = padding("left", 2, 12, device), torch.rand(1, 2, 9, 12, device=device) < 0.5
    each = {
        "nothing": {},
        "keep": {"keep": keep},
        "mask": {"mask": mask},
        "bias": {"bias": torch.randn(2, 1, 1, 12, device=device)},
        "bias in bfloat16": {"bias": torch.randn(1, 1, 9, 12, device=device).bfloat16()},
        "relative": {"relative": torch.randn(2, 23, device=device)},
        "sinks": {"sinks": torch.randn(2, device=device)},
        "softcap": {"softcap": 2.0},
        "windows": {"left": 3, "right": 2, "top_left": True},
        "dropout": {"dropout_p": 0.2, "seed": draw_seed(device)},
    }
    return each | {"all": {name: value for option in each.values() for name, value in option.items()}}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("option", [*options_of("cpu"), "packed"])
def test_opcheck(device, option, dtype):
    inputs, do = make((2, 2, 1, 9, 12, 8), dtype, device)
    if option == "packed":
        inputs, do = make((1, 2, 1, 9, 12, 8), dtype, device)
        starts = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
        a = NONE._replace(q_starts=starts, k_starts=starts)
    else:
        a = NONE._replace(**options_of(device)[option])
    check_op(inputs, do, a)


@pytest.mark.parametrize("layout", ["bshd", "packed", "transposed"])
@pytest.mark.parametrize("Dv", [8, 5])
def test_opcheck_of_layouts(device, layout, Dv):
    if layout == "packed" and Dv != 8:
        layout = "row_strided"
    check_op(*make((2, 2, 2, 9, 9, 8, Dv), FP32, device, layout), NONE)


def check_op(inputs, do, a):
    q, k, v = (t.detach() for t in inputs.values())
    torch.library.opcheck(torch.ops.fusetune.flash_attention_forward.default, (q, k, v, *a))
    o, lse = torch.ops.fusetune.flash_attention_forward(q, k, v, *a)
    needed = [tensor is not None for tensor in (a.bias, a.relative, a.sinks)]
    for dlse in (None, torch.randn_like(lse)):
        arguments = (do, dlse, q, k, v, o, lse, *a, needed)
        torch.library.opcheck(torch.ops.fusetune.flash_attention_backward.default, arguments)


@pytest.mark.parametrize("layout", [None, "bshd", "transposed"])
def test_compiles_without_a_graph_break(device, layout):
    inputs, do = make((2, 2, 1, 9, 12, 8), FP32, device, layout)
    inputs["bias"] = torch.randn(1, 2, 9, 12, device=device).requires_grad_()
    inputs["relative_bias"] = torch.randn(2, 23, device=device).requires_grad_()
    inputs["sinks"] = torch.randn(2, device=device).requires_grad_()
    mask = padding("left", 2, 12, device)

    def attend(**tensors):
        o, lse = flash_attention(
            **tensors, causal=True, window=(4, None), key_padding_mask=mask, softcap=3.0, return_lse=True
        )
        return o + lse.clamp(min=-10)[..., None]

    expected, got = gradients(attend, inputs, do), gradients(torch.compile(attend, fullgraph=True), inputs, do)
    for name in expected:
        torch.testing.assert_close(expected[name], got[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_saves_nothing_of_two_sequence_dimensions(device, dropout_p):
    inputs, _ = make((2, 4, 2, 64, 96, 16), BF16, device)
    mask, saved = padding("left", 2, 96, device), []
    tensors = {
        "key_padding_mask": mask,
        "relative_bias": torch.randn(4, 191, device=device).requires_grad_(),
        "sinks": torch.randn(4, device=device).requires_grad_(),
    }
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        o = flash_attention(**inputs, **tensors, dropout_p=dropout_p, softcap=5.0, window=(30, 5))
    own = {t.data_ptr() for t in (*inputs.values(), *tensors.values(), o)}
    extra = [(list(t.shape), t.dtype) for t in saved if t.data_ptr() not in own]
    assert extra == [([2, 4, 64], torch.float32), *([([1], torch.int64)] if dropout_p else [])]


@pytest.mark.parametrize("case", ["plain", "relative", "packed"])
def test_memory_does_not_grow_with_the_square_of_the_sequence(case):
    """In a process of its own: the peak of this one is behind it. [S, S] would be 64 MiB even of bytes."""
    script = """
import resource, sys, torch
from fusetune.ops import flash_attention
def peak_after(S):
    q, k, v = torch.randn(3, 1, 1, S, 8).unbind()
    options = {
        "plain": {},
        "relative": {"relative_bias": torch.randn(1, 2 * S - 1).requires_grad_(), "softcap": 5.0, "window": (S, None)},
        "packed": {"cu_seqlens_q": torch.tensor([0, S // 8, S])},
    }[sys.argv[1]]
    flash_attention(q.requires_grad_(), k, v, causal=True, dropout_p=0.1, **options).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = peak_after(64)
print(peak_after(8192) - small)
"""
    run = subprocess.run([sys.executable, "-c", script, case], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 40


def test_autocast(device):
    inputs, do = make((1, 2, 1, 10, 20, 8), FP32, device)
    with torch.autocast(device.type, BF16):
        got = gradients(flash_attention, inputs, do)
    low = {name: t.detach().bfloat16().requires_grad_() for name, t in inputs.items()}
    expected = gradients(flash_attention, low, do)
    assert got["out"].dtype == BF16
    assert all(got[f"d{name}"].dtype == FP32 for name in inputs)
    for name in got:
        assert torch.equal(got[name], expected[name].to(got[name].dtype)), name


def test_under_no_grad_and_inference_mode(device):
    inputs, _ = make((1, 2, 1, 10, 20, 8), FP32, device)
    expected = flash_attention(**inputs).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            o = flash_attention(**inputs)
        assert not o.requires_grad
        assert torch.equal(o, expected)


def test_second_derivative_raises(device):
    inputs, _ = make((1, 2, 1, 10, 20, 8), FP32, device)
    (dq,) = torch.autograd.grad(flash_attention(**inputs).square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_backend_is_the_reference(device, dropout_p, monkeypatch):
    monkeypatch.setenv("FUSETUNE_BACKEND", "reference")
    inputs, do = make((2, 2, 1, 10, 20, 8), FP32, device)
    inputs["bias"] = torch.randn(10, 20, device=device).requires_grad_()
    options = {
        "causal": True,
        "window": (5, None),
        "align": "top_left",
        "key_padding_mask": padding("left", 2, 20, device),
        "relative_bias": torch.randn(2, 39, device=device),
        "sinks": torch.randn(2, device=device),
        "softcap": 3.0,
        "dropout_p": dropout_p,
    }
    torch.manual_seed(7)
    got = gradients(lambda **t: flash_attention(**t, **options), inputs, do)
    torch.manual_seed(7)
    seed = int(draw_seed(device))
    expected = gradients(lambda **t: flash_attention_reference(**t, **options, seed=seed), inputs, do)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def starts(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


def ones(*shape, device="cpu"):
    return torch.ones(shape, dtype=torch.bool, device=device)


SHAPE = (1, 4, 2, 6, 7, 8)
ERRORS = [
    ({"q": torch.randn(1, 4, 6, 8).double()}, TypeError, "q must be float32, bfloat16, float16, got float64"),
    ({"k": torch.randn(1, 2, 7, 8).half()}, TypeError, "k must be float32, got float16"),
    ({"v": torch.randn(1, 2, 7, 8).half()}, TypeError, "v must be float32, got float16"),
    ({"q": torch.randn(4, 6, 8)}, ValueError, r"q must have shape \[B, H, Sq, D\], got \[4, 6, 8\]"),
    ({"k": torch.randn(2, 2, 7, 8)}, ValueError, r"k must have shape \[1, Hkv, Sk, 8\], got \[2, 2, 7, 8\]"),
    ({"k": torch.randn(1, 2, 7, 9)}, ValueError, r"k must have shape \[1, Hkv, Sk, 8\], got \[1, 2, 7, 9\]"),
    ({"v": torch.randn(1, 2, 6, 8)}, ValueError, r"v must have shape \[1, 2, 7, Dv\], got \[1, 2, 6, 8\]"),
    ({"v": torch.randn(1, 4, 7, 8)}, ValueError, r"v must have shape \[1, 2, 7, Dv\], got \[1, 4, 7, 8\]"),
    ({"q": torch.randn(1, 3, 6, 8)}, ValueError, "heads of q must be a positive multiple of those of k, got 3, 2"),
    ({"q": torch.randn(1, 0, 6, 8)}, ValueError, "heads of q must be a positive multiple of those of k, got 0, 2"),
    (
        {"k": torch.randn(1, 0, 7, 8), "v": torch.randn(1, 0, 7, 8)},
        ValueError,
        "heads of q must be a positive multiple of those of k, got 4, 0",
    ),
    ({"k": torch.randn(1, 2, 7, 8, device="meta")}, ValueError, "k must be on cpu, got meta"),
    (
        {"q": torch.randn(1, 4, 6, 257), "k": torch.randn(1, 2, 7, 257)},
        NotImplementedError,
        "head dimension must be at most 256, got 257",
    ),
    ({"v": torch.randn(1, 2, 7, 300)}, NotImplementedError, "head dimension must be at most 256, got 300"),
    *(({"scale": s}, ValueError, f"scale must be finite, got {s}") for s in (math.inf, math.nan)),
    *(
        ({"softcap": c}, ValueError, f"softcap must be positive and finite, or None, got {c}")
        for c in (0.0, -1.0, math.inf, math.nan)
    ),
    *(({"dropout_p": p}, ValueError, f"dropout_p must be between 0 and 1, got {p}") for p in (-0.1, 1.5, math.nan)),
    *(
        ({"window": w}, ValueError, "window must be two sizes from 0 on, or None for all, got")
        for w in [(-1, None), (None, -2), (3,), (1, 2, 3), (1.5, None)]
    ),
    ({"align": "left"}, ValueError, "align must be bottom_right or top_left, got left"),
    ({"key_padding_mask": torch.ones(1, 7)}, TypeError, "key_padding_mask must be bool, got float32"),
    ({"key_padding_mask": ones(2, 7)}, ValueError, r"key_padding_mask must have shape \[1, 7\], got \[2, 7\]"),
    ({"key_padding_mask": ones(1, 7, device="meta")}, ValueError, "key_padding_mask must be on cpu, got meta"),
    ({"mask": ones(6, 8)}, ValueError, r"mask must broadcast to \[1, 4, 6, 7\], got \[1, 1, 6, 8\]"),
    ({"mask": ones(1, 2, 6, 7)}, ValueError, r"mask must broadcast to \[1, 4, 6, 7\], got \[1, 2, 6, 7\]"),
    ({"mask": ones(1, 1, 1, 6, 7)}, ValueError, r"mask must broadcast to \[1, 4, 6, 7\], got \[1, 1, 1, 6, 7\]"),
    ({"mask": ones(6, 7, device="meta")}, ValueError, "mask must be on cpu, got meta"),
    ({"mask": torch.ones(6, 7, dtype=torch.long)}, TypeError, r"\w+ must be .*, got int64"),
    ({"mask": torch.ones(6, 7).double()}, TypeError, r"\w+ must be float32, bfloat16, float16, got float64"),
    ({"bias": ones(6, 7)}, TypeError, "bias must be float32, bfloat16, float16, got bool"),
    ({"bias": torch.ones(2, 1, 6, 7)}, ValueError, r"bias must broadcast to \[1, 4, 6, 7\], got \[2, 1, 6, 7\]"),
    ({"bias": torch.ones(6, 7, device="meta")}, ValueError, "bias must be on cpu, got meta"),
    ({"relative_bias": torch.ones(4, 13).double()}, TypeError, "relative_bias must be float32, .*, got float64"),
    ({"relative_bias": torch.ones(2, 13)}, ValueError, r"relative_bias must have shape \[4, 2N - 1\], got \[2, 13\]"),
    *(
        (
            {"relative_bias": torch.ones(4, n)},
            ValueError,
            rf"relative_bias must have 2 N - 1 columns, N at least 7, got {n}",
        )
        for n in (11, 14)
    ),
    ({"relative_bias": torch.ones(4, 13, device="meta")}, ValueError, "relative_bias must be on cpu, got meta"),
    ({"sinks": torch.ones(4, dtype=torch.long)}, TypeError, "sinks must be float32, .*, got int64"),
    ({"sinks": torch.ones(2)}, ValueError, r"sinks must have shape \[4\], got \[2\]"),
    ({"sinks": torch.ones(4, device="meta")}, ValueError, "sinks must be on cpu, got meta"),
    ({"cu_seqlens_k": starts(0, 7)}, ValueError, "cu_seqlens_q must be given with cu_seqlens_k, got None"),
    ({"cu_seqlens_q": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens_q must be int32, int64, got float32"),
    ({"cu_seqlens_q": starts()}, ValueError, "cu_seqlens_q must have at least one element, got none"),
    (
        {"cu_seqlens_q": starts(0, 6)[None]},
        ValueError,
        r"cu_seqlens_q must have shape \[members \+ 1\], got \[1, 2\]",
    ),
    ({"cu_seqlens_q": starts(0, 6, device="meta")}, ValueError, "cu_seqlens_q must be on cpu, got meta"),
    (
        {"cu_seqlens_q": starts(0, 6), "cu_seqlens_k": starts(0, 3, 7)},
        ValueError,
        "cu_seqlens_k must have as many elements as cu_seqlens_q, 2, got 3",
    ),
    *(
        (
            {"cu_seqlens_q": starts(*values), "cu_seqlens_k": starts(*range(len(values)))},
            ValueError,
            rf"cu_seqlens_q must never decrease, from 0 or more to at most 6, got \[{', '.join(map(str, values))}\]",
        )
        for values in [(0, 4, 3, 6), (-1, 6), (0, 7), (7, 7)]
    ),
    (
        {"cu_seqlens_q": starts(0, 6), "cu_seqlens_k": starts(0, 8)},
        ValueError,
        r"cu_seqlens_k must never decrease, from 0 or more to at most 7, got \[0, 8\]",
    ),
    *(
        ({"cu_seqlens_q": starts(0, 6), name: value}, ValueError, f"{name} must be None with cu_seqlens_q")
        for name, value in [("key_padding_mask", ones(1, 7)), ("mask", ones(6, 7)), ("bias", torch.ones(6, 7))]
    ),
    (
        {"cu_seqlens_q": torch.tensor([0, 2**32])},
        ValueError,
        r"cu_seqlens_q must never decrease, from 0 or more to at most 6, got \[0, 4294967296\]",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"^flash_attention: {message}") as found:
        flash_attention(**{**make(SHAPE)[0], **change})
    assert "\n" not in str(found.value)


def test_packed_sequences_have_batch_size_1():
    with pytest.raises(ValueError, match=r"^flash_attention: q must have batch size 1 with cu_seqlens_q, got 2"):
        flash_attention(**make((2, *SHAPE[1:]))[0], cu_seqlens_q=starts(0, 6), cu_seqlens_k=starts(0, 7))


def test_unsupported_devices_say_why():
    inputs = {name: t.detach().to("meta") for name, t in make(SHAPE)[0].items()}
    with pytest.raises(NotImplementedError, match="flash_attention: no backend works on meta"):
        flash_attention(**inputs)
