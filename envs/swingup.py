"""CartPoleSwingUp: swing up a pole that hangs from a cart, and balance it, by pushing the cart along its rail."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

REACH = 1.5  # m, the rail's length to either side
FORCE = 60.0  # N on the cart at an action of 1: not enough to swing the pole up at once
FRICTION = 0.1  # N m s/rad of the hinge
NOISE = 0.05  # m, rad, m/s and rad/s, the most in each of an episode's first positions and velocities
Array = NDArray[np.float64]


class CartPoleSwingUpEnv(MujocoEnv):
    """Swing the pole up and hold it there: ``gym.make("kairos_gym/CartPoleSwingUp-v0")``.

    Cart and pole are those of Gymnasium's InvertedPendulum-v5, with a weaker motor, a longer rail, and a hinge that
    turns all the way round with a tenth of the friction. Observations are float64 [5]: the cart's position (m, 0 in the
    middle of the rail), the cosine and the sine of the pole's angle (0 upright, rising towards positive positions), and
    the velocities of both (m/s, rad/s). Actions are float32 [1] in [-1,1]: the force on the cart, in units of 60 N. A
    step is 0.04 s.

    The reward of a step is between 0 and 1, the product of how upright and how slow the pole is, how near the cart is
    to the middle and how little force is spent (see ``compute_reward``), after dm_control's cartpole
    (https://arxiv.org/abs/1801.00690). Episodes begin with the pole hanging down, nearly at rest, and never terminate;
    the time limit is Gymnasium's.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"],
        "render_fps": 25,
    }

    def __init__(self, **rendering: Any):
        """rendering: ``render_mode`` and what else Gymnasium's MuJoCo tasks take for it."""
        space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float64)
        rendering = {"default_camera_config": {"distance": 4.0, "lookat": np.zeros(3)}} | rendering
        super().__init__("inverted_pendulum.xml", frame_skip=2, observation_space=space, **rendering)

    def _initialize_simulation(self) -> tuple[Any, Any]:
        model, _ = super()._initialize_simulation()
        model.jnt_limited[model.joint("hinge").id] = False
        model.joint("hinge").damping = FRICTION
        model.joint("slider").range = -REACH, REACH
        model.geom("rail").size[1] = REACH
        model.actuator("slide").ctrlrange = -1.0, 1.0
        model.actuator("slide").gear[0] = FORCE
        return model, mujoco.MjData(model)

    def step(self, action: NDArray[np.float32]) -> tuple[Array, np.float64, bool, bool, dict[str, np.float64]]:
        self.do_simulation(action, self.frame_skip)
        obs = self._get_obs()
        if self.render_mode == "human":
            self.render()
        return obs, np.float64(compute_reward(obs, np.asarray(action, np.float64))), False, False, {}

    def reset_model(self) -> Array:
        noise = self.np_random.uniform(-NOISE, NOISE, self.model.nq + self.model.nv)
        self.set_state(np.array([0.0, np.pi]) + noise[:2], noise[2:])
        return self._get_obs()

    def _get_obs(self) -> Array:
        return observe(self.data.qpos, self.data.qvel)


def observe(qpos: Array, qvel: Array) -> Array:
    """Positions qpos [...,2] and velocities qvel [...,2] of cart and pole -> observations [...,5]."""
    angle = qpos[..., 1:]
    return np.concatenate([qpos[..., :1], np.cos(angle), np.sin(angle), qvel], axis=-1)


def compute_reward(obs: Array, action: Array) -> Array:
    """Actions [...,1] and the observations [...,5] after them -> rewards [...], from 0 to 1.

    A product of four factors: upright from 0 on, central and slow from 1/2 on, gentle from 4/5 on.
    """
    position, cosine, _, _, turning = np.moveaxis(obs, -1, 0)
    upright = (1 + cosine) / 2
    central = (1 + np.exp(-(position**2))) / 2  # m
    slow = (1 + np.exp(-((turning / 3) ** 2))) / 2  # rad/s
    gentle = 1 - action[..., 0] ** 2 / 5
    return upright * central * slow * gentle
