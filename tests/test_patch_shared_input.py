"""Layers that share their input are computed as one where that is right, and each by itself where something is odd."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from stock import (
    assert_follows,
    assert_same,
    bert_batch,
    llama_batch,
    make_bert,
    make_llama,
    make_lora,
    run,
)
from test_patch_lora import seed_dropout
from torch import Tensor, nn

from fusetune import models, ops
from fusetune.nn import lora
from fusetune.nn.lora import LoraLinear
from fusetune.patching import patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """Three layers, of which a test makes what it likes by replacing `script`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8, bias=False), nn.Linear(12, 20)

    def script(self, x: Tensor) -> Any:
        return (torch.sigmoid(self.q(x)) * self.k(x)).sum(-1, keepdim=True) * self.v(x)

    def forward(self, x: Tensor) -> Any:
        return self.script(x)


ordinary = Block.script


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SHARED_INPUT, f"{Block.__module__}.Block", ("q", "k", "v"))


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each call of the op."""
    sizes: list[int] = []
    group = ops.lora_linear_group

    def counted(x: Tensor, projections: Any, **options: Any) -> Any:
        sizes.append(len(projections))
        return group(x, projections, **options)

    monkeypatch.setattr(ops, "lora_linear_group", counted)
    return sizes


def make_block(targets: str = "qkv", **config: Any) -> Any:
    """A PEFT model around a Block, and the Block."""
    torch.manual_seed(0)
    model = make_lora(nn.Sequential(Block()), target_modules=[f"0.{name}" for name in targets], **config)
    return model, model.base_model.model[0]


def step(model: nn.Module, x: Tensor, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {**grads, "x": x.grad}


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_llama(groups: list[int], dropout: float) -> None:
    model = make_lora(make_llama(), target_modules=LLAMA, lora_dropout=dropout)
    stock = run(seed_dropout(model), llama_batch())
    report = patch(model, ops=["lora"], strict=True)
    assert [(e.module, e.count, e.replaced_by) for e in report.replaced] == [
        ("peft.Linear", 14, "fusetune.nn.lora.LoraLinear"),
        ("transformers.LlamaAttention", 2, "fusetune.ops.lora_linear_group of q_proj, k_proj, v_proj"),
        ("transformers.LlamaMLP", 2, "fusetune.ops.lora_linear_group of gate_proj, up_proj"),
    ]
    assert_follows(run(model, llama_batch()), stock)
    assert groups == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bert(groups: list[int], dropout: float) -> None:
    model = make_lora(make_bert(), target_modules=["query", "key", "value"], lora_dropout=dropout, lora_bias=True)
    stock = run(seed_dropout(model), bert_batch("right"))
    patch(model, ops=["lora"], strict=True)
    assert_follows(run(model, bert_batch("right")), stock)
    assert groups == [3, 3]


@pytest.mark.parametrize("name", list(models.SHARED_INPUT))
def test_every_class_of_the_tables_calls_its_layers_with_one_input(name: str, groups: list[int]) -> None:
    """So that none of them is wasteful."""
    family = name.split(".")[2]
    options = {
        **{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 97, "embedding_size": 48, "pad_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": 2},
    }
    config = transformers.AutoConfig.for_model(family.replace("_", "-"))
    config = type(config)(**{key: value for key, value in options.items() if hasattr(config, key)})
    model = make_lora(transformers.AutoModel.from_config(config), target_modules=list(models.SHARED_INPUT[name]))
    model, ids = model.eval(), torch.randint(3, 97, (2, 5))
    expected = model(input_ids=ids)[0]
    report = patch(model, ops=["lora"], strict=True)
    assert any(e.module.endswith(name.rsplit(".", 1)[1]) for e in report.replaced)
    groups.clear()
    assert torch.allclose(model(input_ids=ids)[0], expected, atol=1e-5)
    assert groups == [len(models.SHARED_INPUT[name])]
    assert not set(lora._wasteful) & set(model.modules())


def test_cross_attention_is_left_out() -> None:
    decoder = make_bert(transformers.BertLMHeadModel, is_decoder=True, add_cross_attention=True)
    model = make_lora(decoder, target_modules=["query", "key", "value"])
    replaced = patch(model, ops=["lora"], strict=True).replaced
    assert [(e.module, e.count) for e in replaced] == [("peft.Linear", 12), ("transformers.BertSelfAttention", 2)]


@pytest.mark.parametrize(("targets", "expected"), [("qkv", [3]), ("qv", [2]), ("kv", [2]), ("v", [1])])
def test_of_the_layers_that_have_adapters(groups: list[int], targets: str, expected: list[int]) -> None:
    model, _ = make_block(targets)
    x = torch.randn(5, 12)
    stock = step(model, x)
    report = patch(model)
    assert any("lora_linear_group" in str(e.replaced_by) for e in report.replaced) == (len(targets) > 1)
    assert_follows(step(model, x), stock)
    assert groups == expected


def _another_dtype(block: Any) -> None:
    block.k.lora_A.bfloat16()
    block.k.lora_B.bfloat16()
    block.k.register_forward_pre_hook(lambda module, args: (args[0].float(),))


ODD: dict[str, Callable[[Any], Any]] = {
    "merged": lambda block: block.k.merge(),
    "disabled": lambda block: block.k.enable_adapters(False),
    "input changed": lambda block: block.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "output changed": lambda block: block.k.register_forward_hook(lambda module, args, y: y * 2),
    "gradient changed": lambda block: block.k.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,)),
    "forward changed": lambda block: setattr(block.k, "forward", lambda x: block.q(x * 2)),
    "base trained": lambda block: block.k.base_layer.weight.requires_grad_(True),
    "no adapter": lambda block: setattr(block, "k", block.k.base_layer),
    "another dtype": _another_dtype,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("odd", ODD)
def test_one_layer_is_odd(groups: list[int], odd: str, when: str) -> None:
    change = ODD[odd]
    (model, block), (stock, stock_block) = make_block(), make_block()
    x = torch.randn(5, 12)
    change(stock_block)
    expected = step(stock, x)
    if when == "after":
        patch(model)
    change(block)
    if when == "before":
        patch(model)
    for _ in range(2):
        groups.clear()
        assert_follows(step(model, x), expected)
        assert groups[0] == 2
        assert 3 not in groups
    assert block not in lora._wasteful


def test_dora_is_computed_by_itself(groups: list[int]) -> None:
    model, _ = make_block("qkv", use_dora=True)
    x = torch.randn(5, 12)
    stock = step(model, x)
    patch(model, strict=True)
    assert_follows(step(model, x), stock)
    assert groups == []


def _alone(block: Any, x: Tensor) -> Any:
    return block.q(x)


def _twice(block: Any, x: Tensor) -> Any:
    return block.q(x).sum() + block.k(x).sum() + block.v(x).sum() + block.q(x).square() + block.k(x)


def _other_input(block: Any, x: Tensor) -> Any:
    return block.q(x) + block.k(x + 1) + block.v(x * 1).sum() + block.v(x).sum()


def _equal_input(block: Any, x: Tensor) -> Any:
    return block.q(x) * block.k(x.clone()) + block.v(x.view_as(x)).sum()


def _input_written(block: Any, x: Tensor) -> Any:
    x = x * 1
    with torch.no_grad():
        y = block.q(x)
        x.mul_(2)
        y = y + block.k(x) + block.v(x).sum()
    return y + 0 * block.q(x)


def _without_grad(block: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = block.q(x)
    return y + block.k(x) + block.v(x).sum()


def _rest_without_grad(block: Any, x: Tensor) -> Any:
    y = block.q(x)
    with torch.no_grad():
        z = block.k(x)
    assert not z.requires_grad
    return y + z + block.v(x).sum()


def _autocast(block: Any, x: Tensor) -> Any:
    y = block.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = block.k(x)
    assert z.dtype == torch.bfloat16
    return y + z.float() + block.v(x).sum()


def _scaled(block: Any, x: Tensor) -> Any:
    y = block.q(x)
    block.k.set_scale("default", 7.0)
    z = block.k(x)
    block.k.set_scale("default", 1.0)
    return y + z + block.v(x).sum()


def _switched_off(block: Any, x: Tensor) -> Any:
    y = block.q(x)
    block.k.enable_adapters(False)
    z = block.k(x)
    block.k.enable_adapters(True)
    return y + z + block.v(x).sum()


def _weights_written(block: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = block.q(x)
        block.k.lora_B["default"].weight.add_(1)
        block.v.base_layer.weight.mul_(2)
        z = block.k(x) + block.v(x).sum()
        block.k.lora_B["default"].weight.sub_(1)
        block.v.base_layer.weight.div_(2)
    return y + z + 0 * block.q(x)


def _raises_between(block: Any, x: Tensor) -> Any:
    y = block.q(x)
    try:
        block.k(x[:, 1:])
        raise AssertionError
    except (RuntimeError, ValueError):
        pass
    return y + block.k(x) + block.v(x).sum()


def _checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Any]:
    def checkpointed(block: Any, x: Tensor) -> Any:
        def inner(x: Tensor) -> Any:
            return torch.sigmoid(block.q(x)) * block.k(x) + block.v(x).sum()

        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=reentrant)

    checkpointed.__name__ = f"_checkpointed_{reentrant}"
    return checkpointed


def _unused_output(block: Any, x: Tensor) -> Any:
    y, _, _ = block.q(x), block.k(x), block.v(x)
    return y


def _nested(block: Any, x: Tensor) -> Any:
    y = block.q(x)
    if x.shape[0] > 1:
        y = y + block(x[:1])
    return y + block.k(x) + block.v(x).sum()


SCRIPTS = (
    _alone,
    _twice,
    _other_input,
    _equal_input,
    _input_written,
    _without_grad,
    _rest_without_grad,
    _autocast,
    _scaled,
    _switched_off,
    _weights_written,
    _raises_between,
    _checkpointed(False),
    _checkpointed(True),
    _unused_output,
    _nested,
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_odd_block(monkeypatch: pytest.MonkeyPatch, script: Callable[[Any, Tensor], Any]) -> None:
    """The right result the first time and, where the block proved wasteful, later."""
    monkeypatch.setattr(Block, "script", script)
    model, _ = make_block()
    x = torch.randn(5, 12)
    expected = step(model, x)
    patch(model, strict=True)
    for _ in range(3):
        got = step(model, x)
        if script is _autocast:
            assert torch.allclose(got[0], expected[0], rtol=0.02, atol=0.02)
        else:
            assert_follows(got, expected)


def test_wastes_no_more_than_one_call(groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "script", _alone)
    model, block = make_block()
    patch(model)
    for _ in range(3):
        model(torch.randn(5, 12))
    assert groups == [3, 1, 1]
    other = copy.deepcopy(model)
    monkeypatch.setattr(Block, "script", ordinary)
    groups.clear()
    other(torch.randn(5, 12))
    assert groups == [3]
    assert block in lora._wasteful


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises(groups: list[int], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    def script(block: Any, x: Tensor) -> Any:
        block.q(x)
        raise error("between")

    model, block = make_block()
    x = torch.randn(5, 12)
    expected = step(model, x)
    patch(model)
    monkeypatch.setattr(Block, "script", script)
    with pytest.raises(error, match="between"):
        model(x)
    assert block not in lora._wasteful
    if error is ValueError:  # torch calls no hooks for KeyboardInterrupt: the next block drops what it left
        assert lora._running.shared is None
    monkeypatch.setattr(Block, "script", ordinary)
    assert_follows(step(model, x), expected)
    assert groups == [3, 3]
    assert lora._running.shared is None


def test_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def script(block: Any, x: Tensor) -> Any:
        h = x * 1
        ys = [block.q(h), block.k(h), block.v(h)]
        assert lora._running.shared.x is None  # the last has taken its result
        kept.extend(weakref.ref(t) for t in (h, *ys))
        return None if block.training else torch.zeros(())

    monkeypatch.setattr(Block, "script", script)
    model, _ = make_block()
    patch(model)
    for training in (True, False):
        model.train(training)
        model(torch.randn(5, 12))
        gc.collect()
        assert [ref() for ref in kept] == [None] * 4
        kept.clear()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing(groups: list[int], reentrant: bool, dropout: float) -> None:
    model = make_lora(make_llama(), target_modules=LLAMA, lora_dropout=dropout)
    model.enable_input_require_grads()
    patch(model, ops=["lora"], strict=True)
    expected = run(model, llama_batch())
    groups.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(run(model, llama_batch()), expected)
    assert groups == [3, 1, 2, 1] * 4 or groups == [3, 1, 2, 1] * 2 + [3, 1, 2] * 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile(groups: list[int], dropout: float) -> None:
    """Traced, each layer is computed by itself."""
    model, _ = make_block(lora_dropout=dropout)
    x = torch.randn(5, 12)
    patch(model, strict=True)
    expected = step(model, x)
    assert groups == [3]
    unpatched = len(groups)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, grads = step(compiled, x)
    grads = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
    assert 3 not in groups[unpatched:]
    assert_follows((y, grads), expected)


def test_accumulation_and_backward_twice() -> None:
    model, block = make_block()
    x, z = torch.randn(5, 12), torch.randn(3, 12)

    def accumulated() -> dict[str, Tensor]:
        model.zero_grad()
        (block.v(x).sum() + model(x).sum()).backward()
        y = model(z).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = accumulated()
    patch(model)
    assert_follows((torch.ones(1), accumulated()), (torch.ones(1), expected))


def test_without_gradients(groups: list[int]) -> None:
    model, _ = make_block()
    x = torch.randn(5, 12)
    expected = model(x)
    patch(model)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert torch.allclose(model(x.clone()), expected, atol=1e-6)  # an inference tensor
    assert groups == [3, 3, 1, 1, 1]


def test_copies_and_pickles(groups: list[int]) -> None:
    model, _ = make_block()
    x = torch.randn(5, 12)
    stock = step(model, x)
    patch(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for clone in copies:
        groups.clear()
        assert_follows(step(clone, x), stock)
        assert groups == [3]
        unpatch(clone)
        assert not clone.base_model.model[0]._forward_hooks
        assert_same(step(clone, x), stock)
    assert_follows(step(model, x), stock)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model in several threads, which interleave between its layers."""
    model, _ = make_block()
    xs = [torch.randn(5, 12) for _ in range(4)]
    expected = [model(x).detach() for x in xs]
    patch(model)
    barrier = threading.Barrier(len(xs), timeout=30)
    results: dict[int, Tensor] = {}

    def script(block: Any, x: Tensor) -> Any:
        barrier.wait()
        q = block.q(x)
        barrier.wait()
        k = block.k(x)
        barrier.wait()
        return (torch.sigmoid(q) * k).sum(-1, keepdim=True) * block.v(x)

    monkeypatch.setattr(Block, "script", script)
    threads = [threading.Thread(target=lambda i=i: results.update({i: model(xs[i]).detach()})) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, y in enumerate(expected):
        assert torch.allclose(results[i], y, atol=1e-6)


def test_adapters_that_come_and_go(groups: list[int]) -> None:
    model, block = make_block("q")
    x = torch.randn(5, 12)
    patch(model)
    assert not block._forward_hooks
    model.add_adapter("b", LoraConfig(r=3, target_modules=["0.q", "0.v"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    stock = copy.deepcopy(model)
    unpatch(stock)
    expected = step(stock, x)
    report = patch(model, strict=True)
    assert [e.replaced_by for e in report.replaced][-1] == "fusetune.ops.lora_linear_group of q, v"
    groups.clear()
    assert_follows(step(model, x), expected)
    assert groups == [2]
    model.delete_adapter("b")
    model.set_adapter("default")
    groups.clear()
    model(x)
    assert groups == [1]
    patch(model)
    assert not block._forward_hooks


def test_undo_is_exact() -> None:
    model, block = make_block()

    def user_hook(module: nn.Module, args: Any, result: Any = None) -> None:
        pass

    block.register_forward_pre_hook(user_hook)
    block.register_forward_hook(user_hook, always_call=True)
    state = [dict(vars(block)[name]) for name in vars(block) if "hooks" in name]
    x = torch.randn(5, 12)
    stock = step(model, x)
    with patched(model) as report:
        assert any("lora_linear_group" in str(e.replaced_by) for e in report.replaced)
        patch(model)  # once more adds nothing
        assert len(block._forward_hooks) == len(block._forward_pre_hooks) == 2
    assert [dict(vars(block)[name]) for name in vars(block) if "hooks" in name] == state
    assert [type(m) for m in (block.q, block.k, block.v)] == [peft.tuners.lora.Linear] * 3
    assert_same(step(model, x), stock)
    patch(model, ops=["lora"])
    patch(model, ops=["attention"])
    assert type(block.q) is LoraLinear
    assert len(block._forward_hooks) == 2


def test_other_models_stay_as_they_are() -> None:
    model, other = make_block()[0], make_block()[0]
    patch(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_strict_raises_and_adds_no_hooks() -> None:
    model, block = make_block()
    block.k.merge()
    with pytest.raises(ValueError, match="its adapter is merged"):
        patch(model, strict=True)
    assert not any(module._forward_hooks for module in model.modules())


def test_adapters_of_two_dtypes_are_two_groups(groups: list[int]) -> None:
    model, block = make_block()
    model.bfloat16()
    block.k.lora_A.float(), block.k.lora_B.float()
    x = torch.randn(4, 12).bfloat16()
    stock = model(x)
    patch(model, strict=True)
    torch.testing.assert_close(model(x), stock, rtol=5e-2, atol=5e-2)
    assert sorted(groups) == [1, 2]
