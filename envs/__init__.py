"""The real simulators: made, chunked, saved and restored, and offered to planners as the truth."""

from contextlib import suppress

# Before anything is drawn: where Mesa draws in software, its LLVM and Triton's don't get on, and a process that loads
# Triton second, as torch does for its first optimizer, dies of it.
with suppress(ImportError):
    import triton  # noqa: F401

from envs.chunked import ChunkedActions
from envs.exact_state import get_state, observation_of, render_observation, set_state, state_from_observation
from envs.make import make_real
from envs.robosuite.embodiments import EMBODIMENTS, Embodiment
from envs.robosuite.experts import Expert
from envs.simulator import SimulatorDynamics

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
