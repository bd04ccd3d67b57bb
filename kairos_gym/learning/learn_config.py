"""LearnConfig: how a policy learns in a model's dream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearnConfig:
    """How a policy learns in a model's dream. Steps are those of single dreams."""

    # Stable-Baselines3's soft actor-critic, TD3 or PPO; or shac, by gradients through the model's draft
    algorithm: Literal["sac", "td3", "ppo", "shac"] = "sac"

    steps: int | None = None  # of single dreams, in all; where not given, 100,000, and for shac 2,000,000
    dreams: int = 64  # how many dreams go on side by side
    max_error: float | None = None  # cut a dream where it may be wrong by more, with a confidence of 0.9
    penalty: float = 0.0  # what steps far from the training data cost, in standard deviations of the reward
    seed: int = 0  # of everything drawn at random

    def __post_init__(self) -> None:
        if self.total_steps < 20 * self.dreams:
            raise ValueError(
                f"steps must be at least {20 * self.dreams}, twenty for each of the {self.dreams} dreams, "
                f"got {self.total_steps}"
            )
        if self.algorithm == "shac" and (self.penalty or self.max_error is not None):
            raise ValueError("max_error and penalty pass no gradient on: choose one of the algorithms that sample")

    @property
    def total_steps(self) -> int:
        """``steps``, or else as many as the algorithm makes in a few minutes: SHAC's cost a tenth of the others'."""
        if self.steps is not None:
            return self.steps
        return 2_000_000 if self.algorithm == "shac" else 100_000
