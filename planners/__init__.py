"""Planners: search for good actions inside any ``Dynamics``, learned or real."""

from planners.base import Plan, Planner, RewardFn, score
from planners.cautious import Cautious
from planners.cem import CEM
from planners.gradient import Gradient
from planners.icem import ICEM
from planners.mpc import MPC
from planners.mppi import MPPI
from planners.proposed import Proposed
from planners.shooting import RandomShooting

__all__ = [
    "CEM",
    "ICEM",
    "MPC",
    "MPPI",
    "Cautious",
    "Gradient",
    "Plan",
    "Planner",
    "Proposed",
    "RandomShooting",
    "RewardFn",
    "score",
]
