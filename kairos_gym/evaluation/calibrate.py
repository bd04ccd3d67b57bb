"""Calibrates the bound on a model's error, on recorded episodes that its training left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kairos_gym.data.datasets import load_dataset
from kairos_gym.data.training_data import load_training_data
from kairos_gym.evaluation.open_loop import expect_simulator, held_out
from kairos_gym.evaluation.windows import CONTEXT, Windows
from kairos_gym.models import load
from world_model.conformal import ConformalBound, DreamErrors, fit_bound
from world_model.contract import Dynamics, Imagined
from world_model.episodes import Episodes
from world_model.model.world_model import WorldModel

HORIZON = 64  # steps, the longest dream that is calibrated
MIN_DREAMS = 32  # that a calibration needs


def calibrate(
    model: str | Path, dataset_ids: str | Sequence[str], out: str | Path | None = None, *, seed: int = 0
) -> WorldModel:
    """Calibrate ``model`` on Minari datasets -> the model with its ``trust``, saved in ``out`` or its own folder.

    Only episodes that its training left out are used. The rule by which a dream's uncertainty grows is fitted on the
    first half of them, and how large errors are beside it is measured on the second (``world_model.conformal``). Where
    other policies played these, the bound allows for policies that the rule never saw. Dreams begin anywhere, after 1
    to 16 real frames, and are up to 64 steps long.

    Raises ValueError where there is nowhere to save it, where a dataset is another simulator's or holds an episode that
    the model was trained on, and where they hold too few episodes; FileNotFoundError without such a model or dataset;
    and what ``load_training_data`` raises where the model's training data can't be had.
    """
    world = load(model)
    if out is None and not Path(model).is_dir():
        raise ValueError(f"say where to save it (out, --out): model {str(model)!r} is not a folder")
    parts, names = [], [dataset_ids] if isinstance(dataset_ids, str) else list(dataset_ids)
    if not names:
        raise ValueError("name one dataset or more to calibrate on")
    for name in names:
        dataset = load_dataset(name)
        expect_simulator(world, f"model {str(model)!r}", dataset)
        left_out, total = held_out(world, name), dataset.total_episodes
        unseen = range(0 if left_out is None else max(0, total - left_out), total)
        if not unseen:
            raise ValueError(f"training used all of {name}: record another dataset")
        parts.append(Episodes.from_minari(dataset, unseen))
    trained_on = load_training_data(world.card).episodes
    for name, part in zip(names, parts, strict=True):
        if known := int(trained_on.holds(part).sum()):
            raise ValueError(f"{known} episodes of {name} are in the model's training data: record others")
    calibrate_model(world, trained_on, parts, names, seed=seed)
    world.save_pretrained(Path(model) if out is None else out)
    return world


def calibrate_model(
    world: WorldModel, trained_on: Episodes, parts: Sequence[Episodes], names: Sequence[str], *, seed: int = 0
) -> None:
    """Calibrate ``world``, which was ``trained_on`` some episodes, in place on others.

    parts: the episodes of each dataset of ``names``. The rule is fitted on the first half of the datasets; of a single
    one, on the first half of its episodes. Raises ValueError where they give too few dreams.
    """
    episodes = Episodes.join(parts)
    windows = draw_calibration_windows(episodes, seed)
    cut = split_index(windows, parts)
    if min(cut, len(windows.at) - cut) < MIN_DREAMS // 2:
        raise ValueError(
            f"{len(windows.at)} dreams of {', '.join(names)} are too few to calibrate on, {MIN_DREAMS} are needed"
        )
    unit, measured = world.scaling.obs_std, windows.part(slice(cut, None))
    world.trust = fit_bound(
        world.fingerprint(),
        trained_on.steps(),
        dream_errors(world, windows.part(slice(cut)), unit),
        dream_errors(world, measured, unit),
        dream_errors(world, measured, unit, measured.dream(world, chunk=world.spec.chunk)),
        seed=seed,
    )
    counts = world.trust.counts
    world.card = {
        **world.card,
        "trust": {"calibrated_on": list(names), "dreams": {f"h{h}": int(counts[h - 1]) for h in (1, 8, 32, 64)}},
    }


def split_index(windows: Windows, parts: Sequence[Episodes]) -> int:
    """Which of the ``windows`` of all ``parts`` is the first for measuring; the rule is fitted on those before it."""
    first = windows.episodes.starts()
    boundary = first[len(first) // 2] if len(parts) == 1 else sum(len(part.obs) for part in parts[: len(parts) // 2])
    return int((windows.at < boundary).sum())


def draw_calibration_windows(episodes: Episodes, seed: int) -> Windows:
    """Windows that don't overlap, as many as fit into the episodes: 1 to 16 frames seen, up to 64 steps dreamed.

    Those of one episode are next to each other; a short episode gives one that begins anywhere in it.
    """
    rng = np.random.default_rng(seed)
    at, seen = [], []
    for first in episodes.starts().tolist():
        frames = int(episodes.left[first]) + 1
        pieces = max(1, frames // (CONTEXT + HORIZON))
        size = frames // pieces
        for piece in range(pieces):
            last = max(size - HORIZON, size - 1 if pieces == 1 and size <= HORIZON else 1)
            frame = int(rng.integers(0, last))
            at.append(first + piece * size + frame)
            seen.append(int(rng.integers(1, min(CONTEXT, frame + 1) + 1)))
    return Windows(episodes, torch.tensor(at), torch.tensor(seen), HORIZON)


def dream_errors(dynamics: Dynamics, windows: Windows, unit: Tensor, imagined: Imagined | None = None) -> DreamErrors:
    """Dream the windows, or take ``imagined`` where they are dreamed already -> their errors, in ``unit`` [O]."""
    imagined = windows.dream(dynamics) if imagined is None else imagined
    assert imagined.obs is not None
    error = windows.errors(imagined, unit).obs_error.square().mean(-1).sqrt()
    start = windows.episodes.obs[windows.at][:, None]
    before = torch.cat([start, imagined.obs[:, :-1]], 1)
    return DreamErrors(*(x.clone() for x in (before, windows.recorded.action, error, windows.seen)))


def coverage(
    dreams: DreamErrors,
    trust: ConformalBound,
    horizons: Sequence[int] = (1, 8, 32, 64),
    confidence: float = 0.9,
    chunk: int = 1,
) -> dict[str, dict[str, float]]:
    """How often the bound held after each of ``horizons`` steps ("coverage"), and its "mean" and "median".

    "error" is the error's own quantile in these dreams: the best bound that knows only the number of steps.
    Left out are horizons without a finite bound, and those that no dream reaches.
    """
    bound, quantiles, rows = dreams.bound(trust, confidence, chunk), trust.quantile(confidence, chunk), {}
    for h in [h for h in horizons if bool(quantiles[h - 1].isfinite())]:
        error, width = dreams.error[:, h - 1], bound[:, h - 1]
        lasts = ~error.isnan()
        error, width = error[lasts], width[lasts]
        if len(error):
            rows[f"h{h}"] = {
                "dreams": len(error),
                "coverage": (error <= width).float().mean().item(),
                "mean": width.mean().item(),
                "median": width.median().item(),
                "error": torch.quantile(error, confidence).item(),
            }
    return rows
