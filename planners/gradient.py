"""Gradient ascent through the dream: Adam on the actions of several starts at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planners.base import SearchPlanner, require_positive
from planners.plan import Plan
from planners.search import Search


@dataclass(frozen=True)
class Gradient(SearchPlanner):
    """Planning by the gradient of the imagined return, from several starts (arXiv 2004.08763 has it beside CEM).

    The mean of the search and noisy copies of it are all improved by Adam (arXiv 1412.6980); after each step what left
    the action bounds is put back onto them. Where there are limits, a start that exceeds them lowers its violation
    first. The result is the best sequence ever dreamed. The dynamics must pass gradients on to the actions: a
    ``WorldModel`` does, a simulator doesn't.
    """

    starts: int = 8  # N
    iterations: int = 20
    std: float = 0.5  # of the starts, in half action ranges
    lr: float = 0.1  # in half action ranges

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(starts=self.starts, iterations=self.iterations, std=self.std, lr=self.lr)

    def find(self, search: Search) -> Plan:
        """-> the best sequence [B,H,K,A] seen in each row, with its own imagined return [B].

        Raises ValueError where the dynamics, or the objective, pass no gradients.
        """
        std = (self.std * search.half_range).expand_as(search.mean)
        samples = search.around(search.mean, std, search.normal(self.starts))
        # In half action ranges, so that one rate fits every action: 0 is the middle, -1 and 1 are the bounds.
        middle, half = (search.low + search.high) / 2, search.half_range.clamp(min=1e-12)
        place = ((samples - middle) / half).clamp_(-1, 1).requires_grad_()
        adam = torch.optim.Adam([place], lr=self.lr)
        for _ in range(self.iterations):
            with torch.enable_grad():
                actions = middle + half * place
                # Rounding may take an action past its bound, where the projection would let no gradient through.
                onto = (actions.clamp(search.low, search.high) - actions).detach()
                scored = search.score(actions + onto, gradients=True)
                worth = scored.value
                if scored.violation is not None:
                    worth = torch.where(scored.violation > 0, -scored.violation, worth)
                loss = -worth.sum()
            found = torch.autograd.grad(loss, place, allow_unused=True)[0] if loss.requires_grad else None
            if found is None:
                raise ValueError(
                    "these dynamics, or this objective, pass no gradients on to the actions: use a planner that samples"
                )
            place.grad = found.nan_to_num(0.0, 0.0, 0.0)  # a dream that was lost points nowhere
            adam.step()
            with torch.no_grad():
                place.clamp_(-1, 1)
        search.score(middle + half * place.detach())
        return search.best
