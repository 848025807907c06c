"""Intervals by the bootstrap: how much a figure varies with the questions that happened to be asked.

Questions are drawn again with replacement. Figures of two modes are compared over the same draws ("paired"), so what
both find hard does not widen the interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2_000
SHARE = 95.0
"""How many per cent of the draws lie within an interval."""

Floats = NDArray[np.float64]
Statistic = Callable[..., Any]
"""Reduces the last axis of arrays, one per mode: [..., questions] to [...]."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes:
        value: over the questions that were asked.
        low, high: the interval's ends.
    """

    value: float
    low: float
    high: float


def mean(values: Floats) -> Any:
    return values.mean(-1)


def median(values: Floats) -> Any:
    return np.median(values, axis=-1)


def p95(values: Floats) -> Any:
    return np.percentile(values, 95, axis=-1)


def mean_difference(values: Floats, other: Floats) -> Any:
    return (values - other).mean(-1)


def share_recovered(values: Floats, other: Floats) -> Any:
    """How much of the other's distance to 0 is won back: 1.0 is all of it, below 0.0 it is lost."""
    distance = other.mean(-1)
    return 1 - values.mean(-1) / np.where(distance == 0, np.nan, distance)


def estimate(statistic: Statistic, *values: Sequence[float], seed: int) -> Estimate:
    """A statistic of some modes' values, one value per question in the same order, with its interval.

    Args:
        statistic: see `Statistic`.
        values: at least one question's.
        seed: the same seed gives the same interval.
    """
    given = [np.asarray(each, dtype=np.float64) for each in values]
    count = len(given[0])
    drawn = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    spread = statistic(*(each[drawn] for each in given))
    outside = (100 - SHARE) / 2
    low, high = np.nanpercentile(spread, [outside, 100 - outside])
    return Estimate(float(statistic(*given)), float(low), float(high))
