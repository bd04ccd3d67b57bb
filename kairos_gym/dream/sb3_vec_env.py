"""DreamVecEnv: B dreams of one world model as a Stable-Baselines3 VecEnv, imagined in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from kairos_gym.dream.envs import DreamVectorEnv
from world_model.contract import Dynamics

try:
    from stable_baselines3.common.vec_env import VecEnv
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
except ImportError as error:
    raise ImportError("DreamVecEnv needs Stable-Baselines3: pip install 'kairos_gym[sb3]'") from error

TRUST = ("error_bound", "confidence", "steps")  # see ``DreamEnv.step``


class DreamVecEnv(VecEnv):
    """``num_envs`` dreams of ``model`` for Stable-Baselines3; a dream that ends begins again in the same step.

    Takes all arguments of ``DreamVectorEnv`` (``venv.dreams``) except autoreset_mode. Each info has
    "TimeLimit.truncated", "trust" with max_error or confidence, and where the dream ended "terminal_observation" and
    perhaps "non_finite". ``get_attr``, ``set_attr`` and ``env_method`` reach each dream as a ``DreamEnv``.
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
        obs, rewards, terminated, truncated, vector_infos = self.dreams.step(self._actions)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in self.rows]
        done = terminated | truncated
        if done.any():
            non_finite = vector_infos["final_info"].get("non_finite", np.zeros_like(done))
            for b in np.flatnonzero(done):
                infos[b]["terminal_observation"] = vector_infos["final_obs"][b]
                infos[b]["TimeLimit.truncated"] = bool(truncated[b] and not terminated[b])
                if non_finite[b]:
                    infos[b]["non_finite"] = True
        if "trust" in vector_infos:
            trust = vector_infos["trust"]
            if done.any():  # an ended dream reports the bound at its end, not the one that its next episode begins with
                final = vector_infos["final_info"]["trust"]
                trust = {key: np.where(done, final[key], trust[key]) for key in TRUST}
            for info, *values in zip(infos, *(trust[key].tolist() for key in TRUST), strict=True):
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
