"""Model predictive path integral control: perturb a plan, average the perturbations weighted by what they earn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planners.base import Plan, RewardFn, begin, require_positive, score
from world_model.contract import Dynamics
from world_model.state import LatentState


@dataclass(frozen=True)
class MPPI:
    """Model predictive path integral control (arXiv 1707.02342): weights proportional to exp(return / temperature).

    Samples are projected onto the action bounds, so every average of them lies within the bounds too. The temperature
    is measured in standard deviations of the row's own returns, so that one default fits rewards of any size, and the
    noise shrinks by ``decay`` from one iteration to the next. The plan is the last average, as the method defines it;
    it is dreamed once more for its value.
    """

    horizon: int = 15  # H, chunks
    chunk: int = 1  # K, steps in a chunk
    candidates: int = 400  # N
    iterations: int = 5
    std: float = 0.5  # of the first noise, in half action ranges
    decay: float = 0.7  # of the noise, per iteration
    temperature: float = 0.15  # in standard deviations of the returns
    discount: float = 1.0  # per step

    def __post_init__(self) -> None:
        require_positive(
            horizon=self.horizon, chunk=self.chunk, candidates=self.candidates, iterations=self.iterations,
            std=self.std, decay=self.decay, temperature=self.temperature, discount=self.discount,
        )  # fmt: skip

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
        """See ``Planner.plan`` -> the weighted average of each row's candidates, with its own imagined return."""
        search = begin(dynamics, state, self.horizon, self.chunk, warm, seed)
        mean, std = search.mean, (self.std * search.half_range).expand_as(search.mean)
        for _ in range(self.iterations):
            samples = search.around(mean, std, search.normal(self.candidates))
            samples[:, 0] = mean
            returns = score(dynamics, state, samples, discount=self.discount, obs=obs, reward_fn=reward_fn)
            mean = torch.einsum("bn,bnhka->bhka", self._weights(returns), samples).clamp_(search.low, search.high)
            std = std * self.decay
        value = score(dynamics, state, mean[:, None], discount=self.discount, obs=obs, reward_fn=reward_fn)
        return Plan(mean, value[:, 0])

    def _weights(self, returns: Tensor) -> Tensor:
        """Returns [B,N] -> weights [B,N] that sum to 1; a return of -inf weighs nothing while another is finite."""
        finite = returns.isfinite()
        count = finite.sum(1, keepdim=True).clamp(min=1)
        centre = torch.where(finite, returns, 0.0).sum(1, keepdim=True) / count
        spread = (torch.where(finite, returns - centre, 0.0).square().sum(1, keepdim=True) / count).sqrt()
        # Without a finite return every weight is the same, and the average stays near the mean it was drawn around.
        logits = torch.where(finite, (returns - centre) / (self.temperature * spread).clamp(min=1e-12), -torch.inf)
        return logits.masked_fill(~finite.any(1, keepdim=True), 0.0).softmax(1)
