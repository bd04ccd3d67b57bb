"""A policy that learns by the gradient of what it earns, sent back through short stretches of differentiable dreams."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from world_model.contract import Spec


@dataclass(frozen=True)
class ShacConfig:
    """How ``ActorCritic`` learns. Rewards are counted in their RMS, observations in their standard deviations."""

    horizon: int = 16  # steps that a gradient goes back through
    discount: float = 0.99
    td_lambda: float = 0.95  # lambda of TD(lambda)
    width: int = 64  # of the two hidden layers of each net
    lr: float = 2e-3  # of actor and critic
    clip: float = 1.0  # the actor's gradient is made no longer than this
    std: float = 0.4  # of the noise before tanh, at first; it is learned
    entropy: float = 0.01  # what each nat of the policy's entropy earns in each step
    updates: int = 8  # of the critic after each stretch
    batch: int = 256  # of these
    tau: float = 0.2  # by how much the slow critic follows the other after each stretch


class ActorCritic(nn.Module):
    """Short-horizon actor-critic (SHAC, arXiv 2204.07137) for any vectorised env on the CPU that has ``step_torch``.

    A stretch is ``horizon`` steps of all dreams. The actor climbs the gradient of the rewards in it, and of what a slow
    copy of the critic says of its last states; the critic then learns TD(lambda) returns of the same states, and the
    next stretch begins where this one ended. ``predict`` is Stable-Baselines3's, so what judges its policies judges
    this one.

    obs_dim: O, of observations [O]; low and high: [A], the bounds of the actions. ``from_spec`` takes them from a ``Spec``.
    """

    low: Tensor
    high: Tensor
    mean: Tensor  # [O] of the observations so far, and of their squares
    square: Tensor
    reward_square: Tensor  # []

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, *, seed: int = 0, config: ShacConfig = ShacConfig()):
        super().__init__()
        self.config, self.num_timesteps = config, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = _net(obs_dim, len(low), config.width)
            self.critic, self.target_critic = _net(obs_dim, 1, config.width), _net(obs_dim, 1, config.width)
        with torch.no_grad():  # the first actions are near the middle
            list(self.actor.parameters())[-2].mul_(0.1)
        self.log_std = nn.Parameter(torch.full_like(low, config.std).log())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        units = {"mean": torch.zeros(obs_dim), "square": torch.ones(obs_dim), "reward_square": torch.ones(())}
        for name, buffer in {"low": low, "high": high, **units}.items():
            self.register_buffer(name, buffer)
        self._noise = torch.Generator().manual_seed(seed)
        climbing = [*self.actor.parameters(), self.log_std]
        self._adams = [
            torch.optim.Adam(part, lr=config.lr, fused=True) for part in (climbing, list(self.critic.parameters()))
        ]

    @classmethod
    def from_spec(cls, spec: Spec, *, seed: int = 0, config: ShacConfig = ShacConfig()) -> ActorCritic:
        """One that acts in these spaces. Raises ValueError where they aren't vectors, or actions have no bounds."""
        for space in (spec.observation_space, spec.action_space):
            if not isinstance(space, spaces.Box) or len(space.shape) != 1:
                raise ValueError(f"observations and actions must be vectors, Box [N], got {space}")
        low, high = map(torch.from_numpy, spec.action_bounds)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ValueError(f"actions need finite bounds, got {spec.action_space}: rescale them")
        return cls(spec.observation_box.shape[0], low, high, seed=seed, config=config)

    # -- learning ------------------------------------------------------------------------------------------------------

    def start(self, env: Any, seed: int | None = None) -> None:
        """Begin an episode in each dream of ``env``, which begins the next ones itself (SAME_STEP)."""
        obs, _ = env.reset(seed=seed)
        self._env, self._obs = env, torch.as_tensor(obs, dtype=torch.float32)

    def rollout(self) -> None:
        """Learn from the next ``horizon`` steps of all dreams. Raises ValueError where they pass no gradient on."""
        config, env, obs = self.config, self._env, self._obs
        env.detach()
        unit = self.reward_square.sqrt().clamp(min=1e-6)
        weight, objective = torch.ones(len(obs)), torch.zeros(len(obs))
        steps, rewards = [], []
        for left in reversed(range(config.horizon)):
            seen = obs
            action, entropy = self._act(seen)
            obs, reward, terminated, truncated, infos = env.step_torch(action)
            if not reward.requires_grad and not obs.requires_grad:
                raise ValueError(
                    "these dreams pass no gradient on to the actions: learn with an algorithm that samples"
                )
            after, ended = obs, terminated | truncated
            if "final_obs" in infos:
                after = torch.where(infos["_final_obs"][:, None], infos["final_obs"], obs)
            earned = reward / unit + config.entropy * entropy
            objective = objective + weight * earned
            if left == 0 or bool(ended.any()):
                cut = ~terminated & (ended if left else True)
                objective = objective + weight * config.discount * self._value(self.target_critic, after).where(
                    cut, 0.0
                )
            weight = torch.where(ended, 1.0, weight * config.discount)
            steps.append([x.detach() for x in (seen, after, earned, ended, terminated)])
            rewards.append(reward.detach())
        self._obs = obs.detach()
        self._learn_shac(-objective.mean())
        columns = [torch.stack(column) for column in zip(*steps, strict=True)]
        self._update_critic(*columns)
        self._update_normaliser(columns[0], torch.stack(rewards))
        self.num_timesteps += config.horizon * len(obs)

    def _learn_shac(self, loss: Tensor) -> None:
        adam = self._adams[0]
        adam.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], self.config.clip)
        if bool(norm.isfinite()):  # a dream that was lost points nowhere
            adam.step()

    def _update_critic(self, seen: Tensor, after: Tensor, earned: Tensor, ended: Tensor, terminated: Tensor) -> None:
        """The critic learns from steps [H,B,...]."""
        config, adam = self.config, self._adams[1]
        with torch.no_grad():
            beyond = self._value(self.target_critic, after).where(~terminated, 0.0)
            returns, told = torch.empty_like(earned), beyond[-1]
            for k in reversed(range(len(earned))):
                told = torch.where(ended[k], beyond[k], torch.lerp(beyond[k], told, config.td_lambda))
                returns[k] = told = earned[k] + config.discount * told
            good = returns.isfinite()
            x, y = self._scaled(seen[good]), returns[good]
        for _ in range(config.updates if len(y) else 0):
            rows = torch.randint(len(y), (config.batch,), generator=self._noise)
            adam.zero_grad()
            F.smooth_l1_loss(VALUE_SCALE * self.critic(x[rows])[:, 0], y[rows]).backward()
            adam.step()
        with torch.no_grad():
            for target_critic, quick in zip(self.target_critic.parameters(), self.critic.parameters(), strict=True):
                target_critic.lerp_(quick, config.tau)

    def _update_normaliser(self, obs: Tensor, reward: Tensor) -> None:
        """The units: means over all that was ever dreamed."""
        good = obs.isfinite().all(-1) & reward.isfinite()
        share = reward.numel() / (self.num_timesteps + reward.numel())
        for mean, now in (
            (self.mean, obs[good].mean(0)),
            (self.square, obs[good].square().mean(0)),
            (self.reward_square, reward[good].square().mean()),
        ):
            if bool(now.isfinite().all()):
                mean.lerp_(now, share)

    # -- the policy ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[NDArray[np.float32], Any]:
        """Observations [O] or [B,O] -> actions [A] or [B,A], which never have noise; and ``state``, as it was."""
        obs = torch.as_tensor(np.asarray(observation), dtype=torch.float32)
        return self._placed(self.actor(self._scaled(obs))).numpy(), state

    def _act(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy actions [B,A] for the gradient to go through, and what each says of the entropy [B]."""
        mean, log_std = self.actor(self._scaled(obs)), self.log_std.clamp(-5, 1)
        place = mean + log_std.exp() * torch.randn(mean.shape, generator=self._noise)
        slope = 2 * (math.log(2) - place - F.softplus(-2 * place))  # log of tanh's
        return self._placed(place), (log_std + 0.5 * math.log(2 * math.pi * math.e) + slope).sum(-1)

    def _placed(self, place: Tensor) -> Tensor:
        action = self.low + (torch.tanh(place) + 1) / 2 * (self.high - self.low)
        return action + (action.clamp(self.low, self.high) - action).detach()  # rounding may take it past its bound

    def _scaled(self, obs: Tensor) -> Tensor:
        var = self.square - self.mean.square()
        return ((obs - self.mean) / var.where(var > 1e-6 * self.square, 1.0).sqrt()).clamp(-10, 10)

    def _value(self, critic: nn.Module, obs: Tensor) -> Tensor:
        return VALUE_SCALE * critic(self._scaled(obs))[..., 0]

    # -- what is kept --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """All that learning goes on from, but for the dreams."""
        kept = {"weights": self.state_dict(), "adams": [adam.state_dict() for adam in self._adams]}
        about = {"config": asdict(self.config), "steps": self.num_timesteps, "noise": self._noise.get_state()}
        torch.save({**kept, **about}, path)

    @classmethod
    def load(cls, path: str | Path) -> ActorCritic:
        """What ``save`` kept. Nothing is unpickled but tensors."""
        kept = torch.load(path, weights_only=True)
        weights = kept["weights"]
        made = cls(len(weights["mean"]), weights["low"], weights["high"], config=ShacConfig(**kept["config"]))
        made.load_state_dict(weights)
        for adam, state in zip(made._adams, kept["adams"], strict=True):
            adam.load_state_dict(state)
        made._noise.set_state(kept["noise"])
        made.num_timesteps = kept["steps"]
        return made


VALUE_SCALE = 10.0  # what a net says is of the order of 1, and a value is a sum of many rewards


def _net(inputs: int, outputs: int, width: int) -> nn.Sequential:
    enter, between, leave = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)
    return nn.Sequential(enter, nn.SiLU(), between, nn.SiLU(), leave)
