"""torch's MultiheadAttention, patched, follows stock; and so do its TransformerEncoder and TransformerDecoder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stock import assert_close, assert_follows, assert_same
from torch import Tensor, nn

from fusetune.nn import flash_attention_torch
from fusetune.patching import patch, patched, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")

B, L, S, E, H = 2, 5, 7, 16, 4
OURS = "fusetune.nn.flash_attention_torch.MultiheadAttention"


def gradients(module: nn.Module, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def attention_mask(kind: str | None) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.rand(B * H, L, S) < 0.3 if "3-D" in kind else torch.rand(L, S) < 0.3
    mask[..., 0] = False
    return mask if "bool" in kind else torch.randn(mask.shape).masked_fill(mask, -torch.inf)


def padding_mask(kind: str | None) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1, -2:] = True
    additive = torch.zeros(B, S).masked_fill(mask, -torch.inf)
    return {"bool": mask, "-inf": additive, "float": additive + torch.randn(B, S)}[kind]


@pytest.mark.parametrize("padding", [None, "bool", "-inf", "float"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "bool 3-D", "float 3-D"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 10}, {"bias": False}], ids=["equal", "kdim", "no-bias"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(sizes: dict[str, Any], batch_first: bool, mask: str | None, padding: str | None) -> None:
    torch.manual_seed(0)
    masks = {"attn_mask": attention_mask(mask), "key_padding_mask": padding_mask(padding)}
    module = nn.MultiheadAttention(E, H, batch_first=batch_first, **sizes)
    names = [*module.state_dict()]
    query = nn.Parameter(torch.randn(B, L, E))
    key, value = torch.randn(B, S, module.kdim), torch.randn(B, S, module.vdim)

    def result() -> tuple[Tensor, dict[str, Tensor]]:
        query.grad = None
        inputs = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
        o, weights = module(*inputs, **masks, need_weights=False)
        assert weights is None
        output, of_parameters = gradients(module, o)
        return output, {**of_parameters, "query": query.grad}

    stock = result()
    (entry,) = patch(module, strict=True).replaced
    assert (entry.module, entry.replaced_by) == ("torch.MultiheadAttention", OURS)
    assert [*module.state_dict()] == names
    assert_follows(result(), stock)
    unpatch(module)
    assert type(module) is nn.MultiheadAttention
    assert_same(result(), stock)


@pytest.mark.parametrize("padded", [False, True])
def test_causal_hint_and_unbatched_inputs(padded: bool) -> None:
    module = nn.MultiheadAttention(E, H)
    x = torch.randn(L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.tensor([False] * (L - 1) + [True]) if padded else None
    options = {"attn_mask": causal, "key_padding_mask": padding, "need_weights": False, "is_causal": True}
    options["key_padding_mask"] = None if padding is None else torch.zeros(L).masked_fill(padding, -torch.inf)
    stock = gradients(module, module(x, x, x, **options)[0])
    with patched(module):
        assert_follows(gradients(module, module(x, x, x, **options)[0]), stock)
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            module(x, x, x, need_weights=False, is_causal=True)


def test_weights_come_from_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.MultiheadAttention(E, H)
    x = torch.randn(L, B, E)
    for options in ({}, {"average_attn_weights": False}):
        stock = module(x, x, x, **options)
        with patched(module), monkeypatch.context() as context:
            context.setattr(flash_attention_torch.ops, "flash_attention", None)
            ours = module(x, x, x, **options)
        assert torch.equal(ours[0], stock[0])
        assert torch.equal(ours[1], stock[1])


def test_left_alone() -> None:
    for options, reason in (
        ({"add_bias_kv": True}, "it has add_bias_kv"),
        ({"add_zero_attn": True}, "it has add_zero_attn"),
        ({"dtype": torch.float64}, "its parameters are torch.float64"),
    ):
        module = nn.MultiheadAttention(E, H, **options)
        assert [e.reason for e in patch(module).left_alone] == [reason]
        assert type(module) is nn.MultiheadAttention
    wide = nn.MultiheadAttention(264, 1)
    assert [e.reason for e in patch(wide).left_alone] == ["its head dimension is 264, over 256"]
    assert patch(nn.MultiheadAttention(E, H), ops=["lora"]).entries == ()


def encoder(norm_first: bool = False, dropout: float = 0.0, layers: int = 2) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=not norm_first)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:The PyTorch API of nested tensors")
def test_transformer_encoder(norm_first: bool, padded: bool, causal: bool) -> None:
    """In training, in evaluation with gradients, and in evaluation without, where torch has a path of its own."""
    model = encoder(norm_first)
    x = torch.randn(B, S, E)
    mask = nn.Transformer.generate_square_subsequent_mask(S) if causal else None
    options = {"mask": mask, "src_key_padding_mask": padding_mask("bool") if padded else None}

    def results() -> list[Any]:
        trained = gradients(model.train(), model(x, **options))
        evaluated = gradients(model.eval(), model(x, **options))
        with torch.no_grad():
            return [trained, evaluated, (model(x, **options), {})]

    stock = results()
    report = patch(model, strict=True)
    assert [(e.module, e.count, e.replaced_by) for e in report.replaced] == [("torch.MultiheadAttention", 2, OURS)]
    for ours, expected in zip(results(), stock, strict=True):
        assert_close(ours[0], expected[0]) if not ours[1] else assert_follows(ours, expected)
    unpatch(model)
    for ours, expected in zip(results(), stock, strict=True):
        assert_same(ours, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_inputs() -> None:
    model = encoder().eval()
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    attention = copy.deepcopy(model.layers[0].self_attn)
    with torch.no_grad():
        stock = model(nested), attention(nested, nested, nested, need_weights=False)[0]
        patch(model)
        patch(attention)
        ours = model(nested), attention(nested, nested, nested, need_weights=False)[0]
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a.to_padded_tensor(0.0), b.to_padded_tensor(0.0))


def test_transformer_decoder_and_dropout() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 32, 0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2)
    tgt, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    options = {"tgt_mask": torch.ones(L, L).triu(1).bool(), "memory_key_padding_mask": padding_mask("bool")}
    stock = gradients(model, model(tgt, memory, **options))
    assert [e.count for e in patch(model, strict=True).replaced] == [4]
    assert_follows(gradients(model, model(tgt, memory, **options)), stock)

    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x, x, x, need_weights=False)[0]

    module = nn.MultiheadAttention(E, H, dropout=0.5)
    x = torch.randn(L, B, E)
    patch(module)
    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
    module.eval()
    assert torch.equal(dropped(1), dropped(2))


def test_half_precision_and_autocast() -> None:
    module = nn.MultiheadAttention(E, H)
    x = torch.randn(L, B, E)
    with torch.autocast("cpu", torch.bfloat16):
        stock = module(x, x, x, need_weights=False)[0]
        with patched(module):
            ours = module(x, x, x, need_weights=False)[0]
    assert ours.dtype == stock.dtype == torch.bfloat16
    assert (ours - stock).abs().max() <= 2**-6 * stock.abs().max()
