"""Loads the data that a model was trained on, by what its card says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import Behaviour, CollectConfig
from kairos_gym.data.datasets import load_dataset
from world_model.episodes import Episodes

# What has to be the same in two recordings by the same policies.
RECIPE = ("env_id", "seed", "steps", "episodes", "episode_steps", "behaviour", "policy_seed")


@dataclass(frozen=True)
class TrainingData:
    """The episodes that a model was trained on."""

    name: str  # of the dataset
    episodes: Episodes
    same: bool  # to the last bit; policies that react to observations act a little differently on another processor


def load_training_data(card: dict[str, Any]) -> TrainingData:
    """The training data that a model's ``card`` names; recorded again where they are missing and it says how.

    Data of policies that react to observations ("ladder", "expert") need only be of the same recipe.

    Raises ValueError where the card doesn't say, or where the dataset of that name holds other episodes;
    FileNotFoundError where there is none and it can't be recorded again.
    """
    data = card.get("data")
    if not isinstance(data, dict) or "dataset" not in data:
        raise ValueError(
            "the model's card doesn't say what it was trained on, so nothing can be fitted on the same data, and it "
            "can't be calibrated; compare can go without (references=False, --no-references)"
        )
    name = str(data["dataset"])
    try:
        dataset = load_dataset(name)
    except FileNotFoundError:
        amount = {unit: data[unit] for unit in ("steps", "episodes") if unit in data}
        if data.get("behaviour") not in get_args(Behaviour) or len(amount) != 1:
            raise
        config = CollectConfig(
            seed=data["seed"],
            episode_steps=data["episode_steps"],
            behaviour=data["behaviour"],
            policy_seed=data.get("policy_seed", 0),
            **amount,
        )
        dataset = collect(data["env_id"], name, config)
    episodes = Episodes.from_minari(dataset, range(dataset.total_episodes - data["held_out"]))
    same = episodes.fingerprint() == data.get("fingerprint", episodes.fingerprint())
    recipe = dataset.storage.metadata.get("recipe")
    same_recipe = isinstance(recipe, dict) and all(recipe.get(key) == data.get(key) for key in RECIPE)
    if not same and not (same_recipe and data.get("behaviour") in ("ladder", "expert")):
        raise ValueError(
            f"the dataset {name} here holds other episodes than the model was trained on: set MINARI_DATASETS_PATH to "
            "the folder that has the right ones, or go without references (references=False, --no-references)"
        )
    return TrainingData(name, episodes, same)
