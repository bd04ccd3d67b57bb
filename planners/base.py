"""What every planner shares: the protocol, and the frame that one search fills."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from planners.objective import Objective
from planners.plan import Plan
from planners.search import Search
from world_model.contract import Dynamics
from world_model.state import LatentState


class Planner(Protocol):
    """Anything that turns a dreamed state into a plan. Holds settings only, never a state or a generator."""

    def plan(
        self,
        dynamics: Dynamics,
        state: LatentState,
        *,
        warm: Plan | None = None,
        seed: int | Tensor = 0,
        obs: Tensor | None = None,
        objective: Objective = Objective(),
        keep: bool = False,
    ) -> Plan:
        """Plan for each of the B rows of ``state``, independently -> Plan of actions [B,H,K,A].

        warm: a plan that starts now (``last_plan.shifted(...)``), to search around, and whose elites are dreamed too;
        None searches around the middle of the action bounds. seed: int64 [B], one for each row, or one int that every
        row uses. obs: [B,O], the present observation; needed where the objective looks at every step. objective: what
        the plan is for. keep: hand out all that was dreamed, as ``Plan.kept``.

        A pure function of its arguments: row b of a batch is what row b alone gives with its own seed, up to the
        rounding of the dynamics. Candidates that are imagined to earn something non-finite are never preferred, and
        those that exceed a limit only to others that exceed it more. Raises ValueError where the shapes don't fit the
        dynamics or the action space is unbounded.
        """
        ...


@dataclass(frozen=True)
class SearchPlanner(ABC):
    """A planner that dreams candidates of H chunks until it has had enough."""

    horizon: int = 15  # H, chunks
    chunk: int = 1  # K, steps in a chunk
    repeat: bool = False  # one action for all K steps of a chunk

    def __post_init__(self) -> None:
        require_positive(horizon=self.horizon, chunk=self.chunk)

    @torch.inference_mode(False)  # for those that need gradients, which ask for them
    @torch.no_grad()
    def plan(
        self,
        dynamics: Dynamics,
        state: LatentState,
        *,
        warm: Plan | None = None,
        seed: int | Tensor = 0,
        obs: Tensor | None = None,
        objective: Objective = Objective(),
        keep: bool = False,
    ) -> Plan:
        """See ``Planner.plan``."""
        search = Search(
            dynamics,
            state,
            (self.horizon, self.chunk),
            repeat=self.repeat,
            warm=warm,
            seed=seed,
            obs=obs,
            objective=objective,
            keep=keep,
        )
        return search.ended(self.find(search))

    @abstractmethod
    def find(self, search: Search) -> Plan:
        """Search -> the plan [B,H,K,A]; most give ``search.best``, the best sequence ever dreamed in each row."""


def require_elites(*, elites: int, candidates: int, min_std: float, std: float) -> None:
    """Raises ValueError where as many elites, or as narrow a normal of them, can't be."""
    if not 2 <= elites <= candidates:
        raise ValueError(f"2 <= elites <= candidates must hold, got {elites} elites of {candidates}")
    if not 0 <= min_std <= std:
        raise ValueError(f"0 <= min_std <= std must hold, got min_std={min_std}, std={std}")


def require_positive(**settings: float) -> None:
    """Raises ValueError that names the first setting that is not above zero, or infinite."""
    for name, value in settings.items():
        if not 0 < value < inf:
            raise ValueError(f"{name} must be positive, got {value}")
