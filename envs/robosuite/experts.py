"""Scripted closed-loop experts for robosuite's Lift, Stack and Door, with noise and failures to recover from."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.robosuite.env import RobosuiteEnv

Array = NDArray[Any]
FAILURES = (None, "offset", "drop")
OPEN, CLOSE = -1.0, 1.0
STEP, TURN = 0.05, 0.5  # m and rad that an action of 1 commands; the arm moves about a quarter of it in one step
GAIN = 3.0
HOVER = 0.08  # m above an object, where the open hand turns until it is aligned
UNLOCKED = 1.2  # rad, of the door's latch
UP = np.array([0.0, 0.0, 1.0])
RESTING = 0.045  # m between the middles of Stack's cubes, one on the other
CLOSED = 0.5  # gripper_action from which the fingers press


class Expert:
    """A policy for one episode: flat observation [O] -> action [A], of the controller OSC_POSE.

    Each action depends on the present observation alone, so the expert recovers from any disturbance.

    Args:
        env: Lift, Stack or Door with flat observations.
        noise: std of Gaussian noise on the arm's numbers of the action (in their range of [-1,1]).
        failure: None; "offset" aims 3 cm beside the object at first, so that the hand presses on it, misses or pushes
            it; "drop" opens the hand for some steps in the middle. The expert recovers from both.
        seed: of the noise and of when and where the failure happens.

    Raises ValueError for another task or controller, Dict observations, a negative noise, or an unknown failure.
    """

    def __init__(self, env: gym.Env, *, noise: float = 0.0, failure: str | None = None, seed: int = 0):
        sim = env.unwrapped
        if not isinstance(sim, RobosuiteEnv) or sim.task not in EXPERTS:
            raise ValueError(f"there are experts for {', '.join(EXPERTS)}, not for {getattr(sim, 'task', sim)}")
        if sim.controller != "OSC_POSE" or not isinstance(sim.observation_space, gym.spaces.Box):
            raise ValueError(
                "experts see flat observations and act by controller='OSC_POSE', got "
                f"{type(sim.observation_space).__name__} observations and {sim.controller!r}"
            )
        if not 0 <= noise < np.inf:
            raise ValueError(f"noise is a standard deviation, from 0 on, got {noise!r}")
        if failure not in FAILURES:
            raise ValueError(f"failure must be one of {', '.join(map(str, FAILURES))}, got {failure!r}")
        self.fields, self._decide = sim.fields, EXPERTS[sim.task]
        self._noise, self._failure, self._rng = noise, failure, np.random.default_rng(seed)
        self._step = 0
        self._drop_step = int(self._rng.integers(17, 29))  # when the object is held or nearly so
        angle = self._rng.uniform(0, 2 * np.pi)
        self._aim_error = 0.03 * np.array([np.cos(angle), np.sin(angle), 0.0])  # m

    def __call__(self, obs: Array) -> NDArray[np.float32]:
        """The next action of the episode, with the noise."""
        action = self.act(obs, self._step).astype(np.float64)
        self._step += 1
        action[:-1] += self._noise * self._rng.standard_normal(len(action) - 1)
        return np.clip(action, -1, 1).astype(np.float32)

    def act(self, obs: Array, step: int) -> NDArray[np.float32]:
        """The action [A] after ``step`` steps, without the noise: a pure function of the arguments."""
        fields = {name: np.asarray(obs[part], dtype=np.float64) for name, part in self.fields.items()}
        if self._failure == "offset" and step < 30:
            fields["eef_pos"] = fields["eef_pos"] + self._aim_error
        action = self._decide(fields)
        if self._failure == "drop" and self._drop_step <= step < self._drop_step + 12:
            action[-1] = OPEN
        return np.clip(action, -1, 1).astype(np.float32)


def _lift(fields: dict[str, Array]) -> Array:
    """Hover above the cube, turn to it, go down, close, rise."""
    upright = _upright(fields, "cube")
    if _holds(fields, "cube"):
        return _action(fields, 0.1 * UP, upright, CLOSE)
    return _grasp(fields, fields["cube_pos"], upright, UP)


def _stack(fields: dict[str, Array]) -> Array:
    """Grasp cube A as in Lift, carry it over cube B, lower it, let go."""
    upright = _upright(fields, "cubeA")
    offset = fields["cubeB_pos"] - fields["cubeA_pos"]
    beside, rise = float(np.hypot(*offset[:2])), -float(offset[2])
    if beside < 0.02 and 0.03 < rise < RESTING + 0.006:
        return _action(fields, np.zeros(3), upright, OPEN)
    if not _holds(fields, "cubeA"):
        return _grasp(fields, fields["cubeA_pos"], upright, UP)
    if beside > 0.04 and rise < 0.07:
        move = (0.1 - rise) * UP
    elif beside > 0.008:
        move = offset + 0.09 * UP
    else:
        move = offset + (RESTING - 0.003) * UP
    return _action(fields, move, upright, CLOSE)


def _door(fields: dict[str, Array]) -> Array:
    """Grasp the handle from the front, turn it down around its axis, pull."""
    hinge, latch = fields["hinge"][0], fields["latch"][0]
    frame = _matrix(fields["frame_quat"])
    cos, sin = np.cos(hinge), np.sin(hinge)
    away = np.array([-cos * frame[0, 0] + sin * frame[1, 0], -sin * frame[0, 0] - cos * frame[1, 0], 0.0])
    level = np.cross(UP, away)  # from the handle's axis to its tip, while it is level
    down = -np.sin(latch) * level - np.cos(latch) * UP  # the direction in which the tip turns
    towards = np.stack([down, np.cross(-away, down), -away], axis=1)
    offset = fields["handle_pos"] - fields["eef_pos"]
    if fields["gripper_action"][0] > CLOSED and np.linalg.norm(offset) < 0.05:
        turning = hinge < 0.02 and latch < UNLOCKED
        return _action(fields, offset + 0.04 * (down if turning else away), towards, CLOSE)
    return _grasp(fields, fields["handle_pos"], towards, away)


EXPERTS = {"Lift": _lift, "Stack": _stack, "Door": _door}


def _holds(fields: dict[str, Array], name: str) -> bool:
    """Whether the closed fingers are around the object."""
    offset = fields[f"{name}_pos"] - fields["eef_pos"]
    return bool(fields["gripper_action"][0] > CLOSED and np.hypot(*offset[:2]) < 0.03 and abs(offset[2]) < 0.02)


def _grasp(fields: dict[str, Array], target: Array, rotation: Array, out: Array) -> Array:
    """The next action of a grasp at ``target`` [3], approached against the direction ``out`` [3]."""
    offset = target - fields["eef_pos"]
    along = -float(offset @ out)
    beside = float(np.linalg.norm(offset + along * out))
    turned = np.linalg.norm(_turn(fields["eef_quat"], rotation)) < 0.2
    if beside < 0.015 and abs(along) < 0.012:
        return _action(fields, offset, rotation, CLOSE)
    if beside < (0.02 if along < HOVER / 2 else 0.012) and turned:
        return _action(fields, offset, rotation, OPEN)
    # Back off first where the fingers would hit the object from the side.
    low = along < HOVER / 2 and beside > 0.02
    return _action(fields, (HOVER - along) * out if low else offset + HOVER * out, rotation, OPEN)


def _action(fields: dict[str, Array], move: Array, rotation: Array, gripper: float) -> Array:
    """The action that moves the hand by ``move`` [3] (m) and turns it towards the rotation matrix [3,3]."""
    turn = _turn(fields["eef_quat"], rotation)
    return np.concatenate([np.clip(GAIN * move / STEP, -1, 1), np.clip(GAIN * turn / TURN / 2, -1, 1), [gripper]])


def _turn(quat: Array, rotation: Array) -> Array:
    """Nearly the rotation vector [3] (rad) from a quaternion to a rotation matrix; exact in the limit of small ones."""
    return np.cross(_matrix(quat), rotation, axis=0).sum(axis=1) / 2


def _upright(fields: dict[str, Array], name: str) -> Array:
    """The rotation [3,3] nearest to the hand's that points down and closes the fingers on a cube's upright faces."""
    cube, hand = _matrix(fields[f"{name}_quat"])[:, 0], _matrix(fields["eef_quat"])[:, 0]
    now = np.arctan2(hand[1], hand[0])
    yaw = now + (np.arctan2(cube[1], cube[0]) - now + np.pi / 4) % (np.pi / 2) - np.pi / 4
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, sin, 0.0], [sin, -cos, 0.0], [0.0, 0.0, -1.0]])


def _matrix(quat: Array) -> Array:
    """The rotation matrix [3,3] of a quaternion (x, y, z, w)."""
    x, y, z, w = quat / np.linalg.norm(quat)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
