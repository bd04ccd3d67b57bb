"""DreamEnv: a world model as a Gymnasium environment, one step of it a chunk of imagined simulator steps."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from numpy.typing import NDArray

from kairos_gym.models import load
from world_model.contract import Dynamics


class DreamEnv(gym.Env[NDArray[Any], NDArray[Any]]):
    """The dream of ``model``, with the simulator's own observation space, one dream at a time.

    model: the name of a shipped model, a folder, a hub id, or any ``world_model.contract.Dynamics``.
    chunk: K, the simulator steps that one ``step`` imagines, 1 to the model's longest. With chunk=1 the action space
        is the simulator's own [A], else a Box [K,A].
    sampled: draw each chunk from what the model holds possible, instead of its mean; every episode has its own noise.
    flow_steps: Euler steps of the flow; 1 serves the mean, a sampled dream wants 4 or more.
    time_limit: simulator steps after which an episode is truncated; None takes the simulator's from the model's card.
    render_mode: "rgb_array" puts the real simulator into the dreamed state and draws that.

    The returned observation is projected onto the space's finite bounds, which Gymnasium requires it to respect: a
    dreamed cosine may be 1.0001. What the model said is in ``info["imagined"]``, and the dream goes on from that.

    Raises FileNotFoundError for an unknown model, ValueError for a chunk, time limit, flow_steps or render mode that
    can't be had, TypeError for a model that isn't one.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012, Gymnasium's form

    def __init__(
        self,
        model: str | Path | Dynamics,
        *,
        chunk: int = 1,
        sampled: bool = False,
        flow_steps: int = 1,
        time_limit: int | None = None,
        render_mode: str | None = None,
    ):
        self.model: Any = load(model) if isinstance(model, str | Path) else model
        if not all(hasattr(self.model, verb) for verb in ("spec", "initial", "observe", "imagine")):
            raise TypeError(f"model must be a name, a folder, a hub id or a Dynamics, got {type(model).__name__}")
        spec, card = self.model.spec, getattr(self.model, "card", None) or {}
        if not _is_count(chunk) or chunk > spec.chunk:
            raise ValueError(
                f"chunk must be a whole number from 1 to {spec.chunk}, this model's longest, got {chunk!r}"
            )
        if not _is_count(flow_steps):
            raise ValueError(f"flow_steps must be a whole number of at least 1, got {flow_steps!r}")
        self.time_limit = card.get("time_limit") if time_limit is None else time_limit
        if self.time_limit is not None and not _is_count(self.time_limit):
            raise ValueError(f"time_limit must be a whole number of at least 1, got {self.time_limit!r}")
        self.real_id: str | None = card.get("env")  # the simulator that the model was trained on
        modes = [] if self.real_id is None else ["rgb_array"]
        if render_mode is not None and render_mode not in modes:
            why = "" if modes else ": its card names no simulator ('env') to draw with"
            raise ValueError(f"render_mode must be one of {[None, *modes]} for this model{why}; got {render_mode!r}")
        self.metadata = {"render_modes": modes, "render_fps": max(1, round(1 / (spec.dt * chunk)))}
        self.chunk, self.render_mode = chunk, render_mode
        # Models without a flow know neither argument, so the defaults are left unsaid.
        self._flow: dict[str, Any] = ({"sampled": True} if sampled else {}) | (
            {"flow_steps": flow_steps} if flow_steps != 1 else {}
        )
        # Copies: a space carries a random generator, which belongs to this env and not to the model.
        self.observation_space: spaces.Box = deepcopy(spec.observation_space)
        single: spaces.Box = deepcopy(spec.action_space)
        low, high = np.tile(single.low, (chunk, 1)), np.tile(single.high, (chunk, 1))
        self.action_space: spaces.Box = single if chunk == 1 else spaces.Box(low, high, dtype=single.low.dtype.type)
        self.state: Any = None  # what the dream remembers, an immutable snapshot: planners may start from it
        self._obs: NDArray[Any] | None = None
        self._age = 0  # simulator steps since reset
        self._ended = self._closed = False
        self._artist: gym.Env | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin a dream at a real start -> observation [O], {}.

        Without options, the start is drawn from those kept with the model. options={"observation": [O]} begins at an
        observation of your own, options={"observation": [T,O], "actions": [T,A]} at a stretch of real experience and
        the action that led to each observation (what stands in the first row is ignored if the episode began there).

        Same seed, same dream. Raises ValueError for options that are unknown, misshapen, not finite or out of the
        observation space, or missing where the model keeps no starts.
        """
        if self._closed:
            raise ClosedEnvironmentError("this dream is closed: make a new DreamEnv")
        obs, actions = self._context(options or {})
        super().reset(seed=seed)
        noise = torch.tensor([int(self.np_random.integers(2**63 - 1))])
        if obs is None:
            starts = self.model.starts
            row = int(self.np_random.integers(len(starts.obs)))
            obs, actions = starts.obs[row], starts.actions[row]
        with torch.no_grad():
            fresh = self.model.initial(1, seeds=noise)
            self.state = self.model.observe(fresh, obs[None], None if actions is None else actions[None])
        self._age, self._ended = 0, False
        self._obs = self._contained(obs[-1].cpu().numpy())
        return self._obs.copy(), {}

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Imagine actions [A], or [K,A] with chunk=K -> observation [O], reward, terminated, truncated, info.

        The observation is that of the last inner step, and the reward the sum over the inner steps, up to the one
        that terminates or reaches the time limit. ``info["imagined"]`` holds all K as the model gave them: "obs"
        [K,O], "reward" [K], "terminated" [K]; those after the end mean nothing. A dream that turns non-finite ends
        there: truncated is True, ``info["non_finite"]`` too, and the observation is the last finite one.

        Raises TypeError for actions that aren't real numbers and ValueError for a wrong shape, a NaN or one out of
        range; the dream is then as it was and can go on. Raises ResetNeeded before ``reset`` and after the end.
        """
        if self._closed:
            raise ClosedEnvironmentError("this dream is closed: make a new DreamEnv")
        if self._obs is None or self._ended:
            raise ResetNeeded(f"the dream has {'ended' if self._ended else 'not begun'}: call reset() before step()")
        actions = torch.from_numpy(self._checked(action).reshape(1, self.chunk, -1))
        with torch.no_grad():
            self.state, imagined = self.model.imagine(self.state, actions, **self._flow)
        # Copies: what is handed out may be changed by whoever gets it, the state may not.
        obs, reward, ends = (np.array(tensor[0].cpu()) for tensor in imagined)

        lasts = np.flatnonzero(ends)
        steps = int(lasts[0]) + 1 if len(lasts) else self.chunk
        if self.time_limit is not None:
            steps = min(steps, self.time_limit - self._age)
        finite = np.isfinite(obs).all(axis=1) & np.isfinite(reward)
        lost = not finite[:steps].all()
        if lost:
            steps = int(finite.argmin())
        if steps:
            self._obs = self._contained(obs[steps - 1])
        self._age += steps
        terminated = bool(ends[:steps].any())
        truncated = lost or self._age == self.time_limit
        self._ended = terminated or truncated
        info: dict[str, Any] = {"imagined": {"obs": obs, "reward": reward, "terminated": ends}}
        if lost:
            info["non_finite"] = True
        return self._obs.copy(), float(reward[:steps].sum()), terminated, truncated, info

    def render(self) -> NDArray[np.uint8]:
        """The present observation, as the real simulator draws the state that shows it -> [height,width,3] uint8.

        Raises ResetNeeded before ``reset``, ValueError where the env was made without a render_mode, TypeError or
        ValueError where the observation doesn't determine a state, RuntimeError where the simulator can't draw here.
        """
        if self.render_mode is None:
            raise ValueError("this dream was made without a render_mode: make it with render_mode='rgb_array'")
        if self._closed or self._obs is None:
            raise ResetNeeded("there is no dream to draw: call reset() before render()")
        assert self.real_id is not None  # or __init__ had refused the render mode
        try:
            from envs import draw, make_real  # only those who draw need a simulator

            if self._artist is None:
                self._artist = make_real(self.real_id, render_mode="rgb_array")
                self._artist.reset(seed=0)
            return draw(self._artist, self._obs)
        except (TypeError, ValueError, ImportError):
            raise  # they say themselves what this observation lacks
        except Exception as error:
            raise RuntimeError(
                f"{self.real_id} can't draw on this machine ({error}): without a display, set MUJOCO_GL=egl for MuJoCo "
                "tasks (Debian: libegl1 libgl1-mesa-dri) or SDL_VIDEODRIVER=dummy for Pendulum before Python starts"
            ) from error

    def close(self) -> None:
        """Forget the dream; may be called twice."""
        if self._artist is not None:
            self._artist.close()
        self._artist = self.state = self._obs = None
        self._closed = True

    def _contained(self, obs: NDArray[Any]) -> NDArray[Any]:
        space = self.observation_space
        return np.clip(obs, space.low, space.high).astype(space.dtype)

    def _checked(self, action: Any) -> NDArray[np.float32]:
        space, given = self.action_space, np.asarray(action)
        if given.dtype.kind not in "fiu":
            raise TypeError(f"actions must be real numbers, float32 {space.shape}, got {given.dtype}: {action!r}")
        if given.shape != space.shape:
            raise ValueError(f"actions must have the shape {space.shape} of env.action_space, got {given.shape}")
        if not np.isfinite(given).all():
            raise ValueError(f"actions must be finite, got {given.tolist()}: look for a NaN in what chose them")
        with np.errstate(over="ignore"):
            played = given.astype(space.dtype)  # before it is compared: 1 + 1e-12 in float64 is no other action than 1
        if (outside := (played < space.low) | (played > space.high)).any():
            at = tuple(np.argwhere(outside)[0])
            raise ValueError(
                f"action {given[at]} is outside [{space.low[at]}, {space.high[at]}]: clip or rescale actions to "
                "env.action_space before the step"
            )
        return played.astype(np.float32)

    def _context(self, options: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Where ``options`` begin: obs [T,O] and actions [T,A]; None where they don't say."""
        if unknown := sorted(set(options) - {"observation", "actions"}):
            raise ValueError(f"unknown reset options {unknown}; known are 'observation' and 'actions'")
        if "observation" not in options:
            if "actions" in options:
                raise ValueError("reset option 'actions' needs 'observation' [T,O]: what each action led to")
            if getattr(self.model, "starts", None) is None:
                raise ValueError(
                    "this model keeps no real starts: reset(options={'observation': ...}) with one of yours"
                )
            return None, None
        (size,), obs = self.observation_space.shape, _numbers("observation", options["observation"])
        if obs.shape[-1:] != (size,) or obs.ndim not in (1, 2) or not obs.size:
            raise ValueError(f"reset option 'observation' must be [{size}] or [T,{size}], got {list(obs.shape)}")
        space = self.observation_space
        if (outside := (obs < space.low) | (obs > space.high)).any():
            raise ValueError(
                f"reset option 'observation' is outside the observation space at {np.argwhere(outside)[0]}"
            )
        if obs.ndim == 1:
            if "actions" in options:
                raise ValueError("reset option 'actions' goes with an 'observation' of [T,O]; this one is [O]")
            return torch.from_numpy(obs)[None], None
        wanted = (len(obs), *self.model.spec.action_space.shape)
        actions = _numbers("actions", options.get("actions", ()))
        if actions.shape != wanted:
            raise ValueError(
                f"an 'observation' of {list(obs.shape)} needs 'actions' {list(wanted)}, the action that led to each; "
                f"got {list(actions.shape) if 'actions' in options else 'none'}"
            )
        return torch.from_numpy(obs), torch.from_numpy(actions)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)


def _numbers(name: str, values: Any) -> NDArray[np.float32]:
    try:
        array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reset option {name!r} must be an array of numbers, got {values!r}") from error
    if not np.isfinite(array).all():
        raise ValueError(f"reset option {name!r} must be finite, got {array.tolist()}")
    return array
