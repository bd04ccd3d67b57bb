"""Recorded episodes, such as Minari's, and the windows of them that training and dreams start from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from world_model.contract import Spec
from world_model.spaces import flatten


@dataclass(frozen=True)
class Episodes:
    """All frames of all episodes, one after another; frame t holds obs_t and the step that led to it.

    obs [F,O], action [F,A] (zero at an episode's first frame), reward [F], all float32; terminated [F], bool; int64
    index [F] and left [F]: how many frames of the same episode come before and after.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    index: Tensor
    left: Tensor

    @classmethod
    def stack(cls, episodes: Iterable[tuple[Any, Any, Any, Any]]) -> Episodes:
        """Join episodes, each (observations [T+1,O], actions [T,A], rewards [T], terminated [T]).

        Raises ValueError where there is no episode, or one has a missing part, lengths that don't fit, or numbers that
        are not finite in float32.
        """
        parts: list[tuple[np.ndarray, ...]] = []
        for number, episode in enumerate(episodes):
            arrays = []
            for name, values in zip(("observations", "actions", "rewards", "terminated"), episode, strict=True):
                if values is None or np.ndim(values) == 0:
                    raise ValueError(f"episode {number} has no {name}, which a world model needs; record them too")
                array = np.asarray(values)
                if array.dtype.kind not in "fiub":
                    raise ValueError(f"episode {number} has {name} of {array.dtype}; a world model takes numbers")
                with np.errstate(over="ignore"):
                    array = array.astype(np.float32)
                if not np.isfinite(array).all():
                    raise ValueError(f"episode {number} has {name} that are not finite in float32; repair or drop it")
                arrays.append(array)
            obs, action, reward, ended = arrays
            steps = len(action)
            fits = obs.ndim == action.ndim == 2 and len(obs) == steps + 1 and reward.shape == ended.shape == (steps,)
            if not fits or (parts and (obs.shape[1], action.shape[1]) != (parts[0][0].shape[1], parts[0][1].shape[1])):
                raise ValueError(
                    f"episode {number}: expected observations [T+1,O], actions [T,A], rewards [T], terminated [T], "
                    f"O and A as in the first episode, got {obs.shape}, {action.shape}, {reward.shape}, {ended.shape}"
                )
            action = np.concatenate([np.zeros_like(action, shape=(1, action.shape[1])), action])
            index = np.arange(steps + 1)
            parts.append((obs, action, np.r_[np.float32(0), reward], np.r_[False, ended > 0], index, index[::-1]))
        if not parts:
            raise ValueError("no episodes: collect some first (kairos collect)")
        obs, action, reward, ended, index, left = (np.concatenate(column) for column in zip(*parts, strict=True))
        return cls(*(torch.as_tensor(column) for column in (obs, action, reward, ended, index, left)))

    @classmethod
    def from_minari(cls, dataset: Any, ids: Iterable[int] | None = None) -> Episodes:
        """The episodes ``ids`` of a ``minari.MinariDataset``, or all of them."""
        return cls.stack(
            (
                flatten(dataset.observation_space, e.observations),
                flatten(dataset.action_space, e.actions),
                e.rewards,
                e.terminations,
            )
            for e in dataset.iterate_episodes(None if ids is None else list(ids))
        )

    @classmethod
    def join(cls, parts: Sequence[Episodes]) -> Episodes:
        """All episodes of ``parts``, in their order. Raises ValueError where ``parts`` is empty, or O or A differ."""
        if not parts or len({(part.obs.shape[1], part.action.shape[1]) for part in parts}) != 1:
            raise ValueError(f"expected episodes of one kind, got {[list(part.obs.shape) for part in parts]}")
        return cls(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))

    def pick(self, which: Callable[[int], bool]) -> Episodes:
        """The episodes for whose number ``which`` returns True."""
        number = (self.index == 0).cumsum(0) - 1
        chosen = torch.tensor([which(e) for e in range(len(self.starts()))], dtype=torch.bool)
        return Episodes(*(column[chosen[number]] for column in vars(self).values()))

    def fingerprint(self) -> str:
        """A short digest of the data: equal for equal episodes."""
        digest = hashlib.sha256()
        for tensor in (self.obs, self.action, self.reward, self.terminated, self.index):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def shared(self, other: Episodes) -> Tensor:
        """For each frame of ``other``: whether these episodes contain the very step that led to it -> bool [F].

        A step is (observation, action, next observation), compared bit by bit.
        """

        def steps(episodes: Episodes) -> tuple[np.ndarray, Tensor]:
            at = (episodes.index > 0).nonzero()[:, 0]
            rows = torch.cat([episodes.steps(), episodes.obs[at]], 1).contiguous().numpy()
            return rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0], at

        (own, _), (others, at) = steps(self), steps(other)
        result = torch.zeros(len(other.obs), dtype=torch.bool)
        result[at] = torch.from_numpy(np.isin(others, own))
        return result

    def known_steps(self, other: Episodes) -> Tensor:
        """For each episode of ``other``: how many of its steps these episodes contain -> float [E]."""
        number = (other.index == 0).cumsum(0) - 1
        return torch.zeros(len(other.starts())).index_add(0, number, self.shared(other).float())

    def holds(self, other: Episodes) -> Tensor:
        """For each episode of ``other``: whether these contain all of its steps -> bool [E]; False without steps."""
        length = other.left[other.starts()]
        return (self.known_steps(other) == length) & (length > 0)

    def cut(self, steps: int) -> Episodes:
        """The first ``steps`` steps of every episode."""
        keep = self.index <= steps
        left = torch.minimum(self.left, steps - self.index)
        return Episodes(*(x[keep] for x in (self.obs, self.action, self.reward, self.terminated, self.index, left)))

    def steps(self) -> Tensor:
        """The observation and the action of every step, [S,O+A]."""
        at = (self.index > 0).nonzero()[:, 0]
        return torch.cat([self.obs[at - 1], self.action[at]], 1)

    def starts(self) -> Tensor:
        """The index of each episode's first frame, int64 [E]."""
        return (self.index == 0).nonzero()[:, 0]

    def windows(self, at: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Windows of ``frames`` frames from frames ``at`` [B] -> obs, action, reward, terminated, valid: [B,T,...].

        Beyond the end of its episode a window repeats the last frame, with valid False.
        """
        rows = at[:, None] + torch.arange(frames)
        end = (at + self.left[at])[:, None]
        valid = rows <= end
        rows = torch.minimum(rows, end)
        return self.obs[rows], self.action[rows], self.reward[rows], self.terminated[rows] & valid, valid


class StartStates(NamedTuple):
    """S real windows of T frames, which dreams start from."""

    obs: Tensor  # [S,T,O]
    actions: Tensor  # [S,T,A], the actions that led to each observation


def spec_of(env: gym.Env, chunk: int) -> Spec:
    """The ``Spec`` of a simulator: its spaces, and its attribute ``dt`` in seconds (1 where it has none).

    Raises ValueError on spaces that ``Spec`` doesn't accept.
    """
    return Spec(env.observation_space, env.action_space, chunk, float(getattr(env.unwrapped, "dt", 1.0)))
