"""What a step of many dreams gives back, in tensors and in numpy, before an env hands it out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kairos_gym.dream.step_function import to_numpy
from world_model.contract import Imagined


class InnerSteps(NamedTuple):
    """``Imagined`` in numpy. Read-only, for its memory is shared: the dreams keep it, and so may the model."""

    obs: Any  # [R,K,O] or None
    reward: NDArray[Any]  # [R,K]
    terminated: NDArray[np.bool_]  # [R,K]

    @classmethod
    def of(cls, imagined: Imagined) -> InnerSteps:
        obs, reward, ends = imagined.obs, imagined.reward, imagined.terminated
        arrays = cls(None if obs is None else obs.numpy(force=True), reward.numpy(force=True), ends.numpy(force=True))
        for array in arrays:
            if array is not None:
                array.flags.writeable = False
        return arrays


def is_uneventful(imagined: Imagined, inner: InnerSteps | None) -> bool:
    """Whether nothing ends and all is finite, told fast; numbers whose squares are infinite need a closer look.

    inner: ``imagined`` in numpy where that costs no copy, which is faster on little.
    """
    if inner is None:
        size = sum(x.detach().square().sum() for x in imagined[:2] if x is not None)
        return math.isfinite(size) and not bool(imagined.terminated.any())
    obs, reward, ends = inner
    norm = np.vdot(reward, reward) if obs is None else np.vdot(reward, reward) + np.vdot(obs, obs)
    return math.isfinite(norm) and not np.count_nonzero(ends)


class StepEnds(NamedTuple):
    """How a step ended."""

    terminated: NDArray[np.bool_]  # [R]
    truncated: NDArray[np.bool_]  # [R] by the limit, since it may be too wrong by now, or since the dream is lost
    lost: NDArray[np.bool_]  # [R] not finite any more


class ErrorBound(NamedTuple):
    """How wrong each dream may be after a step."""

    bound: NDArray[np.float64]  # [R] that the error won't pass, with the env's confidence
    steps: NDArray[np.int64]  # [R] since the last real frame


class Step:
    """What R dreams give back, up to the inner step that ends an episode.

    ``imagined`` holds all K inner steps, as the model said them, and so does ``inner``, in numpy.
    """

    __slots__ = ("_inner", "_obs", "_reward", "ends", "error_bound", "imagined")

    def __init__(
        self,
        imagined: Imagined,
        ends: StepEnds,
        inner: InnerSteps | None = None,
        obs: Tensor | None = None,
        reward: Tensor | None = None,
        error_bound: ErrorBound | None = None,
    ):
        """Without ``obs`` [R,O] and ``reward`` [R] all inner steps count. believed: None where nobody asked."""
        self.imagined, self.ends, self._inner, self.error_bound = imagined, ends, inner, error_bound
        self._obs, self._reward = obs, reward

    @property
    def inner(self) -> InnerSteps:
        if self._inner is None:
            self._inner = InnerSteps.of(self.imagined)
        return self._inner

    @property
    def counts_whole(self) -> bool:
        """Whether all inner steps count, and so nothing ended before the last."""
        return self._reward is None

    @property
    def obs(self) -> Tensor | None:
        """[R,O] after the last inner step that counts; None where nothing was decoded."""
        every = self.imagined.obs
        return every[:, -1] if self._obs is None and every is not None else self._obs

    @property
    def reward(self) -> Tensor:
        """[R] summed over the inner steps that count."""
        if self._reward is not None:
            return self._reward
        return self.imagined.reward.sum(1)

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """``obs`` and ``reward`` in numpy; only where they were decoded."""
        if self._reward is not None:
            return to_numpy(self._obs), to_numpy(self._reward)
        reward = self.inner.reward
        return self.inner.obs[:, -1], reward[:, 0] if reward.shape[1] == 1 else reward.sum(1)
