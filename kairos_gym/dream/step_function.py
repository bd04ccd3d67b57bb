"""A user's own reward and termination in a dream: functions of whole batches, written in torch or in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

StepFn = Callable[[Any, Any, Any], Any]
"""``(obs, action, next_obs) -> [N]`` for N simulator steps at once; a reward each, or whether the episode ends there.

obs and next_obs are elements of the observation space, stacked [N,...], within its bounds; action those of the
simulator's single action space.
"""


class StepFunction:
    """Asks a user's function in torch and, where that fails at the first time, in numpy from then on."""

    def __init__(self, name: str, function: StepFn):
        if not callable(function):
            raise TypeError(f"{name} must be a function (obs, action, next_obs) -> [N], got {function!r}")
        self.name, self.function = name, function
        self.in_numpy: bool | None = None  # not known before the first call

    def __call__(self, obs: Any, action: Any, next_obs: Any, like: Tensor) -> Tensor:
        """What it says of N steps -> [N], of the dtype and device of ``like`` [N].

        Raises ValueError where the function fails both in torch and in numpy, returns another shape or something else
        than numbers (of a termination: than bools), or passes no gradient on where one is wanted; what it raises itself
        later on.
        """
        steps = (obs, action, next_obs)
        if torch.is_grad_enabled() and _wants_gradient(steps):
            if self.in_numpy:
                raise ValueError(f"{self.name} is written in numpy, which passes no gradient on: write it in torch")
            return self._ask(steps, like, False)
        if self.in_numpy is not None:
            return self._ask(steps, like, self.in_numpy)
        try:
            said, self.in_numpy = self._ask(steps, like, False), False
        except Exception as in_torch:
            try:
                said, self.in_numpy = self._ask(steps, like, True), True
            except Exception as in_numpy:
                raise ValueError(
                    f"{self.name} fails, asked with tensors ({in_torch}) and with numpy arrays ({in_numpy})"
                ) from in_numpy
        return said

    def _ask(self, steps: tuple[Any, Any, Any], like: Tensor, in_numpy: bool) -> Tensor:
        answer = self.function(*(map(to_numpy, steps) if in_numpy else steps))
        said = torch.as_tensor(answer, device=like.device)
        if said.shape != like.shape:
            raise ValueError(f"{self.name} must return one number a step, {list(like.shape)}, got {list(said.shape)}")
        if (said.dtype == torch.bool) != (like.dtype == torch.bool):
            raise ValueError(f"{self.name} must return {like.dtype}, got {said.dtype}")
        return said.to(like.dtype)


def _wants_gradient(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.requires_grad
    return any(map(_wants_gradient, x.values() if isinstance(x, dict) else x))


def to_numpy(x: Any) -> Any:
    """A tensor, or a dict of tensors, as numpy arrays, which share their memory on the CPU."""
    if isinstance(x, dict):
        return {key: to_numpy(part) for key, part in x.items()}
    return x.numpy(force=True)
