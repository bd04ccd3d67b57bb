"""Records real experience as a Minari dataset, the same for the same command, killed in between or not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, get_args

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path
from safetensors.numpy import load, save
from tqdm import tqdm

from kairos_gym.data.actors import Behaviour, Collection, Episode, generate_episodes
from kairos_gym.policies.ladder import Policy, fingerprint
from world_model.episodes import spec_of

HEADER = struct.Struct("<QI")  # a journal record's length in bytes and its checksum


def collect(
    env_id: str,
    dataset_id: str,
    *,
    seed: int,
    steps: int | None = None,
    episodes: int | None = None,
    episode_steps: int | None = None,
    behaviour: Behaviour = "mixed",
    policy_seed: int = 0,
    policy: Callable[[Any], Any] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> minari.MinariDataset:
    """Plays whole episodes of the simulator ``env_id`` and keeps them as the Minari dataset ``dataset_id``.

    dataset_id: "name-v0" or "group/name-v0"; it lives where Minari keeps its own (``MINARI_DATASETS_PATH``, or
        ~/.minari/datasets) and is loaded with ``minari.load_dataset``.
    seed: every episode draws its start and its actions from (seed, its index), so the same command gives the same
        data.
    steps, episodes: how much, one of the two. The last episode is finished, so there may be a few more ``steps``.
    episode_steps: the time limit of an episode, instead of the simulator's own; needed where it has none.
    behaviour: "uniform", independent uniform actions; "held", uniform actions each held for 1 to 8 steps; "mixed", the
        two by turns, an episode each; "ladder", the policies of ``kairos_gym.policies.ladder.ladder`` by turns, from
        doing nothing to skilled ones, which are trained first where there is no scripted expert and they haven't been;
        "expert", the scripted expert of robosuite's Lift, Stack or Door, by turns clean, noisy, failing and recovering,
        and in every other episode interrupted by random actions.
    policy_seed: of the training of the ladder's policies.
    policy: observation [O] -> action [A], instead of ``behaviour``. A run that was killed gives the same data as an
        unbroken one only if the policy is a pure function.
    workers: processes that play; the data are the same for any number of them. With more than one, a script needs
        ``if __name__ == "__main__":`` around the call, and ``policy`` must be picklable.

    Each finished episode is on disk at once: a run that is killed loses only the episodes it was in, and the same
    command goes on from there. A worker that dies is replaced. Where the dataset exists already, it is returned as it
    is.

    Raises ValueError for a wrong argument, for an action that the simulator doesn't take, and where ``dataset_id``
    holds, finished or not, what another command collected; RuntimeError where another process is collecting it now, and
    where workers die again and again.
    """
    _check_arguments(dataset_id, seed, steps, episodes, episode_steps, behaviour, policy, workers)
    script = Collection(env_id, episode_steps, seed, behaviour, policy_seed, policy)
    env = script.env()
    try:
        _check_env(env)
        if behaviour == "expert":
            from envs import Expert

            Expert(env)  # raises ValueError where there is none
        turns = script.turns(progress)
        recipe = _recipe(env_id, env, seed, episode_steps, behaviour, policy)
        if turns:
            recipe |= {"policy_seed": policy_seed, "policies": fingerprint(env_id, turns)}
        amount = {name: n for name, n in (("steps", steps), ("episodes", episodes)) if n is not None}
        final = get_dataset_path(dataset_id)
        part = final.with_name(f".{final.name}.part")  # hidden, so that Minari doesn't list it
        if final.exists():
            dataset = _finished(dataset_id, recipe | amount)
            shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed at its very end
            return dataset
        part.mkdir(parents=True, exist_ok=True)
        with open(part / "episodes.journal", "a+b") as journal:
            _lock(journal, dataset_id)
            _keep_recipe(part / "recipe.json", recipe, dataset_id)
            _collect_missing(script, env, journal, amount, turns, workers, part, progress)
            _write_dataset(env, journal, dataset_id, recipe, amount, part / "dataset")
        (part / "dataset").rename(final)
        shutil.rmtree(part)
    finally:
        env.close()
    return minari.load_dataset(dataset_id)


def _check_arguments(
    dataset_id: str,
    seed: int,
    steps: int | None,
    episodes: int | None,
    episode_steps: int | None,
    behaviour: str,
    policy: Callable[[Any], Any] | None,
    workers: int,
) -> None:
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "dataset_id must look like 'name-v0' or 'group/name-v0', where a group has two or more letters; "
            f"got {dataset_id!r}"
        ) from error
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if (steps is None) == (episodes is None):
        raise ValueError(f"give either steps or episodes, got steps={steps} and episodes={episodes}")
    for name, value in (
        ("steps", steps),
        ("episodes", episodes),
        ("episode_steps", episode_steps),
        ("workers", workers),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if behaviour not in get_args(Behaviour):
        raise ValueError(f"behaviour must be one of {', '.join(map(repr, get_args(Behaviour)))}, got {behaviour!r}")
    if policy is not None and behaviour != "mixed":
        raise ValueError(f"a policy takes the place of behaviour, so leave out behaviour={behaviour!r}")


def _check_env(env: gym.Env) -> None:
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


def _recipe(
    env_id: str,
    env: gym.Env,
    seed: int,
    episode_steps: int | None,
    behaviour: str,
    policy: Callable[[Any], Any] | None,
) -> dict[str, Any]:
    """What made the data: two runs with the same recipe give the same episodes."""
    assert env.spec is not None
    source = str(env.spec.entry_point)
    packages = ["gymnasium", "numpy", *(["robosuite"] if "robosuite" in source else [])]
    packages += ["mujoco"] if "mujoco" in source or "robosuite" in source else []
    plain, comma, arguments = env_id.partition(",")
    module, colon, _ = plain.rpartition(":")  # "module:Id-v0" is how Gymnasium finds an id that a module registers
    by = behaviour if policy is None else f"policy {getattr(policy, '__qualname__', type(policy).__qualname__)}"
    return {
        "env_id": module + colon + env.spec.id + comma + arguments,
        "seed": seed,
        "episode_steps": episode_steps,
        "behaviour": by,
        "versions": {name: version(name) for name in packages},
    }


def _refuse_other(found: dict[str, Any], wanted: dict[str, Any], dataset_id: str) -> None:
    differences = [
        f"{key} {found.get(key)!r}, not {wanted.get(key)!r}"
        for key in {**wanted, **found}
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        raise ValueError(
            f"{dataset_id} at {get_dataset_path(dataset_id)} was collected with {'; '.join(differences)}: choose "
            "another dataset_id, or repeat the command that began it"
        )


def _finished(dataset_id: str, recipe: dict[str, Any]) -> minari.MinariDataset:
    dataset = minari.load_dataset(dataset_id)
    found = dataset.storage.metadata.get("recipe")
    if not isinstance(found, dict):
        raise ValueError(f"{dataset_id} exists already and wasn't made by collect: choose another dataset_id")
    _refuse_other(found, recipe, dataset_id)
    return dataset


def _lock(journal: BinaryIO, dataset_id: str) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"another process is collecting {dataset_id} now: wait for it or stop it") from error


def _keep_recipe(path: Path, recipe: dict[str, Any], dataset_id: str) -> None:
    if path.exists():
        _refuse_other(json.loads(path.read_text()), recipe, dataset_id)
        return
    new = path.with_suffix(".new")
    new.write_text(json.dumps(recipe, indent=2))
    os.replace(new, path)


def _collect_missing(
    script: Collection,
    env: gym.Env,
    journal: BinaryIO,
    amount: dict[str, int],
    turns: list[Policy],
    workers: int,
    part: Path,
    progress: bool,
) -> None:
    """Plays the episodes that the journal doesn't hold yet and appends each as soon as it ends."""
    ((unit, goal),) = amount.items()
    played = steps = 0
    solved: list[bool] = []
    for episode in _read(journal):
        played, steps = played + 1, steps + len(episode["rewards"])
        solved += episode.get("success", np.array([], bool)).tolist()
    journal.truncate(journal.tell())  # a record that was cut short
    done = min(goal, steps if unit == "steps" else played)
    bar = tqdm(total=goal, unit=unit[:-1], initial=done, disable=not progress)
    if progress:
        before = f"going on after {played} episodes; " if played else ""
        go_on = "if this is stopped, the same command goes on: finished episodes are kept in"
        bar.write(f"{before}{go_on} {part}", file=sys.stderr)
    stream = generate_episodes(script, env, turns, played, workers)
    try:
        while done < goal:
            episode = next(stream)
            _append(journal, episode)
            played, steps = played + 1, steps + len(episode["rewards"])
            solved += episode.get("success", np.array([], bool)).tolist()
            done = min(goal, steps if unit == "steps" else played)
            rate = f", {np.mean(solved):.0%} solved" if solved else ""
            bar.set_postfix_str(f"{played} episodes, {steps} steps{rate}", refresh=False)
            bar.update(done - bar.n)
    except KeyboardInterrupt:
        saved = f"stopped: {played} episodes with {steps} steps are saved in {part}; the same command goes on"
        bar.write(saved, file=sys.stderr)
        raise
    finally:
        stream.close()
        bar.close()


def _unstacked(name: str, episode: Episode) -> Any:
    """What ``_stacked`` called by that name."""
    if name in episode:
        return episode[name]
    keys = dict.fromkeys(column.removeprefix(f"{name}/").split("/")[0] for column in episode if column.startswith(name))
    return {key: _unstacked(f"{name}/{key}", episode) for key in keys}


def _append(journal: BinaryIO, episode: Episode) -> None:
    blob = save(episode)
    journal.write(HEADER.pack(len(blob), zlib.crc32(blob)) + blob)
    journal.flush()


def _read(journal: BinaryIO) -> Iterator[Episode]:
    """The whole episodes in the journal; afterwards it stands at the end of the last one."""
    end = 0
    journal.seek(0)
    while len(header := journal.read(HEADER.size)) == HEADER.size:
        length, checksum = HEADER.unpack(header)
        blob = journal.read(length)
        if len(blob) < length or zlib.crc32(blob) != checksum:
            break
        end += HEADER.size + length
        yield load(blob)
    journal.seek(end)


def _write_dataset(
    env: gym.Env, journal: BinaryIO, dataset_id: str, recipe: dict[str, Any], amount: dict[str, int], folder: Path
) -> None:
    """Turns the journal into a Minari dataset in ``folder``, which takes its final name only when it is whole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    storage = MinariStorage.new(folder / "data", env.observation_space, env.action_space, env.spec)
    storage.update_episodes(_buffers(journal, amount))
    storage.update_metadata(
        {
            "dataset_id": dataset_id,
            "minari_version": version("minari"),
            "algorithm_name": recipe["behaviour"],
            "description": f"{recipe['env_id']} played with {recipe['behaviour']} actions by kairos_gym.data.collect",
            "requirements": [f"{name}=={number}" for name, number in recipe["versions"].items()],
            "recipe": recipe | amount,
        }
    )
    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)


def _buffers(journal: BinaryIO, amount: dict[str, int]) -> Iterator[EpisodeBuffer]:
    """As many of the journal's episodes as were asked for; an earlier, larger request may have left more."""
    ((unit, goal),) = amount.items()
    done = 0
    for index, episode in enumerate(_read(journal)):
        if done >= goal:
            return
        done += len(episode["rewards"]) if unit == "steps" else 1
        (seed,) = episode["seed"].tolist()
        kept = ("observations", "actions", "rewards", "terminations", "truncations")
        yield EpisodeBuffer(id=index, seed=seed, **{name: _unstacked(name, episode) for name in kept})
