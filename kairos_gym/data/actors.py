"""Plays the episodes of a recording, in one process or in several, in the same order either way."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import count
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.data.episode import RecordedEpisode
from kairos_gym.policies.ladder import Policy, batch_of_one, ladder

Episode = dict[str, NDArray[Any]]
LONGEST_HOLD = 8  # steps
# The expert's arguments, by turns. A planner tries what no expert does, so in half of the episodes random actions take
# over now and then.
EXPERT_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"noise": 0.3},
    {"noise": 0.1, "failure": "offset"},
    {"noise": 0.1, "failure": "drop"},
    *({"noise": noise, "interrupted": True} for noise in (0.0, 0.1, 0.2, 0.4)),
)
LONGEST_EXPERT, LONGEST_INTERRUPTION = 30, 12  # steps of the expert between two interruptions, and of one of these
DEATHS = 3  # of workers, without an episode between them, before the recording is given up


@dataclass(frozen=True)
class Collection:
    """What to play: an episode is a function of this and of its number."""

    env_id: str
    config: CollectConfig
    policy: Callable[[Any], Any] | None

    def make_env(self) -> gym.Env:
        """The simulator."""
        from envs import make_real

        limit = self.config.episode_steps
        return make_real(self.env_id, **({} if limit is None else {"max_episode_steps": limit}))

    def make_policies(self, progress: bool) -> list[Policy]:
        """The policies that play by turns; none for other behaviours than "ladder"."""
        config = self.config
        return ladder(self.env_id, seed=config.policy_seed, progress=progress) if config.behaviour == "ladder" else []


def generate_episodes(
    collection: Collection, env: gym.Env, policies: list[Policy], first: int, workers: int
) -> Generator[Episode, None, None]:
    """Play episodes ``first``, ``first`` + 1, ... without end, in that order.

    Several ``workers`` play in processes of their own; ``env`` and ``policies`` serve a single one. A worker that dies
    is replaced, and its episode is played again. Raises RuntimeError where workers die again and again.
    """
    if workers == 1:
        for index in count(first):
            yield play(collection, env, policies, index)
    pool, deaths, index = _pool(collection, workers), 0, first
    playing: dict[int, Future[Episode]] = {}
    try:
        while True:
            try:
                for ahead in range(index, index + 2 * workers):
                    if ahead not in playing:
                        playing[ahead] = pool.submit(_play_in_worker, ahead)
                episode = playing[index].result()
            except BrokenProcessPool as error:
                deaths += 1
                if deaths == DEATHS:
                    raise RuntimeError(
                        f"workers died {DEATHS} times before episode {index} was played; see what they wrote above, "
                        "and try one worker (workers=1, --workers 1)"
                    ) from error
                pool.shutdown(wait=False)
                pool = _pool(collection, workers)
                playing = {i: future for i, future in playing.items() if future.done() and future.exception() is None}
                continue
            del playing[index]
            index, deaths = index + 1, 0
            yield episode
    finally:
        pool.shutdown(cancel_futures=True)


def play(collection: Collection, env: gym.Env, policies: list[Policy], index: int) -> Episode:
    """Episode number ``index``: observations [T+1,O], actions [T,A], rewards, terminations and truncations [T].

    Where there are ``policies``, one of them plays it. "success" [1], where the simulator reports it.
    """
    rng = np.random.default_rng([collection.config.seed, index])
    env_seed = int(rng.integers(2**31))
    held = collection.config.behaviour == "held" or (collection.config.behaviour == "mixed" and index % 2 == 1)
    drawn = _actions(rng, env.action_space, LONGEST_HOLD if held else 1)
    episode = RecordedEpisode(env, env_seed)
    policy = _expert(env, rng, index) if collection.config.behaviour == "expert" else collection.policy
    while not episode.done:
        if policies:
            actor, step = policies[index % len(policies)], len(episode.actions)
            episode.step(actor.act(batch_of_one(episode.obs), step, np.array([env_seed]))[0])
        elif policy is None:
            episode.step(next(drawn))
        else:
            episode.step(_policy_action(policy, episode.obs, env.action_space))
    reported = [success for success in episode.successes[1:] if success is not None]
    success = {"success": np.array([any(reported)])} if reported else {}
    return {
        **success,
        "seed": np.array([env_seed]),
        **_stacked("observations", episode.observations),
        "actions": np.stack(episode.actions),
        "rewards": np.array(episode.rewards),
        "terminations": np.array(episode.terminations),
        "truncations": np.array(episode.truncations),
    }


def _pool(collection: Collection, workers: int) -> ProcessPoolExecutor:
    # Spawned, since a process that has used torch's threads can't be forked.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (collection,))


_worker: tuple[Collection, gym.Env, list[Policy]] | None = None  # what this process, if it is a worker, plays with


def _start_worker(collection: Collection) -> None:
    global _worker
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the parent, which stops its workers
    torch.set_num_threads(1)
    _worker = collection, collection.make_env(), collection.make_policies(progress=False)


def _play_in_worker(index: int) -> Episode:
    assert _worker is not None
    return play(*_worker, index)


def _stacked(name: str, values: list[Any]) -> Episode:
    """Elements of a space as columns [T,...]; the parts of a Dict have their keys in their column's name."""
    if not isinstance(values[0], dict):
        return {name: np.stack(values)}
    columns: Episode = {}
    for key in values[0]:
        columns |= _stacked(f"{name}/{key}", [value[key] for value in values])
    return columns


def _actions(rng: np.random.Generator, space: gym.Space, longest: int) -> Iterator[Any]:
    """Uniform actions without end, each for a uniform number of steps from 1 to ``longest``."""
    while True:
        if isinstance(space, spaces.Discrete):
            action = space.start + rng.integers(space.n)
        else:
            assert isinstance(space, spaces.Box)
            action = rng.uniform(space.low, space.high).astype(space.dtype)
        for _ in range(rng.integers(1, longest + 1)):
            yield action


def _expert(env: gym.Env, rng: np.random.Generator, index: int) -> Callable[[Any], Any]:
    """The expert of episode number ``index``, one of EXPERT_VARIANTS."""
    from envs import Expert

    arguments = dict(EXPERT_VARIANTS[index % len(EXPERT_VARIANTS)])
    interrupted = arguments.pop("interrupted", False)
    expert = Expert(env, **arguments, seed=int(rng.integers(2**31)))
    if not interrupted:
        return expert
    # Independent actions, as a planner's candidates are, and held ones, which get farther.
    interruptions = [_actions(rng, env.action_space, longest) for longest in (1, LONGEST_HOLD)]

    def alternate() -> Iterator[Iterator[Any] | None]:
        """Step by step: the random actions that interrupt the expert, or None where it acts itself."""
        while True:
            yield from [None] * int(rng.integers(1, LONGEST_EXPERT + 1))
            yield from [interruptions[rng.integers(2)]] * int(rng.integers(1, LONGEST_INTERRUPTION + 1))

    sources = alternate()

    def act(obs: Any) -> Any:
        interruption = next(sources)
        return expert(obs) if interruption is None else next(interruption)

    return act


def _policy_action(policy: Callable[[Any], Any], obs: Any, space: gym.Space) -> NDArray[Any]:
    action = np.asarray(policy(obs), dtype=space.dtype)
    if not space.contains(action):
        raise ValueError(f"the policy's action {action!r} is not in the action space {space}: rescale what it returns")
    return action
