"""A checkpoint: a folder of JSON and safetensors, which holds a model and what belongs to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from world_model.conformal import ConformalBound
from world_model.contract import Spec
from world_model.episodes import StartStates
from world_model.files import save_atomically, write_atomically
from world_model.model.config import WorldModelConfig
from world_model.spaces import space_from_json, space_to_json


class Checkpoint(NamedTuple):
    """What is saved of a ``WorldModel``."""

    config: WorldModelConfig
    spec: Spec
    weights: Mapping[str, Tensor]
    starts: StartStates | None
    trust: ConformalBound | None
    card: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Each file is written whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        spaces = {name: space_to_json(getattr(self.spec, name)) for name in ("observation_space", "action_space")}
        about = {"world_model": asdict(self.config), "spec": {**spaces, "dt": self.spec.dt}}
        write_atomically(folder / "config.json", json.dumps(about, indent=2).encode())
        save_atomically(folder / "model.safetensors", self.weights)
        if self.starts is not None:
            save_atomically(folder / "starts.safetensors", self.starts._asdict())
        if self.trust is not None:
            save_atomically(folder / "trust.safetensors", self.trust.tensors())
        else:  # an older one would be of other weights
            (folder / "trust.safetensors").unlink(missing_ok=True)
        write_atomically(folder / "card.json", json.dumps(self.card, indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Raises whatever a damaged file leads to. Whether the files fit each other is for the model to check."""
        about = json.loads((folder / "config.json").read_text())
        config, facts = WorldModelConfig.from_dict(about["world_model"]), about["spec"]
        observation_space, action_space = map(space_from_json, (facts["observation_space"], facts["action_space"]))
        spec = Spec(observation_space, action_space, config.chunk, float(facts["dt"]))
        weights = load_file(folder / "model.safetensors")
        if not all(bool(t.isfinite().all()) for t in weights.values()):
            raise ValueError("model.safetensors holds weights that are not finite")
        starts, trust, card = None, None, {}
        if (path := folder / "starts.safetensors").is_file():
            starts = StartStates(**load_file(path))
        if (path := folder / "trust.safetensors").is_file():
            trust = ConformalBound.load(path)
        if (path := folder / "card.json").is_file():
            card = json.loads(path.read_text())
        return cls(config, spec, weights, starts, trust, card)


def find_checkpoint(source: str | Path) -> Path:
    """The folder ``source``, or a download of the hub repository of that name.

    Raises FileNotFoundError where there is neither, or a file is missing that every checkpoint has.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise FileNotFoundError(
                f"no model at {str(source)!r}: neither a folder nor a hub repository that can be reached ({error})"
            ) from error
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: it isn't a folder that save_pretrained wrote, or it is incomplete"
            )
    return folder
