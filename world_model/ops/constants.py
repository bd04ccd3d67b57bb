"""Tensors that depend on sizes alone, cached per device, since copying them for every pass would stall a GPU."""

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
    """Decorate ``make`` to cache its last 256 results, made outside inference mode so that autograd can use them."""
    cached = lru_cache(maxsize=256)(torch.inference_mode(False)(make))

    @wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        result = cached(*args, **kwargs)  # type: ignore[arg-type]
        for holder in _holders:
            holder.append(result)
        return result

    return get


@contextmanager
def held() -> Iterator[list[Any]]:
    """Collect the constants used meanwhile: a CUDA graph reads them by address, so they must outlive the cache."""
    holder: list[Any] = []
    _holders.append(holder)
    try:
        yield holder
    finally:
        _holders.pop()


@constant
def index(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [N], as a constant."""
    return torch.tensor(values, dtype=torch.int64, device=device)
