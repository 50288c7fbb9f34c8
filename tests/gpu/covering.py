"""Few cases in which every two values of two settings meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(settings: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one value a setting; each pair of values of two settings is in some row. Greedy."""
    draw = random.Random(seed)
    names = list(settings)
    left = {
        pair
        for one, other in itertools.combinations(range(len(names)), 2)
        for pair in itertools.product(
            ((one, i) for i in range(len(settings[names[one]]))),
            ((other, i) for i in range(len(settings[names[other]]))),
        )
    }
    rows = []
    while left:
        row = dict(draw.choice(sorted(left)))
        for place in draw.sample(range(len(names)), len(names)):
            if place in row:
                continue
            values = list(range(len(settings[names[place]])))
            draw.shuffle(values)

            def gain(value: int, place: int = place, row: dict[int, int] = row) -> int:
                mine = (place, value)
                return sum(tuple(sorted((mine, other))) in left for other in row.items())

            row[place] = max(values, key=gain)
        left.difference_update(itertools.combinations(sorted(row.items()), 2))
        rows.append({names[place]: settings[names[place]][value] for place, value in row.items()})
    return rows
