"""Short-horizon actor-critic: a policy learned by gradients of its return through differentiable dreams."""

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

VALUE_SCALE = 10.0  # of the critic's output, which is of the order of 1, while a value is the sum of many rewards


@dataclass(frozen=True)
class ShacConfig:
    """How ``ActorCritic`` learns. Rewards are divided by their RMS, observations are standardised."""

    horizon: int = 16  # steps of a rollout, which the gradient goes back through
    discount: float = 0.99
    td_lambda: float = 0.95  # lambda of TD(lambda)
    width: int = 64  # of the two hidden layers of each net
    lr: float = 2e-3  # of actor and critic
    clip: float = 1.0  # the largest norm of the actor's gradient
    std: float = 0.4  # of the noise before tanh, at first; it is learned
    entropy: float = 0.01  # reward for each nat of the policy's entropy in each step
    updates: int = 8  # of the critic after each rollout
    batch: int = 256  # of each such update
    tau: float = 0.2  # by how much the target critic follows the critic after each rollout


class ActorCritic(nn.Module):
    """SHAC (https://arxiv.org/abs/2204.07137) for any vectorised env on the CPU that has ``step_torch``.

    A rollout is ``horizon`` steps of all B dreams. The actor ascends the gradient of the rewards in it, and of the
    target critic's values of its last states; the critic then learns the TD(lambda) returns of the same states, and
    the next rollout starts where this one ended. ``predict`` is Stable-Baselines3's, so ``evaluate`` takes it too.

    obs_dim: O, of observations [O]; low and high: [A], the bounds of the actions. ``from_spec`` takes them from a
    ``Spec``.
    """

    low: Tensor
    high: Tensor
    mean: Tensor  # [O] of the observations so far
    square: Tensor  # [O] mean of their squares
    reward_square: Tensor  # [] mean of the rewards' squares

    def __init__(self, obs_dim: int, low: Tensor, high: Tensor, *, seed: int = 0, config: ShacConfig = ShacConfig()):
        super().__init__()
        self.config, self.num_timesteps = config, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = _mlp(obs_dim, len(low), config.width)
            self.critic, self.target_critic = _mlp(obs_dim, 1, config.width), _mlp(obs_dim, 1, config.width)
        with torch.no_grad():  # the first actions are near the middle
            list(self.actor.parameters())[-2].mul_(0.1)
        self.log_std = nn.Parameter(torch.full_like(low, config.std).log())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        moments = {"mean": torch.zeros(obs_dim), "square": torch.ones(obs_dim), "reward_square": torch.ones(())}
        for name, buffer in {"low": low, "high": high, **moments}.items():
            self.register_buffer(name, buffer)
        self._noise = torch.Generator().manual_seed(seed)
        self._optimisers = [
            torch.optim.Adam(parameters, lr=config.lr, fused=True)
            for parameters in ([*self.actor.parameters(), self.log_std], list(self.critic.parameters()))
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
        """Start an episode in each dream of ``env``, which starts the next ones itself (SAME_STEP)."""
        obs, _ = env.reset(seed=seed)
        self._env, self._obs = env, torch.as_tensor(obs, dtype=torch.float32)

    def rollout(self) -> None:
        """Play ``horizon`` steps of all dreams and learn from them. Raises ValueError where they pass no gradient."""
        config, env, obs = self.config, self._env, self._obs
        env.detach()
        unit = self.reward_square.sqrt().clamp(min=1e-6)
        weight, objective = torch.ones(len(obs)), torch.zeros(len(obs))
        steps, rewards = [], []
        for left in reversed(range(config.horizon)):
            last_obs = obs
            action, entropy = self._sample(last_obs)
            obs, reward, terminated, truncated, infos = env.step_torch(action)
            if not reward.requires_grad and not obs.requires_grad:
                raise ValueError(
                    "these dreams pass no gradient on to the actions: learn with an algorithm that samples"
                )
            next_obs, ended = obs, terminated | truncated
            if "final_obs" in infos:
                next_obs = torch.where(infos["_final_obs"][:, None], infos["final_obs"], obs)
            gain = reward / unit + config.entropy * entropy
            objective = objective + weight * gain
            if left == 0 or bool(ended.any()):
                bootstrapped = ~terminated & (ended if left else True)
                value = self._value(self.target_critic, next_obs).where(bootstrapped, 0.0)
                objective = objective + weight * config.discount * value
            weight = torch.where(ended, 1.0, weight * config.discount)
            steps.append([x.detach() for x in (last_obs, next_obs, gain, ended, terminated)])
            rewards.append(reward.detach())
        self._obs = obs.detach()
        self._update_actor(-objective.mean())
        columns = [torch.stack(column) for column in zip(*steps, strict=True)]
        self._update_critic(*columns)
        self._update_moments(columns[0], torch.stack(rewards))
        self.num_timesteps += config.horizon * len(obs)

    def _update_actor(self, loss: Tensor) -> None:
        optimiser = self._optimisers[0]
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], self.config.clip)
        if bool(norm.isfinite()):  # the gradient of a dream that diverged is useless
            optimiser.step()

    def _update_critic(self, obs: Tensor, next_obs: Tensor, gain: Tensor, ended: Tensor, terminated: Tensor) -> None:
        """Regress the critic on the TD(lambda) returns of steps [H,B,...], then move the target critic towards it."""
        config, optimiser = self.config, self._optimisers[1]
        with torch.no_grad():
            value = self._value(self.target_critic, next_obs).where(~terminated, 0.0)
            targets, beyond = torch.empty_like(gain), value[-1]
            for k in reversed(range(len(gain))):
                beyond = torch.where(ended[k], value[k], torch.lerp(value[k], beyond, config.td_lambda))
                targets[k] = beyond = gain[k] + config.discount * beyond
            valid = targets.isfinite()
            x, y = self._normalise(obs[valid]), targets[valid]
        for _ in range(config.updates if len(y) else 0):
            rows = torch.randint(len(y), (config.batch,), generator=self._noise)
            optimiser.zero_grad()
            F.smooth_l1_loss(VALUE_SCALE * self.critic(x[rows])[:, 0], y[rows]).backward()
            optimiser.step()
        with torch.no_grad():
            for target, source in zip(self.target_critic.parameters(), self.critic.parameters(), strict=True):
                target.lerp_(source, config.tau)

    def _update_moments(self, obs: Tensor, reward: Tensor) -> None:
        """The means, over all steps so far, that observations and rewards are normalised by."""
        valid = obs.isfinite().all(-1) & reward.isfinite()
        share = reward.numel() / (self.num_timesteps + reward.numel())
        for moment, batch in (
            (self.mean, obs[valid].mean(0)),
            (self.square, obs[valid].square().mean(0)),
            (self.reward_square, reward[valid].square().mean()),
        ):
            if bool(batch.isfinite().all()):
                moment.lerp_(batch, share)

    # -- the policy ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[NDArray[np.float32], Any]:
        """Observations [O] or [B,O] -> actions [A] or [B,A], always without noise; and ``state``, unchanged."""
        obs = torch.as_tensor(np.asarray(observation), dtype=torch.float32)
        return self._squash(self.actor(self._normalise(obs))).numpy(), state

    def _sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy actions [B,A], through which gradients pass, and the entropy of each, from one sample [B]."""
        mean, log_std = self.actor(self._normalise(obs)), self.log_std.clamp(-5, 1)
        raw = mean + log_std.exp() * torch.randn(mean.shape, generator=self._noise)
        log_slope = 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # of tanh
        return self._squash(raw), (log_std + 0.5 * math.log(2 * math.pi * math.e) + log_slope).sum(-1)

    def _squash(self, raw: Tensor) -> Tensor:
        """Any numbers as actions within the bounds, by tanh."""
        action = self.low + (torch.tanh(raw) + 1) / 2 * (self.high - self.low)
        return action + (action.clamp(self.low, self.high) - action).detach()  # rounding may take it past its bound

    def _normalise(self, obs: Tensor) -> Tensor:
        var = self.square - self.mean.square()
        return ((obs - self.mean) / var.where(var > 1e-6 * self.square, 1.0).sqrt()).clamp(-10, 10)

    def _value(self, critic: nn.Module, obs: Tensor) -> Tensor:
        return VALUE_SCALE * critic(self._normalise(obs))[..., 0]

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Save all that training needs to go on, except for the dreams themselves."""
        weights = {"weights": self.state_dict(), "adams": [optimiser.state_dict() for optimiser in self._optimisers]}
        rest = {"config": asdict(self.config), "steps": self.num_timesteps, "noise": self._noise.get_state()}
        torch.save({**weights, **rest}, path)

    @classmethod
    def load(cls, path: str | Path) -> ActorCritic:
        """Load what ``save`` wrote. Nothing is unpickled but tensors."""
        saved = torch.load(path, weights_only=True)
        weights = saved["weights"]
        agent = cls(len(weights["mean"]), weights["low"], weights["high"], config=ShacConfig(**saved["config"]))
        agent.load_state_dict(weights)
        for optimiser, state in zip(agent._optimisers, saved["adams"], strict=True):
            optimiser.load_state_dict(state)
        agent._noise.set_state(saved["noise"])
        agent.num_timesteps = saved["steps"]
        return agent


def _mlp(inputs: int, outputs: int, width: int) -> nn.Sequential:
    first, second, last = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
