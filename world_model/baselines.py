"""What a world model has to beat, behind the same verbs: the probabilistic ensemble of PETS."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from world_model.contract import Imagined, Spec
from world_model.episodes import Episodes
from world_model.state import LatentState
from world_model.tokens import Scaling


class Ensemble(nn.Module):
    """PETS (arXiv 1805.12114): M networks, each the mean and variance of the next change and of the reward.

    Four hidden layers of 200, swish, as is usual for it; ``imagine`` follows the members' mean prediction.
    """

    def __init__(self, spec: Spec, members: int = 5, width: int = 200, hidden: int = 4):
        super().__init__()
        self.spec, self.members = spec, members
        self.size = spec.observation_box.shape[0]
        outs = self.size + 1  # the change of each dimension, and the reward
        sizes = [self.size + spec.action_box.shape[0], *[width] * hidden, 2 * outs]
        self.scaling = Scaling(spec)
        self.weights = nn.ParameterList(
            torch.randn(members, before, after) / math.sqrt(before) for before, after in pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, after) for after in sizes[1:])
        self.max_log_var = nn.Parameter(torch.full((outs,), 0.5))
        self.min_log_var = nn.Parameter(torch.full((outs,), -10.0))

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs [M,B,O] normalised, action [M,B,A] in [-1,1] -> mean, log-variance [M,B,O+1] of what comes next."""
        x = torch.cat([obs, action], -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i + 1 < len(self.weights):
                x = F.silu(x)
        mean, log_var = x.chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        return LatentState({"obs": torch.zeros(batch, self.size)})

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        """It remembers the last observation alone."""
        return LatentState({"obs": obs[:, -1]})

    @torch.no_grad()
    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        """Play actions [B,K,A]; see ``Dynamics.imagine``. No episode ends here."""
        obs, dreamed, gained = self.scaling.obs(state["obs"]), [], []
        for action in self.scaling.action(actions).unbind(1):
            mean = self(*(x.expand(self.members, *x.shape) for x in (obs, action)))[0].mean(0)
            obs = self.scaling.limit(obs + mean[:, :-1] * self.scaling.step_std)
            dreamed.append(self.scaling.raw_obs(obs))
            gained.append(mean[:, -1] * self.scaling.reward_std + self.scaling.reward_mean)
        reward = torch.stack(gained, 1)
        imagined = Imagined(
            torch.stack(dreamed, 1) if decode else None, reward, torch.zeros_like(reward, dtype=torch.bool)
        )
        return LatentState({"obs": dreamed[-1]}), imagined


def fit_ensemble(
    model: Ensemble, episodes: Episodes, *, cpu_seconds: float, seed: int = 0, batch: int = 256, lr: float = 1e-3
) -> int:
    """Train for a budget of CPU time, each member on its own draw of the data -> updates made.

    Unlike ``fit`` this goes by the clock: a baseline gets the same time as the model that it is compared with.
    """
    generator = torch.Generator().manual_seed(seed)
    model.scaling.measure(episodes)
    rows = (episodes.index > 0).nonzero()[:, 0]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-5, fused=True)
    begun, updates = time.process_time(), 0
    while (spent := (time.process_time() - begun) / cpu_seconds) < 1:
        optimiser.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * spent))
        at = rows[torch.randint(len(rows), (model.members, batch), generator=generator)]
        before, after = model.scaling.obs(episodes.obs[at - 1]), model.scaling.obs(episodes.obs[at])
        reward = (episodes.reward[at] - model.scaling.reward_mean) / model.scaling.reward_std
        target = torch.cat([(after - before) / model.scaling.step_std, reward[..., None]], -1)
        mean, log_var = model(before, model.scaling.action(episodes.action[at]))
        nll = ((mean - target).square() * (-log_var).exp() + log_var).mean()
        loss = nll + 0.01 * (model.max_log_var - model.min_log_var).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        updates += 1
    return updates
