"""Snapshots: everything that the future of some dreams depends on, as bytes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor


@dataclass
class Progress:
    """Where each of B dreams stands, beside what the model remembers of it. All fields are [B]."""

    seed: NDArray[np.int64]  # with ``episode`` it determines the start and the noise
    episode: NDArray[np.int64]  # episodes since the seed was set; -1 before the first
    age: NDArray[np.int64]  # simulator steps since the episode began
    ended: NDArray[np.bool_]  # True also before the first episode
    uncertainty: NDArray[np.float32]  # see ``world_model.conformal``; NaN where no error bound was wanted

    @classmethod
    def initial(cls, batch: int) -> Progress:
        """B dreams that have not begun."""
        zeros, nan = np.zeros(batch, np.int64), np.full(batch, np.nan, np.float32)
        return cls(zeros, np.full(batch, -1), zeros.copy(), np.ones(batch, bool), nan)

    def select(self, rows: NDArray[np.int64]) -> Progress:
        """A copy of some rows, [R]; repeats allowed."""
        return Progress(**{name: column[rows] for name, column in vars(self).items()})

    def put(self, rows: NDArray[np.int64], other: Progress) -> None:
        """Overwrite ``rows`` [R] with the R rows of ``other``."""
        for name, column in vars(self).items():
            column[rows] = getattr(other, name)


@dataclass
class Snapshot:
    """R dreams without the weights, which ``fingerprint`` names."""

    fingerprint: str
    state: bytes  # ``State.to_bytes``
    progress: Progress
    obs: Tensor | None  # the present observations [R,O]; None where some were not decoded

    def to_bytes(self) -> bytes:
        """safetensors after a checksum of four bytes."""
        tensors = {name: torch.from_numpy(column) for name, column in vars(self.progress).items()}
        tensors |= {"state": _as_tensor(self.state), "model": _as_tensor(self.fingerprint.encode())}
        if self.obs is not None:
            tensors["obs"] = self.obs.detach().cpu().contiguous()
        body = save_tensors(tensors)
        return zlib.crc32(body).to_bytes(4, "little") + body

    @classmethod
    def from_bytes(cls, blob: bytes) -> Snapshot:
        """Raises TypeError for anything but bytes, ValueError where they are damaged or cut short."""
        if not isinstance(blob, bytes):
            raise TypeError(f"a snapshot is bytes, got {type(blob).__name__}")
        try:
            if len(blob) < 4 or zlib.crc32(blob[4:]) != int.from_bytes(blob[:4], "little"):
                raise ValueError("its checksum is wrong")
            tensors: dict[str, Any] = load_tensors(blob[4:])
            columns = {name: tensors[name].numpy() for name in Progress.__dataclass_fields__}
            state, model = (bytes(tensors[name].numpy()) for name in ("state", "model"))
            return cls(model.decode(), state, Progress(**columns), tensors.get("obs"))
        except Exception as error:
            raise ValueError(f"this is not a whole snapshot: {error}") from error


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
