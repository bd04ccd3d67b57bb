"""LoopConfig: how a self-improving loop goes about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoopConfig:
    """How a loop goes about it. Steps are those of the simulator; a round is one turn of playing and learning."""

    samples: int = 5000  # real steps in all
    round_steps: int = 250  # real steps between two trainings; the first, random round has twice as many
    target: float | None = None  # stop when the judged real return reaches it
    max_error: float | None = 0.5  # a dream ends where its error may be larger; None: where it is `horizon` steps long
    confidence: float = 0.9  # with which it isn't
    horizon: int = 32  # steps of a dream at most
    penalty: float = 0.0  # see ``planners.Cautious``
    by: Literal["distance", "doubt"] = "distance"  # what it is laid on
    updates: int = 10  # of the policy for each real step at most; as many as there are trusted steps, real and dreamed
    dreams: int = 64  # side by side
    draft_steps: int = 3000  # updates of the world model in each round
    memory_steps: int = 100
    weight_decay: float = 1e-2  # the world model's
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "round_steps", "horizon", "updates", "dreams", "draft_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.round_steps < 50:
            raise ValueError(
                f"a round of {self.round_steps} steps is too short to say how wrong dreams are: 50 or more"
            )
