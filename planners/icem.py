"""iCEM: the cross-entropy method with noise that has a colour, and elites that are kept and shifted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planners.base import Plan, RewardFn, begin, refit, require_elites, require_positive, score
from world_model.contract import Dynamics
from world_model.state import LatentState


@dataclass(frozen=True)
class ICEM:
    """The sample-efficient cross-entropy method (arXiv 2008.06389).

    Over ``CEM``: noise whose power falls with its frequency along the steps, so that candidates go somewhere instead of
    trembling; fewer candidates from one iteration to the next; a share of the elites stays among the candidates, from
    one iteration to the next and, a chunk later, from one decision to the next (``Plan.elites``); and the mean keeps a
    part of what it was. The mean is candidate 0 of every iteration, where the paper dreams it in the last one alone.
    """

    horizon: int = 15  # H, chunks
    chunk: int = 1  # K, steps in a chunk
    candidates: int = 100  # N of the first iteration
    elites: int = 10
    iterations: int = 4
    std: float = 0.5  # of the first samples, in half action ranges
    min_std: float = 0.01  # in half action ranges
    colour: float = 2.0  # exponent of the noise's spectrum: 0 white, 2 a random walk's
    shrink: float = 1.25  # by this factor fewer candidates in the next iteration, but twice the elites at least
    keep: float = 0.3  # of the elites
    momentum: float = 0.1  # of the mean and std
    discount: float = 1.0  # per step

    def __post_init__(self) -> None:
        require_positive(
            horizon=self.horizon, chunk=self.chunk, iterations=self.iterations, std=self.std, discount=self.discount
        )
        require_elites(elites=self.elites, candidates=self.candidates, min_std=self.min_std, std=self.std)
        if not self.shrink >= 1:
            raise ValueError(f"shrink must be at least 1, got {self.shrink}")
        if not 0 <= self.colour <= 10:
            raise ValueError(f"colour must be in [0, 10], got {self.colour}")
        if not (0 <= self.keep <= 1 and 0 <= self.momentum < 1):
            raise ValueError(f"keep must be in [0, 1] and momentum in [0, 1), got {self.keep} and {self.momentum}")

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
        """See ``Planner.plan`` -> the best sequence seen in each row, its own imagined return, and the kept elites."""
        search = begin(dynamics, state, self.horizon, self.chunk, warm, seed)
        mean, std = search.mean, (self.std * search.half_range).expand_as(search.mean)
        row, kept = torch.arange(state.batch, device=mean.device), round(self.keep * self.elites)
        stay = search.around(mean, std, search.coloured(kept, self.colour))
        if warm is not None and warm.elites is not None:
            known = warm.elites[:, :kept]
            if known.shape != stay.shape:
                raise ValueError(
                    f"warm.elites must hold {kept} for each row, as this planner keeps, got {known.shape[1]}"
                )
            stay = torch.where(known.isnan(), stay, known)  # what isn't known is drawn like the others
        best = search.nothing_yet
        for iteration in range(self.iterations):
            count = min(max(int(self.candidates * self.shrink**-iteration), 2 * self.elites), self.candidates)
            samples = search.around(mean, std, search.coloured(count, self.colour))
            samples[:, 0] = mean
            samples = torch.cat([samples, stay], 1)
            earned = score(dynamics, state, samples, discount=self.discount, obs=obs, reward_fn=reward_fn)
            values, order = earned.topk(self.elites, dim=1)
            elites = samples[row[:, None], order]
            stay = elites[:, :kept]
            best = best.or_better(elites[:, 0], values[:, 0])
            new_mean, new_std = refit(elites, values, mean)
            mean = torch.lerp(new_mean, mean, self.momentum).clamp_(search.low, search.high)
            std = torch.lerp(new_std, std, self.momentum).clamp_(self.min_std * search.half_range)
        return best._replace(elites=stay)
