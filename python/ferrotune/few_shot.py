"""What a model says with labelled examples in its prompt, over several draws of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from .metrics import Interval
from .repeats import Spread

# Measures of a draw, and what they are called where people read them.
MEASURES = {"loss": "loss", "accuracy": "accuracy", "macro_f1": "macro-F1"}


@dataclass(frozen=True, slots=True)
class Draw:
    """The demonstrations that `seed` draws, and the measures with them in every prompt."""

    seed: int
    measures: Mapping[str, Interval]


@dataclass(frozen=True, slots=True)
class FewShot:
    """`shots` demonstrations in each prompt, of each of the `draws`.

    Completions have a `loss` in nats per token. Of labels, of which the likeliest is taken, the
    `loss` is in nats per label, the model choosing among the labels of the demonstrations'
    records, and there are `accuracy` and `macro_f1`.
    """

    shots: int
    draws: tuple[Draw, ...]

    @property
    def unit(self) -> str:
        """What a loss is a mean over: "token" or "label"."""
        return "label" if "accuracy" in self.draws[0].measures else "token"

    def spread(self, measure: str) -> Spread | None:
        """Of a measure over the draws; None for one draw alone."""
        values = [one.measures[measure].value for one in self.draws]
        return Spread.of(values) if len(values) > 1 else None

    def rows(self) -> tuple[tuple[str, str], ...]:
        rows = []
        for measure in self.draws[0].measures:
            name = MEASURES[measure]
            unit = f" nats per {self.unit}" if measure == "loss" else ""
            spread = self.spread(measure)
            if spread is not None:
                rows.append((f"{name}, {len(self.draws)} draws", spread.text() + unit))
            for one in self.draws:
                rows.append((f"{name}, seed {one.seed}", one.measures[measure].text() + unit))
        return (("demonstrations", str(self.shots)), *rows)
