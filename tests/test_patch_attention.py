"""Patched attention follows stock: gradients, masks, caches, dropout and checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from stock import (
    NO_DROPOUT,
    SIZES,
    assert_close,
    assert_follows,
    assert_same,
    bert_batch,
    llama_batch,
    make_bert,
    make_llama,
    make_lora,
    run,
)
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from fusetune.nn.flash_attention import Pattern, attention, attention_mask
from fusetune.ops import flash_attention_reference
from fusetune.patching import patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes", "full"])
def test_bert_gradients(padding: str, implementation: str) -> None:
    model = make_bert(attn_implementation=implementation)
    stock = run(model, bert_batch(padding))
    assert not patch(model, strict=True).left_alone
    assert_follows(run(model, bert_batch(padding)), stock)
    unpatch(model)
    assert_same(run(model, bert_batch(padding)), stock)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("heads", [4, 2, 1], ids=lambda n: f"kv_heads{n}")
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes", "full"])
def test_llama_gradients(padding: str, heads: int) -> None:
    model = make_llama(num_key_value_heads=heads)
    stock = run(model, llama_batch(padding))
    patch(model, strict=True)
    assert_follows(run(model, llama_batch(padding)), stock)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta", "Electra"])
def test_families_of_bert_as_encoder_and_decoder(name: str) -> None:
    config_class = getattr(transformers, f"{name}Config")
    sizes = {**SIZES, **NO_DROPOUT, "max_position_embeddings": 64}
    if name == "Electra":
        sizes["embedding_size"] = 48
    torch.manual_seed(0)
    encoder = getattr(transformers, f"{name}ForTokenClassification")(config_class(**sizes))
    batch = {**bert_batch("right"), "labels": torch.randint(0, 2, (3, 11))}
    stock = run(encoder, batch)
    assert [e.module for e in patch(encoder, strict=True).replaced] == [f"transformers.{name}SelfAttention"]
    assert_follows(run(encoder, batch), stock)

    decoder_class = "BertLMHeadModel" if name == "Bert" else f"{name}ForCausalLM"
    config = config_class(**sizes, is_decoder=True, add_cross_attention=True)
    decoder = getattr(transformers, decoder_class)(config)
    batch = {
        **llama_batch("left"),
        "encoder_hidden_states": torch.randn(3, 6, 48),
        "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3]),
    }
    stock = run(decoder, batch)
    report = patch(decoder, strict=True)
    assert {e.module for e in report.replaced} == {f"transformers.{name}{c}Attention" for c in ("Self", "Cross")}
    assert_follows(run(decoder, batch), stock)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences_follow_stock(use_cache: bool) -> None:
    model = make_llama()
    ids = torch.randint(2, 97, (2, 12))
    positions = torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": use_cache}
    stock = run(model, batch)
    patch(model)
    assert_follows(run(model, batch), stock)


def test_packed_sequences_do_not_see_each_other() -> None:
    model = make_llama().eval()
    patch(model)
    ids = torch.randint(2, 97, (1, 12))
    positions = torch.tensor([[*range(5), *range(7)]])
    first = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    ids[0, 2] = 50
    second = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(first[0, 5:], second[0, 5:])
    assert not torch.equal(first[0, 2:5], second[0, 2:5])


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate(padding: str, cache: str | None) -> None:
    model = make_llama().eval()
    batch = llama_batch(padding)
    del batch["labels"]
    cache_options = {"cache_implementation": cache, "disable_compile": True} if cache else {"use_cache": False}

    def generate() -> Any:
        options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(**batch, **options, **cache_options)

    stock = generate()
    patch(model)
    ours = generate()
    assert torch.equal(ours.sequences, stock.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_several_tokens_after_a_cache(cache_class: type, padding: str) -> None:
    model = make_llama().eval()
    batch = llama_batch(padding)
    ids, mask = batch["input_ids"], batch.get("attention_mask")

    def logits() -> Tensor:
        options = {"max_cache_len": 16} if cache_class is StaticCache else {}
        cache = cache_class(config=model.config, **options)
        chunks = []
        for start, end in ((0, 5), (5, 8), (8, 9), (9, 11)):
            seen = None if mask is None else mask[:, :end]
            chunks.append(model(input_ids=ids[:, start:end], attention_mask=seen, past_key_values=cache).logits)
        all_logits = torch.cat(chunks, 1)
        return all_logits if mask is None else all_logits[mask.bool()]

    with torch.no_grad():
        stock = logits()
        patch(model)
        assert_close(logits(), stock)


def test_mask_and_attention_follow_sdpa() -> None:
    """Each mask form, at each offset of queries and keys, against the same mask as [B, 1, Sq, Sk]."""
    torch.manual_seed(0)
    layer = nn.Module()
    B, H, D = 2, 2, 8
    padding = torch.ones(B, 9, dtype=torch.bool)
    padding[0, :3] = False
    padding[1, 6:] = False
    forms = set()
    for Sq, Sk, q_offset in ((9, 9, 0), (1, 9, 8), (4, 9, 5), (4, 9, 0), (1, 9, 3), (4, 9, torch.tensor([2]))):
        for function, causal in ((causal_mask_function, True), (bidirectional_mask_function, False)):
            for keys in (None, torch.ones_like(padding), padding, padding[:, :5]):
                for skip in (True, False):
                    arguments = {"batch_size": B, "q_length": Sq, "kv_length": Sk, "q_offset": q_offset}
                    arguments |= {"mask_function": function, "attention_mask": keys}
                    full = sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
                    mask = attention_mask(
                        **arguments, allow_is_causal_skip=skip and causal, allow_is_bidirectional_skip=skip
                    )
                    forms.add(_form(mask, Sk))
                    if not skip:
                        assert isinstance(mask, Tensor)
                        assert mask.shape == full.shape
                    layer.is_causal = causal
                    q, k, v = torch.randn(B, H, Sq, D), torch.randn(B, H, Sk, D), torch.randn(B, H, Sk, D)
                    expected, _ = sdpa_attention_forward(layer, q, k, v, full)
                    actual, _ = attention(layer, q, k, v, mask)
                    assert actual.is_contiguous()
                    assert_close(actual, expected)
    assert forms == {None, 2, 4, "keys", Pattern}


def _form(mask: Tensor | Pattern | None, Sk: int) -> Any:
    if not isinstance(mask, Tensor):
        return mask if mask is None else Pattern
    return "keys" if mask.shape[1:] == (1, 1, Sk) else mask.dim()


def test_windows_and_chunks_follow_sdpa() -> None:
    """At each offset of queries and keys, with a cache that has dropped keys among them."""
    torch.manual_seed(0)
    layer = nn.Module()
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :3] = False
    window = transformers.MistralConfig(sliding_window=4)
    chunks = transformers.Llama4TextConfig(attention_chunk_size=4)
    seen = set()
    for Sq, Sk, offset in ((9, 9, 0), (4, 4, 0), (1, 9, 0), (1, 4, 5), (4, 9, 0), (3, 6, 6), (4, 9, torch.tensor(0))):
        q_offset = offset + (Sk - Sq)
        for keys, left in ((None, [0, 0]), (padding, [3, 0])):
            for function, config, causal in (
                (sliding_window_causal_mask_function(4), window, True),
                (sliding_window_bidirectional_mask_function(4), window, False),
                (chunked_causal_mask_function(4, torch.tensor(left)), chunks, True),
            ):
                arguments: dict[str, Any] = {"batch_size": 2, "q_length": Sq, "kv_length": Sk, "q_offset": q_offset}
                arguments |= {"kv_offset": int(offset), "mask_function": function, "attention_mask": keys}
                options = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
                mask = attention_mask(**arguments, **options, local_size=4, config=config)
                full = sdpa_mask(**arguments, allow_is_causal_skip=False)
                seen.add(_form(mask, Sk))
                layer.is_causal = causal
                q, k, v = torch.randn(2, 2, Sq, 8), torch.randn(2, 2, Sk, 8), torch.randn(2, 2, Sk, 8)
                assert_close(attention(layer, q, k, v, mask)[0], sdpa_attention_forward(layer, q, k, v, full)[0])
                q, k, v = q.double(), k.double(), v.double()  # by way of sdpa
                assert_close(attention(layer, q, k, v, mask)[0], sdpa_attention_forward(layer, q, k, v, full)[0])
    assert seen >= {Pattern, 4}


def test_masks_of_a_user() -> None:
    """Boolean and additive, [1|B, 1, Sq, Sk]."""
    model = make_llama()
    blocks = torch.tensor([0] * 6 + [1] * 5)
    boolean = (blocks[:, None] == blocks)[None, None].expand(3, 1, 11, 11)
    additive = torch.zeros(3, 1, 11, 11).masked_fill(~boolean, -1e4)
    for mask in (boolean, additive, additive[:1]):
        batch = {**llama_batch(), "attention_mask": mask}
        stock = _gradients(model, batch)
        with patched(model, strict=True):
            assert_follows(_gradients(model, batch), stock)


def _gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_attention_never_ignores_an_argument() -> None:
    torch.manual_seed(0)
    layer = nn.Module()
    layer.is_causal = True
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    with pytest.raises(NotImplementedError, match=r"^attention: output_attentions must be False"):
        attention(layer, q, k, v, None, output_attentions=True)
    sinks, bias = torch.randn(2), torch.randn(1, 2, 6, 6)
    keys = torch.ones(1, 6, dtype=torch.bool)
    keys[0, 2] = False

    def expected(**options: Any) -> Tensor:
        return flash_attention_reference(q, k, v, **options).transpose(1, 2)

    for mask, told in ((None, {}), (keys, {"key_padding_mask": keys}), (Pattern(2, 0), {"window": (2, 0)})):
        told |= {"causal": True}
        assert_close(attention(layer, q, k, v, mask, softcap=2.0)[0], expected(**told, softcap=2.0))
        assert_close(attention(layer, q, k, v, mask, s_aux=sinks)[0], expected(**told, sinks=sinks))
        assert_close(attention(layer, q, k, v, mask, position_bias=bias)[0], expected(**told, bias=bias))
    with pytest.raises(NotImplementedError, match=r"^attention: s_aux must be None for torch.float64 on cpu$"):
        attention(layer, q.double(), k.double(), v.double(), None, s_aux=sinks)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = expected(causal=True, cu_seqlens_q=starts)
    assert_close(attention(layer, q, k, v, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts)[0], packed)
    with pytest.raises(NotImplementedError, match="packed sequences must come without attention_mask, got 2 in cu_seq"):
        attention(layer, q, k, v, keys, cu_seq_lens_q=starts)


def test_packed_sequences_of_several_rows() -> None:
    """Also in dtypes without a kernel, where they become a mask."""
    layer = nn.Module()
    q, k, v = (torch.randn(2, 2, 6, 8) for _ in range(3))
    starts = torch.tensor([0, 2, 6, 9, 12], dtype=torch.int32)
    for left in (None, 1):
        expected = [
            flash_attention_reference(x[0], x[1], x[2], window=(left, 0)).transpose(1, 2)
            for row, (a, b) in ((0, (0, 2)), (0, (2, 6)), (1, (0, 3)), (1, (3, 6)))
            for x in [[t[row : row + 1, :, a:b] for t in (q, k, v)]]
        ]
        rows = torch.cat([torch.cat(expected[:2], 1), torch.cat(expected[2:], 1)])
        mask = Pattern(left, 0, starts=starts)
        assert_close(attention(layer, q, k, v, mask)[0], rows)
        assert_close(attention(layer, q.double(), k.double(), v.double(), mask)[0], rows.double())


def test_attention_without_a_mask_and_with_a_scale_follows_sdpa() -> None:
    layer = nn.Module()
    for causal in (False, True):
        layer.is_causal = causal
        for Sq, Sk in ((6, 6), (1, 6), (4, 6)):
            q, k, v = torch.randn(2, 4, Sq, 8), torch.randn(2, 4, Sk, 8), torch.randn(2, 4, Sk, 8)
            for options in ({}, {"scaling": 1.0}, {"is_causal": not causal}):
                expected, _ = sdpa_attention_forward(layer, q, k, v, None, **options)
                assert_close(attention(layer, q, k, v, None, **options)[0], expected)


def test_attention_of_dtypes_and_shapes_without_a_kernel_is_sdpa() -> None:
    layer = nn.Module()
    layer.is_causal = True
    keys = torch.ones(2, 5, dtype=torch.bool)
    keys[0, :2] = False
    full = sdpa_mask(2, 5, 5, attention_mask=keys)
    for D, Dv, dtype in ((8, 8, torch.float64), (320, 320, torch.float32), (8, 264, torch.float32)):
        q, k, v = (torch.randn(2, 2, 5, d, dtype=dtype) for d in (D, D, Dv))
        assert torch.equal(attention(layer, q, k, v, keys)[0], sdpa_attention_forward(layer, q, k, v, full)[0])


def test_output_attentions_is_refused() -> None:
    model = make_bert(attn_implementation="eager")
    patch(model)
    with pytest.raises(NotImplementedError, match=r"output_attentions must be False, got True; fusetune\.unpatch"):
        model(**bert_batch(), output_attentions=True)
    unpatch(model)
    assert len(model(**bert_batch(), output_attentions=True).attentions) == 2
    model.config.output_attentions = True
    assert [e.reason for e in patch(model).left_alone] == ["the config of its model asks for output_attentions"]


def test_attention_dropout_is_drawn_from_the_seed() -> None:
    model = make_bert(attention_probs_dropout_prob=0.3)
    patch(model)
    first = run(model, bert_batch("right"))
    assert_same(run(model, bert_batch("right")), first)
    other = run(model, bert_batch("right"), seed=4)
    assert all(not torch.equal(other[1][name], first[1][name]) for name in first[1])
    model.eval()
    evaluated = run(model, bert_batch("right"))
    unpatch(model)
    assert_follows(evaluated, run(model, bert_batch("right")))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [make_bert, make_llama])
def test_gradient_checkpointing_replays_dropout(make: Callable[..., Any], use_reentrant: bool) -> None:
    if make is make_bert:
        model, batch, targets = (
            make(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2),
            bert_batch("right"),
            "query",
        )
    else:
        model, batch, targets = make(attention_dropout=0.3, use_cache=False), llama_batch("left"), "q_proj"
    model = make_lora(model, target_modules=[targets], lora_dropout=0.25)
    model.enable_input_require_grads()
    patch(model, strict=True)
    plain = run(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same(run(model, batch), plain)


def test_gradient_checkpointing_follows_stock() -> None:
    model = make_lora(make_llama(use_cache=False), target_modules="all-linear")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    stock = run(model, llama_batch("left"))
    patch(model, strict=True)
    assert_follows(run(model, llama_batch("left")), stock)
