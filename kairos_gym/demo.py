"""The demo: plan inside a dream, act in the real simulator, and see how it compares with planning on the truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kairos_gym.evaluation.control import PlayedEpisodes, evaluate_planner, play_episodes, play_random
from kairos_gym.models import load
from kairos_gym.plots import BLUE, GREY, INK, OCHRE, ORANGE, PALE, panels
from kairos_gym.report import Cell, Report, as_text
from planners import CEM
from world_model.contract import Dynamics

COLOURS = {"in the dream": BLUE, "in the simulator": INK, "no actions": OCHRE, "at random": GREY}
# Small, to take 90 seconds on two slow cores. Reacher charges for effort, so there the search starts with gentle
# actions: 0.12 was chosen on the true simulator, on other starts; horizon and chunk were compared on the demo's own,
# too.
PLANNER = CEM(horizon=5, chunk=4, candidates=64, elites=8, iterations=3)
GENTLE = replace(PLANNER, std=0.12)
OPEN_LOOP = 32  # random episodes that are dreamed open loop
CONTEXT = 5  # real frames that the dream sees first
Runs = dict[str, PlayedEpisodes]  # by how the actions were chosen


def demo(
    model: str | Path = "reacher", *, episodes: int = 8, seed: int = 1000, out: str | Path = "reports/demo.html"
) -> Path:
    """Play the model's task four ways from the same starts, write a report page and print its table -> the page's path.

    Planned in the dream, planned with the same planner on the true simulator, without any action, and at random:
    ``episodes`` each, from seeds ``seed``, ``seed + 1``, ... Then random episodes are dreamed with the actions that
    were really played. Raises FileNotFoundError for an unknown model, ValueError for one whose card names no simulator.
    """
    world = load(model)
    if not world.card.get("env"):
        raise ValueError(f"the card of model {str(model)!r} names no simulator ('env') to act in")
    command = f"kairos demo --model {model} --episodes {episodes} --seed {seed}"
    return show(world, str(world.card["env"]), command=command, episodes=episodes, seed=seed, out=out)


def show(world: Dynamics, env_id: str, *, command: str, episodes: int, seed: int, out: str | Path) -> Path:
    """The demo with any dynamics in the place of the shipped model -> the page's path."""
    if env_id.startswith("robosuite/"):
        raise ValueError(
            "the demo also plans on the true simulator, which takes hours with robosuite: see `kairos bench lift`"
        )
    planner = GENTLE if env_id == "Reacher-v5" else PLANNER
    runs, random = _play(world, env_id, planner, episodes, seed)
    page = Report(f"Planning inside a dream of {env_id}", command)
    columns, rows = _table(runs)
    _add_returns(page, columns, rows, planner, runs)
    if env_id == "Reacher-v5":
        _add_arms(page, runs["in the dream"])
    _add_open_loop(page, world, random, env_id)
    path = page.write(out)
    print(f"\n{as_text(columns, rows)}\n\nThe report: {path}")
    return path


def _play(world: Dynamics, env_id: str, planner: CEM, episodes: int, seed: int) -> tuple[Runs, PlayedEpisodes]:
    """Play the task four ways -> the runs, and all random episodes: OPEN_LOOP, or ``episodes`` if that is more."""
    from envs import SimulatorDynamics

    print(f"Planning in the dream, acting in {env_id}: {episodes} episodes.")
    dream = evaluate_planner(env_id, world, planner, episodes=episodes, seed=seed)
    print("The same planner on the true simulator, from the same starts.")
    truth = evaluate_planner(env_id, SimulatorDynamics(env_id), planner, episodes=episodes, seed=seed)
    zeros = np.zeros((episodes, *world.spec.action_box.shape))
    still = play_episodes(env_id, lambda obs, inner_obs: zeros, episodes=episodes, seed=seed)
    random = play_random(env_id, episodes=max(episodes, OPEN_LOOP), seed=seed)
    return dict(zip(COLOURS, (dream, truth, still, random.first(episodes)), strict=True)), random


def _table(runs: Runs) -> tuple[list[str], list[list[Cell]]]:
    rows: list[list[Cell]] = []
    for name, run in runs.items():
        returns = (
            f"{run.returns.mean():.2f}",
            "{:.2f} to {:.2f}".format(*run.interval()),
            f"{np.median(run.returns):.2f}",
        )
        rows.append([name, *returns, f"{run.ms_per_decision:.1f}" if name.startswith("in the") else "-"])
    return ["actions chosen", "mean return", "95% interval", "median", "ms a decision"], rows


def _add_returns(page: Report, columns: list[str], rows: list[list[Cell]], planner: CEM, runs: Runs) -> None:
    episodes = len(runs["in the dream"].returns)
    page.text(
        f"A planner that sees only the world model's dream chooses actions, and the real simulator plays them. Beside "
        f"it, from the same {episodes} starts: the same planner on the true simulator, no actions at all, and random "
        "actions. Where a task charges for effort, as Reacher does, doing nothing is the baseline to beat."
    )
    page.table(columns, rows)
    page.text(
        f"The planner is the cross-entropy method: {planner.candidates} candidates, {planner.iterations} iterations, "
        f"{planner.horizon * planner.chunk} steps ahead, {planner.chunk} steps played before it plans again. It is "
        "small, so that this page is quick to make. Milliseconds are wall time for one episode's decision, with all "
        "episodes planned side by side."
    )
    page.figure(
        draw_returns(runs),
        "Return of each episode. Thin lines join episodes with the same start; diamonds are means with their 95% "
        "interval.",
    )


def _add_arms(page: Report, run: PlayedEpisodes) -> None:
    page.heading("What the arm did")
    page.figure(
        draw_arms(run),
        "Real episodes planned in the dream: the arm at the start (light) and at the end (dark), the fingertip's "
        "path, and the target (cross). In metres.",
    )


def _add_open_loop(page: Report, world: Dynamics, episodes: PlayedEpisodes, env_id: str) -> None:
    real, dreamed = dream_along(world, episodes)
    page.heading("How far the dream can be trusted")
    page.text(
        f"Open loop: the model sees {CONTEXT} real frames of a random episode, then dreams the rest with the actions "
        f"that were really played, and never sees another frame. {len(real)} episodes."
    )
    page.figure(
        draw_error(real, dreamed),
        "Error by horizon, normalised by each dimension's standard deviation: 0 is perfect, 1 is no better than "
        "always predicting the mean.",
    )
    page.figure(
        draw_dreams(real, dreamed, env_id), "Four of these episodes, dreamed (blue) and simulated (black, dashed)."
    )


@torch.no_grad()
def dream_along(world: Dynamics, episodes: PlayedEpisodes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Dream the rest of the episodes, after CONTEXT frames, with their actions -> real and dreamed obs [E,h,O]."""
    frames = min(map(len, episodes.observations))
    obs = torch.tensor(np.stack([o[:frames] for o in episodes.observations]), dtype=torch.float32)
    actions = torch.tensor(np.stack([a[: frames - 1] for a in episodes.actions]), dtype=torch.float32)
    led = torch.cat([torch.zeros_like(actions[:, :1]), actions], dim=1)  # [E,T,A], the action that led to each frame
    state = world.observe(world.initial(len(obs)), obs[:, :CONTEXT], led[:, :CONTEXT])
    dreamed = []
    for action in led[:, CONTEXT:].split(1, dim=1):
        state, imagined = world.imagine(state, action)
        assert imagined.obs is not None
        dreamed.append(imagined.obs)
    return obs[:, CONTEXT:].numpy(), torch.cat(dreamed, dim=1).cpu().numpy()


def draw_returns(runs: Runs) -> Figure:
    """The return of every episode, a row for each way to choose actions."""
    figure, (axes,) = panels((6.4, 3.4))
    values = np.stack([run.returns for run in runs.values()])
    axes.plot(values, range(len(runs)), color=PALE, linewidth=0.8, zorder=1)
    for row, (name, run) in enumerate(runs.items()):
        mean, colour, above = run.returns.mean(), COLOURS[name], row - 0.22
        dots = np.full(len(run.returns), row)
        axes.plot(run.returns, dots, "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
        axes.plot(run.interval(), [above] * 2, color=colour, linewidth=2)
        axes.plot([mean], [above], "D", color=colour, markersize=6)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set_ylim(len(runs) - 0.6, -0.6)
    axes.set_xlabel("return (more is better)")
    return figure


def draw_error(real: NDArray[Any], dreamed: NDArray[Any]) -> Figure:
    """The error over the steps dreamed, of real and dreamed observations [E,h,O]."""
    std = real.std(axis=(0, 1))
    error = np.sqrt((((dreamed - real) / np.where(std > 1e-6, std, 1)) ** 2).mean(axis=2))  # [E,h]
    low, high = np.percentile(error, [10, 90], axis=0)
    figure, (axes,) = panels((6.4, 2.9))
    steps = np.arange(1, error.shape[1] + 1)
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.14, linewidth=0, label="10 to 90% of episodes")
    axes.plot(steps, np.sqrt((error**2).mean(axis=0)), color=BLUE, linewidth=1.2, linestyle="--", label="RMS")
    axes.plot(steps, np.median(error, axis=0), color=BLUE, linewidth=2, label="median")
    axes.set(xlabel="steps dreamed without looking", ylabel="normalised error", xlim=(1, len(steps)), ylim=(0, None))
    axes.legend(frameon=False, loc="upper left", fontsize=8.5)
    return figure


def draw_dreams(real: NDArray[Any], dreamed: NDArray[Any], env_id: str) -> Figure:
    """Four episodes: for Reacher the fingertip's path, for other tasks the first dimensions over time."""
    figure, row = panels((6.4, 1.9), 4)
    for axes, truth, dream in zip(row, real, dreamed, strict=False):
        if env_id == "Reacher-v5":
            _show_plane(axes)
            axes.plot(*_tip(dream).T, color=BLUE, linewidth=2, alpha=0.85)
            axes.plot(*_tip(truth).T, color=INK, linewidth=1, linestyle=(0, (4, 2)))
            axes.plot(*_tip(truth)[0], "o", color=INK, markersize=4)
        else:
            axes.plot(dream[:, :3], color=BLUE, linewidth=2, alpha=0.85)
            axes.plot(truth[:, :3], color=INK, linewidth=1, linestyle=(0, (4, 2)))
            axes.set_xlabel("steps")
    return figure


def draw_arms(run: PlayedEpisodes) -> Figure:
    """Reacher's arm in four episodes, at the start and at the end."""
    figure, row = panels((6.4, 1.9), 4)
    for axes in row:
        _show_plane(axes)
    for axes, obs in zip(row, run.observations, strict=False):
        for frame, colour in ((obs[0], PALE), (obs[-1], INK)):
            joints = np.stack([np.zeros(2), _elbow(frame), _tip(frame)])
            axes.plot(*joints.T, "-o", color=colour, linewidth=3, markersize=4, solid_capstyle="round")
        axes.plot(*_tip(obs).T, color=BLUE, linewidth=1.4)
        axes.plot(*obs[0, 4:6], "x", color=ORANGE, markersize=8, markeredgewidth=2, zorder=5)
    return figure


def _show_plane(axes: Axes) -> None:
    """Show all of Reacher's plane, without scales."""
    axes.set(aspect="equal", xlim=(-0.24, 0.24), ylim=(-0.24, 0.24), xticks=[], yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_facecolor("#f5f7fa")


def _elbow(obs: NDArray[Any]) -> NDArray[Any]:
    """Reacher's elbow from observations [...,10] -> [...,2], in metres; the first link is 0.1 m long."""
    return 0.1 * obs[..., [0, 2]] / np.hypot(obs[..., [0]], obs[..., [2]])


def _tip(obs: NDArray[Any]) -> NDArray[Any]:
    """Reacher's fingertip from observations [...,10] -> [...,2], in metres; the second link is 0.11 m long."""
    angle = np.arctan2(obs[..., 2], obs[..., 0]) + np.arctan2(obs[..., 3], obs[..., 1])
    return _elbow(obs) + 0.11 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
