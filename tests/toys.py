"""Toy dynamics for tests: each is small enough that what it should do is known without running it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from world_model.contract import Imagined, Spec
from world_model.state import LatentState


def box_spec(obs_dim: int, act_dim: int, *, bound: float = 1.0, chunk: int = 8, dt: float = 1.0) -> Spec:
    """Unbounded observations [O], actions [A] within +-bound."""
    return Spec(
        spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32),
        spaces.Box(-bound, bound, (act_dim,), np.float32),
        chunk,
        dt,
    )


class ToyDynamics:
    """Fully observed and Markov: the state is the last observation, ``step`` is all that a toy has to say.

    Terminates with the step that brings observation 0 above ``wall``; whatever follows is NaN, as the contract allows.
    """

    def __init__(self, spec: Spec, wall: float = float("inf")):
        self.spec = spec
        self.wall = wall

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,O], u [B,A] -> the next x [B,O], reward [B]."""
        raise NotImplementedError

    def start(self, x: Sequence[Sequence[float]] | Tensor) -> LatentState:
        """The state of B rows that have just seen x [B,O]."""
        return LatentState({"x": torch.as_tensor(x, dtype=torch.float32)})

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        return self.start(torch.zeros(batch, *self.spec.observation_box.shape))

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        return state.replace(x=obs[:, -1])

    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        x, steps = state["x"], []
        for u in actions.unbind(1):
            x, reward = self.step(x, u)
            ended = x[:, 0] > self.wall
            steps.append((x, reward, ended))
            x = torch.where(ended[:, None], torch.nan, x)
        obs, reward, terminated = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
        return state.replace(x=x), Imagined(obs if decode else None, reward, terminated)


class PointMass(ToyDynamics):
    """A point that is moved by at most ``dt`` a step in each dimension and pays its distance to the origin.

    x' = x + dt u, |u| <= 1, reward -|x'|_1. The optimum is at the bounds: full speed home, then rest.
    """

    def __init__(self, dim: int = 2, *, dt: float = 0.1, chunk: int = 8, wall: float = float("inf")):
        super().__init__(box_spec(dim, dim, chunk=chunk, dt=dt), wall)

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.spec.dt * u
        return x, -x.abs().sum(-1)

    def optimal_return(self, x: Tensor, steps: int) -> Tensor:
        """x [B,O] -> the best possible return over ``steps`` steps, [B]."""
        t = torch.arange(1, steps + 1)
        return -(x.abs()[..., None] - self.spec.dt * t).clamp(min=0).sum((-1, -2))


class LQR(ToyDynamics):
    """A double integrator with quadratic costs: x = (position, velocity), reward -(x'Qx' + R u^2) with the next x'.

    The bounds are wide enough (+-4) that the Riccati solution stays within them from |x| <= 1.
    """

    def __init__(self, *, dt: float = 0.2, chunk: int = 8):
        super().__init__(box_spec(2, 1, bound=4.0, chunk=chunk, dt=dt))
        self.a = torch.tensor([[1.0, dt], [0.0, 1.0]])
        self.b = torch.tensor([[dt * dt / 2], [dt]])
        self.q = torch.diag(torch.tensor([1.0, 0.1]))
        self.r = torch.tensor([[0.05]])

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        x = x @ self.a.T + u @ self.b.T
        return x, -((x @ self.q) * x).sum(-1) - ((u @ self.r) * u).sum(-1)

    def optimal_return(self, x: Tensor, steps: int) -> Tensor:
        """x [B,2] -> the best possible return over ``steps`` steps, [B] (Riccati recursion, float64)."""
        a, b, q, r = (m.double() for m in (self.a, self.b, self.q, self.r))
        p = torch.zeros_like(q)  # the cost to go after the last step
        for _ in range(steps):
            m = q + p
            p = a.T @ (m - m @ b @ torch.linalg.solve(r + b.T @ m @ b, b.T @ m)) @ a
        return -((x.double() @ p) * x.double()).sum(-1)


class TinyMLP(ToyDynamics):
    """Random but fixed tanh network: x' = x + 0.1 f(x, u), reward -|x'|^2 / O. Nothing is known about its optimum."""

    def __init__(self, obs_dim: int = 3, act_dim: int = 2, *, width: int = 16, chunk: int = 8, seed: int = 0):
        super().__init__(box_spec(obs_dim, act_dim, chunk=chunk))
        g = torch.Generator().manual_seed(seed)
        self.w1 = torch.randn(obs_dim + act_dim, width, generator=g) / (obs_dim + act_dim) ** 0.5
        self.w2 = torch.randn(width, obs_dim, generator=g) / width**0.5

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        x = x + 0.1 * torch.tanh(torch.cat([x, u], dim=-1) @ self.w1) @ self.w2
        return x, -x.square().mean(-1)
