"""Planning in which a policy proposes some of the candidates and the start of the search."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planners.base import SearchPlanner, require_positive
from planners.plan import Plan
from planners.problem import Problem
from planners.search import Search, bounds
from world_model.contract import Dynamics
from world_model.state import LatentState

_NOISE_KEY = 0x5EED  # makes the policy's noise independent of the planner's


@dataclass(frozen=True)
class PolicyGuided:
    """A planner whose searches start from the actions of ``policy`` in the dream.

    ``proposals`` of the candidates are the policy's actions with noise, as in TD-MPC (arXiv 2203.04955), and the warm
    start is another, as far as the planner has that many candidates; it draws the others around the policy's actions
    without noise. So no plan is worse than the policy's, except that MPPI's average may be. Where the planner repeats
    actions, so does the policy.
    """

    planner: SearchPlanner
    policy: Callable[[Tensor], Tensor]  # obs [R,O] -> action [R,A], a pure function; clipped to the bounds
    proposals: int = 8
    std: float = 0.1  # of their noise, in half action ranges

    def __post_init__(self) -> None:
        require_positive(proposals=self.proposals, std=self.std)

    @torch.no_grad()
    def plan(self, dynamics: Dynamics, state: LatentState, **options: Any) -> Plan:
        """See ``Planner.plan``. Raises ValueError without ``obs``."""
        start_time, planner, n = time.perf_counter(), self.planner, 1 + self.proposals
        problem = Problem(dynamics, state, **options)
        obs, warm = problem.obs, problem.warm
        if obs is None:
            raise ValueError("a policy proposes from what it sees: pass the present observations as obs [B,O]")
        noise_seed = torch.as_tensor(problem.seed) ^ _NOISE_KEY
        search = Search(Problem(dynamics, state, seed=noise_seed), (planner.horizon * planner.chunk, 1))
        low, high = bounds(dynamics.spec, state.device)
        noise = self.std * (high - low) / 2 * search.normal(n)  # [B,1+P,H*K,1,A]
        noise[:, 0] = 0
        dream, current = state.expand(n), obs.repeat_interleave(n, 0)
        actions: list[Tensor] = []
        for number, step in enumerate(noise.flatten(0, 1).unbind(1)):
            if number % planner.chunk and planner.repeat:
                actions.append(actions[-1])
            else:
                actions.append((self._act(current, len(low))[:, None] + step).clamp(low, high))
            dream, imagined = dynamics.imagine(dream, actions[-1], decode=True)
            if imagined.obs is None:
                raise ValueError("these dynamics predict no observations, so a policy can't act in their dream")
            current = imagined.obs[:, 0]
        # In a non-finite dream the policy's actions aren't finite either: the middle of the bounds replaces them.
        proposed = torch.cat(actions, 1)
        middle = (low + high) / 2
        proposed = torch.where(proposed.isfinite(), proposed, middle)
        proposed = proposed.unflatten(1, (planner.horizon, planner.chunk)).unflatten(0, (-1, n))
        last = middle.expand_as(proposed[:, 0]) if warm is None else warm.actions
        elites = [] if warm is None or warm.elites is None else [warm.elites]
        elites += [last[:, None], proposed[:, 1:]]
        start = Plan(proposed[:, 0], obs.new_full((len(obs),), -torch.inf), torch.cat(elites, 1))
        plan = planner.plan(dynamics, state, **{**options, "warm": start})
        return plan._replace(evaluations=plan.evaluations + n, seconds=time.perf_counter() - start_time)

    def _act(self, obs: Tensor, size: int) -> Tensor:
        action = self.policy(obs)
        if action.shape != (len(obs), size):
            raise ValueError(f"policy must give [R,A] = {[len(obs), size]} for obs [R,O], got {list(action.shape)}")
        return action
