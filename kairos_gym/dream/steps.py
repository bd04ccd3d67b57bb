"""What one step of many dreams returns, in tensors and in numpy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kairos_gym.dream.error_bound import ErrorBound
from kairos_gym.dream.step_function import to_numpy
from world_model.contract import Imagined


class ImaginedArrays(NamedTuple):
    """``Imagined`` in numpy. Read-only, because a state or the model may share its memory."""

    obs: Any  # [R,K,O] or None
    reward: NDArray[Any]  # [R,K]
    terminated: NDArray[np.bool_]  # [R,K]

    @classmethod
    def from_tensors(cls, imagined: Imagined) -> ImaginedArrays:
        obs, reward, ends = imagined.obs, imagined.reward, imagined.terminated
        arrays = cls(None if obs is None else obs.numpy(force=True), reward.numpy(force=True), ends.numpy(force=True))
        for array in arrays:
            if array is not None:
                array.setflags(write=False)
        return arrays


def all_continue(imagined: Imagined, arrays: ImaginedArrays | None) -> bool:
    """A fast check that no dream terminates and all numbers are finite. False may also mean that squares overflow.

    arrays: ``imagined`` in numpy where that needs no copy, which is faster for few dreams.
    """
    if arrays is None:
        size = sum(x.detach().square().sum() for x in imagined[:2] if x is not None)
        return math.isfinite(size) and not bool(imagined.terminated.any())
    obs, reward, ends = arrays
    size = np.vdot(reward, reward) if obs is None else np.vdot(reward, reward) + np.vdot(obs, obs)
    return math.isfinite(size) and not np.count_nonzero(ends)


class Done(NamedTuple):
    """Which episodes ended with a step, and why."""

    terminated: NDArray[np.bool_]  # [R]
    truncated: NDArray[np.bool_]  # [R] by the time limit or ``max_error``, or because the dream is not finite
    non_finite: NDArray[np.bool_]  # [R]


class Step:
    """What a step of R dreams returns. Inner steps after one that ends an episode don't count.

    ``imagined`` and ``arrays`` hold all K inner steps as the model predicted them.
    """

    __slots__ = ("_arrays", "_obs", "_reward", "done", "error_bound", "imagined")

    def __init__(
        self,
        imagined: Imagined,
        done: Done,
        arrays: ImaginedArrays | None = None,
        obs: Tensor | None = None,
        reward: Tensor | None = None,
        error_bound: ErrorBound | None = None,
    ):
        """obs [R,O] and reward [R]: after the inner steps that count; left out, all count."""
        self.imagined, self.done, self._arrays, self.error_bound = imagined, done, arrays, error_bound
        self._obs, self._reward = obs, reward

    @classmethod
    def zeros(cls, actions: Tensor, obs_dim: int, *, decode: bool, error_bound: bool) -> Step:
        """The step of dreams that ignore their ``actions`` [R,K,A] and only begin again."""
        r, k = actions.shape[:2]
        reward, never = actions.new_zeros(r, k), np.zeros(r, bool)
        imagined = Imagined(actions.new_zeros(r, k, obs_dim) if decode else None, reward, reward > 0)
        zero = ErrorBound(np.zeros(r, np.float32), np.zeros(r), np.zeros(r, np.int64)) if error_bound else None
        return cls(imagined, Done(never, never, never), error_bound=zero)

    def scatter(self, rows: Tensor, batch: int) -> Step:
        """This step of R dreams as a step of B dreams of which they are ``rows`` [R]; zeros elsewhere."""

        def place(x: Tensor | None) -> Any:
            return None if x is None else x.new_zeros(batch, *x.shape[1:]).index_copy(0, rows.to(x.device), x)

        def place_array(x: Any) -> Any:
            return place(torch.from_numpy(x)).numpy()

        bound = None if self.error_bound is None else ErrorBound(*map(place_array, self.error_bound))
        imagined, done = Imagined(*map(place, self.imagined)), Done(*map(place_array, self.done))
        return Step(imagined, done, None, place(self.obs), place(self.reward), bound)

    @property
    def arrays(self) -> ImaginedArrays:
        if self._arrays is None:
            self._arrays = ImaginedArrays.from_tensors(self.imagined)
        return self._arrays

    @property
    def is_complete(self) -> bool:
        """Whether all inner steps count because nothing ended early."""
        return self._reward is None

    @property
    def obs(self) -> Tensor | None:
        """[R,O] after the last inner step that counts; None where nothing was decoded."""
        all_obs = self.imagined.obs
        return all_obs[:, -1] if self._obs is None and all_obs is not None else self._obs

    @property
    def reward(self) -> Tensor:
        """[R], summed over the inner steps that count."""
        return self.imagined.reward.sum(1) if self._reward is None else self._reward

    def outcome(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """``obs`` and ``reward`` in numpy. Needs decoded observations."""
        if self._reward is not None:
            return to_numpy(self._obs), to_numpy(self._reward)
        reward = self.arrays.reward
        return self.arrays.obs[:, -1], reward[:, 0] if reward.shape[1] == 1 else reward.sum(1)


def vector_infos(step: Step, confidence: float | None, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The infos of a Gymnasium vector env after ``step``, for the dreams in ``mask`` [B].

    confidence: of the error bound, where the step has one.
    """
    obs, reward, terminated = step.arrays
    inner = {
        "obs": obs,
        "_obs": mask,
        "reward": reward,
        "_reward": mask,
        "terminated": terminated,
        "_terminated": mask,
    }
    infos: dict[str, Any] = {"imagined": inner, "_imagined": mask}
    if not step.is_complete and step.done.non_finite.any():
        non_finite = step.done.non_finite & mask
        infos |= {"non_finite": non_finite, "_non_finite": non_finite}
    if step.error_bound is not None:
        assert confidence is not None
        bound, steps = (np.where(mask, x, 0) for x in (step.error_bound.bound, step.error_bound.steps))
        trust = {"error_bound": bound, "confidence": np.where(mask, confidence, 0.0), "steps": steps}
        infos |= {"trust": trust | {f"_{name}": mask for name in trust}, "_trust": mask}
    return infos
