"""The Trainer of `fusetune finetune`: loss and metric of every step, progress, and Ctrl-C that leaves a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from fusetune.train.data import GroupedByLength, TokenizedRows
from fusetune.train.metrics import accuracy, macro_f1, perplexity
from fusetune.train.trainer import Trainer


class RecordingTrainer(Trainer):
    """Adds to the logs the metric of each step and evaluation: accuracy of a classifier, perplexity of a causal LM.

    Attributes:
        eval_steps: (loss, metric, items) of each batch of the latest evaluation.
        save_times: seconds that each checkpoint took.
    """

    def __init__(self, *args: Any, classify: bool, group_by_length: bool, **kwargs: Any) -> None:
        self.metric = "accuracy" if classify else "perplexity"
        self.classify, self.group_by_length = classify, group_by_length
        self.eval_steps: list[tuple[float, float, int]] = []
        self.save_times: list[float] = []
        self._hits = self._seen = 0
        if classify:
            kwargs |= {"compute_metrics": _classifier_metrics, "preprocess_logits_for_metrics": _classes}
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset
        if self.group_by_length and isinstance(rows, TokenizedRows):
            return GroupedByLength(rows.lengths, self.args.train_batch_size, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.classify and model.training:
            self._hits += int((_classes(outputs.logits, labels) == labels).sum())
            self._seen += labels.numel()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs[self.metric] = self._hits / max(1, self._seen) if self.classify else perplexity(logs["loss"])
            self._hits = self._seen = 0
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result: Any = super().prediction_step(model, inputs, *args, **kwargs)
        loss, logits, labels = result
        if self.classify:
            self.eval_steps.append((float(loss), accuracy(_classes(logits, labels), labels), len(labels)))
        else:
            items = int((inputs["labels"][..., 1:] != -100).sum())
            self.eval_steps.append((float(loss), perplexity(float(loss)), items))
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self.eval_steps = []
        with torch.random.fork_rng(devices=[]):  # its DataLoader draws a seed: training must not depend on evaluations
            output: Any = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        mean = sum(loss * items for loss, _, items in self.eval_steps) / max(1, sum(n for *_, n in self.eval_steps))
        output.metrics[f"{metric_key_prefix}_loss"] = mean  # over items; transformers' is over batches
        if not self.classify:
            output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity(mean)
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.save_times.append(time.perf_counter() - start)


def _classes(logits: Any, labels: Any) -> torch.Tensor:
    """The class with the largest logit; some models give a tuple of which the first are the logits."""
    first: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(-1)


def _classifier_metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
    predicted, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"accuracy": accuracy(predicted, labels), "macro_f1": macro_f1(predicted, labels)}


class Progress(TrainerCallback):
    """One bar with loss, tokens per second and the time left, and a line per evaluation.

    Attributes:
        seconds, tokens: spent and seen in training steps, without evaluation and checkpoints.
        epoch_times: seconds of each epoch's training steps.
        evaluated: the step after which the model was evaluated last.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self.epoch_times: list[float] = []
        self.evaluated: int | None = None
        self._bar: Any = None
        self._start = self._epoch_start = 0.0
        self._first_token = 0
        self._loss = float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_token = state.num_input_tokens_seen
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=None, leave=False
        )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch_start = self.seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        self.tokens = state.num_input_tokens_seen - self._first_token

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch_times.append(self.seconds - self._epoch_start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:  # once per step, after on_step_end
            self._loss = logs["loss"]
            rate = self.tokens / self.seconds
            self._bar.set_postfix_str(f"loss {self._loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            self._bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated = state.global_step
        if self._bar is not None:
            found = f"training loss {self._loss:.4f}, {describe(kwargs['metrics'])}"
            tqdm.write(f"epoch {state.epoch:.4g}, step {state.global_step}: {found}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def describe(metrics: dict[str, float]) -> str:
    """What an evaluation found, in words."""
    names = {
        "eval_loss": "loss",
        "eval_accuracy": "accuracy",
        "eval_macro_f1": "macro F1",
        "eval_perplexity": "perplexity",
    }
    return ", ".join(f"{word} {metrics[name]:.4g}" for name, word in names.items() if name in metrics)


class StopOnInterrupt(TrainerCallback):
    """Lets Ctrl-C end the training after the optimizer step in progress, with a checkpoint to resume from exactly.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._stopping = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGINT within the block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\ninterrupted: saving after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            self._stopping = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stopping:  # on_step_end has asked for the checkpoint
            control.should_evaluate = control.should_save = False
