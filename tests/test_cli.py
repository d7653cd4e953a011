"""The command line: the same settings every way, and one clear line for every mistake."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

import fusetune
from fusetune.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    return tiny.write_csv(tmp_path_factory.mktemp("data") / "table.csv", tiny.sentences(120))


@pytest.fixture
def run(bert, table, tmp_path, capfd):
    """Runs `fusetune finetune` on a tiny model, and returns the exit code and what was written to stderr."""

    def finetune(*flags, model=bert, dataset=table, out=tmp_path / "out"):
        arguments = ["--model", str(model), "--dataset", str(dataset), "--output-dir", str(out), "--max-steps", "2"]
        code = main(["finetune", *arguments, *map(str, flags)])
        return code, capfd.readouterr().err

    return finetune


def refused(outcome, *parts, code=1):
    """One line on stderr, with these words in it, and the exit code."""
    found, err = outcome
    assert found == code
    assert len(err.splitlines()) == 1, err
    assert err.startswith("fusetune: ")
    for part in parts:
        assert part in err


# Settings


def test_flags_yaml_and_json_are_the_same_run(run, tmp_path):
    flags = ["--learning-rate=2e-3", "--batch_size=8", "--method", "full", "--packing=false", "--lora-targets=query"]
    flags += ["--seed", "3"]
    settings = {"learning_rate": 2e-3, "batch_size": 8, "method": "full", "packing": False, "seed": 3}
    settings["lora_targets"] = ["query"]
    (tmp_path / "a.json").write_text(json.dumps(settings))
    (tmp_path / "a.yaml").write_text(
        "learning_rate: 2e-3\nbatch_size: 8\nmethod: full\npacking: no\nlora_targets: [query]\nseed: 3\n"
    )
    runs = {"flags": flags, "json": ["--config", tmp_path / "a.json"], "yaml": ["--config", tmp_path / "a.yaml"]}
    found = []
    for name, arguments in runs.items():
        code, err = run(*arguments, out=tmp_path / name)
        assert code == 0, err
        config = json.loads((tmp_path / name / "config.json").read_text())
        losses = json.loads((tmp_path / name / "metrics.json").read_text())["train_step_loss"]
        found.append((config | {"output_dir": ""}, losses))
    assert found[0] == found[1] == found[2]
    assert (found[0][0]["lr"], found[0][0]["train_batch_size"], found[0][0]["packing"]) == (2e-3, 8, False)


def test_flags_come_before_the_file(run, tmp_path):
    (tmp_path / "a.yml").write_text("lr: 1\nseed: 5\n")
    assert run("--config", tmp_path / "a.yml", "--lr", "1e-4")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["lr"], config["seed"]) == (1e-4, 5)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.yaml", "learnin_rate: 1", ["unknown setting 'learnin_rate'", "did you mean 'learning_rate'"]),
        ("a.yaml", "lr: [1", ["a.yaml is not valid YAML"]),
        ("a.yaml", "- lr", ["must hold names and values, got a list"]),
        ("a.json", '{"lr": ', ["a.json is not valid JSON"]),
        ("a.json", '{"lr": "x"}', ["lr must be a finite number, got 'x'"]),
        ("a.yaml", "\xff".encode("latin-1"), ["a.yaml is not text"]),
        (None, "", ["cannot be read (No such file or directory)"]),
    ],
)
def test_bad_config_files(run, tmp_path, name, content, parts):
    path = tmp_path / (name or "missing.yaml")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(run("--config", path), *parts)


def test_bad_flags(run, capfd):
    refused(run("--learnin-rate", "1"), "unknown argument --learnin-rate", "did you mean --learning-rate?", code=2)
    refused(run("--lr"), "expected one argument", code=2)
    refused(run("--lr", "fast"), "lr must be a finite number, got 'fast'")
    refused(run("--batch-size", "0"), "train_batch_size must be > 0, got 0")
    refused(run("--task", "translation"), "task must be one of", "got 'translation'")
    refused(run("--lr-scheduler", "zigzag"), "config: ", "zigzag")
    refused(run("--lora-targets", "q_proj"), "lora_targets must be modules of the model, got 'q_proj'")
    refused(run("--learning", "1"), "unknown argument --learning", code=2)
    for arguments, part in (
        (["finetun"], "finetun"),
        (["finetune", "x.csv"], "finetune: unknown argument x.csv; did you mean --dataset x.csv?"),
        (["--versio"], "fusetune: unknown argument --versio; did you mean --version?"),
        (["generate", "folder", "text", "--max-new-tokens", "0"], "max_new_tokens must be > 0, got 0"),
    ):
        refused((main(arguments), capfd.readouterr().err), part, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_device_that_is_not_here(run):
    refused(run("--device", "cuda"), "device must be one that is here, got cuda")


def test_half_precision_on_a_cpu(run, tmp_path):
    refused(run("--device", "cpu", "--dtype", "fp16"), "dtype must be float32 or bfloat16 on a CPU, got float16")
    assert run("--device", "cpu", "--dtype", "bf16")[0] == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 < result["mfu"] < 1
    assert all(map(math.isfinite, result["train_step_loss"]))


def test_options_of_the_optimizer(run, tmp_path):
    refused(run("--optim-state", "int4"), "optim_state must be one of float32, bfloat16, int8, got 'int4'")
    refused(run("--master-weights", "fp16"), "master_weights must be one of fp32, split16, got 'float16'")
    refused(run("--stochastic-rounding", "up"), "stochastic_rounding must be true or false, got 'up'")
    refused(
        run("--stochastic-rounding", "--dtype", "fp32"),
        "dtype must be bfloat16 with stochastic_rounding, got float32; pass --dtype bfloat16",
    )
    refused(run("--master-weights", "split16", "--dtype", "fp32"), "dtype must be bfloat16 with master_weights split16")
    refused(
        run("--master-weights", "fp32", "--stochastic-rounding", "--dtype", "bf16"),
        "stochastic_rounding must be false with master_weights fp32, which rounds nothing away, got True",
    )
    refused(
        run("--optim-state", "int8", "--patch", "false"),
        "patch must be true with optim_state int8, which torch's AdamW lacks, got False",
    )
    refused(run("--stochastic-rounding", "--patch=no"), "patch must be true with stochastic_rounding, which")
    assert not (tmp_path / "out" / "config.json").exists()
    flags = ["--optim-state", "bf16", "--stochastic-rounding", "--master-weights", "none", "--dtype", "bf16"]
    assert run(*flags, "--method", "full")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = ("optim_state", "master_weights", "stochastic_rounding")
    assert [config[name] for name in names] == ["bfloat16", None, True]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert main(["predict", str(tmp_path / "out"), "the old cat"]) == 0


def test_help_is_quick_and_complete(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--help"])
    assert stop.value.code == 0
    text = capfd.readouterr().out
    for flag in ("--model", "--dataset", "--text-column", "--compare", "--resume", "--config", "--optim-state"):
        assert flag in text
    script = "import sys; from fusetune.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules), 'heavy imports'"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_version_and_no_command(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.strip() == fusetune.__version__
    assert main([]) == 0
    assert "finetune" in capfd.readouterr().out


def test_packages_that_are_not_installed(run, monkeypatch, capfd):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    message = "peft must be installed; `pip install 'fusetune[train]'` does that"
    refused(run(), message)
    for arguments in (["predict", "o", "text"], ["generate", "o", "text"], ["merge", "o", "p"]):
        refused((main(arguments), capfd.readouterr().err), message)


# Models


def test_missing_and_broken_models(run, bert, tmp_path):
    import shutil

    refused(run(model=tmp_path / "none"), f"model: {tmp_path / 'none'} does not exist")
    refused(run(model="no-such-owner/no-such-model"), "is neither a folder here nor a model that the hub gives")
    (tmp_path / "empty").mkdir()
    refused(run(model=tmp_path / "empty"), "must be a folder with a config.json")

    def copy(name):
        return Path(shutil.copytree(bert, tmp_path / name))

    (copy("no-weights") / "model.safetensors").unlink()
    refused(run(model=tmp_path / "no-weights"), "no-weights cannot be loaded", "model.safetensors")
    weights = copy("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(run(model=tmp_path / "cut"), "cut cannot be loaded")
    (copy("no-json") / "config.json").write_text("{")
    refused(run(model=tmp_path / "no-json"), "no-json cannot be loaded")
    (copy("no-tokenizer") / "tokenizer.json").unlink()
    refused(run(model=tmp_path / "no-tokenizer"), "no-tokenizer cannot be loaded")
    tiny.save_llama(tmp_path / "llama")
    weights = copy("other") / "model.safetensors"
    shutil.copy(tmp_path / "llama" / "model.safetensors", weights)
    refused(run(model=tmp_path / "other"), "holds weights of another model")
    refused(run("--task", "causal-lm", model=table_of(tmp_path)), "must be a folder with a config.json")


def table_of(folder):
    path = folder / "file.bin"
    path.write_bytes(b"x")
    return path


def test_tokenizer_of_another_model(run, tmp_path):
    folder = tiny.save_bert(tmp_path / "small", vocab_size=10)
    refused(run(model=folder), "has a tokenizer of", "more than the model has embeddings for")


def test_text_longer_than_the_positions(run, tmp_path, capfd):
    refused(run("--max-length", "64"), "max_length must be at most 32, the model's positions, got 64")
    rows = [(" ".join([text] * 9), label) for text, label in tiny.sentences(40)]
    long = tiny.write_csv(tmp_path / "long.csv", rows)
    arguments = ["--max-steps", "1", "--output-dir", str(tmp_path / "out")]
    bert = tiny.save_bert(tmp_path / "bert")
    assert main(["finetune", "--model", str(bert), "--dataset", str(long), *arguments]) == 0
    assert "texts are longer than 32 tokens and were cut" in capfd.readouterr().out


# Data


def test_missing_and_unreadable_data(run, tmp_path):
    refused(run(dataset=tmp_path / "none.csv"), "none.csv does not exist")
    refused(
        run(dataset="no-such-owner/no-such-data"), "is neither a file or folder here nor a dataset that the hub gives"
    )
    for name in ("empty.csv", "empty.json", "empty.parquet", "empty.txt"):
        (tmp_path / name).write_bytes(b"")
        refused(run(dataset=tmp_path / name), f"{name} must have rows, got an empty file")
    refused(run(dataset=tiny.write_csv(tmp_path / "header.csv", [])), "data: ", "header.csv")
    refused(run(dataset=tiny.write_csv(tmp_path / "one.csv", [("a", "b")])), "must have 2 rows or more", "got 1")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    refused(run(dataset=tmp_path / "bad.parquet"), "bad.parquet cannot be read")
    (tmp_path / "bad.json").write_text("{]")
    refused(run(dataset=tmp_path / "bad.json"), "bad.json cannot be read")
    (tmp_path / "bad.csv").write_bytes(b"\x00\xff\xfe\x80")
    refused(run(dataset=tmp_path / "bad.csv"), "bad.csv")
    (tmp_path / "a.xlsx").write_bytes(b"x")
    refused(run(dataset=tmp_path / "a.xlsx"), "must be one of .csv", "got .xlsx")


def test_wrong_columns_are_named(run, tmp_path):
    path = tiny.write_csv(tmp_path / "a.csv", [("x", "y", "z")] * 4, ("first", "second", "third"))
    refused(
        run(dataset=path), "which column of", "is the text", "its columns are first, second, third", "--text-column"
    )
    refused(run("--text-column", "txt", dataset=path), "has no column 'txt'; its columns are first, second, third")
    refused(run("--text-column", "first", dataset=path), "is the label", "--label-column")
    flags = ["--text-column", "first", "--label-column", "lab"]
    refused(run(*flags, dataset=path), "has no column 'lab'; its columns are first, second, third")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    refused(run(dataset=tmp_path / "a.txt"), "is the label", "its columns are text")
    other = tiny.write_csv(tmp_path / "b.csv", [("x", "y")] * 4, ("words", "label"))
    table = tiny.write_csv(tmp_path / "c.csv", tiny.sentences(9))
    refused(run("--eval-dataset", other, dataset=table), "evaluation data has no column 'text'", "words, label")


def test_bad_labels(run, tmp_path):
    def rows(*labels):
        return tiny.write_csv(tmp_path / "a.csv", [("some text", label) for label in labels])

    refused(
        run("--num-labels", "3", dataset=rows(*[0, 1, 2] * 5, 7)),
        "(0 to 2), got 7 in row 16 of",
        "a.csv, column 'label'",
    )
    refused(run("--num-labels", "3", dataset=rows(*[0, 1, -1] * 5)), "got -1 in row")
    refused(run(dataset=rows(*["x"] * 5)), "must hold at least 2 different labels, got 1")
    refused(run(dataset=rows(*["x", "y", ""] * 5)), "label must not be empty, got none in row")
    refused(run(dataset=rows(*[0.5, 1.5] * 5)), "must hold integers or strings")
    train = tiny.write_csv(tmp_path / "train.csv", [("a", "x"), ("b", "y")])
    held = tiny.write_csv(tmp_path / "held.csv", [("c", "z")])
    refused(run("--eval-dataset", held, dataset=train), "(x, y), got 'z' in row 1 of", "held.csv, column 'label'")


def test_no_text_at_all(run, tmp_path):
    path = tiny.write_csv(tmp_path / "a.csv", [("", "x"), (" ", "y"), ("", "x")])
    refused(run(dataset=path), "data: ", "text")


# Output


def test_output_that_cannot_be_written(run, tmp_path, monkeypatch):
    import tempfile

    (tmp_path / "file").write_text("")
    refused(run(out=tmp_path / "file" / "out"), "output_dir: ", "must be a folder to write to (Not a directory)")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    refused(run(), "must be a folder to write to (Permission denied)")


def test_other_failures_of_the_disk(run, monkeypatch):
    from torch.utils import tensorboard

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "runs")

    monkeypatch.setattr(tensorboard, "SummaryWriter", full)
    refused(run(), "No space left on device: 'runs'")


def test_earlier_run_is_not_replaced_unasked(run):
    assert run()[0] == 0
    refused(run(), "holds checkpoint-2 of an earlier run", "--resume", "--overwrite", "--output-dir")
    assert run("--overwrite")[0] == 0


def test_loss_that_is_not_finite(run):
    refused(run("--lr", "1e30", "--method", "full", "--warmup-ratio", "0"), "loss must be finite, got nan at step 2")


def test_interrupt_saves_and_says_how_to_resume(bert, table, tmp_path):
    command = [sys.executable, "-m", "fusetune", "finetune", "--model", str(bert), "--dataset", str(table)]
    command += ["--output-dir", str(tmp_path / "o"), "--max-steps", "100000", "--save-steps", "100000"]
    command += ["--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        else:
            pytest.fail(process.stderr.read())
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    last = err.splitlines()[-1]
    assert "fusetune: interrupted; the last checkpoint is" in last
    (checkpoint,) = (tmp_path / "o").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert f"continue with: fusetune finetune --config {tmp_path / 'o' / 'config.json'} --resume" in last
    config = str(tmp_path / "o" / "config.json")
    assert main(["finetune", "--config", config, "--resume", "--max-steps", str(step + 2)]) == 0
    assert len(json.loads((tmp_path / "o" / "metrics.json").read_text())["train_step_loss"]) == step + 2


# Using what was trained


def test_predict(run, tmp_path, capfd, monkeypatch):
    import io

    assert run("--method", "full")[0] == 0
    capfd.readouterr()
    assert main(["predict", str(tmp_path / "out"), "the old cat", "gold and tin"]) == 0
    first = capfd.readouterr().out
    rows = [line.split("\t") for line in first.splitlines()]
    assert [row[2] for row in rows] == ["the old cat", "gold and tin"]
    assert all(row[0] in tiny.WORDS and 1 / 3 <= float(row[1]) <= 1 for row in rows)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the old cat\n\ngold and tin\n"))
    assert main(["predict", str(tmp_path / "out" / "model")]) == 0
    assert capfd.readouterr().out == first
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    refused((main(["predict", str(tmp_path / "out")]), capfd.readouterr().err), "predict: give texts")


def test_predict_without_a_model(tmp_path, capfd):
    def outcome(*arguments):
        code = main(list(map(str, arguments)))
        return code, capfd.readouterr().err

    refused(outcome("predict", tmp_path / "none", "text"), "none is not a folder")
    refused(outcome("predict", tmp_path, "text"), "must hold a model or an adapter", "did the training finish?")
    refused(outcome("predict"), "the following arguments are required: folder", code=2)
    refused(outcome("generate", tiny.save_bert(tmp_path / "bert"), "text"), "bert")
    refused(
        outcome("predict", tiny.save_llama(tmp_path / "llama"), "text"), "got one for CausalLM; use `fusetune generate`"
    )
    refused(outcome("merge", tmp_path / "llama", tmp_path / "out"), "must hold an adapter, got a full model")


def test_predict_with_a_broken_adapter(run, tmp_path, capfd):
    assert run("--method", "lora")[0] == 0
    capfd.readouterr()
    path = tmp_path / "out" / "model" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused((main(["predict", str(tmp_path / "out"), "text"]), capfd.readouterr().err), "cannot be loaded")
    config = tmp_path / "out" / "model" / "adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "moved")}
    config.write_text(json.dumps(settings))
    refused((main(["predict", str(tmp_path / "out"), "text"]), capfd.readouterr().err), "moved does not exist")


def test_info_is_reached(monkeypatch):
    import types

    seen = []
    monkeypatch.setitem(
        sys.modules, "fusetune.info", types.SimpleNamespace(main=lambda arguments: seen.append(arguments))
    )
    assert main(["info", "--json"]) == 0
    assert seen == [["--json"]]
