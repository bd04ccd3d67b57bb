"""Makes the real simulator that a dream stands in for."""

from __future__ import annotations

from ast import literal_eval
from importlib.util import find_spec
from typing import Any

import gymnasium as gym

from .chunked import ChunkedActions


def make_real(env_id: str, *, chunk: int = 1, **gym_kwargs: Any) -> gym.Env:
    """The simulator ``env_id``; with chunk=K its step takes K actions [K,A] and is the dream's step with chunk=K.

    chunk=1 is ``gym.make(env_id, **gym_kwargs)`` itself. An id may bring arguments along, Python literals or words:
    "robosuite/Lift-v0,robots=Sawyer,control_freq=10". Raises ImportError where the task needs MuJoCo or robosuite and
    that is not installed, ValueError for a chunk below 1 or an argument without a "=", and Gymnasium's own error for an
    unknown ``env_id``.
    """
    env_id, *arguments = env_id.split(",")
    gym_kwargs = dict(map(_parsed, arguments)) | gym_kwargs
    try:
        env = gym.make(env_id, **gym_kwargs)
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        if find_spec("mujoco") is None and not env_id.startswith("robosuite/"):
            raise ImportError(
                f"{env_id} needs the MuJoCo simulator, which is not installed: pip install 'kairos_gym[mujoco]'"
            ) from error
        raise
    return env if chunk == 1 else ChunkedActions(env, chunk)


def _parsed(argument: str) -> tuple[str, Any]:
    name, equals, text = argument.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"arguments of a simulator look like name=value, got {argument!r}")
    try:
        return name, literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text
