"""Agreement: whether a dream ranks policies as the simulator does, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kairos_gym.evaluation.intervals import percentile_interval

Array = NDArray[np.float64]
DRAWS = 4000  # of the bootstrap


@dataclass(frozen=True)
class Agreement:
    """How well imagined and simulated mean returns of P policies agree; each figure with its 95% interval."""

    pearson: tuple[float, float, float]  # estimate, low, high
    spearman: tuple[float, float, float]
    regret: tuple[float, float, float]  # in units of return: the best policy's less that of the one the dream chooses
    chosen: int  # the policy with the highest imagined return
    best: int  # the one with the highest simulated return


def agreement(imagined: Array, simulated: Array, seed: int = 0) -> Agreement:
    """Compare imagined and simulated returns, both [P,E] from the same E starts, by the mean returns of P policies.

    Intervals are the percentile bootstrap over policies and over starts at once; for the regret over starts alone,
    because it is about a choice among these very policies. A correlation without any spread on one side is NaN.
    Raises ValueError for other shapes, fewer than 3 policies or numbers that aren't finite.
    """
    if imagined.shape != simulated.shape or imagined.ndim != 2 or len(imagined) < 3:
        raise ValueError(
            f"imagined and simulated returns must both be [P,E] with 3 policies or more, got {imagined.shape} and "
            f"{simulated.shape}"
        )
    if not (np.isfinite(imagined).all() and np.isfinite(simulated).all()):
        raise ValueError("returns must be finite")
    policies, starts = imagined.shape
    means = imagined.mean(1)[None], simulated.mean(1)[None]
    rng = np.random.default_rng(seed)
    e = rng.integers(starts, size=(DRAWS, starts))
    over_starts = imagined[:, e].mean(-1).T, simulated[:, e].mean(-1).T  # [DRAWS,P]
    p = rng.integers(policies, size=(DRAWS, policies))
    over_both = tuple(np.take_along_axis(returns, p, 1) for returns in over_starts)
    return Agreement(
        pearson=_with_interval(pearson(*means), pearson(*over_both)),
        spearman=_with_interval(pearson(*map(ranks, means)), pearson(*map(ranks, over_both))),
        regret=_with_interval(_regret(*means), _regret(*over_starts)),
        chosen=int(means[0].argmax()),
        best=int(means[1].argmax()),
    )


def pearson(x: Array, y: Array) -> Array:
    """The correlation of x and y [...,P] over their last dimension -> [...]; NaN where one of them has no spread."""
    size = np.maximum(np.abs(x).max(-1), np.abs(y).max(-1))  # a spread much smaller than this is rounding
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    a, b = np.sqrt((x * x).sum(-1)), np.sqrt((y * y).sum(-1))
    spread = (a > 1e-12 * size) & (b > 1e-12 * size)
    return np.divide((x * y).sum(-1), a * b, out=np.full(a.shape, np.nan), where=spread)


def ranks(x: Array) -> Array:
    """Ranks [...,P] along the last dimension, from 0; equal numbers share the mean of theirs."""
    below = (x[..., None, :] < x[..., :, None]).sum(-1)
    same = (x[..., None, :] == x[..., :, None]).sum(-1)
    return np.asarray(below + (same - 1) / 2, np.float64)


def _regret(imagined: Array, simulated: Array) -> Array:
    """What it costs to choose by imagined returns [...,P] -> [...], in simulated return."""
    chosen = np.take_along_axis(simulated, imagined.argmax(-1)[..., None], -1)[..., 0]
    return np.asarray(simulated.max(-1) - chosen)


def _with_interval(estimate: Array, draws: Array) -> tuple[float, float, float]:
    draws = draws[np.isfinite(draws)]  # a draw of one policy alone has no correlation
    low, high = percentile_interval(draws) if len(draws) else (np.nan, np.nan)
    return float(estimate.item()), float(low), float(high)
