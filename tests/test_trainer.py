"""fusetune.Trainer beside transformers' own, and what apply_peft makes trainable."""

import json
import math
import subprocess
import sys
from pathlib import Path

import accelerate
import peft
import pytest
import tiny
import torch
import transformers

import fusetune
from fusetune.finetune import TrainConfig, UserError, apply_peft
from fusetune.train.model import flops_per_token

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_flops_per_token():
    layer = 4 * 32 * 32 + 2 * 32 * 48  # attention and MLP
    body, head = 2 * layer + 32 * 32, 3 * 32  # two layers and the pooler
    model = bert_classifier()
    assert flops_per_token(model, "full") == 6 * (body + head)
    adapted = apply_peft(bert_classifier(), TrainConfig(lora_r=4, lora_targets="query"))
    adapters = 2 * 2 * 4 * 32
    assert flops_per_token(adapted, "lora") == 4 * (body + head) + 6 * (adapters + head)  # the head is there twice
    assert flops_per_token(apply_peft(model, TrainConfig(method="head")), "head") == 2 * body + 6 * head


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
    mask = torch.ones(10, dtype=torch.long)
    return [{"input_ids": ids[row], "attention_mask": mask, "labels": labels[row]} for row in range(8)]


def make(kind):
    torch.manual_seed(0)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind.startswith("Bert"):
        return getattr(transformers, kind)(tiny.bert_config(num_labels=3, **no_dropout))
    if kind.startswith("MT5"):
        sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = transformers.MT5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
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


# The optimizer


def log_of(cls, folder, changes, watch=None, resume=None, model=None, **settings):
    """Losses and norms of the steps of a training, and the weights at its end."""
    model = model or wide_llama()
    args = arguments(folder, **{"max_steps": 8, "per_device_train_batch_size": 2, "weight_decay": 0.01} | changes)
    trainer = cls(model, args, train_dataset=rows_for("LlamaForCausalLM"), **settings)
    if watch is not None:
        watch(trainer)
    trainer.train(resume_from_checkpoint=resume)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry["loss"] for entry in steps], [entry["grad_norm"] for entry in steps], list(model.parameters())


def wide_llama():
    """Of matrices of 4096 elements and more, whose states may be 8 bits."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny.llama_config(hidden_size=64, intermediate_size=96))


def ours(**options):
    return {"patch": False, "optimizer_cls_and_kwargs": (fusetune.AdamW, options)}


def forbid_clipping(trainer):
    def clip(*args, **kwargs):
        raise AssertionError("clipped beside the step")

    trainer.accelerator.clip_grad_norm_ = clip


def assert_same_run(got, expected):
    """The norms are float32 sums on one side; what they scale is normalised by AdamW."""
    for mine, stock in zip(got[:2], expected[:2], strict=True):
        assert mine == pytest.approx(stock, rel=1e-6)
    for mine, stock in zip(got[2], expected[2], strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 3}, {"max_grad_norm": 0.0}, {"optim": "adamw_torch"}]
)
def test_clipping_in_the_step_follows_stock(tmp_path, changes):
    changes = {"max_grad_norm": 0.25} | changes
    expected = log_of(transformers.Trainer, tmp_path, changes)
    assert_same_run(log_of(fusetune.Trainer, tmp_path, changes, forbid_clipping, **ours()), expected)
    assert min(expected[1]) > 0.25


def test_max_grad_norm_may_change_in_training(tmp_path):
    class Tighten(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.max_grad_norm = (1.0, 0.25, 0.0, 0.0625)[state.global_step % 4]

    expected, got = (
        log_of(cls, tmp_path, {}, callbacks=[Tighten()], **settings)
        for cls, settings in ((transformers.Trainer, {}), (fusetune.Trainer, ours()))
    )
    assert_same_run(got, expected)


def test_clipping_under_a_gradient_scaler(tmp_path):
    """accelerate has no scaler on a CPU, so it is given one. The third step's gradients overflow."""

    def scale(trainer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        trainer.accelerator.scaler = scaler
        trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)

        def overflow(gradient):
            return gradient * (torch.inf if trainer.state.global_step == 2 else 1)

        trainer.model.lm_head.weight.register_hook(overflow)
        scalers.append(scaler)

    def scale_only(trainer):
        scale(trainer)
        forbid_clipping(trainer)

    scalers = []
    expected = log_of(transformers.Trainer, tmp_path, {"max_grad_norm": 0.25}, scale)
    got = log_of(fusetune.Trainer, tmp_path, {"max_grad_norm": 0.25}, scale_only, **ours())
    assert_same_run(got, expected)
    assert math.isinf(got[1][2])
    assert sum(map(math.isinf, got[1])) == 1
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**12  # up, down and up twice


def test_clipping_in_two_processes(tmp_path):
    """Gradients are averaged by then, so that each process finds the same norm as stock does."""
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, transformers, fusetune
from test_trainer import assert_same_run, forbid_clipping, log_of, ours
torch.set_num_threads(1)
run = ({str(tmp_path)!r}, {{"max_grad_norm": 0.25}})
expected = log_of(transformers.Trainer, *run)
assert_same_run(log_of(fusetune.Trainer, *run, forbid_clipping, **ours()), expected)
assert torch.distributed.get_world_size() == 2
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, str(tmp_path / "script.py")], check=True, capture_output=True)


def test_who_else_clips(tmp_path, monkeypatch):
    def clips(watch=None, **settings):
        calls = []

        def count(trainer):
            clip = trainer.accelerator.clip_grad_norm_
            trainer.accelerator.clip_grad_norm_ = lambda *args, **kwargs: calls.append(args) or clip(*args, **kwargs)

        found = log_of(fusetune.Trainer, tmp_path, {"max_steps": 2, **settings.pop("changes", {})}, count, **settings)
        assert all(map(math.isfinite, found[1]))
        return len(calls)

    assert clips(**ours()) == 0
    assert clips() == 0
    assert clips(patch=False) == 2
    assert clips(**ours(max_grad_norm=0.5)) == 2
    assert clips(changes={"optim": "adafactor"}) == 2
    for cls in (torch.optim.AdamW, fusetune.AdamW):
        model = wide_llama()
        assert clips(model=model, optimizers=(cls(model.parameters()), None)) == 2
    trainer = fusetune.Trainer(wide_llama(), arguments(tmp_path))
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", accelerate.DistributedType.FSDP)
    assert not trainer.create_optimizer()._optimizer_step_post_hooks


def test_options_of_the_optimizer(tmp_path):
    settings = {"learning_rate": 0.02, "adam_beta1": 0.7, "adam_epsilon": 1e-5}
    options = {"state_dtype": "int8", "eps": 1e-4}
    trainer = fusetune.Trainer(wide_llama(), arguments(tmp_path, **settings), **ours(**options))
    for group in trainer.create_optimizer().param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.7, 0.999), 1e-4)
        assert group["state_dtype"] == "int8"


@pytest.mark.parametrize("halves", [("stock", "ours"), ("ours", "stock"), ("int8", "int8")])
def test_resume_of_another_trainer_s_checkpoint(tmp_path, halves):
    trainers = {
        "stock": (transformers.Trainer, {}),
        "ours": (fusetune.Trainer, ours()),
        "int8": (fusetune.Trainer, ours(state_dtype="int8")),
    }
    settings = {"max_steps": 20, "max_grad_norm": 0.25, "save_strategy": "steps", "save_steps": 10}
    (first, one), (second, two) = (trainers[name] for name in halves)
    straight = log_of(first, tmp_path / "straight", settings, **one)
    log_of(first, tmp_path, settings | {"max_steps": 10}, **one)
    resumed = log_of(second, tmp_path, settings, resume=str(tmp_path / "checkpoint-10"), **two)
    if first is second:
        assert resumed[:2] == straight[:2]
        for mine, expected in zip(resumed[2], straight[2], strict=True):
            assert torch.equal(mine, expected)
    else:
        assert_same_run(resumed, straight)


def test_training_with_8_bit_states(tmp_path):
    settings = {"max_steps": 40, "per_device_train_batch_size": 4}
    exact, coded = (
        log_of(fusetune.Trainer, tmp_path, settings, **ours(state_dtype=dtype))[0] for dtype in (None, "int8")
    )
    assert exact != coded
    assert coded == pytest.approx(exact, rel=0.02)
    assert coded[-1] < 0.5 * coded[0]


def test_best_checkpoint_is_kept_and_loaded(tmp_path):
    rows = rows_for("BertForSequenceClassification")
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 10.0, "eval_strategy": "steps",
        "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    trainer = fusetune.Trainer(
        bert_classifier(), arguments(tmp_path, **settings), train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    best = min((e for e in trainer.state.log_history if "eval_loss" in e), key=lambda entry: entry["eval_loss"])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best['step']}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{best['step']}"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)
    saved = json.loads((tmp_path / f"checkpoint-{best['step']}" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best['step']}")


def test_full_disk_while_a_checkpoint_is_written_again(tmp_path, monkeypatch):
    rows = rows_for("BertForSequenceClassification")
    settings = arguments(tmp_path, per_device_train_batch_size=8, save_strategy="steps", save_steps=1)
    fusetune.Trainer(bert_classifier(), settings, train_dataset=rows).train()
    good = tiny.files(tmp_path / "checkpoint-1")
    monkeypatch.setattr(torch, "save", tiny.full_disk(torch.save, 1))
    with pytest.raises(OSError, match="checkpoint of step 1 must be written"):
        fusetune.Trainer(bert_classifier(), settings, train_dataset=rows).train()
    assert tiny.files(tmp_path / "checkpoint-1") == good
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
