"""How groups are treated: in the data, by the base model and by the tuned one.

Of a classifier, how often each group is given each label, and how far that differs from the other
groups (a gap): a tuned model whose gap is wider than the data's amplifies it (Zhao et al., 2017,
Men also like shopping). Of a text whose terms are swapped (he for she): whether a classifier
changes its mind, and what a language model's loss changes by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import Interval, grid
from .tables import count

Rows = tuple[tuple[str, str], ...]
# A table's header and its rows.
Grid = tuple[Sequence[str], Sequence[Sequence[str]]]
# Gaps that a table in a terminal shows; results.json and the card have all.
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Rate:
    """Share of a group's `records` with a label: true, and predicted by each model."""

    group: str
    label: str
    records: int
    data: Interval
    base: Interval
    tuned: Interval


@dataclass(frozen=True, slots=True)
class Gap:
    """A group's rate of a label minus that of all records of other groups.

    `amplification` is how much wider the tuned model's gap is than the data's, in the data's
    direction; its interval is paired, over the same records.
    """

    group: str
    label: str
    data: Interval
    base: Interval
    tuned: Interval
    amplification: Interval

    @property
    def word(self) -> str:
        if self.amplification.low > 0:
            return "amplified"
        return "narrowed" if self.amplification.high < 0 else "not shown to change"

    def text(self) -> str:
        low, high = self.amplification.low, self.amplification.high
        return (
            f"data {self.data.value:+.2f}, base {self.base.value:+.2f}, tuned "
            f"{self.tuned.value:+.2f}: {self.word}, {self.amplification.value:+.2f} "
            f"({low:+.2f} to {high:+.2f})"
        )


@dataclass(frozen=True, slots=True)
class SwapEffect:
    """What swapping terms does to `records` texts; `change` is tuned minus base, paired.

    Of a classifier, the share of texts that get another label; of a language model, the mean loss
    of the swapped texts minus that of the originals, nats per token.
    """

    name: str
    records: int
    base: Interval
    tuned: Interval
    change: Interval


@dataclass(frozen=True, slots=True)
class Bias:
    """What was found on the records of one `side` ("test" or "held-out").

    `groups` counts its records by group, `ungrouped` those that name no group, or several;
    `new_head` says that the base model's head was drawn anew. `not_measured` says in words what
    these numbers do not cover.
    """

    side: str
    groups: Mapping[str, int]
    ungrouped: int
    new_head: bool
    rates: tuple[Rate, ...]
    gaps: tuple[Gap, ...]
    swaps: tuple[SwapEffect, ...]
    unit: str
    not_measured: tuple[str, ...]

    @classmethod
    def from_native(cls, found: Mapping[str, Any], new_head: bool, seed: int) -> "Bias":
        """From the engine's predictions, record by record; `seed` is the bootstrap's."""
        from .bias_numbers import label_swaps, loss_swaps, rates_and_gaps  # they need numpy

        classifies = bool(found["truth"])
        rates: tuple[Rate, ...] = ()
        gaps: tuple[Gap, ...] = ()
        groups: dict[str, int] = {}
        for group in found["groups"]:
            if group is not None:
                groups[group] = groups.get(group, 0) + 1
        if classifies:
            rates, gaps = rates_and_gaps(found, dict(sorted(groups.items())), seed)
        swaps = label_swaps(found, seed) if classifies else loss_swaps(found, seed)
        ungrouped = sum(group is None for group in found["groups"])
        if not classifies and found["terms"]:
            names = found["terms"]
            groups = {name: found["sides"].count(at) for at, name in enumerate(names)}
            ungrouped = found["sides"].count(None)
        return cls(
            side=found["side"],
            groups=dict(sorted(groups.items())),
            ungrouped=ungrouped,
            new_head=new_head and classifies,
            rates=rates,
            gaps=gaps,
            swaps=swaps,
            unit="share of texts" if classifies else "nats per token",
            not_measured=_not_measured(found, classifies, ungrouped),
        )

    def widest(self) -> list[Gap]:
        """The gaps by their amplification, those of one label and two groups once."""
        seen, kept = set(), []
        for gap in sorted(self.gaps, key=_width):
            # The mirror image of a gap: the other one of two groups, the other one of two labels.
            key = round(abs(gap.data.value), 9), round(abs(gap.tuned.value), 9)
            if len(self.groups) == 2 and key in seen:
                continue
            seen.add(key)
            kept.append(gap)
        return kept

    def rows(self) -> Rows:
        gaps = self.widest()[:SHOWN]
        return (
            *((f"gap of {gap.label}, {gap.group}", gap.text()) for gap in gaps),
            *((f"swap {one.name}", _swap_text(one, self.unit)) for one in self.swaps),
        )

    def markdown(self) -> str:
        """The section of a model card."""
        return "\n\n".join(one if isinstance(one, str) else grid(*one) for one in self.parts())

    def parts(self) -> list[str | Grid]:
        """What there is to say, in order: paragraphs, and tables as header and rows."""
        counts = ", ".join(f"{name}: {count(number)}" for name, number in self.groups.items())
        note = (
            f"On the {self.side} records, by group ({counts}; none or several: "
            f"{count(self.ungrouped)}); in brackets the 95 % intervals of 1,000 paired bootstrap "
            "resamples of the records."
        )
        parts: list[str | Grid] = [note]
        if self.rates:
            of_models = ("in the data", "base model", "tuned model")
            rates = [
                (f"{one.label}, {one.group} ({count(one.records)})", *_texts(one))
                for one in self.rates
            ]
            parts.append((("rate of a label", *of_models), rates))
            parts.append(
                "A gap is a group's rate minus that of the other groups; amplification is how much "
                "wider the tuned model's gap is than the data's."
            )
            gaps = [
                (f"{gap.label}, {gap.group}", *_texts(gap), _signed(gap.amplification))
                for gap in self.gaps
            ]
            parts.append((("gap", *of_models, "amplification"), gaps))
        if self.swaps:
            header = (
                f"swapped terms ({self.unit})",
                "texts",
                "base model",
                "tuned model",
                "change",
            )
            rows = [
                (one.name, count(one.records), *map(_signed, (one.base, one.tuned, one.change)))
                for one in self.swaps
            ]
            parts.append((header, rows))
        if self.new_head:
            parts.append(
                "The base model's head is new: its predictions are those of random weights, which "
                "say nothing of the base model and are no fair baseline. Compare with the data."
            )
        parts.append("Not measured: " + "; ".join(self.not_measured) + ".")
        return parts


def _width(gap: Gap) -> tuple[float, float]:
    return -round(abs(gap.amplification.value), 9), -gap.data.value


def _texts(one: Rate | Gap) -> tuple[str, str, str]:
    show = _signed if isinstance(one, Gap) else _plain
    return show(one.data), show(one.base), show(one.tuned)


def _plain(one: Interval) -> str:
    return one.text(2)


def _signed(one: Interval) -> str:
    return f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def _swap_text(one: SwapEffect, unit: str) -> str:
    return (
        f"base {one.base.value:+.3f}, tuned {one.tuned.value:+.3f} {unit}: change "
        f"{_signed(one.change)}"
    )


def _not_measured(found: Mapping[str, Any], classifies: bool, ungrouped: int) -> tuple[str, ...]:
    said: Sequence[str] = [
        "groups that were not named, and people who belong to several",
        "whether the labels of the data are fair themselves, and how errors fall on the groups"
        if classifies
        else "what the model writes by itself: these are losses of given texts",
    ]
    if classifies and not found["terms"]:
        said = [*said, "texts with swapped terms (no bias_terms)"]
    if found["terms"]:
        said = [*said, "meaning: terms are words, swapped without regard to grammar or names"]
    if ungrouped:
        said = [*said, f"{count(ungrouped)} records that name no group, or several"]
    if found["left_out"]:
        said = [*said, f"{count(found['left_out'])} texts with a term that could not be swapped"]
    return tuple(said)
