"""DreamConfig: the settings of a dream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kairos_gym.dream.arguments import is_count
from world_model.contract import StepFn


@dataclass(frozen=True)
class DreamConfig:
    """How a model is dreamed. ``DreamEnv``, ``DreamVectorEnv`` and ``DreamVecEnv`` take these as keyword arguments.

    chunk: K, the simulator steps that one ``step`` imagines, from 1 to the model's longest (``model.spec.chunk``). With
        chunk=1 the action space is the simulator's own. With more it is that of K actions in a row: a Box [K,...], for
        Discrete actions a MultiDiscrete [K].
    sampled: draw each chunk from the model's distribution instead of taking its mean. Each episode has its own noise.
    flow_steps: Euler steps of the flow. One is enough for the mean; a sampled dream needs 4 or more.
    max_episode_steps: the simulator steps after which an episode is truncated. None takes the simulator's limit from
        the model's card. ``gym.make`` keeps an argument of this name for its own TimeLimit, which counts steps of the
        env and can only shorten an episode: to dream for longer than the card says, call ``DreamEnv(...)``.
    reward_fn, termination_fn: compute rewards (float [N]) and terminations (bool [N]) instead of the model, from (obs,
        action, next_obs) of N simulator steps at once. obs and next_obs are elements of the observation space, stacked
        [N,...] and clipped to its bounds; actions are elements of the simulator's action space. Written in torch, or in
        numpy, through which no gradient flows.
    max_error: truncate a dream once its error may exceed this. The error is the RMS over dimensions of dreamed minus
        real, each divided by its std in the training data.
    confidence: the probability with which the error bound holds for dreams like those that the model was calibrated on,
        0.5 to 0.995; 0.9 where only max_error is given. With either of the two, each step reports the bound in
        ``info["trust"]``. See ``world_model.conformal``.

    Raises ValueError, or TypeError for the wrong type, for a value that no model allows.
    """

    chunk: int = 1
    sampled: bool = False
    flow_steps: int = 1
    max_episode_steps: int | None = None
    reward_fn: StepFn | None = None
    termination_fn: StepFn | None = None
    max_error: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        if not is_count(self.flow_steps):
            raise ValueError(f"flow_steps must be a whole number of at least 1, got {self.flow_steps!r}")
        if self.max_episode_steps is not None and not is_count(self.max_episode_steps):
            raise ValueError(f"max_episode_steps must be a whole number of at least 1, got {self.max_episode_steps!r}")
        for name in ("reward_fn", "termination_fn"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function (obs, action, next_obs) -> [N], got {function!r}")
        if self.max_error is None and self.confidence is None:
            return
        if self.confidence is None:
            object.__setattr__(self, "confidence", 0.9)
        for name in ("max_error", "confidence"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int | float | np.number) or isinstance(number, bool)):
                raise TypeError(f"{name} must be a number, got {number!r}")
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"max_error must be above 0, got {self.max_error}")
        if self.sampled or self.flow_steps != 1:
            raise ValueError(
                "max_error and confidence bound the error of the mean dream in one Euler step, so they can't go with "
                f"sampled={self.sampled} and flow_steps={self.flow_steps}"
            )
