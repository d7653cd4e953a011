"""One fine-tuning run, from a TrainConfig to a saved model, metrics and plots."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import resource
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusetune.train.config import TrainConfig, UserError, load_config, require
from fusetune.train.files import replacing_file, replacing_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from fusetune.train.data import Texts
    from fusetune.train.recorder import Progress, RecordingTrainer

# Settings in which a resumed run may differ: they decide neither its data nor its arithmetic up to the checkpoint.
MAY_CHANGE = {
    "compare", "device", "eval_batch_size", "max_steps", "num_epochs", "output_dir", "overwrite",
    "resume_from_checkpoint", "save_steps",
}  # fmt: skip


def main(train_config: TrainConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Fine-tunes a model as `train_config` and `settings` say; without any, runs the default job.

    The default job teaches the MiniLM encoder, by LoRA, to tell the subject of docstrings of Python's standard library;
    with `task="causal-lm"` it trains a small Llama on the texts of `pydoc_data.topics`. Neither needs a network.

    In `output_dir` it leaves `model` (an adapter in PEFT's format, or a full model, with its tokenizer), `checkpoint-N`
    folders, `metrics.json`, `loss.png`, TensorBoard files in `runs`, and `config.json`, the settings in force.

    Args:
        train_config: stays unchanged.
        settings: changes to it; names as in `TrainConfig.update_config`.

    Returns:
        `metric` (accuracy or perplexity) and in its terms `last_epoch_train_loss`, `last_epoch_train_metric`,
        `train_step_loss`, `train_step_metric`, `last_epoch_eval_loss`, `last_epoch_eval_metric`, `eval_step_loss`,
        `eval_step_metric` (batches of the last evaluation), `best_eval_loss`; `before` and `after` (all metrics of the
        first and the last evaluation), `bag_of_words` (of the default job) and `compare` (of `compare_steps`), or None;
        `quantized` (with `quantize`: layers, weights, bytes_before and bytes_now), or None;
        `avg_epoch_time`, `avg_checkpoint_time`, `train_seconds`, `tokens_per_second`, `peak_memory_bytes`,
        `optimizer_bytes` (the optimizer's state), `mfu`, `global_step`, `model_dir` and `metrics_filename`. Times are
        in seconds.

    Raises:
        UserError: something is wrong with the settings, the data, the model or the disk, the loss is not finite, or
            Ctrl-C was pressed; one line says what to do.
    """
    require("transformers", "peft", "accelerate", "datasets")
    import torch

    from fusetune.train.model import quiet

    config = dataclasses.replace(train_config or TrainConfig()).update_config(settings)
    try:
        with quiet():
            return _run(config)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{error}; try a smaller --batch-size, or --gradient-checkpointing") from error


def _run(config: TrainConfig) -> dict[str, Any]:
    import transformers

    from fusetune.nn.quantize import quantized_size
    from fusetune.optim import AdamW
    from fusetune.train import model as models
    from fusetune.train.recorder import RecordingTrainer, describe

    output = _open_output(config)
    resume = _find_checkpoint(config, output)
    classify = config.task == "sequence-classification"
    demo = config.dataset is None and classify
    if config.compare is None:
        config.compare = demo and config.model_name is None
    _set_defaults(config)

    device, dtype = models.find_device(config), models.find_dtype(config)
    texts = _load_texts(config)
    transformers.set_seed(config.seed)
    model, tokenizer, notes = models.load(config, texts)
    config.max_length = models.find_max_length(config, model.config, tokenizer, 64 if demo else 256)
    use_cache = getattr(model.config, "use_cache", None)  # transformers' Trainer changes it
    train, evaluation = _tokenize(config, tokenizer, texts)
    _write_config(config, output, resume)
    print(
        f"model     {type(model).__name__} from {config.model_name or models.default_name(config)}, {device}, {dtype}"
    )
    print(f"data      {texts.source}: {len(train):,} rows to train on, {len(evaluation):,} to evaluate on", end="")
    print(f", {len(texts.names)} classes" if classify else f" of {config.max_length} tokens")
    if train.cut:
        notes.append(f"{train.cut:,} of {len(train):,} texts are longer than {config.max_length} tokens and were cut")
    for note in notes:
        print(f"note      {note}")
    prepared = models.apply_peft(model, config)
    options = {
        "state_dtype": config.optim_state,
        "master_weights": config.master_weights,
        "stochastic_rounding": config.stochastic_rounding,
    }
    if config.patch:
        weights = str(models.weights_dtype(config)).removeprefix("torch.")
        rounding = ", rounded stochastically" if config.stochastic_rounding else ""
        kept = f" with {config.master_weights} master weights" if config.master_weights else rounding
        clipping = f", clips to norm {config.max_grad_norm:g} in its step" if config.max_grad_norm else ""
        print(f"optimizer fusetune.AdamW: {weights} weights{kept}, {config.optim_state} states{clipping}")

    trainer = RecordingTrainer(
        prepared,
        _training_arguments(config, output, device, dtype),
        data_collator=_collator(config, tokenizer),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(AdamW, options) if config.patch else None,
        patch=config.patch,
        classify=classify,
        group_by_length=classify or not config.packing,
    )
    if importlib.util.find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(output / "runs"))))
    if trainer.patch_report is not None:
        print(trainer.patch_report)
    before = trainer.evaluate()
    print(f"before    {describe(before)}")
    if resume is None:
        for old in output.glob("checkpoint-*"):  # there are some only under --overwrite
            shutil.rmtree(old)
    progress = _train(trainer, resume, output)
    if progress.evaluated != trainer.state.global_step:  # resumed from a run that had only its evaluation before it
        trainer.evaluate()
    result = _results(trainer, progress, before)
    print(f"after     {describe(result['after'])}")
    if demo:
        result["bag_of_words"] = _bag_of_words(texts)
        print(f"          {describe(result['bag_of_words'])} by bag of words (naive Bayes) on the same texts")

    if config.patch:
        from fusetune.patching import unpatch

        unpatch(prepared)
    if use_cache is not None:
        model.config.use_cache = use_cache
    quantized = {"quantize": config.quantize, "dtype": str(dtype).removeprefix("torch.")} if config.quantize else {}
    result["model_dir"] = _save_model(prepared, tokenizer, texts.names, output, quantized)
    size = quantized_size(prepared)
    result["quantized"] = size._asdict() if size.layers else None
    result["optimizer_bytes"] = _state_bytes(trainer)
    result.update(_speed(config, prepared, progress, device, dtype))
    if config.compare:
        from fusetune.train.compare import compare_steps

        batches = list(itertools.islice(trainer.get_train_dataloader(), 6))
        result["compare"] = compare_steps(prepared, (6 * batches)[:6], device, dtype, config.max_grad_norm, options)
    _print_summary(result)
    result["metrics_filename"] = str(output / "metrics.json")
    _write_json(output / "metrics.json", result)
    _plot(trainer, result, f"{type(model).__name__} on {texts.source}", output / "loss.png")
    command = "predict" if classify else "generate"
    print(f'saved     {result["model_dir"]}; try: fusetune {command} {shlex.quote(str(output))} "some text"')
    return result


def _open_output(config: TrainConfig) -> Path:
    output = Path(config.output_dir).expanduser()
    if config.model_name and Path(config.model_name).expanduser().resolve() == (output / "model").resolve():
        raise UserError(f"output_dir: {output} must be another folder: what is trained would replace its `model`")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"output_dir: {output} must be a folder to write to ({error.strerror})") from error
    return output


def _find_checkpoint(config: TrainConfig, output: Path) -> str | None:
    """The checkpoint to resume from, or None for a new run."""
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(str(output))
    asked = config.resume_from_checkpoint
    if asked is None:
        earlier = last or (output / "model" if (output / "model").exists() else None)
        if earlier and not config.overwrite:
            raise UserError(
                f"output_dir: {output} holds {Path(earlier).name} of an earlier run; continue that with --resume, start"
                " over with --overwrite, or choose another --output-dir"
            )
        return None
    if asked == "last" and last is None:
        raise UserError(f"resume: {output} must hold a checkpoint, got none")
    folder = Path(str(last) if asked == "last" else asked).expanduser()
    if not (folder / "trainer_state.json").is_file():
        raise UserError(f"resume: {folder} must be a checkpoint folder, got one without trainer_state.json")
    return str(folder)


def _set_defaults(config: TrainConfig) -> None:
    """Decides the settings that are None, by what is trained on what."""
    from fusetune.train.model import check_quantize, weights_dtype

    new_model = config.model_name is None and config.task == "causal-lm"
    demo = config.model_name is None and config.dataset is None
    config.method = config.method or ("full" if new_model else "lora")
    if new_model and config.method != "full":
        raise UserError(f"config: method must be full for a new model, got {config.method}; or pass --model")
    check_quantize(config)
    weights_dtype(config)
    rates = {"lora": 1e-3 if demo else 5e-4, "full": 1e-3 if new_model else 5e-5, "head": 1e-3}
    config.lr = config.lr or rates[config.method]
    config.num_epochs = config.num_epochs or (1 if demo and not new_model else 3)
    config.train_batch_size = config.train_batch_size or 16
    config.lora_alpha = config.lora_alpha or 2 * config.lora_r


def _load_texts(config: TrainConfig) -> Texts:
    from fusetune.train import docstrings
    from fusetune.train.data import load_texts

    if config.dataset is not None:
        return load_texts(config)
    return docstrings.load_topics(config) if config.task == "causal-lm" else docstrings.load_docstrings(config)


def _tokenize(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Any:
    """The rows to train and to evaluate on."""
    from fusetune.train.data import tokenize_labelled, tokenize_running

    assert config.max_length
    if config.task == "causal-lm":
        parts = (texts.train, texts.evaluation)
        return [tokenize_running(tokenizer, part, config.packing, config.max_length) for part in parts]
    return (
        tokenize_labelled(tokenizer, texts.train, texts.train_labels, config.max_length),
        tokenize_labelled(tokenizer, texts.evaluation, texts.eval_labels, config.max_length),
    )


def _collator(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Pads each batch to its longest row."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if config.task == "sequence-classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer)  # pads the labels too


def _write_config(config: TrainConfig, output: Path, resume: str | None) -> None:
    """Writes the settings in force. Those on which a resumed run's result depends must be as in its first part."""
    settings = dataclasses.asdict(config)
    saved = Path(resume).parent / "config.json" if resume else None
    if saved and saved.is_file():
        for name, earlier in load_config(saved).items():
            if name not in MAY_CHANGE and settings.get(name) != earlier:
                raise UserError(
                    f"resume: {name} must be {earlier!r}, as in the run to resume, got {settings.get(name)!r}"
                )
    _write_json(output / "config.json", settings)


def _training_arguments(
    config: TrainConfig, output: Path, device: torch.device, dtype: torch.dtype
) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    from fusetune.train.data import reason

    checkpointing = "activation_checkpointing"  # the later name of gradient_checkpointing
    if checkpointing not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        checkpointing = "gradient_checkpointing"
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_train_epochs": config.num_epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.train_batch_size,
        "per_device_eval_batch_size": config.eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        checkpointing: config.gradient_checkpointing,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a share of the steps
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "eval_strategy": "epoch",
        "save_strategy": "steps" if config.save_steps else "epoch",
        "save_steps": config.save_steps or 500,
        "save_total_limit": 2,
        "prediction_loss_only": config.task == "causal-lm",
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # fusetune.Trainer stops instead
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
    }
    try:
        return TrainingArguments(**settings)
    except ValueError as error:  # an unknown schedule, or a precision that the device lacks
        raise UserError(f"config: {reason(error)}") from error


def _train(trainer: RecordingTrainer, resume: str | None, output: Path) -> Progress:
    from transformers import TrainerState

    from fusetune.train.recorder import Progress, StopOnInterrupt

    progress, stop = Progress(), StopOnInterrupt()
    trainer.add_callback(progress)
    if resume:
        state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
        if 0 < trainer.args.max_steps <= state.global_step:  # transformers would take one step more
            trainer._load_from_checkpoint(resume)
            trainer.state = state
            return progress
    trainer.add_callback(stop)
    again = f"continue with: fusetune finetune --config {shlex.quote(str(output / 'config.json'))} --resume"
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=resume)
    except (FloatingPointError, OSError) as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {trainer.last_checkpoint()}; {again}", exit_code=130) from None
    finally:
        progress.close()
    if stop.interrupted:
        raise UserError(f"interrupted; {trainer.last_checkpoint()}; {again}", exit_code=130)
    return progress


def _results(trainer: RecordingTrainer, progress: Progress, before: Mapping[str, float]) -> dict[str, Any]:
    """Losses and metrics of the run, out of its log: that is in the checkpoints, so a resumed run has all of it."""
    from fusetune.train.metrics import perplexity

    metric = trainer.metric
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    last_epoch = [entry for entry in steps if entry["epoch"] > math.ceil(steps[-1]["epoch"]) - 1]
    train_loss = statistics.fmean(entry["loss"] for entry in last_epoch)
    train_accuracy = statistics.fmean(entry[metric] for entry in last_epoch)
    after = {name: value for name, value in evaluations[-1].items() if name.startswith("eval_")}
    return {
        "metric": metric,
        "last_epoch_train_loss": train_loss,
        "last_epoch_train_metric": perplexity(train_loss) if metric == "perplexity" else train_accuracy,
        "train_step_loss": [entry["loss"] for entry in steps],
        "train_step_metric": [entry[metric] for entry in steps],
        "last_epoch_eval_loss": after["eval_loss"],
        "last_epoch_eval_metric": after[f"eval_{metric}"],
        "eval_step_loss": [loss for loss, _, _ in trainer.eval_steps],
        "eval_step_metric": [value for _, value, _ in trainer.eval_steps],
        "best_eval_loss": min(entry["eval_loss"] for entry in evaluations),
        "before": dict(before),
        "after": after,
        "bag_of_words": None,
        "compare": None,
        "avg_epoch_time": statistics.fmean(progress.epoch_times or [0.0]),
        "avg_checkpoint_time": statistics.fmean(trainer.save_times or [0.0]),
        "global_step": trainer.state.global_step,
    }


def _bag_of_words(texts: Texts) -> dict[str, float]:
    import torch

    from fusetune.train.metrics import accuracy, bag_of_words, macro_f1

    labels = torch.tensor(texts.eval_labels)
    predicted = bag_of_words([t for (t,) in texts.train], texts.train_labels, [t for (t,) in texts.evaluation])
    return {"eval_accuracy": accuracy(predicted, labels), "eval_macro_f1": macro_f1(predicted, labels)}


def _speed(
    config: TrainConfig, model: Any, progress: Progress, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Speed of the training steps. Tokens exclude padding. MFU is the share of the rate of a large matrix product, just
    measured here in the faster of float32 and the training's dtype, at which the arithmetic of `flops_per_token` was
    done.
    """
    import torch

    from fusetune.train.compare import gemm_rate
    from fusetune.train.model import flops_per_token

    rate = progress.tokens / progress.seconds if progress.seconds else 0.0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:  # kibibytes, but bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "train_seconds": progress.seconds,
        "tokens_per_second": rate,
        "peak_memory_bytes": peak,
        "mfu": rate
        * flops_per_token(model, str(config.method))
        / max(gemm_rate(device, d) for d in {dtype, torch.float32}),
    }


def _state_bytes(trainer: RecordingTrainer) -> int:
    """What the optimizer keeps beside parameters and gradients; 0 where no step was left to do."""
    import torch

    states = trainer.optimizer.state.values() if trainer.optimizer else ()
    tensors = {id(t): t for state in states for t in state.values() if isinstance(t, torch.Tensor)}
    return sum(t.nbytes for t in tensors.values())


def _print_summary(result: dict[str, Any]) -> None:
    print(
        f"speed     {result['train_seconds']:.0f} s for {result['global_step']} steps,"
        f" {result['tokens_per_second']:,.0f} tokens/s, MFU {100 * result['mfu']:.0f} %,"
        f" peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB,"
        f" of which the optimizer's state {result['optimizer_bytes'] / 2**20:,.1f} MiB"
    )
    if quantized := result["quantized"]:
        saved = quantized["bytes_before"] - quantized["bytes_now"]
        print(f"          {quantized['layers']} quantized layers take {saved / 2**20:,.1f} MiB less")
    if compare := result["compare"]:
        stock, ours = (1e3 * compare[f"{name}_seconds"] for name in ("stock", "fusetune"))
        print(
            f"          stock step {stock:.0f} ms, ours {ours:.0f} ms:"
            f" {compare['speedup']:.2f} x (median of {compare['pairs']} pairs);"
            f" loss {compare['stock_loss']:.6f} and {compare['fusetune_loss']:.6f},"
            f" gradient norm {compare['stock_grad_norm']:.5f} and {compare['fusetune_grad_norm']:.5f}"
        )


def _save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, names: list[str], output: Path, quantized: dict[str, str]
) -> str:
    """Writes the `model` folder. A classifier's adapter comes with `labels.json`, the names of its classes:
    transformers would take a folder with a config.json for a whole model. One that was trained over quantised weights
    comes with `fusetune.json`, which says how they were `quantized`.
    """
    try:
        with replacing_folder(output / "model") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if names and not (folder / "config.json").exists():
                (folder / "labels.json").write_text(json.dumps(names, indent=2) + "\n")
            if quantized:
                (folder / "fusetune.json").write_text(json.dumps(quantized, indent=2) + "\n")
    except Exception as error:  # torch and safetensors have their own types for a full disk
        raise UserError(
            f"output_dir: the model must be written to {output}, got {type(error).__name__}: {error}"
        ) from error
    return str(output / "model")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        with replacing_file(path) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output_dir: {path} must be written, got {error}") from error


def _plot(trainer: RecordingTrainer, result: dict[str, Any], title: str, path: Path) -> None:
    if not importlib.util.find_spec("matplotlib"):
        print("note      no picture of the loss: matplotlib is not installed")
        return
    from fusetune.train.plots import plot_run

    metric = result["metric"]
    log = [result["before"] | {"step": 0}, *(entry for entry in trainer.state.log_history if "eval_loss" in entry)]
    evaluated = [[entry[name] for entry in log] for name in ("step", "eval_loss", f"eval_{metric}")]
    trained = (result["train_step_loss"], result["train_step_metric"])
    try:
        with replacing_file(path) as partial:
            plot_run(partial, title, metric, trained, evaluated)
    except OSError as error:
        raise UserError(f"output_dir: {path} must be written, got {error}") from error
