"""Reward functions and success of robosuite's Lift for planners: of flat observations, in torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from world_model.contract import StepFn

TABLE = 0.8  # m, the height of Lift's table
LIFTED = TABLE + 0.04  # m, robosuite's: a cube above it is lifted
RESTING = TABLE + 0.022  # m, the height of the largest cube's middle on the table


def simple_lift(fields: Mapping[str, slice]) -> StepFn:
    """Reach, grasp and lift, by any way -> reward_fn(obs [...,O], action [...,A], next_obs [...,O]) -> reward [...].

    -1 for each 10 cm of distance to the cube, up to 0.5 for fingers closed around it, 3 for 6 cm of height.
    fields: those of the env, ``gym.make("robosuite/Lift-v0").unwrapped.fields``.
    """

    def reward(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        distance = (next_obs[..., fields["eef_pos"]] - next_obs[..., fields["cube_pos"]]).norm(dim=-1)
        closed = _closed(next_obs, fields)
        return (
            3 * _height(next_obs, fields, 0.06) + 0.5 * closed * torch.exp(-((distance / 0.02) ** 2)) - distance / 0.1
        )

    return reward


def staged_lift(fields: Mapping[str, slice]) -> StepFn:
    """Lift stage by stage -> reward_fn(obs [...,O], action [...,A], next_obs [...,O]) -> reward [...].

    Move above the cube with the fingers open, the hand upright and turned to its faces; go down right above it; close
    once it is between the fingers; rise. Each stage has a higher reward than the one before: about -3 far away, 0
    around the cube, 1 with closed fingers, up to 5 for 10 cm of height. fields: as for ``simple_lift``.
    """

    def reward(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        offset = next_obs[..., fields["eef_pos"]] - next_obs[..., fields["cube_pos"]]
        beside, above = offset[..., :2].norm(dim=-1), offset[..., 2]
        hand, cube = _matrix(next_obs[..., fields["eef_quat"]]), _matrix(next_obs[..., fields["cube_quat"]])
        tilted = 1 + hand[..., 2, 2]  # the hand's z axis should point down
        # The angle between the fingers' closing direction and the cube's axes; 0 along any of them.
        askew = 2 * (1 - (cube.mT @ hand[..., :1]).pow(4).sum((-2, -1)))
        closed = _closed(next_obs, fields)
        aligned = torch.exp(-((beside / 0.02) ** 2))
        around = aligned * torch.exp(-((above / 0.02) ** 2))
        reach = (beside + (above - 0.06 * (1 - aligned)).abs()) / 0.1
        penalty = reach + 2 * tilted + 0.4 * askew + 0.6 * closed * (1 - around)
        return closed * around + 4 * aligned * _height(next_obs, fields, 0.1) - penalty

    return reward


def lifted(obs: Tensor, fields: Mapping[str, slice]) -> Tensor:
    """Whether the cube is lifted in obs [...,O] -> bool [...]: robosuite's own rule."""
    return obs[..., fields["cube_pos"]][..., 2] > LIFTED


def _closed(obs: Tensor, fields: Mapping[str, slice]) -> Tensor:
    """How far the fingers are commanded to close, [...] from 0 to 1."""
    return (1 + obs[..., fields["gripper_action"]][..., 0]) / 2


def _height(obs: Tensor, fields: Mapping[str, slice], full: float) -> Tensor:
    """The cube's height over the table, [...] from 0 to 1 at ``full`` m."""
    return ((obs[..., fields["cube_pos"]][..., 2] - RESTING) / full).clamp(0, 1)


def _matrix(quat: Tensor) -> Tensor:
    """The rotation matrices [...,3,3] of quaternions [...,4] (x, y, z, w), normalised: dreamed ones drift."""
    x, y, z, w = (quat / quat.norm(dim=-1, keepdim=True).clamp_min(1e-6)).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    return torch.stack(rows, -2)
