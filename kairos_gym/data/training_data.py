"""What a model was trained on, found again by what its card says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import Behaviour, CollectConfig
from kairos_gym.data.datasets import load_dataset
from world_model.episodes import Episodes

RECIPE = (
    "env_id",
    "seed",
    "steps",
    "episodes",
    "episode_steps",
    "behaviour",
    "policy_seed",
)  # what two recordings may share


@dataclass(frozen=True)
class TrainingData:
    """The episodes of a training, the dataset's name, and whether they are the very same to the last bit.

    They may not be where policies that look played: on another processor these act a little differently.
    """

    name: str
    episodes: Episodes
    same: bool


def load_training_data(card: dict[str, Any]) -> TrainingData:
    """The training data that a model's ``card`` names; recorded again where they are gone and it says how.

    Of data that policies which look played ("ladder", "expert"), those of the same recipe will do.

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
    found = dataset.storage.metadata.get("recipe")
    alike = isinstance(found, dict) and all(found.get(key) == data.get(key) for key in RECIPE)
    if not same and not (alike and data.get("behaviour") in ("ladder", "expert")):
        raise ValueError(
            f"the dataset {name} here holds other episodes than the model was trained on: set MINARI_DATASETS_PATH to "
            "the folder that has the right ones, or go without references (references=False, --no-references)"
        )
    return TrainingData(name, episodes, same)
