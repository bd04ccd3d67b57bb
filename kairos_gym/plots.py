"""How figures look: one palette, and axes without a box."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, OCHRE = "#2563a8", "#c2410c", "#15803d", "#9d6bb8", "#b98a1e"
INK, GREY, PALE, LIGHT_BLUE = "#1c2430", "#8a94a3", "#b9c2ce", "#9bbbe0"


def panels(size: tuple[float, float], count: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    """Axes in a row. size: inches; grid: what else ``Figure.subplots`` takes."""
    figure = Figure(figsize=size, layout="constrained")
    row: list[Axes] = list(figure.subplots(1, count, squeeze=False, **grid)[0])
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(PALE)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
        axes.tick_params(labelsize=8.5, length=3, color=GREY)
    return figure, row
