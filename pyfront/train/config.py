"""TrainConfig: every setting of `fusetune finetune`, from Python, the command line, YAML or JSON.

Nothing heavy is imported here, so that `fusetune --help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in what was given to fusetune, or in its surroundings; the message is one line that says what to do.

    `exit_code` is what the command line then returns.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    check: Callable[[Any], bool] = lambda _: True,
    must: str = "",
) -> Any:
    """A dataclass field; `must` says in words what `check` tests."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "check": check, "must": must})


def positive(default: float | None, help: str) -> Any:
    return option(default, help, check=lambda value: value > 0, must="be > 0")


def at_least_zero(default: float, help: str) -> Any:
    return option(default, help, check=lambda value: value >= 0, must="be >= 0")


TASKS = ("sequence-classification", "causal-lm")
METHODS = ("lora", "full", "head")
QUANTIZE = ("nf4", "int8")
OPTIM_STATES = ("float32", "bfloat16", "int8")
MASTER_WEIGHTS = ("fp32", "split16")


@dataclass
class TrainConfig:
    """Settings of a fine-tuning run. The defaults make the default job; None is decided when the run starts.

    Raises:
        UserError: a value of the wrong type or out of range.
    """

    model_name: str | None = option(
        None, "hub id or local folder of the pretrained model (default: MiniLM, or a new Llama)"
    )
    dataset: str | None = option(None, "hub id, or a csv, tsv, json, jsonl, parquet or txt file (default: docstrings)")
    dataset_config: str | None = option(None, "configuration (subset) of a hub dataset")
    eval_dataset: str | None = option(None, "file to evaluate on, where the dataset has no split for it")
    task: str = option("sequence-classification", "what to train for", TASKS)
    method: str | None = option(None, "LoRA adapters, all weights, or the head alone (default: lora)", METHODS)
    text_column: str | None = option(None, "column with the text (default: found by name)")
    text_pair_column: str | None = option(None, "column with a second text, for pairs of sentences")
    label_column: str | None = option(None, "column with the label (default: found by name)")
    num_labels: int | None = option(
        None, "number of classes, where the labels are integers", (), lambda n: n > 1, "be > 1"
    )
    max_length: int | None = option(None, "longest text in tokens; longer ones are cut", (), lambda n: n > 2, "be > 2")
    packing: bool = option(True, "causal-lm: join the texts and cut them into blocks of max_length tokens")
    eval_fraction: float = option(
        0.1,
        "share of the rows to evaluate on, where the dataset has no split for it",
        check=lambda value: 0 < value < 1,
        must="be between 0 and 1",
    )
    max_train_samples: int | None = positive(None, "use at most this many rows for training")
    max_eval_samples: int | None = positive(None, "use at most this many rows for evaluation")

    num_epochs: int | None = positive(None, "passes over the training data (default: 3)")
    max_steps: int = at_least_zero(0, "stop after this many optimizer steps; 0 for no limit")
    train_batch_size: int | None = positive(None, "rows per device and forward pass (default: 16)")
    eval_batch_size: int = positive(64, "rows per device in evaluation")
    gradient_accumulation_steps: int = positive(1, "forward passes per optimizer step")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time")
    lr: float | None = positive(None, "peak learning rate (default: by method)")
    lr_scheduler: str = option("linear", "transformers' name of the learning rate schedule")
    warmup_ratio: float = option(
        0.1,
        "share of the steps in which the learning rate rises",
        check=lambda value: 0 <= value < 1,
        must="be in [0, 1)",
    )
    weight_decay: float = at_least_zero(0.0, "AdamW's weight decay")
    max_grad_norm: float = at_least_zero(1.0, "clip gradients to this norm; 0 for not at all")
    optim_state: str = option(
        "float32", "how AdamW keeps its two states: 8, 4 or a little over 2 bytes a trained weight", OPTIM_STATES
    )
    master_weights: str | None = option(
        None,
        "train weights in bfloat16, which AdamW rounds from float32 ones: of those it keeps copies (fp32) or the lower"
        " halves (split16) (default: none; trained weights are float32)",
        MASTER_WEIGHTS,
    )
    stochastic_rounding: bool = option(
        False, "train weights in bfloat16, which AdamW rounds up or down at random so that the mean is right"
    )
    lora_r: int = positive(16, "rank of the adapters")
    lora_alpha: int | None = positive(None, "adapters are scaled by lora_alpha / lora_r (default: 2 lora_r)")
    lora_dropout: float = option(
        0.05, "dropout on the adapters' input", check=lambda value: 0 <= value < 1, must="be in [0, 1)"
    )
    lora_targets: str = option("all-linear", "modules to adapt, separated by commas, or all-linear")
    quantize: str | None = option(
        None, "with lora: hold the frozen weights in 4 bits (QLoRA) or 8 (default: not quantized)", QUANTIZE
    )
    dtype: str = option("auto", "precision of the training", ("auto", "float32", "bfloat16", "float16"))
    device: str = option("auto", "where to train", ("auto", "cpu", "cuda"))
    seed: int = at_least_zero(42, "seed of everything that is random")
    patch: bool = option(True, "use fusetune's kernels; false trains the stock model")
    compare: bool | None = option(None, "time the stock step beside ours at the end (default: in the default job)")

    output_dir: str = option("fusetune-output", "where checkpoints, the model, metrics and plots go")
    overwrite: bool = option(False, "start over in an output_dir that holds an earlier run")
    resume_from_checkpoint: str | None = option(None, "a checkpoint folder, or `last` for the newest in output_dir")
    save_steps: int = at_least_zero(0, "save a checkpoint every so many steps; 0 for once per epoch")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _convert(field.name, getattr(self, field.name), hints[field.name])
            setattr(self, field.name, value)
            if value is None:
                continue
            choices = field.metadata["choices"]
            if choices and value not in choices:
                value = VALUE_ALIASES.get(str(value), value)
                if value not in choices:
                    raise UserError(f"config: {field.name} must be one of {', '.join(choices)}, got {value!r}")
                setattr(self, field.name, value)
            if not field.metadata["check"](value):
                raise UserError(f"config: {field.name} must {field.metadata['must']}, got {value!r}")

    def update_config(self, settings: Mapping[str, Any] | None = None, **more: Any) -> TrainConfig:
        """Changes settings in place and returns self. Names may be aliases, such as `learning_rate` for `lr`.

        Raises:
            UserError: an unknown name (with a suggestion), one setting given twice, or a value that does not fit; self
                is then unchanged.
        """
        values: dict[str, Any] = {}
        for name, value in [*(settings or {}).items(), *more.items()]:
            field, value = _resolve(str(name), value)
            if field in values:
                raise UserError(f"config: {field} must be given once, got it again as {name}")
            values[field] = value
        checked = dataclasses.replace(self, **values)
        for field in values:
            setattr(self, field, getattr(checked, field))
        return self


ALIASES = {
    "batch_size": "train_batch_size",
    "per_device_train_batch_size": "train_batch_size",
    "context_length": "max_length",
    "dataset_name": "dataset",
    "epochs": "num_epochs",
    "gradient_accumulation": "gradient_accumulation_steps",
    "intermediate_step_save": "save_steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler",
    "max_train_step": "max_steps",
    "model": "model_name",
    "model_name_or_path": "model_name",
    "num_train_epochs": "num_epochs",
    "peft_method": "method",
    "resume": "resume_from_checkpoint",
    "target_modules": "lora_targets",
    "task_mode": "task",
    "val_batch_size": "eval_batch_size",
}
VALUE_ALIASES = {
    "classification": "sequence-classification",
    "seq_classification": "sequence-classification",
    "generation": "causal-lm",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}


def require(*packages: str) -> None:
    """Raises UserError where a package that training or a trained model needs is not installed."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"{', '.join(missing)} must be installed; `pip install 'fusetune[train]'` does that")


def update_config(config: TrainConfig, settings: Mapping[str, Any] | None = None, **more: Any) -> TrainConfig:
    """`config.update_config(settings, **more)`."""
    return config.update_config(settings, **more)


def load_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file, as `update_config` takes them.

    Raises:
        UserError: the file cannot be read, is no YAML or JSON, or is no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config: {path} is not text ({error})") from error
    if path.suffix.lower() == ".json":
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise UserError(f"config: {path} is not valid JSON ({error})") from error
    else:
        try:
            import yaml

            settings = yaml.safe_load(text)
        except ImportError as error:
            raise UserError(f"config: {path} needs PyYAML to be read; `pip install pyyaml`, or use JSON") from error
        except yaml.YAMLError as error:
            raise UserError(f"config: {path} is not valid YAML ({error})") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"config: {path} must hold names and values, got a {type(settings).__name__}")
    return settings


def _resolve(name: str, value: Any) -> tuple[str, Any]:
    """The field that a name or an alias means, and the value for it."""
    key = name.replace("-", "_")
    if key == "use_peft":
        return "method", "lora" if _convert(name, value, bool) else "full"
    key = ALIASES.get(key, key)
    if key == "resume_from_checkpoint" and str(value).lower() in ("true", "false"):
        return key, "last" if str(value).lower() == "true" else None
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    if key in names:
        return key, value
    close = difflib.get_close_matches(key, [*names, *ALIASES, "use_peft"], n=1)
    raise UserError(f"config: unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` says. Strings are read as numbers and booleans: YAML's 5e-4 is a string, as are all flags."""
    kinds = typing.get_args(hint) or (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and type(None) in kinds):
        if type(None) in kinds:
            return None
        raise UserError(f"config: {name} must have a value, got None")
    kind = kinds[0]
    wrong = UserError(f"config: {name} must be {_WORDS[kind]}, got {value!r}")
    if kind is str:
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        if not isinstance(value, (str, Path)):
            raise wrong
        return str(value)
    if kind is bool:
        if str(value).lower() not in _BOOLEANS:
            raise wrong
        return _BOOLEANS[str(value).lower()]
    if isinstance(value, bool):
        raise wrong
    try:
        number = float(value)
        if not math.isfinite(number) or (kind is int and not number.is_integer()):
            raise wrong
    except (TypeError, ValueError) as error:
        raise wrong from error
    return kind(number)


_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a finite number"}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
