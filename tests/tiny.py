"""Models and data so small that a test trains them in a second, and a full disk; nothing is downloaded."""

from __future__ import annotations

import csv
import errno
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

WORDS = {
    "animal": ["cat", "dog", "horse", "mouse", "bird", "fish", "cow", "sheep"],
    "plant": ["rose", "oak", "fern", "moss", "tulip", "pine", "grass", "ivy"],
    "metal": ["iron", "gold", "tin", "lead", "zinc", "copper", "silver", "steel"],
}
FILLERS = ["the", "a", "big", "small", "old", "new", "near", "far", "and", "or", "under", "over", "seen", "liked"]


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 3 to 12 words, and the kind of thing that most of their nouns are."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(sorted(WORDS))
        words = [draw.choice(WORDS[label] if draw.random() < 0.4 else FILLERS) for _ in range(draw.randint(2, 11))]
        rows.append((" ".join([draw.choice(WORDS[label]), *words]), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLERS, *(word for group in WORDS.values() for word in group)]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


def bert_config(**changes):
    from transformers import BertConfig

    settings = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 32,
    }  # fmt: skip
    return BertConfig(**settings | changes)


def llama_config(**changes):
    from transformers import LlamaConfig

    settings = {
        "vocab_size": len(tokenizer()), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 3,
    }  # fmt: skip
    return LlamaConfig(**settings | changes)


def save_bert(folder: Path, **changes) -> Path:
    """A folder with a BERT encoder, its weights of seed 0, and its tokenizer."""
    from transformers import BertModel

    return _save(BertModel, bert_config(**changes), folder)


def save_llama(folder: Path, **changes) -> Path:
    from transformers import LlamaForCausalLM

    return _save(LlamaForCausalLM, llama_config(**changes), folder)


def _save(model, config, folder: Path) -> Path:
    import torch

    from fusetune.train.model import quiet

    torch.manual_seed(0)
    with quiet():
        model(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def files(folder):
    """What a folder holds: {path: bytes}."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def full_disk(original, allowed):
    """A function that writes half a file and then fails as on a full disk, from its call number `allowed` on."""
    calls = []

    def write(data, path, *args, **kwargs):
        calls.append(path)
        if len(calls) <= allowed:
            return original(data, path, *args, **kwargs)
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    return write
