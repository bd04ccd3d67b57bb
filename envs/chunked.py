"""ChunkedActions: a simulator that takes K actions a step, the same decision process as the dream with chunk=K."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


class ChunkedActions(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Plays the actions [K,A] of one step one after the other and stops where the episode ends.

    A step returns the last observation [O], the sum of the rewards up to it, ``terminated``, ``truncated``, and the
    last inner step's info with ``info["inner"]`` added: ``obs`` [k,O], ``reward`` [k] and ``terminated`` [k] of the
    k <= K inner steps that were played. Raises ValueError for a chunk below 1 or an action space that is no Box of
    shape [A]; ``step`` raises ValueError for actions of another shape, with a NaN, or out of the space's bounds.
    """

    def __init__(self, env: gym.Env, chunk: int):
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk is the number of actions a step plays, a whole number from 1 on, got {chunk!r}")
        single = env.action_space
        if not isinstance(single, spaces.Box) or len(single.shape) != 1:
            raise ValueError(f"chunks are made of continuous actions, a Box of shape [A]; this env has {single}")
        gym.utils.RecordConstructorArgs.__init__(self, chunk=chunk)
        gym.Wrapper.__init__(self, env)
        self.chunk = chunk
        self.action_space = spaces.Box(
            np.tile(single.low, (chunk, 1)), np.tile(single.high, (chunk, 1)), dtype=single.dtype.type
        )

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        actions = self._checked(action)
        obs, rewards, ends = [], [], []
        for single in actions:
            last, reward, terminated, truncated, info = self.env.step(single)
            obs.append(last)
            rewards.append(float(reward))
            ends.append(bool(terminated))
            if terminated or truncated:
                break
        inner = {"obs": np.stack(obs), "reward": np.array(rewards), "terminated": np.array(ends)}
        return last, float(sum(rewards)), bool(terminated), bool(truncated), {**info, "inner": inner}

    def _checked(self, action: Any) -> NDArray[Any]:
        space = self.action_space
        assert isinstance(space, spaces.Box)
        try:
            actions = np.asarray(action, dtype=space.dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"actions must be an array of numbers of shape {space.shape}, got {action!r}") from error
        if actions.shape != space.shape:
            raise ValueError(
                f"actions have shape {actions.shape}, expected {space.shape}: {self.chunk} actions of "
                f"{space.shape[1]} numbers for each step of chunk={self.chunk}"
            )
        if not np.isfinite(actions).all():
            raise ValueError(f"actions must be finite, got {actions.tolist()}: look for a NaN in what chose them")
        outside = (actions < space.low) | (actions > space.high)
        if outside.any():
            k, a = np.argwhere(outside)[0]
            raise ValueError(
                f"action [{k},{a}] is {actions[k, a]:g}, outside [{space.low[k, a]:g}, {space.high[k, a]:g}]: clip "
                "or rescale it to env.action_space before the step"
            )
        return actions
