"""iCEM: the cross-entropy method with noise that has a colour, and elites that are kept and shifted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planners.base import SearchPlanner, require_elites, require_positive
from planners.plan import Plan
from planners.search import Search, refit


@dataclass(frozen=True)
class ICEM(SearchPlanner):
    """The sample-efficient cross-entropy method (arXiv 2008.06389).

    Over ``CEM``: noise whose power falls with its frequency along the steps, so that candidates go somewhere instead of
    trembling; fewer candidates from one iteration to the next; a share of the elites stays among the candidates, from
    one iteration to the next and, a chunk later, from one decision to the next (``Plan.elites``); and the mean keeps a
    part of what it was. The mean is candidate 0 of every iteration, where the paper dreams it in the last one alone.
    """

    candidates: int = 100  # N of the first iteration
    elites: int = 10
    iterations: int = 4
    std: float = 0.5  # of the first samples, in half action ranges
    min_std: float = 0.01  # in half action ranges
    colour: float = 2.0  # exponent of the noise's spectrum: 0 white, 2 a random walk's
    shrink: float = 1.25  # by this factor fewer candidates in the next iteration, but twice the elites at least
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
        """-> the best sequence [B,H,K,A] seen in each row, its own imagined return [B], and the kept elites."""
        mean, std = search.mean, (self.std * search.half_range).expand_as(search.mean)
        kept, stay = round(self.keep * self.elites), search.warm_candidates[:, :0]
        for iteration in range(self.iterations):
            count = min(max(int(self.candidates * self.shrink**-iteration), 2 * self.elites), self.candidates)
            samples = search.around(mean, std, search.coloured(count, self.colour))
            samples = torch.cat([samples, stay], 1)
            elites, values = search.elites(samples, self.elites)
            stay = elites[:, :kept]
            new_mean, new_std = refit(elites, values, mean)
            mean = torch.lerp(new_mean, mean, self.momentum)
            std = torch.lerp(new_std, std, self.momentum).clamp_(self.min_std * search.half_range)
        return search.best._replace(elites=stay)
