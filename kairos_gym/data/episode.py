"""RecordedEpisode: plays an episode of a real simulator and records it, whoever chooses the actions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
from numpy.typing import NDArray


class RecordedEpisode:
    """An episode of ``env``, from ``reset(seed=seed)`` on, and all that it has shown so far.

    After T steps there are T actions, rewards, terminations and truncations; and T+1 observations and successes, those
    of the reset first. A success is None where the simulator doesn't report any.
    """

    def __init__(self, env: gym.Env, seed: int):
        self.env = env
        obs, info = env.reset(seed=seed)
        self.observations: list[Any] = [obs]
        self.successes = [success_of(info)]
        self.actions: list[Any] = []
        self.rewards: list[float] = []
        self.terminations: list[bool] = []
        self.truncations: list[bool] = []

    @property
    def obs(self) -> Any:
        """The present observation."""
        return self.observations[-1]

    @property
    def done(self) -> bool:
        """Whether the episode has ended."""
        return bool(self.terminations) and (self.terminations[-1] or self.truncations[-1])

    def step(self, action: Any) -> None:
        """Play an element of the action space."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.observations.append(obs)
        self.actions.append(action)
        self.rewards.append(float(reward))
        self.terminations.append(bool(terminated))
        self.truncations.append(bool(truncated))
        self.successes.append(success_of(info))

    def play(self, actions: Iterable[NDArray[Any]]) -> list[Any]:
        """Play actions [K,...] of any dtype in a row, until the episode ends -> the observations that followed."""
        first = len(self.observations)
        for action in actions:
            if self.done:
                break
            self.step(action.astype(self.env.action_space.dtype))
        return self.observations[first:]


def success_of(info: dict[str, Any]) -> bool | None:
    """What a simulator reports of success in the ``info`` of a step or a reset; None where it reports nothing."""
    for key in ("is_success", "success"):
        if key in info:
            return bool(info[key])
    return None
