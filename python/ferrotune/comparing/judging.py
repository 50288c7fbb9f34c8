"""From what the contenders say to qualities and differences with intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics import Interval
from ..resampling import Floats, intervals
from .contenders import Said
from .prompts import Record, answer
from .result import Contender


def judge(said: Sequence[Said], test: Sequence[Record], seed: int) -> tuple[Contender, ...]:
    """Qualities and paired differences, from the same resamples of the records."""
    count = len(said)
    numbers = _losses(said, seed) if said[-1].loss is not None else _labels(said, test, seed)
    qualities, differences, scores = (numbers[at * count : (at + 1) * count] for at in range(3))
    return tuple(
        Contender(
            one.name,
            qualities[at],
            scores[at] if scores else None,
            None if at == count - 1 else differences[at],
            one.seconds / len(test),
            one.size,
        )
        for at, one in enumerate(said)
    )


def _labels(said: Sequence[Said], test: Sequence[Record], seed: int) -> list[Interval]:
    """Accuracies, the last one minus each, and macro-F1s."""
    labels = sorted({answer(one) for one in test}.union(*(one.predicted for one in said)))
    place = {label: at for at, label in enumerate(labels)}
    truth = np.array([place[answer(one)] for one in test])
    guesses = np.array([[place[label] for label in one.predicted] for one in said])

    def statistic(weights: Floats, guesses: Any) -> Floats:
        right = (guesses == truth) @ weights / weights.sum()
        scores = np.array([_macro_f1(truth, own, weights, len(labels)) for own in guesses])
        return np.concatenate([right, right[-1] - right, scores])

    return intervals(guesses, statistic, seed)


def _losses(said: Sequence[Said], seed: int) -> list[Interval]:
    """Losses in nats per token, and the last one minus each."""
    tokens: Any = said[-1].tokens

    def statistic(weights: Floats, losses: Any) -> Floats:
        means = losses @ weights / (tokens @ weights)
        return np.concatenate([means, means[-1] - means])

    return intervals(np.array([one.loss for one in said]), statistic, seed)


def _macro_f1(truth: Any, guesses: Any, weights: Floats, labels: int) -> float:
    """Unweighted mean of F1 over the labels that occur among true or predicted ones."""
    right = np.bincount(truth, weights * (guesses == truth), labels)
    total = np.bincount(truth, weights, labels) + np.bincount(guesses, weights, labels)
    occurs = total > 0
    return float((2 * right[occurs] / total[occurs]).mean())
