"""DreamEnv: a world model as a Gymnasium environment, one step of it a chunk of imagined simulator steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from kairos_gym.dream.batch import DreamBatch, Rows
from kairos_gym.dream.step_function import StepFn, to_numpy
from world_model.contract import Dynamics
from world_model.spaces import ActionCheck

if TYPE_CHECKING:
    from kairos_gym.dream.vector_env import DreamVectorEnv


class DreamEnv(gym.Env[Any, Any]):
    """The dream of ``model``, with the simulator's own observation space, one dream at a time.

    model: the name of a shipped model, a folder, a hub id, or any ``world_model.contract.Dynamics``.
    chunk: K, the simulator steps that one ``step`` imagines, 1 to the model's longest. With chunk=1 the action space
        is the simulator's own, else that of K actions in a row: a Box [K,...], of Discrete actions a MultiDiscrete [K].
    sampled: draw each chunk from what the model holds possible, instead of its mean; every episode has its own noise.
    flow_steps: Euler steps of the flow; 1 serves the mean, a sampled dream wants 4 or more.
    max_episode_steps: simulator steps after which an episode is truncated; None takes the simulator's from the model's
        card. ``gym.make`` keeps an argument of that name for its own TimeLimit, which counts steps of this env and can
        only shorten; to dream for longer than the card says, make a ``DreamEnv`` itself.
    reward_fn, termination_fn: functions (obs, action, next_obs) -> [N] of N simulator steps at once, in torch or in
        numpy, instead of what the model says; see ``kairos_gym.dream.step_function``.
    max_error: end a dream (truncated) where its error may have passed this by now: the RMS over dimensions of dreamed
        less real, each over its std in the training data. confidence: with which chance the bound holds (0.9 where only
        max_error is given), for dreams like those the model was calibrated on. With either, ``info["trust"]`` tells the
        bound after each step. See ``world_model.trust``.
    render_mode: "rgb_array" puts the real simulator into the dreamed state and draws that.

    The returned observation is projected onto the space's finite bounds, which Gymnasium requires it to respect: a
    dreamed cosine may be 1.0001. What the model said is in ``info["imagined"]``, and the dream goes on from that.

    Raises FileNotFoundError for an unknown model, ValueError for a chunk, limit, flow_steps, render mode, max_error or
    confidence that can't be had, TypeError for a model or function that isn't one.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012, Gymnasium's form

    def __init__(
        self,
        model: str | Path | Dynamics,
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
    ):
        dreams = DreamBatch(
            model,
            1,
            chunk=chunk,
            sampled=sampled,
            flow_steps=flow_steps,
            max_episode_steps=max_episode_steps,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
            max_error=max_error,
            confidence=confidence,
        )
        self._look_at(dreams, 0, render_mode, None)

    @classmethod
    def of(cls, dreams: DreamBatch, row: int, render_mode: str | None, owner: DreamVectorEnv) -> DreamEnv:
        """A view of one row of the ``dreams`` of ``owner``: stepping it steps that row alone."""
        env = cls.__new__(cls)
        env._look_at(dreams, row, render_mode, owner)
        return env

    def _look_at(self, dreams: DreamBatch, row: int, render_mode: str | None, owner: DreamVectorEnv | None) -> None:
        self.metadata, self.render_mode = dreams.rendering(render_mode), render_mode
        self._batch, self._row, self._owner = dreams, row, owner
        self._rows: Rows | None = None if dreams.batch == 1 else np.array([row])
        self.observation_space, self.action_space = dreams.adapter.observation_space, dreams.adapter.action_space
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
        """What the dream remembers, an immutable snapshot of one row: planners may start from it. None before reset."""
        state = self._batch.state
        return state if state is None or self._rows is None else state.select(torch.from_numpy(self._rows))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin a dream at a real start -> observation, {}.

        Without options, the start is drawn from those kept with the model. options={"observation": obs} begins at an
        observation of your own, options={"observation": [T,...], "actions": [T,...]} at a stretch of real experience
        and the action that led to each observation (what stands in the first row is ignored if the episode began
        there).

        Same seed, same dream. Raises ValueError for options that are unknown, misshapen, not finite or out of the
        observation space, or missing where the model keeps no starts.
        """
        dreams = self._batch
        dreams.expect_open()
        context = dreams.adapter.parse_options(options or {}, ())
        super().reset(seed=seed)
        dreams.reset(self._rows, [seed], context)
        return self._shown(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Imagine an action, or K of them with chunk=K -> observation, reward, terminated, truncated, info.

        The observation is that of the last inner step, and the reward the sum over the inner steps, up to the one
        that terminates or reaches the limit. ``info["imagined"]`` holds all K as the model gave them: "obs" [K,O],
        "reward" [K], "terminated" [K]; those after the end mean nothing. ``info["trust"]``, where it was asked for,
        holds "error_bound" (infinite beyond the longest dream that was calibrated), "confidence" and "steps" since the
        last real frame. A dream that turns non-finite ends there:
        truncated is True, ``info["non_finite"]`` too, and the observation is the last finite one.

        Raises TypeError for actions that aren't numbers and ValueError for a wrong shape, a NaN or one out of range;
        the dream is then as it was and can go on. Raises ResetNeeded before ``reset`` and after the end.
        """
        dreams = self._batch
        actions = dreams.adapter.to_vectors(self._check(action), 1, dreams.device)
        with torch.set_grad_enabled(False):
            step = dreams.step(actions, self._rows)
        (obs, reward), (terminated, truncated, lost) = step.arrays(), step.ends
        info: dict[str, Any] = {
            "imagined": {
                "obs": step.inner.obs[0],
                "reward": step.inner.reward[0],
                "terminated": step.inner.terminated[0],
            }
        }
        if not step.counts_whole and lost[0]:
            info["non_finite"] = True
        if step.error_bound is not None:
            bound, steps = float(step.error_bound.bound[0]), int(step.error_bound.steps[0])
            info["trust"] = {"error_bound": bound, "confidence": dreams.confidence, "steps": steps}
        return dreams.adapter.to_observations(obs[0]), float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def snapshot(self) -> bytes:
        """All that the dream's future depends on but for the weights, whose fingerprint it carries.

        Raises ResetNeeded before the first ``reset``.
        """
        return self._batch.snapshot(self._rows)

    def restore(self, snapshot: bytes) -> Any:
        """Go on from a ``snapshot`` of one dream, of this env or another, here or in another process -> observation.

        None stands for an observation that was not decoded when the snapshot was taken.

        Raises ValueError where it is damaged, cut short, of several dreams or of another model; the dream is then as
        it was.
        """
        self._batch.restore(snapshot, self._rows)
        return self._shown()

    def fork(self, n: int) -> DreamVectorEnv:
        """n dreams that go on from here, each with this one's past, noise and seed -> DreamVectorEnv.

        With equal actions they dream the same; ``reset(seed=...)`` sets them apart. A dream that ends begins again with
        the next step, or waits where the model keeps no starts.
        """
        from kairos_gym.dream.vector_env import DreamVectorEnv

        mode = "NextStep" if self._batch.has_starts else "Disabled"
        return DreamVectorEnv.of(self._batch.fork(n, self._rows), self.render_mode, mode)

    def render(self) -> NDArray[np.uint8]:
        """The present observation, as the real simulator draws the state that shows it -> [height,width,3] uint8.

        Raises ResetNeeded before ``reset``, ValueError where the env was made without a render_mode, TypeError or
        ValueError where the observation doesn't determine a state, RuntimeError where the simulator can't draw here.
        """
        if self.render_mode is None:
            raise ValueError("this dream was made without a render_mode: make it with render_mode='rgb_array'")
        return self._batch.render_observation(self._row)

    def close(self) -> None:
        """Forget the dream; may be called twice. A view forgets nothing: its row belongs to the DreamVectorEnv."""
        if self._owner is None:
            self._batch.close()

    def _shown(self) -> Any:
        obs, known = self._batch.present()
        return self._batch.adapter.to_observations(to_numpy(obs[self._row])) if known[self._row] else None
