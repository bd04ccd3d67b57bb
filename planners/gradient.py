"""Gradient ascent through the dream: Adam on the actions of several starts at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planners.base import SearchPlanner, require_positive
from planners.plan import Plan
from planners.search import Search


@dataclass(frozen=True)
class Gradient(SearchPlanner):
    """Planning by the gradient of the imagined return, from several starts (as in arXiv 2004.08763, there with CEM).

    Adam (arXiv 1412.6980) improves the mean of the search and noisy copies of it; each step ends with a clip to the
    action bounds. Where there are limits, a start that exceeds them lowers its violation first. The result is the best
    sequence ever dreamed. The dynamics must pass gradients to the actions: a ``WorldModel`` does, a simulator doesn't.
    """

    starts: int = 8  # N
    iterations: int = 20
    std: float = 0.5  # of the starts, in half action ranges
    lr: float = 0.1  # in half action ranges

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(starts=self.starts, iterations=self.iterations, std=self.std, lr=self.lr)

    def find(self, search: Search) -> Plan:
        """-> the best sequence [B,H,K,A] dreamed for each row, with its imagined return [B].

        Raises ValueError where the dynamics, or the objective, pass no gradients.
        """
        std = (self.std * search.half_range).expand_as(search.mean)
        samples = search.around(search.mean, std, search.normal(self.starts))
        # In half action ranges, so that one rate fits every action: 0 is the middle, -1 and 1 are the bounds.
        middle, half = (search.low + search.high) / 2, search.half_range.clamp(min=1e-12)
        scaled = ((samples - middle) / half).clamp_(-1, 1).requires_grad_()
        adam = torch.optim.Adam([scaled], lr=self.lr)
        for _ in range(self.iterations):
            with torch.enable_grad():
                actions = middle + half * scaled
                # Rounding may take an action past its bound, where the projection would pass no gradient.
                correction = (actions.clamp(search.low, search.high) - actions).detach()
                scores = search.score(actions + correction, gradients=True)
                target = scores.value
                if scores.violation is not None:
                    target = torch.where(scores.violation > 0, -scores.violation, target)
                loss = -target.sum()
            gradient = torch.autograd.grad(loss, scaled, allow_unused=True)[0] if loss.requires_grad else None
            if gradient is None:
                raise ValueError(
                    "these dynamics, or this objective, pass no gradients on to the actions: use a planner that samples"
                )
            scaled.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a non-finite dream has no direction
            adam.step()
            with torch.no_grad():
                scaled.clamp_(-1, 1)
        search.score(middle + half * scaled.detach())
        return search.best
