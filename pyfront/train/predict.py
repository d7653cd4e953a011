"""Using what was trained: classes of texts, continuations of prompts, and merging an adapter into its model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusetune.train.config import TrainConfig, UserError, require
from fusetune.train.files import replacing_folder

if TYPE_CHECKING:
    import torch


class Prediction(NamedTuple):
    label: str
    probability: float


def predict(folder: str | Path, texts: Sequence[str], batch_size: int = 32) -> Iterator[Prediction]:
    """The most probable class of each text, by the classifier in `folder` (an output_dir, or a folder with a model).

    Raises:
        UserError: there is no classifier that can be loaded.
    """
    require("transformers", "peft")
    import torch

    from fusetune.train.model import count_positions

    model, tokenizer = load_trained(folder, "SequenceClassification")
    limit = count_positions(model.config, tokenizer)
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        with torch.inference_mode():
            probabilities = model(**batch.to(model.device)).logits.float().softmax(-1)
        for p, number in zip(*probabilities.max(-1), strict=True):
            yield Prediction(model.config.id2label[int(number)], float(p))


def generate(folder: str | Path, prompts: Sequence[str], max_new_tokens: int = 50) -> Iterator[str]:
    """Each prompt with its most probable continuation, by the causal LM in `folder`.

    Raises:
        UserError: there is no causal LM that can be loaded, or it has too few positions for a prompt and what follows.
    """
    require("transformers", "peft")
    import torch

    from fusetune.train.model import count_positions

    model, tokenizer = load_trained(folder, "CausalLM")
    limit = count_positions(model.config, tokenizer)
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        length = inputs["input_ids"].shape[1]
        if length + max_new_tokens > limit:
            raise UserError(
                f"generate: prompt and continuation must have at most {limit} tokens, the model's positions, got"
                f" {length} and {max_new_tokens}; use --max-new-tokens"
            )
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        yield tokenizer.decode(tokens[0], skip_special_tokens=True)


def merge(folder: str | Path, output: str | Path) -> None:
    """Writes the adapter in `folder`, merged into its model, to `output`: a model like any other. Weights that were
    quantised for the training are dequantised, and the adapter added to those.

    Raises:
        UserError: there is no adapter that can be loaded, or `output` exists or cannot be written.
    """
    require("transformers", "peft")
    from fusetune.train.model import quiet

    source, target = find_trained(folder), Path(output).expanduser()
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"merge: {folder} must hold an adapter, got a full model")
    if target.exists():
        raise UserError(f"merge: {output} must not exist yet")
    model, tokenizer = load_trained(folder, dequantized=True)
    try:
        with quiet(), replacing_folder(target) as partial:
            model.merge_and_unload().save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except OSError as error:
        raise UserError(f"merge: {output} cannot be written ({error})") from error


def find_trained(folder: str | Path) -> Path:
    """The folder with the model: `folder`, or `model` in it."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"model: {folder} is not a folder")
    for candidate in (path, path / "model"):
        if any(
            (candidate / name).is_file()
            for name in ("adapter_config.json", "model.safetensors", "model.safetensors.index.json")
        ):
            return candidate
    raise UserError(f"model: {folder} must hold a model or an adapter, got a folder without; did the training finish?")


def quantized_as(adapter: Path) -> tuple[str, torch.dtype] | None:
    """The format of the weights under an adapter in its training, and the dtype that they had before: by what lies in
    its folder, or for a checkpoint by the settings of the run."""
    import torch

    from fusetune.train.model import find_dtype

    for path in (adapter / "fusetune.json", adapter.parent / "config.json"):
        settings = json.loads(path.read_text()) if path.is_file() else {}
        if settings.get("quantize"):
            dtype = settings.get("dtype", "auto")
            return settings["quantize"], find_dtype(TrainConfig()) if dtype == "auto" else getattr(torch, dtype)
    return None


def load_trained(folder: str | Path, kind: str | None = None, dequantized: bool = False) -> tuple[Any, Any]:
    """The model for inference, an adapter on top of its base model, and its tokenizer.

    Args:
        kind: what its class's name ends with.
        dequantized: weights that were quantised for the training have their values in it, but in full precision.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    from fusetune.nn.quantize import dequantize_linears
    from fusetune.train.data import reason
    from fusetune.train.model import find_model, quantize, quiet

    path = find_trained(folder)
    adapter = (path / "adapter_config.json").is_file()
    try:
        if adapter:
            from peft import PeftConfig, PeftModel, TaskType

            peft_config = PeftConfig.from_pretrained(str(path))
            found = "SequenceClassification" if peft_config.task_type == TaskType.SEQ_CLS else "CausalLM"
            base = find_model(str(peft_config.base_model_name_or_path))
            names = json.loads((path / "labels.json").read_text()) if found == "SequenceClassification" else []
            labels = {"num_labels": len(names), "id2label": dict(enumerate(names))} if names else {}
            config = AutoConfig.from_pretrained(base, **labels)
        else:
            base = str(path)
            config = AutoConfig.from_pretrained(base)
            architecture = (config.architectures or ["a model of unknown class"])[0]
            found = architecture.rpartition("For")[2] or architecture
        if kind is not None and found != kind:
            verb = "generate" if found == "CausalLM" else "predict"
            raise UserError(f"model: {folder} must hold a model for {kind}, got one for {found}; use `fusetune {verb}`")
        auto = getattr(transformers, f"AutoModelFor{found}")
        with quiet():  # it would report that the base model lacks the adapter's head
            model = auto.from_pretrained(base, config=config, **({"ignore_mismatched_sizes": True} if adapter else {}))
            if adapter:
                if how := quantized_as(path):
                    quantize(model, *how)
                    if dequantized:
                        dequantize_linears(model)
                model = PeftModel.from_pretrained(model, str(path))
            tokenizer = AutoTokenizer.from_pretrained(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: {folder} cannot be loaded ({reason(error)})") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer
