"""How sure a mean over pictures is: percentile bootstrap (Efron 1979). Pictures are drawn again with
replacement, always the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resshift import seeds

LEVEL = 0.95
RESAMPLES = 10_000
_AT_A_TIME = 500  # resamples in memory: 3,000 pictures then take 12 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the bounds between which it lies with a confidence of 95 %; None for fewer than two
    pictures or infinite figures.
    """

    mean: float
    low: float | None
    high: float | None


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """Return the mean of at least one value with its interval; a pure function of the values in their order.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("a mean needs at least one value")
    sample = np.asarray(values, np.float64)
    mean = float(sample.mean())
    if len(sample) < 2 or not np.isfinite(mean):
        return Interval(mean, None, None)
    rng = seeds.philox("bootstrap", len(sample))
    means = np.empty(resamples)
    for start in range(0, resamples, _AT_A_TIME):
        count = min(_AT_A_TIME, resamples - start)
        means[start : start + count] = sample[rng.integers(len(sample), size=(count, len(sample)))].mean(
            axis=1
        )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))
