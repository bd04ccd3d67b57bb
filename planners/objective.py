"""Objective: the reward, the costs and their limit, and the value beyond the horizon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite

from torch import Tensor

from world_model.contract import StepFn

ValueFn = Callable[[Tensor], Tensor]
"""``fn(obs [R,O]) -> [R]``: the return from there on, such as a critic's estimate."""


@dataclass(frozen=True, eq=False)
class Objective:
    """What a planner maximises; by default the sum of the rewards that the dynamics predict, within the horizon.

    Functions get observations and actions in the units of the dynamics' spaces, on the dynamics' device, and must pass
    gradients on for ``planners.Gradient``. Rewards, costs and values after the end of an episode don't count. Settings
    that contradict each other, or aren't finite, raise ValueError.
    """

    reward_fn: StepFn | None = None  # instead of the predicted reward
    goal: Tensor | None = None  # [O], or [B,O] for each row: the reward is minus the distance of next_obs from it
    goal_weight: Tensor | None = None  # [O] weights of the squared differences; None: all 1
    value_fn: ValueFn | None = None  # of the last observation, for the return beyond the horizon
    cost_fn: StepFn | None = None  # at least 0
    cost_limit: float | None = None  # a sum of costs above it is a violation; a plan without one is always preferred
    penalty: float = 0.0  # subtracted from the reward for each unit of cost
    discount: float = 1.0  # per step, of rewards and value; costs aren't discounted

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount must be in (0, 1], got {self.discount}")
        if self.goal is not None and self.reward_fn is not None:
            raise ValueError("pass reward_fn or goal, not both")
        if self.goal is None and self.goal_weight is not None:
            raise ValueError("goal_weight weighs the distance from a goal: pass goal too")
        for name, tensor in (("goal", self.goal), ("goal_weight", self.goal_weight)):
            if tensor is not None and not (isinstance(tensor, Tensor) and tensor.isfinite().all()):
                raise ValueError(f"{name} must be a tensor of finite numbers, got {tensor}")
        if self.goal_weight is not None and (self.goal_weight < 0).any():
            raise ValueError(f"goal_weight must be at least 0, got {self.goal_weight}")
        if not 0 <= self.penalty < inf:
            raise ValueError(f"penalty must be finite and at least 0, got {self.penalty}")
        if self.cost_limit is not None and not isfinite(self.cost_limit):
            raise ValueError(f"cost_limit must be finite, got {self.cost_limit}")
        if (self.cost_fn is None) != (self.cost_limit is None and self.penalty == 0):
            raise ValueError("a cost_fn needs a cost_limit, a penalty, or both, and they need a cost_fn")

    @property
    def needs_obs(self) -> bool:
        """Whether it needs the observations of every step."""
        return self.replaces_reward or self.cost_fn is not None

    @property
    def replaces_reward(self) -> bool:
        """Whether it uses its own reward, not the dynamics'."""
        return self.reward_fn is not None or self.goal is not None

    def reward(self, obs: Tensor, action: Tensor, next_obs: Tensor, goal: Tensor | None) -> Tensor:
        """The rewards [R,K] of steps [R,K,...], if it ``replaces_reward``; goal [R,O]: of each row."""
        if self.reward_fn is not None:
            return self.reward_fn(obs, action, next_obs)
        assert goal is not None
        difference = next_obs - goal[:, None]
        if self.goal_weight is not None:
            difference = difference * self.goal_weight.to(difference).sqrt()
        return -difference.norm(dim=-1)
