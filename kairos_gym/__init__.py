"""Kairos Gym: a learned world model as a Gymnasium environment, with planners, measured against the real simulator."""

import importlib.util
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["DreamEnv", "DreamVectorEnv", "load", "shipped"]


def _refuse_shadows() -> None:
    """Raise ImportError where a user's file would be imported instead of one of our other packages.

    ``envs`` is a common name for a folder. Without this check the import would fail later, with an unrelated error.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("world_model", "planners", "envs"):
        spec = importlib.util.find_spec(name)  # finds it without importing it
        if spec is None:
            continue
        # A plain folder without __init__.py has no file, only search locations; Python takes the first.
        place = Path(spec.origin or next(iter(spec.submodule_search_locations or ())))
        if home / name not in (place.resolve(), place.resolve().parent):
            raise ImportError(
                f"{place} shadows kairos_gym's own package {name!r}, which is {home / name}: rename yours, or start "
                "Python where it isn't found first on sys.path"
            )


_refuse_shadows()

# Only now, since these import the packages that may be shadowed.
import gymnasium  # noqa: E402

from kairos_gym.dream.envs import DreamEnv, DreamVectorEnv  # noqa: E402
from kairos_gym.models import load, shipped  # noqa: E402

gymnasium.register(
    id="kairos_gym/Dream-v0",
    entry_point="kairos_gym.dream.envs:DreamEnv",
    vector_entry_point="kairos_gym.dream.envs:DreamVectorEnv",
)
gymnasium.register(
    id="kairos_gym/CartPoleSwingUp-v0", entry_point="envs.swingup:CartPoleSwingUpEnv", max_episode_steps=250
)
# Time limits at 20 steps a second, several times what a purposeful arm needs: Lift and Door are one movement, Stack and
# one nut or one object each are two, and Wipe goes over a whole table.
for _task, _steps in {
    "Lift": 200,
    "Stack": 300,
    "Door": 300,
    "NutAssembly": 500,
    "PickPlace": 1000,
    "Wipe": 500,
}.items():
    gymnasium.register(
        id=f"robosuite/{_task}-v0",
        entry_point="envs.robosuite:RobosuiteEnv",
        kwargs={"task": _task},
        max_episode_steps=_steps,
    )


def __getattr__(name: str) -> Any:
    """Import ``DreamVecEnv`` when it is first used, because it needs Stable-Baselines3."""
    if name == "DreamVecEnv":
        from kairos_gym.dream.sb3_vec_env import DreamVecEnv

        return DreamVecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
