"""QLoRA: the layer over quantised weights, its checkpoints, PEFT around it, and `fusetune finetune --quantize`."""

import copy
import importlib.util
import json

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_quantize import FORMATS, assert_same
from torch import nn

import fusetune
from fusetune import ops
from fusetune.finetune import UserError, main
from fusetune.nn.quantize import (
    QuantizedLinear,
    dequantize_linears,
    quantize_linears,
    quantized_size,
    quantized_weight,
    quantizer,
)

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes as it computes on most CPUs; where they have AVX512-BF16, it would round activations to bfloat16."""
    package = pytest.importorskip("bitsandbytes", reason="bitsandbytes, which the dev extra has, is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package.nn.modules, "has_avx512bf16", lambda: False)
        yield package


# The layer


@pytest.mark.parametrize("quantize", FORMATS)
def test_layer_reads_and_writes_its_weight(quantize):
    linear = nn.Linear(96, 40).requires_grad_(False)
    layer = QuantizedLinear.from_linear(linear, quantize)
    before = layer.weight.data.clone()
    assert_same([before], [ops.dequantize(quantizer(quantize)(linear.weight), FP32)])
    delta = torch.randn(40, 96)
    layer.weight.data += delta
    assert_same(layer.quantized, quantizer(quantize)(before + delta))
    for change in (
        lambda: layer.weight.add_(1),
        lambda: layer.weight.copy_(delta),
        lambda: layer.weight.__setitem__(0, 1),
    ):
        with pytest.raises(NotImplementedError, match=r"must be changed by assignment to weight.data"):
            change()
    with pytest.raises(ValueError, match=r"weight must have shape \[40, 96\], got \[96, 40\]"):
        layer.weight.data = delta.T


@pytest.mark.parametrize("quantize", FORMATS)
def test_layer_keeps_its_scales_when_it_is_cast(quantize):
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40), quantize)
    before = copy.deepcopy(layer).quantized
    layer.to(BF16)
    assert layer.bias.dtype == BF16
    assert_same(layer.quantized, before)
    assert layer(torch.randn(3, 96, dtype=BF16)).dtype == BF16


@pytest.mark.parametrize("quantize", FORMATS)
def test_layer_under_autocast(quantize):
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40), quantize)
    with torch.autocast("cpu", BF16):
        y = layer(torch.randn(3, 96, requires_grad=True))
    assert y.dtype == BF16
    y.float().sum().backward()


def test_layer_loads_a_float_weight_and_says_what_is_wrong():
    linear, layer = nn.Linear(96, 40), QuantizedLinear(96, 40)
    layer.load_state_dict(linear.state_dict())
    assert_same(layer.quantized, ops.quantize_nf4(linear.weight))
    good = layer.state_dict()
    for broken, message in (
        ({key: value for key, value in good.items() if key != "weight"}, "Missing key.*weight"),
        (good | {"other": torch.zeros(1)}, "Unexpected key.*other"),
        ({key: value for key, value in good.items() if "quant_state" not in key}, "one weight.quant_state must come"),
        (
            {key: value for key, value in good.items() if key != "weight.absmax"},
            "weight.absmax must come with the codes",
        ),
        (good | {"weight.quant_map": torch.linspace(-1, 1, 16)}, "must be that of NF4"),
        (good | {"weight": good["weight"][1:]}, "codes must have shape"),
        (QuantizedLinear(40, 96).state_dict() | {"bias": good["bias"]}, r"must have shape \[40, 96\], got \[96, 40\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            QuantizedLinear(96, 40).load_state_dict(broken)


@pytest.mark.parametrize("quantize", FORMATS)
def test_nothing_is_saved_for_backward_but_the_codes(quantize):
    layer, saved = QuantizedLinear.from_linear(nn.Linear(96, 40), quantize), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(torch.randn(300, 96, requires_grad=True))
    kept = {t.data_ptr() for t in layer.quantized[:3] if t is not None}
    assert {t.data_ptr() for t in saved} == kept


def quantized_bert(quantize):
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny.bert_config(hidden_size=128, intermediate_size=512))
    quantize_linears(model.bert, quantize)
    return model


def test_memory_of_nf4():
    """Parameters and buffers of the linear layers, of which a bfloat16 weight has 2 bytes an element."""
    model = quantized_bert("nf4")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    held = sum(t.nbytes for layer in layers for t in layer.buffers())
    elements = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 13
    assert quantized_size(model) == (13, elements, 4 * elements, held)
    assert held <= 0.30 * 2 * elements


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_step_of_qlora_is_that_of_the_dequantised_model(quantize):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    plain = quantized_bert(quantize)
    quantized = copy.deepcopy(plain)
    dequantize_linears(plain)
    found = []
    for model in (quantized, plain):
        torch.manual_seed(1)
        model = get_peft_model(model.eval(), config)
        tokens = torch.arange(12).view(2, 6) + 4
        loss = model(input_ids=tokens, labels=torch.tensor([0, 1])).loss
        loss.backward()
        found.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}
        )
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(
            found[0][name], found[1][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_into_the_quantised_weight(quantize, options, safe):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options)
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(QuantizedLinear.from_linear(nn.Linear(96, 40), quantize)), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(0.1) if "magnitude" not in name else None
    before = layer.base_layer.weight.data.clone()
    x = torch.randn(3, 96)
    expected = model(x)
    delta = layer.get_delta_weight("default")
    w = before + delta
    if options:
        norm = torch.linalg.norm(w, dim=1)
        w = (layer.lora_magnitude_vector["default"].weight / norm)[:, None] * w
    layer.merge(safe_merge=safe)
    torch.testing.assert_close(layer.base_layer.weight.data, ops.dequantize(quantizer(quantize)(w.detach()), FP32))
    assert layer.merged
    error = (model(x) - expected).abs().max()
    assert error <= 0.15 * expected.abs().max()  # requantised
    if not options:
        layer.unmerge()
        torch.testing.assert_close(
            layer.base_layer.weight.data,
            ops.dequantize(quantizer(quantize)(ops.dequantize(quantizer(quantize)(w), FP32) - delta), FP32),
        )
    assert isinstance(model.merge_and_unload()[0], QuantizedLinear)


def test_which_layers_are_quantised():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"c": nn.Linear(8, 8)}), "head": nn.Linear(8, 8)})
    model["tied"], model["embedding"] = shared, nn.Embedding(8, 8)
    model["embedding"].weight = shared.weight
    model["attention"] = nn.MultiheadAttention(8, 2)  # its projection is a subclass of nn.Linear
    quantize_linears(model, "nf4", skip=[model["head"]])
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == {"a", "b.c"}
    dequantize_linears(model)
    assert not quantized_size(model).layers
    assert type(model["b"]["c"]) is nn.Linear


# Checkpoints of bitsandbytes


def bnb_layer(bnb, quantize, linear):
    """bitsandbytes' layer with the weight of `linear`."""
    K, N = linear.in_features, linear.out_features
    if quantize == "nf4":
        layer = bnb.nn.Linear4bit(K, N, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.load_state_dict(copy.deepcopy(linear.state_dict()))
    return layer.to("cpu")


@pytest.mark.parametrize("quantize", FORMATS)
def test_checkpoint_of_bitsandbytes_loads_here(bnb, quantize, tmp_path):
    theirs = bnb_layer(bnb, quantize, nn.Linear(96, 40))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    for start in FORMATS:  # of the layer that loads
        ours = QuantizedLinear(96, 40, quantize=start)
        ours.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
        assert ours.quantize == quantize
        assert_same(ours.quantized, quantized_weight(theirs))
        again = ours.state_dict()
        assert again.keys() == theirs.state_dict().keys()
        for key, tensor in theirs.state_dict().items():
            assert_same([again[key]], [tensor])


@pytest.mark.parametrize("quantize", FORMATS)
def test_checkpoint_of_ours_loads_in_bitsandbytes(bnb, quantize, tmp_path):
    linear = nn.Linear(128, 40)
    ours = QuantizedLinear.from_linear(linear, quantize)
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    saved = load_file(tmp_path / "ours.safetensors")
    if quantize == "nf4":
        theirs = bnb.nn.Linear4bit(128, 40, quant_type="nf4")
        stats = {key: value for key, value in saved.items() if key.startswith("weight.")}
        theirs.weight = bnb.nn.Params4bit.from_prequantized(saved["weight"], stats, device="cpu", module=theirs)
        theirs.bias.data = saved["bias"]
        x = torch.randn(3, 128)
        torch.testing.assert_close(theirs(x), ours(x))
    else:
        theirs = bnb_layer(bnb, quantize, nn.Linear(128, 40))
        theirs.load_state_dict(saved)
    assert_same(quantized_weight(theirs), ours.quantized)


@pytest.mark.parametrize("quantize", FORMATS)
def test_a_layer_of_bitsandbytes_is_seen_without_a_copy(bnb, quantize):
    theirs = bnb_layer(bnb, quantize, nn.Linear(128, 40))
    q = quantized_weight(theirs)
    assert q.codes.data_ptr() == theirs.weight.data_ptr()
    x = torch.randn(5, 128)
    if quantize == "nf4":
        torch.testing.assert_close(ops.quantized_linear(x, q, theirs.bias), theirs(x))
        assert quantized_weight(theirs).nested is q.nested  # made once
    else:
        theirs(x)  # moves the codes and the scales
        assert_same(quantized_weight(theirs), q)


def test_what_of_bitsandbytes_is_not_seen(bnb):
    fp4 = bnb.nn.Linear4bit(64, 8).to("cpu")
    with pytest.raises(NotImplementedError, match="its weight is in fp4, not NF4"):
        quantized_weight(fp4)
    with pytest.raises(NotImplementedError, match="not quantised yet"):
        quantized_weight(bnb.nn.Linear4bit(64, 8))
    with pytest.raises(NotImplementedError, match="not quantised"):
        quantized_weight(bnb.nn.Linear8bitLt(64, 8))
    with pytest.raises(RuntimeError, match="weight: the format must be nf4, got fp4"):
        QuantizedLinear(64, 8).load_state_dict(fp4.state_dict())
    assert quantized_weight(nn.Linear(4, 4)) is None


def test_without_double_quantisation_and_stored_as_another_dtype(bnb):
    theirs = bnb.nn.Linear4bit(128, 40, quant_type="nf4", compress_statistics=False, quant_storage=BF16).to("cpu")
    ours = QuantizedLinear(128, 40)
    ours.load_state_dict(theirs.state_dict())
    assert ours.quantized.nested is None
    x = torch.randn(5, 128)
    torch.testing.assert_close(ours(x), theirs(x))


def test_models_are_exchanged_with_transformers(bnb, tmp_path):
    """In NF4, by folders that transformers writes and loads with bitsandbytes."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tokens = torch.arange(8)[None] + 4
    ours = transformers.LlamaForCausalLM(tiny.llama_config(**sizes)).eval()
    ours.save_pretrained(tmp_path / "float")
    quantize_linears(ours.model, "nf4")
    ours.save_pretrained(tmp_path / "ours")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=FP32,
    )
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["quantization_config"] = settings.to_dict()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    assert type(theirs.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=settings, device_map="cpu", dtype=FP32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    again = transformers.LlamaForCausalLM(tiny.llama_config(**sizes)).eval()
    quantize_linears(again.model, "nf4")
    again.load_state_dict(load_file(tmp_path / "theirs" / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, ours(tokens).logits, rtol=0, atol=0)


# fusetune finetune --quantize


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    return {
        "bert": tiny.save_bert(folder / "bert"),
        "llama": tiny.save_llama(folder / "llama", tie_word_embeddings=True),
        "table": tiny.write_csv(folder / "table.csv", tiny.sentences(120)),
    }


@pytest.fixture(autouse=True)
def _one_thread(request):
    if "data" in request.fixturenames:
        request.getfixturevalue("one_thread")


def job(data, output, **changes):
    return {
        "model": str(data["bert"]), "dataset": str(data["table"]), "output_dir": str(output), "method": "lora",
        "lr": 2e-2, "batch_size": 12, "epochs": 2, "lora_r": 4,
    } | changes  # fmt: skip


@pytest.mark.parametrize("quantize", FORMATS)
def test_finetune_predict_and_merge(data, tmp_path, quantize, capsys):
    from transformers import AutoModelForSequenceClassification

    from fusetune.train.predict import load_trained, merge, predict

    result = main(**job(data, tmp_path / "out", quantize=quantize))
    assert f"quantized 13 linear layers to {quantize}" in capsys.readouterr().out
    assert result["train_step_loss"][-1] < result["train_step_loss"][0]
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())["quantized"]
    assert saved == result["quantized"]
    assert saved["layers"] == 13
    assert saved["bytes_now"] < saved["bytes_before"] / 2
    names = set(load_file(tmp_path / "out" / "model" / "adapter_model.safetensors"))
    assert names
    assert all("lora_" in name or "classifier" in name for name in names)

    texts = [text for text, _ in tiny.sentences(5, seed=3)]
    trained, tokenizer = load_trained(tmp_path / "out")
    assert quantized_size(trained).layers == 13
    merge(tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not quantized_size(merged).layers
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, trained(**inputs).logits, rtol=1e-4, atol=1e-5)
    labels = [prediction.label for prediction in predict(tmp_path / "out", texts)]
    assert labels == [prediction.label for prediction in predict(tmp_path / "merged", texts)]


def test_resumed_run_equals_a_straight_one(data, tmp_path):
    # the schedule is constant because the first part has another number of steps
    settings = job(data, tmp_path / "parts", quantize="nf4", lr_scheduler="constant", max_steps=14)
    straight = main(**settings | {"output_dir": str(tmp_path / "straight")})
    main(**settings | {"max_steps": 9})
    with pytest.raises(UserError, match="quantize must be 'nf4', as in the run to resume, got None"):
        main(**settings | {"quantize": None}, resume=True)
    resumed = main(**settings, resume=True)
    assert resumed["train_step_loss"] == pytest.approx(straight["train_step_loss"], abs=1e-6)
    assert resumed["last_epoch_eval_loss"] == pytest.approx(straight["last_epoch_eval_loss"], abs=1e-6)


def test_causal_lm_keeps_its_head(data, tmp_path):
    from fusetune.train.predict import generate, load_trained

    main(
        **job(
            data,
            tmp_path / "out",
            model=str(data["llama"]),
            task="causal-lm",
            quantize="nf4",
            max_length=16,
            max_steps=2,
        )
    )
    model, _ = load_trained(tmp_path / "out")
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "lm_head" in name}
    assert set(kinds.values()) == {"Linear"}
    assert quantized_size(model).layers == 14
    assert list(generate(tmp_path / "out", ["the cat"], 4))
    model, _ = load_trained(next((tmp_path / "out").glob("checkpoint-*")))
    assert quantized_size(model).layers == 14


@pytest.mark.parametrize("method", ["full", "head"])
def test_only_frozen_weights_are_quantised(data, tmp_path, method):
    with pytest.raises(UserError, match=f"method must be lora with quantize nf4.*got {method}"):
        main(**job(data, tmp_path / "out", quantize="nf4", method=method))


def test_a_checkpoint_that_is_quantised_already(data, tmp_path, monkeypatch):
    folder = tiny.save_bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantize must be none.*quantized by bitsandbytes already"):
        main(**job(data, tmp_path / "out", model=str(folder), quantize="nf4"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find_spec(name, *a)
    )
    with pytest.raises(
        UserError, match="quantized by bitsandbytes, which must be installed; `pip install bitsandbytes`"
    ):
        main(**job(data, tmp_path / "out", model=str(folder)))


# Patched


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8", "bitsandbytes"])
def test_patched_layer_is_one_op_and_follows_peft(bnb, kind, dtype, monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(128, 40)
    base = bnb_layer(bnb, "nf4", linear) if kind == "bitsandbytes" else QuantizedLinear.from_linear(linear, kind)
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = kind == "bitsandbytes"  # as transformers says it: the layer is PEFT's for bitsandbytes
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_dropout=0.0))
    x = torch.randn(6, 128, dtype=dtype, requires_grad=True)

    def step(model):
        y = model(x)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {"y": y, **dict(zip(["x", *trained], torch.autograd.grad(y.sum(), [x, *trained.values()]), strict=True))}

    stock = step(model)
    before = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    report = fusetune.patch(model, strict=True)
    assert [entry.backend for entry in report.replaced] == ["cpu"]
    monkeypatch.setattr(type(base), "forward", None)  # the op reads the weight without calling the layer
    ours = step(model)
    monkeypatch.undo()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == FP32 else {"rtol": 2e-2, "atol": 2e-2}
    for name in stock:
        assert ours[name].dtype == stock[name].dtype, name
        torch.testing.assert_close(ours[name], stock[name], **tolerance)
    fusetune.unpatch(model)
    assert_same([step(model)["y"]], [stock["y"]])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name in before)


def test_quantised_layers_that_are_left_to_peft(bnb):
    def reasons(base, **config):
        model = get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"], **config))
        return [entry.reason for entry in fusetune.patch(model).left_alone]

    quantized = QuantizedLinear.from_linear(nn.Linear(128, 40))
    assert reasons(quantized, use_dora=True) == ["its base layer is quantised, beside DoRA"]
    fp4 = bnb.nn.Linear4bit(128, 40, quant_type="fp4")
    fp4.load_state_dict(nn.Linear(128, 40).state_dict())
    assert reasons(fp4.to("cpu")) == ["its weight is in fp4, not NF4"]
    assert reasons(bnb_layer(bnb, "int8", nn.Linear(128, 40))) == [
        "its base layer is Linear8bitLt, not Linear or Conv1D"
    ]


def test_layers_of_bitsandbytes_that_compute_in_another_dtype_are_called(bnb):
    base = bnb_layer(bnb, "nf4", nn.Linear(128, 40))
    base.compute_dtype, base.compute_type_is_set = torch.bfloat16, True
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(6, 128, requires_grad=True)
    stock = model(x)
    fusetune.patch(model, strict=True)
    assert torch.equal(model(x), stock)
    base.compute_dtype, base.compute_type_is_set = None, False
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(x)
        fusetune.unpatch(model)
        assert torch.equal(ours, model(x))


def test_changes_in_place_that_would_be_lost_raise():
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40))
    for change in (
        lambda w: nn.init.normal_(w),
        lambda w: torch.add(w, 1, out=w),
        lambda w: w.mul_(2),
        lambda w: w.__setitem__(0, 1.0),
    ):
        with pytest.raises(NotImplementedError, match=r"weight must be changed by assignment to weight\.data"):
            change(layer.weight)
