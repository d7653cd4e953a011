"""Tiny stock models, their batches, and what it means to follow them. Imported by the tests of patching."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, LlamaConfig

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


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
