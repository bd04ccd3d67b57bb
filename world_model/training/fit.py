"""Trains a world model: first the draft, then the transformer that refines it; a run that is killed resumes exactly."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from world_model.contract import Spec
from world_model.episodes import Episodes, StartStates
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import WorldModel
from world_model.training.config import FitConfig
from world_model.training.run import TrainingRun


def fit(
    config: WorldModelConfig,
    spec: Spec,
    episodes: Episodes,
    train: FitConfig = FitConfig(),
    *,
    out: str | Path,
    begin: WorldModel | None = None,
    card: dict[str, Any] | None = None,
    progress: bool = True,
) -> WorldModel:
    """Train on ``episodes`` -> the trained WorldModel, also saved in the folder ``out``; ``card`` goes onto its card.

    begin: a model of the same config whose training continues, such as where there are more episodes now; None trains
        from scratch.

    All randomness is a function of (seed, step), so the same call gives the same weights on the same machine, also when
    it was killed in between: called again, it continues from the last checkpoint in ``out`` (at most ``save_every``
    updates are lost), and a finished model is loaded. Raises ValueError where ``out`` holds another recipe's model or
    the data don't fit, FloatingPointError where training diverges.
    """
    _check_data(config, spec, episodes, train)
    if begin is not None and begin.config != config:
        raise ValueError(f"training can't go on from a model of another config: {begin.config}, not {config}")
    recipe, out = _recipe(config, episodes, train, begin), Path(out)
    if (out / "model.safetensors").is_file() and not (out / "training.safetensors").is_file():
        model = WorldModel.from_pretrained(out)
        if model.card.get("fit", {}).get("recipe") != recipe:
            raise ValueError(f"{out} holds a model made otherwise: choose another folder, or delete it to start afresh")
        return model
    out.mkdir(parents=True, exist_ok=True)
    run = TrainingRun(_untrained(config, spec, episodes, train.seed, begin), episodes, train, out, recipe)
    _train(run, progress)
    model = run.model
    first = episodes.starts()
    model.starts = StartStates(episodes.obs[first][:256, None], episodes.action[first][:256, None])
    _expect_finite(dict(model.named_parameters()), train.draft_steps + train.steps)
    about = {"recipe": recipe, "train": asdict(train), "frames_of_data": len(episodes.obs)}
    model.card = {**(card or {}), "fit": {**about, "cpu_seconds": round(run.cpu_seconds, 1)}}
    model.eval().requires_grad_(False)
    model.save_pretrained(out)
    (out / "training.safetensors").unlink(missing_ok=True)
    return model


def _untrained(
    config: WorldModelConfig, spec: Spec, episodes: Episodes, seed: int, begin: WorldModel | None
) -> WorldModel:
    """A model with random weights, or those of ``begin``, and the units of the data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WorldModel(config, spec)
    if begin is not None:
        model.load_state_dict(begin.state_dict())
    model.scaling.measure(episodes)
    model.terminates.copy_(torch.tensor(bool(episodes.terminated.any())))
    return model


def _train(run: TrainingRun, progress: bool) -> None:
    """All updates that are left, with a progress bar, TensorBoard's logs and checkpoints."""
    train, out, total = run.config, run.out, run.config.draft_steps + run.config.steps
    start, cpu = run.resume(), time.process_time()
    if progress and start:
        print(f"Going on after update {start}", file=sys.stderr)
    elif progress:
        print(f"Training: if it is stopped, the same command goes on from {out}", file=sys.stderr)
    bar = tqdm(total=total, initial=start, disable=not progress, unit="update", desc="fit")
    log = SummaryWriter(str(out / "logs"), purge_step=start)
    try:
        for step in range(start, total):
            losses = run.update(step)
            if step % 100 == 0:
                _expect_finite(losses, step)
                for name, value in losses.items():
                    log.add_scalar(f"loss/{name}", value.item(), step)
                bar.set_postfix({name: f"{value.item():.4f}" for name, value in losses.items()})
            bar.update()
            if (step + 1) % train.save_every == 0 and step + 1 < total:
                _expect_finite(losses, step)
                run.save(step + 1, time.process_time() - cpu)
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from {out}", file=sys.stderr)
        raise
    finally:
        bar.close()
        log.close()
    run.finish()
    run.cpu_seconds += time.process_time() - cpu


def _expect_finite(tensors: dict[str, Tensor], step: int) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise FloatingPointError(
            f"training diverged before update {step}: {bad[0]} is not finite; lower the learning rate"
        )


def _recipe(config: WorldModelConfig, episodes: Episodes, train: FitConfig, begin: WorldModel | None) -> str:
    """A short digest of all that decides the weights."""
    origin = [] if begin is None else [begin.fingerprint()]
    text = json.dumps([asdict(config), asdict(train), episodes.fingerprint(), *origin], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_data(config: WorldModelConfig, spec: Spec, episodes: Episodes, train: FitConfig) -> None:
    if train.frames < config.chunk:
        raise ValueError(f"frames={train.frames} must hold at least one chunk of the model's chunk={config.chunk}")
    have = (episodes.obs.shape[1], episodes.action.shape[1])
    if have != (config.obs_dim, config.action_dim):
        raise ValueError(f"the data have (O, A) = {have}, the config says {(config.obs_dim, config.action_dim)}")
    if not (episodes.index > 0).any():
        raise ValueError("the data hold no step, only first observations")
    longest = int(episodes.left.max())
    if longest < config.chunk:
        raise ValueError(f"no episode has the {config.chunk} steps of a chunk (the longest has {longest}): lower chunk")
    played, box = episodes.action[episodes.index > 0].numpy(), spec.action_box
    slack = 1e-6 * (box.high - box.low)
    if (played < box.low - slack).any() or (played > box.high + slack).any():
        raise ValueError(
            f"the data hold actions from {played.min():.6g} to {played.max():.6g}, outside {box}: clip them as the "
            "simulator did when they were recorded"
        )
    seen, box = episodes.obs.numpy(), spec.observation_box
    beyond = np.maximum(box.low - seen, seen - box.high).max(0)  # a dream would never go there
    if (beyond > 1e-4 * (1 + np.abs(seen).max(0))).any():
        worst = int(beyond.argmax())
        raise ValueError(
            f"the data hold observations outside {box}, by {beyond[worst]:.6g} in dimension {worst}: give the "
            "simulator a space that has room for all that it shows"
        )
