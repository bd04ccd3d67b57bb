"""SpaceAdapter: between elements of a simulator's spaces and the vectors that a model computes with."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from world_model.contract import Spec
from world_model.spaces import chunked, flatten, unflatten


class SpaceAdapter:
    """Converts for an env of ``spec`` whose step takes ``chunk`` actions."""

    def __init__(self, spec: Spec, chunk: int):
        self.spec, self.chunk = spec, chunk
        self._box = box = spec.observation_box
        self._low, self._high = _bounds(box)
        largest = torch.finfo(torch.float32).max  # so that an infinity is out of range too
        self._action_low, self._action_high = (x.clamp(-largest, largest) for x in _bounds(spec.action_box))
        self._is_discrete = isinstance(spec.action_space, spaces.Discrete)
        self._is_vector = isinstance(spec.observation_space, spaces.Box) and len(spec.observation_space.shape) == 1
        self._bounded = bool((np.isfinite(box.low) | np.isfinite(box.high)).any())

    @property
    def observation_space(self) -> spaces.Space:
        """The simulator's own; a copy, because a space holds a random generator."""
        return deepcopy(self.spec.observation_space)

    @property
    def action_space(self) -> spaces.Space:
        """The simulator's own, or with chunk > 1 that of K actions in a row; a copy."""
        single = self.spec.action_space
        return deepcopy(single) if self.chunk == 1 else chunked(single, self.chunk)

    def to_vectors(self, actions: NDArray[Any], rows: int, device: torch.device) -> Tensor:
        """R elements of the action space, in its dtype -> [R,K,A]. A copy, because a state may keep it."""
        if self._is_discrete:
            actions = flatten(self.spec.action_space, actions)
        vectors = torch.from_numpy(actions.reshape(rows, self.chunk, -1).astype(np.float32))
        return vectors if device.type == "cpu" else vectors.to(device)

    def contains_actions(self, actions: Tensor) -> bool:
        """Whether actions [...,A] are all within their bounds; NaN is not."""
        low, high = self._action_low.to(actions.device), self._action_high.to(actions.device)
        return torch.equal(actions.detach().clamp(low, high), actions)

    def clip(self, obs: Tensor) -> Tensor:
        """Observations [...,O], clipped to the observation space's finite bounds."""
        return obs.clamp(self._low.to(obs.device), self._high.to(obs.device)) if self._bounded else obs

    def to_observations(self, obs: NDArray[Any]) -> Any:
        """Vectors [...,O] -> elements of the observation space, copies clipped to its finite bounds."""
        space = self.spec.observation_space
        if self._bounded:
            obs = np.minimum(np.maximum(obs, self._box.low), self._box.high)
        else:
            obs = obs.astype(self._box.dtype)
        return obs if self._is_vector else _cast(space, unflatten(space, obs))

    def parse_options(self, options: dict[str, Any], lead: tuple[int, ...]) -> tuple[Tensor, Tensor | None] | None:
        """The real experience in reset ``options``: obs [R,T,O] and actions [R,T,A] or None; None without any.

        lead: the dimensions that come before those of a frame or of T frames, () or (B,).
        Raises ValueError where it is misshapen, not finite or outside the observation space, or an option is unknown.
        """
        spec, n = self.spec, len(lead)
        if unknown := sorted(set(options) - {"observation", "actions"}):
            raise ValueError(f"unknown reset options {unknown}; known are 'observation' and 'actions'")
        if "observation" not in options:
            if "actions" in options:
                raise ValueError("reset option 'actions' needs 'observation' [T,O]: what each action led to")
            return None
        obs = _flatten_option("observation", spec.observation_space, options["observation"])
        size = spec.observation_box.shape[0]
        row = ",".join(map(str, (*lead, size)))
        if obs.shape[-1:] != (size,) or obs.ndim - n not in (1, 2) or obs.shape[:n] != lead or not obs.size:
            rows = ",".join(map(str, (*lead, "T", size)))
            raise ValueError(f"reset option 'observation' must be [{row}] or [{rows}], got {list(obs.shape)}")
        box = self._box
        if (outside := (obs < box.low) | (obs > box.high)).any():
            raise ValueError(
                f"reset option 'observation' is outside the observation space at {np.argwhere(outside)[0]}"
            )
        if obs.ndim == n + 1:
            if "actions" in options:
                raise ValueError(f"reset option 'actions' goes with an 'observation' of [...,T,O]; this one is [{row}]")
            return torch.from_numpy(obs.reshape(-1, 1, size)), None
        expected = (*obs.shape[:-1], spec.action_box.shape[0])
        actions = _flatten_option("actions", spec.action_space, options["actions"]) if "actions" in options else None
        if actions is None or actions.shape != expected:
            raise ValueError(
                f"an 'observation' of {list(obs.shape)} needs 'actions' {list(expected)}, the action that led to each; "
                f"got {'none' if actions is None else list(actions.shape)}"
            )
        return tuple(torch.from_numpy(x.reshape(-1, *x.shape[-2:])) for x in (obs, actions))  # type: ignore[return-value]


def _cast(space: spaces.Space, obs: Any) -> Any:
    """An observation with each part in the dtype of its space."""
    if isinstance(space, spaces.Dict):
        return {key: _cast(part, obs[key]) for key, part in space.items()}
    return obs.astype(space.dtype, copy=False)


def _bounds(box: spaces.Box) -> tuple[Tensor, Tensor]:
    low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (box.low, box.high))
    return low, high


def _flatten_option(name: str, space: spaces.Space, values: Any) -> NDArray[np.float32]:
    try:
        array = flatten(space, values).astype(np.float32)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"reset option {name!r} must be made of elements of {space}, got {values!r}: {error}"
        ) from error
    if not np.isfinite(array).all():
        raise ValueError(f"reset option {name!r} must be finite, got {array.tolist()}")
    return array
