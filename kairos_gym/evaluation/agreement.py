"""Agreement: whether a dream ranks policies as the simulator does, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 4000  # of the bootstrap


@dataclass(frozen=True)
class Agreement:
    """How imagined and simulated mean returns of P policies go together; each figure with its 95% interval."""

    pearson: tuple[float, float, float]  # estimate, low, high
    spearman: tuple[float, float, float]
    regret: tuple[float, float, float]  # in units of return: the best policy's less that of the one the dream chooses
    chosen: int  # the policy with the highest imagined return
    best: int  # the one with the highest simulated return


def agreement(imagined: Array, simulated: Array, seed: int = 0) -> Agreement:
    """Imagined and simulated returns, both [P,E] from the same E starts -> Agreement of the P mean returns.

    Intervals are the percentile bootstrap over policies and over starts at once (regret: over starts alone, since
    which policies stand for choice is given). A correlation without any spread on one side is NaN.
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
    rng = np.random.default_rng(seed)
    e = rng.integers(starts, size=(DRAWS, starts))
    dreamed, real = imagined[:, e].mean(-1).T, simulated[:, e].mean(-1).T  # [DRAWS,P]
    p = rng.integers(policies, size=(DRAWS, policies))
    drawn = np.take_along_axis(dreamed, p, 1), np.take_along_axis(real, p, 1)
    means = imagined.mean(1)[None], simulated.mean(1)[None]
    return Agreement(
        _interval(pearson(*means), pearson(*drawn)),
        _interval(pearson(*map(ranks, means)), pearson(*map(ranks, drawn))),
        _interval(_regret(*means), _regret(dreamed, real)),
        int(means[0].argmax()),
        int(means[1].argmax()),
    )


def pearson(x: Array, y: Array) -> Array:
    """The correlation of x and y [...,P] over their last dimension -> [...]; NaN where one of them has no spread."""
    far = np.maximum(np.abs(x).max(-1), np.abs(y).max(-1))  # beside which rounding is no spread
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    a, b = np.sqrt((x * x).sum(-1)), np.sqrt((y * y).sum(-1))
    spread = (a > 1e-12 * far) & (b > 1e-12 * far)
    return np.divide((x * y).sum(-1), a * b, out=np.full(a.shape, np.nan), where=spread)


def ranks(x: Array) -> Array:
    """Ranks [...,P] along the last dimension, from 0; equal numbers share the mean of theirs."""
    below = (x[..., None, :] < x[..., :, None]).sum(-1)
    same = (x[..., None, :] == x[..., :, None]).sum(-1)
    return np.asarray(below + (same - 1) / 2, np.float64)


def _regret(dreamed: Array, real: Array) -> Array:
    chosen = np.take_along_axis(real, dreamed.argmax(-1)[..., None], -1)[..., 0]
    return np.asarray(real.max(-1) - chosen)


def _interval(estimate: Array, drawn: Array) -> tuple[float, float, float]:
    drawn = drawn[np.isfinite(drawn)]  # draws of one policy alone have no correlation
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(estimate.item()), float(low), float(high)
