"""Observations and actions to tokens and back, with the normalisation that goes before and after."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from world_model.contract import Spec
from world_model.episodes import Episodes
from world_model.model.config import WorldModelConfig


class Scaling(nn.Module):
    """The units: raw numbers of the simulator to numbers of about unit size, and back. Data, not trained."""

    obs_mean: Tensor
    obs_std: Tensor
    step_std: Tensor  # [O] the usual size of one step's change, in normalised units
    obs_low: Tensor  # [O] bounds of the observation space, infinite where it has none
    obs_high: Tensor
    action_low: Tensor
    action_high: Tensor
    reward_mean: Tensor
    reward_std: Tensor

    def __init__(self, spec: Spec):
        super().__init__()
        obs, act = spec.observation_box, spec.action_box
        if not (torch.isfinite(torch.as_tensor(act.low)).all() and torch.isfinite(torch.as_tensor(act.high)).all()):
            raise ValueError(
                f"actions need finite bounds to be scaled, got {act}; wrap the env in RescaleAction or ClipAction first"
            )
        if not (act.low < act.high).all():
            raise ValueError(f"every action needs some room between its bounds, got {act}")
        for name, bound in (("action_low", act.low), ("action_high", act.high)):
            self.register_buffer(name, torch.as_tensor(bound, dtype=torch.float32).clone())
        for name, bound in (("obs_low", obs.low), ("obs_high", obs.high)):
            self.register_buffer(name, torch.as_tensor(bound, dtype=torch.float32).clone(), persistent=False)
        self.register_buffer("obs_mean", torch.zeros(obs.shape))
        self.register_buffer("obs_std", torch.ones(obs.shape))
        self.register_buffer("step_std", torch.ones(obs.shape))
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))

    def measure(self, episodes: Episodes) -> None:
        """Take the units from the data. What never moves in them keeps its own unit."""
        after = (episodes.index > 0).nonzero()[:, 0]
        std = episodes.obs.std(0)
        self.obs_mean.copy_(episodes.obs.mean(0))
        self.obs_std.copy_(torch.where(std > 1e-6, std, 1.0))
        change = (episodes.obs[after] - episodes.obs[after - 1]) / self.obs_std
        self.step_std.copy_(change.square().mean(0).sqrt().clamp_min(1e-4))
        self.reward_mean.copy_(episodes.reward[after].mean())
        self.reward_std.copy_(episodes.reward[after].std().clamp_min(1e-4))

    def obs(self, raw: Tensor) -> Tensor:
        return (raw - self.obs_mean) / self.obs_std

    def raw_obs(self, scaled: Tensor) -> Tensor:
        return scaled * self.obs_std + self.obs_mean

    def limit(self, scaled: Tensor) -> Tensor:
        """Normalised observations cut off at the bounds of the observation space."""
        return scaled.clamp(self.obs(self.obs_low), self.obs(self.obs_high))

    def action(self, raw: Tensor) -> Tensor:
        """[...,A] within the action bounds -> [-1,1]."""
        return 2 * (raw - self.action_low) / (self.action_high - self.action_low) - 1


class Tokens(nn.Module):
    """A frame is P world tokens and one action token; here are the doors in and out of both streams.

    The streams have the weights' own precision, also under autocast: layers add to them.
    """

    frequencies: Tensor

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        size, p, d = config.obs_dim, config.tokens, config.width
        self.shape = (p, d)
        self.clean_in = nn.Linear(size, p * d)
        self.noisy_in = nn.Linear(4 * size, p * d)
        self.level_in = nn.Linear(16, p * d)
        self.position = nn.Parameter(torch.zeros(config.chunk, p * d))  # where in its chunk a noisy frame stands
        self.action_in = nn.Linear(config.action_dim, config.action_width)
        self.no_action = nn.Parameter(
            torch.randn(config.action_width) * 0.1
        )  # stands for the action before a first frame
        self.norm = nn.LayerNorm(p * d)
        self.out = nn.Linear(p * d, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("frequencies", torch.exp2(torch.arange(8.0)) * torch.pi / 2, persistent=False)

    def clean(self, obs: Tensor) -> Tensor:
        """Normalised observations [B,T,O] -> [B,T,P,D]."""
        return self.clean_in(obs).to(self.position.dtype).unflatten(-1, self.shape)

    def noisy(self, z: Tensor, s: Tensor, draft: Tensor, change: Tensor, log_std: Tensor) -> Tensor:
        """The frames being denoised -> [B,C,K,P,D], for C chunks.

        z [B,C,K,O] the scaled residual at noise level s [B or 1,C or 1,1,1]; and what is known without it, all
        [B,C,K,O]: the draft, its change since the chunk's start, and its log std.
        """
        angle = s * self.frequencies
        level = self.level_in(torch.cat([angle.sin(), angle.cos()], -1))
        x = self.noisy_in(torch.cat([z, draft, change, log_std], -1))
        return (x + level + self.position[: z.shape[2]]).unflatten(-1, self.shape)

    def actions(self, actions: Tensor, first: Tensor | None = None) -> Tensor:
        """Scaled actions [B,T,A] -> [B,T,1,Da]; ``first`` (bool [B,T]) marks frames that no action led to."""
        x = self.action_in(actions).to(self.no_action.dtype)
        if first is not None:
            x = torch.where(first[..., None], self.no_action, x)
        return x[:, :, None]

    def features(self, world: Tensor) -> Tensor:
        """World tokens [B,F,P,D] -> [B,F,P*D], what the readouts read."""
        return self.norm(world.flatten(-2))
