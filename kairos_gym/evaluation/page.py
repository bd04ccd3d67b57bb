"""The comparison as a page: what was measured in words, tables and figures, in one file that needs no network."""

from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kairos_gym.evaluation.comparison import MODEL, OFF, SHOWN, SHUFFLED, Comparison, off, steps_of
from kairos_gym.evaluation.figures import (
    draw_dimensions,
    draw_drift,
    draw_error,
    draw_memory,
    draw_returns,
    draw_summary,
    draw_trust,
    two,
)
from kairos_gym.report import Cell, Report
from world_model.spaces import unflatten

SIZE = 200  # pixels of a drawn frame's longer side


def write_report(comparison: Comparison, folder: str | Path, command: str) -> Path:
    """Write the page (index.html), its figures as SVG, comparison.json and TensorBoard logs into ``folder``.

    command: what makes the report again; it stands at the page's foot. Returns the page's absolute path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = comparison.numbers()
    (folder / "comparison.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    comparison.log(folder / "logs")
    for figure in (draw_summary, draw_error, draw_dimensions, draw_drift, draw_returns):
        figure(comparison).savefig(folder / f"{figure.__name__.removeprefix('draw_')}.svg", metadata={"Date": None})
    return build_report(comparison, numbers, command).write(folder / "index.html")


def build_report(comparison: Comparison, numbers: dict[str, Any], command: str) -> Report:
    """numbers: those of ``comparison``."""
    settings, env_id = numbers["settings"], numbers["env"]
    report = Report(f"Imagined against simulated: {numbers['model']} in {env_id}", command)
    for sentence in summarise(numbers):
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
        ["RMS (median) after", *[steps_of(h) for h in hs], "within 0.1 (0.3) for"],
        [
            [name, *[_both(by[h]) for h in hs], "{} ({})".format(*numbers["steps_within"][name].values())]
            for name, by in numbers["error_by_horizon"].items()
            if not name.startswith("simulator") or name in map(off, SHOWN)
        ],
    )
    equivalent = {h: x for h, x in numbers["equivalent_perturbation"].items() if x is not None}
    if equivalent:
        report.text(
            "The model's equivalent perturbation, the start off by which the simulator is as wrong in the median: "
            + ", ".join(f"{_number(x)} std after {steps_of(h)}" for h, x in equivalent.items())
            + f". Starts from {OFF[0]:g} to {OFF[-1]:g} std off were tried."
        )

    report.heading("For which policies")
    report.table(
        ["policy: RMS (median) after", *[steps_of(h) for h in hs], "stretches"],
        [[name, *[_both(by[h]) for h in hs], by[hs[0]]["n"]] for name, by in numbers["error_by_policy"].items()],
    )
    report.heading("Where it lies")
    report.figure(
        draw_dimensions(comparison),
        f"RMS error of each dimension after {' and '.join(steps_of(h) for h in two(comparison))}.",
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
        ["reward error (RMS over its std) after", *[steps_of(h) for h in hs]],
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
    if foreseen := numbers["success_auc"]:
        rows = {"ROC AUC": "auc", "stretches solved": "solved", "not solved": "not"}
        report.table(
            ["success within", *[steps_of(h) for h in hs]],
            [[what, *[_number(foreseen[h][key]) for h in hs]] for what, key in rows.items()],
        )
        report.text(
            "Whether a stretch will be solved, told by the highest reward that is dreamed in it: the area under the "
            "ROC curve, 0.5 for guessing and 1 for knowing. Left out are stretches that begin solved, and those that "
            "end too early to know."
        )

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
    told = ", ".join(f"{size:,} bytes after {steps_of(t)}" for t, size in numbers["state_bytes"].items())
    report.text(f"What one dream remembers: {told}.")
    report.heading("What was compared")
    fitted = settings["references_fitted_on"]
    sources = (
        "No references were fitted."
        if fitted is None
        else f"References were fitted on {fitted}, the model's own training data; none of the evaluation is in it."
        if settings["references_had_the_same_data"]
        else f"References were fitted on {fitted}, recorded again as the model's own training data were, by policies "
        "that this machine trained; none of the evaluation is in it."
    )
    report.text(
        f"Starts of seeds {settings['seeds'][0]} to {settings['seeds'][1]}, of which "
        f"{settings['starts_refused_as_solved']} were refused since they began solved. {sources} The model dreams "
        f"{steps_of(settings['chunk'])} at a time. comparison.json beside this page has every number, logs/ the "
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
        ["coverage (median bound) after", *[steps_of(h[1:]) for h in hs]],
        [
            [name, *[f"{100 * by[h]['coverage']:.0f}% ({_number(by[h]['median'])})" if h in by else "-" for h in hs]]
            for name, by in told.items()
        ],
    )
    report.figure(
        draw_trust(comparison),
        "Error of each stretch (dots) and its bound, after the longest horizon: below the line the bound held.",
    )


def summarise(numbers: dict[str, Any]) -> list[str]:
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
            f"{verdict}: with other stretches' actions its median error after {steps_of(h)} is {_times(ratio)} times "
            "as large."
        )
    by = {name: row[h]["median"] for name, row in numbers["error_by_policy"].items() if row[h]["median"] is not None}
    if by:
        worst, best = max(by, key=by.__getitem__), min(by, key=by.__getitem__)
        yes.append(
            f"For which policies: after {steps_of(h)} it is best on “{best}” ({by[best]:.2g}) and worst on “{worst}” "
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
        held = ", ".join(f"{100 * by['coverage']:.0f}% after {steps_of(h[1:])}" for h, by in told.items())
        yes.append(f"It knows its own error: the bound of 90% held in {held}.")
    lost = sum(row[MODEL]["lost"] for row in numbers["policies"].values())
    if lost:
        yes.append(f"{lost} dreams turned non-finite.")
    return yes


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
    from envs import make_real, render_observation

    artist = make_real(comparison.rollouts.env_id, render_mode="rgb_array")
    try:
        artist.reset(seed=0)
        space = artist.observation_space
        real, *_, valid = comparison.windows.recorded
        dreamed = comparison.dreamed.obs
        assert dreamed is not None
        frames = []
        for t in range(min(comparison.windows.horizon, int(valid[chosen].sum(1).max()))):
            columns = []
            for w in chosen:
                at = min(t, int(valid[w].sum()) - 1)
                pair = [
                    _small(render_observation(artist, unflatten(space, _bounded(space, obs[w, at].double().numpy()))))
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


def _both(row: dict[str, Any]) -> Cell:
    return "-" if row["rms"] is None and row["median"] is None else f"{_number(row['rms'])} ({_number(row['median'])})"


def _number(x: float | None) -> str:
    return "-" if x is None or not math.isfinite(x) else f"{x:.2g}" if abs(x) < 100 else f"{x:.0f}"


def _times(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _correlation(told: list[float | None]) -> str:
    estimate, low, high = ("-" if x is None else f"{x:.2f}" for x in told)
    return estimate if estimate == "-" else f"{estimate} ({low} to {high})"


def _interval(told: list[float | None]) -> str:
    estimate, low, high = told
    return f"{_number(estimate)} ({_number(low)} to {_number(high)})"
