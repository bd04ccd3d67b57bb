"""The figures of the README, each by one command: open-loop errors, memory and the rest, beside what they must beat."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kairos_gym.bench.env import endurance, env
from kairos_gym.bench.gpu import gpu
from kairos_gym.bench.kernels import memory, speed, step, updates
from kairos_gym.bench.learning import gradients, learned, learning
from kairos_gym.bench.lift import lift, lift_speed
from kairos_gym.bench.pessimism import pessimism
from kairos_gym.bench.planners import planners, together
from kairos_gym.bench.trust import trust
from kairos_gym.evaluation.memory_bounds import window_floor
from kairos_gym.evaluation.open_loop import open_loop
from kairos_gym.learning.recipes import RECIPES, TaskData, load_task_data, measure_errors, model_config
from world_model.dynamics.baselines import fit_ensemble
from world_model.episodes import Episodes
from world_model.training.fit import fit

Form = Literal["kairos", "plain", "pets"]
CPU_SECONDS = 100.0  # the budget of every training here, collection left out
FRAMES = 32  # of a training window in ``recall``
WAIT = 20  # frames between the last sight of the hidden target and the first scored one


def models(task: str, form: Form, seed: int = 0, out: Path = Path("runs")) -> dict[str, Any]:
    """Train one form of model on one task and measure its open-loop error on the test episodes.

    "kairos" is the shipped recipe, "plain" the same transformer without the draft, "pets" the probabilistic ensemble.
    """
    have, recipe = load_task_data(task), RECIPES[task]
    if form == "pets":
        model: Any = fit_ensemble(have.spec, have.train, cpu_seconds=CPU_SECONDS, seed=seed)
        updates, cpu = model.card["updates"], CPU_SECONDS
    else:
        train = replace(recipe.train, seed=seed)
        if form == "plain":  # nearly all of the time goes to the transformer; 500 updates teach it rewards
            train = replace(train, draft_steps=500, steps=10_000)
        shape = model_config(recipe, have.spec, draft=form == "kairos")
        model = fit(shape, have.spec, have.train, train, out=out / f"{task}-{form}-{seed}")
        updates, cpu = train.draft_steps + train.steps, model.card["fit"]["cpu_seconds"]
    row = {"task": task, "form": form, "seed": seed, "cpu_seconds": cpu, "updates": updates}
    return row | {"test": measure_errors(model, have, have.test)}


def recall(task: str, pattern: str, seed: int = 0, steps: int = 800, out: Path = Path("runs")) -> dict[str, Any]:
    """Train on a task that needs memory: "pendulum" without velocity, or "reacher" with a target seen in 5 frames only.

    Measures the open-loop error of the first; of the second that of the predicted distance to the target, over the
    distance's std, after the target has been out of sight for longer than all windows together reach.
    """
    have, recipe = _hidden(task), RECIPES[task]
    train = replace(recipe.train, seed=seed, frames=FRAMES, draft_steps=1000, steps=steps)
    # What the last frame doesn't hold is the memory's business here, so the draft sees that frame alone.
    shape = model_config(recipe, have.spec, pattern=pattern, window=4, dilation=2, taps=2, draft_frames=1)
    assert sum({"S": 4, "D": 4, "G": 0}[kind] for kind in pattern) <= WAIT
    model = fit(shape, have.spec, have.train, train, out=out / f"hidden-{task}-{pattern}-{seed}")
    row = {"task": f"hidden {task}", "pattern": pattern, "seed": seed, "updates": steps}
    row["cpu_seconds"] = model.card["fit"]["cpu_seconds"]
    if task == "pendulum":
        return row | {"test": open_loop(model, have.test, have.std).table()}
    result = open_loop(model, have.test, have.std, context=5 + WAIT, horizon=16, begin=0)
    std = have.train.reward[have.train.index > 5 + WAIT].std().item()
    by_frame = [floors(task, frame) for frame in range(5 + WAIT, 5 + WAIT + 16)]
    return row | {
        "reward_error": result.reward_error.square().mean().sqrt().item() / std,
        "by_frame": (result.reward_error.square().mean(0).sqrt() / std).tolist(),
        "window_floor": statistics.mean(theorem for theorem, _ in by_frame) ** 0.5 / std,
        "exact_floor": statistics.mean(exact for _, exact in by_frame) ** 0.5 / std,
        "floors_by_frame": [[floor**0.5 / std for floor in pair] for pair in by_frame],
    }


def floors(task: str, frame: int) -> tuple[float, float]:
    """The mean squared error of the distance at that frame below which no window can go -> the theorem's, the exact.

    A window shows where the finger is, and nothing of the target, whose place has nothing to do with it: so the
    distance may be that to any episode's target.
    """
    have = load_task_data(task)
    first = have.test.starts()
    finger = have.test.obs[first + frame]
    finger = finger[:, 4:6] + finger[:, 8:10]
    targets = have.train.obs[have.train.starts()][:, 4:6]
    return window_floor((finger[:, None] - targets).norm(dim=-1))


def floor(path: Path = Path("reports/bench.jsonl"), out: Path = Path("docs/window_floor.svg")) -> None:
    """Draw what ``recall`` measured on "reacher": windows alone, with a gated-delta layer, and the theorem's floor."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "window_floor" in row]
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    frames = range(5 + WAIT, 5 + WAIT + 16)
    for pattern, colour, name in (("SG", "#2563a8", "with a gated-delta layer"), ("SD", "#c2410c", "windows alone")):
        runs = {row["seed"]: row["by_frame"] for row in rows if row["pattern"] == pattern}
        for i, by_frame in enumerate(runs.values()):
            label = f"{name} ({len(runs)} trainings)" if not i else None
            axes.plot(frames, by_frame, color=colour, linewidth=1.4, alpha=0.8, label=label)
    for values, style, name in zip(
        zip(*rows[-1]["floors_by_frame"], strict=True), ("--", ":"), ("theorem", "exact"), strict=True
    ):
        label = f"no window goes below, on average ({name})"
        axes.plot(frames, values, color="#1c2430", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="frame; the target was last seen in frame 4", ylabel="error of the distance / std", ylim=(0, 1.1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
    figure.savefig(out, metadata={"Date": None})


def _hidden(task: str) -> TaskData:
    """The task's data with what an observer would have to remember left out."""
    from gymnasium import spaces

    have = load_task_data(task)
    box: Any = have.spec.observation_space

    def hide(episodes: Episodes, steps: int) -> Episodes:
        if task == "pendulum":
            return replace(episodes, obs=episodes.obs[:, :2])
        obs = episodes.obs.clone()
        obs[:, 8:] = 0.0  # the finger's distance from the target would give it away
        obs[episodes.index >= 5, 4:6] = 0.0
        # Without the cost of effort, which needs no memory, the reward is minus the distance.
        distance = episodes.reward + episodes.action.square().sum(-1)
        # Only windows from an episode's beginning have ever seen the target.
        return replace(episodes, obs=obs, reward=distance).cut(steps)

    kept = slice(0, 2) if task == "pendulum" else slice(None)
    spec = replace(have.spec, observation_space=spaces.Box(box.low[kept], box.high[kept], dtype=box.dtype))
    train, test = hide(have.train, FRAMES), hide(have.test, 5 + WAIT + 16)
    return replace(have, spec=spec, train=train, test=test, std=train.obs.std(0).clamp_min(1e-6))


def keep(row: dict[str, Any], path: Path = Path("reports/bench.jsonl")) -> None:
    """Print a row and add it to the file that ``table`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


def table(path: Path = Path("reports/bench.jsonl")) -> None:
    """Print what has been measured so far as the README's tables: means over seeds."""
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    lifts: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in map(json.loads, path.read_text().splitlines()):  # of a seed that was run twice the last counts
        form = row.get("form") or row.get("pattern")
        if row.get("bench") == "lift":
            lifts[row["who"], row["reward"], row["seed"], row["episodes"]] = row
        if form is None:  # a bench of its own, which says all it has to say where it is run
            continue
        groups.setdefault((row["task"], form), {})[row.get("seed", 0)] = row
    for (task, form), seeds in sorted(groups.items()):
        group = list(seeds.values())
        cells = [task, form, f"{len(group)} seeds"]
        if "test" in group[0]:
            for part in ("all", "uniform", "held"):
                tables = [row["test"].get(part, row["test"]) for row in group]
                cells += [
                    " ".join(
                        f"{h} {_mean(t[h]['rms'] for t in tables)} ({_mean(t[h]['median'] for t in tables)})"
                        for h in tables[0]
                    )
                ]
                if part not in group[0]["test"]:
                    break
        elif "reward_error" in group[0]:
            cells.append(" ".join(f"{row['reward_error']:.3f}" for row in group))
            if "window_floor" in group[0]:
                cells.append("no window below {window_floor:.3f} (exact {exact_floor:.3f})".format(**group[0]))
        if "cpu_seconds" in group[0]:
            cells.append(f"{_mean(row['cpu_seconds'] for row in group)} CPU-s")
        print("| " + " | ".join(cells) + " |")
    for (who, reward, *_), row in lifts.items():
        lifted, interval = "{lifted} of {episodes}".format(**row), "{:.0%} to {:.0%}".format(*row["wilson_95"])
        took = f"{row['median_steps_of_the_lifted'] or '-'} steps, {row['cpu_seconds_thinking']:.2g} CPU-s"
        print(f"| lift | {who} | {reward or '-'} | {row['data'] or '-'} | {lifted} | {interval} | {took} |")


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.mean(values):.3g}"


COMMANDS = {
    f.__name__: f
    for f in (
        models,
        recall,
        floor,
        planners,
        together,
        pessimism,
        learning,
        learned,
        gradients,
        env,
        endurance,
        trust,
        lift,
        lift_speed,
        memory,
        step,
        speed,
        updates,
        gpu,
        table,
    )
}
