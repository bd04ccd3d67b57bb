"""Trains a world model on a Minari dataset: the counterpart of ``collect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym

from kairos_gym.data.datasets import load_dataset, simulator_of
from kairos_gym.evaluation.calibrate import MIN_DREAMS, calibrate_model
from kairos_gym.evaluation.open_loop import CONTEXT, open_loop
from kairos_gym.learning.train_config import TrainConfig
from world_model.contract import Spec
from world_model.episodes import Episodes
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import WorldModel
from world_model.training.fit import fit


def train(
    dataset_id: str, out: str | Path, config: TrainConfig = TrainConfig(), *, progress: bool = True
) -> WorldModel:
    """Train on all but the last ``held_out`` episodes of a Minari dataset -> the WorldModel, also saved in ``out``.

    The card names simulator, data and call, and holds the open-loop errors on the held-out episodes after 1, 8 and 64
    steps, as far as half of them are long enough. With 32 held-out episodes or more, the model is calibrated on them
    (``kairos_gym.evaluation.calibrate``). A call that was killed goes on where it is repeated.

    Raises FileNotFoundError without such a dataset, ValueError for a wrong argument, for a dataset of other spaces
    than ``Spec`` takes and where ``out`` holds another recipe's model.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, and {out} is a file: choose another name")
    dataset = load_dataset(dataset_id)
    total, trained = dataset.total_episodes, dataset.total_episodes - config.held_out
    if trained < 1:
        raise ValueError(
            f"held_out must leave episodes to train on: {dataset_id} has {total}, got held_out={config.held_out}"
        )
    dt, time_limit = _simulator_timing(dataset)
    spec = Spec(dataset.observation_space, dataset.action_space, config.chunk, dt)
    (obs_dim,), (action_dim,) = spec.observation_box.shape, spec.action_box.shape
    shape = WorldModelConfig(
        obs_dim=obs_dim, action_dim=action_dim, pattern=config.pattern, chunk=config.chunk, draft=config.draft
    )
    episodes = Episodes.from_minari(dataset, range(trained))
    data = {**dataset.storage.metadata.get("recipe", {}), "dataset": dataset_id, "held_out": config.held_out}
    card: dict[str, Any] = {
        "env": simulator_of(dataset),
        "time_limit": time_limit,
        "made_by": f"kairos_gym.learning.train.train({dataset_id!r}, {str(out)!r}, {config!r})",
        "data": {**data, "fingerprint": episodes.fingerprint()},
    }
    model = fit(shape, spec, episodes, config.fit_config(), out=out, card=card, progress=progress)
    if config.held_out:
        held_out = Episodes.from_minari(dataset, range(trained, total))
        _measure_errors(model, held_out)
        if config.held_out >= MIN_DREAMS:
            calibrate_model(model, episodes, [held_out], [dataset_id], seed=config.seed)
    model.save_pretrained(out)
    return model


def _measure_errors(model: WorldModel, held_out: Episodes) -> None:
    """Put the open-loop errors on the card, up to the longest of 1, 8 and 64 steps that half of the episodes allow."""
    frames = held_out.left[held_out.starts()] + 1
    enough = {h: int((frames >= CONTEXT + h).sum()) for h in (1, 8, 64)}
    horizons = [h for h, count in enough.items() if 2 * count >= len(frames)]
    if not horizons:
        return
    horizon = max(horizons)
    errors = open_loop(model, held_out, model.scaling.obs_std, horizon=horizon, trajectories=enough[horizon]).table()
    what = f"open-loop NRMSE on held-out episodes after {CONTEXT} real frames, RMS and median over trajectories"
    model.card = {**model.card, "errors": {"what": what, "held_out": errors}}


def _simulator_timing(dataset: Any) -> tuple[float, int | None]:
    """The seconds of a step, and the time limit of the simulator itself: ``collect`` may have recorded with another."""
    dt, limit = 1.0, None if dataset.env_spec is None else dataset.env_spec.max_episode_steps
    try:
        env = dataset.recover_environment()
        dt = float(getattr(env.unwrapped, "dt", dt))
        env.close()
    except Exception as error:  # whatever stops a simulator from being made doesn't stop training on its data
        reason = " ".join(str(error).split())
        print(f"the simulator of {dataset.id} can't be made ({reason}): a step is taken to last 1 s", file=sys.stderr)
    arguments = (simulator_of(dataset) or "").split(",")
    if (
        dataset.env_spec is not None
        and dataset.env_spec.id in gym.registry
        and not any(argument.strip().startswith("max_episode_steps") for argument in arguments)
    ):
        limit = gym.spec(dataset.env_spec.id).max_episode_steps
    return dt, limit
