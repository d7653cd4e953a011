"""Packed sequences in flash_attention: each member is a call of its own, and tokens outside of all give zeros."""

import math

import pytest
import torch
from attention import BF16, DTYPES, FP16, FP32, LARGE, OP, cases, compare, cross, float32, make, with_dtypes  # noqa: F401
from oracle import gradients

from fusetune.ops import alibi_bias, flash_attention


def starts(lengths, first=0, device="cpu", dtype=torch.int32):
    return torch.tensor([first, *lengths], device=device).cumsum(0).to(dtype)


def packed(q_lengths, k_lengths=None, *, heads=(2, 1), D=8, dtype=FP32, device="cpu", layout=None, outside=(0, 0)):
    """q, k, v, a gradient and options of members of these lengths, with `outside` tokens before and after all."""
    k_lengths = q_lengths if k_lengths is None else k_lengths
    before, after = outside
    Sq, Sk = (before + sum(lengths) + after for lengths in (q_lengths, k_lengths))
    inputs, do = make((1, *heads, Sq, Sk, D), dtype, device, layout)
    names = ("cu_seqlens_q", "cu_seqlens_k")
    return inputs, do, {n: starts(s, before, device) for n, s in zip(names, (q_lengths, k_lengths), strict=True)}


# lengths of queries and, if others, of keys
MEMBERS = [
    ([7],),
    ([5, 1, 9],),
    ([0, 4, 0, 0, 6, 0],),
    ([5, 3, 8], [9, 6, 2]),
    ([4, 0, 6], [7, 5, 0]),
]
LARGE_MEMBERS = [
    ([1] * 40,),
    ([64, 65, 63, 1, 128],),
    ([113, 30, 2], [203, 1, 70]),
    ([300, 20], [25, 280]),
    ([3, 0, 129, 17, 0, 250],),
]


@pytest.mark.parametrize(
    ("lengths", "causal", "dtype"),
    with_dtypes([(m, n % 2 == 0) for n, m in enumerate(MEMBERS)], cross([(m,) for m in LARGE_MEMBERS], [True, False])),
    ids=str,
)
def test_members(backend, lengths, causal, dtype):
    inputs, do, options = packed(*lengths, dtype=dtype, device=backend.device)
    compare(inputs, do, causal=causal, **options)


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=[*LARGE, float32]), FP16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "align": "top_left"},
        {"causal": True, "window": (2, None)},
        {"window": (1, 3)},
        {"window": (3, 0), "align": "top_left"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "lengths", cases([(([5, 3, 8], [9, 6, 2]),)], [(([113, 30, 2], [203, 1, 70]),), (([65, 130],),)]), ids=str
)
def test_positions_are_the_members_own(backend, lengths, options, dtype):
    inputs, do, members = packed(*lengths, dtype=dtype, device=backend.device)
    compare(inputs, do, **members, **options)


@pytest.mark.parametrize(
    ("lengths", "D", "heads", "dtype"),
    with_dtypes(
        [([5, 0, 8], 8, (4, 2)), ([5, 0, 8], 8, (3, 3))],
        cross([([70, 3, 130], 64)], [(4, 2), (3, 3), (6, 1)]) + cross([([130, 9], 24)], [(4, 1), (2, 2), (6, 2)]),
    ),
    ids=str,
)
def test_dropout_and_log_sum_exp(backend, lengths, D, heads, dtype):
    """Rows of the dropout mask are counted within a member."""
    inputs, do, options = packed(lengths, heads=heads, D=D, dtype=dtype, device=backend.device)
    compare(inputs, do, causal=True, dropout_p=0.3, lse=True, **options)


@pytest.mark.beyond_cuda("relative_bias", "sinks", "softcap")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "lengths", cases([(([5, 0, 8, 1],),), (([5, 3, 8], [9, 6, 2]),)], [(([100, 3, 150],),)]), ids=str
)
def test_biases(backend, lengths, dtype):
    inputs, do, options = packed(*lengths, heads=(4, 2), dtype=dtype, device=backend.device)
    N = max(inputs["q"].shape[2], inputs["k"].shape[2])
    inputs["relative_bias"] = torch.randn(4, 2 * N - 1, device=backend.device).requires_grad_()
    compare(inputs, do, **options)
    inputs["sinks"] = torch.randn(4, device=backend.device).requires_grad_()
    compare(inputs, do, softcap=5.0, causal=True, lse=True, **options)


@pytest.mark.beyond_cuda("relative_bias")
def test_alibi(backend):
    inputs, do, options = packed([5, 8, 2], heads=(4, 2), device=backend.device)
    slopes = 2.0 ** -torch.arange(1, 5, device=backend.device)
    compare(inputs, do, causal=True, relative_bias=alibi_bias(slopes, 15), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "outside"), cases([([5, 3], (2, 4)), ([5, 3], (0, 1))], [([70, 60], (130, 67))]))
def test_tokens_outside_of_all_members(backend, lengths, outside, dtype):
    """They give zeros, whatever they are, and so are their gradients."""
    inputs, do, options = packed(lengths, dtype=dtype, device=backend.device, outside=outside)
    clean = compare(inputs, do, causal=True, lse=True, **options)
    inside = slice(outside[0], outside[0] + sum(lengths))
    is_outside = torch.ones(do.shape[2], dtype=torch.bool, device=do.device)
    is_outside[inside] = False
    with torch.no_grad():
        for t in (*inputs.values(), do):
            t[:, :, is_outside] = math.nan
    _, lse = flash_attention(**inputs, causal=True, return_lse=True, **options)
    assert (lse[:, :, is_outside] == -math.inf).all()
    assert lse[:, :, inside].isfinite().all()
    got = gradients(lambda **t: flash_attention(**t, causal=True, **options), inputs, do)
    for name, t in got.items():
        assert not t[:, :, is_outside].any(), name
        assert t[:, :, inside].isfinite().all(), name
    assert torch.equal(got["out"], clean["out"][..., :-1])


def test_no_members(backend):
    inputs, do, options = packed([], dtype=FP16, device=backend.device, outside=(3, 4))
    o, lse = flash_attention(**inputs, return_lse=True, **options)
    assert not any(t.any() for t in (o, *torch.autograd.grad(o, list(inputs.values()), do)))
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=[*LARGE, float32]), FP16], ids=str)
@pytest.mark.parametrize("layout", ["bshd", "packed", "row_strided", "transposed"])
def test_layouts(backend, layout, dtype):
    inputs, do, options = packed([5, 3, 9], heads=(2, 2), dtype=dtype, device=backend.device, layout=layout)
    got = compare(inputs, do, causal=True, **options)
    if layout == "bshd":
        assert all(t.transpose(1, 2).is_contiguous() for t in got.values())


def test_starts_of_other_kinds(backend):
    inputs, do, _ = packed([5, 3, 9], dtype=FP16, device=backend.device)
    found = []
    spread = starts([5, 3, 9], device=backend.device)[:, None].expand(-1, 2).contiguous()[:, 0]
    for cu_seqlens in (starts([5, 3, 9], 0, backend.device), starts([5, 3, 9], 0, backend.device, torch.int64), spread):
        for both in (False, True):
            options = {"cu_seqlens_q": cu_seqlens} | ({"cu_seqlens_k": cu_seqlens} if both else {})
            found.append(gradients(lambda options=options, **t: flash_attention(**t, **options), inputs, do))
    for other in found[1:]:
        for name, t in found[0].items():
            assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=float32), FP16], ids=str)
def test_members_do_not_see_each_other(backend, dtype):
    """What one member holds changes no bit of another's results."""
    inputs, do, options = packed([5, 3, 9], dtype=dtype, device=backend.device)
    attend = lambda **t: flash_attention(**t, causal=True, **options)  # noqa: E731
    before = gradients(attend, inputs, do)
    with torch.no_grad():
        for t in (*inputs.values(), do):
            t[:, :, 5:8] = math.nan
    after = gradients(attend, inputs, do)
    for name in before:
        for others in (slice(0, 5), slice(8, 17)):
            assert torch.equal(before[name][:, :, others], after[name][:, :, others]), name


def test_one_member_is_no_pack(backend):
    inputs, do, options = packed([40], dtype=FP16, device=backend.device)
    together = gradients(lambda **t: flash_attention(**t, causal=True, **options), inputs, do)
    alone = gradients(lambda **t: flash_attention(**t, causal=True), inputs, do)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name])


def test_repeats_bitwise_whatever_the_thread_count(backend, set_threads):
    check_repeats(backend, [5, 0, 8], FP16, set_threads)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("lengths", [[64, 1, 200, 0, 131], [300]], ids=str)
def test_large_ones_repeat_bitwise(cpu_backend, lengths, dtype, set_threads):
    check_repeats(cpu_backend, lengths, dtype, set_threads)


def check_repeats(backend, lengths, dtype, set_threads):
    inputs, do, options = packed(lengths, heads=(4, 2), dtype=dtype, device=backend.device)

    def run(threads):
        set_threads(threads)
        torch.manual_seed(7)
        return gradients(lambda **t: flash_attention(**t, causal=True, dropout_p=0.2, **options), inputs, do)

    first = run(1)
    for threads in (1, 2, 3, 7) if backend.name == "cpu" else (1,):
        again = run(threads)
        for name in first:
            assert torch.equal(first[name], again[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_without_a_graph_break(device, dropout_p):
    inputs, do, options = packed([5, 0, 8], device=device)

    def attend(q, k, v, cu_seqlens_q, cu_seqlens_k):
        return flash_attention(
            q, k, v, causal=True, dropout_p=dropout_p, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
        )

    compiled = torch.compile(attend, fullgraph=True)
    if dropout_p:  # Inductor draws other seeds
        assert compiled(**inputs, **options).isfinite().all()
        return
    expected = gradients(lambda **t: attend(**t, **options), inputs, do)
    got = gradients(lambda **t: compiled(**t, **options), inputs, do)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
