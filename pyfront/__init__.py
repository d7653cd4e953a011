"""Compiled kernels for fine-tuning Hugging Face models: LoRA linear, flash attention and AdamW on CPU and GPU.

The public names are imported at first use, so that `import fusetune` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # type checkers take it for true; `typing` would double the time of this import
if TYPE_CHECKING:
    from typing import Any

    from fusetune import finetune, ops
    from fusetune.optim import AdamW
    from fusetune.patching import PatchReport, patch, patched, unpatch
    from fusetune.train.config import TrainConfig
    from fusetune.train.model import apply_peft
    from fusetune.train.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "PatchReport",
    "TrainConfig",
    "Trainer",
    "apply_peft",
    "finetune",
    "ops",
    "patch",
    "patched",
    "unpatch",
]

_HOMES = {
    "AdamW": "fusetune.optim",
    "PatchReport": "fusetune.patching",
    "TrainConfig": "fusetune.train.config",
    "Trainer": "fusetune.train.trainer",
    "apply_peft": "fusetune.train.model",
    "patch": "fusetune.patching",
    "patched": "fusetune.patching",
    "unpatch": "fusetune.patching",
}
_MODULES = ("finetune", "ops")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"fusetune.{name}")
    raise AttributeError(f"module 'fusetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
