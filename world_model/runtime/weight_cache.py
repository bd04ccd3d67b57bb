"""Caches derived from a model's frozen weights, and the check whether the weights are still the same."""

from __future__ import annotations

from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from world_model.state import LatentState

_requires_grad = attrgetter("requires_grad")
caches: WeakKeyDictionary[Any, WeightCache] = WeakKeyDictionary()  # by model: a CompiledStep on a CPU, else CudaGraphs


def invalidate(model: Any) -> None:
    """Drop the model's cache, since its weights have changed."""
    caches.pop(model, None)


class WeightCache:
    """Derived from the weights of one WorldModel as they were when it was constructed.

    It holds no reference to the model: that would keep the model's entry in ``caches``, and so the model, alive.
    """

    def __init__(self, model: Any):
        self._weights = [*model.parameters(), *model.buffers()]
        self._cached_signature, self._position = self._signature(), model.tokens.position
        first = model.initial(1).tensors
        self._shapes = {name: (t.shape[1:], t.dtype) for name, t in first.items()}
        self._device = first["obs"].get_device()
        self._batch, self._sizes = -1, dict[str, torch.Size]()

    def _signature(self) -> tuple[Any, ...]:
        weights = self._weights
        return list(map(Tensor.data_ptr, weights)), any(map(_requires_grad, weights))

    def stale(self, model: Any) -> bool:
        """Whether since then a weight's storage was replaced, or a weight was unfrozen."""
        return model.tokens.position is not self._position or self._signature() != self._cached_signature

    def accepts(self, state: LatentState) -> bool:
        """Whether the state's tensors have this model's names, shapes, dtypes and device: kernels don't check them."""
        tensors = state.tensors
        if state.batch != self._batch:
            self._batch = state.batch
            self._sizes = {name: torch.Size((state.batch, *shape)) for name, (shape, _) in self._shapes.items()}
        return len(tensors) == len(self._shapes) and all(
            name in tensors
            and tensors[name].shape == self._sizes[name]
            and tensors[name].dtype is dtype
            and tensors[name].get_device() == self._device
            for name, (_, dtype) in self._shapes.items()
        )
