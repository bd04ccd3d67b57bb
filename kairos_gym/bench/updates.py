"""What an update of training costs, compiled and in plain torch."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from kairos_gym.bench.harness import Job, Row, kernels_of
from kairos_gym.evaluation.timing import interleaved_rates, median_ratio
from kairos_gym.models import load
from kairos_gym.report import machine
from world_model.episodes import Episodes
from world_model.model.world_model import WorldModel
from world_model.training.config import FitConfig
from world_model.training.run import TrainingRun

ROUNDS = 7
UPDATES = 40  # of a turn: all chunk lengths alike


def updates() -> Row:
    """Milliseconds of CPU time an update of ``fit``, HalfCheetah's sizes, compiled and in plain torch.

    The draft's phase and the memory's, on episodes of noise, which cost the same. One thread, by turns in one run.
    """
    shipped: Any = load("halfcheetah")
    rng, steps = np.random.default_rng(0), 200
    episodes = Episodes.stack(
        (rng.normal(size=(steps + 1, 17)), rng.uniform(-1, 1, (steps, 6)), rng.normal(size=steps), np.zeros(steps))
        for _ in range(100)
    )
    config = FitConfig(draft_steps=10**6, steps=10**6)
    jobs: dict[str, Job] = {}
    for kernels in ("native", "torch"):
        for phase, first in (("draft", 0), ("memory", config.draft_steps)):
            model = WorldModel(shipped.config, shipped.spec)
            model.scaling.measure(episodes)
            run = TrainingRun(model, episodes, config, Path(), "")
            jobs[f"{phase}, {kernels}"] = kernels_of(kernels)(_update_job(run, first))
    rates = interleaved_rates(jobs, ROUNDS, clock=time.process_time)
    return {
        "bench": "updates",
        "ms": {name: 1e3 / statistics.median(rate) for name, rate in rates.items()},
        "over_torch": {p: median_ratio(rates[f"{p}, native"], rates[f"{p}, torch"]) for p in ("draft", "memory")},
        "machine": machine(),
    }


def _update_job(run: TrainingRun, first: int) -> Job:
    """Train with the updates from number ``first`` on -> how many."""

    def job() -> float:
        for i in range(UPDATES):
            run.update(first + i)
        return float(UPDATES)

    return job
