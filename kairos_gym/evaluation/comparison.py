"""Comparison: what was measured of a dream and its simulator, and every number that follows from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kairos_gym.data.training_data import TrainingData
from kairos_gym.evaluation.agreement import Agreement, agreement
from kairos_gym.evaluation.calibrate import coverage
from kairos_gym.evaluation.memory_bounds import MemoryDrift
from kairos_gym.evaluation.rollouts import Result, Rollouts
from kairos_gym.evaluation.windows import OpenLoopErrors, Windows
from kairos_gym.report import machine
from world_model.conformal import ConformalBound, DreamErrors
from world_model.contract import Imagined

PERTURBATIONS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # how far off the simulator itself is started, in std
SHOWN_PERTURBATIONS = (1e-3, 1e-2)  # those in figures and tables
MODEL = "the model"
SHUFFLED = "the model, actions shuffled"


def perturbed(by: float) -> str:
    """The name of the simulator started ``by`` std off."""
    return f"simulator, {by:g} std off"


HIDDEN = {perturbed(by) for by in PERTURBATIONS if by not in SHOWN_PERTURBATIONS}


@dataclass(frozen=True)
class TerminationCounts:
    """In how many of the W windows the episode ends in the simulator, in the dream, in both, in neither."""

    both: int
    only_simulated: int
    only_dreamed: int
    neither: int
    steps_apart: float | None  # median, where both end


@dataclass(frozen=True)
class Speed:
    """Simulator steps a second of CPU time, on one thread."""

    simulator: float
    dream: dict[int, float]  # by the number of dreams side by side


@dataclass(frozen=True)
class Comparison:
    """All that ``compare`` measured. ``numbers`` is all of it for JSON."""

    name: str  # of the model
    dt: float  # seconds of a simulator step
    chunk: int  # steps imagined at once
    rollouts: Rollouts
    windows: Windows
    std: Tensor  # [O] the unit of every observation error
    dreamed: Imagined  # [W,h,...] the model's dream of the windows
    errors: dict[str, OpenLoopErrors]  # open loop, by the name of the dynamics; the model is the first
    results: dict[str, Result]  # closed loop, likewise
    ends: TerminationCounts
    speed: Speed
    trust: ConformalBound | None  # the model's error bound, where it was calibrated
    dream_errors: DreamErrors  # of the windows, as ``trust`` takes them
    memory: dict[int, MemoryDrift]  # by gated-delta layer: its memory of dreamed frames beside that of real ones
    state_bytes: dict[int, int]  # the size of one dream's state, by the steps that were dreamed
    experience: TrainingData | None  # the data that the references were fitted on

    @property
    def horizons(self) -> list[int]:
        """1, 8, 32 and the longest that was dreamed."""
        longest = self.windows.horizon
        return sorted({h for h in (1, 8, 32) if h < longest} | {longest})

    def of_policy(self, p: int) -> Tensor:
        """The windows of policy number ``p``, int64."""
        per_policy = len(self.rollouts.seeds)
        return torch.arange(p * per_policy, (p + 1) * per_policy)

    def drift(self, imagined: Imagined) -> Tensor:
        """How far the distribution of dreamed states is from that of the simulated ones -> [h,O], in std.

        The 1-Wasserstein distance of each dimension at each step, over the windows that last so long.
        """
        assert imagined.obs is not None
        recorded, distances = self.windows.recorded, []
        for t in range(self.windows.horizon):
            lasts = recorded.valid[:, t]
            dreamed, simulated = ((x[lasts, t] / self.std).sort(0).values for x in (imagined.obs, recorded.obs))
            distances.append((dreamed - simulated).abs().mean(0) if lasts.any() else self.std * torch.nan)
        return torch.stack(distances)

    def equivalent_perturbation(self, horizon: int) -> float | None:
        """How far off a start, in std of its coordinates, makes the simulator as wrong as the model in the median.

        Interpolated between ``PERTURBATIONS`` on logarithmic scales; NaN beyond them, None without a simulator.
        """
        names = {by: perturbed(by) for by in PERTURBATIONS if perturbed(by) in self.errors}
        error = self.errors[MODEL].nrmse(horizon)
        if not names or not len(error):
            return None
        medians = [self.errors[name].nrmse(horizon).median().item() for name in names.values()]
        x, y = np.log(np.maximum(medians, 1e-12)), np.log(list(names))
        at = math.log(max(error.median().item(), 1e-12))
        order = np.argsort(x)
        return math.exp(np.interp(at, x[order], y[order])) if x.min() <= at <= x.max() else math.nan

    def steps_within(self, errors: OpenLoopErrors, limit: float) -> int:
        """How many steps the median dream stays within an NRMSE of ``limit``; 0 where not even one."""
        medians = [errors.nrmse(h) for h in range(1, self.windows.horizon + 1)]
        over = [i for i, e in enumerate(medians) if not len(e) or e.median() > limit]
        return over[0] if over else self.windows.horizon

    def success_auc(self, horizon: int) -> dict[str, Any]:
        """How well the highest reward dreamed within ``horizon`` steps predicts that a window is solved in that time.

        The area under the ROC curve, 0.5 for guessing, NaN where all windows or none are solved. Left out are those
        that begin solved, and those whose recording ends too early to know.
        """
        solved = self.rollouts.solved
        assert solved is not None
        recorded = self.windows.recorded
        terminated, valid = recorded.terminated[:, :horizon], recorded.valid[:, :horizon]
        frames = (self.windows.at[:, None] + torch.arange(1, horizon + 1)).clamp_max(len(solved) - 1)
        label = (solved[frames] & valid).any(1)
        known = ~solved[self.windows.at] & (label | terminated.any(1) | valid.all(1))
        highest = self.dreamed.reward[:, :horizon].nan_to_num(-torch.inf).amax(1)
        positive, negative = highest[known & label], highest[known & ~label]
        above = (positive[:, None] > negative).float() + 0.5 * (positive[:, None] == negative).float()
        return {"auc": above.mean().item(), "solved": len(positive), "not": len(negative)}

    def agreement(self, name: str) -> Agreement:
        """How the returns of the dynamics ``name`` agree with the simulator's."""
        return agreement(self.results[name].returns, self.rollouts.result.returns)

    def numbers(self) -> dict[str, Any]:
        """Every figure, as plain numbers, lists and dicts; what is not a number is None."""
        rollouts, names = self.rollouts, [policy.name for policy in self.rollouts.policies]
        h = self.horizons
        recorded = self.windows.recorded
        reward_std = recorded.reward[recorded.valid].std().item() or math.nan  # where all steps pay the same
        errors, drift = self.errors[MODEL], self.drift(self.dreamed)
        numbers = {
            "model": self.name,
            "env": rollouts.env_id,
            "machine": machine(),
            "settings": {
                "chunk": self.chunk,
                "episodes": len(rollouts.seeds),
                "seeds": [int(rollouts.seeds[0]), int(rollouts.seeds[-1])],
                "starts_refused_as_solved": rollouts.rejected,
                "time_limit": rollouts.limit,
                "windows": len(self.windows.at),
                "context": int(self.windows.seen.max()),
                "horizon": self.windows.horizon,
                "references_fitted_on": None if self.experience is None else self.experience.name,
                "references_had_the_same_data": self.experience is not None and self.experience.same,
            },
            "error_by_horizon": {name: {t: spread(e.nrmse(t)) for t in h} for name, e in self.errors.items()},
            "median_error_at_every_step": {
                name: [_median(e.nrmse(t)) for t in range(1, self.windows.horizon + 1)]
                for name, e in self.errors.items()
            },
            "steps_within": {
                name: {str(limit): self.steps_within(e, limit) for limit in (0.1, 0.3)}
                for name, e in self.errors.items()
            },
            "equivalent_perturbation": {t: self.equivalent_perturbation(t) for t in h},
            "error_by_policy": {
                name: {t: spread(errors.part(self.of_policy(p)).nrmse(t)) for t in h} for p, name in enumerate(names)
            },
            "error_by_dimension": {t: _rms(errors.obs_error[:, t - 1]).tolist() for t in h},
            "reward_error": {
                name: {t: _rms(e.reward_error[:, t - 1, None]).item() / reward_std for t in h}
                for name, e in self.errors.items()
            },
            "ends": asdict(self.ends),
            "success_auc": None if rollouts.solved is None else {t: self.success_auc(t) for t in h},
            "drift": {t: drift[t - 1].tolist() for t in h},
            "policies": {
                name: {
                    "simulated": _returns(rollouts.result, p),
                    **{who: _returns(result, p) for who, result in self.results.items()},
                }
                for p, name in enumerate(names)
            },
            "agreement": {name: _agreement(self.agreement(name), names) for name in self.results},
            "trust": self._coverage(),
            "memory": {layer: _memory(drift, h) for layer, drift in self.memory.items()},
            "speed": asdict(self.speed),
            "state_bytes": self.state_bytes,
        }
        return _to_json(numbers)

    def _coverage(self) -> dict[str, Any] | None:
        """How often the bound of 90% held, over all windows and over those of each policy."""
        if self.trust is None:
            return None
        h = [t for t in self.horizons if t <= self.trust.horizon]
        whole = {"all": coverage(self.dream_errors, self.trust, h, chunk=self.chunk)}
        return whole | {
            policy.name: coverage(self.dream_errors.part(self.of_policy(p)), self.trust, h, chunk=self.chunk)
            for p, policy in enumerate(self.rollouts.policies)
        }

    def log(self, folder: str | Path) -> None:
        """Write the median errors at every step and the agreement as TensorBoard scalars to ``folder``."""
        from torch.utils.tensorboard import SummaryWriter

        numbers = self.numbers()
        with SummaryWriter(str(folder)) as writer:
            for name, medians in numbers["median_error_at_every_step"].items():
                for t, error in enumerate(medians, 1):
                    if error is not None:
                        writer.add_scalar(f"median error/{name}", error, t)
            for name, row in numbers["agreement"].items():
                for what in ("pearson", "spearman", "regret"):
                    if row[what][0] is not None:
                        writer.add_scalar(f"{what}/{name}", row[what][0], 0)


def spread(error: Tensor) -> dict[str, float | int | None]:
    """RMS, median and quantiles of the errors [n] of n dreams; None where there are none."""
    if not len(error):
        return {"n": 0, "rms": None, "median": None}
    quantiles = {f"q{int(100 * q)}": torch.quantile(error, q).item() for q in (0.1, 0.25, 0.75, 0.9)}
    return {"n": len(error), "rms": _rms(error[:, None]).item(), "median": error.median().item(), **quantiles}


def steps_of(h: int | str) -> str:
    """1 step, 2 steps, ..."""
    return f"{h} step{'' if str(h) == '1' else 's'}"


def _memory(drift: MemoryDrift, horizons: list[int]) -> dict[str, Any]:
    """Medians over the windows, of each head; errors and bounds over the memory's own size."""

    def by_step(x: Tensor) -> dict[int, Any]:
        return {h: (x / drift.size)[..., h].median(0).values.tolist() for h in horizons}

    return {
        "steps_remembered": drift.reach.median(0).values.tolist(),
        "error": by_step(drift.error),
        "bound": by_step(drift.running_bound),
        "closed_bound": by_step(drift.closed_bound),
        "tightness": drift.tightness.median(0).values.tolist(),
        "violations": int((drift.error > drift.running_bound * (1 + 1e-3) + 1e-4).sum()),
    }


def _rms(x: Tensor) -> Tensor:
    """Over the first dimension, NaN left out."""
    return x.square().nanmean(0).sqrt()


def _median(error: Tensor) -> float:
    return error.median().item() if len(error) else math.nan


def _returns(result: Result, p: int) -> dict[str, Any]:
    """Means over the starts of policy number ``p``."""
    row: dict[str, Any] = {
        "return": result.returns[p].mean(),
        "steps": result.steps[p].mean(),
        "ended": result.terminated[p].mean(),
        "lost": int(result.diverged[p].sum()),
    }
    if result.success is not None:
        row["success"] = np.isfinite(result.success[p]).mean()
        row["steps_to_success"] = np.median(result.success[p])
    return row


def _agreement(result: Agreement, names: list[str]) -> dict[str, Any]:
    return {**asdict(result), "chosen": names[result.chosen], "best": names[result.best]}


def _to_json(x: Any) -> Any:
    """Only what JSON has: keys as text, NaN and infinity as None."""
    if isinstance(x, dict):
        return {str(key): _to_json(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_to_json(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x
