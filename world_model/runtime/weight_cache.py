"""What is made of a model's weights while they are frozen, and how it knows that they are others by now."""

from __future__ import annotations

from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from world_model.state import LatentState

_wanted = attrgetter("requires_grad")
made: WeakKeyDictionary[Any, WeightCache] = WeakKeyDictionary()  # of each model: on a CPU one form, on a GPU another


def forget(model: Any) -> None:
    """Its weights are others now."""
    made.pop(model, None)


class WeightCache:
    """The weights of one WorldModel as they are when it is made. It holds no model, which would never be let go."""

    def __init__(self, model: Any):
        self._weights = [*model.parameters(), *model.buffers()]
        self._known, self._place = self._signs(), model.tokens.position
        first = model.initial(1).tensors
        self._shapes = {name: (t.shape[1:], t.dtype) for name, t in first.items()}
        self._device = first["obs"].get_device()
        self._batch, self._sizes = -1, dict[str, torch.Size]()

    def _signs(self) -> tuple[Any, ...]:
        own = self._weights
        return list(map(Tensor.data_ptr, own)), any(map(_wanted, own))

    def stale(self, model: Any) -> bool:
        """Whether a weight's data were exchanged, or a weight was thawed, since."""
        return model.tokens.position is not self._place or self._signs() != self._known

    def takes(self, state: LatentState) -> bool:
        """Whether the state is one of this model's: who is asked next looks at no shape."""
        have = state.tensors
        if state.batch != self._batch:
            self._batch = state.batch
            self._sizes = {name: torch.Size((state.batch, *shape)) for name, (shape, _) in self._shapes.items()}
        return len(have) == len(self._shapes) and all(
            name in have
            and have[name].shape == self._sizes[name]
            and have[name].dtype is dtype
            and have[name].get_device() == self._device
            for name, (_, dtype) in self._shapes.items()
        )
