"""The fields of robosuite's observations: what is read of the arm, its gripper and each task's objects."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import mujoco
except ImportError:  # robosuite brings it along: the error is raised where an env is made
    mujoco = None

Fields = dict[str, NDArray[np.float64]]  # name -> [n], in the order of a flat observation


def read_fields(task: str, sim: Any, model: Any, data: Any, gripper_action: float | None) -> Fields:
    """The observation of robosuite's own env ``sim`` as it stands, with MuJoCo's ``model`` and ``data``.

    gripper_action: the count of past gripper commands, from -1 (open) to 1 (closed); None without a gripper.
    """
    robot = sim.robots[0]
    fields = _hand_fields(robot, model, data)
    if gripper_action is not None:
        fields["gripper_action"] = np.array([gripper_action])
    fields |= _task_fields(task, sim, data)
    fields["joint_pos"] = data.qpos[robot._ref_joint_pos_indexes]
    fields["joint_vel"] = data.qvel[robot._ref_joint_vel_indexes]
    if gripper_action is not None:
        fields["gripper_qpos"] = data.qpos[robot._ref_gripper_joint_pos_indexes["right"]]
        fields["gripper_qvel"] = data.qvel[robot._ref_gripper_joint_vel_indexes["right"]]
    return fields


def _hand_fields(robot: Any, model: Any, data: Any) -> Fields:
    """The middle between the finger tips, and an orientation: z along the fingers, x the way they close."""
    site = robot.eef_site_id["right"]
    body, quat = model.site_bodyid[site], np.empty(4)
    # From the bodies' quaternions, not from a matrix: those never jump from q to -q.
    mujoco.mju_mulQuat(quat, data.xquat[body], model.site_quat[site])
    return {"eef_pos": data.site_xpos[site], "eef_quat": _xyzw(quat)}


def _task_fields(task: str, sim: Any, data: Any) -> Fields:
    """The fields of the task's objects."""
    match task:
        case "Lift":
            return _body_fields("cube", sim.cube, data) | {"cube_size": np.array(sim.cube.size)}
        case "Stack":
            return _body_fields("cubeA", sim.cubeA, data) | _body_fields("cubeB", sim.cubeB, data)
        case "Door":
            hinge, latch = (data.joint(name) for name in sim.door.joints)
            frame = data.body(sim.door.root_body)
            return {
                "hinge": np.append(hinge.qpos, hinge.qvel),
                "latch": np.append(latch.qpos, latch.qvel),
                "handle_pos": data.site_xpos[sim.door_handle_site_id],
                "frame_pos": frame.xpos,
                "frame_quat": _xyzw(frame.xquat),
            }
        case "Wipe":
            markers = sim.model.mujoco_arena.markers
            positions = [data.body(marker.root_body).xpos for marker in markers]
            return {
                "dirt_pos": np.concatenate(positions),
                "dirt_wiped": np.array([float(marker in sim.wiped_markers) for marker in markers]),
            }
    objects = sim.nuts if task == "NutAssembly" else sim.objects
    return {name: field for obj in objects for name, field in _body_fields(obj.name.lower(), obj, data).items()}


def _body_fields(name: str, obj: Any, data: Any) -> Fields:
    """The fields of an object that moves freely."""
    joint = data.joint(obj.joints[0])
    return {f"{name}_pos": joint.qpos[:3], f"{name}_quat": _xyzw(joint.qpos[3:]), f"{name}_vel": joint.qvel}


def _xyzw(quat: NDArray[np.float64]) -> NDArray[np.float64]:
    """MuJoCo's quaternion (w, x, y, z) in robosuite's order."""
    return quat[[1, 2, 3, 0]]
