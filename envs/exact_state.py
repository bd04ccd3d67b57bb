"""The exact state of a simulator as one float64 vector: read it, write it, or compute it from an observation."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from numpy.typing import ArrayLike, NDArray

try:
    import mujoco
except ImportError:  # Pendulum-v1 needs no MuJoCo
    mujoco = None

INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION) if mujoco else 0  # everything that MuJoCo's next step reads

# Hopper, Walker2d and InvertedDoublePendulum clip the velocities in their observations at this value (m/s, rad/s).
SPEED_CLIP = 10.0


def is_mujoco(env: gym.Env) -> bool:
    """Whether ``env`` is one of Gymnasium's MuJoCo tasks (or any env with a MuJoCo ``model`` and ``data``)."""
    return mujoco is not None and isinstance(getattr(env.unwrapped, "data", None), mujoco.MjData)


def get_state(env: gym.Env) -> NDArray[np.float64]:
    """Everything that the next steps depend on -> [S] float64. Raises TypeError for an env that is not supported.

    For MuJoCo: the full integration state (time, qpos, qvel, act, the solver's warm start, ctrl, applied forces, ...),
    then ``xpos`` and ``xipos``, the positions of the bodies: MuJoCo leaves them one substep behind qpos, and some tasks
    compute rewards and observations from them. For Pendulum-v1: angle (rad) and angular velocity (rad/s). robosuite's
    tasks have a ``get_state`` and a ``set_state`` of their own, which are called here.
    """
    sim: Any = _supported(env)
    if _has_own_state(sim):
        return sim.get_state()
    return np.array(sim.state, dtype=np.float64) if isinstance(sim, PendulumEnv) else _pack(sim.model, sim.data)


def set_state(env: gym.Env, state: NDArray[np.float64]) -> None:
    """Put ``env`` into a state [S] of ``get_state`` or ``state_from_observation``.

    The steps that follow equal, bit for bit, those that followed ``get_state``. The time limit's counter is not part
    of the state. Raises ValueError for a state of another size or with a NaN.
    """
    sim: Any = _supported(env)
    if _has_own_state(sim):
        return sim.set_state(state)
    pendulum = isinstance(sim, PendulumEnv)
    size = 2 if pendulum else integration_size(sim.model) + 6 * sim.model.nbody
    if state.shape != (size,) or not np.isfinite(state).all():
        raise ValueError(f"a state of {_name(sim)} is {size} finite numbers, as get_state gives them; got {state}")
    if pendulum:
        sim.state, sim.last_u = state.copy(), None
        return
    integration, positions = np.split(state, [size - 6 * sim.model.nbody])
    mujoco.mj_setState(sim.model, sim.data, integration, INTEGRATION)
    mujoco.mj_forward(sim.model, sim.data)
    # mj_forward restarts the solver and moves the bodies to qpos. Undo both, so that a replay is exact.
    mujoco.mj_setState(sim.model, sim.data, integration, INTEGRATION)
    sim.data.xpos.flat, sim.data.xipos.flat = np.split(positions, 2)


def integration_size(model: Any) -> int:
    """The size of MuJoCo's integration state, with which a state [S] of ``get_state`` begins."""
    return mujoco.mj_stateSize(model, INTEGRATION)


def observation_of(env: gym.Env) -> NDArray[Any]:
    """The observation of the state that ``env`` is in -> [O]."""
    sim: Any = _supported(env)
    return sim._get_obs()


def state_from_observation(env: gym.Env, obs: ArrayLike, *, pose_only: bool = False) -> NDArray[np.float64]:
    """The state whose observation is ``obs`` [O] -> [S], for ``set_state``. ``env`` itself does not change.

    Possible for Pendulum-v1, Reacher-v5, HalfCheetah-v5, Swimmer-v5, InvertedPendulum-v5, InvertedDoublePendulum-v5,
    Hopper-v5, Walker2d-v5 and CartPoleSwingUp-v0, and with ``pose_only`` also for Pusher-v5. Positions that the
    observation leaves out, such as the distance travelled, are 0. A cosine and a sine off the unit circle, as dreams
    have them, give the angle of their direction.

    pose_only: for rendering: velocities that the observation hides (those of Pusher's object, or those clipped at 10)
        are 0 instead of an error.

    Raises ValueError for an observation of another shape, with a NaN, or with a hidden velocity, and TypeError for a
    task whose observation doesn't determine its state.
    """
    sim: Any = _supported(env)
    if _has_own_state(sim):
        raise TypeError(_undetermined_message(sim))
    vector = np.asarray(obs, dtype=np.float64)
    if vector.shape != sim.observation_space.shape or not np.isfinite(vector).all():
        raise ValueError(
            f"an observation of {_name(sim)} is {sim.observation_space.shape} finite numbers, got shape "
            f"{vector.shape} with {int((~np.isfinite(vector)).sum())} non-finite"
        )
    if isinstance(sim, PendulumEnv):
        return np.array([np.arctan2(vector[1], vector[0]), vector[2]])
    qpos, qvel = _positions_and_velocities(sim, vector)
    hidden = np.isnan(qvel)
    if hidden.any() and not pose_only:
        raise ValueError(
            f"this observation of {_name(sim)} hides the speed of joint {np.flatnonzero(hidden).tolist()}: continue "
            "from an exact state (get_state, or SimulatorDynamics.capture), or pass pose_only=True to draw it"
        )
    data = mujoco.MjData(sim.model)
    data.qpos[:] = qpos
    data.qvel[:] = np.where(hidden, 0.0, qvel)
    mujoco.mj_forward(sim.model, data)
    data.qacc_warmstart[:] = 0
    return _pack(sim.model, data)


def update_bodies(env: gym.Env, state: NDArray[np.float64]) -> NDArray[np.float64]:
    """A MuJoCo state [S] with changed qpos or qvel -> the state [S] with its bodies' positions recomputed."""
    sim: Any = _supported(env)
    data, integration = mujoco.MjData(sim.model), state[: integration_size(sim.model)]
    mujoco.mj_setState(sim.model, data, integration, INTEGRATION)
    mujoco.mj_normalizeQuat(sim.model, data.qpos)
    qpos = data.qpos.copy()
    mujoco.mj_forward(sim.model, data)
    mujoco.mj_setState(sim.model, data, integration, INTEGRATION)  # mj_forward restarts the solver
    data.qpos[:] = qpos
    packed = _pack(sim.model, data)
    if _has_own_state(sim):  # other numbers than bodies' positions follow the integration state there
        packed = np.append(packed[: integration.size], state[integration.size :])
    return packed


def render_observation(env: gym.Env, obs: ArrayLike) -> Any:
    """``env.render()`` of the observation [O], real or dreamed. ``env`` is left in the state rendered.

    Of robosuite's tasks, Lift can be rendered. Raises as ``state_from_observation`` does, and TypeError where ``env``
    was made without a ``render_mode``.
    """
    if env.render_mode is None:
        raise TypeError("this env has no render_mode: make it with make_real(..., render_mode='rgb_array')")
    sim: Any = env.unwrapped
    if hasattr(sim, "set_pose"):
        sim.set_pose(obs)
    else:
        set_state(env, state_from_observation(env, obs, pose_only=True))
    return env.render()


def _positions_and_velocities(sim: Any, obs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The (qpos, qvel) whose observation is ``obs``, with NaN for each velocity that it hides."""
    nq, nv = sim.model.nq, sim.model.nv
    match _name(sim):
        case "InvertedPendulum-v5":
            return obs[:nq], obs[nq:]
        case "kairos_gym/CartPoleSwingUp-v0":
            return np.append(obs[0], np.arctan2(obs[2], obs[1])), obs[3:]
        case "HalfCheetah-v5" | "Swimmer-v5" | "Hopper-v5" | "Walker2d-v5" as name:
            free = nq + nv - obs.size  # the root's position, where it isn't observed
            qpos, qvel = np.append(np.zeros(free), obs[: nq - free]), obs[nq - free :]
            return qpos, (_unclipped(qvel) if name in ("Hopper-v5", "Walker2d-v5") else qvel)
        case "InvertedDoublePendulum-v5":
            return np.append(obs[0], np.arctan2(obs[1:3], obs[3:5])), _unclipped(obs[5:8])
        case "Reacher-v5":
            # The target is never pushed, so its velocity is 0. The last two numbers follow from the others.
            return np.append(np.arctan2(obs[2:4], obs[0:2]), obs[4:6]), np.append(obs[6:8], [0.0, 0.0])
        case "Pusher-v5":
            # Relative to each body's position at joint position 0; the joints are (y, x) of object and of goal.
            origin = {name: sim.model.body(name).pos for name in ("object", "goal")}
            object_pos, goal_pos = obs[17:20] - origin["object"], obs[20:23] - origin["goal"]
            hidden = [np.nan, np.nan, 0.0, 0.0]  # the object's are not observed, the goal is never pushed
            return np.concatenate([obs[:7], object_pos[[1, 0]], goal_pos[[1, 0]]]), np.append(obs[7:14], hidden)
        case _:
            raise TypeError(_undetermined_message(sim))


def _pack(model: Any, data: Any) -> NDArray[np.float64]:
    integration = np.empty(integration_size(model))
    mujoco.mj_getState(model, data, integration, INTEGRATION)
    return np.concatenate([integration, data.xpos.ravel(), data.xipos.ravel()])


def _unclipped(qvel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(qvel) < SPEED_CLIP, qvel, np.nan)


def _undetermined_message(sim: gym.Env) -> str:
    return (
        f"an observation of {_name(sim)} doesn't determine the simulator's state, so it can be neither drawn nor "
        "continued from; continue from an exact state (get_state, or SimulatorDynamics.capture)"
    )


def _has_own_state(sim: gym.Env) -> bool:
    """Whether ``sim`` is one of robosuite's tasks. Gymnasium's have a ``set_state`` too, but no ``get_state``."""
    return hasattr(sim, "get_state")


def _supported(env: gym.Env) -> gym.Env:
    sim = env.unwrapped
    if isinstance(sim, PendulumEnv) or is_mujoco(sim):
        return sim
    raise TypeError(f"{_name(sim)} is neither Pendulum-v1 nor a MuJoCo task: its state can't be read or written")


def _name(sim: gym.Env) -> str:
    return sim.spec.id if sim.spec is not None else type(sim).__name__
