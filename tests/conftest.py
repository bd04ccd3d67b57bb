"""What every test gets: one torch thread, so that shared machines are neither crowded nor slow, and no deadlines."""

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, and when a kernel is defined
# On CI the same examples every time: there a change is tested, not luck.
settings.register_profile("kairos", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("kairos")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The model and the arguments of each DreamVecEnv that is made from here on."""
    import kairos_gym.dream.sb3_vec_env

    found: list[tuple[Any, dict[str, Any]]] = []

    class Spied(kairos_gym.dream.sb3_vec_env.DreamVecEnv):
        def __init__(self, model: Any, num_envs: int, **kwargs: Any):
            found.append((model, kwargs))
            super().__init__(model, num_envs, **kwargs)

    monkeypatch.setattr("kairos_gym.dream.sb3_vec_env.DreamVecEnv", Spied)
    return found
