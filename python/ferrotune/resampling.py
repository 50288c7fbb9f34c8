"""Bootstrap intervals in Python: of what the engine gives record by record.

As the engine's (`Interval`): percentiles 2.5 and 97.5 of 1,000 resamples with replacement (Efron,
1979). The same resample is taken of everything that belongs to one record, so that differences are
paired.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .metrics import Interval

RESAMPLES = 1000
Floats = npt.NDArray[np.float64]


def intervals(
    values: Floats, statistic: Callable[[Floats, Floats], Floats], seed: int
) -> list[Interval]:
    """Intervals of `statistic(weights [n], values [k, n])`, an array of numbers, over n records.

    `weights` are how often each record was drawn: all ones for the value itself. Resamples in
    which a number is not a number (no record of a group was drawn) are left out of its interval.
    """
    count = values.shape[1]
    random = np.random.default_rng(seed)
    value = statistic(np.ones(count), values)
    drawn = []
    for _ in range(RESAMPLES):
        picked = random.integers(count, size=count)
        drawn.append(statistic(np.bincount(picked, minlength=count).astype(float), values))
    return _quantiles(value, np.array(drawn))


def counted(
    counts: npt.NDArray[np.int64], statistic: Callable[[Floats], Floats], seed: int
) -> list[Interval]:
    """Intervals of a statistic of records that fall into few kinds, `counts` of each.

    `statistic` takes counts `[resamples, kinds]` and gives `[resamples, k]`.
    """
    random = np.random.default_rng(seed)
    total = int(counts.sum())
    drawn = random.multinomial(total, counts / total, size=RESAMPLES).astype(float)
    return _quantiles(statistic(counts[None].astype(float))[0], statistic(drawn))


def _quantiles(value: Floats, drawn: Floats) -> list[Interval]:
    with np.errstate(all="ignore"):
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    triples: Any = zip(value.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Interval(*triple) for triple in triples]


def means(values: Floats, seed: int) -> list[Interval]:
    """Of the mean of each row of `values` `[k, n]`, and of the last two rows' difference."""

    def statistic(weights: Floats, given: Floats) -> Floats:
        found = given @ weights / weights.sum()
        return np.append(found, found[-1] - found[-2])

    return intervals(values, statistic, seed)
