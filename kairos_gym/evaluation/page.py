"""The report page of a comparison: sentences, tables and figures in one file that needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kairos_gym.evaluation.comparison import HIDDEN, MODEL, PERTURBATIONS, SHUFFLED, Comparison, steps_of
from kairos_gym.evaluation.figures import (
    draw_dimensions,
    draw_drift,
    draw_error,
    draw_memory,
    draw_returns,
    draw_summary,
    draw_trust,
    two_horizons,
)
from kairos_gym.evaluation.film import choose_windows, draw_film
from kairos_gym.report import Cell, Report

Numbers = dict[str, Any]  # those of a comparison


def write_report(comparison: Comparison, folder: str | Path, command: str) -> Path:
    """Write the page (index.html), its figures as SVG, comparison.json and TensorBoard logs into ``folder``.

    command: what makes the report again; it stands at the page's foot. Returns the page's absolute path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = comparison.numbers()
    (folder / "comparison.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    comparison.log(folder / "logs")
    for draw in (draw_summary, draw_error, draw_dimensions, draw_drift, draw_returns):
        draw(comparison).savefig(folder / f"{draw.__name__.removeprefix('draw_')}.svg", metadata={"Date": None})
    return build_report(comparison, numbers, command).write(folder / "index.html")


def build_report(comparison: Comparison, numbers: Numbers, command: str) -> Report:
    """The page, section by section. numbers: those of ``comparison``."""
    report = Report(f"Imagined against simulated: {numbers['model']} in {numbers['env']}", command)
    for add_section in SECTIONS:
        add_section(report, comparison, numbers)
    return report


def summarise(numbers: Numbers) -> list[str]:
    """The results in sentences."""
    within, errors, agreement = numbers["steps_within"], numbers["error_by_horizon"], numbers["agreement"][MODEL]
    longest = numbers["settings"]["horizon"]
    others = [name for name in ("linear", "PETS ensemble") if name in within]
    beside = "".join(f"; {name} {within[name]['0.1']} and {within[name]['0.3']}" for name in others)
    sentences = [
        f"How long: the median dream stays within 0.1 standard deviations for {within[MODEL]['0.1']} steps and within "
        f"0.3 for {within[MODEL]['0.3']}, of {longest} dreamed{beside}."
    ]
    h = str(min(8, longest))
    own, shuffled = errors[MODEL][h]["median"], errors[SHUFFLED][h]["median"]
    if own is not None and shuffled is not None:
        ratio = shuffled / max(own, 1e-9)
        verdict = "The dream follows the actions" if ratio > 2 else "The dream hardly follows the actions, be warned"
        sentences.append(
            f"{verdict}: with the actions of other windows its median error after {steps_of(h)} is {_times(ratio)} "
            "times as large."
        )
    by = {name: row[h]["median"] for name, row in numbers["error_by_policy"].items() if row[h]["median"] is not None}
    if by:
        worst, best = max(by, key=by.__getitem__), min(by, key=by.__getitem__)
        sentences.append(
            f"For which policies: after {steps_of(h)} its median error is smallest on “{best}” ({by[best]:.2g}) and "
            f"largest on “{worst}” ({by[worst]:.2g})."
        )
    sentences.append(
        f"Which policy is better: over {len(numbers['policies'])} policies, imagined and simulated returns have a "
        f"Spearman correlation of {_correlation(agreement['spearman'])} and a Pearson correlation of "
        f"{_correlation(agreement['pearson'])}. By imagined return one would choose “{agreement['chosen']}”; the best "
        f"is “{agreement['best']}”: a regret of {_number(agreement['regret'][0])}."
    )
    if numbers["trust"] is not None:
        rows = numbers["trust"]["all"].items()
        held = ", ".join(f"{100 * row['coverage']:.0f}% after {steps_of(h[1:])}" for h, row in rows)
        sentences.append(f"Its error bound: the bound of 90% held in {held}.")
    diverged = sum(row[MODEL]["lost"] for row in numbers["policies"].values())
    return [*sentences, f"{diverged} dreams turned non-finite."] if diverged else sentences


def _summary(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    for sentence in summarise(numbers):
        report.text(sentence)


def _film(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    windows = choose_windows(comparison)
    try:
        film = draw_film(comparison, windows)
    except Exception as error:  # many reasons: no OpenGL here, or an observation that doesn't determine the state
        reason = " ".join(str(error).split())
        report.text(f"No film: {comparison.rollouts.env_id} can't be drawn here ({reason}).")
        return
    policies = [comparison.rollouts.policies[w // len(comparison.rollouts.seeds)].name for w in windows]
    report.picture(
        film,
        "webp",
        "Above the simulator, below the dream of the same actions, which saw no frame after the beginning of this "
        f"film. Policies, from left to right: {', '.join(policies)}.",
    )


def _error_by_horizon(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    settings, horizons = numbers["settings"], _keys(comparison)
    report.heading("Error by horizon")
    report.text(
        f"Open loop, in {settings['windows']} windows, one in each episode that {len(numbers['policies'])} policies "
        f"played in the simulator: the model sees up to {settings['context']} real frames, then dreams on with the "
        "actions that were really played, without another look. Errors are the RMS over the dimensions of the "
        "observation, each divided by its standard deviation in the training data: 0 is perfect, 1 is no better than "
        "always predicting the mean."
    )
    report.figure(
        draw_error(comparison),
        "Median over the windows; for the model also the 10th to 90th percentile (shaded). Black: the simulator "
        "itself, started slightly off in every coordinate. On a chaotic task no model can stay below such a line for "
        "long.",
    )
    report.table(
        ["RMS (median) after", *map(steps_of, horizons), "within 0.1 (0.3) for"],
        [
            [name, *[_both(row[h]) for h in horizons], "{} ({})".format(*numbers["steps_within"][name].values())]
            for name, row in numbers["error_by_horizon"].items()
            if name not in HIDDEN
        ],
    )
    equivalent = {h: x for h, x in numbers["equivalent_perturbation"].items() if x is not None}
    if equivalent:
        report.text(
            "The model's equivalent perturbation, which is how far off the simulator itself must start to be as wrong "
            "in the median: "
            + ", ".join(f"{_number(x)} std after {steps_of(h)}" for h, x in equivalent.items())
            + f". Starts from {PERTURBATIONS[0]:g} to {PERTURBATIONS[-1]:g} std off were tried."
        )


def _error_by_policy(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    horizons = _keys(comparison)
    report.heading("For which policies")
    report.table(
        ["policy: RMS (median) after", *map(steps_of, horizons), "windows"],
        [
            [name, *[_both(row[h]) for h in horizons], row[horizons[0]]["n"]]
            for name, row in numbers["error_by_policy"].items()
        ],
    )


def _error_by_dimension(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    report.heading("Where it lies")
    report.figure(
        draw_dimensions(comparison),
        f"RMS error of each dimension after {' and '.join(map(steps_of, two_horizons(comparison)))}.",
    )
    report.figure(
        draw_drift(comparison),
        "Drift of the distribution: the 1-Wasserstein distance between dreamed and simulated states at each step, over "
        "each dimension's standard deviation, mean over dimensions.",
    )


def _returns(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    settings, policies = numbers["settings"], numbers["policies"]
    report.heading("Imagined against simulated returns")
    report.text(
        f"Closed loop: every policy plays the same {settings['episodes']} starts for up to {settings['time_limit']} "
        "steps, in the simulator and in the dream, with the same random numbers. The dream sees the first frame alone, "
        "and the policy acts on what is dreamed."
    )
    report.figure(
        draw_returns(comparison),
        "Mean return of each policy with its 95% interval over starts, numbered as in the table. On the line imagined "
        "and simulated returns are equal.",
    )
    sides = ("simulated", MODEL)
    report.table(
        ["policy", "simulated", "imagined", "steps simulated", "imagined"],
        [
            [f"{i}. {name}", *[row[side][what] for what in ("return", "steps") for side in sides]]
            for i, (name, row) in enumerate(policies.items(), 1)
        ],
    )
    report.table(
        ["returns in", "Pearson", "Spearman", "regret", "chooses"],
        [
            [name, _correlation(row["pearson"]), _correlation(row["spearman"]), _interval(row["regret"]), row["chosen"]]
            for name, row in numbers["agreement"].items()
        ],
    )
    report.text(
        "In brackets 95% intervals, by the bootstrap over policies and starts (regret: over starts alone). Regret is "
        "what it costs to choose a policy by its imagined return: the simulated return of the best policy less that of "
        "the chosen one."
    )
    if any(row["simulated"].get("success") is not None for row in policies.values()):
        columns = ["policy", "success simulated", "imagined", "median steps to it simulated", "imagined"]
        report.table(
            columns,
            [
                [name, *[_number(row[side].get(what)) for what in ("success", "steps_to_success") for side in sides]]
                for name, row in policies.items()
            ],
        )


def _rewards_and_ends(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    horizons = _keys(comparison)
    report.heading("Rewards and ends")
    report.table(
        ["reward error (RMS over its std) after", *map(steps_of, horizons)],
        [
            [name, *[_number(row[h]) for h in horizons]]
            for name, row in numbers["reward_error"].items()
            if name not in HIDDEN
        ],
    )
    ends = numbers["ends"]
    if ends["both"] + ends["only_simulated"] + ends["only_dreamed"]:
        apart = "" if ends["steps_apart"] is None else f", in the median {_number(ends['steps_apart'])} steps apart"
        report.text(
            f"In {ends['both'] + ends['only_simulated']} of the {numbers['settings']['windows']} windows the episode "
            f"ends in the simulator. It ends in the dream in {ends['both']} of these{apart}, and in "
            f"{ends['only_dreamed']} of the others."
        )
    else:
        report.text("In no window did the episode end, neither in the simulator nor in the dream.")
    if auc := numbers["success_auc"]:
        rows = {"ROC AUC": "auc", "windows solved": "solved", "windows not solved": "not"}
        report.table(
            ["success within", *map(steps_of, horizons)],
            [[what, *[_number(auc[h][key]) for h in horizons]] for what, key in rows.items()],
        )
        report.text(
            "How well the highest reward dreamed in a window predicts that the window will be solved: the area under "
            "the ROC curve is 0.5 for guessing and 1 for a perfect prediction. Windows that begin solved are left out, "
            "and those that end too early to know."
        )


def _error_bound(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    report.heading("How well it knows its own error")
    trust = numbers["trust"]
    if trust is None:
        report.text("This model was not calibrated (kairos calibrate), so it gives no bound on its error.")
        return
    report.text(
        "The bound of 90% that DreamEnv(confidence=0.9) reports at each step, calibrated on other held-out episodes: "
        "how often the error stayed below it, and in brackets its median. The 90% are for dreams like those that it "
        "was calibrated on, over all of them, not for each policy."
    )
    horizons = list(trust["all"])
    report.table(
        ["coverage (median bound) after", *[steps_of(h[1:]) for h in horizons]],
        [
            [name, *[f"{100 * row[h]['coverage']:.0f}% ({_number(row[h]['median'])})" if h in row else "-"
                     for h in horizons]]
            for name, row in trust.items()
        ],
    )  # fmt: skip
    report.figure(
        draw_trust(comparison),
        "The error in each window (dots) over its bound, after the longest horizon: below the line the bound held.",
    )


def _memory(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    if not comparison.memory:
        return
    report.heading("What its memory makes of the error")
    report.text(
        "At each step a gated-delta layer shrinks the difference between two memories to at most rho times its size. "
        "So the distance e_t between the memory written from dreamed frames and the one written from real frames stays "
        "within e_t <= rho_t e_(t-1) + xi_t, where xi_t is the difference that one dreamed frame, in the place of the "
        "real one, makes to the real memory. This bounds the memory, not the error of the decoded observations: xi "
        "grows with the error of what was dreamed."
    )
    report.figure(
        draw_memory(comparison),
        "Median over the windows: measured (solid), bound with each step's own rho and xi (dashed), closed form "
        "with the largest (dotted); Frobenius norms over that of the real memory.",
    )
    report.table(
        ["layer, head", "remembers", "measured over bound", "violations"],
        [
            [f"{layer}, {head}", f"{_number(steps)} steps", _number(tightness), row["violations"]]
            for layer, row in numbers["memory"].items()
            for head, (steps, tightness) in enumerate(zip(row["steps_remembered"], row["tightness"], strict=True))
        ],
    )


def _speed(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    report.heading("Speed and memory")
    simulator, dreams = numbers["speed"]["simulator"], numbers["speed"]["dream"]
    names = {n: "1 dream" if n == "1" else f"{int(n):,} dreams side by side" for n in dreams}
    report.table(
        ["", "steps a CPU-second", "over the simulator"],
        [
            ["simulator", f"{simulator:,.0f}", "1"],
            *[[names[n], f"{rate:,.0f}", f"{rate / simulator:.2g}"] for n, rate in dreams.items()],
        ],
    )
    sizes = ", ".join(f"{size:,} bytes after {steps_of(t)}" for t, size in numbers["state_bytes"].items())
    report.text(f"The state of one dream: {sizes}.")


def _settings(report: Report, comparison: Comparison, numbers: Numbers) -> None:
    report.heading("What was compared")
    settings = numbers["settings"]
    dataset = settings["references_fitted_on"]
    if dataset is None:
        references = "No references were fitted."
    elif settings["references_had_the_same_data"]:
        references = f"References were fitted on {dataset}, the model's own training data"
    else:
        references = (
            f"References were fitted on {dataset}, recorded again as the model's own training data were, by policies "
            "that this machine trained"
        )
    unseen = "" if dataset is None else "; no episode of the evaluation is in it."
    report.text(
        f"Starts of seeds {settings['seeds'][0]} to {settings['seeds'][1]}, without "
        f"{settings['starts_refused_as_solved']} that begin solved. {references}{unseen} The model dreams "
        f"{steps_of(settings['chunk'])} at a time. comparison.json beside this page has every number, logs/ the "
        "TensorBoard scalars."
    )


SECTIONS: tuple[Callable[[Report, Comparison, Numbers], None], ...] = (
    _summary,
    _film,
    _error_by_horizon,
    _error_by_policy,
    _error_by_dimension,
    _returns,
    _rewards_and_ends,
    _error_bound,
    _memory,
    _speed,
    _settings,
)


def _keys(comparison: Comparison) -> list[str]:
    """The horizons as JSON keys."""
    return list(map(str, comparison.horizons))


def _both(row: dict[str, Any]) -> Cell:
    return "-" if row["rms"] is None and row["median"] is None else f"{_number(row['rms'])} ({_number(row['median'])})"


def _number(x: float | None) -> str:
    return "-" if x is None or not math.isfinite(x) else f"{x:.2g}" if abs(x) < 100 else f"{x:.0f}"


def _times(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _correlation(row: list[float | None]) -> str:
    estimate, low, high = ("-" if x is None else f"{x:.2f}" for x in row)
    return estimate if estimate == "-" else f"{estimate} ({low} to {high})"


def _interval(row: list[float | None]) -> str:
    estimate, low, high = row
    return f"{_number(estimate)} ({_number(low)} to {_number(high)})"
