"""Policies from few real steps: what is learned through the dream, beside learning in the simulator itself."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kairos_gym.dream.vector_env import DreamVectorEnv
from kairos_gym.learning.learn import make_eval_envs
from kairos_gym.learning.loop import loop
from kairos_gym.learning.loop_config import LoopConfig
from kairos_gym.models import load
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
FRESH = 5000  # the seed of the first of the starts that say what a policy earns; no policy is judged from them before
Way = Literal["dream", "sb3", "sb3-small"]
Guard = Literal["both", "cut", "penalty", "none"]


def learning(
    task: str,
    way: Way = "dream",
    seed: int = 0,
    samples: int | None = None,
    guard: Guard = "both",
    target: float | None = None,
    out: Path = Path("runs/learning"),
) -> dict[str, Any]:
    """Learn a policy and play 10 episodes from fresh starts with its last form, without its noise.

    way: "dream", the loop with ``samples`` N real steps; "sb3", Stable-Baselines3's SAC with its own settings in the
    simulator, played after N and after 10 N steps; "sb3-small", the same with the settings that the loop's SAC has.
    samples: N, SAMPLES where None. guard: "both" of the task's guards against the model's mistakes, dreams cut short
    and a penalty where it has one, or one or none of them: dreams of 32 steps, and 5% of real steps in what the policy
    learns from. target: the loop's. It begins anew each time, in ``out``.
    """
    from stable_baselines3 import SAC

    n = SAMPLES[task] if samples is None else samples
    about = {"bench": "learning", "task": task, "way": way, "seed": seed, "samples": n, "machine": machine()}
    began = time.process_time()
    if way == "dream":
        folder = out / f"{task}-{n}-{seed}-{guard}"
        shutil.rmtree(folder, ignore_errors=True)
        own = {**SETTINGS.get(task, {}), **GUARDS[guard]}
        config = LoopConfig(samples=n, round_steps=n // 10, seed=seed, target=target, **own)
        rows = loop(task, folder, config, progress=False)
        cpu = time.process_time() - began
        policy: Any = SAC.load(folder / f"last-{rows[-1]['steps']}.zip")
        best: Any = SAC.load(folder / "best.zip")
        curve = [{key: float(np.mean(row[key])) for key in row} for row in rows]
        played = {"returns": _returns(policy, task), "best": _returns(best, task)}
        return about | {
            "guard": guard,
            "target": target,
            "settings": own,
            "used": rows[-1]["steps"],
            "cpu_seconds": cpu,
            **played,
            "rounds": curve,
        }
    from envs import make_real
    from kairos_gym.policies.sb3 import make_algorithm

    env = make_real(task)
    small = {"gradient_steps": 1, "learning_starts": 100}
    policy = SAC("MlpPolicy", env, seed=seed) if way == "sb3" else make_algorithm("sac", env, seed=seed, **small)
    found: dict[str, Any] = {}
    for times in (1, MORE):
        policy.learn(times * n - policy.num_timesteps, log_interval=None, reset_num_timesteps=False)
        name = {1: "returns", MORE: f"returns_{MORE}n"}[times]
        found |= {name.replace("returns", "cpu_seconds"): time.process_time() - began}
        found |= {name: _returns(policy, task)}
    return about | found


def gradients(
    model: str,
    algorithm: Literal["shac", "sac"] = "shac",
    cpu_seconds: tuple[float, ...] = (10.0, 30.0),
    seed: int = 0,
) -> dict[str, Any]:
    """Learn in a shipped model's dream for so many CPU-seconds, and play 10 real episodes from fresh starts after each.

    algorithm: "shac", by gradients through the dream, or "sac", by Stable-Baselines3, as ``kairos learn`` has them.
    """
    from kairos_gym.dream.sb3_vec_env import DreamVecEnv
    from kairos_gym.policies.sb3 import make_algorithm
    from kairos_gym.policies.shac import ActorCritic
    from world_model.dynamics.draft_dynamics import DraftDynamics

    world, returns, spent = load(model), {}, 0.0
    if algorithm == "shac":
        policy: Any = ActorCritic.from_spec(world.spec, seed=seed)
        policy.start(DreamVectorEnv(DraftDynamics(world), 64, autoreset_mode="SameStep"), seed)
    else:
        venv = DreamVecEnv(world, 64)
        venv.seed(seed)
        policy = make_algorithm("sac", venv, seed=seed)
    for budget in sorted(cpu_seconds):
        until = time.process_time() + budget - spent
        if algorithm == "shac":
            while time.process_time() < until:
                policy.rollout()
        else:
            going = lambda *_, until=until: time.process_time() < until  # noqa: E731
            policy.learn(10**9, going, log_interval=None, reset_num_timesteps=False)
        returns[str(budget)], spent = _returns(policy, str(world.card["env"])), budget
    about = {"bench": "gradients", "model": model, "algorithm": algorithm, "seed": seed}
    return about | {"steps": policy.num_timesteps, "returns": returns, "machine": machine()}


def _returns(policy: Any, task: str) -> list[float]:
    from kairos_gym.policies.sb3 import evaluate

    return evaluate(policy, make_eval_envs(task)[0], seed=FRESH).real.tolist()


def learned(path: Path = Path("reports/bench.jsonl"), out: Path = Path("docs/learning.svg")) -> None:
    """Print what ``learning`` measured, a line for each task and way, and draw the returns by real steps.

    Each figure is the mean over seeds of the mean return from 10 fresh starts, with the lowest and the highest seed.
    """
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    groups: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
    for row in kept:  # of a seed that was run twice the last counts
        if row.get("bench") == "learning":
            way = row["way"]
            way += f", guard {row['guard']}" if row.get("guard", "both") != "both" else ""
            way += f", until {row['target']:g}" if row.get("target") is not None else ""
            groups.setdefault((row["task"], way, row["samples"]), {})[row["seed"]] = row
    lines: list[list[Cell]] = []
    for (task, way, n), seeds in sorted(groups.items()):
        for name, steps in (("returns", n), (f"returns_{MORE}n", MORE * n)):
            group = [row for row in seeds.values() if name in row]
            if group:
                cpu = np.mean([row[name.replace("returns", "cpu_seconds")] for row in group])
                gap = [row["rounds"][-1]["imagined"] - row["rounds"][-1]["real"] for row in group if "rounds" in row]
                promised = f"{np.mean(gap):.4g} ({min(gap):.4g} to {max(gap):.4g})" if gap else ""
                means = [float(np.mean(row[name])) for row in group]
                told = f"{np.mean(means):.4g} ({min(means):.4g} to {max(means):.4g})"
                lines.append([task, way, f"{steps:,}", len(group), told, promised, f"{cpu:.0f}"])
    columns = ["task", "way", "real steps", "seeds", "real return", "imagined - real at the end", "CPU-s"]
    print(as_text(columns, lines))
    _draw(groups, out)


def _draw(groups: dict[tuple[str, str, int], dict[int, dict[str, Any]]], out: Path) -> None:
    from matplotlib.figure import Figure

    shown = {key: seeds for key, seeds in groups.items() if key[1] == "dream" and key[2] == SAMPLES[key[0]]}
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
    ordered = sorted(shown.items(), key=lambda item: list(SAMPLES).index(item[0][0]))
    for axes, ((task, _, n), seeds) in zip(panels, ordered, strict=False):
        for i, row in enumerate(seeds.values()):
            steps = [told["steps"] for told in row["rounds"]]
            for name, colour, style in (("imagined", "#c2410c", ":"), ("real", "#2563a8", "-")):
                label = f"{name} return" if not i else None
                values = [told[name] for told in row["rounds"]]
                axes.plot(steps, values, style, color=colour, linewidth=1.3, label=label)
        for times, style in ((1, "--"), (MORE, "-")):
            name = "returns" if times == 1 else f"returns_{MORE}n"
            peers = [np.mean(row[name]) for row in groups.get((task, "sb3", n), {}).values() if name in row]
            if peers:
                label = f"SAC in the simulator, {times if times > 1 else ''}N steps"
                axes.axhline(float(np.mean(peers)), color="#1c2430", linestyle=style, linewidth=1, label=label)
        axes.set_title(f"{task}, N = {n:,}", fontsize=9)
        axes.set_xlabel("real steps", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean return of ten episodes", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=100)
