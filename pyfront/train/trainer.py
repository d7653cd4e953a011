"""transformers.Trainer on fusetune's kernels."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from fusetune.optim import AdamW
from fusetune.train.files import move_into_place

_ADAMW = ("adamw_torch", "adamw_torch_fused")
_WHOLE_GRADIENTS = ("NO", "MULTI_CPU", "MULTI_GPU")  # what accelerate calls it where every process has all of them

_log = logging.getLogger(__name__)


class Trainer(transformers.Trainer):
    """A transformers.Trainer, with the same arguments and these differences:

    - The model is patched (`fusetune.patch`; the report is `trainer.patch_report`), and AdamW is fusetune's where
      `args.optim` names torch's and no optimizer is passed; `patch=False` does neither. Options of fusetune's go in as
      `optimizer_cls_and_kwargs=(fusetune.AdamW, {"state_dtype": "int8"})`; what is not there is taken from `args`.
    - A fusetune.AdamW that the trainer makes clips the gradients to `args.max_grad_norm` within its step, which saves
      the passes over them. The `grad_norm` that is logged is as before, but until the step gradients are as backward
      left them: callbacks see them unclipped and, in float16, scaled. An optimizer that is passed, another one that
      `args.optim` names, one whose own options say `max_grad_norm`, FSDP and DeepSpeed leave clipping to transformers.
    - The loss is right under gradient accumulation for every model: the mean over all labels of the optimizer step, as
      if it were one batch. transformers sums the means of the forward passes where a model takes `num_items_in_batch`
      and ignores it, as BERT's and T5's do.
    - A loss that is not finite ends the training before the optimizer step, and weights that are not finite are not
      saved.
    - A checkpoint appears only when it is complete, in the place of an older one of the same step.

    Raises:
        FloatingPointError: from `train`, for a loss or weights that are not finite; names the step.
        OSError: from `train`, when a checkpoint cannot be written; names the last good one.
    """

    def __init__(self, *args: Any, patch: bool = True, **kwargs: Any) -> None:
        self._patch = patch
        self._staging: Path | None = None  # stands for the output folder while a checkpoint is written
        self._divides_by_items: bool | None = None  # whether the loss honours num_items_in_batch; None: not measured
        self._clipping: AdamW | None = None  # the optimizer that clips, and the norm that it will have found
        self._grad_norm: Tensor | None = None
        self.patch_report: Any = None
        super().__init__(*args, **kwargs)
        if self.model_init is None:
            self._patch_model(self.model)
        chosen = self.optimizer_cls_and_kwargs
        if chosen is None and patch and self.optimizer is None and self.args.optim in _ADAMW:
            chosen = (AdamW, {})
        if chosen is not None and chosen[0] is AdamW:
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            settings = {"lr": self.args.learning_rate, "betas": betas, "eps": self.args.adam_epsilon}
            self.optimizer_cls_and_kwargs = (AdamW, settings | chosen[1])

    def _patch_model(self, model: nn.Module) -> None:
        if self._patch:
            from fusetune.patching import patch

            self.patch_report = patch(model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model: nn.Module = super().call_model_init(trial)
        self._patch_model(model)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        passed = self.optimizer is not None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        ours = not passed and isinstance(optimizer, AdamW) and "max_grad_norm" not in optimizer.defaults
        if ours and self.accelerator.distributed_type in _WHOLE_GRADIENTS:
            self._clipping = optimizer
            optimizer.register_step_post_hook(self._after_step)
            _log.info("gradients are clipped to max_grad_norm within the step of fusetune.AdamW")
        return optimizer

    def _clip_in_step(self, max_grad_norm: float) -> Tensor | None:
        """Has the coming step clip: the norm, a number once that is done. None where the optimizer is another one."""
        if self._clipping is None or getattr(self.optimizer, "optimizer", self.optimizer) is not self._clipping:
            return None
        self._clipping.defaults["max_grad_norm"] = max_grad_norm
        self._grad_norm = torch.full((), torch.nan, device=self.args.device)
        return self._grad_norm

    def _after_step(self, optimizer: AdamW, *_: Any) -> None:
        if self._grad_norm is not None and optimizer.grad_norm is not None:
            self._grad_norm.copy_(optimizer.grad_norm)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = self._clip_in_step(self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # max_grad_norm is 0: the norm alone
            grad_norm = self._clip_in_step(torch.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"training: loss must be finite, got {loss.item()} at step {self.state.global_step + 1};"
                f" {self.last_checkpoint()}; try a lower learning rate, or look for bad values in the data"
            )
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """transformers' loss; where the model ignores `num_items_in_batch`, its mean is weighted by its share of them.

        With n labels in this forward pass and N in the optimizer step, the weight is n / N, so that the sum over the
        passes is the mean over all N labels.
        """
        weight = None
        if num_items_in_batch is not None and self.compute_loss_func is None and self.args.n_gpu <= 1:
            items = self._count_items(inputs)
            if self._divides_by_items is None and model.training and self._passes() > 1 and items > 0:
                self._divides_by_items = self._measure_loss(model, inputs, items)
            if self._divides_by_items is False:
                weight = items / num_items_in_batch
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if weight is None:
            return result
        if return_outputs:
            loss, outputs = result
            return loss * weight, outputs
        return result * weight

    def _passes(self) -> int:
        """The forward passes whose gradients make one optimizer step."""
        return int(self.args.gradient_accumulation_steps * self.args.world_size)

    def _count_items(self, inputs: dict[str, Any]) -> Tensor:
        """The labels that count in these inputs, as transformers counts them for `num_items_in_batch`."""
        if "shift_labels" in inputs:
            labels = inputs["shift_labels"]
        else:
            labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
        count: Tensor = labels.ne(-100).sum()
        return count

    def _measure_loss(self, model: nn.Module, inputs: dict[str, Any], items: Tensor) -> bool:
        """Whether the loss halves when `num_items_in_batch` doubles; without dropout, so that nothing else moves it.

        Measured and not read off the model's signature, which says only that the argument is taken.
        """
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            losses: list[Any] = [
                super(Trainer, self).compute_loss(model, dict(inputs), num_items_in_batch=n) for n in (items, 2 * items)
            ]
        model.train()
        once, twice = map(float, losses)
        return abs(once - twice) > 0.1 * abs(once)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def last_checkpoint(self) -> str:
        """Says which checkpoint a new run can resume from."""
        folder = str(self.args.output_dir)
        last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        return f"the last checkpoint is {last}" if last else "no checkpoint was saved before"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Lets transformers write the checkpoint into a staging folder, and moves it out when it is complete."""
        step = self.state.global_step
        run = Path(self._get_output_dir(trial))
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        staging = run / ".partial"
        if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
            raise FloatingPointError(
                f"training: weights must be finite, got nan or inf after step {step};"
                f" {self.last_checkpoint()}; try a lower learning rate"
            )
        try:
            self._staging = staging
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(checkpoint)
                if self.args.should_save:
                    self.state.save_to_json(str(staging / checkpoint.name / transformers.trainer.TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_into_place(staging / checkpoint.name, checkpoint)
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)
        except Exception as error:  # torch and safetensors have their own types for a full disk
            raise OSError(
                f"training: the checkpoint of step {step} must be written to {run},"
                f" got {type(error).__name__}: {error}; {self.last_checkpoint()}"
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
