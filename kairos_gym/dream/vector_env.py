"""DreamVectorEnv: B dreams of one world model as a Gymnasium vector environment, imagined in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from kairos_gym.dream.batch import DreamBatch, Rows, is_int
from kairos_gym.dream.env import DreamEnv
from kairos_gym.dream.step_function import StepFn, to_numpy
from kairos_gym.dream.steps import ErrorBound, Step, StepEnds
from world_model.contract import Dynamics, Imagined
from world_model.spaces import ActionCheck, unflatten


class DreamVectorEnv(VectorEnv[Any, Any, Any]):
    """``num_envs`` dreams of ``model`` side by side.

    Row b dreams what a ``DreamEnv`` with its seed does. All arguments that ``DreamEnv`` has mean the same here.

    autoreset_mode: what happens to a dream that has ended. NEXT_STEP: the next ``step`` ignores its action and begins
        its next episode; SAME_STEP: the same ``step`` does, and ``infos["final_obs"]``, ``infos["final_info"]`` keep
        what it ended with; DISABLED: it waits for ``reset(options={"reset_mask": ...})``.
    """

    def __init__(
        self,
        model: str | Path | Dynamics,
        num_envs: int = 1,
        *,
        chunk: int = 1,
        sampled: bool = False,
        flow_steps: int = 1,
        max_episode_steps: int | None = None,
        reward_fn: StepFn | None = None,
        termination_fn: StepFn | None = None,
        max_error: float | None = None,
        confidence: float | None = None,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ):
        dreams = DreamBatch(
            model,
            num_envs,
            chunk=chunk,
            sampled=sampled,
            flow_steps=flow_steps,
            max_episode_steps=max_episode_steps,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
            max_error=max_error,
            confidence=confidence,
        )
        self._hold(dreams, render_mode, autoreset_mode)

    @classmethod
    def of(
        cls,
        dreams: DreamBatch,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> DreamVectorEnv:
        """An env that holds these ``dreams`` as they are."""
        env = cls.__new__(cls)
        env._hold(dreams, render_mode, autoreset_mode)
        return env

    def _hold(self, dreams: DreamBatch, render_mode: str | None, autoreset_mode: str | AutoresetMode) -> None:
        self._batch, self.num_envs, self.render_mode = dreams, dreams.batch, render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode is not AutoresetMode.DISABLED and not dreams.has_starts:
            raise ValueError(
                "this model keeps no real starts that ended dreams could begin again from: pass "
                "autoreset_mode='Disabled' and reset(options={'observation': ..., 'reset_mask': ...})"
            )
        self.metadata = {**dreams.rendering(render_mode), "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = dreams.adapter.observation_space
        self.single_action_space = dreams.adapter.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._check = ActionCheck(self.action_space)

    @property
    def model(self) -> Dynamics:
        return self._batch.model

    @property
    def chunk(self) -> int:
        return self._batch.chunk

    @property
    def max_episode_steps(self) -> int | None:
        return self._batch.limit

    @property
    def state(self) -> Any:
        """What the dreams remember, an immutable snapshot [B,...]: planners may start from it. None before reset."""
        return self._batch.state

    @property
    def observations(self) -> Any:
        """The present observations [B,...]. None before reset, and after a step with decode=False."""
        return None if self._batch.obs is None else self._batch.adapter.to_observations(to_numpy(self._batch.obs))

    def row(self, b: int) -> DreamEnv:
        """Dream b as a ``DreamEnv``: a view, so what happens to the one happens to the other.

        Raises IndexError where there is no such dream.
        """
        if not is_int(b) or not -self.num_envs <= b < self.num_envs:
            raise IndexError(f"there are {self.num_envs} dreams, 0 to {self.num_envs - 1}; got {b!r}")
        return DreamEnv.of(self._batch, int(b) % self.num_envs, self.render_mode, self)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every dream -> observations [B,...], {}.

        seed: dream b gets seed + b, or seed[b]; None goes on with the next episode of its own. options: "observation"
        [B,...] or [B,T,...] and "actions" [B,T,...] as in ``DreamEnv.reset``, a row for each dream; "reset_mask", bool
        [B], begins only those dreams anew and leaves the others where they are.

        Raises ValueError or TypeError for a wrong seed or option; the dreams are then as they were.
        """
        dreams, b = self._batch, self.num_envs
        dreams.expect_open()
        if not isinstance(options, dict | None):
            raise TypeError(f"options must be a dict, got {options!r}")
        options = dict(options or {})
        rows = _rows(options.pop("reset_mask"), b) if "reset_mask" in options else None
        context = dreams.adapter.parse_options(options, (b,))
        seeds = _seeds(seed, b)
        if rows is not None:
            where = torch.from_numpy(rows)
            seeds = [seeds[r] for r in rows]
            context = (
                None if context is None else (context[0][where], None if context[1] is None else context[1][where])
            )
        super().reset(seed=seeds[0])
        dreams.reset(rows, seeds, context)
        return self.observations, {}

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Imagine actions [B,...], or [B,K,...] -> observations, rewards, terminations, truncations [B], infos.

        As in ``DreamEnv.step`` for each dream, and what ``autoreset_mode`` says for those that have ended. infos has
        "imagined" with "obs" [B,K,O], "reward" and "terminated" [B,K]; "non_finite" [B] where a dream was lost;
        "trust" with "error_bound", "confidence" and "steps" [B] where it was asked for; and for each a mask [B] under
        the name with "_" before it.
        """
        dreams = self._batch
        played = dreams.adapter.to_vectors(self._check(actions), self.num_envs, dreams.device)
        with torch.set_grad_enabled(False):
            went = self._advance(played, True)
        step = went.step
        (obs, reward), (terminated, truncated, _) = step.arrays(), step.ends
        tell = partial(_infos, step, dreams.confidence)
        infos = tell(went.played if went.done is None else ~went.done)
        if went.done is not None:
            infos |= {"final_obs": np.full(self.num_envs, None), "_final_obs": went.done}
            infos |= {"final_info": tell(went.done), "_final_info": went.done}
            for b in np.flatnonzero(went.done):
                infos["final_obs"][b] = dreams.adapter.to_observations(obs[b])
        if went.began:
            obs = to_numpy(dreams.obs)
        return (
            dreams.adapter.to_observations(obs),
            reward.astype(np.float64),
            terminated.copy(),
            truncated.copy(),
            infos,
        )

    def step_torch(self, actions: Tensor, *, decode: bool = True) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """``step`` for learners on the model's device: what was imagined stays there.

        actions: float32 [B,A] or [B,K,A], as vectors (``model.spec.action_box``; those of Discrete spaces one-hot).
        Returns observations (float32 [B,...] in the space's structure, within its finite bounds; None with
        decode=False), rewards float32 [B], terminations and truncations bool [B], infos: "imagined"
        (``world_model.contract.Imagined``), "non_finite" [B] where a dream was lost, "error_bound" float32 [B] where it
        was asked for, and with SAME_STEP "final_obs"
        [B,...] and its mask "_final_obs" [B], where dreams ended and began again. With NEXT_STEP a dream that only
        begins again imagines zeros. Observations and what was imagined are not to be changed in place: the dreams go on
        from them.

        The gradient flows through the dream where ``actions`` require one, until ``detach`` or a step whose actions
        don't.
        Raises TypeError for what is no tensor, ValueError for actions of another shape or dtype or out of range.
        """
        dreams = self._batch
        box = self.model.spec.action_box
        shape = (self.num_envs, *([] if self.chunk == 1 else [self.chunk]), *box.shape)
        if not isinstance(actions, Tensor):
            raise TypeError(f"step_torch takes a tensor, got {type(actions).__name__}; step takes the others")
        if actions.shape != shape or actions.dtype != torch.float32:
            raise ValueError(f"actions must be float32 {list(shape)}, got {actions.dtype} {list(actions.shape)}")
        if not dreams.adapter.contains_actions(actions):
            raise ValueError(f"actions must be finite and within {box}; clip or rescale them before the step")
        with torch.set_grad_enabled(torch.is_grad_enabled() and actions.requires_grad):
            went = self._advance(actions.view(self.num_envs, self.chunk, -1), decode)
            step, reward = went.step, went.step.reward
            infos: dict[str, Any] = {"imagined": step.imagined}
            if went.done is not None:
                infos["_final_obs"] = torch.from_numpy(went.done).to(reward.device)
                infos["final_obs"] = None if step.obs is None else self._structured(step.obs)
            if not step.counts_whole and step.ends.lost.any():
                infos["non_finite"] = torch.from_numpy(step.ends.lost).to(reward.device)
            if step.error_bound is not None:
                infos["error_bound"] = torch.from_numpy(step.error_bound.bound).to(reward.device, reward.dtype)
            obs = self._structured(dreams.obs) if decode and dreams.obs is not None else None
        terminated, truncated = (torch.from_numpy(x.copy()).to(reward.device) for x in step.ends[:2])
        return obs, reward, terminated, truncated, infos

    def detach(self) -> None:
        """Cut the gradient that led here, between the stretches that a learner sends it back through."""
        self._batch.detach()

    def snapshot(self, rows: Sequence[int] | None = None) -> bytes:
        """All that the future of these dreams, or of some rows, depends on but for the weights; see ``DreamEnv``."""
        return self._batch.snapshot(self._numbers(rows))

    def restore(self, snapshot: bytes, rows: Sequence[int] | None = None) -> Any:
        """Go on from a ``snapshot`` in all dreams, or in as many rows as it holds -> observations [B,...].

        The observations are None where some are not known: not decoded, or not begun. Raises what ``DreamEnv.restore``
        does.
        """
        self._batch.restore(snapshot, self._numbers(rows))
        return self.observations

    def fork(self, n: int, rows: Sequence[int] | None = None) -> DreamVectorEnv:
        """n copies of each dream, or of each of ``rows``, next to each other -> a new DreamVectorEnv.

        Copies keep the seed of what they are copies of: with equal actions they dream the same, also in their next
        episodes; ``reset(seed=...)`` sets them apart.
        """
        return DreamVectorEnv.of(self._batch.fork(n, self._numbers(rows)), self.render_mode, self.autoreset_mode)

    def render(self) -> tuple[NDArray[np.uint8], ...]:
        """A picture of each dream; see ``DreamEnv.render``."""
        if self.render_mode is None:
            raise ValueError("these dreams were made without a render_mode: make them with render_mode='rgb_array'")
        return tuple(self._batch.render_observation(b) for b in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        self._batch.close()

    def _advance(self, actions: Tensor, decode: bool) -> _Went:
        """One step of all dreams, and the beginning of new episodes that ``autoreset_mode`` asks for."""
        dreams = self._batch
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and dreams.any_ended:
            dreams.expect_begun()
            over = dreams.ended.copy()
            going = np.flatnonzero(~over)
            if len(going):
                where = torch.from_numpy(going)
                step = _spread(dreams.step(actions[where], going, decode=decode), where, self.num_envs)
            else:
                step = _idle(actions, self.model.spec.observation_box.shape[0], decode, dreams.bounds_error)
            dreams.reset(np.flatnonzero(over))
            return _Went(step, ~over, None, True)
        if self.autoreset_mode is AutoresetMode.SAME_STEP and dreams.any_ended:  # by way of ``row`` or ``restore``
            dreams.expect_begun()
            dreams.reset(np.flatnonzero(dreams.ended))
        step = dreams.step(actions, decode=decode)
        if self.autoreset_mode is not AutoresetMode.SAME_STEP or not dreams.any_ended:
            return _Went(step, dreams.everywhere, None, False)
        done = dreams.ended.copy()
        dreams.reset(np.flatnonzero(done))
        return _Went(step, dreams.everywhere, done, True)

    def _structured(self, obs: Tensor) -> Any:
        return unflatten(self.model.spec.observation_space, self._batch.adapter.clip(obs))

    def _numbers(self, rows: Sequence[int] | None) -> Rows | None:
        if rows is None:
            return None
        numbers = np.asarray(rows)
        good = numbers.ndim == 1 and numbers.size and numbers.dtype.kind in "iu"
        if not good or numbers.min() < 0 or numbers.max() >= self.num_envs or len(set(numbers.tolist())) < len(numbers):
            raise ValueError(f"rows must be different numbers from 0 to {self.num_envs - 1}, got {rows!r}")
        return numbers.astype(np.int64)


class _Went(NamedTuple):
    """What a step of all dreams came to."""

    step: Step  # [B] before any dream began again
    played: NDArray[np.bool_]  # [B] False where a dream only began its next episode
    done: NDArray[np.bool_] | None  # [B] ended, and began again in the same step; None where none did
    began: bool  # whether any dream did either


def _idle(actions: Tensor, size: int, decode: bool, bounds_error: bool) -> Step:
    """The step of dreams that do nothing but begin again."""
    b, k = actions.shape[:2]
    reward, never = actions.new_zeros(b, k), np.zeros(b, bool)
    imagined = Imagined(actions.new_zeros(b, k, size) if decode else None, reward, reward > 0)
    nothing = None if not bounds_error else ErrorBound(np.zeros(b), np.zeros(b, np.int64))
    return Step(imagined, StepEnds(never, never, never), error_bound=nothing)


def _spread(step: Step, rows: Tensor, batch: int) -> Step:
    """A step of some ``rows`` as one of all: zeros elsewhere."""

    def place(x: Tensor | None) -> Any:
        return None if x is None else x.new_zeros(batch, *x.shape[1:]).index_copy(0, rows.to(x.device), x)

    ends = StepEnds(*(place(torch.from_numpy(x)).numpy() for x in step.ends))
    imagined, told = Imagined(*map(place, step.imagined)), step.error_bound
    error_bound = None if told is None else ErrorBound(*(place(torch.from_numpy(x)).numpy() for x in told))
    return Step(imagined, ends, None, place(step.obs), place(step.reward), error_bound)


def _infos(step: Step, confidence: float, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What a step tells beside its outcome, of the dreams that ``mask`` says, in Gymnasium's form."""
    obs, reward, ends = step.inner
    inner = {
        "obs": obs,
        "_obs": mask,
        "reward": reward,
        "_reward": mask,
        "terminated": ends,
        "_terminated": mask,
    }
    infos: dict[str, Any] = {"imagined": inner, "_imagined": mask}
    if not step.counts_whole and step.ends.lost.any():
        lost = step.ends.lost & mask
        infos |= {"non_finite": lost, "_non_finite": lost}
    if step.error_bound is not None:
        bound, steps = (np.where(mask, x, 0) for x in step.error_bound)
        sure = np.where(mask, confidence, 0.0)
        told = {"error_bound": bound, "confidence": sure, "steps": steps}
        infos |= {"trust": told | {f"_{name}": mask for name in told}, "_trust": mask}
    return infos


def _seeds(seed: Any, batch: int) -> list[int | None]:
    if seed is None:
        return [None] * batch
    seeds: list[Any] = [seed + b for b in range(batch)] if is_int(seed) else [seed]
    if isinstance(seed, Sequence | np.ndarray):
        seeds = list(seed)
    if len(seeds) != batch or not all(s is None or (is_int(s) and s >= 0) for s in seeds):
        raise ValueError(f"seed must be a whole number from 0 on, or {batch} of them or None, got {seed!r}")
    return [None if s is None else int(s) for s in seeds]


def _rows(mask: Any, batch: int) -> Rows:
    """The rows of Gymnasium's ``reset_mask``."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask'] must be a numpy array of bool, got {mask!r}")
    if mask.shape != (batch,) or not mask.any():
        raise ValueError(f"options['reset_mask'] must have the shape ({batch},) and a True in it, got {mask!r}")
    return np.flatnonzero(mask)
