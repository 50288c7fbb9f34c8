"""How groups are treated: in the data, by the base model and by the tuned one.

Of a classifier, how often each group is given each label, and how far that differs from the other
groups (a gap): a tuned model whose gap is wider than the data's amplifies it (Zhao et al., 2017,
Men also like shopping). Of a text whose terms are swapped (he for she): whether a classifier
changes its mind, and what a language model's loss changes by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .metrics import Interval, grid
from .resampling import counted, intervals, means
from .tables import count

Rows = tuple[tuple[str, str], ...]
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
        classifies = bool(found["truth"])
        rates: tuple[Rate, ...] = ()
        gaps: tuple[Gap, ...] = ()
        groups: dict[str, int] = {}
        for group in found["groups"]:
            if group is not None:
                groups[group] = groups.get(group, 0) + 1
        if classifies:
            rates, gaps = _rates_and_gaps(found, dict(sorted(groups.items())), seed)
        swaps = _label_swaps(found, seed) if classifies else _loss_swaps(found, seed)
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
        counts = ", ".join(f"{name}: {count(number)}" for name, number in self.groups.items())
        note = (
            f"On the {self.side} records, by group ({counts}; none or several: "
            f"{count(self.ungrouped)}); in brackets the 95 % intervals of 1,000 paired bootstrap "
            "resamples of the records."
        )
        parts = [note]
        header: tuple[str, ...]
        rows: list[tuple[str, ...]]
        if self.rates:
            header = ("rate of a label", "in the data", "base model", "tuned model")
            rows = [
                (f"{one.label}, {one.group} ({count(one.records)})", *_texts(one))
                for one in self.rates
            ]
            parts.append(grid(header, rows))
            parts.append(
                "A gap is a group's rate minus that of the other groups; amplification is how much "
                "wider the tuned model's gap is than the data's."
            )
            header = ("gap", "in the data", "base model", "tuned model", "amplification")
            parts.append(
                grid(
                    header,
                    [
                        (f"{gap.label}, {gap.group}", *_texts(gap), _signed(gap.amplification))
                        for gap in self.gaps
                    ],
                )
            )
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
            parts.append(grid(header, rows))
        if self.new_head:
            parts.append(
                "The base model's head is new: its predictions are those of random weights, which "
                "say nothing of the base model and are no fair baseline. Compare with the data."
            )
        parts.append("Not measured: " + "; ".join(self.not_measured) + ".")
        return "\n\n".join(parts)


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


def _rates_and_gaps(
    found: Mapping[str, Any], groups: Mapping[str, int], seed: int
) -> tuple[tuple[Rate, ...], tuple[Gap, ...]]:
    """Records are resampled as counts of their kinds: group and three classes."""
    names, labels = list(groups), found["labels"]
    place = {name: at for at, name in enumerate(names)}
    before, after = found["before"]["predicted"], found["after"]["predicted"]
    records = zip(found["groups"], found["truth"], before, after, strict=True)
    cells = [(place[group], *classes) for group, *classes in records if group is not None]
    kinds, counts = np.unique(np.array(cells), axis=0, return_counts=True)
    inside = [kinds[:, 0] == at for at in range(len(names))]
    has = [[kinds[:, 1 + who] == label for label in range(len(labels))] for who in range(3)]
    signs: dict[tuple[int, int], float] = {}

    def rate(drawn: Any, group: Any, label: Any) -> Any:
        with np.errstate(invalid="ignore"):
            return drawn[:, group & label].sum(1) / drawn[:, group].sum(1)

    def statistic(drawn: Any) -> Any:
        columns: list[Any] = []
        for at, group in enumerate(inside):
            for label in range(len(labels)):
                own = [rate(drawn, group, has[who][label]) for who in range(3)]
                gaps = [own[who] - rate(drawn, ~group, has[who][label]) for who in range(3)]
                # The data's direction is that of all records, in every resample.
                way = gaps[0][0] or gaps[2][0] or 1.0
                sign = signs.setdefault((at, label), float(np.sign(way)))
                columns += [*own, *gaps, sign * (gaps[2] - gaps[0])]
        return np.stack(columns, 1)

    numbers = counted(counts, statistic, seed)
    rates, gaps = [], []
    for at, group in enumerate(names):
        for label, name in enumerate(labels):
            start = 7 * (at * len(labels) + label)
            three, four = numbers[start : start + 3], numbers[start + 3 : start + 7]
            rates.append(Rate(group, name, groups[group], *three))
            if len(names) > 1:
                gaps.append(Gap(group, name, *four))
    return tuple(rates), tuple(gaps)


def _label_swaps(found: Mapping[str, Any], seed: int) -> tuple[SwapEffect, ...]:
    places = found["places"]
    if not places:
        return ()
    changed = [
        np.array(found[when]["predicted"])[places] != np.array(found[when]["swapped"])
        for when in ("before", "after")
    ]
    first, second = found["terms"]
    name = f"{first} ↔ {second}"
    return (SwapEffect(name, len(places), *means(np.array(changed, float), seed)),)


def _loss_swaps(found: Mapping[str, Any], seed: int) -> tuple[SwapEffect, ...]:
    """By the side that the originals name, and one side's cost minus the other's."""
    costs = np.array([found[when]["losses"] for when in ("before", "after")])
    costs = costs[:, :, 1] - costs[:, :, 0]
    sides = np.array([-1 if side is None else side for side in found["sides"]])
    first, second = found["terms"]
    swaps = []
    for side, name in ((0, f"{first} → {second}"), (1, f"{second} → {first}")):
        if (sides == side).any():
            own = costs[:, sides == side]
            swaps.append(SwapEffect(name, own.shape[1], *means(own, seed)))
    if len(swaps) == 2:
        named = sides >= 0
        signs = np.where(sides[named] == 0, 1.0, 0.0)

        def difference(weights: Any, values: Any) -> Any:
            with np.errstate(invalid="ignore"):
                ours = values @ (weights * signs) / (weights * signs).sum()
                theirs = values @ (weights * (1 - signs)) / (weights * (1 - signs)).sum()
            found = ours - theirs
            return np.append(found, found[1] - found[0])

        numbers = intervals(costs[:, named], difference, seed)
        swaps.append(SwapEffect(f"preference for {first}", int(named.sum()), *numbers))
    return tuple(swaps)


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
