"""Checks of what callers pass to a dream: counts, seeds, and which rows they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
"""Numbers of dreams in a batch, [R], each at most once."""


def is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return is_int(value) and bool(value >= 1)


def parse_seeds(seed: Any, batch: int) -> list[int | None]:
    """Gymnasium's ``seed`` of B envs: None, one number (env b gets seed + b), or a number or None for each."""
    if seed is None:
        return [None] * batch
    seeds: list[Any] = [seed + b for b in range(batch)] if is_int(seed) else [seed]
    if isinstance(seed, Sequence | np.ndarray):
        seeds = list(seed)
    if len(seeds) != batch or not all(s is None or (is_int(s) and s >= 0) for s in seeds):
        raise ValueError(f"seed must be a whole number from 0 on, or {batch} of them or None, got {seed!r}")
    return [None if s is None else int(s) for s in seeds]


def parse_reset_mask(mask: Any, batch: int) -> Rows:
    """The rows that Gymnasium's option ``reset_mask`` selects, a bool array [B]."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask'] must be a numpy array of bool, got {mask!r}")
    if mask.shape != (batch,) or not mask.any():
        raise ValueError(f"options['reset_mask'] must have the shape ({batch},) and a True in it, got {mask!r}")
    return np.flatnonzero(mask)


def parse_rows(rows: Sequence[int] | None, batch: int) -> Rows | None:
    """Row numbers that a caller gives; None stands for all rows."""
    if rows is None:
        return None
    numbers = np.asarray(rows)
    valid = numbers.ndim == 1 and numbers.size and numbers.dtype.kind in "iu"
    if not valid or numbers.min() < 0 or numbers.max() >= batch or len(set(numbers.tolist())) < len(numbers):
        raise ValueError(f"rows must be different numbers from 0 to {batch - 1}, got {rows!r}")
    return numbers.astype(np.int64)
