"""Patched LoRA layers follow PEFT's, and are PEFT's where the kernel cannot be used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from stock import (
    assert_follows,
    assert_same,
    make_lora,
)
from torch import Tensor, nn

from fusetune.nn.lora import LoraLinear
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
