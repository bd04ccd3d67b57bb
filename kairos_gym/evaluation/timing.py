"""Timing by turns, so that other load on the machine slows all contenders alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")


def interleaved_rates(
    jobs: Mapping[Name, Callable[[], float]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.thread_time,
    setup: Callable[[], object] | None = None,
    warmup: bool = True,
) -> dict[Name, list[float]]:
    """Run all jobs once a round -> for each the units that it did a second, round by round.

    jobs: each returns how many units (steps, bytes, ...) it did. clock: thread CPU time unless another is given.
    setup: called before each round, outside the clock. warmup: an uncounted first round.
    """
    rates: dict[Name, list[float]] = {name: [] for name in jobs}
    for number in range(-int(warmup), rounds):
        if setup is not None:
            setup()
        for name, job in jobs.items():
            start = clock()
            units = job()
            seconds = max(clock() - start, 1e-9)
            if number >= 0:
                rates[name].append(units / seconds)
    return rates


def median_ratio(rates: list[float], others: list[float]) -> float:
    """How many times as fast, paired by round."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))
