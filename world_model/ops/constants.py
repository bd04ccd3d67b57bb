"""Tensors that depend on sizes alone, made once a device: to copy them there for every pass would make a GPU wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_holders: list[list[Any]] = []


def constant(make: Callable[P, T]) -> Callable[P, T]:
    """``make``, whose results are kept for the last 256 sets of arguments; they serve training too."""
    kept = lru_cache(maxsize=256)(torch.inference_mode(False)(make))

    @wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        made = kept(*args, **kwargs)  # type: ignore[arg-type]
        for holder in _holders:
            holder.append(made)
        return made

    return get


@contextmanager
def held() -> Iterator[list[Any]]:
    """The constants that are asked for meanwhile: a CUDA graph reads them by address, kept here or not."""
    holder: list[Any] = []
    _holders.append(holder)
    try:
        yield holder
    finally:
        _holders.pop()


@constant
def index(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [N] of these."""
    return torch.tensor(values, dtype=torch.int64, device=device)
