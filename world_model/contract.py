"""The contract: the methods that a world model, a baseline or a simulator offers to an env or a planner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium import Env, spaces
from numpy.typing import NDArray
from torch import Tensor

from world_model.spaces import flat_box

StepFn = Callable[[Any, Any, Any], Any]
"""``(obs [...,O], action [...,A], next_obs [...,O]) -> [...]`` for many simulator steps at once: each step's reward or
cost, or whether the episode ends there. In torch, or in numpy where the caller says so."""

# Letters, everywhere in this project: B batch (dreams), K steps in a chunk, H chunks planned, N candidates, T frames,
# A action dim, O observation dim, P tokens per frame, D model width, L layers.


@dataclass(frozen=True)
class Spec:
    """The inputs and outputs of a ``Dynamics``: the simulator's own spaces, for a single step.

    Observations are a Box of real numbers, or a Dict of such Boxes; actions are a Box of real numbers or Discrete.
    Other spaces raise ValueError. A ``Dynamics`` sees both as vectors [O] and [A] (``world_model.spaces``), whose
    bounds are ``observation_box`` and ``action_box``. ``chunk`` is the longest K that one ``imagine`` call takes; any K
    from 1 to ``chunk`` is allowed. ``dt`` is the simulated time of one step, in seconds.
    """

    observation_space: spaces.Space
    action_space: spaces.Space
    chunk: int
    dt: float

    def __post_init__(self) -> None:
        if not _is_real(self.observation_space):
            raise ValueError(
                f"the observation space must be a Box of real numbers or a Dict of such, got {self.observation_space}"
            )
        if not isinstance(self.action_space, spaces.Discrete) and not (
            isinstance(self.action_space, spaces.Box) and _is_real(self.action_space)
        ):
            raise ValueError(f"the action space must be a Box of real numbers or Discrete, got {self.action_space}")

    @cached_property
    def observation_box(self) -> spaces.Box:
        """Box [O], the observation space as vectors."""
        return flat_box(self.observation_space)

    @cached_property
    def action_box(self) -> spaces.Box:
        """Box [A], the action space as vectors."""
        return flat_box(self.action_space)

    @cached_property
    def action_bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The bounds of ``action_box``, low [A] and high [A], rounded inwards to float32."""
        space = self.action_box
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        # A float64 bound may round to a float32 just outside of it.
        low = np.where(low < space.low, np.nextafter(low, np.float32(np.inf)), low)
        return low, np.where(high > space.high, np.nextafter(high, np.float32(-np.inf)), high)


def _is_real(space: spaces.Space) -> bool:
    if isinstance(space, spaces.Dict):
        return len(space.spaces) > 0 and all(_is_real(part) for part in space.values())
    return isinstance(space, spaces.Box) and space.dtype.kind == "f" and space.low.size > 0


class Imagined(NamedTuple):
    """The result of imagining one chunk. ``obs`` is None where ``decode=False`` was passed and nothing needed it.

    ``terminated[b, k]`` says that the episode ends with inner step k. Steps after the first True are meaningless: a sum
    of rewards ends with that step. The tensors may share memory with a state or with each other, so they must not be
    changed in place.
    """

    obs: Tensor | None  # [B,K,O]
    reward: Tensor  # [B,K]
    terminated: Tensor  # [B,K] bool
    cost: Tensor | None = None  # [B,K], already subtracted from reward; to be subtracted from any other reward too


@runtime_checkable
class State(Protocol):
    """The whole memory of B dreams, in a number of bytes that does not depend on their age.

    Immutable: every method returns a new State and leaves the old one usable, so keeping a reference is a snapshot.
    """

    @property
    def batch(self) -> int: ...  # B

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int: ...

    def select(self, rows: Tensor) -> State:
        """The dreams at ``rows`` (int64 [R]; repeats allowed) -> State with B=R."""
        ...

    def expand(self, n: int) -> State:
        """Each dream n times in a row: dream b becomes dreams b*n .. b*n+n-1 -> State with B*n dreams."""
        ...

    def put(self, rows: Tensor, other: Any) -> State:
        """Replace the dreams at ``rows`` (int64 [R], no repeats) by the R of ``other`` -> State with the same B."""
        ...

    def detach(self) -> State:
        """The same dreams, cut from the graph that autograd recorded."""
        ...

    def to_bytes(self) -> bytes: ...

    @classmethod
    def from_bytes(cls, blob: bytes, device: Any = "cpu") -> State:
        """The state that ``to_bytes`` saved. Raises ValueError where ``blob`` is no saved state."""
        ...


class Dynamics(Protocol):
    """A learned model or a real simulator behind the same methods. It owns weights, never a state.

    All tensors are float32 on the model's device unless a field says otherwise; actions are in the units of
    ``spec.action_box``, observations in those of ``spec.observation_box``. A Dynamics may also have ``starts``, real
    windows to begin dreams from (``obs`` [S,T,O] and the ``actions`` [S,T,A] that led there), a ``card`` (dict) on how
    it was made, a ``fingerprint()`` of its weights, and a ``trust``, the bound on its error
    (``world_model.conformal.ConformalBound``).
    """

    @property
    def spec(self) -> Spec: ...

    def initial(self, batch: int, seeds: Tensor | None = None) -> Any:
        """B dreams that have observed nothing yet -> State.

        seeds: int64 [B], each dream's own noise seed (zeros where None). A dream is a pure function of the weights,
        its start, its actions in their chunks and its seed: up to rounding, the same alone or in any row of any batch.
        """
        ...

    def observe(self, state: Any, obs: Tensor, actions: Tensor | None = None) -> Any:
        """Take in real frames: obs [B,T,O] and the actions that led to each of them [B,T,A] -> State.

        A dream's very first frame has no action before it: the one given for it is ignored, and ``actions`` may be None
        where that frame is the only one (T=1).
        """
        ...

    def imagine(self, state: Any, actions: Tensor, *, decode: bool = True) -> tuple[Any, Imagined]:
        """Dream the steps that actions [B,K,A] lead to, 1 <= K <= spec.chunk -> (State after the chunk, Imagined)."""
        ...


@runtime_checkable
class ExactDynamics(Protocol):
    """A ``Dynamics`` that starts from a real simulator's exact state, of which observations may show only a part."""

    def capture(self, env: Env) -> Any:
        """The present state of a real env -> State with B=1."""
        ...

    def at(self, simulator: Tensor) -> Any:
        """Exact states of the simulator [B,S], float64 -> State."""
        ...
