"""The return of each planner with the same number of candidates, planning in the dream and on the true simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from kairos_gym.bench.harness import Row
from kairos_gym.evaluation.control import evaluate_planner
from kairos_gym.evaluation.intervals import bootstrap_mean
from kairos_gym.learning.recipes import RECIPES
from kairos_gym.models import load
from kairos_gym.report import Cell, as_text, machine
from planners import CEM, ICEM, MPPI, Gradient, Objective, RandomShooting, SearchPlanner
from world_model.contract import Dynamics

Where = Literal["dream", "truth"]
ITERATIONS = 3


@dataclass(frozen=True)
class Setting:
    """How a task is planned: chosen on other starts than those of ``planners``.

    On the true simulator, but for InvertedPendulum, chosen in the dream, and Pusher, chosen on both.
    """

    horizon: int  # H, chunks
    chunk: int  # K, steps played before the next decision
    std: float = 0.5  # of the first candidates, in half action ranges
    candidates: int = 64  # of each of the 3 iterations
    objective: Objective = Objective()

    def planners(self) -> dict[str, SearchPlanner]:
        """By name: all with (nearly) the same number of evaluations a decision, and three of them with half."""
        h, k, std, n = self.horizon, self.chunk, self.std, self.candidates
        starts = 8
        planners: dict[str, SearchPlanner] = {
            "random shooting": RandomShooting(h, k, candidates=ITERATIONS * n),
            "gradient": Gradient(h, k, starts=starts, iterations=ITERATIONS * n // starts - 1, std=std),
        }
        for name, m in (("", n), (", half", n // 2)):
            elites = max(2, m // 8)
            planners[f"CEM{name}"] = CEM(h, k, candidates=m, elites=elites, iterations=ITERATIONS, std=std)
            planners[f"MPPI{name}"] = MPPI(h, k, candidates=m, iterations=ITERATIONS, std=std)
            # The elites that it keeps are evaluated again.
            fewer = m - round(ICEM.keep * elites)
            planners[f"iCEM{name}"] = ICEM(
                h, k, candidates=fewer, elites=elites, iterations=ITERATIONS, std=std, shrink=1
            )
        return planners


def _balance(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """Upright pole, cart in the middle, both at rest. The task's own reward, 1 for survival, tells few plans apart."""
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
) -> Row:
    """Play ``episodes`` real episodes of each task with each planner, in the dream and on the truth -> one table.

    Episode e begins as ``reset(seed=seed + e)`` for every planner, with the same noise, so differences are paired.
    Gradients exist in the dream only: simulators have none.
    """
    from envs import SimulatorDynamics

    if unknown := set(tasks) - set(SETTINGS):
        raise ValueError(f"no task {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    rows: list[Row] = []
    for task in tasks:
        setting, env = SETTINGS[task], RECIPES[task].env
        for name, planner in setting.planners().items():
            for where in dynamics:
                if where == "truth" and isinstance(planner, Gradient):
                    continue
                world: Dynamics = load(task) if where == "dream" else SimulatorDynamics(env)
                played = evaluate_planner(env, world, planner, setting.objective, episodes=episodes, seed=seed)
                rows.append(
                    {
                        "task": task,
                        "planner": name,
                        "dynamics": where,
                        "evaluations": played.evaluations,
                        "mean": float(played.returns.mean()),
                        "interval": bootstrap_mean(played.returns),
                        "ms_per_decision": played.ms_per_decision,
                        "returns": played.returns.tolist(),
                    }
                )
    print(table(rows))
    return {"bench": "planners", "episodes": episodes, "seed": seed, "machine": machine(), "rows": rows}


def table(rows: Sequence[Row]) -> str:
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
        line.append(
            "-" if ahead is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(ahead.mean(), *bootstrap_mean(ahead))
        )
        line.append(" / ".join("-" if row is None else f"{row['ms_per_decision']:.3g}" for row in (dream, truth)))
        lines.append(line)
    columns = ["task", "planner", "evaluations", "in the dream", "on the truth", "dream over truth", "over CEM (dream)"]
    return as_text([*columns, "ms a decision"], lines)


def _mean(row: Row | None) -> Cell:
    return "-" if row is None else "{:.2f} ({:.2f} to {:.2f})".format(row["mean"], *row["interval"])
