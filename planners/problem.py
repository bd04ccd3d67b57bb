"""Problem: the dynamics, states and objective that a planner plans for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from planners.objective import Objective
from planners.plan import Plan
from world_model.contract import Dynamics
from world_model.state import LatentState


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of ``Planner.plan``."""

    dynamics: Dynamics
    state: LatentState  # of B rows, each of which is planned for independently
    warm: Plan | None = None  # to search around, such as ``last_plan.shifted(...)``; None: the middle of the bounds
    seed: int | Tensor = 0  # one int for every row, or int64 [B], one for each
    obs: Tensor | None = None  # [B,O] the present observations; needed if ``objective.needs_obs``
    objective: Objective = Objective()
    keep_trace: bool = False  # return all candidates, as ``Plan.trace``
