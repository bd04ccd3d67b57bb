"""Dreams: B dreams of one model side by side, begun, stepped, copied and kept by rows; the envs are doors to it."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Env
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from kairos_gym.dream.space_adapter import SpaceAdapter
from kairos_gym.dream.step_function import StepFn, StepFunction, to_numpy
from kairos_gym.dream.steps import ErrorBound, InnerSteps, Step, StepEnds, is_uneventful
from kairos_gym.models import load
from world_model.contract import Dynamics, Imagined
from world_model.noise import bits
from world_model.spaces import unflatten
from world_model.trust import ConformalBound

Rows = NDArray[np.int64]


class _InnerBounds(NamedTuple):
    """Of R dreams after each of K inner steps, all [R,K]: see ``world_model.trust``."""

    uncertainty: NDArray[np.float32]
    bound: NDArray[np.float64]
    steps: NDArray[np.int64]  # since the last real frame


class DreamBatch:
    """B dreams of ``model``. Observations [R,O] and actions [R,K,A] are vectors here, on the model's device.

    Each dream has a seed of its own and counts its episodes; start and noise of an episode are a function of the two.
    With its actions they decide all that is dreamed, whatever rows lie beside it.

    model, chunk, sampled, flow_steps, max_episode_steps, reward_fn, termination_fn, max_error, confidence: see
    ``DreamEnv``.
    """

    def __init__(
        self,
        model: str | Path | Dynamics,
        batch: int,
        *,
        chunk: int = 1,
        sampled: bool = False,
        flow_steps: int = 1,
        max_episode_steps: int | None = None,
        reward_fn: StepFn | None = None,
        termination_fn: StepFn | None = None,
        max_error: float | None = None,
        confidence: float | None = None,
    ):
        self.model: Any = load(model) if isinstance(model, str | Path) else model
        if not all(hasattr(self.model, verb) for verb in ("spec", "initial", "observe", "imagine")):
            raise TypeError(f"model must be a name, a folder, a hub id or a Dynamics, got {type(model).__name__}")
        spec = self.model.spec
        self.card: dict[str, Any] = getattr(self.model, "card", None) or {}
        if not is_count(batch):
            raise ValueError(f"num_envs must be a whole number of at least 1, got {batch!r}")
        if not is_count(chunk) or chunk > spec.chunk:
            raise ValueError(
                f"chunk must be a whole number from 1 to {spec.chunk}, this model's longest, got {chunk!r}"
            )
        if not is_count(flow_steps):
            raise ValueError(f"flow_steps must be a whole number of at least 1, got {flow_steps!r}")
        limit = self.card.get("time_limit") if max_episode_steps is None else max_episode_steps
        if limit is not None and not is_count(limit):
            raise ValueError(f"max_episode_steps must be a whole number of at least 1, got {limit!r}")
        self.batch, self.chunk, self.limit = int(batch), int(chunk), limit
        self._settings: dict[str, Any] = dict(
            chunk=chunk,
            sampled=sampled,
            flow_steps=flow_steps,
            max_episode_steps=max_episode_steps,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
            max_error=max_error,
            confidence=confidence,
        )
        self.max_error, self.confidence = max_error, 0.9 if confidence is None else confidence
        self._trust = None if max_error is None and confidence is None else self._calibration(sampled, flow_steps)
        # Models without a flow know neither argument, so the defaults are left unsaid.
        self._flow: dict[str, Any] = ({"sampled": True} if sampled else {}) | (
            {"flow_steps": flow_steps} if flow_steps != 1 else {}
        )
        self._reward = None if reward_fn is None else StepFunction("reward_fn", reward_fn)
        self._termination = None if termination_fn is None else StepFunction("termination_fn", termination_fn)
        self.adapter = SpaceAdapter(spec, self.chunk)

        self.state: Any = None  # what the dreams remember, an immutable snapshot: planners may start from it
        # The present observations as the model said them: the last of these [B,K,O], or else [B,O] and which are known.
        self._inner_obs: Tensor | None = None
        self._obs: Tensor | None = None
        self._known = np.zeros(self.batch, bool)
        self.ended = np.ones(self.batch, bool)  # or not begun
        self._seed = np.zeros(self.batch, np.int64)
        self._episode = np.full(self.batch, -1)  # since the seed was given; -1 before the first
        self._clock = 0  # simulator steps that all have made
        self._born = np.zeros(self.batch, np.int64)  # where the clock stood when the episode began, more or less
        self._uncertainty = np.full(self.batch, np.nan, np.float32)  # NaN where nobody asked; see ``world_model.trust``
        self.any_ended, self._due = True, 0  # where the clock stands when the first dream reaches its limit
        self.everywhere, self._inner_steps = np.ones(self.batch, bool), np.arange(1, self.chunk + 1)
        self.everywhere.flags.writeable = False  # infos point to it
        never = np.zeros(self.batch, bool)
        self._never = StepEnds(never, never, never)
        self._artist: Env | None = None
        self.closed = False
        self.device = torch.device("cpu")  # where the model is, known from its first state on

    @property
    def obs(self) -> Tensor | None:
        """[B,O], the present observations as the model said them; None where some were not decoded or not begun."""
        if self._inner_obs is not None:
            return self._inner_obs[:, -1]
        return self._obs if self._known.all() else None

    @property
    def bounds_error(self) -> bool:
        """Whether somebody asked how wrong the dreams may be."""
        return self._trust is not None

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
        """Begin an episode in each of ``rows``, or in all, with a new seed or the next of its own.

        context: real experience to begin from, obs [R,T,O] and actions [R,T,A]; else one of the model's starts.
        Raises ValueError where there is neither.
        """
        self.expect_open()
        at = self._at(rows)
        seed, episode = self._seed[at], self._episode[at] + 1
        for i, given in enumerate([None] * len(at) if seeds is None else seeds):
            if given is not None or episode[i] == 0:
                seed[i], episode[i] = (secrets.randbits(63) if given is None else int(given) % 2**63), 0
        key = torch.from_numpy(seed)
        noise = bits(key, torch.from_numpy(2 * episode + 1))
        if context is None:
            if not self.has_starts:
                raise ValueError(
                    "this model keeps no real starts: reset(options={'observation': ...}) with one of yours"
                )
            starts = self.model.starts
            drawn = bits(key, torch.from_numpy(2 * episode)) % len(starts.obs)
            context = starts.obs[drawn], starts.actions[drawn]
        obs, actions = context
        with torch.no_grad():  # but not below: the gradient of the other rows goes on
            fresh = self.model.initial(len(at), seeds=noise)
            self.device = device = next(iter(fresh.tensors.values())).device
            obs, actions = obs.to(device), None if actions is None else actions.to(device)
            state = self.model.observe(fresh, obs, actions)
        if rows is not None:
            whole = self.model.initial(self.batch) if self.state is None else self.state
            state = whole.put(torch.from_numpy(at), state)
        self.state = state
        self._place(at, obs[:, -1].clone())
        self._seed[at], self._episode[at], self._born[at], self.ended[at] = seed, episode, self._clock, False
        if self._trust is not None:
            self._uncertainty[at] = self._trust.initial(torch.full((len(at),), obs.shape[1])).numpy()
        self._count()

    def step(self, actions: Tensor, rows: Rows | None = None, *, decode: bool = True) -> Step:
        """Imagine actions [R,K,A] in each of ``rows``, or in all -> Step.

        Raises ResetNeeded where one has ended or not begun. Where it raises anything, all dreams are as they were.
        """
        if self.closed or self.any_ended:
            self._expect_going(rows)
        state = self.state if rows is None else self.state.select(torch.from_numpy(rows))
        after, imagined = self.model.imagine(state, actions, decode=decode, **self._flow)
        if self._reward is not None or self._termination is not None:
            imagined = self._evaluations(actions, imagined, rows)
        inner = InnerSteps.of(imagined) if self.device.type == "cpu" else None
        at = self._at(rows)
        bounds = None if self._trust is None else self._inner_bounds(actions, inner or InnerSteps.of(imagined), at)
        if (
            rows is None
            and self._clock + self.chunk < self._due
            and is_uneventful(imagined, inner)
            and (bounds is None or not self._too_wrong(bounds.bound).any())
        ):
            # Nothing ends: what nearly every step comes to.
            self.state, self._inner_obs = after, imagined.obs
            if imagined.obs is None:
                self._known[:] = False
            self._clock += self.chunk
            return Step(imagined, self._never, inner, error_bound=self._error_bound(bounds, at, self.chunk))
        stepped, steps = self._ending(imagined, inner or InnerSteps.of(imagined), at, bounds)
        stepped.error_bound = self._error_bound(bounds, at, steps)
        self.state = after if rows is None else self.state.put(torch.from_numpy(at), after)
        self._place(at, stepped.obs)
        self._born[at] -= steps  # the clock stands still for the others
        self.ended[at] = stepped.ends.terminated | stepped.ends.truncated
        self._count()
        return stepped

    # -- copies --------------------------------------------------------------------------------------------------------

    def snapshot(self, rows: Rows | None = None) -> bytes:
        """All that the future of these dreams depends on, but for the weights, which are named by their fingerprint."""
        self.expect_open()
        at = self._at(rows)
        self.expect_begun(at)
        where = torch.from_numpy(at)
        kept = {
            "state": torch.frombuffer(bytearray(self.state.select(where).to_bytes()), dtype=torch.uint8),
            "model": torch.frombuffer(bytearray(self._fingerprint().encode()), dtype=torch.uint8),
        }
        kept |= {name: torch.from_numpy(column[at]) for name, column in self._columns().items()}
        obs, known = self.present()
        if known[at].all():
            kept["obs"] = obs[where].detach().cpu()
        body = save_tensors(kept)
        return zlib.crc32(body).to_bytes(4, "little") + body

    def restore(self, blob: bytes, rows: Rows | None = None) -> None:
        """Put what ``snapshot`` gave into ``rows``, or into all.

        Raises TypeError for what isn't bytes, ValueError where it is no whole snapshot, of another model or of another
        number of dreams.
        """
        self.expect_open()
        if not isinstance(blob, bytes):
            raise TypeError(f"a snapshot is bytes, got {type(blob).__name__}")
        at = self._at(rows)
        try:
            if len(blob) < 4 or zlib.crc32(blob[4:]) != int.from_bytes(blob[:4], "little"):
                raise ValueError("its checksum is wrong")
            kept = load_tensors(blob[4:])
            model, columns = (
                bytes(kept["model"].numpy()).decode(),
                {name: kept[name].numpy() for name in self._columns()},
            )
            blob_of_state = bytes(kept["state"].numpy())
        except Exception as error:
            raise ValueError(f"this is not a whole snapshot: {error}") from error
        if model != self._fingerprint():
            raise ValueError(
                f"this snapshot was made with the model {model}, this env dreams with {self._fingerprint()}: make the "
                "env with the same weights"
            )
        fresh = self.model.initial(len(at))
        self.device = next(iter(fresh.tensors.values())).device
        if len(columns["age"]) != len(at):
            raise ValueError(f"this snapshot holds {len(columns['age'])} dreams, and there are {len(at)} to restore")
        if self.limit is not None and (columns["age"][~columns["ended"]] >= self.limit).any():
            raise ValueError(
                f"this snapshot is {columns['age'].max()} steps into its episode, and here episodes end after "
                f"{self.limit}: make the env with a larger max_episode_steps"
            )
        if self._trust is not None and np.isnan(columns["doubt"]).any():
            raise ValueError(
                "this snapshot was taken where nobody asked how wrong the dreams may be: make both envs with the same "
                "confidence or max_error"
            )
        obs = kept["obs"].to(self.device) if "obs" in kept else None
        state = type(fresh).from_bytes(blob_of_state, self.device)
        if {name: t.shape for name, t in state.tensors.items()} != {name: t.shape for name, t in fresh.tensors.items()}:
            raise ValueError("this snapshot was made with a model that remembers other things than this one")
        if rows is not None:
            whole = self.model.initial(self.batch) if self.state is None else self.state
            state = whole.put(torch.from_numpy(at), state)
        self.state = state
        self._place(at, obs)
        self._set_columns(at, columns)

    def fork(self, n: int, rows: Rows | None = None) -> DreamBatch:
        """n copies of each of ``rows``, or of all, next to each other -> new Dreams of the same model."""
        self.expect_open()
        if not is_count(n):
            raise ValueError(f"fork(n) makes a whole number of copies of at least 1, got {n!r}")
        at = self._at(rows)
        self.expect_begun(at)
        at = np.repeat(at, n)
        copies = DreamBatch(self.model, len(at), **self._settings)
        copies.state = self.state.select(torch.from_numpy(at))
        obs, known = self.present()
        copies._obs, copies._known, copies.device = obs[torch.from_numpy(at)], known[at], self.device
        copies._set_columns(slice(None), {name: column[at] for name, column in self._columns().items()})
        return copies

    def detach(self) -> None:
        """Cut the gradient that led here."""
        if self.state is not None:
            self.state = self.state.detach()
        self._obs, self._inner_obs = (None if x is None else x.detach() for x in (self._obs, self._inner_obs))

    # -- pictures ------------------------------------------------------------------------------------------------------

    def rendering(self, render_mode: str | None) -> dict[str, Any]:
        """What an env's metadata says of pictures. Raises ValueError for a mode that can't be had."""
        modes = ["rgb_array"] if "env" in self.card else []  # the simulator that the model was trained on
        if render_mode is not None and render_mode not in modes:
            why = "" if modes else ": its card names no simulator ('env') to draw with"
            raise ValueError(f"render_mode must be one of {[None, *modes]} for this model{why}; got {render_mode!r}")
        return {"render_modes": modes, "render_fps": max(1, round(1 / (self.model.spec.dt * self.chunk)))}

    def render_observation(self, row: int) -> NDArray[np.uint8]:
        """The present observation of a dream, as the real simulator draws the state that shows it."""
        self.expect_open()
        self.expect_begun(np.array([row]))
        if self.obs is None:
            raise ValueError("the present observation is not known: the last step was made with decode=False")
        name = self.card["env"]
        try:
            from envs import make_real, render_observation  # only those who draw need a simulator

            if self._artist is None:
                self._artist = make_real(name, render_mode="rgb_array")
                self._artist.reset(seed=0)
            return render_observation(self._artist, self.adapter.to_observations(to_numpy(self.obs[row])))
        except (TypeError, ValueError, ImportError):
            raise  # they say themselves what this observation lacks
        except Exception as error:
            raise RuntimeError(
                f"{name} can't draw on this machine ({error}): without a display, set MUJOCO_GL=egl for MuJoCo tasks "
                "(Debian: libegl1 libgl1-mesa-dri) or SDL_VIDEODRIVER=dummy for Pendulum before Python starts"
            ) from error

    def close(self) -> None:
        """Forget the dreams; may be called twice."""
        if self._artist is not None:
            self._artist.close()
        self._artist = self.state = self._obs = self._inner_obs = None
        self._known[:] = False
        self.closed = True

    # -- inside --------------------------------------------------------------------------------------------------------

    def _ending(
        self, imagined: Imagined, inner: InnerSteps, at: Rows, bounds: _InnerBounds | None
    ) -> tuple[Step, NDArray[np.int64]]:
        """The general case, in which dreams may end within the chunk -> Step, inner steps that count [R]."""
        obs, reward, end = imagined.obs, imagined.reward, inner.terminated
        good = np.isfinite(inner.reward)
        if inner.obs is not None:
            good &= np.isfinite(inner.obs).all(-1)
        steps = np.where(end.any(1), end.argmax(1) + 1, self.chunk)
        left = np.full(len(at), self.chunk + 1) if self.limit is None else self.limit - (self._clock - self._born[at])
        if bounds is not None:  # the first inner step that may be too wrong is the last
            wrong = self._too_wrong(bounds.bound)
            left = np.where(wrong.any(1), np.minimum(left, wrong.argmax(1) + 1), left)
        steps = np.minimum(steps, left)
        sound = np.where(good.all(1), self.chunk, good.argmin(1))  # inner steps before the first that isn't finite
        lost = sound < steps
        steps = np.where(lost, sound, steps)
        counts = np.arange(self.chunk) < steps[:, None]
        # What doesn't count may be NaN, so it is masked, not multiplied by zero.
        earned = torch.where(torch.from_numpy(counts).to(reward.device), reward, 0.0).sum(1)
        last = None
        if obs is not None:
            which = torch.from_numpy(steps).to(obs.device)
            before = self.present()[0][torch.from_numpy(at)]
            known = obs[torch.arange(len(at), device=obs.device), (which - 1).clamp_min(0)]
            last = torch.where((which > 0)[:, None], known, before)
        ends = StepEnds((end & counts).any(1), lost | (steps == left), lost)
        return Step(imagined, ends, inner, last, earned), steps

    def _calibration(self, sampled: bool, flow_steps: int) -> ConformalBound:
        """Raises ValueError where the model can't say how wrong it may be, or not with that confidence."""
        for name, number in (("max_error", self.max_error), ("confidence", self.confidence)):
            if number is not None and (not isinstance(number, int | float | np.number) or isinstance(number, bool)):
                raise TypeError(f"{name} must be a number, got {number!r}")
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"max_error must be above 0, got {self.max_error}")
        if sampled or flow_steps != 1:
            raise ValueError(
                "max_error and confidence bound the error of the mean dream in one Euler step, so they can't go with "
                f"{sampled=} and {flow_steps=}"
            )
        trust = getattr(self.model, "trust", None)
        if trust is None:
            raise ValueError(
                "this model was not calibrated, so it can't say how wrong it may be: run kairos calibrate MODEL "
                "DATASET with recorded episodes that its training left out"
            )
        trust.check_confidence(self.confidence)
        self._widths = trust.quantile(self.confidence, self.chunk).double().numpy()
        return trust  # type: ignore[no-any-return]

    def _inner_bounds(self, actions: Tensor, inner: InnerSteps, at: Rows) -> _InnerBounds:
        """How wrong the dreams ``at`` may be after each of these inner steps."""
        if inner.obs is None or (self._inner_obs is None and not self._known[at].all()):
            raise ValueError("max_error and confidence follow the observations, so no step may have decode=False")
        assert self._trust is not None
        before = to_numpy(self.present()[0])[at, None]
        if self.chunk > 1:
            before = np.concatenate([before, inner.obs[:, :-1]], 1)
        uncertainty = self._trust.propagate(self._uncertainty[at], before, to_numpy(actions))
        steps = (self._clock - self._born[at])[:, None] + self._inner_steps
        widths = self._widths[np.minimum(steps, len(self._widths)) - 1]
        return _InnerBounds(uncertainty, uncertainty * widths, steps)

    def _too_wrong(self, bound: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.zeros(bound.shape, bool) if self.max_error is None else ~(bound <= self.max_error)

    def _error_bound(self, bounds: _InnerBounds | None, at: Rows, steps: Any) -> ErrorBound | None:
        """Keep the doubt after so many inner ``steps`` (of a lost dream, none may count), and tell of it."""
        if bounds is None:
            return None
        which = (slice(None), -1) if isinstance(steps, int) else (np.arange(len(at)), np.maximum(steps, 1) - 1)
        self._uncertainty[at] = bounds.uncertainty[which]
        return ErrorBound(bounds.bound[which], bounds.steps[which])

    def _evaluations(self, actions: Tensor, imagined: Imagined, rows: Rows | None) -> Imagined:
        """What the user's own functions say of the imagined steps, in place of what the model says."""
        (present, known), at = self.present(), self._at(rows)
        if imagined.obs is None or not known[at].all():
            raise ValueError("reward_fn and termination_fn judge observations, so no step may have decode=False")
        spec, begun = self.model.spec, present[torch.from_numpy(at)]
        seen = self.adapter.clip(torch.cat([begun[:, None], imagined.obs], 1))
        steps = (
            unflatten(spec.observation_space, seen[:, :-1].flatten(0, 1)),
            unflatten(spec.action_space, actions.flatten(0, 1).clone()),  # not the caller's own
            unflatten(spec.observation_space, seen[:, 1:].flatten(0, 1)),
        )
        reward, ends = imagined.reward, imagined.terminated
        if self._reward is not None:
            reward = self._reward(*steps, reward.flatten()).view_as(reward)
        if self._termination is not None:
            ends = self._termination(*steps, ends.flatten()).view_as(ends)
        return Imagined(imagined.obs, reward, ends)

    def _at(self, rows: Rows | None) -> Rows:
        """The rows that are meant: all where none are named."""
        return np.arange(self.batch) if rows is None else rows

    def present(self) -> tuple[Tensor, NDArray[np.bool_]]:
        """The present observations [B,O], and which of them are known [B]; the others are zero."""
        if self._inner_obs is not None:
            return self._inner_obs[:, -1], self.everywhere
        size = self.model.spec.observation_box.shape[0]
        obs = torch.zeros(self.batch, size, device=self.device) if self._obs is None else self._obs
        return obs, self._known

    def _place(self, at: Rows, obs: Tensor | None) -> None:
        """Make ``obs`` [R,O] the present observations of rows ``at``; None: they are not known any more."""
        whole, known = self.present()
        self._known = known.copy()
        self._known[at] = obs is not None
        self._inner_obs = None
        self._obs = whole if obs is None else whole.index_copy(0, torch.from_numpy(at).to(obs.device), obs)

    def _columns(self) -> dict[str, NDArray[Any]]:
        """What is known of each dream beside what the model remembers; age in simulator steps."""
        age = self._clock - self._born
        return {
            "age": age,
            "ended": self.ended.copy(),
            "seed": self._seed.copy(),
            "episode": self._episode.copy(),
            "doubt": self._uncertainty.copy(),
        }

    def _set_columns(self, at: Any, columns: dict[str, NDArray[Any]]) -> None:
        self._born[at] = self._clock - columns["age"]
        for own, name in (
            (self.ended, "ended"),
            (self._seed, "seed"),
            (self._episode, "episode"),
            (self._uncertainty, "doubt"),
        ):
            own[at] = columns[name]
        self._count()

    def _count(self) -> None:
        """Bring up to date what spares most steps a look at every row."""
        self.any_ended = bool(self.ended.any())
        self._due = 2**62 if self.limit is None else self.limit + int(self._born.min())

    def _fingerprint(self) -> str:
        known = getattr(self.model, "fingerprint", None)  # without one, two models of a class are taken for the same
        return known() if known is not None else f"{type(self.model).__qualname__} {self.model.spec}"

    def expect_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("this dream is closed: make a new one")

    def expect_begun(self, rows: Rows | None = None) -> None:
        """Raises ResetNeeded where a dream has not begun yet."""
        at = self._at(rows)
        if not (begun := self._episode[at] >= 0).all():
            which = "the dream has" if self.batch == 1 else f"dreams {at[~begun].tolist()} have"
            raise ResetNeeded(f"{which} not begun: call reset() first")

    def _expect_going(self, rows: Rows | None) -> None:
        self.expect_open()
        at = self._at(rows)
        self.expect_begun(at)
        if len(over := at[self.ended[at]]):
            which = "the dream has" if self.batch == 1 else f"dreams {over.tolist()} have"
            raise ResetNeeded(f"{which} ended: call reset() before step()")


def is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return is_int(value) and bool(value >= 1)
