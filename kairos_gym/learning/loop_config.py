"""LoopConfig: how a self-improving loop goes about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopConfig:
    """How a loop goes about it. Steps are those of the simulator; a round is one turn of playing and learning."""

    samples: int = 5000  # real steps to learn from in all; those of evaluations are not counted
    round_steps: int = 250  # real steps between two trainings; the first, random round has twice as many
    target: float | None = None  # stop when the mean real return of an evaluation reaches it
    max_error: float | None = 0.2  # a dream ends where its error may be larger; None: where it is `horizon` steps long
    confidence: float = 0.9  # that it isn't, from 0.5 to 0.9
    horizon: int = 32  # the longest dream, in steps
    penalty: float = 0.0  # what steps far from all real ones cost, in the reward's std
    updates: int = 20  # of the policy for each real step, at most; as many as there are trusted steps, real and dreamed
    dreams: int = 64  # how many dreams go on side by side
    draft_steps: int = 3000  # updates of the world model's draft in each round
    memory_steps: int = 100  # updates of its memory, after those of its draft
    weight_decay: float = 1e-2  # of the world model's training
    seed: int = 0  # of everything drawn at random

    def __post_init__(self) -> None:
        for name, least in (
            *((name, 1) for name in ("samples", "horizon", "updates", "dreams", "draft_steps")),
            *((name, 0) for name in ("penalty", "memory_steps", "weight_decay", "seed")),
            ("round_steps", 50),  # fewer can't tell how wrong dreams are
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 2 * self.samples < self.round_steps:
            raise ValueError(f"samples must be at least half a round, {self.round_steps / 2:g}, got {self.samples}")
        if self.seed > 2_000_000:
            raise ValueError(f"seed must be at most 2,000,000, got {self.seed}")
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"max_error must be above 0, or None, got {self.max_error}")
        if not 0.5 <= self.confidence <= 0.9:
            raise ValueError(f"confidence must be 0.5 to 0.9, got {self.confidence}: a round is too short for more")
