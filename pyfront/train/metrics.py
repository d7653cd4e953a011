"""Accuracy, macro F1, perplexity, and a bag-of-words classifier to compare with."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of the labels that are predicted right; both are [N] class numbers."""
    return float((predicted == labels).double().mean())


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur (predicted or true) of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for c in torch.unique(torch.cat([predicted, labels])):
        hits = int(((predicted == c) & (labels == c)).sum())
        scores.append(2 * hits / (int((predicted == c).sum()) + int((labels == c).sum())))
    return sum(scores) / len(scores)


def perplexity(loss: float) -> float:
    """exp(loss), for a mean loss in nats per token."""
    return math.exp(loss) if loss < 700 else math.inf


def bag_of_words(
    texts: Sequence[str], labels: Sequence[int], eval_texts: Sequence[str], smoothing: float = 0.3
) -> Tensor:
    """Classes of `eval_texts` by multinomial naive Bayes on word counts.

    log P(c | text) = log P(c) + sum over words of log P(word | c) + const, where P(word | c) is the word's share of the
    words of class c, with `smoothing` added to each count (Manning, Raghavan, Schütze, Introduction to Information
    Retrieval, section 13.2). Words that `texts` lacks are ignored.
    """
    classes = max(labels) + 1
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(word for bag in bags for word in bag))}
    counts = torch.full((len(vocabulary), classes), smoothing)
    for bag, label in zip(bags, labels, strict=True):
        for word, count in bag.items():
            counts[vocabulary[word], label] += count
    log_words = (counts / counts.sum(0)).log()
    log_prior = (torch.bincount(torch.tensor(labels), minlength=classes) / len(labels)).log()
    scores = []
    for text in eval_texts:
        known = [vocabulary[word] for word in re.findall(r"\w+", text.lower()) if word in vocabulary]
        scores.append(log_prior + log_words[known].sum(0))
    return torch.stack(scores).argmax(1)
