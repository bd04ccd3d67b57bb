"""The figure of the compiled kernels' speed, from what ``memory`` and ``step`` have measured."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes

from kairos_gym.bench.harness import ROWS, Row, read_rows
from kairos_gym.plots import BLUE, GREEN, INK, ORANGE, panels


def speed(path: Path = ROWS, out: Path = Path("docs/kernels.svg")) -> None:
    """Draw what ``memory`` and ``step`` measured last."""
    rows = {row["bench"]: row for row in read_rows(path) if "bench" in row}
    if missing := {"memory", "step"} - set(rows):
        raise ValueError(f"nothing measured yet by kairos bench {' and '.join(sorted(missing))}: run that first")
    figure, (left, right) = panels((9.0, 3.6), 2, width_ratios=(3, 2))
    _draw_memory(left, rows["memory"]["rows"])
    _draw_step(right, rows["step"]["rows"], rows["step"]["mujoco_rollout"])
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(out, metadata={"Date": None})


def _draw_memory(axes: Axes, rows: list[Row]) -> None:
    """The delta rule's time over the machine's limit, for each shape of more than one dream."""
    shapes = [row for row in rows if row["dreams"] > 1]
    for column, colour, name in (("forward", BLUE, "compiled"), ("torch_forward", ORANGE, "the best form in torch")):
        ratios = [row[column] / row["floor"] for row in shapes]
        axes.plot(range(len(shapes)), ratios, "o", color=colour, label=name)
    axes.axhline(1, color=INK, linewidth=1, label="the machine's limit")
    labels = [f"{row['what']}\nB={row['dreams']}\nT={row['tokens']}" for row in shapes]
    axes.set_xticks(range(len(shapes)), labels, fontsize=6)
    axes.set(yscale="log", ylabel="time over the limit", title="the delta rule, forward")


def _draw_step(axes: Axes, rows: list[Row], mujoco_rate: float) -> None:
    """Env steps a CPU-second by the number of dreams, beside what arithmetic alone would allow and MuJoCo."""
    for layers, style in (("SG", "-"), ("SGDG", "--")):
        group = [row for row in rows if row["layers"] == layers]
        dreams = [row["dreams"] for row in group]
        for column, colour, name in (("steps_per_cpu_second", BLUE, "compiled"), ("torch", ORANGE, "torch")):
            axes.plot(dreams, [row[column] for row in group], style, color=colour, label=f"{layers}, {name}")
        limit = statistics.median(row["steps_per_cpu_second"] * row["floor_over_ours"] for row in group)
        axes.axhline(limit, color=INK, linestyle=style, linewidth=1, label=f"{layers}, arithmetic alone")
    axes.axhline(mujoco_rate, color=GREEN, linewidth=1, label="mujoco.rollout")
    axes.set_xscale("log")
    ticks = sorted({row["dreams"] for row in rows})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set(yscale="log", xlabel="dreams", ylabel="env steps a CPU-second", title="a whole step")
