"""Reading data sets, the default ones, batches, and metrics."""

import dataclasses
import json
import math

import pytest
import tiny
import torch

from fusetune.finetune import TrainConfig, UserError
from fusetune.train.data import load_texts, tokenize_running

# Data


def load(path, **settings):
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
    for (text,), label in zip(expected.train, expected.train_labels, strict=True):
        assert label == int(text.removeprefix("text ")) % 2
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


def test_splits_of_a_folder(tmp_path):
    import datasets

    def part(*texts):
        return datasets.Dataset.from_dict({"text": texts, "label": [len(text) % 2 for text in texts]})

    parts = {"train": part("a", "bb"), "test": part("c"), "validation": part("dd")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    assert load(tmp_path / "all").evaluation == [("dd",)]
    datasets.DatasetDict(parts | {"train": part("e", "ff")}).save_to_disk(tmp_path / "other")
    assert load(tmp_path / "other", eval_dataset=str(tmp_path / "all")).evaluation == [("dd",)]
    del parts["train"]
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "no-train")
    texts = load(tmp_path / "no-train", num_labels=2)
    assert {*texts.train, *texts.evaluation} == {("c",), ("dd",)}
    (tmp_path / "files").mkdir()
    part("g", "hh").to_parquet(tmp_path / "files" / "test.parquet")
    texts = load(tmp_path / "files")
    assert {*texts.train, *texts.evaluation} == {("g",), ("hh",)}
    part("g", "hh").select([]).to_parquet(tmp_path / "files" / "train.parquet")
    with pytest.raises(UserError, match=r"files cannot be read .*no data"):
        load(tmp_path / "files")


def test_a_class_may_be_in_the_evaluation_rows_alone(tmp_path):
    path = tiny.write_csv(tmp_path / "a.csv", [(f"text {i}", str(i)) for i in range(10)])
    texts = load(path, eval_fraction=0.3, max_train_samples=2)
    assert texts.names == [str(i) for i in range(10)]
    for part, labels in ((texts.train, texts.train_labels), (texts.evaluation, texts.eval_labels)):
        assert [f"text {label}" for label in labels] == [text for (text,) in part]
    assert (len(texts.train), len(texts.evaluation)) == (2, 3)


def test_columns_that_are_asked_for(tmp_path):
    header = ("premise", "hypothesis", "text", "label")
    path = tiny.write_csv(tmp_path / "a.csv", [("p", "h", "t", "x"), ("p", "h", "t", "y")] * 3, header)
    assert load(path).train[0] == ("p", "h")
    assert load(path, text_pair_column="hypothesis").train[0] == ("t", "h")
    assert load(path, text_column="premise").train[0] == ("p",)
    assert load(path, label_column="text", text_column="hypothesis", num_labels=None, task="causal-lm").names == []
    with pytest.raises(UserError, match="text_pair_column must be left out for causal-lm"):
        load(path, text_pair_column="hypothesis", task="causal-lm")


def test_tokens_of_a_causal_lm():
    tokenizer = tiny.tokenizer()
    texts = [("cat dog",), ("rose",), ("iron gold tin",)]
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([text for (text,) in texts])["input_ids"]]
    joined = [token for ids in encoded for token in ids]
    packed = tokenize_running(tokenizer, texts, packing=True, max_length=4)
    assert [row["input_ids"] for row in packed.rows] == [joined[i : i + 4] for i in range(0, len(joined) - 3, 4)]
    rows = tokenize_running(tokenizer, texts, packing=False, max_length=4)
    assert [row["labels"] for row in rows.rows] == [ids[:4] for ids in encoded]
    assert rows.cut == sum(len(ids) > 4 for ids in encoded)
    tokenizer.backend_tokenizer.post_processor = None  # as a tokenizer that adds nothing
    tokenizer.eos_token = None
    rows = tokenize_running(tokenizer, texts, packing=False, max_length=4)
    assert [len(row["labels"]) for row in rows.rows] == [2, 3]
    for packing in (False, True):
        with pytest.raises(UserError, match="must have 2 tokens or more"):
            tokenize_running(tokenizer, [("rose",)], packing=packing, max_length=4)


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
