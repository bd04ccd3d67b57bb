"""Planners: search for good actions inside any ``Dynamics``, learned or real."""

from planners.base import Planner, SearchPlanner
from planners.cem import CEM
from planners.costable import Costable
from planners.gradient import Gradient
from planners.icem import ICEM
from planners.mpc import MPC
from planners.mppi import MPPI
from planners.objective import Objective
from planners.plan import Kept, Plan
from planners.policy_guided import Proposed
from planners.scoring import Scored, score
from planners.search import Search
from planners.shooting import RandomShooting
from world_model.dynamics.pessimistic import Cautious

__all__ = [
    "CEM",
    "ICEM",
    "MPC",
    "MPPI",
    "Cautious",
    "Costable",
    "Gradient",
    "Kept",
    "Objective",
    "Plan",
    "Planner",
    "Proposed",
    "RandomShooting",
    "Scored",
    "Search",
    "SearchPlanner",
    "score",
]
