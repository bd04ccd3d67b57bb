"""Imagined against simulated: the open-loop error of a dream, by horizon, on recorded episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_gym.data.datasets import load_dataset, simulator_of
from kairos_gym.evaluation.windows import CONTEXT, OpenLoopErrors, Windows
from kairos_gym.models import load
from world_model.contract import Dynamics
from world_model.episodes import Episodes
from world_model.model.world_model import WorldModel
from world_model.spaces import alike


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
) -> OpenLoopErrors:
    """Show the model ``context`` real frames, then dream ``horizon`` steps with the actions that were really played.

    One trajectory in each of the first ``trajectories`` episodes that are long enough, from frame ``begin`` on (None:
    in its middle). std [O]: the training data's.
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
    return windows.errors(windows.dream(model, chunk=chunk, **imagine), std)


def score(
    model: str | Path | WorldModel,
    dataset_id: str,
    *,
    horizon: int = 64,
    context: int = CONTEXT,
    chunk: int = 1,
    trajectories: int | None = None,
) -> OpenLoopErrors:
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
    unseen = range(0 if left_out is None else max(0, total - left_out), total)
    if left_out is not None and (trajectories or 1) > left_out:
        raise ValueError(
            f"training left out the last {left_out} episodes of {dataset_id}, so {trajectories or 1} can't be scored: "
            "lower trajectories, or collect another dataset"
        )
    frames = {
        e: int(m["total_steps"]) + 1 for e, m in zip(unseen, dataset.storage.get_episode_metadata(unseen), strict=True)
    }
    chosen = [e for e in unseen if frames[e] >= context + horizon]
    if len(chosen) < (trajectories or 1):
        raise ValueError(
            f"{len(chosen)} of the {len(unseen)} episodes to score in {dataset_id} have context + horizon = "
            f"{context + horizon} frames, {trajectories or 1} are needed, the longest has "
            f"{max(frames.values(), default=0)}: lower horizon, context or trajectories, or collect more or longer ones"
        )
    chosen = chosen[-(trajectories or left_out or 64) :]
    episodes = Episodes.from_minari(dataset, chosen)
    return open_loop(
        world,
        episodes,
        world.scaling.obs_std,
        horizon=horizon,
        context=context,
        chunk=chunk,
        trajectories=len(chosen),
    )


def held_out(model: WorldModel, dataset_id: str) -> int | None:
    """How many of the dataset's last episodes training left out; None where it wasn't trained on this dataset."""
    data = model.card.get("data")
    return int(data["held_out"]) if isinstance(data, dict) and data.get("dataset") == dataset_id else None


def _check(horizon: int, context: int, chunk: int, trajectories: int) -> None:
    for name, n in (("horizon", horizon), ("context", context), ("chunk", chunk), ("trajectories", trajectories)):
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")


def expect_simulator(model: WorldModel, name: str, dataset: Any) -> None:
    """Raises ValueError where ``dataset`` was recorded in another simulator than that of the model called ``name``."""
    ours, theirs = model.card.get("env"), simulator_of(dataset)
    if ours and theirs and ours.rpartition(":")[2] != theirs.rpartition(":")[2]:
        raise ValueError(f"{name} dreams {ours}, but dataset {dataset.id} was recorded in {theirs}")
    for space in ("observation_space", "action_space"):
        mine, other = getattr(model.spec, space), getattr(dataset, space)
        if not alike(mine, other):
            raise ValueError(f"{name} has the {space} {mine}, dataset {dataset.id} has {other}")
