"""Dynamics to plan on whose best possible returns are known, and the return of given actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn


class PointMass(nn.Module):
    """x' = x + u / 10, reward -|x'|_1: full speed home, then rest. obs [B,2], action [B,2]."""

    observations = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    actions = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        obs = obs + 0.1 * action
        return obs, -obs.abs().sum(-1, keepdim=True)

    def best(self, obs: Tensor, steps: int) -> float:
        """The best possible return of so many steps from obs [2]."""
        gone = 0.1 * torch.arange(1, steps + 1)
        return -float((obs.abs()[:, None] - gone).clamp(min=0).sum())


class Integrator(nn.Module):
    """Position and velocity, pushed by 4 u for 0.2 s, with quadratic costs. obs [B,2], action [B,1].

    From |obs| <= 1 the best actions are the linear regulator's, within the bounds.
    """

    observations = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    actions = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.tensor([[0.08], [0.8]])
        self.q, self.r = torch.tensor([1.0, 0.1]), torch.tensor([0.8])

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        obs = obs @ self.a.T + action @ self.b.T
        return obs, -(self.q * obs**2).sum(-1, keepdim=True) - self.r * action**2

    def best(self, obs: Tensor, steps: int) -> float:
        """The best possible return of so many steps from obs [2]."""
        a, b, q, r, x = (m.double() for m in (self.a, self.b, self.q.diag(), self.r.diag(), obs))
        p = torch.zeros_like(q)
        for _ in range(steps):
            m = q + p
            p = a.T @ (m - m @ b @ torch.linalg.solve(r + b.T @ m @ b, b.T @ m)) @ a
        return -float(x @ p @ x)


def real_returns(net: Any, obs: Tensor, actions: Tensor) -> Tensor:
    """The dynamics' own returns: obs [O], actions [N,H,A] -> returns [N]."""
    obs, total = obs.expand(len(actions), -1), torch.zeros(len(actions), 1)
    for action in actions.unbind(1):
        obs, reward = net(obs, action)
        total = total + reward
    return total[:, 0]
