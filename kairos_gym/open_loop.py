"""Imagined against simulated: the open-loop error of a dream, by horizon, on recorded episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_gym.collect import recorded, simulator_of
from kairos_gym.models import load
from world_model.contract import Dynamics
from world_model.episodes import Episodes
from world_model.model import WorldModel

CONTEXT = 16  # real frames that a model sees before its dream is scored


@dataclass(frozen=True)
class OpenLoop:
    """What a dream got wrong in E trajectories."""

    obs_error: Tensor  # [E,h,O] dreamed less real, over each dimension's std in the training data
    reward_error: Tensor  # [E,h] in the reward's units

    def part(self, rows: slice) -> OpenLoop:
        """Some of the trajectories."""
        return OpenLoop(self.obs_error[rows], self.reward_error[rows])

    def nrmse(self, horizon: int) -> Tensor:
        """The RMS over dimensions at step ``horizon`` (1 is the first) of each trajectory -> [E].

        Raises ValueError for a step that wasn't dreamed.
        """
        if not 1 <= horizon <= self.obs_error.shape[1]:
            raise ValueError(f"{self.obs_error.shape[1]} steps were dreamed, so there is no error at step {horizon}")
        return self.obs_error[:, horizon - 1].square().mean(-1).sqrt()

    def table(self, horizons: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """For each horizon the RMS over trajectories (``rms``) and the median trajectory (``median``).

        horizons: None takes those of 1, 8 and 64 that were dreamed.
        """
        rows = {}
        for h in [h for h in (1, 8, 64) if h <= self.obs_error.shape[1]] if horizons is None else horizons:
            error = self.nrmse(h)
            rows[f"h{h}"] = {"rms": error.square().mean().sqrt().item(), "median": error.median().item()}
        return rows


@torch.inference_mode()
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
    obs, actions, reward, _, _ = episodes.windows(first, context + horizon)
    state = model.observe(model.initial(len(first)), obs[:, :context], actions[:, :context])
    dreamed, gained = [], []
    for t in range(context, context + horizon, chunk):
        state, imagined = model.imagine(state, actions[:, t : min(t + chunk, context + horizon)], **imagine)
        assert imagined.obs is not None
        dreamed.append(imagined.obs)
        gained.append(imagined.reward)
    return OpenLoop((torch.cat(dreamed, 1) - obs[:, context:]) / std, torch.cat(gained, 1) - reward[:, context:])


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
    dataset = recorded(dataset_id)
    _check_simulator(world, "the model" if isinstance(model, WorldModel) else f"model {str(model)!r}", dataset)
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


def _check_simulator(model: WorldModel, name: str, dataset: Any) -> None:
    ours, theirs = model.card.get("env"), simulator_of(dataset)
    if ours and theirs and ours.rpartition(":")[2] != theirs.rpartition(":")[2]:
        raise ValueError(f"{name} dreams {ours}, but dataset {dataset.id} was recorded in {theirs}")
    for space in ("observation_space", "action_space"):
        shape, other = getattr(model.spec, space).shape, getattr(dataset, space).shape
        if shape != other:
            raise ValueError(f"{name} has an {space} of shape {shape}, dataset {dataset.id} one of {other}")
