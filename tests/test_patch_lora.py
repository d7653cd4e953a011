"""Patched LoRA layers follow PEFT's, and are PEFT's where the kernel cannot be used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from stock import (
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

import fusetune
from fusetune.nn.lora import LoraLinear
from fusetune.ops.philox import draw_seed, keep_mask, kept_scale
from fusetune.patching import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_lora_layer_bias() -> None:
    x = torch.randn(4, 24)
    assert_fast(lora_layer(lora_bias=True), x)
    with pytest.warns(peft.utils.warning.PeftWarning, match="no bias"):
        model = lora_layer(lora_bias=True, base=nn.Linear(24, 16, bias=False), lora_alpha=3)
    assert_fast(model, x)


def test_dora_layer_options() -> None:
    x = torch.randn(4, 24)
    assert_fast(lora_layer(use_dora=True), x)
    assert_fast(lora_layer(use_dora=True, base=nn.Linear(24, 16, bias=False)), torch.randn(2, 3, 24))
    assert_fast(lora_layer(use_dora=True, r=1, use_rslora=True, lora_alpha=3), x)
    conv1d = transformers.pytorch_utils.Conv1D(16, 24)
    assert_fast(lora_layer(use_dora=True, base=conv1d, fan_in_fan_out=True), x)


class SeededDropout(nn.Dropout):
    """PEFT's dropout with the masks of fusetune's generator."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seed = int(draw_seed(x.device))
        rows = torch.arange(x.numel() // x.shape[-1]).view(x.shape[:-1])
        return x * keep_mask(seed, rows, x.shape[-1], self.p) * kept_scale(self.p)


def seed_dropout(model: nn.Module) -> Any:
    """A copy of a PEFT model with masks that a patched one draws too."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            for name, dropout in layer.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    layer.lora_dropout[name] = SeededDropout(dropout.p).train(dropout.training)
    return model


@pytest.mark.parametrize("kind", [{}, {"lora_bias": True}, {"use_dora": True}], ids=["LoRA", "lora_bias", "DoRA"])
def test_dropout_is_where_peft_has_it(kind: dict[str, bool]) -> None:
    model, x = lora_layer(lora_dropout=0.4, **kind), torch.randn(30, 24)
    stock = seed_dropout(model)
    patch(model, strict=True)
    assert_follows(forward_backward(model, x), forward_backward(stock, x))
    layer, stock_layer = (m.base_model.model[0] for m in (model, stock))
    for change in (
        lambda m: m.eval(),
        lambda m: m.lora_dropout.train(),  # of a layer that is not in training: DoRA goes by the layer
        lambda m: (m.train(), m.lora_dropout.eval()),
    ):
        change(layer)
        change(stock_layer)
        assert_follows(forward_backward(model, x), forward_backward(stock, x))


@pytest.mark.parametrize("frozen", ["", "default", "b"])
def test_several_active_adapters(frozen: str) -> None:
    """Of different ranks, scales and dropouts, the last with masks of their own."""
    model = lora_layer(lora_dropout=0.4, lora_alpha=3, lora_bias=True)
    add_active(model, r=7, lora_dropout=0.2, use_rslora=True)
    for name, p in model.named_parameters():
        if frozen and f".{frozen}." in name:
            p.requires_grad_(False)
    x, stock = torch.randn(30, 24), seed_dropout(model)
    patch(model, strict=True)
    y, grads = forward_backward(model, x)
    assert_follows((y, grads), forward_backward(stock, x))
    assert len(grads) == 1 + 5 - {"": 0, "default": 3, "b": 2}[frozen]
    model.base_model.set_adapter("b")
    stock.base_model.set_adapter("b")
    assert_follows(forward_backward(model, x), forward_backward(stock, x))
    model.eval()
    stock.eval()
    assert_follows(forward_backward(model, x), forward_backward(stock, x))


def test_dora_leaves_no_trace_and_merges() -> None:
    model = lora_layer(use_dora=True)
    names, x = set(model.state_dict()), torch.randn(4, 24)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    patch(model, strict=True)
    y, _ = forward_backward(model, x)
    assert set(model.state_dict()) == names
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    clone = pickle.loads(pickle.dumps(model))
    for change in (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()):
        for each in (model, clone):
            change(each)
            assert_close(each(x), y)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # norms follow the weights
        stock = copy.deepcopy(model)
        unpatch(stock)
        assert_follows(forward_backward(model, x), forward_backward(stock, x))
        optimizer.step()


EMBEDDINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rsLoRA": ({}, {"use_rslora": True, "lora_alpha": 3}),
    "padding_idx": ({"padding_idx": 3}, {}),
    "scale_grad_by_freq": ({"scale_grad_by_freq": True}, {}),
    "max_norm": ({"max_norm": 0.5}, {}),
}


def embedding_layer(dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    return make_lora(nn.Sequential(base or nn.Embedding(11, 16)).to(dtype), target_modules=["0"], **config)


def assert_embedding_fast(model: Any, ids: Tensor, stock: Any) -> None:
    assert [e.replaced_by for e in patch(model, strict=True).replaced] == ["fusetune.nn.lora.LoraEmbedding"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = forward_backward(stock, ids)
        monkeypatch.setattr(peft.tuners.lora.Embedding, "forward", None)
        ours = forward_backward(model, ids)
    for _, grads in (expected, ours):
        del grads["x"]
    assert_follows(ours, expected)


@pytest.mark.parametrize("case", EMBEDDINGS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 7), (2, 0)], ids=str)
def test_embedding(case: str, shape: tuple[int, ...]) -> None:
    options, config = EMBEDDINGS[case]
    model = embedding_layer(base=nn.Embedding(11, 16, **options), **config)
    assert_embedding_fast(model, torch.randint(0, 11, shape), copy.deepcopy(model))


def test_embedding_with_two_active_adapters_and_a_trained_base() -> None:
    model = add_active(embedding_layer())
    assert_embedding_fast(copy.deepcopy(model), torch.randint(0, 11, (3, 4)), copy.deepcopy(model))
    model.base_model.model[0].base_layer.weight.requires_grad_(True)
    assert_embedding_fast(model, torch.randint(0, 11, (3, 4)), copy.deepcopy(model))


def test_embedding_that_scales() -> None:
    base = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(11, 16, 0, embed_scale=3.5)
    model = embedding_layer(base=base)
    assert_embedding_fast(model, torch.randint(0, 11, (3, 4)), copy.deepcopy(model))


@pytest.mark.parametrize("autocast", [False, True])
def test_embedding_in_bfloat16(autocast: bool) -> None:
    """float32 adapters on a bfloat16 base, or all in float32 under autocast."""
    model = embedding_layer(torch.float32 if autocast else torch.bfloat16)
    assert model.base_model.model[0].lora_embedding_A["default"].dtype == torch.float32
    ids = torch.randint(0, 11, (30,))
    exact = forward_backward(copy.deepcopy(model).double(), ids)

    def results() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return forward_backward(model, ids)

    stock = results()
    patch(model, strict=True)
    ours = results()
    assert ours[0].dtype == stock[0].dtype
    for actual, expected, truth in [(ours[0], stock[0], exact[0])] + [
        (g, stock[1][n], exact[1][n]) for n, g in ours[1].items() if n != "x"
    ]:
        assert actual.dtype == expected.dtype
        floor = torch.finfo(actual.dtype).eps * truth.norm()
        assert (actual - truth).norm() <= 2 * (expected - truth).norm() + floor


EMBEDDING_FALL_THROUGH: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), "its adapters are disabled"),
    "merged": ({}, lambda m: m.merge_adapter(), "its adapter is merged"),
    "none active": ({}, lambda m: m.base_model.model[0].set_adapter([]), "none of its adapters is active"),
    "DoRA": ({"use_dora": True}, lambda m: None, "its adapter is of the kind DoraEmbeddingVariant"),
    "split": (
        {},
        # an attribute that PEFT 0.18 does not have yet
        lambda m: vars(m.base_model.model[0]).setdefault("input_fns", {}).update(default=lambda inputs: inputs[0]),
        "its adapter is split over devices",
    ),
}


@pytest.mark.parametrize("case", EMBEDDING_FALL_THROUGH)
def test_embedding_that_is_left_to_peft(case: str) -> None:
    config, change, reason = EMBEDDING_FALL_THROUGH[case]
    ids, later, stock = torch.randint(0, 11, (3, 4)), embedding_layer(**config), embedding_layer(**config)
    patch(later)
    for model in (later, stock):
        change(model)
    expected, ours = forward_backward(stock, ids), forward_backward(later, ids)
    for _, grads in (expected, ours):
        grads.pop("x", None)
    assert_same(ours, expected)
    assert [e.reason for e in patch(later).left_alone] == [reason]
    assert type(later.base_model.model[0]) is peft.tuners.lora.Embedding


def test_embedding_call_that_is_left_to_peft() -> None:
    model, ids = embedding_layer().eval(), torch.randint(0, 11, (3, 4))
    names = ["default", "__base__", "default"]
    expected = model(ids, adapter_names=names)
    patch(model, strict=True)
    assert torch.equal(model(ids, adapter_names=names), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding_of_a_language_model(tied: bool) -> None:
    model = make_lora(make_llama(tie_word_embeddings=tied), target_modules=["embed_tokens", "lm_head", "q_proj"])
    stock = run(model, llama_batch("right"))
    report = patch(model, ops=["lora"], strict=True)
    assert {(e.replaced_by, e.count) for e in report.replaced} == {
        ("fusetune.nn.lora.LoraEmbedding", 1),
        ("fusetune.nn.lora.LoraLinear", 3),
    }
    assert_follows(run(model, llama_batch("right")), stock)


def test_modules_to_save_are_trained_as_before() -> None:
    model = make_lora(make_bert(), target_modules=["query"], modules_to_save=["classifier"])
    stock = run(model, bert_batch())
    patch(model, strict=True)
    ours = run(model, bert_batch())
    assert any("modules_to_save" in name for name in ours[1])
    assert_follows(ours, stock)


def test_lora_layer_without_tokens() -> None:
    model = lora_layer()
    patch(model)
    y, grads = forward_backward(model, torch.randn(2, 0, 24))
    assert y.shape == (2, 0, 16)
    assert all(g.count_nonzero() == 0 for g in grads.values())


@pytest.mark.parametrize("kind", [{}, {"lora_bias": True}, {"use_dora": True}], ids=["LoRA", "lora_bias", "DoRA"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_lora_layer_in_bfloat16(kind: dict[str, bool], autocast: bool, autocast_adapter_dtype: bool) -> None:
    """As exact as PEFT, up to twice its error, and of the same dtypes; adapters are float32 or bfloat16."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16)).to(torch.float32 if autocast else torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **kind)
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


def add_active(model: Any, **config: Any) -> Any:
    """Another adapter, active beside the first."""
    torch.manual_seed(4)
    model.add_adapter("b", LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False, **config}))
    model.base_model.set_adapter(["default", "b"])
    return model


def _none_active(model: Any) -> None:
    model.base_model.model[0].set_adapter([])


def _two_active_of_two_dtypes(model: Any) -> None:
    add_active(model)
    layer = model.base_model.model[0]
    layer.lora_A["b"].bfloat16()
    layer.lora_B["b"].bfloat16()


def _bias_on_A(model: Any) -> None:
    layer = model.base_model.model[0]
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))


def _bias_on_B(model: Any) -> None:  # which LoraConfig refuses beside DoRA
    layer = model.base_model.model[0]
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(16))


def _hook_on_magnitude(model: Any) -> None:
    layer = model.base_model.model[0].lora_magnitude_vector["default"]
    layer.register_forward_hook(lambda module, inputs, output: output * 1.5)


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
    "none active": ({}, _none_active, "none of its adapters is active"),
    "two dtypes": (
        {},
        _two_active_of_two_dtypes,
        "its weights are float32, float32, float32, bfloat16, bfloat16",
    ),
    "LoRA beside DoRA": (
        {"use_dora": True},
        add_active,
        "2 of its adapters are active, and not all without DoRA",
    ),
    "two DoRA": (
        {"use_dora": True},
        lambda m: add_active(m, use_dora=True),
        "2 of its adapters are active, and not all without DoRA",
    ),
    "DoRA with bias": ({"use_dora": True}, _bias_on_B, "its adapter has a bias beside DoRA"),
    "hook on magnitude": (
        {"use_dora": True},
        _hook_on_magnitude,
        "a module inside of it has hooks or a replaced forward",
    ),
    "bias on A": ({}, _bias_on_A, "its adapter has a bias"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, lambda m: None, "its adapter is of the kind ALoraLinearVariant"),
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


def test_compute_is_what_patch_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_layer(dtype=torch.bfloat16)
    layer = model.base_model.model[0]
    asked = []
    real = fusetune.ops.lora_linear_group
    monkeypatch.setattr(
        "fusetune.ops.lora_linear_group", lambda *args, compute: asked.append(compute) or real(*args, compute=compute)
    )
    x = torch.randn(3, 24).bfloat16()
    for options, compute in (({"compute": "fast"}, "fast"), ({}, "match")):
        patch(model, **options)
        copy.deepcopy(model)(x)
        assert asked.pop() == compute
    patch(model, compute="fast")
    unpatch(model)
    assert not [name for name in vars(layer) if "fusetune" in name]
    with pytest.raises(ValueError, match=r"^patch: compute must be 'match' or 'fast', got 'slow'"):
        patch(model, compute="slow")
    assert type(layer) is peft.tuners.lora.Linear


def test_compute_outlives_patched() -> None:
    model = lora_layer()
    patch(model, compute="fast")
    with fusetune.patched(model):
        pass
    assert vars(model.base_model.model[0])["_fusetune_compute"] == "fast"


def test_replicas_whose_weights_are_no_parameters() -> None:
    """As nn.DataParallel makes them, on GPUs."""

    def replica(module: Any) -> Any:
        copied = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            copied._parameters.pop(name, None)
            setattr(copied, name, None if parameter is None else parameter * 1)
        for name, child in module._modules.items():
            copied._modules[name] = replica(child)
        return copied

    model = lora_layer()
    patch(model, strict=True)
    layer = model.base_model.model[0]
    x = torch.randn(3, 24)
    assert torch.equal(replica(layer)(x), layer(x))
