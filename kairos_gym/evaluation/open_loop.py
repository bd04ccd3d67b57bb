"""Imagined against simulated: the open-loop error of a dream, by horizon, on recorded episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_gym.data.datasets import load_dataset, simulator_of
from kairos_gym.models import load
from world_model.contract import Dynamics, Imagined
from world_model.episodes import Episodes
from world_model.model.world_model import WorldModel
from world_model.spaces import alike

CONTEXT = 16  # real frames that a model sees before its dream is scored


@dataclass(frozen=True)
class Windows:
    """W stretches of real episodes: of each a dream sees some frames, then dreams on with the actions really played."""

    episodes: Episodes
    at: Tensor  # int64 [W], the last frame seen
    seen: Tensor  # int64 [W], how many frames are seen, that one included
    horizon: int  # h, steps to dream; those beyond the episode's end are not valid
    states: Tensor | None = None  # [F,S] the simulator's exact state at each frame of the episodes, where it is known

    def part(self, rows: slice | Tensor) -> Windows:
        """Some of them."""
        return replace(self, at=self.at[rows], seen=self.seen[rows])

    @cached_property
    def real(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What followed in the simulator: obs, action, reward, terminated and valid, each [W,h,...]."""
        obs, action, reward, ended, valid = (x[:, 1:] for x in self.episodes.windows(self.at, self.horizon + 1))
        return obs, action, reward, ended, valid

    def begin(self, dynamics: Dynamics) -> Any:
        """A state in which each row has seen its own frames; of the simulator itself, its exact state."""
        if self.states is not None:
            from envs import SimulatorDynamics  # only they have states, so a simulator is at hand

            if isinstance(dynamics, SimulatorDynamics):
                return dynamics.at(self.states[self.at])
        state = dynamics.initial(len(self.at))
        for frames in self.seen.unique().tolist():
            rows = (self.seen == frames).nonzero()[:, 0]
            obs, actions, *_ = self.episodes.windows(self.at[rows] - frames + 1, frames)
            state = state.put(rows, dynamics.observe(dynamics.initial(len(rows)), obs, actions))
        return state

    @torch.inference_mode()
    def dream(
        self, dynamics: Dynamics, *, state: Any = None, actions: Tensor | None = None, chunk: int = 1, **imagine: Any
    ) -> Imagined:
        """All h steps, dreamed with the actions really played, without another look -> Imagined [W,h,...].

        What ends stays as it ended, as ``SimulatorDynamics`` has it: its observation repeats and earns nothing more.
        state: begin there instead of where ``begin`` does. actions: [W,h,A] to play instead.
        """
        state = self.begin(dynamics) if state is None else state
        parts = []
        for piece in (self.real[1] if actions is None else actions).split(chunk, 1):
            state, imagined = dynamics.imagine(state, piece, **imagine)
            parts.append(imagined)
        obs, reward, ends = (torch.cat(part, 1) for part in zip(*(p[:3] for p in parts), strict=True))
        over = ends.cumsum(1).cumsum(1) > 1
        last = torch.where(over, ends.int().argmax(1, keepdim=True), torch.arange(self.horizon))
        held = obs.gather(1, last[..., None].expand_as(obs))
        return Imagined(held, reward.masked_fill(over, 0.0), ends | over)

    def against(self, imagined: Imagined, std: Tensor) -> OpenLoop:
        """What was wrong in a ``dream`` of these windows; std [O] is the unit of each dimension."""
        obs, _, reward, _, valid = self.real
        assert imagined.obs is not None
        # A dream that is no number any more is infinitely wrong: it must not be left out.
        wrong, missed = (x.nan_to_num(torch.inf) for x in ((imagined.obs - obs) / std, imagined.reward - reward))
        return OpenLoop(torch.where(valid[..., None], wrong, torch.nan), torch.where(valid, missed, torch.nan))


@dataclass(frozen=True)
class OpenLoop:
    """What a dream got wrong in E trajectories; NaN where an episode had ended."""

    obs_error: Tensor  # [E,h,O] dreamed less real, over each dimension's std in the training data
    reward_error: Tensor  # [E,h] in the reward's units

    def part(self, rows: slice | Tensor) -> OpenLoop:
        """Some of the trajectories."""
        return OpenLoop(self.obs_error[rows], self.reward_error[rows])

    def nrmse(self, horizon: int) -> Tensor:
        """The RMS over dimensions at step ``horizon`` (1 is the first) of each trajectory that lasts so long -> [<=E].

        Raises ValueError for a step that wasn't dreamed.
        """
        if not 1 <= horizon <= self.obs_error.shape[1]:
            raise ValueError(f"{self.obs_error.shape[1]} steps were dreamed, so there is no error at step {horizon}")
        error = self.obs_error[:, horizon - 1].square().mean(-1).sqrt()
        return error[~error.isnan()]

    def table(self, horizons: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """For each horizon the RMS over trajectories (``rms``) and the median trajectory (``median``).

        horizons: None takes those of 1, 8 and 64 that were dreamed.
        """
        rows = {}
        for h in [h for h in (1, 8, 64) if h <= self.obs_error.shape[1]] if horizons is None else horizons:
            error = self.nrmse(h)
            rows[f"h{h}"] = {"rms": error.square().mean().sqrt().item(), "median": error.median().item()}
        return rows


def open_loop(
    model: Dynamics,
    episodes: Episodes,
    std: Tensor,
    *,
    horizon: int = 64,
    context: int = CONTEXT,
    chunk: int = 1,
    trajectories: int = 64,
    begin: int | None = None,
    **imagine: Any,
) -> OpenLoop:
    """Show the model ``context`` real frames, then let it dream ``horizon`` steps with the actions really played.

    One trajectory from each of the first ``trajectories`` episodes that are long enough, from frame ``begin`` (None:
    from its middle). std [O]: the training data's.
    Raises ValueError for a number below 1 (``begin``: below 0), and where there are too few episodes of at least
    context + horizon frames.
    """
    _check(horizon, context, chunk, trajectories)
    if begin is not None and begin < 0:
        raise ValueError(f"begin must be a frame's number, 0 or more, or None, got {begin}")
    first = episodes.starts()
    first = first[episodes.left[first] >= context + horizon - 1 + (begin or 0)][:trajectories]
    if len(first) < trajectories:
        needed = f"{context + horizon + (begin or 0)} frames"
        raise ValueError(f"{len(first)} episodes have {needed}, {trajectories} are needed: collect more or longer ones")
    first = first + ((episodes.left[first] - (context + horizon - 1)) // 2 if begin is None else begin)
    windows = Windows(episodes, first + context - 1, torch.full_like(first, context), horizon)
    return windows.against(windows.dream(model, chunk=chunk, **imagine), std)


def score(
    model: str | Path | WorldModel,
    dataset_id: str,
    *,
    horizon: int = 64,
    context: int = CONTEXT,
    chunk: int = 1,
    trajectories: int | None = None,
) -> OpenLoop:
    """Score ``model`` as ``open_loop`` does on the last episodes of a Minari dataset that are long enough.

    trajectories: None takes all that the model's training left out where it was trained on this dataset, else the
        last 64 at most.

    Raises ValueError where the dataset is another simulator's, where episodes would be scored that the model was
    trained on, and where too few have context + horizon frames; FileNotFoundError without such a model or dataset.
    """
    _check(horizon, context, chunk, 1 if trajectories is None else trajectories)
    world = model if isinstance(model, WorldModel) else load(model)
    dataset = load_dataset(dataset_id)
    expect_simulator(world, "the model" if isinstance(model, WorldModel) else f"model {str(model)!r}", dataset)
    left_out, total = held_out(world, dataset_id), dataset.total_episodes
    fresh = range(0 if left_out is None else max(0, total - left_out), total)
    if left_out is not None and (trajectories or 1) > left_out:
        raise ValueError(
            f"training left out the last {left_out} episodes of {dataset_id}, so {trajectories or 1} can't be scored: "
            "lower trajectories, or collect another dataset"
        )
    frames = {
        e: int(m["total_steps"]) + 1 for e, m in zip(fresh, dataset.storage.get_episode_metadata(fresh), strict=True)
    }
    fit = [e for e in fresh if frames[e] >= context + horizon]
    if len(fit) < (trajectories or 1):
        raise ValueError(
            f"{len(fit)} of the {len(fresh)} episodes to score in {dataset_id} have context + horizon = "
            f"{context + horizon} frames, {trajectories or 1} are needed, the longest has "
            f"{max(frames.values(), default=0)}: lower horizon, context or trajectories, or collect more or longer ones"
        )
    fit = fit[-(trajectories or left_out or 64) :]
    episodes = Episodes.from_minari(dataset, fit)
    return open_loop(
        world,
        episodes,
        world.scaling.obs_std,
        horizon=horizon,
        context=context,
        chunk=chunk,
        trajectories=len(fit),
    )


def held_out(model: WorldModel, dataset_id: str) -> int | None:
    """How many episodes at the end of the dataset training left out; None where it wasn't trained on this dataset."""
    data = model.card.get("data")
    return int(data["held_out"]) if isinstance(data, dict) and data.get("dataset") == dataset_id else None


def _check(horizon: int, context: int, chunk: int, trajectories: int) -> None:
    for name, n in (("horizon", horizon), ("context", context), ("chunk", chunk), ("trajectories", trajectories)):
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")


def expect_simulator(model: WorldModel, name: str, dataset: Any) -> None:
    ours, theirs = model.card.get("env"), simulator_of(dataset)
    if ours and theirs and ours.rpartition(":")[2] != theirs.rpartition(":")[2]:
        raise ValueError(f"{name} dreams {ours}, but dataset {dataset.id} was recorded in {theirs}")
    for space in ("observation_space", "action_space"):
        mine, other = getattr(model.spec, space), getattr(dataset, space)
        if not alike(mine, other):
            raise ValueError(f"{name} has the {space} {mine}, dataset {dataset.id} has {other}")
