"""Whole training steps, stock transformers + PEFT + torch.optim.AdamW(fused=True) against the same model patched.

A step is forward, backward, clipping and AdamW. MFU is its model flops over the rate of a large matrix product.
"""

from __future__ import annotations

from typing import Any

import pytest
import timer
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model

from fusetune.train.compare import agreement, contenders, gemm_rate
from fusetune.train.model import flops_per_token, minilm_folder

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}


def minilm(method: str) -> Any:
    """The encoder of the demo: 6 layers of width 384, dropout 0.1."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=8)
    return get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, **LORA)) if method == "lora" else model


def small_llama(method: str) -> Any:
    """Layers of SmolLM-135M (width 576, 9 heads over 3), 8 of its 30, and 8192 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **LORA)) if method == "lora" else model


STEPS = [  # model, method, B, S, shortest text over S
    (minilm, "lora", 16, 64, 1.0),
    (minilm, "lora", 32, 128, 1.0),
    (minilm, "lora", 32, 128, 0.15),
    (minilm, "full", 32, 128, 1.0),
    (small_llama, "lora", 4, 512, 1.0),
    (small_llama, "full", 4, 512, 1.0),
]


@pytest.mark.parametrize(("make", "method", "B", "S", "shortest"), STEPS)
def test_finetune(
    benchmark: Any, device: torch.device, make: Any, method: str, B: int, S: int, shortest: float
) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make(method).to(device)
    ids = torch.randint(200, 8000, (B, S), device=device)
    keep = torch.arange(S, device=device) < torch.linspace(shortest, 1.0, B, device=device)[:, None] * S
    batch = {"input_ids": ids, "attention_mask": keep.long()}
    batch["labels"] = ids if make is small_llama else torch.arange(B, device=device) % 8

    stock, ours = contenders(model, dtype)
    seen = agreement(stock, ours, batch)
    assert abs(seen["fusetune_loss"] / seen["stock_loss"] - 1) <= (1e-5 if dtype == torch.float32 else 1e-2)
    timer.compare(
        *(benchmark, lambda: ours.step(batch), {"stock": lambda: stock.step(batch)}),
        **dict(op="finetune", model=make.__name__, method=method, shape=f"B={B} S={S}", mask=f"{shortest:g}"),
        **dict(dtype=str(dtype)[6:], **{name: float(f"{value:.7g}") for name, value in seen.items()}),
    )
    info = benchmark.extra_info
    rate = int(keep.sum()) / info["ours_ms"] * 1e3
    info["tokens_per_second"] = round(rate)
    info["mfu"] = round(rate * flops_per_token(model, method) / gemm_rate(device, dtype), 3)
