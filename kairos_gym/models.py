"""Finds and loads models: those that ship with the package, and those in a folder or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from world_model.model.world_model import WorldModel

ZOO = Path(__file__).parent / "zoo"


def shipped() -> list[str]:
    """The names of the models that ship with the package."""
    return sorted(config.parent.name for config in ZOO.glob("*/config.json"))


def load(source: str | Path) -> WorldModel:
    """The model that ``source`` names: one that ships with the package, a folder, or a hub id like "user/model".

    A shipped name wins over a folder of the same name: write "./reacher" for the folder. Raises FileNotFoundError where
    there is no such model (it lists the shipped ones), ValueError where its files are damaged.
    """
    if source in shipped():
        return WorldModel.from_pretrained(ZOO / source)
    if not Path(source).exists() and str(source).count("/") != 1:  # neither a folder nor "user/model"
        raise FileNotFoundError(f"no model {str(source)!r}: {_choices()}")
    try:
        return WorldModel.from_pretrained(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {_choices()}") from error


def _choices() -> str:
    names = ", ".join(shipped()) or "none in this copy"
    return f"the models that ship with kairos_gym are: {names}; else give a folder or a hub id like 'user/model'"
