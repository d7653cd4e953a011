"""Compiled kernels for fine-tuning Hugging Face models: LoRA linear, flash attention and AdamW on CPU and GPU.

The public names are imported at first use, so that `import fusetune` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # type checkers take it for true; `typing` would double the time of this import
if TYPE_CHECKING:
    from typing import Any

    from fusetune import ops
    from fusetune.optim import AdamW
    from fusetune.patching import PatchReport, patch, patched, unpatch
    from fusetune.train import TrainConfig, Trainer, apply_peft, finetune

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
    "TrainConfig": "fusetune.train",
    "Trainer": "fusetune.train",
    "apply_peft": "fusetune.train",
    "patch": "fusetune.patching",
    "patched": "fusetune.patching",
    "unpatch": "fusetune.patching",
}
_MODULES = {"finetune": "fusetune.train.finetune", "ops": "fusetune.ops"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'fusetune' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
