"""``score``, the one place where candidates are dreamed, and how they compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from planners.objective import Objective
from world_model.contract import Dynamics
from world_model.state import LatentState

# Dreamed side by side by one ``imagine`` call; more candidates take turns. That bounds the memory, and on a CPU keeps
# their states in its caches from one chunk to the next.
MAX_DREAMS = 16_384
MAX_BYTES = 4 << 20  # of states, on a CPU


class Scores(NamedTuple):
    """What N candidates for each of B rows were imagined to earn."""

    value: Tensor  # [B,N], -inf where it isn't finite
    violation: Tensor | None = None  # [B,N], by how much limits were exceeded; None where there are none
    futures: Tensor | None = None  # [B,N,H*K,O], what was imagined, where it was asked for; NaN after an end

    def best(self, n: int) -> Tensor:
        """The n best of each row, best first -> int64 [B,n]: the least violation first, then the highest return."""
        if self.violation is None:  # of equals the first leads: the mean of a search, which is candidate 0
            return self.value.argmax(1, keepdim=True) if n == 1 else self.value.topk(n, dim=1).indices
        order = self.value.argsort(dim=1, descending=True, stable=True)
        return order.gather(1, self.violation.gather(1, order).argsort(dim=1, stable=True))[:, :n]

    def each(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """With ``change`` made to every tensor that there is."""
        violation = None if self.violation is None else change(self.violation)
        return Scores(change(self.value), violation, None if self.futures is None else change(self.futures))

    @staticmethod
    def join(parts: Sequence[Scores], dim: int) -> Scores:
        """All that was scored alike, one after the other."""
        each = ([x for x in tensors if x is not None] for tensors in zip(*parts, strict=True))
        value, violation, futures = (torch.cat(tensors, dim) if tensors else None for tensors in each)
        assert value is not None
        return Scores(value, violation, futures)


def score(
    dynamics: Dynamics,
    state: LatentState,
    candidates: Tensor,
    objective: Objective = Objective(),
    *,
    obs: Tensor | None = None,
    futures: bool = False,
    gradients: bool = False,
) -> Scores:
    """Dream every candidate [B,N,H,K,A] from its row of ``state`` -> what it earns.

    The value is the sum of discount**t times the reward of inner step t = 0..H*K-1, up to and including the step that
    terminates, and discount**(H*K) times the objective's value of the last observation where none does. What isn't
    finite becomes -inf, and its violation inf. obs: [B,O], the present observation, for objectives that look at every
    step. futures: keep the imagined observations. gradients: those that the dynamics pass on to the candidates. Raises
    ValueError on shapes that don't fit.
    """
    actions_dim = dynamics.spec.action_box.shape[0]
    if candidates.ndim != 5 or candidates.shape[0] != state.batch or candidates.shape[-1] != actions_dim:
        raise ValueError(
            f"candidates must be [B,N,H,K,A] with B={state.batch} (the state's batch) and A={actions_dim}, "
            f"got {list(candidates.shape)}"
        )
    if not 1 <= candidates.shape[3] <= dynamics.spec.chunk:
        raise ValueError(f"candidates have chunks of K={candidates.shape[3]}; give 1 <= K <= {dynamics.spec.chunk}")
    expected = (state.batch, dynamics.spec.observation_box.shape[0])
    if objective.needs_obs and (obs is None or obs.shape != expected):
        got = "None" if obs is None else list(obs.shape)
        raise ValueError(f"with this objective, pass the present observations as obs {list(expected)}, got {got}")
    goal = objective.goal
    if goal is not None:
        if goal.shape not in (expected, expected[1:]):
            raise ValueError(f"goal must be {list(expected[1:])} or {list(expected)}, got {list(goal.shape)}")
        if objective.goal_weight is not None and objective.goal_weight.shape != expected[1:]:
            raise ValueError(f"goal_weight must be {list(expected[1:])}, got {list(objective.goal_weight.shape)}")
        goal = goal.to(candidates).expand(expected)

    n, most = candidates.shape[1], MAX_DREAMS
    if candidates.device.type == "cpu":
        most = min(most, max(1, MAX_BYTES * state.batch // max(1, state.nbytes)))
    flat = candidates.flatten(0, 1)
    with torch.set_grad_enabled(gradients):
        if len(flat) <= most:
            now, there = (None if x is None else x.repeat_interleave(n, 0) for x in (obs, goal))
            scored = _dream(dynamics, state.expand(n), flat, objective, now, there, futures)
        else:
            parts, rows = [], torch.arange(state.batch, device=flat.device).repeat_interleave(n)
            for at, actions in zip(rows.split(most), flat.split(most), strict=True):
                now, there = (None if x is None else x[at] for x in (obs, goal))
                parts.append(_dream(dynamics, state.select(at), actions, objective, now, there, futures))
            scored = Scores.join(parts, 0)
    return scored.each(lambda x: x.unflatten(0, (-1, n)))


def _dream(
    dynamics: Dynamics,
    state: LatentState,
    actions: Tensor,
    objective: Objective,
    obs: Tensor | None,
    goal: Tensor | None,
    futures: bool,
) -> Scores:
    """Dream actions [R,H,K,A], one sequence for each row of ``state`` -> Scored with [R] in place of [B,N]."""
    rewards, ends, costs, seen = [], [], [], []
    needs_obs, chunks = objective.needs_obs, actions.unbind(1)
    for number, chunk in enumerate(chunks, 1):
        decode = needs_obs or futures or (number == len(chunks) and objective.value_fn is not None)
        state, imagined = dynamics.imagine(state, chunk, decode=decode)
        reward, after = imagined.reward, imagined.obs
        if decode:
            if after is None:
                raise ValueError("this objective needs observations, but imagine(decode=True) gave None")
            seen.append(after)
        if needs_obs:
            assert obs is not None and after is not None
            before, obs = torch.cat([obs[:, None], after[:, :-1]], dim=1), after[:, -1]
            if objective.replaces_reward:
                reward = _like(reward, "reward_fn", objective.reward(before, chunk, after, goal))
                if imagined.cost is not None:
                    reward = reward - imagined.cost
            if objective.cost_fn is not None:
                costs.append(_like(reward, "cost_fn", objective.cost_fn(before, chunk, after)))
                reward = reward - objective.penalty * costs[-1]
        rewards.append(reward)
        ends.append(imagined.terminated)
    ended = torch.cat(ends, dim=1)
    # No termination before this step; the terminating step itself still counts.
    counts = ended.cumsum(1) == ended if ended.any() else None

    def total(steps: list[Tensor], discount: float = 1.0) -> Tensor:
        each = torch.cat(steps, dim=1)
        if counts is not None:  # masked before it is weighed: what follows a termination may well be NaN
            each = torch.where(counts, each, 0.0)
        if discount == 1:
            return each.sum(1)
        return each @ discount ** torch.arange(each.shape[1], device=each.device, dtype=each.dtype)

    value = total(rewards, objective.discount)
    if objective.value_fn is not None:
        later = _like(value, "value_fn", objective.value_fn(seen[-1][:, -1]))
        value = value + torch.where(ended.any(1), 0.0, objective.discount ** ended.shape[1] * later)
    violation = None
    if objective.cost_limit is not None:
        violation = (total(costs) - objective.cost_limit).clamp(min=0)
        lost = ~(value + violation).isfinite()
        value, violation = value.masked_fill(lost, -torch.inf), violation.masked_fill(lost, torch.inf)
    value = value.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    if not futures:
        return Scores(value, violation)
    shown = torch.cat(seen, dim=1)
    return Scores(value, violation, shown if counts is None else torch.where(counts[..., None], shown, torch.nan))


def _like(like: Tensor, name: str, given: Tensor) -> Tensor:
    """In ``like``'s dtype. Raises ValueError where a function of the objective gave another shape than it must."""
    if not isinstance(given, Tensor) or given.shape != like.shape:
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"{name} must drop the last dimension of its arguments: expected a tensor of shape {list(like.shape)}, got "
            f"{got}"
        )
    return given.to(like.dtype)
