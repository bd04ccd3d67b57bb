"""Policies from few real steps: what is learned through the dream, beside learning in the simulator itself."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from kairos_gym.bench.harness import ROWS, Row, read_rows
from kairos_gym.learning.loop import loop
from kairos_gym.learning.loop_config import LoopConfig
from kairos_gym.plots import BLUE, INK, ORANGE, panels
from kairos_gym.policies.evaluate import make_eval_envs
from kairos_gym.report import Cell, as_text, machine

SAMPLES = {"Pendulum-v1": 1000, "InvertedPendulum-v5": 1000, "Reacher-v5": 4000, "HalfCheetah-v5": 4000}  # N
# What differs from LoopConfig. Half a cheetah touches the ground here and there, so no model of 4,000 steps knows it to
# a fifth of a standard deviation: dreams may be more wrong, steps that the model knows little of cost, and fewer
# updates keep it from learning its few steps by heart. Chosen with seeds 0 and 1.
SETTINGS: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {"max_error": 1.0, "penalty": 1.0, "updates": 10, "draft_steps": 1000, "weight_decay": 0.1}
}
GUARDS: dict[str, dict[str, Any]] = {
    "both": {},
    "cut": {"penalty": 0.0},
    "penalty": {"max_error": None},
    "none": {"max_error": None, "penalty": 0.0},
}
MORE = 10  # times as many samples for the simulator's own learner
FRESH = 5000  # the seed of the first start of the final episodes; no policy is chosen by them
Way = Literal["dream", "sb3", "sb3-small"]
Guard = Literal["both", "cut", "penalty", "none"]
Groups = dict[tuple[str, str, int], dict[int, Row]]  # task, way and samples: the row of each seed


def learning(
    task: str,
    way: Way = "dream",
    seed: int = 0,
    samples: int | None = None,
    guard: Guard = "both",
    target: float | None = None,
    out: Path = Path("runs/learning"),
) -> Row:
    """Learn a policy and play 10 episodes from fresh starts with its last form, without its noise.

    way: "dream", the loop with ``samples`` N real steps; "sb3", Stable-Baselines3's SAC with its own settings in the
    simulator, played after N and after 10 N steps; "sb3-small", the same with the settings that the loop's SAC has.
    samples: N, SAMPLES where None. guard: "both" of the task's guards against the model's mistakes, dreams cut short
    and a penalty where it has one, or one or none of them: dreams of 32 steps, and 5% of real steps in what the policy
    learns from. target: the loop's. Each call starts anew, in ``out``.
    """
    n = SAMPLES[task] if samples is None else samples
    about = {"bench": "learning", "task": task, "way": way, "seed": seed, "samples": n, "machine": machine()}
    if way != "dream":
        return about | _learn_in_simulator(task, way, seed, n)
    folder = out / f"{task}-{n}-{seed}-{guard}"
    settings = SETTINGS.get(task, {}) | GUARDS[guard]
    config = LoopConfig(samples=n, round_steps=n // 10, seed=seed, target=target, **settings)
    return about | {"guard": guard, "target": target, "settings": settings} | _learn_by_loop(task, folder, config)


def _learn_by_loop(task: str, folder: Path, config: LoopConfig) -> Row:
    from stable_baselines3 import SAC

    start = time.process_time()
    shutil.rmtree(folder, ignore_errors=True)
    rounds = loop(task, folder, config, progress=False)
    cpu = time.process_time() - start
    return {
        "used": rounds[-1]["steps"],
        "cpu_seconds": cpu,
        "returns": real_returns(SAC.load(folder / f"last-{rounds[-1]['steps']}.zip"), task),
        "best": real_returns(SAC.load(folder / "best.zip"), task),
        "rounds": [{key: float(np.mean(row[key])) for key in row} for row in rounds],
    }


def _learn_in_simulator(task: str, way: Way, seed: int, samples: int) -> Row:
    from stable_baselines3 import SAC

    from envs import make_real
    from kairos_gym.policies.sb3 import make_algorithm

    start, env, row = time.process_time(), make_real(task), dict[str, Any]()
    small = {"gradient_steps": 1, "learning_starts": 100}
    policy: Any = SAC("MlpPolicy", env, seed=seed) if way == "sb3" else make_algorithm("sac", env, seed=seed, **small)
    for times, suffix in ((1, ""), (MORE, f"_{MORE}n")):
        policy.learn(times * samples - policy.num_timesteps, log_interval=None, reset_num_timesteps=False)
        row[f"cpu_seconds{suffix}"] = time.process_time() - start
        row[f"returns{suffix}"] = real_returns(policy, task)
    return row


def real_returns(policy: Any, task: str) -> list[float]:
    """The returns of 10 real episodes from fresh starts."""
    from kairos_gym.policies.evaluate import evaluate

    return evaluate(policy, make_eval_envs(task)[0], seed=FRESH).real.tolist()


def learned(path: Path = ROWS, out: Path = Path("docs/learning.svg")) -> None:
    """Print what ``learning`` measured, a line for each task and way, and draw the returns by real steps.

    Each figure is the mean over seeds of the mean return from 10 fresh starts, with the lowest and the highest seed.
    """
    groups: Groups = {}
    for row in read_rows(path):  # of a seed that was run twice the last counts
        if row.get("bench") == "learning":
            way = row["way"]
            way += f", guard {row['guard']}" if row.get("guard", "both") != "both" else ""
            way += f", until {row['target']:g}" if row.get("target") is not None else ""
            groups.setdefault((row["task"], way, row["samples"]), {})[row["seed"]] = row
    lines: list[list[Cell]] = []
    for (task, way, n), seeds in sorted(groups.items()):
        for suffix, steps in (("", n), (f"_{MORE}n", MORE * n)):
            if rows := [row for row in seeds.values() if f"returns{suffix}" in row]:
                cpu = np.mean([row[f"cpu_seconds{suffix}"] for row in rows])
                gaps = [row["rounds"][-1]["imagined"] - row["rounds"][-1]["real"] for row in rows if "rounds" in row]
                means = [float(np.mean(row[f"returns{suffix}"])) for row in rows]
                spread = _mean_and_range(means), _mean_and_range(gaps) if gaps else ""
                lines.append([task, way, f"{steps:,}", len(rows), *spread, f"{cpu:.0f}"])
    columns = ["task", "way", "real steps", "seeds", "real return", "imagined - real at the end", "CPU-s"]
    print(as_text(columns, lines))
    _draw(groups, out)


def _mean_and_range(values: list[float]) -> str:
    return f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def _draw(groups: Groups, out: Path) -> None:
    tasks = [task for task, n in SAMPLES.items() if (task, "dream", n) in groups]
    figure, row = panels((10, 2.9), max(1, len(tasks)))
    for axes, task in zip(row, tasks, strict=False):
        _draw_task(axes, groups, task)
    row[0].set_ylabel("mean return of ten episodes", fontsize=8)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=100)


def _draw_task(axes: Axes, groups: Groups, task: str) -> None:
    """Returns by real steps of each seed, and the returns of the simulator's own learner."""
    n = SAMPLES[task]
    for i, seed_row in enumerate(groups[task, "dream", n].values()):
        steps = [evaluation["steps"] for evaluation in seed_row["rounds"]]
        for name, colour, style in (("imagined", ORANGE, ":"), ("real", BLUE, "-")):
            label = f"{name} return" if not i else None
            values = [evaluation[name] for evaluation in seed_row["rounds"]]
            axes.plot(steps, values, style, color=colour, linewidth=1.3, label=label)
    for times, suffix, style in ((1, "", "--"), (MORE, f"_{MORE}n", "-")):
        rows = groups.get((task, "sb3", n), {}).values()
        if means := [np.mean(row[f"returns{suffix}"]) for row in rows if f"returns{suffix}" in row]:
            label = f"SAC in the simulator, {times if times > 1 else ''}N steps"
            axes.axhline(float(np.mean(means)), color=INK, linestyle=style, linewidth=1, label=label)
    axes.set_title(f"{task}, N = {n:,}", fontsize=9)
    axes.set_xlabel("real steps", fontsize=8)
    axes.tick_params(labelsize=7)
