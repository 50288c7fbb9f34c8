"""What a run is judged by beside its held-out part: a test split, and what was forgotten."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .metrics import ClassificationMetrics, GenerationMetrics, Interval
from .tables import count, loss_text

Rows = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TestMetrics:
    """The best weights on the test split, all of which was read, once, at the end.

    `loss` is the mean in nats per token (of a classifier: per label) over `tokens` of them.
    """

    __test__ = False  # not pytest's

    loss: float
    tokens: int
    generation: GenerationMetrics | None
    classification: ClassificationMetrics | None

    @classmethod
    def from_native(cls, found: Mapping[str, Any]) -> "TestMetrics":
        generation, classification = found.get("generation"), found.get("classification")
        return cls(
            found["loss"],
            found["tokens"],
            generation and GenerationMetrics.from_native(generation),
            classification and ClassificationMetrics.from_native(classification),
        )

    def rows(self) -> Rows:
        found = self.generation or self.classification
        assert found is not None
        return tuple((f"test {name}", value) for name, value in found.rows())


@dataclass(frozen=True, slots=True)
class Forgetting:
    """A language model on text of its own domain, before the first step and with the best weights.

    `change` is the loss after minus the loss before in nats per token, above 0 for what was
    forgotten; its interval is over the differences of the same rows. `tokens` were predicted.
    """

    tokens: int
    before: GenerationMetrics
    after: GenerationMetrics
    change: Interval

    @classmethod
    def from_native(cls, found: Mapping[str, Any]) -> "Forgetting":
        return cls(
            found["tokens"],
            GenerationMetrics.from_native(found["before"]),
            GenerationMetrics.from_native(found["after"]),
            Interval.from_native(found["change"]),
        )

    def rows(self) -> Rows:
        before, after, change = self.before, self.after, self.change
        losses = f"{loss_text(before.loss.value)} → {loss_text(after.loss.value)}"
        interval = f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
        perplexities = f"{before.perplexity.value:.2f} → {after.perplexity.value:.2f}"
        return (
            ("loss on its own domain", f"{losses} nats per token, {interval}"),
            ("perplexity on its own domain", f"{perplexities} on {count(self.tokens)} tokens"),
        )

    def sentence(self) -> str:
        """What the interval says, in words."""
        if self.change.low > 0:
            return f"The model forgot: {self._numbers()}"
        if self.change.high < 0:
            return f"The model forgot nothing: {self._numbers()}"
        return f"No forgetting was found, nor is it ruled out: {self._numbers()}"

    def _numbers(self) -> str:
        low, high = self.change.low, self.change.high
        return (
            f"on text of its own domain the loss changed by {self.change.value:+.3f} nats per "
            f"token ({low:+.3f} to {high:+.3f})."
        )
