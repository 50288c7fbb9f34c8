"""The numbers of a run over its steps, from the trainer's events or from metrics.jsonl."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: mean loss in nats per token or label, tokens read so far."""

    step: int
    loss: float
    learning_rate: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A held-out evaluation: mean loss in nats per token or label; step 0 is before training."""

    step: int
    loss: float


@dataclass(slots=True)
class History:
    """The steps and evaluations of one run, in ascending order of step.

    `unit` is what a loss is a mean over: a token, or a classifier's label.
    """

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    unit: str = "token"

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes a step or eval event; others are ignored.

        A step that was there before (a run that went on from its checkpoint) replaces itself and
        all that came after it.
        """
        kind, step = event.get("event"), event.get("step")
        if kind == "step" and step is not None:
            while self.steps and self.steps[-1].step >= step:
                self.steps.pop()
            while self.evaluations and self.evaluations[-1].step >= step:
                self.evaluations.pop()
            rate, tokens = number(event.get("learning_rate")), event.get("tokens") or 0
            self.steps.append(Step(step, number(event.get("loss")), rate, tokens))
        elif kind == "eval" and step is not None:
            while self.evaluations and self.evaluations[-1].step >= step:
                self.evaluations.pop()
            self.evaluations.append(Evaluation(step, number(event.get("loss"))))
            if "accuracy" in event:
                self.unit = "label"

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> "History":
        history = cls()
        for event in events:
            history.add(event)
        return history

    @classmethod
    def read(cls, path: Path) -> "History":
        """From metrics.jsonl. A last line that a crash cut off is left out. Raises OSError."""
        history = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            history.add(event)
        return history

    @property
    def base_loss(self) -> float | None:
        """The held-out loss before the first step."""
        first = self.evaluations[0] if self.evaluations else None
        return first.loss if first is not None and first.step == 0 else None

    @property
    def best(self) -> Evaluation | None:
        finite = [found for found in self.evaluations if math.isfinite(found.loss)]
        return min(finite, key=lambda found: found.loss, default=None)


def number(value: Any) -> float:
    """JSON has no NaN: the engine writes null where a number is not finite."""
    return math.nan if value is None else float(value)


class Smoothed:
    """An exponential mean over about `span` values that is unbiased from the first one on.

    Values that are not finite are left out.
    """

    def __init__(self, span: float) -> None:
        self._keep = math.exp(-1.0 / span)
        self._sum = self._weight = 0.0

    def add(self, value: float) -> tuple[float, float]:
        """Takes a value; the weighted sum so far and its weight."""
        if math.isfinite(value):
            self._sum = self._keep * self._sum + (1.0 - self._keep) * value
            self._weight = self._keep * self._weight + (1.0 - self._keep)
        return self._sum, self._weight

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan


def smooth_both_ways(values: Sequence[float], span: float) -> list[float]:
    """The mean under a two-sided exponential kernel: it does not lag, and the ends weigh less."""
    forward, backward = Smoothed(span), Smoothed(span)
    left = [forward.add(value) for value in values]
    right = [backward.add(value) for value in reversed(values)]
    pairs = zip(left, reversed(right), strict=True)
    weights = [(one[1] + other[1], one[0] + other[0]) for one, other in pairs]
    return [total / weight if weight else math.nan for weight, total in weights]
