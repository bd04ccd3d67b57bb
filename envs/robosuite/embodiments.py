"""The six robot arms of robosuite's tasks: joints, grippers, fields of an observation, numbers of an action."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

OSC_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
OSC_POSITION = OSC_POSE[:3]
CONTROLLERS = ("OSC_POSE", "OSC_POSITION", "JOINT_POSITION", "JOINT_TORQUE")


@dataclass(frozen=True)
class Embodiment:
    """One arm with its own gripper.

    ``closing`` is the sign in which each of the gripper's actuators closes. robosuite adds up a gripper's commands in
    numbers of these signs; ``gripper_action`` in an observation is their common size (from -1, open, to 1, closed), and
    ``step`` is how far one action moves it.
    """

    name: str
    joints: tuple[str, ...]
    low: tuple[float, ...]  # rad; a joint without limits has -inf and inf
    high: tuple[float, ...]  # rad
    torque: tuple[float, ...]  # N m, the limit of each joint
    gripper: str
    gripper_joints: int
    closing: tuple[int, ...]
    step: float

    @cached_property
    def observation(self) -> dict[str, int]:
        """The arm's fields in an observation: name -> size.

        eef_pos (m, world), eef_quat (x, y, z, w), gripper_action, joint_pos (rad), joint_vel (rad/s), gripper_qpos
        and gripper_qvel (m and m/s for sliding fingers, rad and rad/s for turning ones). Those whose size depends on
        the arm come last, so that the others, and the task's between them, have the same slices for every arm.
        """
        joints, fingers = len(self.joints), self.gripper_joints
        return {"eef_pos": 3, "eef_quat": 4, "gripper_action": 1} | {
            "joint_pos": joints,
            "joint_vel": joints,
            "gripper_qpos": fingers,
            "gripper_qvel": fingers,
        }

    def action(self, controller: str) -> tuple[str, ...]:
        """The names of an action's numbers, in order; the last is the gripper's, of which only the sign counts."""
        names = {"OSC_POSE": OSC_POSE, "OSC_POSITION": OSC_POSITION}.get(controller, self.joints)
        return (*names, "gripper")


def _numbered(name: str, first: int, count: int) -> tuple[str, ...]:
    return tuple(f"{name}{i}" for i in range(first, first + count))


INF, TURN = float("inf"), 6.28319
EMBODIMENTS = {
    arm.name: arm
    for arm in (
        Embodiment(
            name="Panda",
            joints=_numbered("joint", 1, 7),
            low=(-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
            high=(2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
            torque=(80, 80, 80, 80, 80, 12, 12),
            gripper="PandaGripper",
            gripper_joints=2,
            closing=(-1, 1),
            step=0.2,
        ),
        Embodiment(
            name="Sawyer",
            joints=_numbered("right_j", 0, 7),
            low=(-3.0503, -3.8095, -3.0426, -3.0439, -2.9761, -2.9761, -4.7124),
            high=(3.0503, 2.2736, 3.0426, 3.0439, 2.9761, 2.9761, 4.7124),
            torque=(80, 80, 40, 40, 9, 9, 9),
            gripper="RethinkGripper",
            gripper_joints=2,
            closing=(1, -1),
            step=0.2,
        ),
        Embodiment(
            name="IIWA",
            joints=_numbered("joint_", 1, 7),
            low=(-2.9671, -2.0944, -2.9671, -2.0944, -2.9671, -2.0944, -3.0543),
            high=(2.9671, 2.0944, 2.9671, 2.0944, 2.9671, 2.0944, 3.0543),
            torque=(176, 176, 110, 110, 110, 40, 40),
            gripper="Robotiq140Gripper",
            gripper_joints=6,
            closing=(1, -1),
            step=0.2,
        ),
        Embodiment(
            name="Jaco",
            joints=_numbered("j2s7s300_joint_", 1, 7),
            low=(-TURN, 0.8203, -TURN, 0.5236, -TURN, 1.1345, -TURN),
            high=(TURN, 5.4629, TURN, 5.7596, TURN, 5.1487, TURN),
            torque=(30.5, 30.5, 30.5, 30.5, 30.5, 6.8, 6.8),
            gripper="JacoThreeFingerGripper",
            gripper_joints=6,
            closing=(-1,),
            step=0.01,
        ),
        Embodiment(
            name="Kinova3",
            joints=_numbered("Actuator", 1, 7),
            low=(-INF, -2.41, -INF, -2.66, -INF, -2.23, -INF),
            high=(INF, 2.41, INF, 2.66, INF, 2.23, INF),
            torque=(32, 32, 32, 32, 32, 13, 13),
            gripper="Robotiq85Gripper",
            gripper_joints=6,
            closing=(1, 1),
            step=0.2,
        ),
        Embodiment(
            name="UR5e",
            joints=(
                "shoulder_pan_joint",
                "shoulder_lift_joint",
                "elbow_joint",
                "wrist_1_joint",
                "wrist_2_joint",
                "wrist_3_joint",
            ),
            low=(-TURN, -TURN, -3.14159, -TURN, -TURN, -TURN),
            high=(TURN, TURN, 3.14159, TURN, TURN, TURN),
            torque=(150, 150, 150, 28, 28, 28),
            gripper="Robotiq85Gripper",
            gripper_joints=6,
            closing=(1, 1),
            step=0.2,
        ),
    )
}
