"""The units of a model: the simulator's numbers to numbers of about unit size, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from world_model.contract import Spec
from world_model.episodes import Episodes


class Scaling(nn.Module):
    """Means and standard deviations of the training data, and the bounds of the spaces. Measured, not trained.

    Raises ValueError where an action has no finite bounds, or equal ones.
    """

    obs_mean: Tensor
    obs_std: Tensor
    step_std: Tensor  # [O] RMS change of one step, in normalised units
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
        """Set the units from the data. A dimension that is constant there keeps its own unit."""
        after = (episodes.index > 0).nonzero()[:, 0]
        std = episodes.obs.std(0)
        self.obs_mean.copy_(episodes.obs.mean(0))
        self.obs_std.copy_(torch.where(std > 1e-6, std, 1.0))
        change = (episodes.obs[after] - episodes.obs[after - 1]) / self.obs_std
        self.step_std.copy_(change.square().mean(0).sqrt().clamp_min(1e-4))
        self.reward_mean.copy_(episodes.reward[after].mean())
        self.reward_std.copy_(episodes.reward[after].std().clamp_min(1e-4))

    def obs(self, raw: Tensor) -> Tensor:
        """Observations [...,O] -> normalised."""
        return (raw - self.obs_mean) / self.obs_std

    def raw_obs(self, scaled: Tensor) -> Tensor:
        """Normalised observations [...,O] -> in the simulator's units."""
        return scaled * self.obs_std + self.obs_mean

    def limit(self, scaled: Tensor) -> Tensor:
        """Normalised observations [...,O], clamped to the bounds of the observation space."""
        return scaled.clamp(self.obs(self.obs_low), self.obs(self.obs_high))

    def action(self, raw: Tensor) -> Tensor:
        """[...,A] within the action bounds -> [-1,1]."""
        return 2 * (raw - self.action_low) / (self.action_high - self.action_low) - 1
