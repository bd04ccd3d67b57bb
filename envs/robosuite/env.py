"""robosuite's manipulation tasks as Gymnasium environments with exact seeds, exact states and proper ends."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.robosuite.embodiments import CONTROLLERS, EMBODIMENTS
from envs.robosuite.fields import Fields, read_fields
from world_model.spaces import ActionCheck

try:
    import mujoco
except ImportError:  # robosuite brings it along: the error is raised where an env is made
    mujoco = None

_INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION) if mujoco else 0

TASKS = ("Lift", "Stack", "Door", "NutAssembly", "PickPlace", "Wipe")
RENDER_SIZE = 256  # pixels, height and width of what ``render`` gives


class RobosuiteEnv(gym.Env):
    """The robosuite task ``task`` with the arm ``robots``, as ``gym.make("robosuite/Lift-v0", robots="Panda")``.

    Observations are float32 [O]; ``fields`` names their slices. First come eef_pos [3] (m, world), eef_quat [4]
    (x, y, z, w) and gripper_action [1] (-1 open, 1 closed: the count of past gripper commands, on which the next step
    depends), then the task's own, then joint_pos, joint_vel, gripper_qpos and gripper_qvel of the arm. A freely moving
    object has a ``_pos`` [3], a ``_quat`` [4] and a ``_vel`` [6] (m/s in the world, rad/s in its own frame). Lift adds
    the cube's half edges, which are drawn anew in every episode; Door its hinge, latch, handle and frame; Wipe the
    positions of its dirt and which of it has been wiped. Wipe's tool has no gripper, so no such fields.

    Actions are float32 [A] in [-1,1]; the last is the gripper's, of which only the sign counts (1 closes).

    An episode ends (``terminated``) with success, which is ``info["success"]`` at every step, unless
    ``terminate_on_success`` is False; Wipe's also when the arm hits the table or a joint's limit. The time limit is
    Gymnasium's: ``truncated``.

    The simulation is robosuite's with one exception: there the base of Sawyer rubs against its first link, here it
    collides with nothing.

    Args:
        task: Lift, Stack, Door, NutAssembly, PickPlace or Wipe.
        robots: Panda, Sawyer, IIWA, Jaco, Kinova3 or UR5e, each with its own gripper.
        controller: OSC_POSE, OSC_POSITION, JOINT_POSITION or JOINT_TORQUE, with robosuite's settings.
        observations: "flat", or "dict" for a Dict with the fields by their names.
        cameras: names of cameras whose images the observation includes, uint8 [camera_size,camera_size,3]. It is then
            a Dict, with the flat vector under "state".
        camera_size: pixels.
        reward_shaping: robosuite's shaped reward; False: its sparse one.
        terminate_on_success: False goes on after success, as robosuite itself does: a lifted cube can then be held.
        control_freq: actions per simulated second.
        render_mode: "rgb_array" or None.

    Raises ImportError without robosuite, ValueError for a wrong argument, and RuntimeError where images are needed and
    can't be rendered.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(
        self,
        task: str,
        robots: str = "Panda",
        *,
        controller: str = "OSC_POSE",
        observations: str = "flat",
        cameras: tuple[str, ...] = (),
        camera_size: int = 84,
        reward_shaping: bool = True,
        terminate_on_success: bool = True,
        control_freq: int = 20,
        render_mode: str | None = None,
    ):
        _require_one_of("task", task, TASKS)
        _require_one_of("robots", robots, tuple(EMBODIMENTS))
        _require_one_of("controller", controller, CONTROLLERS)
        _require_one_of("observations", observations, ("flat", "dict"))
        _require_one_of("render_mode", render_mode, (None, "rgb_array"))
        _require_one_of("reward_shaping", reward_shaping, (True, False))
        _require_one_of("terminate_on_success", terminate_on_success, (True, False))
        if isinstance(cameras, str):
            raise ValueError(f"cameras is a tuple of names, got {cameras!r}: write cameras=({cameras!r},)")
        if not isinstance(camera_size, int) or camera_size < 1:
            raise ValueError(f"camera_size is a number of pixels, a whole number from 1 on, got {camera_size!r}")
        if not 1 <= control_freq <= 500 or 500 % control_freq:
            raise ValueError(f"control_freq has to divide the simulator's 500 steps per second, got {control_freq!r}")
        self.task, self.embodiment, self.render_mode = task, EMBODIMENTS[robots], render_mode
        self.controller, self.dt = controller, 1 / control_freq
        self._terminate_on_success = terminate_on_success
        self.metadata = {**self.metadata, "render_fps": control_freq}
        self._cameras, self._camera_size, self._dict = tuple(cameras), camera_size, observations == "dict"
        self._inner = _make_inner(task, robots, controller, reward_shaping, control_freq)
        if robots == "Sawyer":
            # The first link touches the base as it turns, and the friction nearly stops the first joint.
            base = self.model.geom("robot0_base_col")
            base.contype = base.conaffinity = 0
        self._robot = self._inner.robots[0]
        self._gripper = self._robot.gripper["right"]
        self._check_cameras()
        if self._cameras or render_mode:
            self._prepare_rendering()
        self._start_episode(0)
        fields = self._read_fields()
        ends = np.cumsum([len(field) for field in fields.values()])
        self.fields = {n: slice(int(e) - len(f), int(e)) for (n, f), e in zip(fields.items(), ends, strict=True)}
        self.observation_space = self._make_space(fields)
        low, high = self._inner.action_spec
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        self._check = ActionCheck(self.action_space)

    @property
    def model(self) -> Any:
        """MuJoCo's model of this episode."""
        return self._inner.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's data: the state of the simulation."""
        return self._inner.sim.data._data

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A new episode. The same seed gives the same episode, bit for bit, in any process and after any other."""
        super().reset(seed=seed)
        self._start_episode(int(self.np_random.integers(2**53)))  # states hold it as a float64, exactly
        return self._get_obs(), {"success": bool(self._inner._check_success())}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, reward, failed, _ = self._inner.step(self._check(action).astype(np.float64))
        success = bool(self._inner._check_success())
        # The simulator leaves bodies one substep behind. The next step would recompute them anyway.
        self._update_bodies()
        terminated = bool(failed) or (success and self._terminate_on_success)
        return self._get_obs(), float(reward), terminated, False, {"success": success}

    def render(self) -> Any:
        """uint8 [256,256,3] with ``render_mode="rgb_array"``, else None."""
        if self.render_mode is None:
            gym.logger.warn("nothing is rendered: make the env with render_mode='rgb_array'")
            return None
        return self._render_camera(self._cameras[0] if self._cameras else "agentview", RENDER_SIZE)

    def close(self) -> None:
        inner = getattr(self, "_inner", None)  # None where making the env failed
        if inner is not None and inner.sim is not None:
            self._make_current()
            inner.close()

    def __del__(self) -> None:
        self.close()

    def get_state(self) -> NDArray[np.float64]:
        """Everything that the next steps depend on -> [S]: MuJoCo's integration state, gripper_action, the episode.

        An episode's random sizes and positions are drawn again from its own number, so a state fits every env of the
        same task, arm and settings. Raises TypeError for Wipe, whose rewards depend on past forces.
        """
        if self.task == "Wipe":
            raise TypeError("the state of robosuite's Wipe can't be read: its rewards depend on past forces")
        state = np.empty(self._size + 2)
        mujoco.mj_getState(self.model, self.data, state[:-2], _INTEGRATION)
        state[-2:] = self._gripper_action, self._episode
        return state

    def set_state(self, state: NDArray[np.float64]) -> None:
        """Put the env into a state [S] of ``get_state``; the steps that follow equal, bit for bit, those that did then.

        Raises ValueError for a state of another size or with a NaN, and TypeError for Wipe.
        """
        if self.task == "Wipe":
            raise TypeError("the state of robosuite's Wipe can't be written: its rewards depend on past forces")
        if state.shape != (self._size + 2,) or not np.isfinite(state).all():
            raise ValueError(f"a state of {self.task} is {self._size + 2} finite numbers, as get_state gives: {state}")
        if int(state[-1]) != self._episode:
            self._start_episode(int(state[-1]))
        mujoco.mj_setState(self.model, self.data, np.ascontiguousarray(state[:-2]), _INTEGRATION)
        self._gripper.current_action = state[-2] * np.array(self.embodiment.closing)
        self._update_bodies()

    def set_pose(self, obs: Any) -> None:
        """Move arm, fingers and cube to where an observation [O] of Lift, real or dreamed, has them, for rendering.

        Raises TypeError for another task or for observations that aren't flat.
        """
        if self.task != "Lift" or self._dict or self._cameras:
            raise TypeError(f"only flat observations of Lift can be drawn, not those of {self.task} as they are here")
        fields = {name: np.asarray(obs[part], np.float64) for name, part in self.fields.items()}
        _resize_cube(self.model, self._inner.cube, fields["cube_size"].clip(1e-3))
        self.data.qpos[self._robot._ref_joint_pos_indexes] = fields["joint_pos"]
        self.data.qpos[self._robot._ref_gripper_joint_pos_indexes["right"]] = fields["gripper_qpos"]
        quat = fields["cube_quat"][[3, 0, 1, 2]]
        self.data.joint(self._inner.cube.joints[0]).qpos = np.r_[fields["cube_pos"], quat / np.linalg.norm(quat)]
        mujoco.mj_forward(self.model, self.data)

    def _start_episode(self, episode: int) -> None:
        """Start the episode of that number, which seeds everything random in it."""
        inner = self._inner
        inner.rng.bit_generator.state = np.random.default_rng(episode).bit_generator.state
        if self.task == "Lift":
            _resize_cube(self.model, inner.cube, inner.rng.uniform(0.020, 0.022, 3))
        inner.reset()
        # Else the solver would start from the previous episode's solution.
        self.data.qacc_warmstart[:] = 0
        self._update_bodies()
        self._episode = episode

    def _update_bodies(self) -> None:
        """Recompute bodies and sites from the joints, and have the controllers read them before they act."""
        mujoco.mj_kinematics(self.model, self.data)
        for controller in self._robot.composite_controller.part_controllers.values():
            controller.new_update = True

    @property
    def _size(self) -> int:
        return mujoco.mj_stateSize(self.model, _INTEGRATION)

    @property
    def _gripper_action(self) -> float:
        """The gripper's count of past commands, from -1 (open) to 1 (closed)."""
        return float(self._gripper.current_action[0] * self.embodiment.closing[0])

    def _get_obs(self) -> Any:
        fields = self._read_fields()
        if self._dict:
            obs = {name: np.asarray(field, dtype=np.float32) for name, field in fields.items()}
        else:
            flat = np.concatenate(list(fields.values()), dtype=np.float32)
            if not self._cameras:
                return flat
            obs = {"state": flat}
        return obs | {camera: self._render_camera(camera, self._camera_size) for camera in self._cameras}

    def _read_fields(self) -> Fields:
        gripper_action = None if self.task == "Wipe" else self._gripper_action
        return read_fields(self.task, self._inner, self.model, self.data, gripper_action)

    def _make_space(self, fields: Fields) -> spaces.Space:
        def box(size: int) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, (size,), np.float32)

        if not self._dict and not self._cameras:
            return box(sum(map(len, fields.values())))
        shape = (self._camera_size, self._camera_size, 3)
        boxes: dict[str, spaces.Space]
        if self._dict:
            boxes = {name: box(len(field)) for name, field in fields.items()}
        else:
            boxes = {"state": box(sum(map(len, fields.values())))}
        boxes |= {camera: spaces.Box(0, 255, shape, np.uint8) for camera in self._cameras}
        return spaces.Dict(list(boxes.items()))  # given a dict, it would sort the names

    def _render_camera(self, camera: str, size: int) -> NDArray[np.uint8]:
        """uint8 [size,size,3], the right way up: OpenGL's first row is the lowest."""
        self._make_current()
        return np.ascontiguousarray(self._inner.sim.render(camera_name=camera, width=size, height=size)[::-1])

    def _make_current(self) -> None:
        """Else OpenGL would draw, or free, in the context of whichever env opened one last."""
        context = self._inner.sim._render_context_offscreen
        if context is not None:
            context.gl_ctx.make_current()

    def _check_cameras(self) -> None:
        known = [self.model.camera(i).name for i in range(self.model.ncam)]
        unknown = [camera for camera in self._cameras if camera not in known]
        if unknown:
            raise ValueError(f"{self.task} has no camera {unknown[0]!r}: its cameras are {', '.join(known)}")

    def _prepare_rendering(self) -> None:
        """Open an OpenGL context without shadows, multisampling and reflections, which take most of the time."""
        self.model.light_castshadow[:] = 0
        self.model.mat_reflectance[:] = 0
        self.model.vis.quality.offsamples = 0  # these two are read when the context is opened
        self.model.vis.quality.shadowsize = 1
        try:
            from robosuite.utils.binding_utils import MjRenderContextOffscreen

            MjRenderContextOffscreen(self._inner.sim, device_id=-1)
        except Exception as error:  # missing libraries raise many kinds of errors
            raise RuntimeError(
                f"images can't be drawn here ({type(error).__name__}: {error}). Without a display set MUJOCO_GL=egl "
                "and, on Debian and Ubuntu, apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libgl1; or set "
                "MUJOCO_GL=osmesa and install libosmesa6"
            ) from error
        self._inner.has_offscreen_renderer = True


def _make_inner(task: str, robots: str, controller: str, reward_shaping: bool, control_freq: int) -> Any:
    """robosuite's own env, without its observations, its time limit and its log messages."""
    # On import, robosuite warns about optional settings.
    logging.getLogger("robosuite_logs").addFilter(_is_error)
    try:
        import robosuite
        from robosuite.controllers import load_composite_controller_config, load_part_controller_config
    except ImportError as error:
        if error.name == "robosuite":
            what = "the robosuite simulator: pip install 'kairos_gym[robosuite]'"
        elif "libGL" in str(error):  # its OpenCV needs it, even if nothing is rendered
            what = "libGL, which is not on this machine (Debian and Ubuntu: apt-get install libgl1)"
        else:
            raise
        raise ImportError(f"robosuite/{task}-v0 needs {what}") from error
    settings = load_composite_controller_config(robot=robots)
    if controller != settings["body_parts"]["right"]["type"]:
        gripper = settings["body_parts"]["right"]["gripper"]
        settings["body_parts"]["right"] = load_part_controller_config(default_controller=controller)
        settings["body_parts"]["right"]["gripper"] = gripper
    inner = robosuite.make(
        task,
        robots=robots,
        controller_configs=settings,
        control_freq=control_freq,
        reward_shaping=reward_shaping,
        use_camera_obs=False,
        use_object_obs=False,
        has_offscreen_renderer=False,
        ignore_done=True,
        # A hard reset compiles the model anew (0.7 s), which episodes don't need.
        hard_reset=False,
        seed=0,
    )
    for observable in inner._observables.values():
        observable.set_enabled(False)
    return inner


def _resize_cube(model: Any, cube: Any, size: NDArray[np.float64]) -> None:
    """Give Lift's cube the half edges ``size`` [3] (m), as if the model had been compiled with them."""
    cube.size = size.tolist()  # robosuite computes its starting height from it
    body = model.body(cube.root_body).id
    first = model.body_geomadr[body]
    geoms = slice(first, first + model.body_geomnum[body])
    model.geom_size[geoms] = size
    model.geom_aabb[geoms, 3:] = size
    model.geom_rbound[geoms] = np.linalg.norm(size)
    model.bvh_aabb[model.body_bvhadr[body], 3:] = size
    model.body_mass[body] = mass = cube.density * 8 * size.prod()
    model.body_inertia[body] = mass / 3 * (np.square(size).sum() - np.square(size))
    mujoco.mj_setConst(model, mujoco.MjData(model))


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _require_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
