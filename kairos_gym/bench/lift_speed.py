"""How fast Lift is dreamed, beside robosuite itself."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from kairos_gym.bench.harness import Job, Row, imagine_job, start_dreams
from kairos_gym.evaluation.timing import interleaved_rates, median_ratio
from kairos_gym.learning.recipes import RECIPES
from kairos_gym.models import load
from kairos_gym.report import machine

DREAMS, CHUNKS, ROUNDS = (1, 256), (1, 4), 7


def lift_speed() -> Row:
    """Dreamed Lift steps a CPU-second, 1 and 256 dreams at once and 1 or 4 steps at a time, over robosuite's own.

    One thread, by turns in one run, so that whatever else the machine does meets all alike; medians of 7 rounds.
    """
    from envs import make_real

    world: Any = load("lift")
    env = make_real(RECIPES["lift"].env, max_episode_steps=10**9)
    env.reset(seed=0)
    env.action_space.seed(0)

    def simulate() -> float:
        for _ in range(64):
            env.step(env.action_space.sample())
        return 64.0

    jobs: dict[str, Job] = {"robosuite": simulate}
    for batch in DREAMS:
        first = world.starts.obs[torch.arange(batch) % len(world.starts.obs)]
        for chunk in CHUNKS:
            jobs[f"{batch} dreams, chunk {chunk}"] = imagine_job(world, *start_dreams(world, batch, chunk, first), 16)
    rates = interleaved_rates(jobs, ROUNDS)
    env.close()
    return {
        "bench": "lift_speed",
        "steps_per_cpu_second": {name: statistics.median(rate) for name, rate in rates.items()},
        "over_robosuite": {n: median_ratio(r, rates["robosuite"]) for n, r in rates.items() if n != "robosuite"},
        "machine": machine(),
    }
