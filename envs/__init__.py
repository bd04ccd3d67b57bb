"""The real simulators: made, chunked, saved and restored, and offered to planners as the truth."""

from contextlib import suppress

# Before anything is drawn: where Mesa draws in software, its LLVM and Triton's don't get on, and a process that loads
# Triton second, as torch does for its first optimizer, dies of it.
with suppress(ImportError):
    import triton  # noqa: F401

from .chunked import ChunkedActions
from .embodiments import EMBODIMENTS, Embodiment
from .experts import Expert
from .make import make_real
from .mujoco import draw, get_state, observation_of, set_state, state_from_observation
from .oracle import SimulatorDynamics

__all__ = [
    "EMBODIMENTS",
    "ChunkedActions",
    "Embodiment",
    "Expert",
    "SimulatorDynamics",
    "draw",
    "get_state",
    "make_real",
    "observation_of",
    "set_state",
    "state_from_observation",
]
