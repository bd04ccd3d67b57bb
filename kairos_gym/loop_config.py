"""LoopConfig: how a self-improving loop goes about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopConfig:
    """How a loop goes about it. Steps are those of the simulator; a round is one turn of playing and learning."""

    samples: int = 5000  # real steps in all
    round_steps: int = 250  # real steps between two trainings; the first, random round has twice as many
    target: float | None = None  # stop when the judged real return reaches it
    max_error: float | None = 0.2  # a dream ends where its error may be larger; None: where it is `horizon` steps long
    confidence: float = 0.9  # with which it isn't
    horizon: int = 32  # steps of a dream at most
    penalty: float = 0.0  # what steps far from all real ones cost, in the reward's std; see ``planners.Cautious``
    updates: int = 20  # of the policy for each real step at most; as many as there are trusted steps, real and dreamed
    dreams: int = 64  # side by side
    draft_steps: int = 3000  # updates of the world model in each round
    memory_steps: int = 100  # and of its memory, after those of its draft
    weight_decay: float = 1e-2  # the world model's
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "round_steps", "horizon", "updates", "dreams", "draft_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.round_steps < 50:
            raise ValueError(f"round_steps must be at least 50, to say how wrong dreams are, got {self.round_steps}")
