"""What stands in for a world model, or wraps one, behind the same verbs."""

from world_model.dynamics.draft_dynamics import DraftDynamics
from world_model.dynamics.pessimistic import Pessimistic

__all__ = ["DraftDynamics", "Pessimistic"]
