"""Planners: search for good actions inside any ``Dynamics``, learned or real."""

from planners.base import Planner, SearchPlanner
from planners.cem import CEM
from planners.costable import Costable
from planners.gradient import Gradient
from planners.icem import ICEM
from planners.mpc import MPC
from planners.mppi import MPPI
from planners.objective import Objective
from planners.plan import Plan, SearchTrace
from planners.policy_guided import PolicyGuided
from planners.problem import Problem
from planners.scoring import Scores, score
from planners.search import Search
from planners.shooting import RandomShooting

__all__ = [
    "CEM",
    "ICEM",
    "MPC",
    "MPPI",
    "Costable",
    "Gradient",
    "Objective",
    "Plan",
    "Planner",
    "PolicyGuided",
    "Problem",
    "RandomShooting",
    "Scores",
    "Search",
    "SearchPlanner",
    "SearchTrace",
    "score",
]
