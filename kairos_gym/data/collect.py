"""Records real experience as a Minari dataset, the same for the same command, killed in between or not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from minari.dataset.minari_dataset import parse_dataset_id
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

from kairos_gym.data.actors import Collection, Episode, generate_episodes
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.data.datasets import write_dataset
from kairos_gym.data.journal import Journal, open_journal
from kairos_gym.policies.ladder import Policy, fingerprint
from world_model.episodes import spec_of
from world_model.files import expect_same_recipe, write_atomically


def collect(
    env_id: str,
    dataset_id: str,
    config: CollectConfig,
    *,
    policy: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> minari.MinariDataset:
    """Play whole episodes of the simulator ``env_id`` and store them as the Minari dataset ``dataset_id``.

    dataset_id: "name-v0" or "group/name-v0"; it lies where Minari keeps its own (``MINARI_DATASETS_PATH``, or
        ~/.minari/datasets) and is loaded with ``minari.load_dataset``.
    policy: observation [O] -> action [A], instead of ``config.behaviour``. A run that was killed gives the same data as
        an unbroken one only if the policy is a pure function.

    Each finished episode is on disk at once: a run that is killed loses only the episodes it was in, and the same
    call goes on from there. A worker that dies is replaced. Where the dataset exists already, it is returned as it is.
    With more than one worker, a script needs ``if __name__ == "__main__":`` around the call, and ``policy`` must be
    picklable.

    Raises ValueError for a wrong argument, for an action that the simulator doesn't take, and where ``dataset_id``
    holds, finished or not, what another call collected; RuntimeError where another process is collecting it now, and
    where workers die again and again.
    """
    _expect_dataset_id(dataset_id)
    if policy is not None and config.behaviour != "mixed":
        raise ValueError(f"a policy takes the place of behaviour, so leave out behaviour={config.behaviour!r}")
    collection = Collection(env_id, config, policy)
    env = collection.make_env()
    try:
        _expect_env(env, config)
        policies = collection.make_policies(progress)
        recipe = _recipe(collection, env, policies)
        final = get_dataset_path(dataset_id)
        part = final.with_name(f".{final.name}.part")  # hidden, so that Minari doesn't list it
        if final.exists():
            _expect_recipe(
                minari.load_dataset(dataset_id).storage.metadata.get("recipe"), recipe | config.amount, dataset_id
            )
            shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed at its very end
        else:
            episodes_from = partial(generate_episodes, collection, env, policies, workers=config.workers)
            _record(env, episodes_from, config.amount, recipe, dataset_id, part, progress)
            (part / "dataset").rename(final)
            shutil.rmtree(part)
    finally:
        env.close()
    return minari.load_dataset(dataset_id)


def _expect_dataset_id(dataset_id: str) -> None:
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "dataset_id must look like 'name-v0' or 'group/name-v0', where a group has two or more letters; "
            f"got {dataset_id!r}"
        ) from error


def _expect_env(env: gym.Env, config: CollectConfig) -> None:
    spec_of(env, 1)  # raises ValueError for spaces that no model takes
    if isinstance(env.action_space, spaces.Box) and not env.action_space.is_bounded():
        raise ValueError(f"uniform actions need bounds, and this simulator has none: {env.action_space}")
    if env.spec is None or env.spec.max_episode_steps is None:
        raise ValueError(
            "this simulator has no time limit, so an episode might never end: give one with episode_steps "
            "(--episode-steps)"
        )
    if callable(env.spec.entry_point):
        raise ValueError(
            f"{env.spec.id} is registered with the entry point {env.spec.entry_point}, which a dataset can't name: "
            "register it with 'module:Class'"
        )
    if config.behaviour == "expert":
        from envs import Expert

        Expert(env)  # raises ValueError where there is none


def _recipe(collection: Collection, env: gym.Env, policies: list[Policy]) -> dict[str, Any]:
    """What makes the data: two runs with the same recipe give the same episodes."""
    assert env.spec is not None
    source, config, policy = str(env.spec.entry_point), collection.config, collection.policy
    packages = ["gymnasium", "numpy", *(["robosuite"] if "robosuite" in source else [])]
    packages += ["mujoco"] if "mujoco" in source or "robosuite" in source else []
    plain, comma, arguments = collection.env_id.partition(",")
    module, colon, _ = plain.rpartition(":")  # "module:Id-v0" is how Gymnasium finds an id that a module registers
    own = f"policy {getattr(policy, '__qualname__', type(policy).__qualname__)}"
    recipe = {
        "env_id": module + colon + env.spec.id + comma + arguments,
        "seed": config.seed,
        "episode_steps": config.episode_steps,
        "behaviour": config.behaviour if policy is None else own,
        "versions": {name: version(name) for name in packages},
    }
    if policies:
        recipe |= {"policy_seed": config.policy_seed, "policies": fingerprint(collection.env_id, policies)}
    return recipe


def _expect_recipe(found: Any, wanted: dict[str, Any], dataset_id: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{dataset_id} exists already and wasn't made by collect: choose another dataset_id")
    expect_same_recipe(
        found,
        wanted,
        f"{dataset_id} at {get_dataset_path(dataset_id)} was collected",
        "choose another dataset_id, or repeat the command that began it",
    )


def _record(
    env: gym.Env,
    episodes_from: Callable[[int], Generator[Episode, None, None]],
    amount: dict[str, int],
    recipe: dict[str, Any],
    dataset_id: str,
    part: Path,
    progress: bool,
) -> None:
    """Play what the journal in ``part`` doesn't hold yet, and write all of it to the dataset part/"dataset"."""
    part.mkdir(parents=True, exist_ok=True)
    with open_journal(part / "episodes.journal") as journal:
        path = part / "recipe.json"
        if path.exists():
            _expect_recipe(json.loads(path.read_text()), recipe, dataset_id)
        else:
            write_atomically(path, json.dumps(recipe, indent=2).encode())
        _play_missing(journal, episodes_from, amount, part, progress)
        shutil.rmtree(part / "dataset", ignore_errors=True)
        # An earlier, larger request may have left more episodes in the journal.
        episodes = _take(journal.read(), Count(amount))
        write_dataset(part / "dataset", dataset_id, env, episodes, recipe | amount)


class Count:
    """How many episodes and steps there are, and how many of the ``amount`` that is wanted."""

    def __init__(self, amount: dict[str, int]):
        ((self.unit, self.goal),) = amount.items()
        self.episodes = self.steps = 0
        self.success: list[bool] = []  # of the episodes that say

    def add(self, episode: Episode) -> None:
        self.episodes += 1
        self.steps += len(episode["rewards"])
        self.success += episode.get("success", np.array([], bool)).tolist()

    @property
    def done(self) -> int:
        return min(self.goal, self.steps if self.unit == "steps" else self.episodes)


def _take(episodes: Iterator[Episode], count: Count) -> Iterator[Episode]:
    """The first episodes, as many as are wanted."""
    while count.done < count.goal:
        episode = next(episodes)
        count.add(episode)
        yield episode


def _play_missing(
    journal: Journal,
    episodes_from: Callable[[int], Generator[Episode, None, None]],
    amount: dict[str, int],
    part: Path,
    progress: bool,
) -> None:
    """Play the episodes that the journal doesn't hold yet, and append each as soon as it ends."""
    count = Count(amount)
    for episode in journal.read():
        count.add(episode)
    bar = tqdm(total=count.goal, unit=count.unit[:-1], initial=count.done, disable=not progress)
    if progress:
        before = f"going on after {count.episodes} episodes; " if count.episodes else ""
        go_on = "if this is stopped, the same command goes on: finished episodes are kept in"
        bar.write(f"{before}{go_on} {part}", file=sys.stderr)
    stream = episodes_from(count.episodes)
    try:
        while count.done < count.goal:
            episode = next(stream)
            journal.append(episode)
            count.add(episode)
            rate = f", {np.mean(count.success):.0%} solved" if count.success else ""
            bar.set_postfix_str(f"{count.episodes} episodes, {count.steps} steps{rate}", refresh=False)
            bar.update(count.done - bar.n)
    except KeyboardInterrupt:
        saved = f"{count.episodes} episodes with {count.steps} steps are saved in {part}"
        bar.write(f"stopped: {saved}; the same command goes on", file=sys.stderr)
        raise
    finally:
        stream.close()
        bar.close()
