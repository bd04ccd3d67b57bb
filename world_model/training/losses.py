"""The losses: functions of a model and a batch, for any loop that trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from world_model.model.draft import beta_nll
from world_model.model.world_model import WorldModel
from world_model.ops.flow import corrupt, velocity_loss
from world_model.ops.linear import Layer, chain
from world_model.training.batches import Chunks, Transitions

Losses = dict[str, Tensor]  # each []; their sum is what is minimised
Forward = Callable[[str, Sequence[Layer], list[Tensor]], Tensor]
"""``(name, layers, parts) -> output``: the layers of one MLP, applied to its input in parts side by side."""


def plain_forward(name: str, layers: Sequence[Layer], parts: list[Tensor]) -> Tensor:
    return chain(torch.cat(parts, -1), layers)


def transition_losses(model: WorldModel, batch: Transitions, forward: Forward = plain_forward) -> Losses:
    """Of the draft and the reward head, on single steps.

    forward: runs an MLP; a loop may give a faster one (``world_model.ops.linear.PreallocatedMLP``).
    """
    scaling = model.scaling
    change = (batch.next_obs - batch.obs) / scaling.step_std
    inputs = [batch.obs, batch.action, change, batch.next_obs]
    predicted = forward("reward_head", model.reward_head.chain(), inputs)
    losses = _reward_losses(model, predicted, batch.reward, batch.terminated, torch.ones_like(batch.reward))
    if model.draft is not None:
        inputs = [batch.obs, batch.action] + ([] if batch.last_change is None else [batch.last_change])
        mean, log_var = model.draft.read(forward("draft", model.draft.layers(), inputs))
        # A dream is cut off at the bounds, so a prediction beyond a bound on which the truth lies is no error.
        # (Pendulum's speed stops dead at its limit: without this the draft spends itself on that corner.)
        right = scaling.limit(batch.obs + scaling.step_std * mean) == batch.next_obs
        losses["draft"] = beta_nll(torch.where(right, change, mean), log_var, change)
    return losses


def chunk_losses(model: WorldModel, batch: Chunks) -> Losses:
    """Of the transformer and what it adds to the reward head, on denoised chunks (flow matching)."""
    target, start, actions = map(batch.in_chunks, (batch.obs[:, 1:], batch.obs[:, :-1], batch.actions[:, 1:]))
    clean = (target - batch.draft.mean) / batch.draft.scale
    first = torch.zeros(batch.obs.shape[:2], dtype=torch.bool)
    first[:, 0] = True
    z = corrupt(clean, batch.noise, batch.level)
    residual, features, _ = model.refine(
        batch.layout, z, batch.level, batch.draft, actions, (batch.obs, batch.actions, first)
    )
    flow = velocity_loss(residual, clean, batch.level).mean(-1)
    with torch.no_grad():
        base = model.predict_reward(start, actions, target, None)
    predicted = base + model.memory_reward_head(features)
    rewards = _reward_losses(model, predicted, batch.reward, batch.terminated, batch.valid)
    return {"flow": _mean(flow, batch.valid), **rewards}


def _reward_losses(model: WorldModel, predicted: Tensor, reward: Tensor, terminated: Tensor, weight: Tensor) -> Losses:
    """predicted [...,2]: normalised reward and logit of termination; the others [...]."""
    scaling = model.scaling
    error = predicted[..., 0] - (reward - scaling.reward_mean) / scaling.reward_std
    losses = {"reward": _mean(error.square(), weight)}
    if model.terminates:
        cross = F.binary_cross_entropy_with_logits(predicted[..., 1], terminated.float(), reduction="none")
        losses["terminated"] = _mean(cross, weight)
    return losses


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sum() / weight.sum()
