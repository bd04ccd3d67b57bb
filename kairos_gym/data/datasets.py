"""Finds recorded experience again: Minari datasets, and the simulators that they were recorded in."""

from __future__ import annotations

import minari
from minari.storage.datasets_root_dir import get_dataset_path


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
