"""The figures of a comparison: matplotlib Figures of what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kairos_gym.evaluation.comparison import (
    HIDDEN,
    MODEL,
    SHOWN_PERTURBATIONS,
    SHUFFLED,
    Comparison,
    perturbed,
    steps_of,
)
from kairos_gym.evaluation.intervals import bootstrap_mean
from kairos_gym.evaluation.rollouts import Result
from kairos_gym.plots import BLUE, GREEN, GREY, INK, LIGHT_BLUE, OCHRE, ORANGE, PALE, PURPLE, panels

COLOURS = {MODEL: BLUE, SHUFFLED: PURPLE, "nothing moves": GREY, "linear": OCHRE, "PETS ensemble": ORANGE}
STYLES = dict(zip(map(perturbed, SHOWN_PERTURBATIONS), (":", "--"), strict=True))


def draw_summary(comparison: Comparison) -> Figure:
    """Error and returns side by side."""
    figure, (left, right) = panels((10, 3.6), 2)
    _plot_errors(left, comparison)
    _plot_returns(right, comparison)
    return figure


def draw_error(comparison: Comparison) -> Figure:
    """The median error of each dynamics over the steps dreamed."""
    figure, (axes,) = panels((6.4, 3.6))
    _plot_errors(axes, comparison)
    return figure


def _plot_errors(axes: Axes, comparison: Comparison) -> None:
    last = int(comparison.windows.recorded.valid.any(0).sum())  # the longest window that an episode has
    steps = np.arange(1, last + 1)
    for name, errors in comparison.errors.items():
        if name in HIDDEN:
            continue
        nrmse = errors.obs_error[:, :last].square().mean(-1).sqrt().numpy()  # [W,h]
        nrmse = np.where(np.isinf(nrmse), 1e9, nrmse)  # beyond the axis
        if name == MODEL:
            low, high = np.nanpercentile(nrmse, [10, 90], axis=0)
            axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.14, linewidth=0)
        axes.plot(
            steps,
            np.maximum(np.nanmedian(nrmse, 0), 1e-12),
            color=COLOURS.get(name, INK),
            linewidth=2.2 if name == MODEL else 1.2,
            linestyle=STYLES.get(name, "-"),
            label=name,
            zorder=3 if name == MODEL else 2,
        )
    smallest = min(line.get_ydata().min() for line in axes.lines)  # type: ignore[union-attr]
    axes.set(yscale="log", ylim=(max(smallest / 2, 1e-6), 10), xlim=(1, steps[-1]))
    axes.set(xlabel="steps dreamed without looking", ylabel="normalised error")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def draw_dimensions(comparison: Comparison) -> Figure:
    """The error of each dimension after a short and after the longest horizon."""
    errors = comparison.errors[MODEL].obs_error
    figure, (axes,) = panels((6.4, 0.9 + 0.17 * errors.shape[-1]))
    for i, h in enumerate(two_horizons(comparison)):
        rms = errors[:, h - 1].square().nanmean(0).sqrt().clamp_max(1e3).numpy()
        at = np.arange(len(rms)) + (i - 0.5) * 0.36
        axes.barh(at, rms, 0.34, color=(BLUE, LIGHT_BLUE)[i], label=f"after {steps_of(h)}")
    axes.set_yticks(range(errors.shape[-1]))
    axes.set_ylabel("dimension")
    axes.invert_yaxis()
    axes.set_xlabel("RMS error over the dimension's std")
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def draw_drift(comparison: Comparison) -> Figure:
    """How far dreamed states drift from simulated ones as a distribution."""
    figure, (axes,) = panels((6.4, 2.4))
    drift = comparison.drift(comparison.dreamed).mean(-1).clamp_max(1e3).numpy()
    axes.plot(np.arange(1, len(drift) + 1), drift, color=BLUE, linewidth=2)
    axes.set(xlabel="steps dreamed without looking", ylabel="distance (std)", xlim=(1, len(drift)), ylim=(0, None))
    return figure


def draw_returns(comparison: Comparison) -> Figure:
    """The imagined return of each policy over the simulated one."""
    figure, (axes,) = panels((6.4, 4.4))
    _plot_returns(axes, comparison)
    return figure


def _plot_returns(axes: Axes, comparison: Comparison) -> None:
    x, x_error = _mean_returns(comparison.rollouts.result)
    y, y_error = _mean_returns(comparison.results[MODEL])
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.08 * (high - low) + 1e-9
    axes.plot([low - margin, high + margin], [low - margin, high + margin], color=PALE, linewidth=1, zorder=1)
    look: dict[str, Any] = {"color": BLUE, "ecolor": LIGHT_BLUE, "markersize": 5, "linewidth": 1.2}
    axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", **look)
    for i, point in enumerate(zip(x, y, strict=True), 1):
        axes.annotate(str(i), point, xytext=(5, 4), textcoords="offset points", fontsize=8.5, color=INK)
    axes.set(xlabel="simulated return", ylabel="imagined return")


def _mean_returns(result: Result) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean return of each policy [P], and how far below and above it its 95% interval over starts reaches [2,P]."""
    mean = result.returns.mean(1)
    low, high = bootstrap_mean(result.returns)
    return mean, np.abs(np.stack([mean - low, high - mean]))


def draw_trust(comparison: Comparison) -> Figure:
    """The error of each dream after the longest horizon, over its bound."""
    trust, dreams = comparison.trust, comparison.dream_errors
    assert trust is not None
    h = min(comparison.windows.horizon, trust.horizon)
    error, bound = dreams.error[:, h - 1], dreams.bound(trust, 0.9, comparison.chunk)[:, h - 1]
    finite = error.isfinite() & bound.isfinite()
    y, x = (part[finite].clamp_min(1e-6).numpy() for part in (error, bound))
    figure, (axes,) = panels((6.4, 3.8))
    below = y <= x
    axes.scatter(x[below], y[below], s=9, color=BLUE, linewidth=0, alpha=0.7)
    axes.scatter(x[~below], y[~below], s=12, color=ORANGE, linewidth=0)
    ends = [min(y.min(), x.min()), max(y.max(), x.max())] if len(y) else [1e-3, 1]
    axes.plot(ends, ends, color=PALE, linewidth=1, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel=f"bound after {steps_of(h)}", ylabel="error")
    return figure


def draw_memory(comparison: Comparison) -> Figure:
    """The measured difference of two memories over the steps, beside its two bounds."""
    figure, (axes,) = panels((6.4, 2.8))
    colours = (BLUE, ORANGE, GREEN, PURPLE)
    heads = [(layer, drift, h) for layer, drift in comparison.memory.items() for h in range(drift.error.shape[1])]
    for i, (layer, drift, h) in enumerate(heads):
        for values, style in ((drift.error, "-"), (drift.running_bound, "--"), (drift.closed_bound, ":")):
            median = (values / drift.size)[:, h].median(0).values.numpy()
            axes.plot(
                median,
                color=colours[i % len(colours)],
                linestyle=style,
                linewidth=1.6 if style == "-" else 1.1,
                label=f"layer {layer}, head {h}" if style == "-" else None,
            )
    axes.set(yscale="log", xlabel="steps dreamed without looking", ylabel="memory error", xlim=(1, None))
    axes.legend(frameon=False, fontsize=8)
    return figure


def two_horizons(comparison: Comparison) -> list[int]:
    """A short and the longest horizon."""
    longest = comparison.windows.horizon
    return [min(8, longest), longest] if longest > 8 else [longest]
