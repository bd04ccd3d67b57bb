"""Rollouts: several policies play from the same starts, in the real simulator and in a dream of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from kairos_gym.data.episode import success_of
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


@dataclass(frozen=True)
class Result:
    """What P policies came to from the same E starts, within the task's time limit."""

    returns: Array  # [P,E]
    steps: Array  # [P,E] until the episode ended
    terminated: NDArray[np.bool_]  # [P,E] it did so before the time limit
    success: Array | None  # [P,E] the first step that shows success, infinite without; None where none is defined
    diverged: NDArray[np.bool_]  # [P,E] a dream that turned non-finite; its return counts up to there


@dataclass(frozen=True)
class Rollouts:
    """Real episodes of P policies from the same E starts: episode p*E + e is that of policy p from start e.

    They go on beyond the task's time ``limit`` where a longer stretch was asked for; ``result`` counts up to it.
    """

    env_id: str
    policies: tuple[Policy, ...]
    seeds: NDArray[np.int64]  # [E] of ``reset``, and of what the policies draw
    rejected: int  # starts that showed the task solved already
    limit: int  # steps
    episodes: Episodes
    states: Tensor | None  # float64 [F,S], the exact state at each frame; None where the simulator doesn't tell
    solved: Tensor | None  # bool [F], whether a frame shows success; None where none is defined
    result: Result

    @cached_property
    def starts(self) -> Tensor:
        """The frames that the episodes begin at, int64 [P,E]."""
        return self.episodes.starts().view(len(self.policies), -1)


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
    """Every policy plays the same ``episodes`` starts of the simulator, those of seeds ``seed``, ``seed + 1``, ...

    at_least: steps that are recorded also where the time limit comes earlier. limit: instead of the simulator's own.
    Starts that are solved already, by ``success_fn`` or by what the simulator says in ``info``, are refused, and the
    next seed takes their place. Raises ValueError where most starts are, or where there is no time limit.
    """
    from envs import get_state, make_real  # the roof loads no simulator before somebody needs one

    if limit is not None and limit < 1:
        raise ValueError(f"an episode has 1 step or more, got limit={limit}")
    env = make_real(env_id)
    if limit is None and env.spec is not None:
        limit = env.spec.max_episode_steps
    env.close()
    if limit is None:
        raise ValueError(f"{env_id} has no time limit, so an episode might never end: say how many steps one lasts")
    steps = max(limit, at_least)
    sims = [make_real(env_id, max_episode_steps=steps) for _ in range(episodes)]
    adapter = SpaceAdapter(spec_of(sims[0], 1), 1)
    space, actions_of = sims[0].observation_space, adapter.spec.action_space
    seeds, refused = _unsolved(sims[0], episodes, seed, success_fn)
    parts: list[Any] = []
    states: list[Array | None] = []
    shape = (len(policies), episodes)
    total, last, ended = np.zeros(shape), np.full(shape, float(limit)), np.zeros(shape, bool)
    success, defined = np.full(shape, np.inf), success_fn is not None
    solutions: list[bool] = []
    bar = tqdm(total=len(policies) * steps, unit="step", desc=f"play {env_id}", disable=not progress)
    for p, policy in enumerate(policies):
        seen = [[_flat(space, sim.reset(seed=int(s))[0])] for sim, s in zip(sims, seeds, strict=True)]
        exact = [[_state(get_state, sim)] for sim in sims]
        played: list[list[Any]] = [[] for _ in sims]
        earned: list[list[float]] = [[] for _ in sims]
        over: list[list[bool]] = [[] for _ in sims]
        solving = [[False] for _ in sims]
        going = np.ones(episodes, bool)
        for t in range(steps):
            chosen = policy.act(adapter.to_observations(np.stack([frames[-1] for frames in seen])), t, seeds)
            for e in np.flatnonzero(going):
                obs, reward, terminated, truncated, info = sims[e].step(chosen[e])
                seen[e].append(_flat(space, obs))
                exact[e].append(_state(get_state, sims[e]))
                played[e].append(_flat(actions_of, chosen[e]))
                earned[e].append(float(reward))
                over[e].append(bool(terminated))
                going[e] = not (terminated or truncated)
                solved = success_of(info)
                defined |= solved is not None
                if success_fn is not None:
                    solved = bool(_ask(success_fn, adapter.to_observations(seen[e][-1][None]))[0])
                solving[e].append(bool(solved))
                if t < limit:
                    total[p, e] += float(reward)
                    if terminated:
                        last[p, e], ended[p, e] = t + 1, True
                    if solved:
                        success[p, e] = min(success[p, e], t + 1)
            bar.update()
            if not going.any():
                break
        parts += [tuple(map(np.stack, rows)) for rows in zip(seen, played, earned, over, strict=True)]
        states += [row for rows in exact for row in rows]
        solutions += [row for rows in solving for row in rows]
    bar.close()
    for sim in sims:
        sim.close()
    told = [row for row in states if row is not None]
    known = torch.from_numpy(np.stack(told)) if told else None
    result = Result(total, last, ended, success if defined else None, np.zeros(shape, bool))
    flags = torch.tensor(solutions) if defined else None
    return Rollouts(env_id, tuple(policies), seeds, refused, limit, Episodes.stack(parts), known, flags, result)


@torch.inference_mode()
def play_dream(dynamics: Dynamics, rollouts: Rollouts, *, success_fn: SuccessFn | None = None) -> Result:
    """The same policies with the same dice from the same starts in a dream, which sees the first frame alone."""
    policies, seeds = rollouts.policies, rollouts.seeds
    shape = (len(policies), len(seeds))
    first, one = rollouts.starts.flatten(), torch.ones(rollouts.starts.numel(), dtype=torch.int64)
    state = Windows(rollouts.episodes, first, one, 1, rollouts.states).observe(dynamics)
    adapter = SpaceAdapter(dynamics.spec, 1)
    device = torch.device("cpu")
    rows, obs = np.arange(len(first)), rollouts.episodes.obs[first].numpy()
    total, last = np.zeros(len(rows)), np.full(len(rows), float(rollouts.limit))
    success = np.full(len(rows), np.inf)
    ended, lost = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for t in range(rollouts.limit):
        whose, start = np.divmod(rows, len(seeds))
        shown = adapter.to_observations(obs)
        chosen = np.concatenate(
            [policies[p].act(_rows(shown, whose == p), t, seeds[start[whose == p]]) for p in np.unique(whose)]
        )
        state, imagined = dynamics.imagine(state, adapter.to_vectors(chosen, len(rows), device))
        assert imagined.obs is not None
        obs, reward, ends = (to_numpy(x[:, 0]) for x in (imagined.obs, imagined.reward, imagined.terminated))
        sound = np.isfinite(obs).all(-1) & np.isfinite(reward)
        total[rows[sound]] += reward[sound]
        lost[rows[~sound]] = True
        ended[rows[sound & ends]] = True
        if success_fn is not None and sound.any():
            solved = rows[sound][_ask(success_fn, adapter.to_observations(obs[sound]))]
            success[solved] = np.minimum(success[solved], t + 1)
        going = sound & ~ends
        last[rows[~going]] = t + 1
        if not going.any():
            break
        if not going.all():
            rows, obs, state = rows[going], obs[going], state.select(torch.from_numpy(np.flatnonzero(going)))
    found = success.reshape(shape) if success_fn is not None else None
    return Result(total.reshape(shape), last.reshape(shape), ended.reshape(shape), found, lost.reshape(shape))


def _unsolved(sim: Any, episodes: int, seed: int, success_fn: SuccessFn | None) -> tuple[NDArray[np.int64], int]:
    """The first seeds from ``seed`` on whose starts aren't solved already, and how many were passed over."""
    fresh: list[int] = []
    tried = 0
    while len(fresh) < episodes:
        if tried >= 4 * episodes + 16:
            raise ValueError(
                f"{tried - len(fresh)} of {tried} episodes begin already solved: a success that needs no policy "
                "measures nothing; ask more of success_fn"
            )
        obs, info = sim.reset(seed=seed + tried)
        shown = batch_of_one(obs)
        solved = bool(success_of(info)) or (success_fn is not None and bool(_ask(success_fn, shown)[0]))
        if not solved:
            fresh.append(seed + tried)
        tried += 1
    return np.array(fresh), tried - episodes


def _ask(success_fn: SuccessFn, shown: Any) -> NDArray[np.bool_]:
    said = np.asarray(success_fn(shown))
    count = len(next(iter(shown.values())) if isinstance(shown, dict) else shown)
    if said.shape != (count,) or said.dtype != bool:
        raise ValueError(
            f"success_fn must return bool [{count}], one for each observation, got {said.dtype}{said.shape}"
        )
    return said


def _rows(shown: Any, which: NDArray[np.bool_]) -> Any:
    return {key: part[which] for key, part in shown.items()} if isinstance(shown, dict) else shown[which]


def _flat(space: Any, value: Any) -> NDArray[np.float32]:
    return np.asarray(flatten(space, value), np.float32)


def _state(get_state: Any, sim: Any) -> Array | None:
    try:
        return get_state(sim)
    except TypeError:  # neither Pendulum nor MuJoCo
        return None
