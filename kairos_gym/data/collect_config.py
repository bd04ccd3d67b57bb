"""CollectConfig: how much experience to record, and what plays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Behaviour = Literal["uniform", "held", "mixed", "ladder", "expert"]


@dataclass(frozen=True)
class CollectConfig:
    """How much experience to record, either ``steps`` or ``episodes``, and what plays."""

    seed: int = 0  # every episode draws its start and its actions from the seed and its own number
    steps: int | None = None  # how many steps; the last episode is finished, so there may be a few more
    episodes: int | None = None  # or how many episodes
    episode_steps: int | None = None  # the time limit of an episode, instead of the simulator's own

    # uniform: independent random actions; held: random actions, each held for 1 to 8 steps; mixed: the two by turns, an
    # episode each; ladder: ten policies by turns, from doing nothing to trained ones, which are trained first where
    # they haven't been (a few minutes); expert: the scripted expert of robosuite's Lift, Stack or Door, by turns clean,
    # noisy, failing, and in every other episode interrupted by random actions
    behaviour: Behaviour = "mixed"

    policy_seed: int = 0  # of the training of the ladder's policies
    workers: int = 1  # how many processes play; the data are the same for any number

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if (self.steps is None) == (self.episodes is None):
            raise ValueError(f"give either steps or episodes, got steps={self.steps} and episodes={self.episodes}")
        for name in ("steps", "episodes", "episode_steps", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.behaviour not in get_args(Behaviour):
            names = ", ".join(map(repr, get_args(Behaviour)))
            raise ValueError(f"behaviour must be one of {names}, got {self.behaviour!r}")

    @property
    def amount(self) -> dict[str, int]:
        """How much: {"steps": n} or {"episodes": n}."""
        either = {"steps": self.steps, "episodes": self.episodes}
        return {unit: n for unit, n in either.items() if n is not None}
