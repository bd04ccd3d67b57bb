"""Plays episodes of the real simulator: at random, or with a planner that plans in a dream or in the simulator."""

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

from kairos_gym.data.episode import RecordedEpisode
from kairos_gym.evaluation.intervals import bootstrap_mean
from planners import MPC, Objective, Planner
from world_model.contract import Dynamics, ExactDynamics

Act = Callable[[NDArray[Any], "NDArray[Any] | None"], NDArray[Any]]
"""``act(obs [B,O], inner_obs [B,K,O] or None) -> actions [B,A] or [B,K,A]``: what ``MPC.act`` takes and gives."""


@dataclass(frozen=True)
class PlayedEpisodes:
    """E real episodes. ``observations[e]`` is [T+1,O], ``actions[e]`` [T,A]."""

    returns: NDArray[np.float64]  # [E]
    observations: list[NDArray[Any]]
    actions: list[NDArray[Any]]
    ms_per_decision: float  # of one episode; all episodes decide in one call and share its time
    evaluations: int = 0  # sequences that were dreamed for a decision, where it was planned

    def first(self, n: int) -> PlayedEpisodes:
        """The first n episodes."""
        return replace(self, returns=self.returns[:n], observations=self.observations[:n], actions=self.actions[:n])

    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the mean return: the percentile bootstrap over episodes."""
        low, high = bootstrap_mean(self.returns)
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
    ``reset(seed=seed + e)`` for every planner, so results with the same seed are paired. Raises ValueError where the
    dynamics' spaces, bounds included, are not the simulator's, and for no episodes or a seed outside 0 to 2**31 - 1.
    """
    from envs import make_real  # here, so that importing this file loads no simulator

    if episodes < 1 or not 0 <= seed < 2**31:
        raise ValueError(f"episodes must be at least 1 and seed 0 to 2**31 - 1, got {episodes=}, {seed=}")
    sims = [make_real(env_id) for _ in range(episodes)]
    for name in ("observation_space", "action_space"):
        real, dreamed = getattr(sims[0], name), getattr(dynamics.spec, name)
        if not _same(real, dreamed):
            raise ValueError(f"{env_id} has an {name} {real}, these dynamics {dreamed}: is it their simulator?")
    mpc = MPC(dynamics, planner, objective, seed=seed)
    mpc.reset(episodes)

    def act(obs: NDArray[Any], inner_obs: NDArray[Any] | None) -> NDArray[Any]:
        if not isinstance(dynamics, ExactDynamics):
            return mpc.act(obs, inner_obs=inner_obs)
        states = [dynamics.capture(sim)["simulator"] for sim in sims]  # an observation may not determine the state
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

    def act(obs: NDArray[Any], inner_obs: NDArray[Any] | None) -> NDArray[Any]:
        return np.stack([rng.uniform(space.low, space.high) for rng in rngs])

    return play_episodes(env_id, act, episodes=episodes, seed=seed)


def play_episodes(
    env_id: str, act: Act, *, episodes: int, seed: int, progress: bool = False, sims: Sequence[gym.Env] | None = None
) -> PlayedEpisodes:
    """Play ``episodes`` of the simulator side by side; one ``act`` chooses for all.

    Episode e begins as ``reset(seed=seed + e)``. sims: the simulators to play in, one for each episode, for an ``act``
    that looks into them; they are closed at the end. Raises ValueError for no episodes.
    """
    from envs import make_real

    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    sims = [make_real(env_id) for _ in range(episodes)] if sims is None else sims
    played = [RecordedEpisode(sim, seed + e) for e, sim in enumerate(sims)]
    inner_obs, seconds, decisions = None, 0.0, 0
    bar = tqdm(total=sims[0].spec and sims[0].spec.max_episode_steps, unit="step", desc="play", disable=not progress)
    while not all(episode.done for episode in played):
        obs = np.stack([episode.obs for episode in played])
        start = time.perf_counter()
        actions = act(obs, inner_obs)
        seconds, decisions = seconds + time.perf_counter() - start, decisions + 1
        actions = actions.reshape(episodes, -1, actions.shape[-1])
        inner_obs = np.repeat(obs[:, None], actions.shape[1], axis=1)
        for episode, chunk, row in zip(played, actions, inner_obs, strict=True):
            for k, frame in enumerate(episode.play(chunk)):
                row[k:] = frame  # after the end the last observation repeats
        bar.update(actions.shape[1])
    bar.close()
    for sim in sims:
        sim.close()
    return PlayedEpisodes(
        returns=np.array([sum(episode.rewards) for episode in played]),
        observations=[np.stack(episode.observations) for episode in played],
        actions=[np.stack(episode.actions) for episode in played],
        ms_per_decision=1000 * seconds / decisions / episodes,
    )
