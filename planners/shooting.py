"""Random shooting: dream many random plans, keep the best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planners.base import SearchPlanner, require_positive
from planners.plan import Plan
from planners.search import Search


@dataclass(frozen=True)
class RandomShooting(SearchPlanner):
    """Actions uniform within their bounds, independent at every step (arXiv 1708.02596, section IV-C).

    Candidate 0 is the plan that the search starts from, so that the result is never worse than a warm start.
    """

    candidates: int = 1000  # N

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(candidates=self.candidates)

    def find(self, search: Search) -> Plan:
        """-> the best candidate [B,H,K,A] of each row, with its imagined return [B]."""
        samples = torch.lerp(search.low, search.high, search.uniform(self.candidates))
        samples[:, 0] = search.mean
        search.score(search.with_warm(samples))
        return search.best
