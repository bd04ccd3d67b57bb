"""Rollouts: several policies play from the same starts, in the real simulator and in a dream of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from kairos_gym.data.episode import RecordedEpisode, success_of
from kairos_gym.dream.space_adapter import SpaceAdapter
from kairos_gym.dream.step_function import to_numpy
from kairos_gym.evaluation.windows import Windows
from kairos_gym.policies.ladder import Policy, batch_of_one
from world_model.contract import Dynamics
from world_model.episodes import Episodes, spec_of
from world_model.spaces import flatten

SuccessFn = Callable[[Any], Any]
"""``(obs [N,...]) -> bool [N]``: which of N elements of the observation space, stacked, show the task solved."""

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """How E episodes of each of P policies went, all from the same E starts, within the task's time limit."""

    returns: Array  # [P,E]
    steps: Array  # [P,E] until the episode ended
    terminated: Flags  # [P,E] whether it ended before the time limit
    success: Array | None  # [P,E] the first step that shows success, infinite without; None where none is defined
    diverged: Flags  # [P,E] whether a dream turned non-finite; its return counts up to there


@dataclass(frozen=True)
class Rollouts:
    """Real episodes of P policies from the same E starts: episode p*E + e is that of policy p from start e.

    They may be longer than the task's time ``limit``, as open-loop windows need; ``result`` counts up to it.
    """

    env_id: str
    policies: tuple[Policy, ...]
    seeds: NDArray[np.int64]  # [E] of ``reset``, and of the policies' random numbers
    rejected: int  # starts that showed the task solved already
    limit: int  # steps
    episodes: Episodes
    states: Tensor | None  # float64 [F,S], the exact state at each frame; None where the simulator has none to give
    solved: Tensor | None  # bool [F], whether a frame shows success; None where none is defined
    result: Result

    @cached_property
    def starts(self) -> Tensor:
        """The frames that the episodes begin at, int64 [P,E]."""
        return self.episodes.starts().view(len(self.policies), -1)


@dataclass(frozen=True)
class _Played:
    """A real episode of T steps."""

    obs: NDArray[np.float32]  # [T+1,O]
    action: NDArray[np.float32]  # [T,A]
    reward: list[float]  # T
    terminated: list[bool]  # T
    states: list[Array | None]  # T+1
    solved: Flags  # [T+1]
    success_defined: bool


def play_real(
    env_id: str,
    policies: Sequence[Policy],
    *,
    episodes: int,
    seed: int,
    at_least: int = 0,
    limit: int | None = None,
    success_fn: SuccessFn | None = None,
    progress: bool = False,
) -> Rollouts:
    """Play every policy from the same ``episodes`` starts of the simulator, those of seeds ``seed``, ``seed + 1``, ...

    at_least: steps that are recorded even where the time limit is shorter. limit: instead of the simulator's own.
    Starts that are solved already, by ``success_fn`` or by the simulator's ``info``, are rejected, and the next seed
    takes their place. Raises ValueError where most starts are, or where there is no time limit.
    """
    from envs import make_real  # here, so that importing this file loads no simulator

    limit = _time_limit(env_id, limit)
    steps = max(limit, at_least)
    sims = [make_real(env_id, max_episode_steps=steps) for _ in range(episodes)]
    seeds, rejected = _unsolved_seeds(sims[0], episodes, seed, success_fn)
    played: list[_Played] = []
    bar = tqdm(total=len(policies) * steps, unit="step", desc=f"play {env_id}", disable=not progress)
    for policy in policies:
        played += _play_policy(policy, sims, seeds, success_fn, bar)
    bar.close()
    for sim in sims:
        sim.close()
    states = [state for episode in played for state in episode.states if state is not None]
    success_defined = any(episode.success_defined for episode in played)
    return Rollouts(
        env_id=env_id,
        policies=tuple(policies),
        seeds=seeds,
        rejected=rejected,
        limit=limit,
        episodes=Episodes.stack((e.obs, e.action, e.reward, e.terminated) for e in played),
        states=torch.from_numpy(np.stack(states)) if states else None,
        solved=torch.from_numpy(np.concatenate([e.solved for e in played])) if success_defined else None,
        result=_score(played, len(policies), limit, success_defined),
    )


def _time_limit(env_id: str, limit: int | None) -> int:
    """Steps of an episode: ``limit``, or the simulator's own where it is None."""
    from envs import make_real

    if limit is not None and limit < 1:
        raise ValueError(f"an episode has 1 step or more, got {limit=}")
    if limit is None:
        env = make_real(env_id)
        limit = None if env.spec is None else env.spec.max_episode_steps
        env.close()
    if limit is None:
        raise ValueError(f"{env_id} has no time limit, so an episode might never end: say how many steps one lasts")
    return limit


def _play_policy(
    policy: Policy, sims: Sequence[gym.Env], seeds: NDArray[np.int64], success_fn: SuccessFn | None, bar: tqdm
) -> list[_Played]:
    """Play one episode in each simulator, side by side."""
    adapter = SpaceAdapter(spec_of(sims[0], 1), 1)
    space = sims[0].observation_space
    episodes = [RecordedEpisode(sim, int(seed)) for sim, seed in zip(sims, seeds, strict=True)]
    obs = [[_flat(space, episode.obs)] for episode in episodes]
    states = [[_exact_state(sim)] for sim in sims]
    step = 0
    while not all(episode.done for episode in episodes):
        actions = policy.act(adapter.to_observations(np.stack([frames[-1] for frames in obs])), step, seeds)
        for e, episode in enumerate(episodes):
            if not episode.done:
                episode.step(actions[e])
                obs[e].append(_flat(space, episode.obs))
                states[e].append(_exact_state(sims[e]))
        step += 1
        bar.update()
    return [_to_arrays(*rows, adapter, success_fn) for rows in zip(episodes, obs, states, strict=True)]


def _to_arrays(
    episode: RecordedEpisode,
    obs: list[NDArray[np.float32]],
    states: list[Array | None],
    adapter: SpaceAdapter,
    success_fn: SuccessFn | None,
) -> _Played:
    frames, reported = np.stack(obs), episode.successes[1:]
    if success_fn is None:
        solved = np.array(reported, bool)  # where the simulator reports nothing: None, so False
    else:
        solved = _call_success_fn(success_fn, adapter.to_observations(frames[1:]))
    return _Played(
        obs=frames,
        action=np.stack([_flat(episode.env.action_space, action) for action in episode.actions]),
        reward=episode.rewards,
        terminated=episode.terminations,
        states=states,
        solved=np.concatenate([[False], solved]),  # solved starts were rejected
        success_defined=success_fn is not None or any(success is not None for success in reported),
    )


def _score(played: list[_Played], policies: int, limit: int, success_defined: bool) -> Result:
    """The result of P*E episodes within their first ``limit`` steps."""
    shape = (policies, len(played) // policies)
    ended = np.array([e.terminated[-1] and len(e.terminated) <= limit for e in played])
    solutions = [1 + np.flatnonzero(e.solved[1 : limit + 1]) for e in played]  # the steps that show success
    success = np.array([float(steps[0]) if len(steps) else np.inf for steps in solutions])
    return Result(
        returns=np.array([sum(e.reward[:limit]) for e in played]).reshape(shape),
        steps=np.where(ended, [len(e.reward) for e in played], float(limit)).reshape(shape),
        terminated=ended.reshape(shape),
        success=success.reshape(shape) if success_defined else None,
        diverged=np.zeros(shape, bool),
    )


@torch.inference_mode()
def play_dream(dynamics: Dynamics, rollouts: Rollouts, *, success_fn: SuccessFn | None = None) -> Result:
    """Play the same policies with the same random numbers from the same starts in a dream, which sees the first frame.

    P*E dreams go side by side; ``rows`` are the numbers of those that have not ended.
    """
    policies, seeds = rollouts.policies, rollouts.seeds
    shape = (len(policies), len(seeds))
    first, one = rollouts.starts.flatten(), torch.ones(rollouts.starts.numel(), dtype=torch.int64)
    state = Windows(rollouts.episodes, first, one, 1, rollouts.states).observe(dynamics)
    adapter = SpaceAdapter(dynamics.spec, 1)
    device = torch.device("cpu")
    rows, obs = np.arange(len(first)), rollouts.episodes.obs[first].numpy()
    returns, steps = np.zeros(len(rows)), np.full(len(rows), float(rollouts.limit))
    success = np.full(len(rows), np.inf)
    ended, diverged = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for t in range(rollouts.limit):
        policy, start = np.divmod(rows, len(seeds))
        shown = adapter.to_observations(obs)
        actions = np.concatenate(
            [policies[p].act(_rows(shown, policy == p), t, seeds[start[policy == p]]) for p in np.unique(policy)]
        )
        state, imagined = dynamics.imagine(state, adapter.to_vectors(actions, len(rows), device))
        assert imagined.obs is not None
        obs, reward, ends = (to_numpy(x[:, 0]) for x in (imagined.obs, imagined.reward, imagined.terminated))
        finite = np.isfinite(obs).all(-1) & np.isfinite(reward)
        returns[rows[finite]] += reward[finite]
        diverged[rows[~finite]] = True
        ended[rows[finite & ends]] = True
        if success_fn is not None and finite.any():
            solved = rows[finite][_call_success_fn(success_fn, adapter.to_observations(obs[finite]))]
            success[solved] = np.minimum(success[solved], t + 1)
        goes_on = finite & ~ends
        steps[rows[~goes_on]] = t + 1
        if not goes_on.any():
            break
        if not goes_on.all():
            rows, obs, state = rows[goes_on], obs[goes_on], state.select(torch.from_numpy(np.flatnonzero(goes_on)))
    return Result(
        returns=returns.reshape(shape),
        steps=steps.reshape(shape),
        terminated=ended.reshape(shape),
        success=success.reshape(shape) if success_fn is not None else None,
        diverged=diverged.reshape(shape),
    )


def _unsolved_seeds(
    sim: gym.Env, episodes: int, seed: int, success_fn: SuccessFn | None
) -> tuple[NDArray[np.int64], int]:
    """The first seeds from ``seed`` on whose starts aren't solved already, and how many were rejected."""
    seeds: list[int] = []
    tried = 0
    while len(seeds) < episodes:
        if tried >= 4 * episodes + 16:
            raise ValueError(
                f"{tried - len(seeds)} of {tried} episodes begin already solved: a success that needs no policy "
                "measures nothing; ask more of success_fn"
            )
        obs, info = sim.reset(seed=seed + tried)
        solved = success_of(info)
        if not solved and success_fn is not None:
            solved = bool(_call_success_fn(success_fn, batch_of_one(obs))[0])
        if not solved:
            seeds.append(seed + tried)
        tried += 1
    return np.array(seeds), tried - episodes


def _call_success_fn(success_fn: SuccessFn, obs: Any) -> Flags:
    """Raises ValueError where it doesn't return bool [N] for N observations."""
    output = np.asarray(success_fn(obs))
    count = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    if output.shape != (count,) or output.dtype != bool:
        raise ValueError(
            f"success_fn must return bool [{count}], one for each observation, got {output.dtype}{output.shape}"
        )
    return output


def _rows(obs: Any, which: Flags) -> Any:
    return {key: part[which] for key, part in obs.items()} if isinstance(obs, dict) else obs[which]


def _flat(space: gym.Space, value: Any) -> NDArray[np.float32]:
    return np.asarray(flatten(space, value), np.float32)


def _exact_state(sim: gym.Env) -> Array | None:
    from envs import get_state

    try:
        return get_state(sim)
    except TypeError:  # neither Pendulum nor MuJoCo
        return None
