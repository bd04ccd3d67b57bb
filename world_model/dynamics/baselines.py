"""Baselines for a world model: constant observations, a linear model, the PETS ensemble."""

from __future__ import annotations

import hashlib
import math
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from world_model.contract import Imagined, Spec
from world_model.episodes import Episodes, StartStates
from world_model.model.scaling import Scaling
from world_model.state import LatentState

Stepped = tuple[Tensor, Tensor, Tensor]  # what ``Baseline.step`` returns


class Baseline(nn.Module):
    """A Markov model: its state is the last observation, and a subclass defines ``step``."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.card: dict[str, Any] = {}
        self.starts: StartStates | None = None
        self.scaling = Scaling(spec)

    def step(self, obs: Tensor, action: Tensor) -> Stepped:
        """obs [B,O] normalised, action [B,A] in [-1,1] -> next obs [B,O] and reward [B] normalised, terminated [B]."""
        raise NotImplementedError

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        """See ``Dynamics.initial``; nothing is random, so seeds change nothing."""
        return LatentState({"obs": torch.zeros(batch, *self.spec.observation_box.shape)})

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        """Keep the last of obs [B,T,O]; see ``Dynamics.observe``. Raises ValueError for another shape."""
        if obs.ndim != 3 or obs.shape[::2] != state["obs"].shape or not obs.shape[1]:
            raise ValueError(f"obs must be [B,T,O] with B, O = {tuple(state['obs'].shape)}, got {tuple(obs.shape)}")
        return LatentState({"obs": obs[:, -1]})

    @torch.no_grad()
    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        """Dream the steps of actions [B,K,A]; see ``Dynamics.imagine``. Raises ValueError for another shape."""
        expected = (state.batch, *self.spec.action_box.shape)
        if actions.ndim != 3 or actions.shape[::2] != expected or not 1 <= actions.shape[1] <= self.spec.chunk:
            raise ValueError(
                f"actions must be [B,K,A] with B, A = {expected} and K from 1 to {self.spec.chunk}, got "
                f"{tuple(actions.shape)}"
            )
        scaling, obs, steps = self.scaling, self.scaling.obs(state["obs"]), []
        for action in scaling.action(actions).unbind(1):
            obs, reward, terminated = self.step(obs, action)
            obs = scaling.limit(obs)
            steps.append((scaling.raw_obs(obs), reward * scaling.reward_std + scaling.reward_mean, terminated))
        raw_obs, reward, terminated = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
        return LatentState({"obs": raw_obs[:, -1]}), Imagined(raw_obs if decode else None, reward, terminated)

    def fingerprint(self) -> str:
        """A short digest of the weights."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _measure(self, episodes: Episodes) -> None:
        """Set units and start states from the data."""
        self.scaling.measure(episodes)
        first = episodes.starts()
        self.starts = StartStates(episodes.obs[first][:256, None], episodes.action[first][:256, None])


class Constant(Baseline):
    """Observations stay, every step has the mean reward, and no episode ends."""

    def step(self, obs: Tensor, action: Tensor) -> Stepped:
        zero = torch.zeros_like(obs[:, 0])
        return obs, zero, zero.bool()


class Linear(Baseline):
    """The change and the reward are linear in (observation, action, 1).

    An episode ends where a function of the next observation, linear in it and in its squares, is above a threshold.
    """

    weight: Tensor  # [O+A+1,O+1]
    ends: Tensor  # [2*O+1]

    def __init__(self, spec: Spec):
        super().__init__(spec)
        (o,), (a,) = spec.observation_box.shape, spec.action_box.shape
        self.register_buffer("weight", torch.zeros(o + a + 1, o + 1))
        self.register_buffer("ends", torch.zeros(2 * o + 1))

    def step(self, obs: Tensor, action: Tensor) -> Stepped:
        output = _affine(torch.cat([obs, action], -1)) @ self.weight
        # Unstable directions grow without bound; the clamp lies far beyond all data and keeps them finite.
        after = (obs + output[:, :-1]).clamp(-1e3, 1e3)
        return after, output[:, -1], _affine(torch.cat([after, after.square()], -1)) @ self.ends > 0.5


class Ensemble(Baseline):
    """PETS (arXiv 1805.12114): M networks, each the mean and variance of the next change and of the reward.

    Four hidden layers of 200 with swish, as is usual; ``imagine`` follows the members' mean prediction.
    """

    ends: Tensor  # [2*O+1], as Linear's

    def __init__(self, spec: Spec, members: int = 5, width: int = 200, hidden: int = 4):
        super().__init__(spec)
        self.members = members
        size = spec.observation_box.shape[0]
        outs = size + 1  # the change of each dimension, and the reward
        sizes = [size + spec.action_box.shape[0], *[width] * hidden, 2 * outs]
        self.weights = nn.ParameterList(
            torch.randn(members, before, after) / math.sqrt(before) for before, after in pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, after) for after in sizes[1:])
        self.max_log_var = nn.Parameter(torch.full((outs,), 0.5))
        self.min_log_var = nn.Parameter(torch.full((outs,), -10.0))
        self.register_buffer("ends", torch.zeros(2 * size + 1))

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs [M,B,O] normalised, action [M,B,A] in [-1,1] -> mean, log-variance [M,B,O+1] of change and reward."""
        x = torch.cat([obs, action], -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i + 1 < len(self.weights):
                x = F.silu(x)
        mean, log_var = x.chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def step(self, obs: Tensor, action: Tensor) -> Stepped:
        mean = self(*(x.expand(self.members, *x.shape) for x in (obs, action)))[0].mean(0)
        after = obs + mean[:, :-1] * self.scaling.step_std
        return after, mean[:, -1], _affine(torch.cat([after, after.square()], -1)) @ self.ends > 0.5


def fit_constant(spec: Spec, episodes: Episodes) -> Constant:
    """A ``Constant`` with the units and the mean reward of the data."""
    model = Constant(spec)
    model._measure(episodes)
    return model


def fit_linear(spec: Spec, episodes: Episodes) -> Linear:
    """A ``Linear`` by least squares over all steps, in float64, with a little ridge for constant dimensions."""
    model = Linear(spec)
    model._measure(episodes)
    before, action, after, reward = _steps(model, episodes)
    model.weight.copy_(_least_squares(torch.cat([before, action], -1), torch.cat([after - before, reward], -1)))
    model.ends.copy_(_ends(model, episodes))
    return model


def fit_ensemble(
    spec: Spec, episodes: Episodes, *, cpu_seconds: float, seed: int = 0, batch: int = 256, lr: float = 1e-3
) -> Ensemble:
    """An ``Ensemble`` trained for ``cpu_seconds``, each member on its own draws; ``card["updates"]`` counts updates.

    The budget is CPU time, unlike that of ``fit``, so that a baseline gets the time of the model it is compared with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Ensemble(spec)
    generator = torch.Generator().manual_seed(seed)
    model._measure(episodes)
    model.ends.copy_(_ends(model, episodes))
    rows = (episodes.index > 0).nonzero()[:, 0]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-5, fused=True)
    start, updates = time.process_time(), 0
    while (progress := (time.process_time() - start) / cpu_seconds) < 1:
        optimiser.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * progress))
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
    model.card["updates"] = updates
    return model.requires_grad_(False)


def _steps(model: Baseline, episodes: Episodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All steps, normalised, in float64: before [S,O], action [S,A], after [S,O], reward [S,1]."""
    at, scaling = (episodes.index > 0).nonzero()[:, 0], model.scaling
    reward = (episodes.reward[at] - scaling.reward_mean) / scaling.reward_std
    steps = scaling.obs(episodes.obs[at - 1]), scaling.action(episodes.action[at]), scaling.obs(episodes.obs[at])
    return (*(x.double() for x in steps), reward[:, None].double())  # type: ignore[return-value]


def _ends(model: Baseline, episodes: Episodes) -> Tensor:
    """Least squares of "the episode ends here" on an observation and its squares -> weights [2*O+1].

    Terminating steps and the others have the same total weight, however rare they are. The squares suit simulators,
    which often end an episode by a threshold on |x|.
    """
    _, _, after, _ = _steps(model, episodes)
    terminated = episodes.terminated[episodes.index > 0].double()[:, None]
    features = torch.cat([after, after.square()], -1)
    if not terminated.any():
        return torch.zeros(features.shape[1] + 1)
    weight = torch.where(terminated > 0, 0.5 / terminated.sum(), 0.5 / (1 - terminated).sum())
    return _least_squares(features, terminated, weight)[:, 0]


def _least_squares(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """x [S,n], y [S,m], weight [S,1] -> the least-squares map of (x, 1) to y, [n+1,m]."""
    x = _affine(x)
    weighted = x if weight is None else x * weight * len(x)
    gram = weighted.mT @ x
    return torch.linalg.solve(gram + 1e-9 * len(x) * torch.eye(x.shape[1], dtype=x.dtype), weighted.mT @ y)


def _affine(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)
