"""Walk: a toy with all that a dream can have, memory, noise of its own, starts, ends, for a few additions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from world_model.contract import Imagined, Spec
from world_model.noise import normal
from world_model.state import LatentState


class Walk:
    """A point in the plane with inertia: it remembers its speed, which no observation shows, and how often it moved.

    x' = x + v', v' = 0.8 v + 0.1 u (+ 0.01 noise of its own in a sampled dream), reward -|x'|_1. It ends where
    x'_0 > wall; what it imagines after that is NaN. Beyond 3 it says infinity. Observations are within +-2.
    """

    def __init__(self, *, wall: float = 0.6, chunk: int = 4, starts: bool = True, seed: int = 0):
        self.wall, self.offset = wall, seed
        self.spec = Spec(spaces.Box(-2, 2, (2,), np.float64), spaces.Box(-1, 1, (2,), np.float32), chunk, 0.1)
        self.card: dict[str, Any] = {"time_limit": 9}
        line = torch.arange(5.0)[:, None, None] / 10
        if starts:
            self.starts = SimpleNamespace(obs=torch.cat([line, -line], -1), actions=torch.zeros(5, 1, 2))

    def fingerprint(self) -> str:
        return f"walk {self.wall} {self.offset}"

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        seeds = torch.zeros(batch, dtype=torch.int64) if seeds is None else seeds
        zero = torch.zeros(batch, 2)
        return LatentState({"x": zero, "v": zero, "seed": seeds, "age": torch.zeros_like(seeds)})

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        speed = state["v"] if actions is None else state["v"] + 0.1 * actions[:, 1:].sum(1)
        return state.replace(x=obs[:, -1], v=speed, age=state["age"] + obs.shape[1])

    def imagine(
        self, state: LatentState, actions: Tensor, *, decode: bool = True, sampled: bool = False
    ) -> tuple[LatentState, Imagined]:
        x, v, age, steps = state["x"], state["v"], state["age"], []
        for u in actions.unbind(1):
            v = 0.8 * v + 0.1 * u
            if sampled:
                v = v + 0.01 * normal(state["seed"] + self.offset, age, 2)
            x = x + v
            x = torch.where(x.abs() > 3, torch.inf, x)
            ended = x[:, 0] > self.wall
            steps.append((x, -x.abs().sum(-1), ended))
            x, age = torch.where(ended[:, None], torch.nan, x), age + 1
        obs, reward, ends = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
        return state.replace(x=x, v=v, age=age), Imagined(obs if decode else None, reward, ends)
