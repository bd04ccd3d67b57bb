"""Gymnasium spaces as the flat vectors of a model, and back; what an action of a space must be."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


def parts_by_name(space: spaces.Dict) -> list[tuple[str, spaces.Space]]:
    """The parts of a Dict in the order in which a vector holds them.

    By name, since two spaces with the same parts may list them in another order: Gymnasium sorts what it is given as a
    dict, and keeps the order of what it is given as a list.
    """
    return sorted(space.items())


def flat_box(space: spaces.Space) -> spaces.Box:
    """``space`` as a Box [n]: a Box flattened, a Discrete one-hot, a Dict's parts concatenated by name."""
    if isinstance(space, spaces.Dict):
        space = spaces.Dict([(name, flat_box(part)) for name, part in parts_by_name(space)])
    box = spaces.utils.flatten_space(space)
    assert isinstance(box, spaces.Box)
    return box


def alike(one: spaces.Space, other: spaces.Space) -> bool:
    """Whether two spaces have the same kinds of parts and the same shapes; their bounds may differ."""
    if isinstance(one, spaces.Dict) and isinstance(other, spaces.Dict):
        return set(one) == set(other) and all(alike(part, other[name]) for name, part in one.items())
    if isinstance(one, spaces.Discrete) and isinstance(other, spaces.Discrete):
        return bool(one.n == other.n and one.start == other.start)
    return type(one) is type(other) and one.shape == other.shape


def flatten(space: spaces.Space, values: Any) -> NDArray[Any]:
    """Elements of ``space``, stacked along any leading dimensions [...] -> vectors [...,n].

    Raises ValueError for another shape, KeyError for a missing part of a Dict.
    """
    if isinstance(space, spaces.Dict):
        return np.concatenate([flatten(part, values[name]) for name, part in parts_by_name(space)], -1)
    array = np.asarray(values)
    if isinstance(space, spaces.Discrete):
        return (array[..., None] == np.arange(space.start, space.start + space.n)).astype(np.float32)
    assert isinstance(space, spaces.Box)
    lead = array.ndim - len(space.shape)
    if lead < 0 or array.shape[lead:] != space.shape:
        raise ValueError(f"expected the shape [...,{','.join(map(str, space.shape))}], got {list(array.shape)}")
    return array.reshape(*array.shape[:lead], space.low.size)


def unflatten(space: spaces.Space, flat: Any) -> Any:
    """A numpy array or a tensor [...,n] -> elements of ``space``, stacked along the leading dimensions [...].

    The dtype stays, except for a Discrete: the largest of its n numbers decides which integer it is.
    """
    if isinstance(space, spaces.Dict):
        parts, start = {}, 0
        for name, part in parts_by_name(space):
            end = start + spaces.utils.flatdim(part)
            parts[name], start = unflatten(part, flat[..., start:end]), end
        return {name: parts[name] for name in space}
    if isinstance(space, spaces.Discrete):
        return flat.argmax(-1) + int(space.start)
    assert space.shape is not None
    return flat.reshape(*flat.shape[:-1], *space.shape)


def chunked(space: spaces.Space, chunk: int) -> spaces.Space:
    """The space of K = ``chunk`` actions in a row: Box [K,...] for Box [...], MultiDiscrete [K] for Discrete."""
    if isinstance(space, spaces.Discrete):
        return spaces.MultiDiscrete([space.n] * chunk, start=[space.start] * chunk)
    assert isinstance(space, spaces.Box)
    low, high = (np.repeat(bound[None], chunk, axis=0) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.low.dtype.type)


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """A space with its exact bounds; an infinite one is None, since JSON has no infinity."""
    if isinstance(space, spaces.Dict):
        return {"parts": {name: space_to_json(part) for name, part in space.items()}}
    if isinstance(space, spaces.Discrete):
        return {"n": int(space.n), "start": int(space.start)}
    assert isinstance(space, spaces.Box)
    low, high = ([float(x) if np.isfinite(x) else None for x in bound.flat] for bound in (space.low, space.high))
    return {"low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}


def space_from_json(facts: dict[str, Any]) -> spaces.Space:
    """Inverse of ``space_to_json``."""
    if "parts" in facts:
        return spaces.Dict([(name, space_from_json(part)) for name, part in facts["parts"].items()])
    if "n" in facts:
        return spaces.Discrete(facts["n"], start=facts["start"])
    dtype, shape = np.dtype(facts["dtype"]).type, facts.get("shape", [len(facts["low"])])
    low = np.array([-np.inf if x is None else x for x in facts["low"]], dtype).reshape(shape)
    high = np.array([np.inf if x is None else x for x in facts["high"]], dtype).reshape(shape)
    return spaces.Box(low, high, dtype=dtype)


class ActionCheck:
    """Checks actions of ``space``: a Box of real numbers, a Discrete or a MultiDiscrete.

    Calling it with an action returns an array of the space's dtype. Only overshoot by rounding errors is clipped: it
    raises TypeError for anything but real (or whole) numbers, and ValueError for a wrong shape, NaN, infinity or a
    number out of range.
    """

    def __init__(self, space: spaces.Space):
        self.space, self.shape, self.dtype = space, space.shape, space.dtype
        if isinstance(space, spaces.Discrete):
            low, high = space.start, space.start + space.n - 1
        elif isinstance(space, spaces.MultiDiscrete):
            low, high = space.start, space.start + space.nvec - 1
        else:
            assert isinstance(space, spaces.Box)
            low, high = space.low, space.high
        assert self.dtype is not None
        self.real = self.dtype.kind == "f"
        if self.real:  # finite bounds, so that infinity is out of range too
            largest = np.finfo(self.dtype).max
            low, high = np.maximum(low, -largest), np.minimum(high, largest)
        self.low, self.high = np.broadcast_arrays(low, high)

    def __call__(self, action: Any) -> NDArray[Any]:
        given = checked = np.asarray(action)
        if given.dtype is not self.dtype:
            if given.dtype.kind not in ("fiu" if self.real else "iu"):
                kind = "real" if self.real else "whole"
                form = f"{self.dtype} {self.shape}"
                raise TypeError(f"actions must be {kind} numbers, {form}, got {given.dtype}: {action!r}")
            with np.errstate(over="ignore"):
                # Cast before the comparison: 1 + 1e-12 in float64 is the same action as 1.
                checked = given.astype(self.dtype)
        if given.shape != self.shape:
            raise ValueError(f"actions must have the shape {self.shape} of the action space, got {given.shape}")
        good = np.minimum(np.maximum(checked, self.low), self.high) == checked  # False for NaN
        if np.count_nonzero(good) < good.size:
            clipped = self._within_rounding(checked)
            if clipped is not None:
                return clipped
            at = tuple(int(i) for i in np.argwhere(~good)[0])
            value = given[at]
            if not np.isfinite(value):
                raise ValueError(f"actions must be finite, got {value} at {at}: look for a NaN in what chose them")
            raise ValueError(
                f"action {value} at {at} is outside [{self.low[at]}, {self.high[at]}]: clip or rescale actions to the "
                "action space before the step"
            )
        return checked

    def _within_rounding(self, action: NDArray[Any]) -> NDArray[Any] | None:
        """The action clipped to its bounds if it overshoots them by no more than rescaling rounds off, else None."""
        if not self.real or not np.isfinite(action).all():
            return None
        assert self.dtype is not None
        size, info = np.maximum(np.abs(self.low), np.abs(self.high)), np.finfo(self.dtype)
        slack = 4 * info.eps * np.where(size < info.max, size, 0)
        near = ((action >= self.low - slack) & (action <= self.high + slack)).all()
        return np.minimum(np.maximum(action, self.low), self.high) if near else None
