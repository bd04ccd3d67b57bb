"""What a dream's idea of its own error is worth, and what it costs: by which signal a bound is sharpest."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kairos_gym.dream.vector_env import DreamVectorEnv
from kairos_gym.evaluation.calibrate import draw_calibration_windows, dream_errors, taught
from kairos_gym.evaluation.comparison import steps_of
from kairos_gym.evaluation.open_loop import Windows
from kairos_gym.learning.recipes import RECIPES, calibration_sets
from kairos_gym.models import load
from kairos_gym.report import as_text
from world_model.episodes import Episodes
from world_model.model.world_model import WorldModel
from world_model.trust import DreamErrors, conformal

SAMPLED = 4  # dreams whose spread is a signal
HORIZONS = (1, 8, 32, 64)


def trust(task: str, dreams: int = 500) -> None:
    """Compare signals by the width of the 90% bound that each gives, and print what the chosen one costs an env.

    Each signal's bound is calibrated on ``dreams`` dreams that the learned rule never saw, and measured on as many
    fresh ones: of the same policies, and of policies that it never saw. Cells: coverage, then mean and median width
    over that of a bound which knows the steps alone.
    """
    model = load(task)
    learned = model.trust
    assert learned is not None, "shipped models are calibrated"
    have = {}
    for name, parts in calibration_sets(RECIPES[task]).items():
        windows = draw_calibration_windows(Episodes.join(parts), 1)
        have[name] = _some(windows, taught(windows, parts) if name == "calibration" else 0, dreams)
    seen_by = {name: (windows, dream_errors(model, windows, model.scaling.obs_std)) for name, windows in have.items()}
    signals: dict[str, Callable[[Windows, DreamErrors], Tensor]] = {
        "steps alone": lambda windows, seen: torch.ones_like(seen.error),
        "draft's variance": partial(_draft_spread, model),
        f"spread of {SAMPLED} sampled dreams": partial(_sampled_spread, model),
        "learned doubt": lambda windows, seen: seen.uncertainty(learned),
    }
    print(f"{task}: coverage, mean width, median width\n")
    for fresh, policies in (("second", "the same policies"), ("unseen", "other policies")):
        plain: list[float] = []
        rows: list[list[Any]] = []
        for name, signal in signals.items():
            (first, told), (second, asked) = (
                (signal(windows, seen), seen.error) for windows, seen in (seen_by["calibration"], seen_by[fresh])
            )
            bound = conformal(told / first.clamp_min(1e-9))[0][80] * second.clamp_min(1e-9)
            cells = []
            for h in HORIZONS:
                lasts = ~asked[:, h - 1].isnan()
                width, error = bound[lasts, h - 1], asked[lasts, h - 1]
                cells.append((float((error <= width).float().mean()), float(width.mean()), float(width.median())))
            plain = plain or [mean for _, mean, _ in cells]
            shown = [f"{100 * c:.0f}% {m / p:.2f} {d / p:.2f}" for (c, m, d), p in zip(cells, plain, strict=True)]
            rows.append([name, *shown])
        print(as_text([f"signal; {policies}", *map(steps_of, HORIZONS)], rows), end="\n\n")
    print(as_text(["dreams", "ms a step", "with confidence=0.9", "cost"], [_cost(model, b) for b in (1, 64, 1024)]))


def _cost(model: WorldModel, batch: int, rounds: int = 9) -> list[Any]:
    """Thread CPU time of a step with and without, by turns; medians."""
    steps = max(2, 64 // batch)
    envs = [DreamVectorEnv(model, batch), DreamVectorEnv(model, batch, confidence=0.9)]
    spent: list[list[float]] = [[], []]
    for env in envs:
        env.action_space.seed(0)
    actions = [envs[0].action_space.sample() for _ in range(steps)]
    for _ in range(rounds):
        for env, times in zip(envs, spent, strict=True):
            env.reset(seed=0)
            begun = time.thread_time()
            for action in actions:
                env.step(action)
            times.append(1000 * (time.thread_time() - begun) / steps)
    off, on = (float(np.median(times)) for times in spent)
    return [batch, f"{off:.2f}", f"{on:.2f}", f"{100 * (on / off - 1):.1f}%"]


@torch.inference_mode()
def _draft_spread(model: WorldModel, windows: Windows, seen: DreamErrors) -> Tensor:
    """The root of the accumulated variance that the draft gives each step."""
    assert model.draft is not None
    obs, scaling = model.scaling.obs(seen.before), model.scaling
    came = torch.cat([torch.zeros_like(obs[:, :1]), obs.diff(dim=1)], 1) / scaling.step_std
    _, log_var = model.draft(obs, scaling.action(seen.actions), came)
    return (scaling.step_std.square() * log_var.exp()).mean(-1).cumsum(1).sqrt()


@torch.inference_mode()
def _sampled_spread(model: WorldModel, windows: Windows, seen: DreamErrors) -> Tensor:
    state, dreams = windows.begin(model), []
    for i in range(SAMPLED):
        own = state.replace(seed=torch.arange(len(windows.at)) * SAMPLED + i)
        dreams.append(windows.dream(model, state=own, sampled=True, flow_steps=4).obs)
    return (torch.stack(dreams).std(0) / model.scaling.obs_std).square().mean(-1).sqrt()  # type: ignore[arg-type]


def _some(windows: Windows, first: int, count: int) -> Windows:
    """``count`` of those from ``first`` on, spread evenly, for the policies stand one after the other."""
    return windows.part(torch.linspace(first, len(windows.at) - 1, count).long())
