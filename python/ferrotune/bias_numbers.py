"""Bias from the engine's predictions, with bootstrap intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .bias import Gap, Rate, SwapEffect
from .resampling import counted, intervals, means


def rates_and_gaps(
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


def label_swaps(found: Mapping[str, Any], seed: int) -> tuple[SwapEffect, ...]:
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


def loss_swaps(found: Mapping[str, Any], seed: int) -> tuple[SwapEffect, ...]:
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
