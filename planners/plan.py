"""Plan: the actions that a planner chose, their imagined return, and the search that led to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from planners.scoring import Scores


class SearchTrace(NamedTuple):
    """All candidates of a search and their scores, round after round."""

    candidates: Tensor  # [B,N,H,K,A]
    scored: Scores  # [B,N], with futures [B,N,H*K,O]


class Plan(NamedTuple):
    """An action sequence for each of B rows, and its imagined return (-inf: not finite, or unknown)."""

    actions: Tensor  # [B,H,K,A], in the units of spec.action_space and within its bounds
    value: Tensor  # [B]
    elites: Tensor | None = None  # [B,E,H,K,A], candidates for the next search to start with; NaN: unknown
    violation: Tensor | None = None  # [B], by how much costs exceed their limit; None without one
    evaluations: int = 0  # sequences dreamed for each row
    seconds: float = 0.0  # for all rows together
    trace: SearchTrace | None = None  # if requested

    def shifted(self, last: Tensor) -> Plan:
        """The plan one chunk later: without the first chunk, and with one of action ``last`` [A] appended.

        MPC appends the middle of the bounds: on the toys CEM's returns are 1 to 5% better with it than with the old
        last chunk, and elsewhere it makes no difference.
        """

        def later(actions: Tensor) -> Tensor:
            return torch.cat([actions[..., 1:, :, :], last.expand_as(actions[..., :1, :, :])], dim=-3)

        elites = None if self.elites is None else later(self.elites)
        return Plan(later(self.actions), torch.full_like(self.value, -torch.inf), elites)
