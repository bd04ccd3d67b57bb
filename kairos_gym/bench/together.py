"""What planning for many environments in one call saves over a call for each."""

from __future__ import annotations

import statistics
import time

import torch

from kairos_gym.bench.harness import Row, gpu_clock
from kairos_gym.evaluation.timing import interleaved_rates
from kairos_gym.models import load
from kairos_gym.report import as_text, machine
from planners import CEM

ITERATIONS = 3


def together(
    model: str = "reacher",
    batch: int = 64,
    sizes: tuple[int, ...] = (4, 16, 64, 400),
    rounds: int = 5,
    device: str = "cpu",
) -> Row:
    """Time to plan for ``batch`` environments in one call, over that of as many calls for one each.

    CEM with 3 rounds of each size, H=5 chunks of K=4 steps, by turns; ``KAIROS_KERNELS=torch`` measures plain torch.
    CPU time, or, with ``device="cuda"``, the time until the GPU has done it.
    """
    world = load(model).to(device)
    assert world.starts is not None
    obs = world.starts.obs[torch.arange(batch) % len(world.starts.obs), :1].to(device)
    seeds = torch.arange(batch)
    state = world.observe(world.initial(batch, seeds), obs)
    single_states = [state.select(torch.tensor([b], device=device)) for b in range(batch)]
    rows: list[Row] = []
    for size in sizes:
        planner = CEM(5, 4, candidates=size, elites=max(2, size // 8), iterations=ITERATIONS)

        def at_once(planner: CEM = planner) -> float:
            planner.plan(world, state, seed=seeds)
            return 1.0

        def one_by_one(planner: CEM = planner) -> float:
            for b, single in enumerate(single_states):
                planner.plan(world, single, seed=b)
            return 1.0

        clock = time.thread_time if device == "cpu" else gpu_clock
        rates = interleaved_rates({"at once": at_once, "one by one": one_by_one}, rounds, clock=clock)
        joint, separate = (1000 / statistics.median(rate) for rate in rates.values())
        rows.append({"candidates": size, "together_ms": joint, "one_by_one_ms": separate, "share": joint / separate})
    print(as_text(list(rows[0]), [list(row.values()) for row in rows]))
    about = {"bench": "together", "model": model, "batch": batch, "device": device, "machine": machine()}
    return about | {"rows": rows}
