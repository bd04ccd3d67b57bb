"""The cross-entropy method: sample plans around a mean, refit the mean to the best of them, repeat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planners.base import Plan, RewardFn, begin, refit, require_elites, require_positive, score
from world_model.contract import Dynamics
from world_model.state import LatentState


@dataclass(frozen=True)
class CEM:
    """Cross-entropy method over action sequences, as PETS plans with it (arXiv 1805.12114).

    Two choices differ from PETS. Samples are projected onto the action bounds instead of drawn from a truncated
    normal: the mean can then reach a bound, where the optimum of many control tasks lies. And the current mean is
    candidate 0 of every iteration, so the result is simply the best sequence ever dreamed, be it a mean or a sample,
    and its value is the return it was dreamed with.
    """

    horizon: int = 15  # H, chunks
    chunk: int = 1  # K, steps in a chunk
    candidates: int = 400  # N
    elites: int = 40
    iterations: int = 5
    std: float = 0.5  # of the first samples, in half action ranges
    min_std: float = 0.01  # in half action ranges
    discount: float = 1.0  # per step

    def __post_init__(self) -> None:
        require_positive(
            horizon=self.horizon, chunk=self.chunk, iterations=self.iterations, std=self.std, discount=self.discount
        )
        require_elites(elites=self.elites, candidates=self.candidates, min_std=self.min_std, std=self.std)

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
        """See ``Planner.plan`` -> the best sequence seen in each row, with its own imagined return."""
        search = begin(dynamics, state, self.horizon, self.chunk, warm, seed)
        mean, std = search.mean, (self.std * search.half_range).expand_as(search.mean)
        min_std = self.min_std * search.half_range
        row = torch.arange(state.batch, device=mean.device)
        best = search.nothing_yet
        for iteration in range(self.iterations):
            samples = search.around(mean, std, search.normal(self.candidates))
            samples[:, 0] = mean
            returns = score(dynamics, state, samples, discount=self.discount, obs=obs, reward_fn=reward_fn)
            values, order = returns.topk(self.elites, dim=1)
            best = best.or_better(samples[row, order[:, 0]], values[:, 0])
            if iteration + 1 == self.iterations:
                break  # nobody would dream another refit
            elites = samples[row[:, None], order]
            mean, std = refit(elites, values, mean)
            # Clamped, since rounding may take the mean of equal actions past their bound.
            mean, std = mean.clamp_(search.low, search.high), std.clamp_(min_std)
        return best
