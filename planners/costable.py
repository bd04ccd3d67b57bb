"""``Dynamics`` in the form that stable-worldmodel's solvers need: the costs of candidates, given an info dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from planners.objective import Objective
from planners.scoring import score
from planners.search import bounds
from world_model.contract import Dynamics
from world_model.state import LatentState

_STATE = "state."


class Costable:
    """Any ``Dynamics`` behind stable-worldmodel's protocol of this name: ``CEMSolver(Costable(model), ...)``.

    The cost of a candidate is minus its imagined return. The dream starts from the observations under ``key``, or from
    ``state`` where the info dict has the entries of ``info(state)``. Most of those solvers ignore action bounds, so
    actions are clipped to them before the dream: clip the solver's result, too.

    goal: the key of each row's goal [O], which replaces ``objective.goal``. to_actions: converts candidates [...,A] to
    the units of ``spec.action_space``, where the solver uses others. Raises ValueError for an objective with a
    ``cost_limit``, or with a ``reward_fn`` besides a goal.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        objective: Objective = Objective(),
        *,
        key: str = "observation",
        goal: str | None = None,
        to_actions: Callable[[Tensor], Tensor] | None = None,
    ):
        if objective.cost_limit is not None:
            raise ValueError("those solvers know no limits: give the objective a penalty instead of a cost_limit")
        if goal is not None and objective.reward_fn is not None:
            raise ValueError("pass a reward_fn or goal, not both")
        self.dynamics, self.objective, self.key, self.goal, self.to_actions = dynamics, objective, key, goal, to_actions

    @staticmethod
    def info(state: LatentState) -> dict[str, Tensor]:
        """A state of B rows as entries of an info dict, which a solver slices and repeats like all others."""
        return {_STATE + name: tensor for name, tensor in state.tensors.items()}

    def get_cost(self, info_dict: Mapping[str, Any], action_candidates: Tensor) -> Tensor:
        """Candidates [B,N,H,K*A], H blocks of K actions, each dreamed as one chunk -> costs [B,N].

        The info dict's tensors or arrays are [B,N,...], all N alike: observations [B,N,O], or the last T of them
        [B,N,T,O] with the actions that led there, "action" [B,N,T,A], where T > 1. Gradients reach
        candidates that require them. Raises ValueError where an entry is missing or has another shape.
        """
        spec, device = self.dynamics.spec, action_candidates.device
        size = spec.action_box.shape[0]
        if action_candidates.ndim != 4 or action_candidates.shape[-1] % size:
            raise ValueError(
                f"action_candidates must be [B,N,H,K*A] with A={size}, got {list(action_candidates.shape)}"
            )
        state, obs = self._start(info_dict, len(action_candidates))
        actions = action_candidates.to(state.device).unflatten(-1, (-1, size))
        actions = actions if self.to_actions is None else self.to_actions(actions)
        actions = actions.clamp(*bounds(spec, actions.device))
        objective = self.objective
        if self.goal is not None:
            objective = replace(objective, goal=self._entry(info_dict, self.goal))
        gradients = torch.is_grad_enabled()
        return -score(self.dynamics, state, actions, objective, obs=obs, gradients=gradients).value.to(device)

    criterion = get_cost

    @torch.no_grad()
    def _start(self, info_dict: Mapping[str, Any], batch: int) -> tuple[LatentState, Tensor | None]:
        """The state of B rows to dream from, and their present observations [B,O] if the objective needs them."""
        fresh, obs = self.dynamics.initial(batch), None
        has_state = any(key.startswith(_STATE) for key in info_dict)
        if not has_state or self.goal is not None or self.objective.needs_obs:
            frames, size = self._entry(info_dict, self.key), self.dynamics.spec.observation_box.shape[0]
            frames = frames[:, None] if frames.ndim == 2 else frames
            if frames.shape != (batch, *frames.shape[1:2], size):
                raise ValueError(
                    f"{self.key!r} must be [B,N,O] or [B,N,T,O] with B={batch} and O={size}, got "
                    f"{list(info_dict[self.key].shape)}"
                )
            frames = frames.to(fresh.device, torch.float32)
            obs = frames[:, -1]
        if has_state:
            return LatentState({k: self._entry(info_dict, _STATE + k).to(t) for k, t in fresh.tensors.items()}), obs
        actions = self._entry(info_dict, "action").to(frames) if frames.shape[1] > 1 else None
        return self.dynamics.observe(fresh, frames, actions), obs

    @staticmethod
    def _entry(info_dict: Mapping[str, Any], key: str) -> Tensor:
        """An entry [B,N,...], whose N are all equal -> [B,...]."""
        if key not in info_dict:
            raise ValueError(f"the info dict has no {key!r}, only {sorted(info_dict)}: name it with key=, or add it")
        return torch.as_tensor(info_dict[key])[:, 0]
