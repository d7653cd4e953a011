"""fusetune.Trainer beside transformers' own, and what apply_peft makes trainable."""

import json
import math

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
