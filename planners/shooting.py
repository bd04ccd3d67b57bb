"""Random shooting: dream many random plans, keep the best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planners.base import Plan, RewardFn, begin, require_positive, score
from world_model.contract import Dynamics
from world_model.state import LatentState


@dataclass(frozen=True)
class RandomShooting:
    """Actions uniform within their bounds, independent at every step (arXiv 1708.02596, section IV-C).

    The plan that the search starts from is always candidate 0, so a warm start is only left for something better.
    """

    horizon: int = 15  # H, chunks
    chunk: int = 1  # K, steps in a chunk
    candidates: int = 1000  # N
    discount: float = 1.0  # per step

    def __post_init__(self) -> None:
        require_positive(horizon=self.horizon, chunk=self.chunk, candidates=self.candidates, discount=self.discount)

    def plan(
        self,
        dynamics: Dynamics,
        state: LatentState,
        *,
        warm: Plan | None = None,
        seed: int | Tensor = 0,
        obs: Tensor | None = None,
        reward_fn: RewardFn | None = None,
    ) -> Plan:
        """See ``Planner.plan`` -> the best candidate of each row, with its own imagined return."""
        search = begin(dynamics, state, self.horizon, self.chunk, warm, seed)
        samples = torch.lerp(search.low, search.high, search.uniform(self.candidates))
        samples[:, 0] = search.mean
        returns = score(dynamics, state, samples, discount=self.discount, obs=obs, reward_fn=reward_fn)
        value, best = returns.max(1)
        return Plan(samples[torch.arange(state.batch, device=best.device), best], value)
