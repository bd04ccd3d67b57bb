"""The figures of a comparison: matplotlib Figures of what was measured."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kairos_gym.evaluation.comparison import MODEL, SHOWN, SHUFFLED, Comparison, off, steps_of
from kairos_gym.evaluation.rollouts import Result

COLOURS = {
    MODEL: "#2563a8",
    SHUFFLED: "#9d6bb8",
    "nothing moves": "#a3adba",
    "linear": "#b98a1e",
    "PETS ensemble": "#c2410c",
}
INK, PALE = "#1c2430", "#b9c2ce"


def draw_summary(comparison: Comparison) -> Figure:
    """Error and returns side by side."""
    figure, (left, right) = _panels((10, 3.6), 2)
    _errors(left, comparison)
    _returns(right, comparison)
    return figure


def draw_error(comparison: Comparison) -> Figure:
    figure, (axes,) = _panels((6.4, 3.6))
    _errors(axes, comparison)
    return figure


def _errors(axes: Axes, comparison: Comparison) -> None:
    lasting = int(comparison.windows.recorded.valid.any(0).sum())  # steps that some episode has
    steps = np.arange(1, lasting + 1)
    for name, error in comparison.errors.items():
        if name.startswith("simulator") and name not in map(off, SHOWN):
            continue
        per = error.obs_error[:, :lasting].square().mean(-1).sqrt().numpy()  # [W,h]
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


def draw_dimensions(comparison: Comparison) -> Figure:
    errors = comparison.errors[MODEL].obs_error
    figure, (axes,) = _panels((6.4, 0.9 + 0.17 * errors.shape[-1]))
    for i, h in enumerate(two(comparison)):
        rms = errors[:, h - 1].square().nanmean(0).sqrt().clamp_max(1e3).numpy()
        at = np.arange(len(rms)) + (i - 0.5) * 0.36
        axes.barh(at, rms, 0.34, color=(COLOURS[MODEL], "#9bbbe0")[i], label=f"after {steps_of(h)}")
    axes.set_yticks(range(errors.shape[-1]))
    axes.set_ylabel("dimension")
    axes.invert_yaxis()
    axes.set_xlabel("RMS error over the dimension's std")
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def draw_drift(comparison: Comparison) -> Figure:
    figure, (axes,) = _panels((6.4, 2.4))
    drift = comparison.drift(comparison.dreamed).mean(-1).clamp_max(1e3).numpy()
    axes.plot(np.arange(1, len(drift) + 1), drift, color=COLOURS[MODEL], linewidth=2)
    axes.set(xlabel="steps dreamed without looking", ylabel="distance (std)", xlim=(1, len(drift)), ylim=(0, None))
    return figure


def draw_returns(comparison: Comparison) -> Figure:
    figure, (axes,) = _panels((6.4, 4.4))
    _returns(axes, comparison)
    return figure


def _returns(axes: Axes, comparison: Comparison) -> None:
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


def draw_trust(comparison: Comparison) -> Figure:
    trust, dreams = comparison.trust, comparison.dream_errors
    assert trust is not None
    h = min(comparison.windows.horizon, trust.horizon)
    error, bound = dreams.error[:, h - 1], dreams.bound(trust, 0.9, comparison.chunk)[:, h - 1]
    good = error.isfinite() & bound.isfinite()
    y, x = (part[good].clamp_min(1e-6).numpy() for part in (error, bound))
    figure, (axes,) = _panels((6.4, 3.8))
    held = y <= x
    axes.scatter(x[held], y[held], s=9, color=COLOURS[MODEL], linewidth=0, alpha=0.7)
    axes.scatter(x[~held], y[~held], s=12, color="#c2410c", linewidth=0)
    ends = [min(y.min(), x.min()), max(y.max(), x.max())] if len(y) else [1e-3, 1]
    axes.plot(ends, ends, color=PALE, linewidth=1, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel=f"bound after {steps_of(h)}", ylabel="error")
    return figure


def draw_memory(comparison: Comparison) -> Figure:
    figure, (axes,) = _panels((6.4, 2.8))
    colours = ["#2563a8", "#c2410c", "#4d8b57", "#9d6bb8"]
    heads = [(layer, drift, h) for layer, drift in comparison.memory.items() for h in range(drift.error.shape[1])]
    for i, (layer, drift, h) in enumerate(heads):
        for values, style in ((drift.error, "-"), (drift.running_bound, "--"), (drift.closed_bound, ":")):
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


def _means(result: Result) -> NDArray[np.float64]:
    """Mean return of each policy and the ends of its 95% interval over starts (bootstrap) -> [P,3]."""
    returns = result.returns
    drawn = returns[:, np.random.default_rng(0).integers(returns.shape[1], size=(2000, returns.shape[1]))].mean(-1)
    return np.stack([returns.mean(1), *np.percentile(drawn, [2.5, 97.5], axis=1)], 1)


def two(comparison: Comparison) -> list[int]:
    """A short and the longest horizon."""
    longest = comparison.windows.horizon
    return [min(8, longest), longest] if longest > 8 else [longest]


def _panels(size: tuple[float, float], count: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(PALE)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
        axes.tick_params(labelsize=8.5, length=3, color="#8a94a3")
    return figure, panels
