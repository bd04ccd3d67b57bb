"""Behaviour cloning: a policy learned by supervised learning from the data that a world model is trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from world_model.contract import Spec
from world_model.episodes import Episodes

WIDTH, BATCH, LR = 256, 256, 1e-3


class Clone(nn.Module):
    """obs [...,O] -> the action [...,A] that was usually played there, within the bounds of the action space."""

    def __init__(self, spec: Spec):
        super().__init__()
        (obs_dim,), (action_dim,) = spec.observation_box.shape, spec.action_box.shape
        self.layers = nn.Sequential(
            nn.Linear(obs_dim, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, action_dim),
            nn.Tanh(),
        )
        low, high = (torch.from_numpy(bound.astype("float32")) for bound in (spec.action_box.low, spec.action_box.high))
        self.middle: Tensor
        self.half_range: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("middle", (high + low) / 2)
        self.register_buffer("half_range", (high - low) / 2)
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def forward(self, obs: Tensor) -> Tensor:
        return self.middle + self.half_range * self.layers((obs - self.mean) / self.std)


def clone(spec: Spec, episodes: Episodes, *, updates: int = 6000, seed: int = 0) -> Clone:
    """Regress the actions of ``episodes`` on the observations before them, by the mean squared error -> Clone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Clone(spec)
    policy.mean.copy_(episodes.obs.mean(0))
    policy.std.copy_(episodes.obs.std(0).clamp_min(1e-6))
    transitions = (episodes.index > 0).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=LR, fused=True)
    for update in range(updates):
        optimiser.param_groups[0]["lr"] = LR * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        rows = transitions[torch.randint(len(transitions), (BATCH,), generator=generator)]
        error = (policy(episodes.obs[rows - 1]) - episodes.action[rows]) / policy.half_range
        optimiser.zero_grad()
        error.square().mean().backward()
        optimiser.step()
    return policy.requires_grad_(False)


def best_episodes(episodes: Episodes, share: float) -> Episodes:
    """The ``share`` of the episodes with the highest return, at least one. Raises ValueError outside of (0,1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    number = (episodes.index == 0).cumsum(0) - 1
    returns = torch.zeros(int(number[-1]) + 1).index_add(0, number, episodes.reward)
    chosen = set(returns.argsort(descending=True, stable=True)[: max(1, int(share * len(returns)))].tolist())
    return episodes.pick(lambda e: e in chosen)
