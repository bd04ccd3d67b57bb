"""Model predictive path integral control: perturb a plan, and average the samples weighted by their returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planners.base import SearchPlanner, require_positive
from planners.plan import Plan
from planners.scoring import Scores
from planners.search import Search


@dataclass(frozen=True)
class MPPI(SearchPlanner):
    """Model predictive path integral control (arXiv 1707.02342): weights proportional to exp(return / temperature).

    Samples are projected onto the action bounds when they are dreamed (see ``Search``). The temperature is in standard
    deviations of the row's returns, so that one default fits rewards of any size, and the noise shrinks by ``decay``
    each iteration. The plan is the last average, dreamed once more for its value. The best candidate replaces it where
    its return isn't finite, or it exceeds limits by more than that candidate. Only candidates that keep the limits have
    a weight; where none does, the weights come from the violation instead of the return. The cost of control in the
    paper's weights is left to the objective.
    """

    candidates: int = 400  # N
    iterations: int = 5
    std: float = 0.5  # of the first noise, in half action ranges
    decay: float = 0.7  # of the noise, per iteration
    temperature: float = 0.15  # in standard deviations of the returns

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            candidates=self.candidates, iterations=self.iterations, std=self.std, decay=self.decay,
            temperature=self.temperature,
        )  # fmt: skip

    def find(self, search: Search) -> Plan:
        """-> the weighted average [B,H,K,A] of each row's candidates, with its imagined return [B]."""
        mean, std = search.mean, (self.std * search.half_range).expand_as(search.mean)
        for _ in range(self.iterations):
            samples = search.around(mean, std, search.normal(self.candidates))
            weights = self._weights(search.score(samples))
            mean = torch.einsum("bn,bnhka->bhka", weights, samples)
            std = std * self.decay
        return search.finalise(mean)

    def _weights(self, scores: Scores) -> Tensor:
        """-> weights [B,N] that sum to 1; a return of -inf has weight 0 if another is finite."""
        value = scores.value
        if scores.violation is not None:
            feasible = scores.violation <= 0
            penalised = value.masked_fill(~feasible, -torch.inf)
            value = torch.where(feasible.any(1, keepdim=True), penalised, -scores.violation)
        finite = value.isfinite()
        count = finite.sum(1, keepdim=True).clamp(min=1)
        centre = torch.where(finite, value, 0.0).sum(1, keepdim=True) / count
        spread = (torch.where(finite, value - centre, 0.0).square().sum(1, keepdim=True) / count).sqrt()
        # Without a finite return all weights are equal, so the average stays near the mean of the samples.
        logits = torch.where(finite, (value - centre) / (self.temperature * spread).clamp(min=1e-12), -torch.inf)
        return logits.masked_fill(~finite.any(1, keepdim=True), 0.0).softmax(1)
