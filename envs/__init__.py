"""The real simulators: make them, step them by chunks, save and restore their exact states, plan in them."""

from contextlib import suppress

# Mesa's software renderer and Triton bring an LLVM each. A process that renders before it loads Triton, as torch does
# for its first optimizer, crashes; so Triton is loaded here, before anything is rendered.
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
    "get_state",
    "make_real",
    "observation_of",
    "render_observation",
    "set_state",
    "state_from_observation",
]
