"""LatentState: the whole past of B dreams in a constant number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from safetensors.torch import load, save
from torch import Tensor


class LatentState:
    """Named tensors, each [B, ...], read-only by convention: every operation makes a new state.

    The same class holds a model's memory and a simulator's (qpos, qvel, ...); nothing here depends on what the tensors
    mean. Tensors without a common batch dimension raise ValueError.
    """

    __slots__ = ("__weakref__", "tensors")

    tensors: Mapping[str, Tensor]

    def __init__(self, tensors: Mapping[str, Tensor]):
        tensors = dict(tensors)
        sizes = {t.size(0) if t.ndim else None for t in tensors.values()}
        if len(sizes) != 1 or None in sizes:
            shapes = {name: tuple(t.shape) for name, t in tensors.items()}
            raise ValueError(f"every tensor of a state needs the same leading batch dimension, got {shapes}")
        object.__setattr__(self, "tensors", MappingProxyType(tensors))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a LatentState is immutable: make a new one with replace(...)")

    def __reduce__(self) -> tuple[type[LatentState], tuple[dict[str, Tensor]]]:
        return LatentState, (dict(self.tensors),)  # a mapping proxy can neither be copied nor pickled

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def batch(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def replace(self, **tensors: Tensor) -> LatentState:
        """The same state with some tensors replaced."""
        return LatentState({**self.tensors, **tensors})

    def select(self, rows: Tensor) -> LatentState:
        """The dreams at ``rows``, int64 [R] -> LatentState of R dreams."""
        return LatentState({name: t[rows] for name, t in self.tensors.items()})

    def expand(self, n: int) -> LatentState:
        """Each dream n times in a row -> LatentState of B*n dreams."""
        return LatentState({name: t.repeat_interleave(n, dim=0) for name, t in self.tensors.items()})

    def put(self, rows: Tensor, other: LatentState) -> LatentState:
        """Replace the dreams at ``rows``, int64 [R], no repeats, by the R dreams of ``other`` -> LatentState."""
        return LatentState({name: t.index_copy(0, rows.to(t.device), other[name]) for name, t in self.tensors.items()})

    def detach(self) -> LatentState:
        """The same state, cut from the graph that autograd recorded."""
        return LatentState({name: t.detach() for name, t in self.tensors.items()})

    def to_bytes(self) -> bytes:
        """A self-contained safetensors blob, from which ``from_bytes`` restores the state bit for bit."""
        return save({name: t.detach().cpu().contiguous() for name, t in self.tensors.items()})

    @classmethod
    def from_bytes(cls, blob: bytes, device: torch.device | str = "cpu") -> LatentState:
        """Restore what ``to_bytes`` saved. Raises ValueError where ``blob`` is truncated or no state at all."""
        try:
            return cls({name: t.to(device) for name, t in load(blob).items()})
        except Exception as error:
            raise ValueError(f"these {len(blob)} bytes are not a whole saved state: {error}") from error
