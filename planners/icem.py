"""iCEM: the cross-entropy method with coloured noise, and elites that are kept and shifted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planners.base import SearchPlanner, require_elites, require_positive
from planners.plan import Plan
from planners.search import Search, refit


@dataclass(frozen=True)
class ICEM(SearchPlanner):
    """The sample-efficient cross-entropy method (arXiv 2008.06389).

    It differs from ``CEM`` in four ways. The power of the noise falls with its frequency along the steps, so that
    candidates move in one direction for longer. Each iteration has fewer candidates. A share of the elites stays among
    the candidates, in the next iteration and, one chunk later, in the next decision (``Plan.elites``). And mean and std
    have a momentum. The mean is candidate 0 of every iteration; in the paper only of the last one.
    """

    candidates: int = 100  # N of the first iteration
    elites: int = 10
    iterations: int = 4
    std: float = 0.5  # of the first samples, in half action ranges
    min_std: float = 0.01  # in half action ranges
    colour: float = 2.0  # exponent of the noise's spectrum: 0 white, 2 a random walk's
    shrink: float = 1.25  # factor by which each iteration has fewer candidates, but at least twice the elites
    keep: float = 0.3  # of the elites
    momentum: float = 0.1  # of the mean and std

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(iterations=self.iterations, std=self.std)
        require_elites(elites=self.elites, candidates=self.candidates, min_std=self.min_std, std=self.std)
        if not self.shrink >= 1:
            raise ValueError(f"shrink must be at least 1, got {self.shrink}")
        if not 0 <= self.colour <= 10:
            raise ValueError(f"colour must be in [0, 10], got {self.colour}")
        if not (0 <= self.keep <= 1 and 0 <= self.momentum < 1):
            raise ValueError(f"keep must be in [0, 1] and momentum in [0, 1), got {self.keep} and {self.momentum}")

    def find(self, search: Search) -> Plan:
        """-> the best sequence [B,H,K,A] dreamed for each row, its imagined return [B], and the elites to keep."""
        mean, std = search.mean, (self.std * search.half_range).expand_as(search.mean)
        keep, kept = round(self.keep * self.elites), search.warm_candidates[:, :0]
        for iteration in range(self.iterations):
            count = min(max(int(self.candidates * self.shrink**-iteration), 2 * self.elites), self.candidates)
            samples = search.around(mean, std, search.coloured(count, self.colour))
            samples = torch.cat([samples, kept], 1)
            elites, values = search.elites(samples, self.elites)
            kept = elites[:, :keep]
            new_mean, new_std = refit(elites, values, mean)
            mean = torch.lerp(new_mean, mean, self.momentum)
            std = torch.lerp(new_std, std, self.momentum).clamp_(self.min_std * search.half_range)
        return search.best._replace(elites=kept)
