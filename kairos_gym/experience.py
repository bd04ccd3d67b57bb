"""What a model was trained on, found again by what its card says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kairos_gym.collect import collect, recorded
from world_model.episodes import Episodes


@dataclass(frozen=True)
class Experience:
    """The episodes of a training, and the dataset's name."""

    name: str
    episodes: Episodes


def experience(card: dict[str, Any]) -> Experience:
    """The training data that a model's ``card`` names; recorded again where they are gone and it says how.

    Raises ValueError where the card doesn't say, or where the dataset of that name holds other episodes;
    FileNotFoundError where there is none and it can't be recorded again.
    """
    data = card.get("data")
    if not isinstance(data, dict) or "dataset" not in data:
        raise ValueError(
            "the model's card doesn't say what it was trained on, so nothing can be fitted on the same data: go "
            "without references (references=False, --no-references)"
        )
    name = str(data["dataset"])
    try:
        dataset = recorded(name)
    except FileNotFoundError:
        amount = {unit: data[unit] for unit in ("steps", "episodes") if unit in data}
        if data.get("behaviour") not in ("uniform", "held", "mixed", "ladder") or len(amount) != 1:
            raise
        dataset = collect(
            data["env_id"],
            name,
            seed=data["seed"],
            episode_steps=data["episode_steps"],
            behaviour=data["behaviour"],
            **amount,
        )
    episodes = Episodes.from_minari(dataset, range(dataset.total_episodes - data["held_out"]))
    if episodes.fingerprint() != data.get("fingerprint", episodes.fingerprint()):
        raise ValueError(
            f"the dataset {name} here holds other episodes than the model was trained on: set MINARI_DATASETS_PATH to "
            "the folder that has the right ones, or go without references (references=False, --no-references)"
        )
    return Experience(name, episodes)
