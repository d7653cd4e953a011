"""flash_attention at every backend: the oracle is flash_attention_reference in float64, the yardstick the same in low
precision, and torch's scaled_dot_product_attention."""

import math
import subprocess
import sys

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, gradients, to_double
from torch.utils.checkpoint import checkpoint

from fusetune.ops import flash_attention, flash_attention_reference
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale

OP = "flash_attention"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]


def cases(small, large):
    """Rows of arguments of a test, of which Triton's interpreter is spared the large ones."""
    return [*small, *(pytest.param(*case, marks=pytest.mark.large) for case in large)]


def make(shape, dtype=FP32, device="cpu", layout=None):
    """q, k, v and a gradient, normally distributed. shape: B, H, Hkv, Sq, Sk, D."""
    B, H, Hkv, Sq, Sk, D = shape
    q, do = torch.randn(2, B, H, Sq, D).to(device, dtype)
    k, v = torch.randn(2, B, Hkv, Sk, D).to(device, dtype)
    if layout == "bshd":
        q, k, v, do = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, do))
    elif layout == "packed":
        q, k, v = torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).permute(2, 0, 3, 1, 4)
    elif layout == "expanded":
        k, v = (t[:, :1].expand(t.shape) for t in (k, v))
        do = torch.randn(1, device=device, dtype=dtype).expand(do.shape)
    elif layout:
        q, k, v, do = (LAYOUTS[layout](t) for t in (q, k, v, do))
    return {name: t.requires_grad_() for name, t in {"q": q, "k": k, "v": v}.items()}, do


def cancelled(inputs, do, large_logits=False, dropout_p=0.0, **options):
    """Floors for float32 terms that cancel in dS = P (dP - D), P = exp(logit - lse), beyond roundings of the result.

    dP_ij = z do_i.v_j, z = 1/(1-p), and its average D_i over the keys are each right to a rounding (eps/2) of their
    largest possible size z |do_i| max_j |v_j|, though dP - D may be far smaller. With their sum
    e_i = eps z |do_i| max_j |v_j|, and P's rows adding up to 1,

        error of dq_id <= scale sum_j P_ij e_i |k_jd| <= scale e_i max_j |k_jd|
        error of dk_jd <= scale sum_i P_ij e_i |q_id|, over the queries of all heads that read key j.

    Where logits are large, a rounding of lse, which is one float32 of a size L_i = max_j |logit_ij|, is a relative
    error eps/2 L_i of P, where plain torch may have none. As |dP - D| <= 2 z |do_i| max_j |v_j| this makes e_i larger
    by the factor 1 + L_i, and

        error of dv_jd <= eps/2 z sum_i P_ij L_i |do_id|.
    """
    q, k, v, do = (t.detach().double() for t in (*inputs.values(), do))
    if not q.numel() or not k.numel():
        return {}
    (B, H, _, D), (_, Hkv, Sk, _) = q.shape, k.shape
    scale = D**-0.5 if options.get("scale") is None else abs(options["scale"])
    eps, z = torch.finfo(torch.float32).eps, kept_scale(dropout_p)
    P = flash_attention_reference(q, k, torch.eye(Sk).to(k).expand(B, Hkv, Sk, Sk), **options)
    k, v = (t.repeat_interleave(H // Hkv, dim=1) for t in (k, v))
    L = scale * (q @ k.mT).abs().amax(-1, keepdim=True) if large_logits else 0
    e = eps * z * do.norm(dim=-1, keepdim=True) * v.norm(dim=-1).amax(-1)[..., None, None] * (1 + L)

    def of_key(rows):  # sum_i P_ij rows_id
        return (P.mT @ rows).view(B, Hkv, -1, Sk, D).sum(2).max().item()

    return {
        "dq": scale * (e * k.abs().amax((2, 3), keepdim=True)).max().item(),
        "dk": scale * of_key(e * q.abs()),
        "dv": eps / 2 * z * of_key(L * do.abs()),
    }


def reference(options, seed):
    return lambda **t: flash_attention_reference(**t, **options, seed=seed)


def compare(inputs, do, *, plain=None, large_logits=False, **options):
    """Judges flash_attention's result and gradients by `plain`, or by its reference; gives them."""
    floors = cancelled(inputs, do, large_logits, **options)
    return oracle.compare(
        flash_attention, flash_attention_reference, inputs, do, plain=plain, cancelled=floors, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("Sq", "Sk"),
    cases(
        [(1, 1), (1, 9), (9, 1), (16, 17), (23, 40)],
        # either side of the kernels' tiles of 24, 48 and 240 queries and of 128 keys
        [(1, 300), (24, 128), (25, 129), (48, 127), (49, 256), (128, 49), (241, 257), (257, 131)],
    ),
)
def test_sequence_lengths(backend, Sq, Sk, causal, dtype):
    compare(*make((2, 2, 1, Sq, Sk, 20), dtype, backend.device), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", cases([1, 8, 17], [(32,), (50,), (64,), (111,), (128,), (256,)]))
def test_head_dimensions(backend, D, dtype):
    compare(*make((1, 2, 1, 35, 60, D), dtype, backend.device), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("H", "Hkv"), cases([(4, 2), (3, 1)], [(4, 4), (12, 4), (12, 1)]))
def test_grouped_heads(backend, H, Hkv, causal):
    compare(*make((2, H, Hkv, 31, 45, 24), FP32, backend.device), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 5, 6, 8), (2, 2, 1, 0, 6, 8), (2, 2, 1, 5, 0, 8), (2, 2, 1, 5, 6, 0)], ids=str
)
def test_empty_tensors(backend, shape, causal):
    compare(*make(shape, FP32, backend.device), causal=causal, scale=0.5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bshd", "packed", "expanded", *LAYOUTS])
def test_layouts(backend, layout, dtype, dropout_p):
    inputs, do = make((2, 3, 3, 21, 21, 20), dtype, backend.device, layout)
    got = compare(inputs, do, causal=True, dropout_p=dropout_p)
    if layout != "transposed":  # which the kernels copy
        assert got["out"].stride() == torch.empty_like(inputs["q"]).stride()
        assert got["dq"].stride() == torch.empty_like(inputs["q"]).stride()
        assert got["dk"].stride() == torch.empty_like(inputs["k"]).stride()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5, 0.0])
def test_scale(backend, scale, causal):
    compare(*make((1, 2, 2, 19, 30, 12), FP32, backend.device), scale=scale, causal=causal)


def padding(kind, B, Sk, device):
    """[B, Sk] True where a key is kept."""
    j, length = torch.arange(Sk, device=device), torch.arange(1, B + 1, device=device)[:, None] * Sk // (B + 1)
    return {
        "left": j >= length,
        "right": j < length,
        "scattered": torch.rand(B, Sk, device=device) < 0.5,
        "one sequence has none": (j >= 0) & (length > Sk // (B + 1)),
        "none": torch.zeros(B, Sk, dtype=torch.bool, device=device),
        "all": torch.ones(B, Sk, dtype=torch.bool, device=device),
        "expanded": (j % 3 > 0)[None].expand(B, Sk),
        "transposed": (j[:, None] % (length.T + 1) > 0).T,
    }[kind]


PADDING = ["left", "right", "scattered", "one sequence has none", "none", "all", "expanded", "transposed"]
PADDED = cases([(3, 2, 1, 10, 20, 8)], [(3, 4, 2, 60, 300, 32), (2, 2, 2, 300, 130, 50)])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize(("B", "H", "Hkv", "Sq", "Sk", "D"), PADDED)
def test_padding(backend, B, H, Hkv, Sq, Sk, D, kind, causal, dtype):
    inputs, do = make((B, H, Hkv, Sq, Sk, D), dtype, backend.device)
    mask = padding(kind, B, Sk, backend.device)
    got = compare(inputs, do, causal=causal, key_padding_mask=mask)

    seen = mask[:, None, :].expand(B, Sq, Sk)
    if causal:
        seen = seen.tril(Sk - Sq)
    sees_nothing, is_unseen = ~seen.any(2), ~seen.any(1)
    for name in ("out", "dq"):
        assert not got[name].transpose(1, 2)[sees_nothing].any(), name
    for name in ("dk", "dv"):
        assert not got[name].transpose(1, 2)[is_unseen].any(), name


def test_padded_keys_are_never_read(backend):
    """So that not even NaN comes through."""
    inputs, do = make((2, 2, 1, 10, 20, 8), FP32, backend.device)
    mask = padding("scattered", 2, 20, backend.device)
    clean = gradients(lambda **t: flash_attention(**t, key_padding_mask=mask), inputs, do)
    with torch.no_grad():
        for name in ("k", "v"):
            inputs[name].masked_fill_(~mask[:, None, :, None], math.nan)
    got = gradients(lambda **t: flash_attention(**t, key_padding_mask=mask), inputs, do)
    for name in clean:
        assert torch.equal(got[name], clean[name]), name


@pytest.mark.parametrize(("Sq", "Sk"), cases([(20, 7), (9, 1)], [(300, 131), (300, 3)]))
def test_causal_rows_that_see_nothing_are_zero(backend, Sq, Sk):
    got = compare(*make((1, 2, 1, Sq, Sk, 16), FP32, backend.device), causal=True)
    for name in ("out", "dq"):
        assert not got[name][:, :, : Sq - Sk].any(), name
        assert got[name][:, :, Sq - Sk + 1 :].any(-1).all(), name


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, "left", "scattered"])
@pytest.mark.parametrize(("B", "H", "Hkv", "Sq", "Sk", "D"), PADDED)
def test_dropout_follows_the_reference(backend, B, H, Hkv, Sq, Sk, D, kind, causal, dropout_p):
    inputs, do = make((B, H, Hkv, Sq, Sk, D), FP32, backend.device)
    mask = kind and padding(kind, B, Sk, backend.device)
    got = compare(inputs, do, causal=causal, key_padding_mask=mask, dropout_p=dropout_p)
    if dropout_p == 1:
        assert not any(t.any() for t in got.values())


@pytest.mark.parametrize("kind", [None, "left", "scattered"])
@pytest.mark.parametrize("Sk", [20, pytest.param(200, marks=pytest.mark.large)])
def test_mask_bit_for_bit(backend, Sk, kind):
    """With q = 0 and v = 1, or do = 1 in backward, attention is its dropout mask over the number of kept keys."""
    B, H, p, device = 2, 2, 0.3, backend.device
    keep = padding(kind or "all", B, Sk, device)
    eye = torch.eye(Sk, device=device).expand(B, H, Sk, Sk)
    zeros, v = torch.zeros_like(eye), eye.clone().requires_grad_()
    torch.manual_seed(5)
    o = flash_attention(zeros, zeros, v, key_padding_mask=keep if kind else None, dropout_p=p)
    torch.manual_seed(5)
    rows = torch.arange(B * H, device=device)[:, None] * 2**32 + torch.arange(Sk, device=device)
    mask = keep_mask(int(draw_seed(device)), rows, Sk, p).view(B, H, Sk, Sk) & keep[:, None, None, :]
    assert torch.equal(o != 0, mask)
    weights = mask * kept_scale(p) / keep.sum(1)[:, None, None, None]
    torch.testing.assert_close(o, weights.float(), rtol=1e-6, atol=0)
    (dv,) = torch.autograd.grad(o, v, eye)
    assert torch.equal(dv != 0, mask.mT)
    torch.testing.assert_close(dv, weights.mT.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kind", "Hkv"), [(None, 4), (None, 2), ("left", 4), ("scattered", 1)])
@pytest.mark.parametrize(("S", "D"), cases([(12, 8)], [(130, 64)]))
def test_against_torchs_attention(backend, S, D, kind, Hkv, causal):
    inputs, do = make((2, 4, Hkv, S, S, D), FP32, backend.device)
    mask = kind and padding(kind, 2, S, backend.device)
    allowed = None
    if mask is not None:
        mask[:, 0] = True  # torch's rows that see nothing are NaN or a uniform average
        allowed = mask[:, None, None, :].expand(2, 1, S, S)
        allowed = allowed.tril() if causal else allowed

    def stock(q, k, v):
        return F.scaled_dot_product_attention(
            q, k, v, allowed, is_causal=causal and allowed is None, scale=0.3, enable_gqa=True
        )

    options = {"causal": causal, "key_padding_mask": mask, "scale": 0.3}
    compare(inputs, do, plain=stock, **options)
    exact = to_double(inputs)
    expected = gradients(stock, exact, do)
    for name, t in gradients(reference(options, 0), exact, do).items():
        torch.testing.assert_close(t, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [4.0, 30.0])
def test_logits_whose_exponential_overflows(backend, size, causal, dtype):
    inputs, do = make((1, 2, 2, 40, 50, 32), dtype, backend.device)
    inputs |= {name: (inputs[name] * size).detach().requires_grad_() for name in ("q", "k")}
    logits = inputs["q"].detach().float() @ inputs["k"].detach().float().mT
    assert logits.max() > 88.8  # log of the largest float32
    compare(inputs, do, causal=causal, scale=1.0, large_logits=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_nan_and_infinity_reach_what_they_should(backend, name, poison):
    """What is not finite in float64 must not be here, and what cannot be reached from the poisoned row must be."""
    inputs, do = make((1, 2, 1, 6, 20, 8), FP32, backend.device)
    with torch.no_grad():
        (do if name == "do" else inputs[name])[0, 0, 3, 2] = poison
    got = gradients(flash_attention, inputs, do)
    expected = gradients(flash_attention_reference, inputs, do)
    for key in expected:
        assert torch.equal(got[key].isfinite(), expected[key].isfinite()), key


@pytest.mark.usefixtures("cpu_backend")
def test_exp2():
    """The claim in csrc/cpu/simd.h. With q = do = 1 and lse = o = 0, dv of a key is 2^k, if scale is ln 2."""

    def exp2(x):
        one, lse = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
        k = x.view(1, 1, -1, 1)
        arguments = (one, one, k, torch.zeros_like(k), None, torch.zeros_like(one), lse, math.log(2), False, 0.0, None)
        return torch.ops.fusetune.flash_attention_backward(*arguments)[2].view(-1)

    dense = torch.cat([torch.linspace(-126, 127, 2**19), torch.linspace(-1, 1, 2**19)])
    tiny = torch.logspace(-38, 0, 2**12)
    edges = torch.arange(-126.0, 127.5, 0.5)
    x = torch.cat([dense, tiny, -tiny, edges, edges.nextafter(edges + 1)[:-1], edges.nextafter(edges - 1)[1:]])
    exact = x.double().exp2()
    assert ((exp2(x) - exact) / exact).abs().max() < 1.2e-7
    floored = exp2(torch.tensor([-126.5, -127, -150, -1e10, -math.inf]))
    assert (floored == 2**-126).all()
    assert exp2(torch.tensor([math.nan, 0, -math.nan])).isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "Sq", "Sk", "D"), cases([(1, 2, 1, 10, 20, 8)], [(1, 4, 2, 300, 700, 64), (3, 8, 2, 70, 140, 50)])
)
def test_repeats_bitwise_whatever_the_thread_count(backend, B, H, Hkv, Sq, Sk, D, dtype, set_threads):
    inputs, do = make((B, H, Hkv, Sq, Sk, D), dtype, backend.device)
    mask = padding("scattered", B, Sk, backend.device)

    def run(threads):
        set_threads(threads)
        torch.manual_seed(7)
        return gradients(
            lambda **t: flash_attention(**t, causal=True, key_padding_mask=mask, dropout_p=0.2), inputs, do
        )

    first = run(1)
    for threads in (1, 2, 2, 3, 7):
        again = run(threads)
        for name in first:
            assert torch.equal(first[name], again[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_saves_nothing_of_two_sequence_dimensions(device, dropout_p):
    inputs, _ = make((2, 4, 2, 64, 96, 16), BF16, device)
    mask, saved = padding("left", 2, 96, device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        o = flash_attention(**inputs, key_padding_mask=mask, dropout_p=dropout_p)
    own = {t.data_ptr() for t in (*inputs.values(), mask, o)}
    extra = [(list(t.shape), t.dtype) for t in saved if t.data_ptr() not in own]
    assert extra == [([2, 4, 64], torch.float32), *([([1], torch.int64)] if dropout_p else [])]


def test_memory_does_not_grow_with_the_square_of_the_sequence():
    """In a process of its own: the peak of this one is behind it. [S, S] would be 64 MiB even of bytes."""
    script = """
import resource, torch
from fusetune.ops import flash_attention
def peak_after(S):
    q, k, v = torch.randn(3, 1, 1, S, 8).unbind()
    flash_attention(q.requires_grad_(), k, v, causal=True, dropout_p=0.1).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = peak_after(64)
print(peak_after(8192) - small)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 40


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_replays_dropout(device, use_reentrant):
    inputs, _ = make((1, 2, 1, 10, 20, 8), FP32, device)

    def attend(q, k, v):
        return flash_attention(q, k, v, causal=True, dropout_p=0.4)

    def backward(function, *extra, **options):
        leaves = [t.detach().requires_grad_() for t in inputs.values()]
        torch.manual_seed(7)
        o = function(*extra, *leaves, **options)
        o.square().sum().backward()  # reentrant checkpoints know only this form
        return [o, *(leaf.grad for leaf in leaves)]

    for direct, replayed in zip(
        backward(attend), backward(checkpoint, attend, use_reentrant=use_reentrant), strict=True
    ):
        assert torch.equal(direct, replayed)


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


@pytest.mark.parametrize("layout", [None, "bshd", "transposed"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(device, dtype, dropout_p, layout):
    inputs, do = make((2, 2, 1, 9, 12, 8), dtype, device, layout)
    qkv = [t.detach() for t in inputs.values()]
    seed = draw_seed(device) if dropout_p else None
    o, lse = torch.ops.fusetune.flash_attention_forward(*qkv, None, 0.3, True, dropout_p, seed)
    for mask in (None, padding("left", 2, 12, device)):
        options = 0.3, True, dropout_p, seed
        torch.library.opcheck(torch.ops.fusetune.flash_attention_forward.default, (*qkv, mask, *options))
        torch.library.opcheck(torch.ops.fusetune.flash_attention_backward.default, (do, *qkv, mask, o, lse, *options))


@pytest.mark.parametrize("layout", [None, "bshd", "transposed"])
def test_compiles_without_a_graph_break(device, layout):
    inputs, do = make((2, 2, 1, 9, 12, 8), FP32, device, layout)
    mask = padding("left", 2, 12, device)

    def attend(**tensors):
        return flash_attention(**tensors, causal=True, key_padding_mask=mask)

    expected, got = gradients(attend, inputs, do), gradients(torch.compile(attend, fullgraph=True), inputs, do)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_compiled_backward_has_the_mask_of_forward(device):
    eye = torch.eye(30, device=device)[None, None]
    v = eye.clone().requires_grad_()
    compiled = torch.compile(flash_attention, fullgraph=True)
    o = compiled(torch.zeros_like(eye), torch.zeros_like(eye), v, dropout_p=0.5)
    assert 0.3 < (o == 0).float().mean() < 0.7
    assert torch.equal(torch.autograd.grad(o, v, eye)[0] != 0, o.mT != 0)


def test_under_no_grad_and_inference_mode(device):
    inputs, _ = make((1, 2, 1, 10, 20, 8), FP32, device)
    expected = flash_attention(**inputs).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            o = flash_attention(**inputs)
        assert not o.requires_grad
        assert torch.equal(o, expected)


@pytest.mark.parametrize("frozen", ["q", "k v", "q k"])
def test_frozen_inputs(backend, frozen):
    inputs, do = make((1, 2, 1, 10, 20, 8), FP32, backend.device)
    expected = compare(inputs, do)
    for name in frozen.split():
        inputs[name].requires_grad_(False)
    got = gradients(flash_attention, inputs, do)
    assert len(got) == 1 + len(inputs) - len(frozen.split())
    for name in got:
        assert torch.equal(got[name], expected[name]), name


def test_second_derivative_raises(device):
    inputs, _ = make((1, 2, 1, 10, 20, 8), FP32, device)
    (dq,) = torch.autograd.grad(flash_attention(**inputs).square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_backend_is_the_reference(device, dropout_p, monkeypatch):
    monkeypatch.setenv("FUSETUNE_BACKEND", "reference")
    inputs, do = make((2, 2, 1, 10, 20, 8), FP32, device)
    options = {"causal": True, "key_padding_mask": padding("left", 2, 20, device), "dropout_p": dropout_p}
    torch.manual_seed(7)
    got = gradients(lambda **t: flash_attention(**t, **options), inputs, do)
    torch.manual_seed(7)
    expected = gradients(reference(options, int(draw_seed(device))), inputs, do)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradients(dropout_p):
    inputs, _ = make((2, 2, 1, 4, 5, 3))
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    options = {"causal": True, "key_padding_mask": mask, "dropout_p": dropout_p, "seed": 3}
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_attention_reference(q, k, v, **options), tuple(to_double(inputs).values())
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(1, 4, 6, 8).double()}, TypeError, "q must be float32, bfloat16, float16, got float64"),
        ({"k": torch.randn(1, 2, 7, 8).half()}, TypeError, "k must be float32, got float16"),
        ({"v": torch.randn(1, 2, 7, 8).half()}, TypeError, "v must be float32, got float16"),
        ({"q": torch.randn(4, 6, 8)}, ValueError, r"q must have shape \[B, H, Sq, D\], got \[4, 6, 8\]"),
        ({"k": torch.randn(2, 2, 7, 8)}, ValueError, r"k must have shape \[1, Hkv, Sk, 8\], got \[2, 2, 7, 8\]"),
        ({"k": torch.randn(1, 2, 7, 9)}, ValueError, r"k must have shape \[1, Hkv, Sk, 8\], got \[1, 2, 7, 9\]"),
        ({"v": torch.randn(1, 2, 6, 8)}, ValueError, r"v must have shape \[1, 2, 7, 8\], got \[1, 2, 6, 8\]"),
        ({"q": torch.randn(1, 3, 6, 8)}, ValueError, "heads of q must be a positive multiple of those of k, got 3, 2"),
        ({"q": torch.randn(1, 0, 6, 8)}, ValueError, "heads of q must be a positive multiple of those of k, got 0, 2"),
        (
            {"k": torch.randn(1, 0, 7, 8), "v": torch.randn(1, 0, 7, 8)},
            ValueError,
            "heads of q must be a positive multiple of those of k, got 4, 0",
        ),
        ({"k": torch.randn(1, 2, 7, 8, device="meta")}, ValueError, "k must be on cpu, got meta"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be between 0 and 1, got -0.1"),
        ({"key_padding_mask": torch.ones(1, 7)}, TypeError, "key_padding_mask must be bool, got float32"),
        (
            {"key_padding_mask": torch.ones(2, 7, dtype=torch.bool)},
            ValueError,
            r"key_padding_mask must have shape \[1, 7\], got \[2, 7\]",
        ),
        (
            {"key_padding_mask": torch.ones(1, 7, dtype=torch.bool, device="meta")},
            ValueError,
            "key_padding_mask must be on cpu, got meta",
        ),
        (
            {"q": torch.randn(1, 4, 6, 257), "k": torch.randn(1, 2, 7, 257), "v": torch.randn(1, 2, 7, 257)},
            NotImplementedError,
            "head dimension must be at most 256, got 257",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"^flash_attention: {message}"):
        flash_attention(**{**make((1, 4, 2, 6, 7, 8))[0], **change})


def test_unsupported_devices_say_why():
    inputs = {name: t.detach().to("meta") for name, t in make((1, 4, 2, 6, 7, 8))[0].items()}
    with pytest.raises(NotImplementedError, match="flash_attention: no backend works on meta"):
        flash_attention(**inputs)
