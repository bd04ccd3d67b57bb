"""ChunkedActions: a simulator that takes K actions a step, as the dream with chunk=K does."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from world_model.spaces import ActionCheck, chunked


class ChunkedActions(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Plays the actions [K,A] of one step one after the other and stops where the episode ends.

    A step returns the last observation [O], the sum of the rewards up to it, ``terminated``, ``truncated``, and the
    last inner step's info with ``info["inner"]`` added: ``obs`` [k,O], ``reward`` [k] and ``terminated`` [k] of the
    k <= K inner steps that were played. A chunk of Discrete actions is a MultiDiscrete [K]. Raises ValueError for a
    chunk below 1 or another action space; ``step`` raises TypeError for actions that aren't numbers and ValueError for
    a wrong shape, a NaN, or an action out of bounds.
    """

    def __init__(self, env: gym.Env, chunk: int):
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk is the number of actions a step plays, a whole number from 1 on, got {chunk!r}")
        single = env.action_space
        if not isinstance(single, spaces.Box | spaces.Discrete):
            raise ValueError(f"chunks are made of actions from a Box or a Discrete space; this env has {single}")
        gym.utils.RecordConstructorArgs.__init__(self, chunk=chunk)
        gym.Wrapper.__init__(self, env)
        self.chunk = chunk
        self.action_space = chunked(single, chunk)
        self._check = ActionCheck(self.action_space)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        actions = self._check(action)
        obs, rewards, terminations = [], [], []
        for single in actions:
            last, reward, terminated, truncated, info = self.env.step(single)
            obs.append(last)
            rewards.append(float(reward))
            terminations.append(bool(terminated))
            if terminated or truncated:
                break
        inner = {"obs": _stack(obs), "reward": np.array(rewards), "terminated": np.array(terminations)}
        return last, float(sum(rewards)), bool(terminated), bool(truncated), {**info, "inner": inner}


def _stack(obs: list[Any]) -> Any:
    if isinstance(obs[0], dict):
        return {key: _stack([part[key] for part in obs]) for key in obs[0]}
    return np.stack(obs)
