"""Makes the real simulator that a model dreams of."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from typing import Any

import gymnasium as gym

from envs.chunked import ChunkedActions


def make_real(env_id: str, *, chunk: int = 1, **gym_kwargs: Any) -> gym.Env:
    """The simulator ``env_id``; with chunk=K its step takes K actions [K,A] and is the dream's step with chunk=K.

    chunk=1 is ``gym.make(env_id, **gym_kwargs)`` itself. An id may carry arguments, Python literals or words:
    "robosuite/Lift-v0,robots=Sawyer,cameras=('agentview',)". Raises ImportError where the task needs MuJoCo or
    robosuite and that is not installed, ValueError for a chunk below 1 or arguments of another form, and Gymnasium's
    own error for an unknown ``env_id``.
    """
    env_id, _, arguments = env_id.partition(",")
    gym_kwargs = _parse_arguments(arguments) | gym_kwargs
    try:
        env = gym.make(env_id, **gym_kwargs)
    except (ImportError, gym.error.DependencyNotInstalled) as error:
        if find_spec("mujoco") is None and not env_id.startswith("robosuite/"):
            raise ImportError(
                f"{env_id} needs the MuJoCo simulator, which is not installed: pip install 'kairos_gym[mujoco]'"
            ) from error
        raise
    return env if chunk == 1 else ChunkedActions(env, chunk)


def _parse_arguments(arguments: str) -> dict[str, Any]:
    """ "robots=Sawyer,control_freq=10" as a dict."""
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or None in [word.arg for word in call.keywords]:
            raise ValueError
        pairs = [(str(word.arg), word.value) for word in call.keywords]
        parsed = {n: v.id if isinstance(v, ast.Name) else ast.literal_eval(v) for n, v in pairs}
        if len(parsed) < len(pairs):
            raise ValueError
        return parsed
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(
            f"arguments of a simulator look like name=value,name=value, each once, got {arguments!r}"
        ) from error
