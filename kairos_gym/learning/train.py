"""Trains a world model on a Minari dataset: the counterpart of ``collect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym

from kairos_gym.data.datasets import load_dataset, simulator_of
from kairos_gym.evaluation.calibrate import LEAST, calibrate_model
from kairos_gym.evaluation.open_loop import CONTEXT, score
from world_model.contract import Spec
from world_model.episodes import Episodes
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import WorldModel
from world_model.training.config import FitConfig
from world_model.training.fit import fit


def train(
    dataset_id: str,
    out: str | Path,
    *,
    pattern: str = "SGDG",
    chunk: int = 4,
    draft: bool = True,
    draft_steps: int = FitConfig.draft_steps,
    steps: int = FitConfig.steps,
    held_out: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> WorldModel:
    """Train on all but the last ``held_out`` episodes of a Minari dataset -> the WorldModel, also saved in ``out``.

    pattern: the layers, one letter each: S sliding window, D dilated sliding window, G gated delta rule.
    chunk: the longest number of steps that one call imagines.
    draft: begin with the draft; without it, the plain transformer.
    draft_steps, steps: optimiser updates of the draft and of the transformer.

    The card names simulator, data and call, and holds the open-loop errors on the held-out episodes after 1, 8 and 64
    steps, as far as half of them are long enough. With 32 held-out episodes or more, the model is calibrated on them
    (``kairos_gym.evaluation.calibrate``). A call that was killed goes on where it is repeated.

    Raises FileNotFoundError without such a dataset, ValueError for a wrong argument, for a dataset of other spaces
    than ``Spec`` takes and where ``out`` holds another recipe's model.
    """
    call = dict(pattern=pattern, chunk=chunk, draft=draft, draft_steps=draft_steps, steps=steps, held_out=held_out)
    out, recipe = Path(out), FitConfig(seed=seed, draft_steps=draft_steps, steps=steps)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, and {out} is a file: choose another name")
    dataset = load_dataset(dataset_id)
    trained = dataset.total_episodes - held_out
    if held_out < 0 or trained < 1:
        raise ValueError(
            f"held_out must be 0 or more and leave episodes to train on: {dataset_id} has {dataset.total_episodes}, "
            f"got held_out={held_out}"
        )
    dt, time_limit = _of_simulator(dataset)
    spec = Spec(dataset.observation_space, dataset.action_space, chunk, dt)
    (obs_dim,), (action_dim,) = spec.observation_box.shape, spec.action_box.shape
    config = WorldModelConfig(obs_dim=obs_dim, action_dim=action_dim, pattern=pattern, chunk=chunk, draft=draft)
    arguments = "".join(f", {name}={value!r}" for name, value in {**call, "seed": seed}.items())
    card: dict[str, Any] = {
        "env": simulator_of(dataset),
        "time_limit": time_limit,
        "made_by": f"kairos_gym.learning.train.train({dataset_id!r}, {str(out)!r}{arguments})",
        "data": {**dataset.storage.metadata.get("recipe", {}), "dataset": dataset_id, "held_out": held_out},
    }
    episodes = Episodes.from_minari(dataset, range(trained))
    card["data"]["fingerprint"] = episodes.fingerprint()
    model = fit(config, spec, episodes, recipe, out=out, card=card, progress=progress)
    horizon = longest_horizon(dataset, held_out)
    if horizon is not None:
        errors = score(model, dataset_id, horizon=horizon).table()
        what = f"open-loop NRMSE on held-out episodes after {CONTEXT} real frames, RMS and median over trajectories"
        model.card = {**model.card, "errors": {"what": what, "held_out": errors}}
    left = range(trained, dataset.total_episodes)
    if len(left) >= LEAST:
        calibrate_model(model, episodes, [Episodes.from_minari(dataset, left)], [dataset_id], seed=seed)
    model.save_pretrained(out)
    return model


def longest_horizon(dataset: Any, held_out: int) -> int | None:
    """The longest of 1, 8 and 64 steps that half of the held-out episodes, or more, can score; None where none is."""
    last = range(dataset.total_episodes - held_out, dataset.total_episodes)
    frames = [int(episode["total_steps"]) + 1 for episode in dataset.storage.get_episode_metadata(last)]
    enough = [h for h in (1, 8, 64) if frames and 2 * sum(n >= CONTEXT + h for n in frames) >= len(frames)]
    return max(enough, default=None)


def _of_simulator(dataset: Any) -> tuple[float, int | None]:
    """The seconds of a step, and the time limit of the simulator itself: ``collect`` may have recorded with another."""
    dt, limit = 1.0, None if dataset.env_spec is None else dataset.env_spec.max_episode_steps
    try:
        env = dataset.recover_environment()
        dt = float(getattr(env.unwrapped, "dt", dt))
        env.close()
    except Exception as error:  # whatever stops a simulator from being made doesn't stop training on its data
        why = " ".join(str(error).split())
        print(f"the simulator of {dataset.id} can't be made ({why}): a step is taken to last 1 s", file=sys.stderr)
    name = (simulator_of(dataset) or "").split(",")
    if (
        dataset.env_spec is not None
        and dataset.env_spec.id in gym.registry
        and not any(argument.strip().startswith("max_episode_steps") for argument in name)
    ):
        limit = gym.spec(dataset.env_spec.id).max_episode_steps
    return dt, limit
