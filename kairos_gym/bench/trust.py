"""How sharp a dream's bound of its own error is, by the signal that it is made from, and what the bound costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kairos_gym.bench.harness import Job
from kairos_gym.dream.envs import DreamVectorEnv
from kairos_gym.evaluation.calibrate import draw_calibration_windows, dream_errors, split_index
from kairos_gym.evaluation.comparison import steps_of
from kairos_gym.evaluation.timing import interleaved_rates
from kairos_gym.evaluation.windows import Windows
from kairos_gym.learning.recipes import RECIPES, calibration_sets
from kairos_gym.models import load
from kairos_gym.report import as_text
from world_model.conformal import DreamErrors, conformal
from world_model.episodes import Episodes
from world_model.model.world_model import WorldModel

SAMPLED = 4  # dreams whose spread is a signal
HORIZONS = (1, 8, 32, 64)
NINETY_PERCENT = 80  # its place among ``world_model.conformal.LEVELS``
ROUNDS = 9


def trust(task: str, dreams: int = 500) -> None:
    """Compare signals by the width of the 90% bound that each gives, and print what the chosen one costs an env.

    Each signal's bound is calibrated on ``dreams`` dreams that the learned rule never saw, and measured on as many
    fresh ones: of the same policies, and of policies that it never saw. Cells: coverage, then mean and median width
    over that of a bound which knows the steps alone.
    """
    model = load(task)
    learned = model.trust
    assert learned is not None, "shipped models are calibrated"
    sets: dict[str, tuple[Windows, DreamErrors]] = {}
    for name, parts in calibration_sets(RECIPES[task]).items():
        windows = draw_calibration_windows(Episodes.join(parts), 1)
        windows = _spread(windows, split_index(windows, parts) if name == "calibration" else 0, dreams)
        sets[name] = windows, dream_errors(model, windows, model.scaling.obs_std)
    signals: dict[str, Callable[[Windows, DreamErrors], Tensor]] = {
        "steps alone": lambda windows, errors: torch.ones_like(errors.error),
        "draft's variance": partial(_draft_spread, model),
        f"spread of {SAMPLED} sampled dreams": partial(_sampled_spread, model),
        "learned uncertainty": lambda windows, errors: errors.uncertainty(learned),
    }
    print(f"{task}: coverage, mean width, median width\n")
    for fresh, policies in (("second", "the same policies"), ("unseen", "other policies")):
        plain: list[float] = []
        rows: list[list[Any]] = []
        for name, signal in signals.items():
            cells = _bound_quality(signal, sets["calibration"], sets[fresh])
            plain = plain or [mean for _, mean, _ in cells]
            texts = [f"{100 * c:.0f}% {m / p:.2f} {d / p:.2f}" for (c, m, d), p in zip(cells, plain, strict=True)]
            rows.append([name, *texts])
        print(as_text([f"signal; {policies}", *map(steps_of, HORIZONS)], rows), end="\n\n")
    print(as_text(["dreams", "ms a step", "with confidence=0.9", "cost"], [_cost(model, b) for b in (1, 64, 1024)]))


def _bound_quality(
    signal: Callable[[Windows, DreamErrors], Tensor],
    calibration: tuple[Windows, DreamErrors],
    fresh: tuple[Windows, DreamErrors],
) -> list[tuple[float, float, float]]:
    """Coverage, mean width and median width of a signal's 90% bound after each of HORIZONS steps."""
    quantile = conformal(calibration[1].error / signal(*calibration).clamp_min(1e-9))[0][NINETY_PERCENT]
    bound, errors = quantile * signal(*fresh).clamp_min(1e-9), fresh[1].error
    cells = []
    for h in HORIZONS:
        lasts = ~errors[:, h - 1].isnan()
        width, error = bound[lasts, h - 1], errors[lasts, h - 1]
        cells.append((float((error <= width).float().mean()), float(width.mean()), float(width.median())))
    return cells


def _cost(model: WorldModel, batch: int) -> list[Any]:
    """A line: thread CPU time of a step without and with the bound, by turns; medians."""
    steps = max(2, 64 // batch)
    envs = {"off": DreamVectorEnv(model, batch), "on": DreamVectorEnv(model, batch, confidence=0.9)}
    for env in envs.values():
        env.action_space.seed(0)
    actions = [envs["off"].action_space.sample() for _ in range(steps)]

    def steps_in(env: DreamVectorEnv) -> Job:
        def job() -> float:
            for action in actions:
                env.step(action)
            return steps

        return job

    jobs = {name: steps_in(env) for name, env in envs.items()}
    rates = interleaved_rates(jobs, ROUNDS, setup=lambda: [env.reset(seed=0) for env in envs.values()])
    off, on = (1000 / statistics.median(rate) for rate in rates.values())
    return [batch, f"{off:.2f}", f"{on:.2f}", f"{100 * (on / off - 1):.1f}%"]


@torch.inference_mode()
def _draft_spread(model: WorldModel, windows: Windows, errors: DreamErrors) -> Tensor:
    """The root of the accumulated variance that the draft gives each step."""
    assert model.draft is not None
    obs, scaling = model.scaling.obs(errors.before), model.scaling
    change = torch.cat([torch.zeros_like(obs[:, :1]), obs.diff(dim=1)], 1) / scaling.step_std
    _, log_var = model.draft(obs, scaling.action(errors.actions), change)
    return (scaling.step_std.square() * log_var.exp()).mean(-1).cumsum(1).sqrt()


@torch.inference_mode()
def _sampled_spread(model: WorldModel, windows: Windows, errors: DreamErrors) -> Tensor:
    """The standard deviation of dreams sampled from the same start with other seeds."""
    state, dreams = windows.observe(model), []
    for i in range(SAMPLED):
        reseeded = state.replace(seed=torch.arange(len(windows.at)) * SAMPLED + i)
        dreams.append(windows.dream(model, state=reseeded, sampled=True, flow_steps=4).obs)
    return (torch.stack(dreams).std(0) / model.scaling.obs_std).square().mean(-1).sqrt()  # type: ignore[arg-type]


def _spread(windows: Windows, first: int, count: int) -> Windows:
    """``count`` windows from ``first`` on, spread evenly: each policy's windows stand together."""
    return windows.part(torch.linspace(first, len(windows.at) - 1, count).long())
