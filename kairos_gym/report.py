"""A report page: text, tables and figures in one HTML file that needs no network and reads well on a phone."""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import torch
from matplotlib.figure import Figure

from world_model.ops.dispatch import native_library, use_triton

Cell = str | int | float

STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 52rem; padding: 2rem 1rem 3rem; color: #1c2430; background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -.01em }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem }
p { margin: .6rem 0 }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e8ee }
th { color: #5a6575; font-weight: 600; border-bottom: 1.5px solid #b9c2ce }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
figure { margin: 1rem 0 1.5rem }
figure svg, figure img { display: block; width: 100%; height: auto }
figcaption, footer { color: #5a6575; font-size: .86rem; line-height: 1.45 }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid #e4e8ee }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere }
"""


class Report:
    """A page, built from the top down: Report(title, command).text(...).table(...).figure(...).write(path).

    command: what makes this page again; the footer shows it, with the machine and the date.
    """

    def __init__(self, title: str, command: str):
        self.title, self.command = title, command
        self._parts: list[str] = []

    def heading(self, text: str) -> Report:
        return self._add(f"<h2>{escape(text)}</h2>")

    def text(self, paragraph: str) -> Report:
        return self._add(f"<p>{escape(paragraph)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Report:
        """Rows under columns; numbers are shown to four figures."""
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(_format(cell))}</td>" for cell in row) + "</tr>\n" for row in rows
        )
        return self._add(f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>')

    def figure(self, figure: Figure, caption: str) -> Report:
        """A matplotlib figure as inline SVG."""
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue()
        svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
        return self._add(f"<figure>\n{svg}<figcaption>{escape(caption)}</figcaption>\n</figure>")

    def picture(self, data: bytes, kind: str, caption: str) -> Report:
        """A picture, moving or not, of ``kind`` "png" or "webp", embedded in the page."""
        encoded = base64.b64encode(data).decode()
        return self._add(
            f'<figure>\n<img src="data:image/{kind};base64,{encoded}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, and make its folder -> its absolute path."""
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self.title)}</h1>\n" + "\n".join(self._parts) + "\n"
            f"<footer>Made by <code>{escape(self.command)}</code> on {datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC."
            f"<br>{escape(machine())}.</footer>\n</body>\n</html>\n",
            encoding="utf-8",
        )
        return path

    def _add(self, part: str) -> Report:
        self._parts.append(part)
        return self


def as_text(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table for a terminal: the first column aligned to the left, the others to the right."""
    cells = [list(columns), *([_format(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def machine() -> str:
    """This machine in one line: processor, cores, threads, kernels, a GPU where there is one, versions."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = ""
    if torch.cuda.is_available():
        kernels = "Triton" if use_triton(torch.empty(0, device="cuda")) else "torch"
        gpu = f", {torch.cuda.get_device_name()} with {kernels} kernels"
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"{'native' if native_library('dream') else 'torch'} kernels{gpu}; {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, kairos_gym {version('kairos_gym')}"
    )


def _format(cell: Cell) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
