"""CompareConfig: how a dream is compared with its simulator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompareConfig:
    """How a dream is compared with its simulator."""

    episodes: int = 16  # how many starts, the same for every policy
    seed: int = 10_000  # start e is that of the simulator's reset with seed + e
    horizon: int = 64  # how many steps to dream without looking, with the actions really played
    context: int = 16  # how many real frames to show before them; fewer in short episodes
    chunk: int = 1  # how many steps to imagine at once
    episode_steps: int | None = None  # the time limit of an episode, instead of the simulator's own
    references: bool = True  # compare with simpler models, too, fitted on the same data: no motion, linear, ensemble

    def __post_init__(self) -> None:
        horizon, context, episodes = self.horizon, self.context, self.episodes
        if horizon < 1 or context < 1 or episodes < 2:
            raise ValueError(
                f"horizon and context must be at least 1, episodes 2; got {horizon=}, {context=}, {episodes=}"
            )
