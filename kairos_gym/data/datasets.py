"""Minari datasets, written and loaded, and the simulators that they were recorded in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path

from kairos_gym.data.actors import Episode


def load_dataset(dataset_id: str) -> minari.MinariDataset:
    """The Minari dataset of that name. Raises FileNotFoundError, with the way to get one, where there is none."""
    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no dataset {dataset_id} at {get_dataset_path(dataset_id)}: record one with `kairos collect SIMULATOR "
            f"{dataset_id} --episodes N`, or set MINARI_DATASETS_PATH to the folder that has it"
        ) from error


def simulator_of(dataset: minari.MinariDataset) -> str | None:
    """The id that ``gym.make`` takes of the simulator a dataset was recorded in, or None where it doesn't say."""
    recipe = dataset.storage.metadata.get("recipe")
    if isinstance(recipe, dict) and "env_id" in recipe:
        return str(recipe["env_id"])
    return None if dataset.env_spec is None else str(dataset.env_spec.id)


def write_dataset(
    folder: Path, dataset_id: str, env: gym.Env, episodes: Iterable[Episode], recipe: dict[str, Any]
) -> None:
    """Write ``episodes`` of ``env`` to ``folder`` as the Minari dataset ``dataset_id``; recipe: what made them."""
    folder.mkdir()
    storage = MinariStorage.new(folder / "data", env.observation_space, env.action_space, env.spec)
    storage.update_episodes(_buffers(episodes))
    storage.update_metadata(
        {
            "dataset_id": dataset_id,
            "minari_version": version("minari"),
            "algorithm_name": recipe["behaviour"],
            "description": f"{recipe['env_id']} played with {recipe['behaviour']} actions by kairos_gym.data.collect",
            "requirements": [f"{name}=={number}" for name, number in recipe["versions"].items()],
            "recipe": recipe,
        }
    )
    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)


def _buffers(episodes: Iterable[Episode]) -> Iterator[EpisodeBuffer]:
    columns = ("observations", "actions", "rewards", "terminations", "truncations")
    for index, episode in enumerate(episodes):
        (seed,) = episode["seed"].tolist()
        yield EpisodeBuffer(id=index, seed=seed, **{name: _unstacked(name, episode) for name in columns})


def _unstacked(name: str, episode: Episode) -> Any:
    """A column [T,...]; of a Dict space a dict of its parts' columns, which are called "name/key"."""
    if name in episode:
        return episode[name]
    keys = dict.fromkeys(column.removeprefix(f"{name}/").split("/")[0] for column in episode if column.startswith(name))
    return {key: _unstacked(f"{name}/{key}", episode) for key in keys}
