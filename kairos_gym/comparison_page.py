"""The comparison as a page: what was measured in words, tables and figures, in one file that needs no network."""

from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from kairos_gym.compare import MODEL, SHOWN, SHUFFLED, Comparison, off
from kairos_gym.report import Cell, Report
from kairos_gym.rollouts import Result
from world_model.vectors import unflatten

COLOURS = {
    MODEL: "#2563a8",
    SHUFFLED: "#9d6bb8",
    "nothing moves": "#a3adba",
    "linear": "#b98a1e",
    "PETS ensemble": "#c2410c",
}
INK, PALE = "#1c2430", "#b9c2ce"
SIZE = 200  # pixels of a drawn frame's longer side


def write(comparison: Comparison, folder: str | Path, command: str) -> Path:
    """Write the page (index.html), its figures as SVG, comparison.json and TensorBoard logs into ``folder``.

    command: what makes the report again; it stands at the page's foot. Returns the page's absolute path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = comparison.numbers()
    (folder / "comparison.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    comparison.log(folder / "logs")
    for draw in (draw_error, draw_dimensions, draw_drift, draw_returns):
        draw(comparison).savefig(folder / f"{draw.__name__.removeprefix('draw_')}.svg", metadata={"Date": None})
    return page(comparison, numbers, command).write(folder / "index.html")


def page(comparison: Comparison, numbers: dict[str, Any], command: str) -> Report:
    """numbers: those of ``comparison``."""
    settings, env_id = numbers["settings"], numbers["env"]
    report = Report(f"Imagined against simulated: {numbers['model']} in {env_id}", command)
    for sentence in in_short(numbers):
        report.text(sentence)
    _looks(report, comparison)

    report.heading("Error by horizon")
    report.text(
        f"Open loop: of each of {settings['windows']} stretches, one from each episode that "
        f"{len(numbers['policies'])} policies played in the simulator, the model sees up to {settings['context']} "
        "frames, then dreams on with the actions that were really played, and never sees another frame. Errors are the "
        "RMS over the dimensions of the observation, each over its standard deviation in the training data: 0 is "
        "perfect, 1 no better than always saying the mean."
    )
    report.figure(
        draw_error(comparison),
        "The median stretch; for the model also the 10 to 90% of the stretches (shaded). Black: the simulator against "
        "itself, started a little off in every coordinate. On a chaotic task no model can stay below such a line for "
        "long.",
    )
    hs = [str(h) for h in comparison.horizons]
    report.table(
        ["RMS (median) after", *[_steps(h) for h in hs], "steps within 0.1", "within 0.3"],
        [
            [name, *[_both(by[h]) for h in hs], *numbers["steps_within"][name].values()]
            for name, by in numbers["error_by_horizon"].items()
            if not name.startswith("simulator") or name in map(off, SHOWN)
        ],
    )
    if any(x is not None for x in numbers["equivalent_perturbation"].values()):
        report.text(
            "The model's equivalent perturbation, the start off by which the simulator is as wrong in the median: "
            + ", ".join(f"{_number(numbers['equivalent_perturbation'][h])} std after {_steps(h)}" for h in hs)
            + "."
        )

    report.heading("For which policies")
    report.table(
        ["policy: RMS (median) after", *[_steps(h) for h in hs], "stretches"],
        [[name, *[_both(by[h]) for h in hs], by[hs[0]]["n"]] for name, by in numbers["error_by_policy"].items()],
    )
    report.heading("Where it lies")
    report.figure(
        draw_dimensions(comparison),
        f"RMS error of each dimension after {' and '.join(_steps(str(h)) for h in _two(comparison))}.",
    )
    report.figure(
        draw_drift(comparison),
        "Drift of the distribution: 1-Wasserstein distance between dreamed and simulated states at each step, over "
        "each dimension's standard deviation, mean over dimensions.",
    )

    report.heading("Imagined against simulated returns")
    report.text(
        f"Closed loop: every policy plays the same {settings['episodes']} starts for up to {settings['time_limit']} "
        "steps, in the simulator and in the dream, with the same dice. The dream sees the first frame alone, and the "
        "policy acts on what is dreamed."
    )
    report.figure(
        draw_returns(comparison),
        "Mean return of each policy, with the 95% interval over starts; numbers as in the table. On the line the dream "
        "pays what the simulator pays.",
    )
    report.table(
        ["policy", "simulated", "imagined", "steps simulated", "imagined"],
        [
            [
                f"{i}. {name}",
                by["simulated"]["return"],
                by[MODEL]["return"],
                by["simulated"]["steps"],
                by[MODEL]["steps"],
            ]
            for i, (name, by) in enumerate(numbers["policies"].items(), 1)
        ],
    )
    report.table(
        ["returns in", "Pearson", "Spearman", "regret", "chooses"],
        [
            [
                name,
                _correlation(told["pearson"]),
                _correlation(told["spearman"]),
                _interval(told["regret"]),
                told["chosen"],
            ]
            for name, told in numbers["agreement"].items()
        ],
    )
    report.text(
        "In brackets 95% intervals, by the bootstrap over policies and starts. Regret is what choosing the policy by "
        "its imagined return costs: the best policy's simulated return less the chosen one's."
    )
    both = ("simulated", MODEL)
    success = [by["simulated"].get("success") for by in numbers["policies"].values()]
    if any(s is not None for s in success):
        report.table(
            ["policy", "success simulated", "imagined", "median steps to it simulated", "imagined"],
            [
                [name, *[_number(by[who].get(what)) for what in ("success", "steps_to_success") for who in both]]
                for name, by in numbers["policies"].items()
            ],
        )  # fmt: skip

    report.heading("Rewards and ends")
    report.table(
        ["reward error (RMS over its std) after", *[_steps(h) for h in hs]],
        [
            [name, *[_number(by[h]) for h in hs]]
            for name, by in numbers["reward_error"].items()
            if not name.startswith("simulator") or name in map(off, SHOWN)
        ],
    )
    ends = numbers["ends"]
    if ends["both"] + ends["only_simulated"] + ends["only_dreamed"]:
        apart = "" if ends["steps_apart"] is None else f", in the median {_number(ends['steps_apart'])} steps apart"
        report.text(
            f"Of the {settings['windows']} stretches {ends['both'] + ends['only_simulated']} end in the simulator; the "
            f"dream ends in {ends['both']} of these{apart}, and in {ends['only_dreamed']} of the others."
        )
    else:
        report.text("No stretch ended, neither in the simulator nor in the dream.")

    _believes(report, comparison, numbers)
    if comparison.memory:
        report.heading("What its memory makes of the error")
        report.text(
            "A gated-delta layer shrinks any difference between two memories by rho a step at least. So the memory "
            "written from dreamed frames stays within e_t <= rho_t e_(t-1) + xi_t of the one written from real frames, "
            "where xi is what one dreamed frame does to the real memory. This bounds the memory, not the decoded "
            "drift: xi grows with what was dreamed amiss."
        )
        report.figure(
            draw_memory(comparison),
            "Median over the stretches: measured (solid), bound with each step's own rho and xi (dashed), closed form "
            "with the largest (dotted); Frobenius norms over the real memory's own.",
        )
        report.table(
            ["layer, head", "remembers", "measured over bound", "violations"],
            [
                [f"{layer}, {head}", f"{_number(steps)} steps", _number(tight), row["violations"]]
                for layer, row in numbers["memory"].items()
                for head, (steps, tight) in enumerate(zip(row["steps_remembered"], row["tightness"], strict=True))
            ],
        )

    report.heading("Speed and memory")
    speed = numbers["speed"]
    report.table(
        ["", "steps a CPU-second", "over the simulator"],
        [
            ["simulator", f"{speed['simulator']:,.0f}", "1"],
            *[
                [
                    "1 dream" if n == "1" else f"{int(n):,} dreams side by side",
                    f"{rate:,.0f}",
                    f"{rate / speed['simulator']:.2g}",
                ]
                for n, rate in speed["dream"].items()
            ],
        ],
    )
    told = ", ".join(f"{size:,} bytes after {_steps(t)}" for t, size in numbers["state_bytes"].items())
    report.text(f"What one dream remembers: {told}.")
    report.heading("What was compared")
    fitted = settings["references_fitted_on"]
    sources = (
        "No references were fitted."
        if fitted is None
        else f"References were fitted on {fitted}, the model's own training data; none of the evaluation is in it."
    )
    report.text(
        f"Starts of seeds {settings['seeds'][0]} to {settings['seeds'][1]}, of which "
        f"{settings['starts_refused_as_solved']} were refused since they began solved. {sources} The model dreams "
        f"{_steps(str(settings['chunk']))} at a time. comparison.json beside this page has every number, logs/ the "
        "TensorBoard scalars."
    )
    return report


def _believes(report: Report, comparison: Comparison, numbers: dict[str, Any]) -> None:
    report.heading("How well it knows its own error")
    told = numbers["trust"]
    if told is None:
        report.text("This model was not calibrated (kairos calibrate), so it gives no bound on its error.")
        return
    report.text(
        "The bound of 90% that DreamEnv(confidence=0.9) tells at each step, calibrated on other held-out episodes: how "
        "often the error stayed below it, and in brackets its median. It is promised for dreams like those that it was "
        "calibrated on, over all of them, not for each policy."
    )
    hs = list(told["all"])
    report.table(
        ["coverage (median bound) after", *[_steps(h[1:]) for h in hs]],
        [
            [name, *[f"{100 * by[h]['coverage']:.0f}% ({_number(by[h]['median'])})" if h in by else "-" for h in hs]]
            for name, by in told.items()
        ],
    )
    report.figure(
        draw_trust(comparison),
        "Error of each stretch (dots) and its bound, after the longest horizon: below the line the bound held.",
    )


def draw_trust(comparison: Comparison) -> Figure:
    trust, dreams = comparison.trust, comparison.doubted
    assert trust is not None
    h = min(comparison.windows.horizon, trust.horizon)
    error, bound = dreams.error[:, h - 1], dreams.bound(trust, 0.9)[:, h - 1]
    good = error.isfinite() & bound.isfinite()
    y, x = (part[good].clamp_min(1e-6).numpy() for part in (error, bound))
    figure, axes = _axes((6.4, 3.8))
    held = y <= x
    axes.scatter(x[held], y[held], s=9, color=COLOURS[MODEL], linewidth=0, alpha=0.7)
    axes.scatter(x[~held], y[~held], s=12, color="#c2410c", linewidth=0)
    ends = [min(y.min(), x.min()), max(y.max(), x.max())] if len(y) else [1e-3, 1]
    axes.plot(ends, ends, color=PALE, linewidth=1, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel=f"bound after {_steps(str(h))}", ylabel="error")
    return figure


def draw_memory(comparison: Comparison) -> Figure:
    figure, axes = _axes((6.4, 2.8))
    colours = ["#2563a8", "#c2410c", "#4d8b57", "#9d6bb8"]
    heads = [(layer, drift, h) for layer, drift in comparison.memory.items() for h in range(drift.error.shape[1])]
    for i, (layer, drift, h) in enumerate(heads):
        for values, style in ((drift.error, "-"), (drift.running, "--"), (drift.closed, ":")):
            median = (values / drift.size)[:, h].median(0).values.numpy()
            axes.plot(
                median,
                color=colours[i % 4],
                linestyle=style,
                linewidth=1.6 if style == "-" else 1.1,
                label=f"layer {layer}, head {h}" if style == "-" else None,
            )
    axes.set(yscale="log", xlabel="steps dreamed without looking", ylabel="memory error", xlim=(1, None))
    axes.legend(frameon=False, fontsize=8)
    return figure


def in_short(numbers: dict[str, Any]) -> list[str]:
    """The findings in sentences."""
    within, errors, told = numbers["steps_within"], numbers["error_by_horizon"], numbers["agreement"][MODEL]
    longest = numbers["settings"]["horizon"]
    others = [name for name in ("linear", "PETS ensemble") if name in within]
    beside = "".join(f"; {name} {within[name]['0.1']} and {within[name]['0.3']}" for name in others)
    yes = [
        f"How long: the median dream stays within 0.1 standard deviations for {within[MODEL]['0.1']} steps and within "
        f"0.3 for {within[MODEL]['0.3']}, of {longest} dreamed{beside}."
    ]
    h = str(min(8, longest))
    mine, shuffled = errors[MODEL][h]["median"], errors[SHUFFLED][h]["median"]
    if mine is not None and shuffled is not None:
        ratio = shuffled / max(mine, 1e-9)
        verdict = "The dream follows the actions" if ratio > 2 else "The dream hardly listens to the actions: be warned"
        yes.append(
            f"{verdict}: with other stretches' actions its median error after {_steps(h)} is {_times(ratio)} times as "
            "large."
        )
    by = {name: row[h]["median"] for name, row in numbers["error_by_policy"].items() if row[h]["median"] is not None}
    if by:
        worst, best = max(by, key=by.__getitem__), min(by, key=by.__getitem__)
        yes.append(
            f"For which policies: after {_steps(h)} it is best on “{best}” ({by[best]:.2g}) and worst on “{worst}” "
            f"({by[worst]:.2g})."
        )
    yes.append(
        f"Which policy is better: over {len(numbers['policies'])} policies, imagined and simulated returns have a "
        f"Spearman correlation of {_correlation(told['spearman'])} and a Pearson correlation of "
        f"{_correlation(told['pearson'])}. The policy it would choose is “{told['chosen']}”, the best is "
        f"“{told['best']}”: regret {_number(told['regret'][0])}."
    )
    if numbers["trust"] is not None:
        told = numbers["trust"]["all"]
        held = ", ".join(f"{100 * by['coverage']:.0f}% after {_steps(h[1:])}" for h, by in told.items())
        yes.append(f"It knows its own error: the bound of 90% held in {held}.")
    lost = sum(row[MODEL]["lost"] for row in numbers["policies"].values())
    if lost:
        yes.append(f"{lost} dreams turned non-finite.")
    return yes


def draw_error(comparison: Comparison) -> Figure:
    figure, axes = _axes((6.4, 3.6))
    steps = np.arange(1, comparison.windows.horizon + 1)
    for name, error in comparison.errors.items():
        if name.startswith("simulator") and name not in map(off, SHOWN):
            continue
        per = error.obs_error.square().mean(-1).sqrt().numpy()  # [W,h]
        median = np.nanmedian(np.where(np.isfinite(per) | np.isnan(per), per, 1e9), 0)
        if name == MODEL:
            low, high = np.nanpercentile(np.where(np.isinf(per), 1e9, per), [10, 90], axis=0)
            axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.14, linewidth=0)
        chaos = name.startswith("simulator")
        axes.plot(
            steps,
            np.maximum(median, 1e-12),
            color=INK if chaos else COLOURS[name],
            linewidth=2.2 if name == MODEL else 1.2,
            linestyle={off(SHOWN[0]): ":", off(SHOWN[-1]): "--"}.get(name, "-"),
            label=name,
            zorder=3 if name == MODEL else 2,
        )
    smallest = min(line.get_ydata().min() for line in axes.lines)  # type: ignore[union-attr]
    axes.set(yscale="log", ylim=(max(smallest / 2, 1e-6), 10), xlim=(1, steps[-1]))
    axes.set(xlabel="steps dreamed without looking", ylabel="normalised error")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    return figure


def draw_dimensions(comparison: Comparison) -> Figure:
    errors = comparison.errors[MODEL].obs_error
    figure, axes = _axes((6.4, 0.9 + 0.17 * errors.shape[-1]))
    for i, h in enumerate(_two(comparison)):
        rms = errors[:, h - 1].square().nanmean(0).sqrt().clamp_max(1e3).numpy()
        at = np.arange(len(rms)) + (i - 0.5) * 0.36
        axes.barh(at, rms, 0.34, color=(COLOURS[MODEL], "#9bbbe0")[i], label=f"after {_steps(str(h))}")
    axes.set_yticks(range(errors.shape[-1]))
    axes.set_ylabel("dimension")
    axes.invert_yaxis()
    axes.set_xlabel("RMS error over the dimension's std")
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def draw_drift(comparison: Comparison) -> Figure:
    figure, axes = _axes((6.4, 2.4))
    drift = comparison.drift(comparison.dreamed).mean(-1).clamp_max(1e3).numpy()
    axes.plot(np.arange(1, len(drift) + 1), drift, color=COLOURS[MODEL], linewidth=2)
    axes.set(xlabel="steps dreamed without looking", ylabel="distance (std)", xlim=(1, len(drift)), ylim=(0, None))
    return figure


def draw_returns(comparison: Comparison) -> Figure:
    figure, axes = _axes((6.4, 4.4))
    x, y = (_means(r) for r in (comparison.rollouts.result, comparison.results[MODEL]))
    low, high = (f(np.concatenate([x[:, 0], y[:, 0]])) for f in (min, max))
    room = 0.08 * (high - low) + 1e-9
    axes.plot([low - room, high + room], [low - room, high + room], color=PALE, linewidth=1, zorder=1)
    axes.errorbar(
        x[:, 0],
        y[:, 0],
        xerr=np.abs(x[:, 1:] - x[:, :1]).T,
        yerr=np.abs(y[:, 1:] - y[:, :1]).T,
        fmt="o",
        color=COLOURS[MODEL],
        ecolor="#9bbbe0",
        markersize=5,
        linewidth=1.2,
    )
    for i, (a, b) in enumerate(zip(x[:, 0], y[:, 0], strict=True), 1):
        axes.annotate(str(i), (a, b), xytext=(5, 4), textcoords="offset points", fontsize=8.5, color=INK)
    axes.set(xlabel="simulated return", ylabel="imagined return")
    return figure


def _means(result: Result) -> NDArray[np.float64]:
    """Mean return of each policy and the ends of its 95% interval over starts (bootstrap) -> [P,3]."""
    returns = result.returns
    drawn = returns[:, np.random.default_rng(0).integers(returns.shape[1], size=(2000, returns.shape[1]))].mean(-1)
    return np.stack([returns.mean(1), *np.percentile(drawn, [2.5, 97.5], axis=1)], 1)


def _looks(report: Report, comparison: Comparison) -> None:
    """Simulator and dream side by side, moving, where the task can be drawn."""
    chosen = _stretches(comparison)
    try:
        frames = film(comparison, chosen)
    except Exception as error:  # many reasons: no GL here, or an observation that doesn't tell the state
        why = " ".join(str(error).split())
        report.text(f"No film: {comparison.rollouts.env_id} can't be drawn here ({why}).")
        return
    file = BytesIO()
    first, *rest = frames
    ms = round(1000 * max(comparison.dt, 0.04))
    first.save(file, "webp", save_all=True, append_images=rest, duration=ms, loop=0, quality=70)
    names = [comparison.rollouts.policies[int(w) // len(comparison.rollouts.seeds)].name for w in chosen]
    report.picture(
        file.getvalue(),
        "webp",
        "Above the simulator, below the dream of the same actions, which saw nothing after this film's beginning. "
        f"Policies, from left to right: {', '.join(names)}.",
    )


def film(comparison: Comparison, chosen: list[int]) -> list[Image.Image]:
    """Frames of the stretches ``chosen``: above as simulated, below as dreamed.

    Raises whatever the simulator does where it can't draw here.
    """
    from envs import draw, make_real

    artist = make_real(comparison.rollouts.env_id, render_mode="rgb_array")
    try:
        artist.reset(seed=0)
        space = artist.observation_space
        real, *_, valid = comparison.windows.real
        dreamed = comparison.dreamed.obs
        assert dreamed is not None
        frames = []
        for t in range(min(comparison.windows.horizon, int(valid[chosen].sum(1).max()))):
            columns = []
            for w in chosen:
                at = min(t, int(valid[w].sum()) - 1)
                pair = [
                    _small(draw(artist, unflatten(space, _bounded(space, obs[w, at].double().numpy()))))
                    for obs in (real, dreamed)
                ]
                columns.append(np.concatenate([pair[0], np.full_like(pair[0][:3], 255), pair[1]]))
            gap = np.full_like(columns[0][:, :3], 255)
            row = [part for column in columns for part in (column, gap)][:-1]
            frames.append(Image.fromarray(np.concatenate(row, 1)))
        return frames
    finally:
        artist.close()


def _bounded(space: Any, obs: NDArray[Any]) -> NDArray[Any]:
    return np.clip(obs, space.low.ravel(), space.high.ravel())


def _small(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(frame)
    image.thumbnail((SIZE, SIZE))
    return np.asarray(image)


def _stretches(comparison: Comparison) -> list[int]:
    """Three to show: of the first, the middle and the best policy, the one whose error is their median."""
    result = comparison.rollouts.result
    order = result.returns.mean(1).argsort()
    shown = []
    for p in (order[0], order[len(order) // 2], order[-1]):
        rows = comparison.of_policy(int(p))
        error = comparison.errors[MODEL].obs_error[rows].square().mean((1, 2)).nan_to_num(torch.inf)
        shown.append(int(rows[error.argsort()[len(rows) // 2]]))
    return shown


def _two(comparison: Comparison) -> list[int]:
    """A short and the longest horizon."""
    longest = comparison.windows.horizon
    return [min(8, longest), longest] if longest > 8 else [longest]


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.tick_params(labelsize=8.5, length=3, color="#8a94a3")
    return figure, axes


def _both(row: dict[str, Any]) -> Cell:
    return "-" if row["rms"] is None and row["median"] is None else f"{_number(row['rms'])} ({_number(row['median'])})"


def _number(x: float | None) -> str:
    return "-" if x is None or not math.isfinite(x) else f"{x:.2g}" if abs(x) < 100 else f"{x:.0f}"


def _times(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _correlation(told: list[float | None]) -> str:
    estimate, low, high = ("-" if x is None else f"{x:.2f}" for x in told)
    return f"{estimate} ({low} to {high})"


def _interval(told: list[float | None]) -> str:
    estimate, low, high = told
    return f"{_number(estimate)} ({_number(low)} to {_number(high)})"


def _steps(h: str) -> str:
    return f"{h} step{'' if h == '1' else 's'}"
