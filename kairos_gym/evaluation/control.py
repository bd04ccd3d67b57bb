"""Plays episodes of the real simulator: at random, or with a planner that thinks in a dream or in the simulator."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tqdm import tqdm

from planners import MPC, Objective, Planner
from world_model.contract import Dynamics

Act = Callable[[NDArray[Any], "NDArray[Any] | None"], NDArray[Any]]
"""``act(obs [B,O], inner_obs [B,K,O] or None) -> actions [B,A] or [B,K,A]``: what ``MPC.act`` takes and gives."""


@dataclass(frozen=True)
class PlayedEpisodes:
    """E real episodes: what was seen, done and earned. ``observations[e]`` is [T+1,O], ``actions[e]`` [T,A]."""

    returns: NDArray[np.float64]  # [E]
    observations: list[NDArray[Any]]
    actions: list[NDArray[Any]]
    ms_per_decision: float  # of one episode; the episodes decide side by side and share the cost
    evaluations: int = 0  # sequences dreamed for a decision, where it was planned

    def first(self, n: int) -> PlayedEpisodes:
        """The first n episodes."""
        return replace(self, returns=self.returns[:n], observations=self.observations[:n], actions=self.actions[:n])

    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the mean return."""
        return interval(self.returns)


def interval(returns: NDArray[np.float64]) -> tuple[float, float]:
    """95% confidence interval of the mean of returns [E]: the percentile bootstrap over episodes."""
    n = len(returns)
    means = returns[np.random.default_rng(0).integers(n, size=(10_000, n))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def evaluate_planner(
    env_id: str,
    dynamics: Dynamics,
    planner: Planner,
    objective: Objective = Objective(),
    *,
    episodes: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> PlayedEpisodes:
    """Play ``episodes`` of the simulator ``env_id``, planning in ``dynamics`` and replanning after every chunk.

    dynamics: a ``WorldModel``, or ``envs.SimulatorDynamics(env_id)`` to plan on the truth. Episode e begins as
    ``reset(seed=seed + e)``, whoever plays, so results with the same seed are paired. Raises ValueError where the
    dynamics' spaces, bounds included, are not the simulator's, and for no episodes or a seed outside 0 to 2**31 - 1.
    """
    from envs import SimulatorDynamics, make_real  # the roof loads no simulator before somebody needs one

    if episodes < 1 or not 0 <= seed < 2**31:
        raise ValueError(f"episodes must be at least 1 and seed 0 to 2**31 - 1, got {episodes=}, {seed=}")
    env = make_real(env_id)
    for name in ("observation_space", "action_space"):
        real, dreamed = getattr(env, name), getattr(dynamics.spec, name)
        if not _same(real, dreamed):
            raise ValueError(f"{env_id} has an {name} {real}, these dynamics {dreamed}: is it their simulator?")
    env.close()
    mpc = MPC(dynamics, planner, objective, seed=seed)
    mpc.reset(episodes)
    sims = [make_real(env_id) for _ in range(episodes)]

    def act(obs: NDArray[Any], inner: NDArray[Any] | None) -> NDArray[Any]:
        if not isinstance(dynamics, SimulatorDynamics):
            return mpc.act(obs, inner_obs=inner)
        states = [dynamics.capture(sim)["simulator"] for sim in sims]  # not all observations tell the state
        return mpc.act(obs, state=dynamics.at(torch.cat(states)))

    played = play_episodes(env_id, act, episodes=episodes, seed=seed, progress=progress, sims=sims)
    assert mpc.plan is not None
    return replace(played, evaluations=mpc.plan.evaluations)


def _same(a: Any, b: Any) -> bool:
    """Whether two spaces are the same; of Boxes, whether they have the same shape and, in float32, the same bounds."""
    if not (isinstance(a, spaces.Box) and isinstance(b, spaces.Box)):
        return bool(a == b)
    with np.errstate(over="ignore"):  # the largest float64 stands for no bound
        bounds = [np.asarray(bound, np.float32) for bound in (a.low, b.low, a.high, b.high)]
    return a.shape == b.shape and np.allclose(bounds[0], bounds[1]) and np.allclose(bounds[2], bounds[3])


def play_random(env_id: str, *, episodes: int = 10, seed: int = 0) -> PlayedEpisodes:
    """Play actions drawn uniformly within their bounds; episode e draws its own from ``seed + e``."""
    from envs import make_real

    space: Any = make_real(env_id).action_space
    rngs = [np.random.default_rng(seed + e) for e in range(episodes)]

    def act(obs: NDArray[Any], inner: NDArray[Any] | None) -> NDArray[Any]:
        return np.stack([rng.uniform(space.low, space.high) for rng in rngs])

    return play_episodes(env_id, act, episodes=episodes, seed=seed)


def play_episodes(
    env_id: str, act: Act, *, episodes: int, seed: int, progress: bool = False, sims: Sequence[gym.Env] | None = None
) -> PlayedEpisodes:
    """Play ``episodes`` of the simulator side by side, with one ``act`` for all; start e is that of seed ``seed + e``.

    sims: the simulators to play in, one for each episode, for an ``act`` that looks into them; they are closed.
    """
    from envs import make_real

    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    sims = [make_real(env_id) for _ in range(episodes)] if sims is None else sims
    seen = [[sim.reset(seed=seed + e)[0]] for e, sim in enumerate(sims)]
    played: list[list[NDArray[Any]]] = [[] for _ in sims]
    returns, done, inner = np.zeros(episodes), np.zeros(episodes, bool), None
    thinking, decisions = 0.0, 0
    bar = tqdm(total=sims[0].spec and sims[0].spec.max_episode_steps, unit="step", desc="play", disable=not progress)
    while not done.all():
        now = np.stack([frames[-1] for frames in seen])
        began = time.perf_counter()
        actions = act(now, inner)
        thinking, decisions = thinking + time.perf_counter() - began, decisions + 1
        actions = actions.reshape(episodes, -1, actions.shape[-1])
        inner = np.repeat(now[:, None], actions.shape[1], axis=1)
        for e in np.flatnonzero(~done):
            for k, action in enumerate(actions[e]):
                obs, reward, terminated, truncated, _ = sims[e].step(action.astype(sims[e].action_space.dtype))
                seen[e].append(obs)
                played[e].append(action)
                inner[e, k:] = obs
                returns[e] += float(reward)
                done[e] = terminated or truncated
                if done[e]:
                    break
        bar.update(actions.shape[1])
    bar.close()
    for sim in sims:
        sim.close()
    ms = 1000 * thinking / decisions / episodes
    return PlayedEpisodes(returns, [np.stack(frames) for frames in seen], [np.stack(row) for row in played], ms)
