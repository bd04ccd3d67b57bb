"""DreamVecEnv: B dreams of one world model as a Stable-Baselines3 VecEnv, imagined in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from kairos_gym.dream.vector_env import DreamVectorEnv
from world_model.contract import Dynamics

try:
    from stable_baselines3.common.vec_env import VecEnv
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
except ImportError as error:
    raise ImportError("DreamVecEnv needs Stable-Baselines3: pip install 'kairos_gym[sb3]'") from error

TRUST = ("error_bound", "confidence", "steps")  # see ``DreamEnv.step``


class DreamVecEnv(VecEnv):
    """``num_envs`` dreams of ``model`` for Stable-Baselines3; a dream that ends begins again in the same step.

    Takes all arguments of ``DreamVectorEnv`` but the autoreset mode. An ended dream's info has "terminal_observation";
    every info has "TimeLimit.truncated", "trust" where it was asked for, and "non_finite" where the dream was lost.
    ``get_attr``, ``set_attr`` and ``env_method`` reach each dream as a ``DreamEnv``. What was imagined inside the
    chunks is in ``venv.dreams``.
    """

    def __init__(self, model: str | Path | Dynamics, num_envs: int = 1, **kwargs: Any):
        self.dreams = DreamVectorEnv(model, num_envs, autoreset_mode=AutoresetMode.SAME_STEP, **kwargs)
        self.rows = [self.dreams.row(b) for b in range(self.dreams.num_envs)]
        super().__init__(num_envs, self.dreams.single_observation_space, self.dreams.single_action_space)

    def reset(self) -> VecEnvObs:
        seeds, options = self._seeds, self._options
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{} for _ in self.rows]
        if not any(options):
            return self.dreams.reset(seed=seeds)[0]
        for env, seed, own in zip(self.rows, seeds, options, strict=True):
            env.reset(seed=seed, options=own)
        return self.dreams.observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, terminated, truncated, about = self.dreams.step(self._actions)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in self.rows]
        done = terminated | truncated
        if done.any():
            lost = about["final_info"].get("non_finite", np.zeros_like(done))
            for b in np.flatnonzero(done):
                infos[b]["terminal_observation"] = about["final_obs"][b]
                infos[b]["TimeLimit.truncated"] = bool(truncated[b] and not terminated[b])
                if lost[b]:
                    infos[b]["non_finite"] = True
        if "trust" in about:
            told = about["trust"]
            if done.any():  # of an ended dream what it ended with, not what its next episode begins with
                told = {key: np.where(done, about["final_info"]["trust"][key], told[key]) for key in TRUST}
            for info, *values in zip(infos, *(told[key].tolist() for key in TRUST), strict=True):
                info["trust"] = dict(zip(TRUST, values, strict=True))
        return obs, rewards.astype(np.float32), done, infos

    def close(self) -> None:
        self.dreams.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [self.rows[b].get_wrapper_attr(attr_name) for b in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        for b in self._get_indices(indices):
            setattr(self.rows[b], attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        return [getattr(self.rows[b], method_name)(*method_args, **method_kwargs) for b in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> list[np.ndarray | None]:
        return list(self.dreams.render()) if self.render_mode else [None for _ in self.rows]
