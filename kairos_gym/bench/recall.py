"""Tasks that need memory: what each kind of layer recalls, and the least error that a window could have."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from gymnasium import spaces

from kairos_gym.bench.harness import ROWS, Row, read_rows
from kairos_gym.evaluation.memory_bounds import window_floor
from kairos_gym.evaluation.open_loop import open_loop
from kairos_gym.learning.recipes import RECIPES, TaskData, load_task_data, model_config
from kairos_gym.plots import BLUE, INK, ORANGE, panels
from world_model.episodes import Episodes
from world_model.training.fit import fit

FRAMES = 32  # of a training window
SHOWN = 5  # the frames at an episode's start in which the target is seen
WAIT = 20  # frames between the last sight of the target and the first scored one
HORIZON = 16  # scored frames


def recall(task: str, pattern: str, seed: int = 0, steps: int = 800, out: Path = Path("runs")) -> Row:
    """Train on a task that needs memory: "pendulum" without velocity, or "reacher" with a target seen in 5 frames only.

    Measures the open-loop error of the first; of the second that of the predicted distance to the target, over the
    distance's std, after the target has been out of sight for longer than all windows together reach.
    """
    data, recipe = _load_hidden(task), RECIPES[task]
    train = replace(recipe.train, seed=seed, frames=FRAMES, draft_steps=1000, steps=steps)
    # Whatever the last frame doesn't hold is for the memory to know here, so the draft sees that frame alone.
    config = model_config(recipe, data.spec, pattern=pattern, window=4, dilation=2, taps=2, draft_frames=1)
    assert sum({"S": 4, "D": 4, "G": 0}[kind] for kind in pattern) <= WAIT
    model = fit(config, data.spec, data.train, train, out=out / f"hidden-{task}-{pattern}-{seed}")
    row = {"task": f"hidden {task}", "pattern": pattern, "seed": seed, "updates": steps}
    row["cpu_seconds"] = model.card["fit"]["cpu_seconds"]
    if task == "pendulum":
        return row | {"test": open_loop(model, data.test, data.std).table()}
    result = open_loop(model, data.test, data.std, context=SHOWN + WAIT, horizon=HORIZON, begin=0)
    std = data.train.reward[data.train.index > SHOWN + WAIT].std().item()
    floors = [window_floors(task, frame) for frame in _scored_frames()]
    return row | {
        "reward_error": result.reward_error.square().mean().sqrt().item() / std,
        "by_frame": (result.reward_error.square().mean(0).sqrt() / std).tolist(),
        "window_floor": statistics.mean(theorem for theorem, _ in floors) ** 0.5 / std,
        "exact_floor": statistics.mean(exact for _, exact in floors) ** 0.5 / std,
        "floors_by_frame": [[floor**0.5 / std for floor in pair] for pair in floors],
    }


def window_floors(task: str, frame: int) -> tuple[float, float]:
    """The least mean squared error of the distance at that frame that a window can have -> the theorem's, the exact.

    A window shows where the finger is and nothing of the target, which lies independently of it: so the distance may
    be that to any episode's target.
    """
    data = load_task_data(task)
    first = data.test.starts()
    finger = data.test.obs[first + frame]
    finger = finger[:, 4:6] + finger[:, 8:10]
    targets = data.train.obs[data.train.starts()][:, 4:6]
    return window_floor((finger[:, None] - targets).norm(dim=-1))


def floor(path: Path = ROWS, out: Path = Path("docs/window_floor.svg")) -> None:
    """Draw what ``recall`` measured on "reacher": windows alone, with a gated-delta layer, and the theorem's floor."""
    rows = [row for row in read_rows(path) if "window_floor" in row]
    figure, (axes,) = panels((6.4, 3.0))
    for pattern, colour, name in (("SG", BLUE, "with a gated-delta layer"), ("SD", ORANGE, "windows alone")):
        runs = {row["seed"]: row["by_frame"] for row in rows if row["pattern"] == pattern}
        for i, by_frame in enumerate(runs.values()):
            label = f"{name} ({len(runs)} trainings)" if not i else None
            axes.plot(_scored_frames(), by_frame, color=colour, linewidth=1.4, alpha=0.8, label=label)
    floors = zip(*rows[-1]["floors_by_frame"], strict=True)
    for values, style, name in zip(floors, ("--", ":"), ("theorem", "exact"), strict=True):
        label = f"no window goes below, on average ({name})"
        axes.plot(_scored_frames(), values, color=INK, linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="frame; the target was last seen in frame 4", ylabel="error of the distance / std", ylim=(0, 1.1))
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
    figure.savefig(out, metadata={"Date": None})


def _scored_frames() -> range:
    return range(SHOWN + WAIT, SHOWN + WAIT + HORIZON)


def _load_hidden(task: str) -> TaskData:
    """The task's data without what a model is to remember."""
    data = load_task_data(task)
    box: Any = data.spec.observation_space
    columns = slice(0, 2) if task == "pendulum" else slice(None)
    spec = replace(data.spec, observation_space=spaces.Box(box.low[columns], box.high[columns], dtype=box.dtype))
    train, test = _hide(task, data.train, FRAMES), _hide(task, data.test, SHOWN + WAIT + HORIZON)
    return replace(data, spec=spec, train=train, test=test, std=train.obs.std(0).clamp_min(1e-6))


def _hide(task: str, episodes: Episodes, steps: int) -> Episodes:
    """Hide the pendulum's velocity; or reacher's target after the first frames, in episodes cut to ``steps``."""
    if task == "pendulum":
        return replace(episodes, obs=episodes.obs[:, :2])
    obs = episodes.obs.clone()
    obs[:, 8:] = 0.0  # the finger's distance from the target would give it away
    obs[episodes.index >= SHOWN, 4:6] = 0.0
    # Without the cost of effort, which needs no memory, the reward is minus the distance.
    distance = episodes.reward + episodes.action.square().sum(-1)
    # Only windows from an episode's beginning have ever seen the target.
    return replace(episodes, obs=obs, reward=distance).cut(steps)
