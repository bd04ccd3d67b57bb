"""The cross-entropy method: sample plans around a mean, refit the mean to the best of them, repeat."""

from __future__ import annotations

from dataclasses import dataclass

from planners.base import SearchPlanner, require_elites, require_positive
from planners.plan import Plan
from planners.search import Search, refit


@dataclass(frozen=True)
class CEM(SearchPlanner):
    """Cross-entropy method over action sequences, as in PETS (arXiv 1805.12114).

    Two choices differ from PETS. Samples are projected onto the action bounds when they are dreamed, instead of drawn
    from a truncated normal (see ``Search``). And every mean is dreamed too, as candidate 0 of the next iteration, the
    last one by itself: the result is the best sequence ever dreamed, a mean or a sample, and its value is its imagined
    return. Where there are limits, candidates that keep them come first among the elites
    (constrained CEM, https://proceedings.neurips.cc/paper/2018/hash/34ffeb359a192eb8174b6854643cc046-Abstract.html).
    """

    candidates: int = 400  # N
    elites: int = 40
    iterations: int = 5
    std: float = 0.5  # of the first samples, in half action ranges
    min_std: float = 0.01  # in half action ranges

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(iterations=self.iterations, std=self.std)
        require_elites(elites=self.elites, candidates=self.candidates, min_std=self.min_std, std=self.std)

    def find(self, search: Search) -> Plan:
        """-> the best sequence [B,H,K,A] dreamed for each row, with its imagined return [B]."""
        mean, std = search.mean, (self.std * search.half_range).expand_as(search.mean)
        for _ in range(self.iterations):
            samples = search.around(mean, std, search.normal(self.candidates))
            elites, values = search.elites(samples, self.elites)
            mean, std = refit(elites, values, mean)
            std = std.clamp_(self.min_std * search.half_range)
        search.score(mean[:, None])
        return search.best
