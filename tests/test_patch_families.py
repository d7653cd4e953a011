"""A tiny model of each family follows stock: logits, losses and gradients, and greedy decoding token by token."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from stock import NO_DROPOUT, SIZES, assert_close, assert_follows, assert_same, bert_batch, llama_batch, padding_mask
from torch import Tensor, nn

from fusetune import ops
from fusetune.nn import flash_attention
from fusetune.patching import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")

VISION = {name: size for name, size in SIZES.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 4}


def run(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits where there are tokens, and the gradients of the loss."""
    model.zero_grad()
    torch.manual_seed(3)
    out = model(**batch)
    (logits,) = (out[name] for name in ("logits", "logits_per_image", "last_hidden_state") if name in out)
    weight = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (out.loss if out.get("loss") is not None else (weight * logits).sum()).backward()
    logits = logits.detach()
    if logits.dim() == 3 and "attention_mask" in batch and batch["attention_mask"].shape == logits.shape[:2]:
        logits = logits[batch["attention_mask"].bool()]
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model: Any, batches: list[dict[str, Any]], expected: str, name: str = "fusetune") -> None:
    for batch in batches:
        stock = run(model, batch)
        report = patch(model, strict=True)
        assert {e.module for e in report.replaced} == {f"transformers.{expected}"}
        assert model.config._attn_implementation == name
        ours = run(model, batch)
        assert_follows(ours, stock)
        assert_same(run(model, batch), ours)
        unpatch(model)
        assert_same(run(model, batch), stock)


def decoder(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    sizes["max_position_embeddings"] = 64
    if name in ("Gemma", "Gemma2", "Gemma3", "GptOss", "Qwen3", "Qwen3Moe"):
        sizes["head_dim"] = 16
    if name in ("GptOss", "Mixtral", "Qwen2Moe", "Qwen3Moe"):
        sizes |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if name == "SmolLM3":
        options["no_rope_layer_interval"] = 2
    if name == "StableLm":
        options["partial_rotary_factor"] = 0.5
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    return getattr(transformers, f"{name}ForCausalLM")(config(**sizes, **options))


def decoder_batch(padding: str) -> dict[str, Any]:
    batch = llama_batch("none" if padding == "packed" else padding)
    if padding == "packed":
        batch["position_ids"] = torch.tensor([[*range(5), *range(6)], [*range(9), 0, 1], [*range(11)]])
        batch["use_cache"] = False
    if padding == "left":  # a first token is predicted from a query that sees no key
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"].cumsum(1) == 1, -100)
    return batch


DECODERS = "Cohere Cohere2 Gemma Gemma2 Gemma3 GptOss Granite Mistral Mixtral Olmo2 Phi Phi3 Qwen2 Qwen2Moe Qwen3"
WINDOWED = "Cohere2 Gemma2 Gemma3 GptOss Mistral Mixtral Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe SmolLM3"


@pytest.mark.parametrize("name", [*DECODERS.split(), "Qwen3Moe", "SmolLM3", "StableLm"])
def test_decoders(name: str) -> None:
    model = decoder(name, **({"sliding_window": None} if name in ("Mistral", "Mixtral") else {}))
    check(model, [decoder_batch(padding) for padding in ("none", "right", "left", "packed")], f"{name}Attention")


@pytest.mark.parametrize("name", WINDOWED.split())
def test_windows_shorter_than_the_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch)
    model = decoder(name, sliding_window=4, use_sliding_window=True, max_window_layers=1)
    check(model, [decoder_batch(padding) for padding in ("none", "right", "left", "packed")], f"{name}Attention")
    assert (3, 0) in [call.get("window") for call in calls]
    assert not any("mask" in call for call in calls)


def record(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of each call of the op."""
    calls = []

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        return ops.flash_attention(*args, **options)

    monkeypatch.setattr(flash_attention, "ops", SimpleNamespace(flash_attention=spy))
    return calls


def test_packed_sequences_equal_separate_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch)
    model = decoder("Mistral", sliding_window=3).eval()
    patch(model)
    ids = torch.randint(2, 97, (1, 12))
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert calls[0]["cu_seqlens_q"].tolist() == [0, 5, 12]
    for a, b in ((0, 5), (5, 12)):
        assert_close(packed[:, a:b], model(input_ids=ids[:, a:b], use_cache=False).logits)
    # as transformers' DataCollatorWithFlattening says it for flash attention
    told = {f"cu_seq_lens_{x}": torch.tensor([0, 5, 12], dtype=torch.int32) for x in "qk"}
    told |= {f"max_length_{x}": 7 for x in "qk"}
    assert_close(model(input_ids=ids, position_ids=positions, use_cache=False, **told).logits, packed)
    llama = decoder("Llama").eval()
    patch(llama)
    assert_close(
        llama(input_ids=ids, position_ids=positions, **told).logits,
        llama(input_ids=ids, position_ids=positions, use_cache=False).logits,
    )


T5 = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4, "vocab_size": 97, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
BART = {"d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0, "vocab_size": 97}
BART |= {"decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def sequence_to_sequence(name: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = T5 if "T5" in name else BART
    if name == "Whisper":
        sizes = {**sizes, "max_source_positions": 20, "max_target_positions": 32, "num_mel_bins": 8}
    elif "Bart" in name:
        sizes = {**sizes, "max_position_embeddings": 64}
    model = getattr(transformers, f"{name}ForConditionalGeneration")(getattr(transformers, f"{name}Config")(**sizes))
    model.generation_config.forced_eos_token_id = None
    return model


def source(name: str, padding: str) -> dict[str, Tensor]:
    torch.manual_seed(2)
    if name == "Whisper":
        return {"input_features": torch.randn(3, 8, 40)}
    return {"input_ids": torch.randint(2, 97, (3, 11)), **padding_mask(padding, 3, 11)}


def targets(padding: str) -> dict[str, Tensor]:
    labels = torch.randint(2, 97, (3, 7))
    if padding != "right":
        return {"labels": labels}
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])
    return {"labels": labels.masked_fill(mask == 0, -100), "decoder_attention_mask": mask}


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5", "Bart", "MBart", "Whisper"])
def test_encoder_decoders(name: str) -> None:
    paddings = ("none", "right") if name == "Whisper" else ("none", "right", "left")
    batches = [{**source(name, padding), **targets(padding)} for padding in paddings]
    check(sequence_to_sequence(name), batches, f"{name}Attention")


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
def test_biases_of_t5(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[H, 2N - 1] in each layer of both stacks, none in cross attention, and gradients through checkpoints."""
    model = sequence_to_sequence(name)
    batch = {**source(name, "right"), **targets("right")}
    stock = run(model, batch)
    patch(model, strict=True)
    calls = record(monkeypatch)
    ours = run(model, batch)
    assert not any("bias" in call for call in calls)
    shapes = [list(call["relative_bias"].shape) if "relative_bias" in call else None for call in calls]
    assert shapes == [[4, 21], [4, 21], [4, 13], None, [4, 13], None]
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        checkpointed = run(model, batch)
        assert_follows(checkpointed, stock)
        assert_close(checkpointed[0], ours[0])
    model.gradient_checkpointing_disable()
    model.resize_token_embeddings(105)
    ours = run(model, batch)
    unpatch(model)
    assert_follows(ours, run(model, batch))


def test_a_bias_of_t5_with_an_adapter() -> None:
    model = get_peft_model(
        sequence_to_sequence("T5"), LoraConfig(target_modules=["relative_attention_bias"], init_lora_weights=False)
    )
    batch = {**source("T5", "right"), **targets("right")}
    stock = run(model, batch)
    patch(model, ops=["attention"], strict=True)
    assert_follows(run(model, batch), stock)


def _encoders() -> dict[str, tuple[Callable[[], Any], list[dict[str, Any]], str]]:
    t = transformers
    texts = [bert_batch(padding) for padding in ("none", "right", "left")]
    sizes = {**SIZES, **NO_DROPOUT, "max_position_embeddings": 64}
    distilbert = {"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "vocab_size": 97, "dropout": 0.0}
    distilbert |= {"attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    gpt2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64, "resid_pdrop": 0.0}
    gpt2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": True}
    opt = {"hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    opt |= {"max_position_embeddings": 64, "word_embed_proj_dim": 48, "dropout": 0.0}
    neox = {**SIZES, "max_position_embeddings": 64, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    clip = {"text_config": {**SIZES, "max_position_embeddings": 20, "eos_token_id": 96}, "vision_config": VISION}
    wave = {**VISION, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "layerdrop": 0.0}
    wave |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}
    wave |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
    wave |= {"feat_extract_norm": "layer"}
    decoders = [decoder_batch(padding) for padding in ("none", "right", "left")]
    pixels = torch.randn(3, 3, 16, 16)
    heard = torch.ones(2, 400, dtype=torch.long)
    heard[1, 260:] = 0
    pairs = [{**batch, "pixel_values": pixels, "return_loss": True} for batch in texts[:2]]
    for batch in pairs:
        del batch["labels"]
    return {
        "Albert": (lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**sizes)), texts, "AlbertAttention"),
        "DistilBert": (
            lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(**distilbert)),
            texts,
            "DistilBertSelfAttention",
        ),
        "GPT2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2)), decoders, "GPT2Attention"),
        "GPTNeoX": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**neox)), decoders, "GPTNeoXAttention"),
        "OPT": (lambda: t.OPTForCausalLM(t.OPTConfig(**opt)), decoders, "OPTAttention"),
        "ViT": (
            lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, hidden_dropout_prob=0.0)),
            [{"pixel_values": pixels, "labels": torch.tensor([0, 1, 0])}],
            "ViTAttention",
        ),
        "CLIP": (lambda: t.CLIPModel(t.CLIPConfig(**clip, projection_dim=16)), pairs, "CLIPAttention"),
        "Wav2Vec2": (
            lambda: t.Wav2Vec2Model(t.Wav2Vec2Config(**wave)),
            [{"input_values": torch.randn(2, 400)}, {"input_values": torch.randn(2, 400), "attention_mask": heard}],
            "Wav2Vec2Attention",
        ),
    }


@pytest.mark.parametrize("name", ["Albert", "DistilBert", "GPT2", "GPTNeoX", "OPT", "ViT", "CLIP", "Wav2Vec2"])
def test_other_families(name: str) -> None:
    torch.manual_seed(0)
    make, batches, expected = _encoders()[name]
    check(make(), batches, expected)


def test_classes_in_no_table_get_the_masks_of_sdpa() -> None:
    for name, options in (("Starcoder2", {}), ("Olmo3", {"sliding_window": 4})):
        model = decoder(name, **options)
        batches = [decoder_batch(padding) for padding in ("none", "right", "left", "packed")]
        check(model, batches, f"{name}Attention", "fusetune_general")
    sizes = {**SIZES, "local_attention": 4, "global_attn_every_n_layers": 2, "max_position_embeddings": 64}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    torch.manual_seed(0)
    model = transformers.ModernBertForSequenceClassification(transformers.ModernBertConfig(**sizes))
    check(model, [bert_batch(padding) for padding in ("none", "right")], "ModernBertAttention", "fusetune_general")


def test_classes_in_no_table_that_are_left_alone() -> None:
    """Models that do not say that they take other attention functions, and those that ask for one by its name."""

    class Unsure(transformers.Starcoder2ForCausalLM):
        _supports_attention_backend = False

    model = Unsure(transformers.Starcoder2Config(**SIZES, num_key_value_heads=2))
    assert {e.reason for e in patch(model).left_alone} == {
        "Unsure is not in the tables, and does not say that it supports other attention functions"
    }
    config = transformers.DecisionTransformerConfig(hidden_size=16, n_layer=1, n_head=2, state_dim=2, act_dim=2)
    assert {e.reason for e in patch(transformers.DecisionTransformerModel(config)).left_alone} == {
        "DecisionTransformerGPT2Attention is not in the tables, and its file does more with the implementation's name"
    }


DECODED = "GPT2 Gemma2 GptOss Mistral Qwen3 T5 MT5 UMT5 Bart Whisper"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODED.split())
def test_greedy_decoding(name: str, cache: str) -> None:
    """Beyond the window, and with keys of a static cache behind the last query."""
    encoder_decoder = name in ("T5", "MT5", "UMT5", "Bart", "Whisper")
    if encoder_decoder:
        model, batch = sequence_to_sequence(name), source(name, "right")
    elif name == "GPT2":
        torch.manual_seed(0)
        model, batch = _encoders()[name][0](), llama_batch("left")
    else:
        model, batch = decoder(name, sliding_window=4), llama_batch("left")
    batch.pop("labels", None)
    options: dict[str, Any] = {"cache_implementation": cache, "disable_compile": True, "do_sample": False}
    options |= {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}

    def generate() -> Any:
        return model.eval().generate(**batch, **options, output_logits=True, return_dict_in_generate=True)

    stock = generate()
    patch(model, strict=True)
    ours = generate()
    assert torch.equal(ours.sequences, stock.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))


@pytest.mark.parametrize("name", ["Mistral", "T5"])
def test_compiled_without_graph_breaks(name: str) -> None:
    if name == "T5":
        model, batch = sequence_to_sequence("T5"), {**source("T5", "right"), **targets("right")}
    else:
        model, batch = decoder(name, sliding_window=4), decoder_batch("right")
    batch["use_cache"] = False
    patch(model)
    eager = run(model, batch)
    assert_follows(run(torch.compile(model, fullgraph=True, backend="aot_eager"), batch), _compiled(eager))
    torch._dynamo.reset()


def _compiled(result: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """With the names that parameters have in a compiled model."""
    return result[0], {f"_orig_mod.{name}": gradient for name, gradient in result[1].items()}


def test_pooling_by_a_module_of_torch() -> None:
    """SigLIP's head is a MultiheadAttention, beside the attention of its layers; it asks for weights."""
    torch.manual_seed(0)
    model: nn.Module = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    stock = run(model, batch)
    replaced = {e.module for e in patch(model, strict=True).replaced}
    assert replaced == {"transformers.SiglipAttention", "torch.MultiheadAttention"}
    assert_follows(run(model, batch), stock)
