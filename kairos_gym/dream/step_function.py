"""A user's own reward and termination in a dream: functions of many steps at once, written in torch or in numpy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kairos_gym.dream.space_adapter import SpaceAdapter
from world_model.contract import Imagined, StepFn
from world_model.spaces import unflatten


class StepFunction:
    """Calls a user's function with tensors and, where its first call fails so, with numpy arrays from then on."""

    def __init__(self, name: str, function: StepFn):
        self.name, self.function = name, function
        self.in_numpy: bool | None = None  # unknown before the first call

    def __call__(self, obs: Any, action: Any, next_obs: Any, like: Tensor) -> Tensor:
        """The function's values of N steps -> [N], of the dtype and device of ``like`` [N].

        Raises ValueError where the function fails both in torch and in numpy, returns another shape or anything else
        than numbers (a termination: than bools), or is written in numpy where a gradient is wanted. Later calls raise
        what the function itself raises.
        """
        steps = (obs, action, next_obs)
        if torch.is_grad_enabled() and _requires_grad(steps):
            if self.in_numpy:
                raise ValueError(f"{self.name} is written in numpy, which passes no gradient on: write it in torch")
            return self._call(steps, like, False)
        if self.in_numpy is not None:
            return self._call(steps, like, self.in_numpy)
        try:
            values, self.in_numpy = self._call(steps, like, False), False
        except Exception as in_torch:
            try:
                values, self.in_numpy = self._call(steps, like, True), True
            except Exception as in_numpy:
                raise ValueError(
                    f"{self.name} fails, asked with tensors ({in_torch}) and with numpy arrays ({in_numpy})"
                ) from in_numpy
        return values

    def _call(self, steps: tuple[Any, Any, Any], like: Tensor, in_numpy: bool) -> Tensor:
        output = self.function(*(map(to_numpy, steps) if in_numpy else steps))
        values = torch.as_tensor(output, device=like.device)
        if values.shape != like.shape:
            raise ValueError(f"{self.name} must return one number a step, {list(like.shape)}, got {list(values.shape)}")
        if (values.dtype == torch.bool) != (like.dtype == torch.bool):
            raise ValueError(f"{self.name} must return {like.dtype}, got {values.dtype}")
        return values.to(like.dtype)


class StepFunctions:
    """``reward_fn`` and ``termination_fn`` of a dream, each a ``StepFn`` or None."""

    def __init__(self, adapter: SpaceAdapter, reward_fn: StepFn | None, termination_fn: StepFn | None):
        self.adapter = adapter
        self.reward = None if reward_fn is None else StepFunction("reward_fn", reward_fn)
        self.termination = None if termination_fn is None else StepFunction("termination_fn", termination_fn)

    def apply(self, imagined: Imagined, before: Tensor | None, actions: Tensor) -> Imagined:
        """Replace the model's rewards and terminations of actions [R,K,A], which began at ``before`` [R,O].

        Raises ValueError where an observation is missing.
        """
        if imagined.obs is None or before is None:
            raise ValueError("reward_fn and termination_fn judge observations, so no step may have decode=False")
        spec = self.adapter.spec
        path = self.adapter.clip(torch.cat([before[:, None], imagined.obs], 1))
        steps = (
            unflatten(spec.observation_space, path[:, :-1].flatten(0, 1)),
            unflatten(spec.action_space, actions.flatten(0, 1).clone()),  # the function may change its arguments
            unflatten(spec.observation_space, path[:, 1:].flatten(0, 1)),
        )
        reward, terminated = imagined.reward, imagined.terminated
        if self.reward is not None:
            reward = self.reward(*steps, reward.flatten()).view_as(reward)
        if self.termination is not None:
            terminated = self.termination(*steps, terminated.flatten()).view_as(terminated)
        return Imagined(imagined.obs, reward, terminated)


def _requires_grad(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.requires_grad
    return any(map(_requires_grad, x.values() if isinstance(x, dict) else x))


def to_numpy(x: Any) -> Any:
    """A tensor, or a dict of tensors, as numpy arrays, which share their memory on the CPU."""
    if isinstance(x, dict):
        return {key: to_numpy(part) for key, part in x.items()}
    return x.numpy(force=True)
