"""The contract: the verbs that a world model, a baseline or a simulator offers to an env or a planner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from gymnasium import spaces
from torch import Tensor

# Letters, everywhere in this project: B batch (dreams), K steps in a chunk, H chunks planned, N candidates, T frames,
# A action dim, O observation dim, P tokens per frame, D model width, L layers.


@dataclass(frozen=True)
class Spec:
    """What a ``Dynamics`` takes and gives: the simulator's own spaces, for a single step.

    ``chunk`` is the longest K that one ``imagine`` call takes; any K from 1 to ``chunk`` is allowed.
    ``dt`` is the simulated time of one step, in seconds.
    """

    observation_space: spaces.Box  # [O]
    action_space: spaces.Box  # [A]
    chunk: int
    dt: float


class Imagined(NamedTuple):
    """What one chunk gives back. ``obs`` is None where ``decode=False`` was asked for and nothing needed it.

    ``terminated[b, k]`` says that the episode ends with inner step k. Steps after the first True are
    meaningless: whoever sums rewards stops there.
    """

    obs: Tensor | None  # [B,K,O]
    reward: Tensor  # [B,K]
    terminated: Tensor  # [B,K] bool


@runtime_checkable
class State(Protocol):
    """Everything a dream remembers, for B dreams, in a number of bytes that does not depend on their age.

    Immutable: every verb returns a new State and leaves the old one usable, so keeping a reference is a snapshot.
    """

    @property
    def batch(self) -> int: ...  # B

    @property
    def nbytes(self) -> int: ...

    def select(self, rows: Tensor) -> State:
        """The dreams at ``rows`` (int64 [R]; repeats allowed) -> State with B=R."""
        ...

    def expand(self, n: int) -> State:
        """Each dream n times in a row: dream b becomes dreams b*n .. b*n+n-1 -> State with B*n dreams."""
        ...

    def to_bytes(self) -> bytes: ...


class Dynamics(Protocol):
    """A learned model or a real simulator behind the same verbs. Owns weights, never a state.

    A model that proposes actions of its own will do so from its action tokens; none does yet, so no verb asks for it.

    All tensors are float32 on the model's device unless a field says otherwise; actions are in the units of
    ``spec.action_space``, observations in those of ``spec.observation_space``.
    """

    @property
    def spec(self) -> Spec: ...

    def initial(self, batch: int, seeds: Tensor | None = None) -> Any:
        """B fresh dreams that know nothing yet -> State.

        seeds: int64 [B], each dream's own noise seed (zeros where None). A dream is a pure function of the weights,
        its start, its actions and its seed: the same alone or in any row of any batch.
        """
        ...

    def observe(self, state: Any, obs: Tensor, actions: Tensor | None = None) -> Any:
        """Evidence in: obs [B,T,O] and the actions that led to each of them [B,T,A] -> State.

        A dream's very first frame has no action before it: whatever stands there is ignored, and ``actions`` may be
        None when that frame (T=1) is all there is.
        """
        ...

    def imagine(self, state: Any, actions: Tensor, *, decode: bool = True) -> tuple[Any, Imagined]:
        """Play actions [B,K,A] (1 <= K <= spec.chunk) -> (State after the chunk, Imagined)."""
        ...
