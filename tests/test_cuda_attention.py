"""csrc/cuda/flash_attention.cu at the edges of its tiles, on the host and on a GPU; and what it leaves to Triton."""

import math

import oracle
import pytest
import torch
from cuda_host import harness
from oracle import LAYOUTS

from fusetune.ops import flash_attention, flash_attention_reference
from fusetune.ops.philox import draw_seed, keep_mask

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["cuda-host", pytest.param("cuda-gpu", marks=pytest.mark.gpu)])
def cuda(request, monkeypatch):
    """Of the tensors; the CUDA kernels are forced."""
    if request.param == "cuda-host":
        request.getfixturevalue("cuda_on_host")
    monkeypatch.setenv("FUSETUNE_BACKEND", "cuda")
    return torch.device("cpu" if request.param == "cuda-host" else "cuda")


def make(shape, dtype=BF16, device="cpu"):
    """q, k, v and a gradient. shape: B, H, Hkv, Sq, Sk, D, Dv."""
    B, H, Hkv, Sq, Sk, D, Dv = shape
    sizes = (H, Sq, D), (Hkv, Sk, D), (Hkv, Sk, Dv), (H, Sq, Dv)
    q, k, v, do = (torch.randn(B, *size).to(device, dtype) for size in sizes)
    return {name: t.requires_grad_() for name, t in {"q": q, "k": k, "v": v}.items()}, do


def with_lse(attend):
    """`attend` with lse as one more column of its result, 0 for a query that sees no key."""

    def both(*tensors, **options):
        o, lse = attend(*tensors, **options, return_lse=True)
        return torch.cat([o, lse.masked_fill(lse.isinf(), 0)[..., None].to(o.dtype)], dim=-1)

    return both


def compare(inputs, do, **options):
    """Judges result, lse and gradients, those through lse included.

    With dropout the floor has the rounding of o to 16 bits, eps/2 |do_i| |o_i| in D_i: it reaches dq and dk whole where
    exact terms cancel, as of a query that sees one key.
    """
    exact = {name: t.detach().double() for name, t in inputs.items()}
    plain = {name: options[name] for name in options if name != "dropout_p"}
    floors = {}
    if p := options.get("dropout_p", 0):
        P = flash_attention_reference(**exact, **plain, seed=0).norm(dim=-1).max() / (1 - p)
        e = torch.finfo(do.dtype).eps / 2 * do.double().norm(dim=-1).max() * P * exact["q"].shape[-1] ** -0.5
        group = exact["q"].shape[1] // exact["k"].shape[1]
        floors = {"dq": (e * exact["k"].abs().max()).item(), "dk": (e * exact["q"].abs().max() * group).item()}
    do = torch.cat([do, torch.randn_like(do[..., :1])], dim=-1)
    return oracle.compare(
        with_lse(flash_attention), with_lse(flash_attention_reference), inputs, do, cancelled=floors, **options
    )


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("D", "Dv"), [(64, 64), (128, 128)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_kinds(cuda, dtype, D, Dv, dropout_p):
    compare(*make((1, 2, 1, 113, 203, D, Dv), dtype, cuda), causal=True, dropout_p=dropout_p)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (1, 65), (65, 1), (63, 64), (64, 63), (65, 129), (129, 65), (128, 128)])
def test_edges_of_tiles(cuda, Sq, Sk, causal):
    compare(*make((1, 1, 1, Sq, Sk, 64, 64), FP16, cuda), causal=causal)


@pytest.mark.parametrize(("D", "Dv"), [(8, 8), (40, 64), (80, 24), (64, 128), (128, 72)])
def test_head_dimensions(cuda, D, Dv):
    compare(*make((1, 2, 1, 35, 70, D, Dv), BF16, cuda), causal=True)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("window", [(10, 5), (0, 0), (70, None), (None, 3)])
def test_windows(cuda, window, align):
    compare(*make((1, 2, 1, 100, 140, 64, 64), BF16, cuda), window=window, align=align)
    compare(*make((1, 1, 1, 140, 100, 64, 64), BF16, cuda), window=window, align=align)


@pytest.mark.parametrize("kind", ["left", "right", "scattered", "none"])
def test_padded_keys_are_never_read(cuda, kind):
    """Whole blocks of them, and keys of a block: what lies there is NaN."""
    inputs, do = make((2, 2, 1, 40, 170, 64, 64), BF16, cuda)
    key = torch.arange(170, device=cuda)
    keep = {"left": key >= 70, "right": key < 70, "scattered": key % 3 > 0, "none": key < 0}[kind]
    keep = torch.stack([keep, key >= 0])
    expected = compare(inputs, do, key_padding_mask=keep, causal=True)
    padded = ~keep[:, None, :, None]
    for name in ("k", "v"):
        inputs[name] = inputs[name].detach().masked_fill(padded, math.nan).requires_grad_()
        assert not expected[f"d{name}"].masked_select(padded).any()
    got = oracle.gradients(lambda **t: flash_attention(**t, key_padding_mask=keep, causal=True), inputs, do)
    assert torch.equal(got["out"], expected["out"][..., :64])
    assert torch.equal(got["dv"], expected["dv"])
    assert not any(t.isnan().any() for t in got.values())


def test_gradients_of_queries_that_see_no_key_are_not_read(cuda):
    """Of the first five, causal, and of the next ten, whose keys are padding."""
    inputs, do = make((1, 2, 1, 70, 65, 64, 64), BF16, cuda)
    keep = torch.arange(65, device=cuda)[None] >= 10

    def run():
        return oracle.gradients(lambda **t: flash_attention(**t, causal=True, key_padding_mask=keep), inputs, do)

    expected = run()
    do[:, :, :15] = math.nan
    assert all(torch.equal(got, expected[name]) for name, got in run().items())


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_packed_sequences(cuda, dropout_p):
    """Members without queries, without keys, of one token and longer than a tile; tokens outside of all."""
    starts_q = torch.tensor([3, 3, 70, 70, 71, 201, 205], device=cuda)
    starts_k = torch.tensor([0, 9, 70, 72, 80, 190, 190], device=cuda)
    inputs, do = make((1, 2, 1, 210, 195, 64, 64), BF16, cuda)
    got = compare(inputs, do, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, causal=True, dropout_p=dropout_p)
    for name, outside in (("out", [0, 1, 2, 201, 204, 209]), ("dq", [0, 205]), ("dk", [0, 8, 70, 71, 194])):
        assert not got[name][:, :, outside].any()


def test_no_members(cuda):
    inputs, do = make((1, 2, 1, 5, 6, 64, 64), BF16, cuda)
    got = oracle.gradients(lambda **t: flash_attention(**t, cu_seqlens_q=torch.zeros(1, dtype=torch.int32)), inputs, do)
    assert not any(t.any() for t in got.values())


@pytest.mark.parametrize(("Sq", "Sk"), [(0, 6), (5, 0)])
def test_empty_tensors(cuda, Sq, Sk):
    compare(*make((2, 2, 1, Sq, Sk, 64, 64), BF16, cuda))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_at_any_address(cuda, layout):
    inputs, do = make((1, 2, 2, 21, 33, 64, 64), BF16, cuda)
    inputs = {name: LAYOUTS[layout](t.detach()).requires_grad_() for name, t in inputs.items()}
    compare(inputs, LAYOUTS[layout](do), causal=True)


@pytest.mark.parametrize("first", [0, 72])
def test_dropout_bit_for_bit(cuda, first):
    """Of the keys from `first` on, P . Z lies open where v is the identity."""
    B, H, Sq, Sk, p = 2, 2, 70, 200, 0.3
    q, k = torch.zeros(B, H, Sq, 64, dtype=BF16, device=cuda), torch.zeros(B, H, Sk, 64, dtype=BF16, device=cuda)
    v = torch.eye(Sk, device=cuda, dtype=BF16)[:, first : first + 128].expand(B, H, Sk, 128)
    torch.manual_seed(7)
    seed = int(draw_seed(cuda))
    torch.manual_seed(7)
    kept = flash_attention(q, k, v, dropout_p=p) > 0
    row = torch.arange(B * H)[:, None] * 2**32 + torch.arange(Sq)
    assert torch.equal(kept.cpu(), keep_mask(seed, row, Sk, p).view(B, H, Sq, Sk)[..., first : first + 128])


@pytest.mark.usefixtures("cuda_on_host")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_results_do_not_depend_on_the_order_of_threads(host, monkeypatch, dropout_p):
    monkeypatch.setenv("FUSETUNE_BACKEND", "cuda")
    inputs, do = make((1, 4, 2, 140, 150, 64, 64))

    def run():
        torch.manual_seed(0)
        return oracle.gradients(lambda **t: flash_attention(**t, causal=True, dropout_p=dropout_p), inputs, do)

    forward = run()
    with harness.reversed_order(host):
        backward = run()
    assert all(torch.equal(forward[name], backward[name]) for name in forward)


SIZES = torch.zeros(1, 2, 4, 64, dtype=BF16)
REFUSED = {
    "mask": ({"mask": torch.ones(4, 4, dtype=torch.bool)}, "mask must be None"),
    "bias": ({"bias": torch.zeros(4, 4)}, "bias must be None"),
    "relative_bias": ({"relative_bias": torch.zeros(2, 7)}, "relative_bias must be None"),
    "sinks": ({"sinks": torch.zeros(2)}, "sinks must be None"),
    "softcap": ({"softcap": 15.0}, "softcap must be None"),
    "scale": ({"scale": -1.0}, "scale must be positive, got -1.0"),
    "float32": ({name: SIZES.float() for name in "qkv"}, "q must be bfloat16 or float16, got float32"),
    "D": (dict.fromkeys("qk", SIZES[..., :20]), "D and Dv must be multiples of 8 from 8 to 128, got 20, 64"),
    "Dv": ({"v": torch.zeros(1, 2, 4, 136, dtype=BF16)}, "D and Dv must be multiples of 8 from 8 to 128, got 64, 136"),
}


@pytest.mark.usefixtures("cuda_on_host")
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(monkeypatch, change, message):
    monkeypatch.setenv("FUSETUNE_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match=f"^flash_attention: {message}.*, which Triton takes"):
        flash_attention(**{"q": SIZES, "k": SIZES, "v": SIZES} | change)
