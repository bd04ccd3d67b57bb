"""The protocol of all planners, and the base class of those that search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

import torch

from planners.plan import Plan
from planners.problem import Problem
from planners.search import Search
from world_model.contract import Dynamics
from world_model.state import LatentState


class Planner(Protocol):
    """Anything that plans from a dreamed state. It holds settings only, never a state or a generator."""

    def plan(self, dynamics: Dynamics, state: LatentState, **options: Any) -> Plan:
        """Plan for each of the B rows of ``state``, independently -> Plan of actions [B,H,K,A].

        options: the other fields of ``Problem``: warm, seed, obs, objective, keep_trace.

        A pure function of its arguments. Each row is planned as it would be alone with its own seed, up to the rounding
        of the dynamics. A candidate with a non-finite imagined return is never preferred; one that exceeds a limit is
        preferred only to candidates that exceed it more. Raises ValueError where shapes don't fit the dynamics or the
        action space is unbounded.
        """
        ...


@dataclass(frozen=True)
class SearchPlanner(ABC):
    """A planner that dreams candidates of H chunks, round by round."""

    horizon: int = 15  # H, chunks
    chunk: int = 1  # K, steps in a chunk
    repeat: bool = False  # one action for all K steps of a chunk

    def __post_init__(self) -> None:
        require_positive(horizon=self.horizon, chunk=self.chunk)

    @torch.inference_mode(False)  # a planner that needs gradients enables them itself
    @torch.no_grad()
    def plan(self, dynamics: Dynamics, state: LatentState, **options: Any) -> Plan:
        """See ``Planner.plan``."""
        search = Search(Problem(dynamics, state, **options), (self.horizon, self.chunk), repeat=self.repeat)
        return search.finish(self.find(search))

    @abstractmethod
    def find(self, search: Search) -> Plan:
        """Run the search -> its plan [B,H,K,A], usually ``search.best``, each row's best sequence."""


def require_elites(*, elites: int, candidates: int, min_std: float, std: float) -> None:
    """Raises ValueError for fewer than two elites, more than candidates, or a ``min_std`` above ``std``."""
    if not 2 <= elites <= candidates:
        raise ValueError(f"2 <= elites <= candidates must hold, got {elites} elites of {candidates}")
    if not 0 <= min_std <= std:
        raise ValueError(f"0 <= min_std <= std must hold, got min_std={min_std}, std={std}")


def require_positive(**settings: float) -> None:
    """Raises ValueError, which names it, for the first setting that isn't positive and finite."""
    for name, value in settings.items():
        if not 0 < value < inf:
            raise ValueError(f"{name} must be positive, got {value}")
