"""DreamEnv and DreamVectorEnv: a world model as a Gymnasium environment, one dream or many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from kairos_gym.dream.arguments import Rows, is_int, parse_reset_mask, parse_rows, parse_seeds
from kairos_gym.dream.autoreset import step_and_autoreset
from kairos_gym.dream.batch import DreamBatch
from kairos_gym.dream.config import DreamConfig
from kairos_gym.dream.step_function import to_numpy
from kairos_gym.dream.steps import vector_infos
from world_model.contract import Dynamics
from world_model.spaces import ActionCheck, unflatten

# Both classes are in one file because each makes the other: DreamVectorEnv.row() and DreamEnv.fork().


class DreamEnv(gym.Env[Any, Any]):
    """A Gymnasium environment that imagines its steps with a world model.

        env = DreamEnv("reacher", chunk=4)
        obs, _ = env.reset(seed=0)
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())

    model: the name of a shipped model, a folder, a hub id, or any ``world_model.contract.Dynamics``.
    settings: chunk, sampled, flow_steps, max_episode_steps, reward_fn, termination_fn, max_error and confidence; see
        ``kairos_gym.dream.config.DreamConfig``.
    render_mode: "rgb_array" lets the real simulator draw the dreamed state.

    Spaces are the simulator's own, with chunk > 1 that of K actions in a row. Returned observations are clipped to the
    space's bounds, as Gymnasium requires: a dreamed cosine may be 1.0001. The dream goes on from the model's unclipped
    prediction, which is in ``info["imagined"]``.

    Raises FileNotFoundError for an unknown model, TypeError for an object that is no Dynamics or an unknown setting,
    ValueError for a setting or render_mode that this model doesn't allow.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012, Gymnasium's form

    def __init__(self, model: str | Path | Dynamics, *, render_mode: str | None = None, **settings: Any):
        self._init_from(DreamBatch(model, 1, DreamConfig(**settings)), 0, render_mode, owns_batch=True)

    @classmethod
    def _view(cls, batch: DreamBatch, row: int, render_mode: str | None) -> DreamEnv:
        """An env whose steps are those of one row of a DreamVectorEnv's ``batch``."""
        env = cls.__new__(cls)
        env._init_from(batch, row, render_mode, owns_batch=False)
        return env

    def _init_from(self, batch: DreamBatch, row: int, render_mode: str | None, *, owns_batch: bool) -> None:
        self.metadata, self.render_mode = batch.renderer.metadata(render_mode), render_mode
        self._batch, self._row, self._owns_batch = batch, row, owns_batch
        self._rows: Rows | None = None if batch.batch == 1 else np.array([row])
        self.observation_space, self.action_space = batch.adapter.observation_space, batch.adapter.action_space
        self._check = ActionCheck(self.action_space)

    @property
    def model(self) -> Dynamics:
        return self._batch.model

    @property
    def chunk(self) -> int:
        return self._batch.chunk

    @property
    def max_episode_steps(self) -> int | None:
        return self._batch.config.max_episode_steps

    @property
    def state(self) -> Any:
        """The model's state of this dream, an immutable snapshot from which planners may start. None before reset."""
        state = self._batch.state
        return state if state is None or self._rows is None else state.select(torch.from_numpy(self._rows))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode -> observation, {}. The same seed gives the same start and noise.

        options: None draws one of the real starts that are stored with the model. {"observation": obs} begins at an
            observation. {"observation": [T,...], "actions": [T,...]} begins after T real frames; each action led to the
            observation in its row, and the first is ignored if the episode began there.

        Raises ValueError for options that are unknown, of a wrong shape, not finite or outside the observation space,
        and without options where the model has no starts.
        """
        self._batch.expect_open()
        context = self._batch.adapter.parse_options(options or {}, ())
        super().reset(seed=seed)
        self._batch.reset(self._rows, [seed], context)
        return self._batch.observation(self._row), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Imagine an action, or K of them with chunk=K -> observation, reward, terminated, truncated, info.

        A chunk counts up to the inner step that terminates or reaches the limit: the observation is that step's, the
        reward the sum up to it. A dream that turns non-finite is truncated at its last finite observation. info holds

        - "imagined": all K inner steps as the model predicted them, "obs" [K,O], "reward" [K], "terminated" [K]; those
          after the end mean nothing;
        - "trust", with max_error or confidence: "error_bound" (infinite beyond the longest calibrated dream),
          "confidence", and "steps" since the last real frame;
        - "non_finite": True, where the dream turned non-finite.

        Raises TypeError for actions that aren't numbers, ValueError for a wrong shape, a NaN or an action out of range;
        the dream then stays as it was. Raises ResetNeeded before ``reset`` and after the end.
        """
        batch = self._batch
        actions = batch.adapter.to_vectors(self._check(action), 1, batch.device)
        with torch.set_grad_enabled(False):
            step = batch.step(actions, self._rows)
        (obs, reward), (terminated, truncated, non_finite), arrays = step.outcome(), step.done, step.arrays
        info: dict[str, Any] = {
            "imagined": {"obs": arrays.obs[0], "reward": arrays.reward[0], "terminated": arrays.terminated[0]}
        }
        if not step.is_complete and non_finite[0]:
            info["non_finite"] = True
        if step.error_bound is not None:
            bound, steps = float(step.error_bound.bound[0]), int(step.error_bound.steps[0])
            info["trust"] = {"error_bound": bound, "confidence": batch.config.confidence, "steps": steps}
        return batch.adapter.to_observations(obs[0]), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def snapshot(self) -> bytes:
        """Everything that the dream's future depends on, except the weights, which it names by their fingerprint.

        Raises ResetNeeded before the first ``reset``.
        """
        return self._batch.snapshot(self._rows)

    def restore(self, snapshot: bytes) -> Any:
        """Continue a dream from its ``snapshot``, in any env of the same model and any process -> observation.

        The observation is None where it was not decoded when the snapshot was taken.

        Raises ValueError for a snapshot that is damaged, of several dreams or of another model; the dream then stays as
        it was.
        """
        self._batch.restore(snapshot, self._rows)
        return self._batch.observation(self._row)

    def fork(self, n: int) -> DreamVectorEnv:
        """n copies of this dream, each with its past, noise and seed -> DreamVectorEnv.

        With equal actions they dream the same; ``reset(seed=...)`` sets them apart. Its autoreset mode is NEXT_STEP, or
        DISABLED where the model has no starts.
        """
        mode = AutoresetMode.NEXT_STEP if self._batch.has_starts else AutoresetMode.DISABLED
        return DreamVectorEnv._from_batch(self._batch.fork(n, self._rows), self.render_mode, mode)

    def render(self) -> NDArray[np.uint8]:
        """The real simulator's picture of the present observation -> [height,width,3].

        Raises ResetNeeded before ``reset``, ValueError without a render_mode, TypeError or ValueError where the
        observation doesn't determine the simulator's state, RuntimeError where the simulator can't draw here.
        """
        if self.render_mode is None:
            raise ValueError("this dream was made without a render_mode: make it with render_mode='rgb_array'")
        return self._batch.render(self._row)

    def close(self) -> None:
        """Forget the dream; may be called twice. A row of a DreamVectorEnv stays until that is closed."""
        if self._owns_batch:
            self._batch.close()


class DreamVectorEnv(VectorEnv[Any, Any, Any]):
    """``num_envs`` dreams of a world model as a Gymnasium vector environment, imagined in one batch.

        envs = DreamVectorEnv("reacher", 64)
        obs, _ = envs.reset(seed=0)
        obs, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())

    Dream b is the same as a ``DreamEnv`` with its seed. model, settings and render_mode: see ``DreamEnv``.

    autoreset_mode: what happens to a dream that has ended. NEXT_STEP: the next ``step`` ignores its action and begins
        its next episode. SAME_STEP: the same ``step`` begins it; ``infos["final_obs"]`` and ``infos["final_info"]``
        hold the end. DISABLED: it waits for ``reset(options={"reset_mask": ...})``, which is the only mode for a model
        without starts.
    """

    def __init__(
        self,
        model: str | Path | Dynamics,
        num_envs: int = 1,
        *,
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        **settings: Any,
    ):
        self._init_from(DreamBatch(model, num_envs, DreamConfig(**settings)), render_mode, autoreset_mode)

    @classmethod
    def _from_batch(
        cls, batch: DreamBatch, render_mode: str | None, autoreset_mode: str | AutoresetMode
    ) -> DreamVectorEnv:
        env = cls.__new__(cls)
        env._init_from(batch, render_mode, autoreset_mode)
        return env

    def _init_from(self, batch: DreamBatch, render_mode: str | None, autoreset_mode: str | AutoresetMode) -> None:
        self._batch, self.num_envs, self.render_mode = batch, batch.batch, render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode is not AutoresetMode.DISABLED and not batch.has_starts:
            raise ValueError(
                "this model keeps no real starts that ended dreams could begin again from: pass "
                "autoreset_mode='Disabled' and reset(options={'observation': ..., 'reset_mask': ...})"
            )
        self.metadata = {**batch.renderer.metadata(render_mode), "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = batch.adapter.observation_space
        self.single_action_space = batch.adapter.action_space
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
        return self._batch.config.max_episode_steps

    @property
    def state(self) -> Any:
        """The model's state of all dreams, an immutable snapshot from which planners may start. None before reset."""
        return self._batch.state

    @property
    def observations(self) -> Any:
        """The present observations [B,...]. None before reset, and after a step with decode=False."""
        obs = self._batch.obs
        return None if obs is None else self._batch.adapter.to_observations(to_numpy(obs))

    def row(self, b: int) -> DreamEnv:
        """Dream b as a ``DreamEnv``: a view, whose steps are this env's steps of that dream alone.

        Raises IndexError where there is no such dream.
        """
        if not is_int(b) or not -self.num_envs <= b < self.num_envs:
            raise IndexError(f"there are {self.num_envs} dreams, 0 to {self.num_envs - 1}; got {b!r}")
        return DreamEnv._view(self._batch, int(b) % self.num_envs, self.render_mode)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every dream -> observations [B,...], {}.

        seed: dream b gets seed + b, or seed[b]; None begins the next episode of its present seed.
        options: "observation" [B,...] or [B,T,...] and "actions" [B,T,...], as in ``DreamEnv.reset``. "reset_mask",
            bool [B], resets only those dreams.

        Raises ValueError or TypeError for a wrong seed or option; the dreams then stay as they were.
        """
        self._batch.expect_open()
        if not isinstance(options, dict | None):
            raise TypeError(f"options must be a dict, got {options!r}")
        options = dict(options or {})
        rows = parse_reset_mask(options.pop("reset_mask"), self.num_envs) if "reset_mask" in options else None
        context = self._batch.adapter.parse_options(options, (self.num_envs,))
        seeds = parse_seeds(seed, self.num_envs)
        if rows is not None:
            seeds = [seeds[r] for r in rows]
            if context is not None:
                obs, actions = context
                context = obs[rows], None if actions is None else actions[rows]
        super().reset(seed=seeds[0])
        self._batch.reset(rows, seeds, context)
        return self.observations, {}

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Imagine actions [B,...], or [B,K,...] -> observations, rewards, terminations, truncations [B], infos.

        As ``DreamEnv.step`` for each dream; ``autoreset_mode`` says what happens to those that have ended. infos has
        "imagined" with "obs" [B,K,O], "reward" and "terminated" [B,K]; "trust" with "error_bound", "confidence" and
        "steps" [B]; "non_finite" [B]; and for each a mask [B] under its name with "_" before it.
        """
        batch = self._batch
        vectors = batch.adapter.to_vectors(self._check(actions), self.num_envs, batch.device)
        with torch.set_grad_enabled(False):
            step, stepped, ended, restarted = step_and_autoreset(batch, vectors, self.autoreset_mode)
        (obs, reward), (terminated, truncated, _) = step.outcome(), step.done
        infos_of = partial(vector_infos, step, batch.config.confidence)
        infos = infos_of(stepped if ended is None else ~ended)
        if ended is not None:
            infos |= {"final_obs": np.full(self.num_envs, None), "_final_obs": ended}
            infos |= {"final_info": infos_of(ended), "_final_info": ended}
            for b in np.flatnonzero(ended):
                infos["final_obs"][b] = batch.adapter.to_observations(obs[b])
        if restarted:
            obs = to_numpy(batch.obs)
        obs = batch.adapter.to_observations(obs)
        return obs, reward.astype(np.float64), terminated.copy(), truncated.copy(), infos

    def step_torch(self, actions: Tensor, *, decode: bool = True) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """``step`` for learners on the model's device, where all results stay.

        actions: float32 [B,A] or [B,K,A], vectors of ``model.spec.action_box``; those of Discrete spaces one-hot.
        decode: False skips the decoder where nothing else needs it; observations are then None.

        Returns observations (float32 [B,...] in the space's structure, clipped), rewards float32 [B], terminations and
        truncations bool [B], and infos: "imagined" (``world_model.contract.Imagined``); "error_bound" float32 [B] with
        max_error or confidence; "non_finite" [B] where a dream turned non-finite; "final_obs" [B,...] and its mask
        "_final_obs" [B] where SAME_STEP began new episodes. With NEXT_STEP a dream that only begins again imagines
        zeros. Don't change observations or "imagined" in place: the dreams go on from them.

        Gradients flow through the dream where ``actions`` require them, until ``detach`` or a step whose actions don't.
        Raises TypeError for anything but a tensor, ValueError for actions of another shape or dtype or out of range.
        """
        batch, box = self._batch, self.model.spec.action_box
        shape = (self.num_envs, *([] if self.chunk == 1 else [self.chunk]), *box.shape)
        if not isinstance(actions, Tensor):
            raise TypeError(f"step_torch takes a tensor, got {type(actions).__name__}; step takes the others")
        if actions.shape != shape or actions.dtype != torch.float32:
            raise ValueError(f"actions must be float32 {list(shape)}, got {actions.dtype} {list(actions.shape)}")
        if not batch.adapter.contains_actions(actions):
            raise ValueError(f"actions must be finite and within {box}; clip or rescale them before the step")
        with torch.set_grad_enabled(torch.is_grad_enabled() and actions.requires_grad):
            vectors = actions.view(self.num_envs, self.chunk, -1)
            step, _, ended, _ = step_and_autoreset(batch, vectors, self.autoreset_mode, decode=decode)
            reward = step.reward
            infos: dict[str, Any] = {"imagined": step.imagined}
            if ended is not None:
                infos["_final_obs"] = torch.from_numpy(ended).to(reward.device)
                infos["final_obs"] = self._to_observations(step.obs)
            if not step.is_complete and step.done.non_finite.any():
                infos["non_finite"] = torch.from_numpy(step.done.non_finite).to(reward.device)
            if step.error_bound is not None:
                infos["error_bound"] = torch.from_numpy(step.error_bound.bound).to(reward.device, reward.dtype)
            obs = self._to_observations(batch.obs) if decode else None
        terminated, truncated = (torch.from_numpy(x.copy()).to(reward.device) for x in step.done[:2])
        return obs, reward, terminated, truncated, infos

    def detach(self) -> None:
        """Cut the gradient that led here, between the rollouts that a learner differentiates."""
        self._batch.detach()

    def snapshot(self, rows: Sequence[int] | None = None) -> bytes:
        """Everything that the future of these dreams, or of some rows, depends on except the weights."""
        return self._batch.snapshot(parse_rows(rows, self.num_envs))

    def restore(self, snapshot: bytes, rows: Sequence[int] | None = None) -> Any:
        """Continue from a ``snapshot`` in all dreams, or in as many rows as it holds -> observations [B,...].

        The observations are None where some are unknown: not decoded, or not begun. Raises what ``DreamEnv.restore``
        does.
        """
        self._batch.restore(snapshot, parse_rows(rows, self.num_envs))
        return self.observations

    def fork(self, n: int, rows: Sequence[int] | None = None) -> DreamVectorEnv:
        """n copies of each dream, or of each of ``rows``, next to each other -> a new DreamVectorEnv.

        Copies keep their seed: with equal actions they dream the same, also in their next episodes;
        ``reset(seed=...)`` sets them apart.
        """
        copies = self._batch.fork(n, parse_rows(rows, self.num_envs))
        return DreamVectorEnv._from_batch(copies, self.render_mode, self.autoreset_mode)

    def render(self) -> tuple[NDArray[np.uint8], ...]:
        """A picture of each dream; see ``DreamEnv.render``."""
        if self.render_mode is None:
            raise ValueError("these dreams were made without a render_mode: make them with render_mode='rgb_array'")
        return tuple(self._batch.render(b) for b in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        self._batch.close()

    def _to_observations(self, obs: Tensor | None) -> Any:
        return None if obs is None else unflatten(self.model.spec.observation_space, self._batch.adapter.clip(obs))
