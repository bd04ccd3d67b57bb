"""The tables of open-loop errors, recall and lifts, from what has been measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from kairos_gym.bench.harness import ROWS, Row, read_rows


def table(path: Path = ROWS) -> None:
    """Print what ``models``, ``recall`` and ``lift`` have measured as tables: means over seeds."""
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    lifts: dict[tuple[str, str | None, int, int], Row] = {}
    for row in read_rows(path):  # of a seed that was run twice the last counts
        if row.get("bench") == "lift":
            lifts[row["policy"], row["reward"], row["seed"], row["episodes"]] = row
        elif form := row.get("form") or row.get("pattern"):  # other benches print their table themselves
            groups.setdefault((row["task"], form), {})[row.get("seed", 0)] = row
    for (task, form), seeds in sorted(groups.items()):
        cells = [task, form, f"{len(seeds)} seeds", *_error_cells(list(seeds.values()))]
        print("| " + " | ".join(cells) + " |")
    for (policy, reward, *_), row in lifts.items():
        lifted, interval = "{lifted} of {episodes}".format(**row), "{:.0%} to {:.0%}".format(*row["wilson_95"])
        cost = f"{row['median_steps_of_the_lifted'] or '-'} steps, {row['cpu_seconds_thinking']:.2g} CPU-s"
        print(f"| lift | {policy} | {reward or '-'} | {row['data'] or '-'} | {lifted} | {interval} | {cost} |")


def _error_cells(rows: list[Row]) -> list[str]:
    """The errors and the CPU time of one model's seeds."""
    cells = []
    if "test" in rows[0]:
        for part in ("all", "uniform", "held"):
            tables = [row["test"].get(part, row["test"]) for row in rows]
            cells.append(
                " ".join(
                    f"{h} {_mean(t[h]['rms'] for t in tables)} ({_mean(t[h]['median'] for t in tables)})"
                    for h in tables[0]
                )
            )
            if part not in rows[0]["test"]:
                break
    elif "reward_error" in rows[0]:
        cells.append(" ".join(f"{row['reward_error']:.3f}" for row in rows))
        if "window_floor" in rows[0]:
            cells.append("no window below {window_floor:.3f} (exact {exact_floor:.3f})".format(**rows[0]))
    if "cpu_seconds" in rows[0]:
        cells.append(f"{_mean(row['cpu_seconds'] for row in rows)} CPU-s")
    return cells


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.mean(values):.3g}"
