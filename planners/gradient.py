"""Gradient ascent through the dream: Adam on the actions of several starts at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planners.base import Plan, RewardFn, begin, require_positive, returns
from world_model.contract import Dynamics
from world_model.state import LatentState


@dataclass(frozen=True)
class Gradient:
    """Planning by the gradient of the imagined return, from several starts (arXiv 2004.08763 has it beside CEM).

    The mean of the search and noisy copies of it are all improved by Adam (arXiv 1412.6980); after each step what left
    the action bounds is put back onto them. The result is the best sequence ever dreamed. The dynamics must pass
    gradients on to the actions: a ``WorldModel`` does, a simulator doesn't.
    """

    horizon: int = 15  # H, chunks
    chunk: int = 1  # K, steps in a chunk
    starts: int = 8  # N
    iterations: int = 20
    std: float = 0.5  # of the starts, in half action ranges
    lr: float = 0.1  # in half action ranges
    discount: float = 1.0  # per step

    def __post_init__(self) -> None:
        require_positive(
            horizon=self.horizon, chunk=self.chunk, starts=self.starts, iterations=self.iterations,
            std=self.std, lr=self.lr, discount=self.discount,
        )  # fmt: skip

    @torch.inference_mode(False)  # where there are no gradients at all
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
        """See ``Planner.plan`` -> the best sequence seen in each row, with its own imagined return.

        Raises ValueError where the dynamics, or ``reward_fn``, pass no gradients.
        """
        search = begin(dynamics, state, self.horizon, self.chunk, warm, seed)
        low, high = search.low, search.high
        std = (self.std * search.half_range).expand_as(search.mean)
        samples = search.around(search.mean, std, search.normal(self.starts))
        samples[:, 0] = search.mean
        row = torch.arange(state.batch, device=samples.device)
        best = search.nothing_yet
        # In half action ranges, so that one rate fits every action: 0 is the middle, -1 and 1 are the bounds.
        middle, half = (low + high) / 2, search.half_range.clamp(min=1e-12)
        place = ((samples - middle) / half).requires_grad_()
        adam = torch.optim.Adam([place], lr=self.lr)
        for iteration in range(self.iterations + 1):
            with torch.enable_grad():
                actions = (middle + half * place).clamp(low, high)
                earned = returns(dynamics, state, actions, discount=self.discount, obs=obs, reward_fn=reward_fn)
                loss = -earned.sum()
            if not earned.requires_grad:
                raise ValueError(
                    "these dynamics, or reward_fn, pass no gradients on to the actions: use a planner that samples"
                )
            value, leader = earned.detach().max(1)
            best = best.or_better(actions.detach()[row, leader], value)
            if iteration == self.iterations:
                break
            (place.grad,) = torch.autograd.grad(loss, place)
            place.grad.nan_to_num_(0.0, 0.0, 0.0)  # a dream that was lost points nowhere
            adam.step()
            with torch.no_grad():
                place.clamp_(-1, 1)
        return best
