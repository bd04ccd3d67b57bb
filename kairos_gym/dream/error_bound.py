"""How wrong dreams may be by now: the error bound of a calibrated model, step by step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kairos_gym.dream.config import DreamConfig
from world_model.conformal import ConformalBound


class ErrorBound(NamedTuple):
    """How wrong R dreams may be: after each of K inner steps, all [R,K], or after the last that counts, all [R]."""

    uncertainty: NDArray[np.float32]  # see ``world_model.conformal``
    bound: NDArray[np.float64]  # of the error, at the dream's confidence; infinite beyond the calibrated steps
    steps: NDArray[np.int64]  # simulator steps since the last real frame

    def after(self, counts: NDArray[np.int64] | int) -> ErrorBound:
        """[R,K] -> [R], after ``counts`` inner steps, a number for each dream or for all; 0 means the same as 1."""
        index: Any = (slice(None), counts - 1)
        if not isinstance(counts, int):
            index = np.arange(len(counts)), np.maximum(counts, 1) - 1
        return ErrorBound(self.uncertainty[index], self.bound[index], self.steps[index])


class CalibratedBound:
    """Computes the error bounds of dreams with the settings ``config``.

    Raises ValueError where ``model`` isn't calibrated, or not for that confidence.
    """

    def __init__(self, model: Any, config: DreamConfig):
        trust: ConformalBound | None = getattr(model, "trust", None)
        if trust is None:
            raise ValueError(
                "this model was not calibrated, so it can't say how wrong it may be: run kairos calibrate MODEL "
                "DATASET with recorded episodes that its training left out"
            )
        assert config.confidence is not None
        trust.check_confidence(config.confidence)
        self.trust, self.max_error = trust, config.max_error
        self._inner_steps = np.arange(1, config.chunk + 1)
        self._quantiles = trust.quantile(config.confidence, config.chunk).double().numpy()

    def initial(self, frames: int, rows: int) -> NDArray[np.float32]:
        """The uncertainty of R dreams that have just observed so many real frames -> [R]."""
        return self.trust.initial(torch.full((rows,), frames)).numpy()

    def propagate(
        self, uncertainty: NDArray[Any], age: NDArray[np.int64], before: NDArray[Any], actions: NDArray[Any]
    ) -> ErrorBound:
        """The bounds after each inner step of R dreams -> [R,K].

        uncertainty, age: [R], before the chunk; age in simulator steps since the last real frame. before: the
        observations that each inner step begins at, [R,K,O]. actions: [R,K,A].
        """
        uncertainty = self.trust.propagate(uncertainty, before, actions)
        steps = age[:, None] + self._inner_steps
        quantiles = self._quantiles[np.minimum(steps, len(self._quantiles)) - 1]
        return ErrorBound(uncertainty, uncertainty * quantiles, steps)

    def exceeded(self, bounds: ErrorBound) -> NDArray[np.bool_]:
        """Where the error may be above ``max_error`` -> [R,K]."""
        if self.max_error is None:
            return np.zeros(bounds.bound.shape, bool)
        return ~(bounds.bound <= self.max_error)  # also where the bound is NaN
