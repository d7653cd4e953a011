"""From a dataset on the hub or in a file to the tokens of a training and an evaluation set."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusetune.train.config import TrainConfig, UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "comment", "body", "message", "question", "title")
PAIR_COLUMNS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"),
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "sentiment", "intent", "topic", "coarse_label")
EVAL_SPLITS = ("validation", "valid", "dev", "eval", "test", "validation_matched")


@dataclass
class Texts:
    """Rows of text, and of labels where there are any: `labels[i]` is the number of a class in `names`."""

    train: list[tuple[str, ...]]
    evaluation: list[tuple[str, ...]]
    source: str
    train_labels: list[int] = field(default_factory=list)
    eval_labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def load_texts(config: TrainConfig) -> Texts:
    """Reads the dataset that `config` names, finds its columns, and splits it.

    Raises:
        UserError: the dataset cannot be read, is empty, or lacks a column; a label is missing or out of range.
    """
    splits = _load_splits(config)
    train, evaluation = splits
    columns = _text_columns(config, train)
    label = _label_column(config, train, columns) if config.task == "sequence-classification" else None
    for name in (*columns, *([label] if label else [])):
        if name not in evaluation.column_names:
            raise UserError(f"data: the evaluation data has no column {name!r}; {_columns(evaluation)}")
    names, number = _classes(config, train, label) if label else ([], None)
    texts: list[list[tuple[str, ...]]] = [[], []]
    labels: list[list[int]] = [[], []]
    sources = (config.dataset, config.eval_dataset or config.dataset)
    for part, (split, rows) in enumerate(zip(splits, _choose_rows(config, train, evaluation), strict=True)):
        chosen = split.select(rows)
        values = chosen[label] if label else rows
        for row, text, value in zip(rows, _texts(chosen, columns), values, strict=True):
            if all(text):
                texts[part].append(text)
                if number:
                    labels[part].append(number(value, f"row {row + 1} of {sources[part]}, column {label!r}"))
        if not texts[part]:
            what = ("train", "evaluate")[part]
            raise UserError(f"data: {sources[part]} has no rows to {what} on with text in column {columns[0]!r}")
    source = f"{config.dataset}, {' and '.join(columns)}" + (f" to {label}" if label else "")
    return Texts(texts[0], texts[1], source, labels[0], labels[1], names)


def _load_splits(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """The rows to train and to evaluate on; the same object twice where one part of it is to be held out."""
    assert config.dataset
    splits = _load(config.dataset, config)
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    evaluation = _evaluation_split(splits, train)
    if config.eval_dataset:
        splits = _load(config.eval_dataset, config)
        evaluation = _evaluation_split(splits, next(iter(splits.values())))
    for rows, name in ((train, config.dataset), (evaluation, config.eval_dataset or config.dataset)):
        if not len(rows):
            raise UserError(f"data: {name} must have rows, got none")
    if evaluation is train and len(train) < 2:
        raise UserError(f"data: {config.dataset} must have 2 rows or more, to evaluate on a part of them, got 1")
    return train, evaluation


def _evaluation_split(splits: dict[str, Dataset], first: Dataset) -> Dataset:
    """The split that is meant for evaluation; `first` where there is no other."""
    return next((splits[name] for name in EVAL_SPLITS if name in splits and splits[name] is not first), first)


def _choose_rows(config: TrainConfig, train: Dataset, evaluation: Dataset) -> tuple[list[int], list[int]]:
    """The numbers of the rows to train and to evaluate on, in the order of their use."""
    draw = random.Random(config.seed)
    if evaluation is train:
        count = len(train)
        size = min(max(1, round(config.eval_fraction * count)), count - 1)
        held = set(draw.sample(range(count), size))
        rows = [row for row in range(count) if row not in held], sorted(held)
    else:
        rows = list(range(len(train))), list(range(len(evaluation)))
    if config.task == "sequence-classification":  # for causal-lm the order of the rows may carry meaning
        for part in rows:
            draw.shuffle(part)
    return rows[0][: config.max_train_samples], rows[1][: config.max_eval_samples]


def _load(name: str, config: TrainConfig) -> dict[str, Dataset]:
    import datasets

    path = Path(name).expanduser()
    try:
        if path.is_file():
            kind = FORMATS.get(path.suffix.lower())
            if kind is None:
                raise UserError(f"data: {name} must be one of {', '.join(FORMATS)}, got {path.suffix or 'no suffix'}")
            if not path.stat().st_size:
                raise UserError(f"data: {name} must have rows, got an empty file")
            options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            if kind == "text":
                options = {"sample_by": "paragraph"}
            return dict(datasets.load_dataset(kind, data_files=str(path), **options))
        if path.is_dir() and (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(str(path))}
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(path)))
        if not path.is_dir() and is_path(name):
            raise UserError(f"data: {name} does not exist")
        loaded = datasets.load_dataset(str(path) if path.is_dir() else name, config.dataset_config)
        return dict(loaded)
    except UserError:
        raise
    except Exception as error:  # whatever a reader of csv, json, parquet or the hub raises
        if path.exists():
            raise UserError(f"data: {name} cannot be read ({reason(error)})") from error
        raise UserError(
            f"data: {name} is neither a file or folder here nor a dataset that the hub gives ({reason(error)})"
        ) from error


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: hub ids have at most one slash and no such suffixes."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in FORMATS


def reason(error: BaseException) -> str:
    """The first line of the innermost message of a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines: list[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _columns(rows: Dataset) -> str:
    return f"its columns are {', '.join(rows.column_names)}"


def _text_columns(config: TrainConfig, rows: Dataset) -> list[str]:
    asked = [name for name in (config.text_column, config.text_pair_column) if name]
    for name in asked:
        if name not in rows.column_names:
            raise UserError(f"data: {config.dataset} has no column {name!r}; {_columns(rows)}")
    if config.text_pair_column and config.task == "causal-lm":
        raise UserError("config: text_pair_column must be left out for causal-lm")
    if config.text_column:
        return asked
    by_name = {name.lower(): str(name) for name in rows.column_names if name not in (*asked, config.label_column)}
    if config.task == "sequence-classification" and not asked:
        for pair in PAIR_COLUMNS:
            if all(name in by_name for name in pair):
                return [by_name[name] for name in pair]
    for name in TEXT_COLUMNS:
        if name in by_name:
            return [by_name[name], *asked]
    strings = [
        name
        for lower, name in by_name.items()
        if getattr(rows.features[name], "dtype", None) in ("string", "large_string") and lower not in LABEL_COLUMNS
    ]
    if len(strings) == 1:
        return [strings[0], *asked]
    raise UserError(
        f"data: cannot tell which column of {config.dataset} is the text; {_columns(rows)}; use --text-column"
    )


def _label_column(config: TrainConfig, rows: Dataset, texts: list[str]) -> str:
    if config.label_column:
        if config.label_column not in rows.column_names:
            raise UserError(f"data: {config.dataset} has no column {config.label_column!r}; {_columns(rows)}")
        return config.label_column
    by_name = {name.lower(): str(name) for name in rows.column_names if name not in texts}
    for name in LABEL_COLUMNS:
        if name in by_name:
            return by_name[name]
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    raise UserError(
        f"data: cannot tell which column of {config.dataset} is the label; {_columns(rows)}; use --label-column"
    )


def _texts(rows: Dataset, columns: list[str]) -> list[tuple[str, ...]]:
    stripped = (["" if text is None else str(text).strip() for text in rows[name]] for name in columns)
    return list(zip(*stripped, strict=True))


def _classes(config: TrainConfig, rows: Dataset, label: str) -> tuple[list[str], Callable[[Any, str], int]]:
    """The names of the classes, and the function from a label, and where it stands, to the number of its class."""
    names = list(getattr(rows.features[label], "names", None) or ())
    if names:
        numbers: dict[Any, int] = {number: number for number in range(len(names))}
    elif config.num_labels:
        numbers = {number: number for number in range(config.num_labels)}
        names = [str(number) for number in numbers]
    else:
        values = [value for value in rows[label] if value is not None]
        if any(isinstance(v, (list, dict)) or (isinstance(v, float) and not v.is_integer()) for v in values):
            raise UserError(f"data: column {label!r} must hold integers or strings, one class per row")
        distinct = sorted({_label(value) for value in values}, key=lambda v: (isinstance(v, str), v))
        if len(distinct) < 2:
            raise UserError(f"data: column {label!r} must hold at least 2 different labels, got {len(distinct)}")
        if len(distinct) > 1000:
            raise UserError(f"data: column {label!r} holds {len(distinct)} different values; it is hardly a label")
        numbers = {value: number for number, value in enumerate(distinct)}
        names = [str(value) for value in distinct]
    integers = list(numbers) == list(range(len(numbers)))
    known = f"0 to {len(names) - 1}" if integers else ", ".join(names[:10]) + ", ..." * (len(names) > 10)

    def number(value: Any, where: str) -> int:
        if value is None:
            raise UserError(f"data: label must not be empty, got none in {where}")
        if (found := numbers.get(_label(value))) is None:
            raise UserError(f"data: label must be among those to train on ({known}), got {value!r} in {where}")
        return found

    return names, number


def _label(value: Any) -> Any:
    """A label as a key: csv files give 1.0 for 1 where a cell is empty."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip() if isinstance(value, str) else value


class TokenizedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of token ids (and labels); `cut` of them were longer than max_length."""

    def __init__(self, rows: list[dict[str, Any]], cut: int = 0) -> None:
        self.rows, self.cut = rows, cut
        self.lengths = [len(row["input_ids"]) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def tokenize_labelled(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]], labels: list[int], max_length: int
) -> TokenizedRows:
    """One row per text or pair of texts, cut to max_length tokens, with its label."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    cut = sum(len(ids) > max_length for ids in tokenizer(*columns, verbose=False)["input_ids"])
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    rows = [{**{name: encoded[name][i] for name in encoded}, "labels": label} for i, label in enumerate(labels)]
    return TokenizedRows(rows, cut)


def tokenize_running(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]], packing: bool, max_length: int
) -> TokenizedRows:
    """Rows for a causal LM, each text closed by the end-of-sequence token: the joined texts in blocks of max_length
    tokens, or without `packing` a row per text, cut to max_length.

    Raises:
        UserError: no row has a second token to predict.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [[*ids, *end] for ids in tokenizer([text for (text,) in texts], verbose=False)["input_ids"]]
    cut = 0
    if packing:
        joined = [token for row in rows for token in row]
        rows = [joined[i : i + max_length] for i in range(0, len(joined), max_length)]
        if len(rows) > 1 and len(rows[-1]) < max_length:
            del rows[-1]
    else:
        cut = sum(len(row) > max_length for row in rows)
        rows = [row[:max_length] for row in rows if len(row) > 1]  # the loss of a single token is 0 / 0
    if not rows or len(rows[0]) < 2:
        raise UserError("data: the texts to train and to evaluate on must have 2 tokens or more")
    return TokenizedRows([{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows], cut)


class GroupedByLength(torch.utils.data.Sampler[int]):
    """Random order in which the rows of a batch have similar lengths: rows are shuffled, cut into pools of 16 batches,
    sorted within each pool, and the batches are shuffled. The order depends on the seed and the epoch alone, so that a
    resumed run sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(self.seed * 1_000_003 + self.epoch)
        order = generator.sample(range(len(self.lengths)), len(self.lengths))
        pool = 16 * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        short = [batch for batch in batches if len(batch) < self.batch_size]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        generator.shuffle(full)
        return iter([row for batch in [*full, *short] for row in batch])
