"""DreamBatch: B dreams of one model side by side. The envs are thin layers over it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from numpy.typing import NDArray
from torch import Tensor

from kairos_gym.dream.arguments import Rows, is_count
from kairos_gym.dream.config import DreamConfig
from kairos_gym.dream.error_bound import CalibratedBound, ErrorBound
from kairos_gym.dream.rendering import Renderer
from kairos_gym.dream.snapshot import Progress, Snapshot
from kairos_gym.dream.space_adapter import SpaceAdapter
from kairos_gym.dream.step_function import StepFunctions, to_numpy
from kairos_gym.dream.steps import Done, ImaginedArrays, Step, all_continue
from kairos_gym.models import load
from world_model.contract import Dynamics, Imagined
from world_model.noise import bits

NO_LIMIT = 2**62


class DreamBatch:
    """B dreams of ``model``. Observations [R,O] and actions [R,K,A] are vectors here, on the model's device.

    Each dream has its own seed and counts its episodes. The two determine an episode's start and noise, and with the
    actions all that is dreamed, whatever the other rows are.

    Raises FileNotFoundError for an unknown model, TypeError for a model that is no Dynamics, ValueError for settings
    that this model doesn't allow.
    """

    def __init__(self, model: str | Path | Dynamics, batch: int, config: DreamConfig):
        self.model: Any = load(model) if isinstance(model, str | Path) else model
        if not all(hasattr(self.model, verb) for verb in ("spec", "initial", "observe", "imagine")):
            raise TypeError(f"model must be a name, a folder, a hub id or a Dynamics, got {type(model).__name__}")
        spec = self.model.spec
        card: dict[str, Any] = getattr(self.model, "card", None) or {}
        if not is_count(batch):
            raise ValueError(f"num_envs must be a whole number of at least 1, got {batch!r}")
        if not is_count(config.chunk) or config.chunk > spec.chunk:
            raise ValueError(
                f"chunk must be a whole number from 1 to {spec.chunk}, this model's longest, got {config.chunk!r}"
            )
        if config.max_episode_steps is None:
            config = replace(config, max_episode_steps=card.get("time_limit"))
        self.config, self.batch, self.chunk = config, int(batch), int(config.chunk)
        self.calibration = None if config.confidence is None else CalibratedBound(self.model, config)
        self.adapter = SpaceAdapter(spec, self.chunk)
        self.renderer = Renderer(card, spec.dt * self.chunk)
        self._functions: StepFunctions | None = None
        if config.reward_fn is not None or config.termination_fn is not None:
            self._functions = StepFunctions(self.adapter, config.reward_fn, config.termination_fn)
        # Models without a flow don't know these arguments, so the defaults aren't passed.
        self._flow: dict[str, Any] = {"sampled": True} if config.sampled else {}
        if config.flow_steps != 1:
            self._flow["flow_steps"] = config.flow_steps

        self.all_rows = np.ones(self.batch, bool)
        self._no_rows = np.zeros(self.batch, bool)
        for mask in (self.all_rows, self._no_rows):
            mask.flags.writeable = False  # infos share them
        self._nothing_done = Done(self._no_rows, self._no_rows, self._no_rows)

        self.state: Any = None  # what the model remembers of the dreams; immutable
        # The present observations are the last of these frames [B,*,O], in the rows of the mask; other rows are stale.
        self._frames = torch.zeros(self.batch, 1, spec.observation_box.shape[0])
        self._known: NDArray[np.bool_] = self._no_rows
        self.progress = Progress.initial(self.batch)
        # Derived from ``progress``, so that most steps needn't look at each row.
        self.any_ended, self._countdown = True, NO_LIMIT  # simulator steps until the first dream reaches its limit
        self.device = torch.device("cpu")  # the model's, known from the first state on
        self.closed = False

    @property
    def obs(self) -> Tensor | None:
        """The present observations [B,O] as the model predicted them; None where some are unknown."""
        return self._frames[:, -1] if np.count_nonzero(self._known) == self.batch else None

    def observation(self, row: int) -> Any:
        """The present observation of one dream, as an element of the observation space; None where it is unknown."""
        return self.adapter.to_observations(to_numpy(self._frames[row, -1])) if self._known[row] else None

    @property
    def has_starts(self) -> bool:
        return getattr(self.model, "starts", None) is not None

    # -- episodes ------------------------------------------------------------------------------------------------------

    def reset(
        self,
        rows: Rows | None = None,
        seeds: Sequence[int | None] | None = None,
        context: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """Begin an episode in each of ``rows``, or in all.

        seeds: one for each row; None continues with the next episode of the row's own seed.
        context: real experience to begin from, obs [R,T,O] and actions [R,T,A]; None draws one of the model's starts.
            Raises ValueError where the model has none.
        """
        self.expect_open()
        at = self._indices(rows)
        fresh = self.progress.select(at)
        fresh.episode += 1
        for i, seed in enumerate([None] * len(at) if seeds is None else seeds):
            if seed is not None or fresh.episode[i] == 0:
                fresh.seed[i], fresh.episode[i] = (secrets.randbits(63) if seed is None else int(seed) % 2**63), 0
        key, episode = torch.from_numpy(fresh.seed), torch.from_numpy(fresh.episode)
        obs, actions = self._draw_starts(key, episode) if context is None else context
        with torch.no_grad():  # but not below: gradients through the other rows stay
            state = self.model.initial(len(at), seeds=bits(key, 2 * episode + 1))
            self.device = device = state.device
            obs, actions = obs.to(device), None if actions is None else actions.to(device)
            state = self.model.observe(state, obs, actions)
        self._put_state(rows, state)
        self._put_obs(at, obs[:, -1])
        fresh.age[:], fresh.ended[:] = 0, False
        if self.calibration is not None:
            fresh.uncertainty[:] = self.calibration.initial(obs.shape[1], len(at))
        self._put_progress(at, fresh)

    def step(self, actions: Tensor, rows: Rows | None = None, *, decode: bool = True) -> Step:
        """Imagine actions [R,K,A] in each of ``rows``, or in all.

        Raises ResetNeeded where one has ended or not begun. Whatever it raises, all dreams stay as they were.
        """
        if self.closed or self.any_ended:
            self._expect_running(rows)
        state = self.state if rows is None else self.state.select(torch.from_numpy(rows))
        after, imagined = self.model.imagine(state, actions, decode=decode, **self._flow)
        if self._functions is not None:
            imagined = self._functions.apply(imagined, self._present(rows), actions)
        arrays = ImaginedArrays.from_tensors(imagined) if self.device.type == "cpu" else None
        bounds = None
        if self.calibration is not None:
            arrays = arrays or ImaginedArrays.from_tensors(imagined)
            bounds = self._error_bounds(self.calibration, actions, arrays, self._indices(rows))
        if (
            rows is None
            and self.chunk < self._countdown
            and all_continue(imagined, arrays)
            and (bounds is None or not self._exceeds_max_error(bounds))
        ):
            return self._continue(after, imagined, arrays, bounds)
        at = self._indices(rows)
        step, counts = self._end_episodes(imagined, arrays or ImaginedArrays.from_tensors(imagined), at, bounds)
        self._put_state(rows, after)
        self._put_obs(at, step.obs)
        progress = self.progress.select(at)
        progress.age += counts
        progress.ended = step.done.terminated | step.done.truncated
        if step.error_bound is not None:
            progress.uncertainty = step.error_bound.uncertainty
        self._put_progress(at, progress)
        return step

    # -- copies --------------------------------------------------------------------------------------------------------

    def snapshot(self, rows: Rows | None = None) -> bytes:
        """Everything that the future of these dreams depends on, but for the weights."""
        self.expect_open()
        at = self._indices(rows)
        self.expect_begun(at)
        state = self.state.select(torch.from_numpy(at)).to_bytes()
        return Snapshot(self._fingerprint(), state, self.progress.select(at), self._present(rows)).to_bytes()

    def restore(self, blob: bytes, rows: Rows | None = None) -> None:
        """Put the dreams of a ``snapshot`` into ``rows``, or into all.

        Raises TypeError for anything but bytes, ValueError where they are no whole snapshot, or one of another model or
        of another number of dreams.
        """
        self.expect_open()
        at = self._indices(rows)
        saved = Snapshot.from_bytes(blob)
        self._expect_fitting(saved, len(at))
        fresh = self.model.initial(len(at))
        self.device = fresh.device
        state = type(fresh).from_bytes(saved.state, self.device)
        if {name: t.shape for name, t in state.tensors.items()} != {name: t.shape for name, t in fresh.tensors.items()}:
            raise ValueError("this snapshot was made with a model that remembers other things than this one")
        self._put_state(rows, state)
        self._put_obs(at, None if saved.obs is None else saved.obs.to(self.device))
        self._put_progress(at, saved.progress)

    def fork(self, n: int, rows: Rows | None = None) -> DreamBatch:
        """n copies of each of ``rows``, or of all, next to each other -> a new DreamBatch of the same model."""
        self.expect_open()
        if not is_count(n):
            raise ValueError(f"fork(n) makes a whole number of copies of at least 1, got {n!r}")
        at = self._indices(rows)
        self.expect_begun(at)
        at = np.repeat(at, n)
        index = torch.from_numpy(at)
        copies = DreamBatch(self.model, len(at), self.config)
        copies.state, copies.device = self.state.select(index), self.device
        copies._frames, copies._known = self._frames[index, -1:], self._known[at]
        copies._put_progress(np.arange(len(at)), self.progress.select(at))
        return copies

    def detach(self) -> None:
        """Cut the gradient that led here."""
        if self.state is not None:
            self.state = self.state.detach()
        self._frames = self._frames.detach()

    def render(self, row: int) -> NDArray[np.uint8]:
        """The real simulator's picture of a dream's present observation -> [height,width,3]."""
        self.expect_open()
        self.expect_begun(np.array([row]))
        observation = self.observation(row)
        if observation is None:
            raise ValueError("the present observation is not known: the last step was made with decode=False")
        return self.renderer.draw(observation)

    def close(self) -> None:
        """Forget the dreams; may be called twice."""
        self.renderer.close()
        self.state, self._frames, self._known = None, torch.zeros_like(self._frames[:, -1:]), self._no_rows
        self.closed = True

    # -- inside a step -------------------------------------------------------------------------------------------------

    def _continue(
        self, state: Any, imagined: Imagined, arrays: ImaginedArrays | None, bounds: ErrorBound | None
    ) -> Step:
        """The common case of a step: it is one of all dreams, and none of them ends."""
        self.state = state
        if imagined.obs is None:
            self._known = self._no_rows
        else:
            self._frames, self._known = imagined.obs, self.all_rows
        age = self.progress.age
        age += self.chunk
        self._countdown -= self.chunk
        if bounds is None:
            return Step(imagined, self._nothing_done, arrays)
        last = bounds.after(self.chunk)
        self.progress.uncertainty[:] = last.uncertainty
        return Step(imagined, self._nothing_done, arrays, error_bound=last)

    def _end_episodes(
        self, imagined: Imagined, arrays: ImaginedArrays, at: Rows, bounds: ErrorBound | None
    ) -> tuple[Step, NDArray[np.int64]]:
        """The general case, in which dreams may end within the chunk -> Step, inner steps that count [R]."""
        terminated, finite = arrays.terminated, np.isfinite(arrays.reward)
        if arrays.obs is not None:
            finite &= np.isfinite(arrays.obs).all(-1)
        limit = self.config.max_episode_steps
        left = np.full(len(at), self.chunk + 1) if limit is None else limit - self.progress.age[at]
        if bounds is not None and self.calibration is not None:  # the first inner step above max_error is the last
            exceeded = self.calibration.exceeded(bounds)
            left = np.where(exceeded.any(1), np.minimum(left, exceeded.argmax(1) + 1), left)
        counts = np.minimum(np.where(terminated.any(1), terminated.argmax(1) + 1, self.chunk), left)
        finite_steps = np.where(finite.all(1), self.chunk, finite.argmin(1))
        non_finite = finite_steps < counts
        counts = np.where(non_finite, finite_steps, counts)
        mask = np.arange(self.chunk) < counts[:, None]
        # Masked instead of multiplied by zero, because inner steps that don't count may be NaN.
        reward = torch.where(torch.from_numpy(mask).to(imagined.reward.device), imagined.reward, 0.0).sum(1)
        obs = None
        if imagined.obs is not None:
            last = torch.from_numpy(counts).to(imagined.obs.device)
            obs = imagined.obs[torch.arange(len(at), device=last.device), (last - 1).clamp_min(0)]
            obs = torch.where((last > 0)[:, None], obs, self._frames[torch.from_numpy(at), -1])
        done = Done((terminated & mask).any(1), non_finite | (counts == left), non_finite)
        return Step(imagined, done, arrays, obs, reward, None if bounds is None else bounds.after(counts)), counts

    def _error_bounds(
        self, calibration: CalibratedBound, actions: Tensor, arrays: ImaginedArrays, at: Rows
    ) -> ErrorBound:
        """How wrong the dreams ``at`` may be after each of these inner steps."""
        if arrays.obs is None or not self._known[at].all():
            raise ValueError("max_error and confidence follow the observations, so no step may have decode=False")
        before = to_numpy(self._frames[:, -1:])[at]
        if self.chunk > 1:
            before = np.concatenate([before, arrays.obs[:, :-1]], 1)
        progress = self.progress
        return calibration.propagate(progress.uncertainty[at], progress.age[at], before, to_numpy(actions))

    def _exceeds_max_error(self, bounds: ErrorBound) -> bool:
        return self.calibration is not None and bool(self.calibration.exceeded(bounds).any())

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _indices(self, rows: Rows | None) -> Rows:
        return np.arange(self.batch) if rows is None else rows

    def _present(self, rows: Rows | None) -> Tensor | None:
        """The present observations of some rows, or of all [R,O]; None where one is unknown."""
        if rows is None:
            return self.obs
        return self._frames[torch.from_numpy(rows), -1] if self._known[rows].all() else None

    def _put_state(self, rows: Rows | None, state: Any) -> None:
        if rows is not None:
            whole = self.model.initial(self.batch) if self.state is None else self.state
            state = whole.put(torch.from_numpy(rows), state)
        self.state = state

    def _put_obs(self, at: Rows, obs: Tensor | None) -> None:
        """Make ``obs`` [R,O] the present observations of rows ``at``; None: they are unknown from now on."""
        self._known = self._known.copy()
        self._known[at] = obs is not None
        self._frames = self._frames[:, -1:].to(self.device)
        if obs is not None:
            self._frames = self._frames.index_copy(0, torch.from_numpy(at).to(self.device), obs[:, None])

    def _put_progress(self, at: Rows, progress: Progress) -> None:
        """Change some rows of ``progress`` and what is derived from it."""
        self.progress.put(at, progress)
        self.any_ended = bool(self.progress.ended.any())
        limit = self.config.max_episode_steps
        self._countdown = NO_LIMIT if limit is None else limit - int(self.progress.age.max())

    def _draw_starts(self, seeds: Tensor, episodes: Tensor) -> tuple[Tensor, Tensor]:
        """One of the model's starts for each of R episodes -> obs [R,T,O], actions [R,T,A]."""
        if not self.has_starts:
            raise ValueError("this model keeps no real starts: reset(options={'observation': ...}) with one of yours")
        starts = self.model.starts
        drawn = bits(seeds, 2 * episodes) % len(starts.obs)
        return starts.obs[drawn], starts.actions[drawn]

    # -- checks --------------------------------------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        known = getattr(self.model, "fingerprint", None)  # without one, two models of a class are taken for the same
        return known() if known is not None else f"{type(self.model).__qualname__} {self.model.spec}"

    def _expect_fitting(self, saved: Snapshot, dreams: int) -> None:
        """Raises ValueError where ``saved`` can't go on in this many rows with this model and these settings."""
        progress, limit = saved.progress, self.config.max_episode_steps
        if saved.fingerprint != self._fingerprint():
            raise ValueError(
                f"this snapshot was made with the model {saved.fingerprint}, this env dreams with "
                f"{self._fingerprint()}: make the env with the same weights"
            )
        if len(progress.age) != dreams:
            raise ValueError(f"this snapshot holds {len(progress.age)} dreams, and there are {dreams} to restore")
        if limit is not None and (progress.age[~progress.ended] >= limit).any():
            raise ValueError(
                f"this snapshot is {progress.age.max()} steps into its episode, and here episodes end after {limit}: "
                "make the env with a larger max_episode_steps"
            )
        if self.calibration is not None and np.isnan(progress.uncertainty).any():
            raise ValueError(
                "this snapshot was taken where nobody asked how wrong the dreams may be: make both envs with the same "
                "confidence or max_error"
            )

    def expect_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("this dream is closed: make a new one")

    def expect_begun(self, rows: Rows | None = None) -> None:
        """Raises ResetNeeded where a dream has not begun."""
        at = self._indices(rows)
        if not (begun := self.progress.episode[at] >= 0).all():
            which = "the dream has" if self.batch == 1 else f"dreams {at[~begun].tolist()} have"
            raise ResetNeeded(f"{which} not begun: call reset() first")

    def _expect_running(self, rows: Rows | None) -> None:
        self.expect_open()
        at = self._indices(rows)
        self.expect_begun(at)
        if len(ended := at[self.progress.ended[at]]):
            which = "the dream has" if self.batch == 1 else f"dreams {ended.tolist()} have"
            raise ResetNeeded(f"{which} ended: call reset() before step()")
