"""flash_attention_reference, the oracle of all backends, against attention as others have written it: torch's, eager
attention of transformers, and loops; in float64, with its gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention import FP32, make, padding, visible
from oracle import gradients, to_double
from transformers import T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.t5.modeling_t5 import T5Attention

from fusetune.ops import flash_attention_reference
from fusetune.ops.flash_attention import alibi_bias, t5_relative_bias


def assert_same(found, expected, inputs, do, **tolerance):
    got, wanted = gradients(found, inputs, do), gradients(expected, inputs, do)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def exactly(found, expected, inputs, do):
    assert_same(found, expected, to_double(inputs), do.double(), rtol=1e-10, atol=1e-12)


def torchs(mask, scale=None):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    return attend


def ours(**options):
    return lambda **t: flash_attention_reference(**t, **options)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("window", [(None, None), (2, None), (None, 3), (1, 2), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Sq", "Sk"), [(7, 7), (5, 9), (9, 5)])
def test_windows(Sq, Sk, causal, window, align):
    options = {"causal": causal, "window": window, "align": align}
    seen = visible(Sq, Sk, **options)
    inputs, do = make((2, 4, 2, Sq, Sk, 6))
    do[:, :, ~seen.any(1)] = 0  # rows that torch gives other gradients
    exactly(ours(**options), lambda **t: torchs(seen)(**t) * seen.any(1)[:, None], inputs, do)
    assert not flash_attention_reference(**inputs, **options)[:, :, ~seen.any(1)].any()


@pytest.mark.parametrize(("Sq", "Sk"), [(7, 7), (5, 9), (9, 5)])
def test_top_left_is_torchs_causal(Sq, Sk):
    inputs, do = make((2, 2, 2, Sq, Sk, 6))

    def causal(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    exactly(ours(causal=True, align="top_left"), causal, inputs, do)


@pytest.mark.parametrize("shape", [(2, 4, 5, 9), (2, 1, 1, 9), (1, 4, 5, 1), (5, 9)], ids=str)
def test_masks(shape):
    inputs, do = make((2, 4, 2, 5, 9, 6))
    mask = torch.rand(shape) < 0.6
    mask[..., :1] = True
    exactly(ours(mask=mask), torchs(mask.expand(2, 4, 5, 9)), inputs, do)
    keep = padding("right", 2, 9)
    both = mask & keep[:, None, None, :]
    exactly(ours(mask=mask, key_padding_mask=keep, scale=0.7), torchs(both, 0.7), inputs, do)


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("hidden", [False, True])
def test_biases(name, hidden):
    inputs, do = make((2, 4, 2, 5, 9, 6))
    bias = torch.randn(2, 1, 5, 9)
    if hidden:
        bias[..., 3:7] = -math.inf
    inputs["bias"] = bias.requires_grad_()

    def stock(q, k, v, bias):
        return torchs(bias)(q, k, v)

    exactly(lambda q, k, v, bias: flash_attention_reference(q, k, v, **{name: bias}), stock, inputs, do)


def test_softcap_is_gemma2s():
    """Whose softmax is in float32."""
    inputs, do = make((2, 4, 2, 7, 7, 6))
    seen = visible(7, 7, causal=True, window=(3, None))
    mask = torch.zeros(7, 7).masked_fill(~seen, torch.finfo(FP32).min)
    module = SimpleNamespace(num_key_value_groups=2, training=False, head_dim=6)

    def stock(q, k, v):
        return gemma2_attention(module, q, k, v, mask, scaling=0.8, softcap=1.5)[0].transpose(1, 2)

    assert_same(ours(causal=True, window=(3, None), scale=0.8, softcap=1.5), stock, inputs, do)


def test_sinks_are_gpt_osss():
    inputs, do = make((2, 4, 2, 7, 7, 6))
    inputs["sinks"] = torch.randn(4).requires_grad_()
    mask = torch.zeros(7, 7, dtype=torch.float64).masked_fill(~visible(7, 7, causal=True), -math.inf)

    def stock(q, k, v, sinks):
        module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
        return gpt_oss_attention(module, q, k, v, mask, scaling=0.8)[0].transpose(1, 2)

    exactly(ours(causal=True, scale=0.8), stock, inputs, do)


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
def test_t5_bias_bucket_by_bucket(is_decoder, buckets, max_distance):
    N, H = 300, 2
    config = T5Config(
        d_model=8,
        d_kv=4,
        num_heads=H,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
        is_decoder=is_decoder,
    )
    attention = T5Attention(config, has_relative_attention_bias=True, **({"layer_idx": 0} if is_decoder else {}))
    table = attention.relative_attention_bias.weight
    with torch.no_grad():  # each bucket is its own number
        table.copy_(torch.arange(buckets)[:, None] + torch.tensor([0, 1000]))
    relative = t5_relative_bias(table, N, bidirectional=not is_decoder, max_distance=max_distance)
    expected = attention.compute_bias(N, N)[0]
    distance = torch.arange(N) - torch.arange(N)[:, None]
    assert torch.equal(relative[:, N - 1 + distance], expected)
    weights = torch.randn(expected.shape)
    found = [torch.autograd.grad((t * weights).sum(), table)[0] for t in (relative[:, N - 1 + distance], expected)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("Sq", "Sk"), [(7, 7), (5, 9), (9, 5)])
def test_relative_bias_is_aligned_as_positions_are(Sq, Sk):
    inputs, do = make((2, 4, 2, Sq, Sk, 6))
    N = 10
    relative = torch.randn(4, 2 * N - 1, dtype=torch.float64)
    for align in ("bottom_right", "top_left"):
        first = Sk - Sq if align == "bottom_right" else 0
        dense = torch.stack([relative[:, N - 1 - (i + first) :][:, :Sk] for i in range(Sq)], dim=1)
        exactly(ours(relative_bias=relative, align=align), torchs(dense[None]), inputs, do)


def test_alibi_is_blooms():
    """But for a constant of each row, of which softmax knows nothing."""
    inputs, do = make((1, 4, 4, 7, 7, 6))
    mask = torch.ones(1, 7)
    alibi = build_alibi_tensor(mask, 4, torch.float64).view(1, 4, 1, 7)
    slopes = alibi[0, :, 0, 1]
    stock = torchs(alibi.masked_fill(~visible(7, 7, causal=True), -math.inf))
    exactly(ours(causal=True, relative_bias=alibi_bias(slopes, 7)), stock, inputs, do)


def test_packed_sequences_are_calls_of_their_own():
    (q_lengths, k_lengths), options = ([3, 0, 5, 2], [4, 2, 3, 0]), {"causal": True, "window": (2, None)}
    q_starts, k_starts = (torch.tensor([1, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths))
    inputs, do = make((1, 4, 2, 13, 12, 6))

    def apart(q, k, v):
        parts = [torch.zeros_like(q[:, :, :1])]
        for m in range(4):
            (q0, q1), (k0, k1) = q_starts[m : m + 2].tolist(), k_starts[m : m + 2].tolist()
            seen = visible(q1 - q0, k1 - k0, **options)
            o = torchs(seen)(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1]) if k1 > k0 else 0 * q[:, :, q0:q1]
            parts.append(o.masked_fill(~seen.any(1)[:, None], 0))
        rest = q.shape[2] - int(q_starts[-1])
        return torch.cat([*parts, torch.zeros_like(q[:, :, :rest])], dim=2)

    exactly(ours(cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, **options), apart, inputs, do)


def test_log_sum_exp():
    inputs, _ = make((2, 4, 2, 9, 5, 6))
    inputs = to_double(inputs)
    _, lse = flash_attention_reference(**inputs, causal=True, scale=0.4, return_lse=True)
    logits = 0.4 * inputs["q"] @ inputs["k"].repeat_interleave(2, dim=1).mT
    expected = logits.masked_fill(~visible(9, 5, causal=True), -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (1, 2), "align": "top_left"},
    "padding": {"key_padding_mask": torch.tensor([[True, False, True, True, False], [False] * 5])},
    "mask": {"mask": torch.tensor([True, False, True, True, False]).repeat(4, 1).tril(2)},
    "softcap": {"softcap": 0.7},
    "dropout": {"dropout_p": 0.3, "seed": 3},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("extra", [(), ("bias",), ("relative_bias", "sinks")], ids=str)
def test_gradients(feature, extra):
    inputs, _ = make((2, 2, 1, 4, 5, 3, 2))
    shapes = {"bias": (2, 1, 4, 5), "relative_bias": (2, 11), "sinks": (2,)}
    inputs |= {name: torch.randn(shapes[name]).requires_grad_() for name in extra}

    def attend(*tensors):
        o, lse = flash_attention_reference(
            **dict(zip(inputs, tensors, strict=True)), **FEATURES[feature], return_lse=True
        )
        return o, lse.clamp(min=-100)

    assert torch.autograd.gradcheck(attend, tuple(to_double(inputs).values()))


def test_gradients_of_packed_sequences():
    inputs, _ = make((1, 2, 1, 6, 7, 3))
    inputs["relative_bias"] = torch.randn(2, 13).requires_grad_()
    starts = {"cu_seqlens_q": torch.tensor([0, 2, 2, 5]), "cu_seqlens_k": torch.tensor([1, 4, 6, 7])}

    def attend(*tensors):
        return flash_attention_reference(
            **dict(zip(inputs, tensors, strict=True)), causal=True, dropout_p=0.2, seed=1, **starts
        )

    assert torch.autograd.gradcheck(attend, tuple(to_double(inputs).values()))
