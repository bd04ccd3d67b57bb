"""Other ``Dynamics``: baselines, and wrappers of a world model."""

from world_model.dynamics.draft_dynamics import DraftDynamics
from world_model.dynamics.pessimistic import Pessimistic

__all__ = ["DraftDynamics", "Pessimistic"]
