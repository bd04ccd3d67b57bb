"""Plan: the actions that a planner chose, what they were imagined to earn, and how they were found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from planners.scoring import Scores


class SearchTrace(NamedTuple):
    """All that a search dreamed, its rounds one after the other."""

    candidates: Tensor  # [B,N,H,K,A]
    scored: Scores  # [B,N], with futures [B,N,H*K,O]


class Plan(NamedTuple):
    """An action sequence for each of B rows, and the return it was imagined to earn (-inf: not finite, or unknown)."""

    actions: Tensor  # [B,H,K,A], in the units of spec.action_space and within its bounds
    value: Tensor  # [B]
    elites: Tensor | None = None  # [B,E,H,K,A], candidates for the next search to begin with; NaN: unknown
    violation: Tensor | None = None  # [B], by how much it exceeds the limits; None where there are none
    evaluations: int = 0  # sequences dreamed for each row
    seconds: float = 0.0  # that all rows took together
    trace: SearchTrace | None = None  # where it was asked for

    def shifted(self, last: Tensor) -> Plan:
        """The plan one chunk later: the first chunk is gone, action ``last`` [A] fills the one that comes in.

        MPC fills in the middle of the bounds: on the toys it serves CEM 1 to 5% better than to hold the old last
        chunk, and makes no difference elsewhere.
        """

        def later(actions: Tensor) -> Tensor:
            return torch.cat([actions[..., 1:, :, :], last.expand_as(actions[..., :1, :, :])], dim=-3)

        elites = None if self.elites is None else later(self.elites)
        return Plan(later(self.actions), torch.full_like(self.value, -torch.inf), elites)
