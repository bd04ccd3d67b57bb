"""What each planner earns for as many dreamed candidates, in the dream and on the true simulator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kairos_gym.evaluation.control import interval, plan
from kairos_gym.learning.recipes import RECIPES
from kairos_gym.models import load
from kairos_gym.report import Cell, as_text, machine
from planners import CEM, ICEM, MPPI, Gradient, Objective, RandomShooting, SearchPlanner
from world_model.contract import Dynamics

Where = Literal["dream", "truth"]
ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """How a task is planned, chosen on starts other than those of ``planners``.

    On the true simulator, but for InvertedPendulum, chosen in the dream, and Pusher, chosen on both.
    """

    horizon: int  # H, chunks
    chunk: int  # K, steps that are played before it is planned again
    std: float = 0.5  # of the first candidates, in half action ranges
    candidates: int = 64  # of each of the 3 rounds
    objective: Objective = Objective()

    def planners(self) -> dict[str, SearchPlanner]:
        """By name: all with as many evaluations a decision (but for one more or a few less), and three with half."""
        h, k, std, n = self.horizon, self.chunk, self.std, self.candidates
        starts = 8
        found: dict[str, SearchPlanner] = {
            "random shooting": RandomShooting(h, k, candidates=ROUNDS * n),
            "gradient": Gradient(h, k, starts=starts, iterations=ROUNDS * n // starts - 1, std=std),
        }
        for name, m in (("", n), (", half", n // 2)):
            elites = max(2, m // 8)
            found[f"CEM{name}"] = CEM(h, k, candidates=m, elites=elites, iterations=ROUNDS, std=std)
            found[f"MPPI{name}"] = MPPI(h, k, candidates=m, iterations=ROUNDS, std=std)
            # The elites that it keeps are dreamed again.
            fewer = m - round(ICEM.keep * elites)
            found[f"iCEM{name}"] = ICEM(h, k, candidates=fewer, elites=elites, iterations=ROUNDS, std=std, shrink=1)
        return found


def _balance(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """The pole upright, the cart in the middle, both at rest: to be paid for survival alone tells few plans apart."""
    place, angle, speeds = next_obs[..., 0], next_obs[..., 1], next_obs[..., 2:]
    return 1 - (angle / 0.2) ** 2 - place**2 - 0.01 * speeds.square().sum(-1)


SETTINGS = {
    "pendulum": Setting(10, 2, candidates=48),
    "invertedpendulum": Setting(20, 1, std=0.1, candidates=12, objective=Objective(reward_fn=_balance)),
    "reacher": Setting(5, 4, std=0.12, candidates=48),
    "pusher": Setting(15, 2, std=0.2, candidates=48),
    "swingup": Setting(15, 2, candidates=48),
}


def planners(
    tasks: tuple[str, ...] = tuple(SETTINGS),
    dynamics: tuple[Where, ...] = ("dream", "truth"),
    episodes: int = 20,
    seed: int = 5000,
) -> dict[str, Any]:
    """Play ``episodes`` real episodes of each task with each planner, in the dream and on the truth -> one table.

    Episode e begins as ``reset(seed=seed + e)`` and is planned with the same noise, whoever plays, so differences are
    paired. A gradient needs a dream: the simulators pass none on.
    """
    from envs import SimulatorDynamics

    if unknown := set(tasks) - set(SETTINGS):
        raise ValueError(f"no task {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    rows: list[dict[str, Any]] = []
    for task in tasks:
        setting, env = SETTINGS[task], RECIPES[task].env
        for name, planner in setting.planners().items():
            for where in dynamics:
                if where == "truth" and isinstance(planner, Gradient):
                    continue
                world: Dynamics = load(task) if where == "dream" else SimulatorDynamics(env)
                played = plan(env, world, planner, setting.objective, episodes=episodes, seed=seed)
                rows.append(
                    {
                        "task": task,
                        "planner": name,
                        "dynamics": where,
                        "evaluations": played.evaluations,
                        "mean": float(played.returns.mean()),
                        "interval": interval(played.returns),
                        "ms_per_decision": played.ms_per_decision,
                        "returns": played.returns.tolist(),
                    }
                )
    print(table(rows))
    return {"bench": "planners", "episodes": episodes, "seed": seed, "machine": machine(), "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each task and planner; beside CEM the mean paired difference, with its 95% interval, in the dream."""
    by = {(row["task"], row["planner"], row["dynamics"]): row for row in rows}
    lines: list[list[Cell]] = []
    for task, name in dict.fromkeys((row["task"], row["planner"]) for row in rows):
        dream, truth, cem = (
            by.get(key) for key in ((task, name, "dream"), (task, name, "truth"), (task, "CEM", "dream"))
        )
        line: list[Cell] = [task, name, (dream or truth or {})["evaluations"], *map(_mean, (dream, truth))]
        line.append(f"{100 * (dream['mean'] - truth['mean']) / abs(truth['mean']):+.0f}%" if dream and truth else "-")
        ahead = np.subtract(dream["returns"], cem["returns"]) if dream and cem and name != "CEM" else None
        line.append("-" if ahead is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(ahead.mean(), *interval(ahead)))
        line.append(" / ".join("-" if row is None else f"{row['ms_per_decision']:.3g}" for row in (dream, truth)))
        lines.append(line)
    columns = ["task", "planner", "evaluations", "in the dream", "on the truth", "dream over truth", "over CEM (dream)"]
    return as_text([*columns, "ms a decision"], lines)


def _mean(row: dict[str, Any] | None) -> Cell:
    return "-" if row is None else "{:.2f} ({:.2f} to {:.2f})".format(row["mean"], *row["interval"])


def together(
    model: str = "reacher",
    batch: int = 64,
    sizes: tuple[int, ...] = (4, 16, 64, 400),
    rounds: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:
    """Time to plan for ``batch`` environments in one call, over that of as many calls for one each.

    CEM with 3 rounds of each size, H=5 chunks of K=4 steps, by turns; ``KAIROS_KERNELS=torch`` measures plain torch.
    CPU time, or, with ``device="cuda"``, the time until the GPU has done it.
    """
    world = load(model).to(device)
    assert world.starts is not None
    obs = world.starts.obs[torch.arange(batch) % len(world.starts.obs), :1].to(device)
    seeds = torch.arange(batch)
    state = world.observe(world.initial(batch, seeds), obs)
    one = [state.select(torch.tensor([b], device=device)) for b in range(batch)]
    rows: list[dict[str, Any]] = []

    def now() -> float:
        if device == "cpu":
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    for size in sizes:
        planner = CEM(5, 4, candidates=size, elites=max(2, size // 8), iterations=ROUNDS)

        def at_once(planner: CEM = planner) -> None:
            planner.plan(world, state, seed=seeds)

        def one_by_one(planner: CEM = planner) -> None:
            for b, batch_of_one in enumerate(one):
                planner.plan(world, batch_of_one, seed=b)

        took: dict[Any, list[float]] = {at_once: [], one_by_one: []}
        for _ in range(rounds):
            for job, times in took.items():
                begun = now()
                job()
                times.append(now() - begun)
        whole, single = (median(times) for times in took.values())
        rows.append(
            {"candidates": size, "together_ms": 1000 * whole, "one_by_one_ms": 1000 * single, "share": whole / single}
        )
    print(as_text(list(rows[0]), [list(row.values()) for row in rows]))
    about = {"bench": "together", "model": model, "batch": batch, "device": device, "machine": machine()}
    return about | {"rows": rows}
