"""Planning that begins where a policy would go, instead of at the middle of the bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from planners.base import Plan, RewardFn, bounds
from planners.cem import CEM
from world_model.contract import Dynamics
from world_model.state import LatentState


@dataclass(frozen=True)
class Proposed:
    """CEM whose every search begins around what ``policy`` does in the dream, and never ends with less.

    What was planned before is forgotten: the policy proposes anew from each state.
    """

    planner: CEM
    policy: Callable[[Tensor], Tensor]  # obs [B,O] -> action [B,A], a pure function; clipped to the bounds

    def plan(
        self,
        dynamics: Dynamics,
        state: LatentState,
        *,
        warm: Plan | None = None,
        seed: int | Tensor = 0,
        obs: Tensor | None = None,
        reward_fn: RewardFn | None = None,
    ) -> Plan:
        """See ``Planner.plan``; ``warm`` is ignored. Raises ValueError without ``obs``."""
        if obs is None:
            raise ValueError("a policy proposes from what it sees: pass the present observations as obs [B,O]")
        planner, (low, high) = self.planner, bounds(dynamics.spec, obs.device)
        dream, seen, actions = state, obs, []
        with torch.no_grad():
            for _ in range(planner.horizon * planner.chunk):
                actions.append(self.policy(seen).clamp(low, high))
                dream, imagined = dynamics.imagine(dream, actions[-1][:, None], decode=True)
                if imagined.obs is None:
                    raise ValueError("these dynamics predict no observations, so a policy can't act in their dream")
                seen = imagined.obs[:, 0]
        # Where a dream was lost, so is what the policy makes of it: the middle of the bounds takes its place.
        proposed = torch.stack(actions, 1)
        proposed = torch.where(proposed.isfinite(), proposed, (low + high) / 2)
        start = Plan(proposed.unflatten(1, (planner.horizon, planner.chunk)), obs.new_full((len(obs),), -torch.inf))
        return planner.plan(dynamics, state, warm=start, seed=seed, obs=obs, reward_fn=reward_fn)
