"""fusetune.patch: its report and arguments, exact undo, copies and files, and PEFT's operations on a patched model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_model
from stock import (
    assert_close,
    assert_follows,
    assert_same,
    bert_batch,
    classes_and_configs,
    in_subprocess,
    llama_batch,
    make_bert,
    make_llama,
    make_lora,
    run,
)
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fusetune.nn.lora import LoraLinear
from fusetune.patching import PatchReport, patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_report() -> None:
    model = make_lora(make_bert(), target_modules=["query", "value"])
    report = patch(model)
    rows = {(e.module, e.count, e.replaced_by, e.backend) for e in report.replaced}
    assert rows == {
        ("transformers.BertSelfAttention", 2, "fusetune.ops.flash_attention", "cpu"),
        ("peft.Linear", 4, "fusetune.nn.lora.LoraLinear", "cpu"),
        ("transformers.BertSelfAttention", 2, "fusetune.ops.lora_linear_group of query, value", "cpu"),
    }
    assert report.left_alone == ()
    assert str(report).splitlines() == [
        "module                          count  replaced by                                     backend",
        "transformers.BertSelfAttention      2  fusetune.ops.flash_attention                    cpu",
        "peft.Linear                         4  fusetune.nn.lora.LoraLinear                     cpu",
        "transformers.BertSelfAttention      2  fusetune.ops.lora_linear_group of query, value  cpu",
    ]


BLOOM = "attention class BloomAttention does not call transformers' attention interface"


def test_report_of_what_is_left_alone() -> None:
    model = make_lora(
        transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)),
        target_modules=["query_key_value", "word_embeddings"],
    )
    model.base_model.model.extra = make_lora(nn.Sequential(nn.Conv1d(2, 2, 1)), target_modules=["0"])
    report = patch(model)
    assert [(e.module, e.op, e.replaced_by) for e in report.replaced] == [
        ("peft.Embedding", "lora", "fusetune.nn.lora.LoraEmbedding"),
        ("peft.Linear", "lora", "fusetune.nn.lora.LoraLinear"),
    ]
    assert {(e.module, e.op, e.reason) for e in report.left_alone} == {
        ("transformers.BloomAttention", "attention", BLOOM),
        ("peft.Conv1d", "lora", "its class is not in the tables"),
    }
    assert f"left alone because {BLOOM}" in str(report)
    assert model.config._attn_implementation == "eager"


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
    model.base_model.model.model.embed_tokens.merge()
    before = classes_and_configs(model)
    with pytest.raises(ValueError, match=r"^patch: all modules must be .*: 1 peft.Embedding because its adapter is m"):
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
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden_states, None

    second.model.layers[0].self_attn = Attention(config, 0)
    report = patch(both)
    assert [e.count for e in report.replaced] == [2]
    assert {e.reason for e in report.left_alone} == {
        "attention class Attention does not call transformers' attention interface"
    }
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
    assert (
        first.reason
        == second.reason
        == "Attention is not in the tables, and its file does more with the implementation's name"
    )
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
