"""Confidence intervals of means and of success rates."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def bootstrap_mean(values: Array, draws: int = 10_000, seed: int = 0) -> tuple[Array, Array]:
    """95% interval of the mean over the last dimension of [...,E], by the percentile bootstrap -> low, high [...]."""
    n = values.shape[-1]
    return percentile_interval(values[..., np.random.default_rng(seed).integers(n, size=(draws, n))].mean(-1))


def percentile_interval(draws: Array) -> tuple[Array, Array]:
    """95% interval of a statistic from D bootstrap draws of it [...,D] -> low, high [...]."""
    low, high = np.percentile(draws, [2.5, 97.5], axis=-1)
    return low, high


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a success rate: it is within [0,1], and not a single point even for 0 or all of n."""
    rate = successes / trials
    middle = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)
