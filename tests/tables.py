"""A small simulator with a Dict of observations and a table [2,2] of actions, for what vectors alone don't show."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Table(gym.Env[Any, Any]):
    """Two points on a table; an action [2,2] pushes each. obs: where they are [2,2] and how far apart [1]."""

    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            {
                "place": spaces.Box(-4.0, 4.0, (2, 2), np.float32),
                "apart": spaces.Dict({"by": spaces.Box(0.0, 20.0, (1,), np.float64)}),
            }
        )
        self.action_space = spaces.Box(-0.5, 0.5, (2, 2), np.float32)

    def _seen(self) -> dict[str, Any]:
        apart = np.array([np.linalg.norm(self.place[0] - self.place[1])])
        return {"place": self.place.astype(np.float32), "apart": {"by": apart}}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, (2, 2))
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = np.clip(self.place + 0.2 * action, -4, 4)
        return self._seen(), float(-np.abs(self.place).sum()), False, False, {}


gym.register("tables/Table-v0", entry_point="tables:Table", max_episode_steps=20)
