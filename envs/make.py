"""Makes the real simulator that a dream stands in for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import gymnasium as gym

from .chunked import ChunkedActions


def make_real(env_id: str, *, chunk: int = 1, **gym_kwargs: Any) -> gym.Env:
    """The simulator ``env_id``; with chunk=K its step takes K actions [K,A] and is the dream's step with chunk=K.

    chunk=1 is ``gym.make(env_id, **gym_kwargs)`` itself. Raises ImportError where the task needs MuJoCo or robosuite
    and that is not installed, ValueError for a chunk below 1, and Gymnasium's own error for an unknown ``env_id``.
    """
    try:
        env = gym.make(env_id, **gym_kwargs)
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        if find_spec("mujoco") is None and not env_id.startswith("robosuite/"):
            raise ImportError(
                f"{env_id} needs the MuJoCo simulator, which is not installed: pip install 'kairos_gym[mujoco]'"
            ) from error
        raise
    return env if chunk == 1 else ChunkedActions(env, chunk)
