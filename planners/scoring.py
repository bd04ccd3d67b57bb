"""``score``, which dreams all candidates of all planners, and the order of their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from planners.objective import Objective
from world_model.contract import Dynamics
from world_model.state import LatentState

# The most that one ``imagine`` call dreams; more candidates are dreamed in turns. That bounds the memory, and on a CPU
# keeps their states in its caches from one chunk to the next.
MAX_DREAMS = 16_384
MAX_BYTES = 4 << 20  # of states, on a CPU


class Scores(NamedTuple):
    """The imagined returns of N candidates for each of B rows."""

    value: Tensor  # [B,N], -inf where it isn't finite
    violation: Tensor | None = None  # [B,N], by how much costs exceed their limit; None without one
    futures: Tensor | None = None  # [B,N,H*K,O], the imagined observations, if requested; NaN after an end

    def best(self, n: int) -> Tensor:
        """The n best of each row, best first -> int64 [B,n]: the least violation first, then the highest return."""
        if self.violation is None:  # argmax takes the first of equals: candidate 0, the mean of a search
            return self.value.argmax(1, keepdim=True) if n == 1 else self.value.topk(n, dim=1).indices
        order = self.value.argsort(dim=1, descending=True, stable=True)
        return order.gather(1, self.violation.gather(1, order).argsort(dim=1, stable=True))[:, :n]

    def each(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """The scores with ``change`` applied to each of their tensors."""
        violation = None if self.violation is None else change(self.violation)
        return Scores(change(self.value), violation, None if self.futures is None else change(self.futures))

    @staticmethod
    def join(parts: Sequence[Scores], dim: int) -> Scores:
        """Concatenate scores, which must have the same tensors, along ``dim``."""
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
    """Dream every candidate [B,N,H,K,A] from its row of ``state`` -> its return.

    The value is the sum of discount**t times the reward of inner step t = 0..H*K-1, up to and including the step that
    terminates; where none does, plus discount**(H*K) times the objective's value of the last observation. A value that
    isn't finite becomes -inf, and its violation inf. obs: [B,O], the present observation, if the objective
    ``needs_obs``. futures: keep the imagined observations. gradients: record those of the candidates. Raises ValueError
    for shapes that don't fit.
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

    n, limit = candidates.shape[1], MAX_DREAMS
    if candidates.device.type == "cpu":
        limit = min(limit, max(1, MAX_BYTES * state.batch // max(1, state.nbytes)))
    flat = candidates.flatten(0, 1)
    with torch.set_grad_enabled(gradients):
        if len(flat) <= limit:
            start, target = (None if x is None else x.repeat_interleave(n, 0) for x in (obs, goal))
            scores = _dream(dynamics, state.expand(n), flat, objective, start, target, futures)
        else:
            parts, rows = [], torch.arange(state.batch, device=flat.device).repeat_interleave(n)
            for at, actions in zip(rows.split(limit), flat.split(limit), strict=True):
                start, target = (None if x is None else x[at] for x in (obs, goal))
                parts.append(_dream(dynamics, state.select(at), actions, objective, start, target, futures))
            scores = Scores.join(parts, 0)
    return scores.each(lambda x: x.unflatten(0, (-1, n)))


def _dream(
    dynamics: Dynamics,
    state: LatentState,
    actions: Tensor,
    objective: Objective,
    obs: Tensor | None,
    goal: Tensor | None,
    futures: bool,
) -> Scores:
    """Dream actions [R,H,K,A], one sequence for each row of ``state`` -> Scores with [R] in place of [B,N]."""
    rewards, ends, costs, observations = [], [], [], []
    needs_obs, chunks = objective.needs_obs, actions.unbind(1)
    for number, chunk in enumerate(chunks, 1):
        decode = needs_obs or futures or (number == len(chunks) and objective.value_fn is not None)
        state, imagined = dynamics.imagine(state, chunk, decode=decode)
        reward, after = imagined.reward, imagined.obs
        if decode:
            if after is None:
                raise ValueError("this objective needs observations, but imagine(decode=True) gave None")
            observations.append(after)
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
    # Steps up to the terminating one, which itself counts.
    counts = ended.cumsum(1) == ended if ended.any() else None

    def total(steps: list[Tensor], discount: float = 1.0) -> Tensor:
        each = torch.cat(steps, dim=1)
        if counts is not None:  # masked before the product: steps after a termination may be NaN
            each = torch.where(counts, each, 0.0)
        if discount == 1:
            return each.sum(1)
        return each @ discount ** torch.arange(each.shape[1], device=each.device, dtype=each.dtype)

    value = total(rewards, objective.discount)
    if objective.value_fn is not None:
        later = _like(value, "value_fn", objective.value_fn(observations[-1][:, -1]))
        value = value + torch.where(ended.any(1), 0.0, objective.discount ** ended.shape[1] * later)
    violation = None
    if objective.cost_limit is not None:
        violation = (total(costs) - objective.cost_limit).clamp(min=0)
        invalid = ~(value + violation).isfinite()
        value, violation = value.masked_fill(invalid, -torch.inf), violation.masked_fill(invalid, torch.inf)
    value = value.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    if not futures:
        return Scores(value, violation)
    future = torch.cat(observations, dim=1)
    return Scores(value, violation, future if counts is None else torch.where(counts[..., None], future, torch.nan))


def _like(like: Tensor, name: str, result: Tensor) -> Tensor:
    """The result of an objective's function in ``like``'s dtype. Raises ValueError where its shape isn't ``like``'s."""
    if not isinstance(result, Tensor) or result.shape != like.shape:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"{name} must drop the last dimension of its arguments: expected a tensor of shape {list(like.shape)}, got "
            f"{got}"
        )
    return result.to(like.dtype)
