"""TrainConfig: what a world model looks like, and how long it trains."""

from __future__ import annotations

from dataclasses import dataclass

from world_model.training.config import FitConfig


@dataclass(frozen=True)
class TrainConfig:
    """What a world model looks like, and how long it trains."""

    pattern: str = "SGDG"  # the layers, one letter each: S sliding window, D dilated sliding window, G gated delta rule
    chunk: int = 4  # the longest number of steps that one call imagines
    draft: bool = True  # train a one-step draft first, which the transformer refines; without it, the plain transformer
    draft_steps: int = FitConfig.draft_steps  # optimiser updates of the draft
    steps: int = FitConfig.steps  # optimiser updates of the transformer
    held_out: int = 64  # how many episodes at the end of the dataset to leave for score
    seed: int = 0  # of everything drawn at random

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise ValueError(f"held_out must be 0 or more, got held_out={self.held_out}")
        self.fit_config()  # raises ValueError for numbers that no training takes

    def fit_config(self) -> FitConfig:
        """The part of it that ``fit`` takes."""
        return FitConfig(draft_steps=self.draft_steps, steps=self.steps, seed=self.seed)
