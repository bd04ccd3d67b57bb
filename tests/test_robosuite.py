"""robosuite's tasks: their spaces, seeds, exact states, ends, images, arms, and the experts that solve them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import kairos_gym  # noqa: F401  (names the tasks)
from envs import SimulatorDynamics, get_state, make_real, observation_of, set_state, state_from_observation
from envs.robosuite.embodiments import CONTROLLERS, EMBODIMENTS
from envs.robosuite.env import _resize_cube
from envs.robosuite.experts import Expert
from world_model.spaces import flatten
from world_model.state import LatentState

robosuite = pytest.importorskip("robosuite", exc_type=ImportError)  # it also needs libGL
mujoco = pytest.importorskip("mujoco")

HOUSE = Path(__file__).parent.parent
TASKS = ("Lift", "Stack", "Door", "NutAssembly", "PickPlace", "Wipe")
EXACT = TASKS[:-1]  # Wipe's state can't be read
ARMS = tuple(EMBODIMENTS)
OTHERS = [pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS if arm != "Panda"]


@pytest.fixture(scope="module")
def sims() -> dict[Any, gym.Env]:
    return {}


def sim(sims: dict[Any, gym.Env], task: str, robots: str = "Panda") -> gym.Env:
    key = (task, robots)
    if key not in sims:
        sims[key] = gym.make(f"robosuite/{task}-v0", robots=robots)
    return sims[key]


def actions_for(env: gym.Env, seed: int, steps: int) -> np.ndarray:
    """Uniform actions [steps,A]."""
    shape = env.action_space.shape
    assert shape is not None
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *shape)).astype(np.float32)


def play(env: gym.Env, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observations and rewards, whether or not an episode has ended."""
    steps = [env.unwrapped.step(action)[:2] for action in actions]
    return np.array([obs for obs, _ in steps]), np.array([reward for _, reward in steps])


def episode(env: gym.Env, seed: int | None, steps: int = 10) -> str:
    """A digest of all bits that an episode shows and pays."""
    obs, _ = env.reset(seed=seed)
    shown, paid = play(env, actions_for(env, 0, steps))
    return hashlib.sha256(obs.tobytes() + shown.tobytes() + paid.tobytes()).hexdigest()


# --- spaces


@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")  # positions and speeds are unbounded
@pytest.mark.parametrize("task", TASKS)
def test_gymnasium_accepts_the_task(sims: dict[Any, gym.Env], task: str) -> None:
    env = sim(sims, task)
    check_env(env.unwrapped, skip_render_check=True)
    assert env.observation_space.dtype == np.float32 and env.action_space.dtype == np.float32
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()  # type: ignore[attr-defined]
    assert env.unwrapped.dt == pytest.approx(0.05)  # type: ignore[attr-defined]


def test_fields_name_every_number_and_lie_at_the_same_place_for_every_arm(sims: dict[Any, gym.Env]) -> None:
    panda, ur5e = (sim(sims, "Lift", robots).unwrapped for robots in ("Panda", "UR5e"))
    for env in (panda, ur5e):
        ends = [0, *(part.stop for part in env.fields.values())]  # type: ignore[attr-defined]
        assert [part.start for part in env.fields.values()] == ends[:-1]  # type: ignore[attr-defined]
        assert env.observation_space.shape == (ends[-1],)
    common = [name for name in panda.fields if not name.startswith(("joint", "gripper_q"))]  # type: ignore[attr-defined]
    assert [panda.fields[n] for n in common] == [ur5e.fields[n] for n in common]  # type: ignore[attr-defined]
    obs, _ = panda.reset(seed=0)
    seen = {name: obs[part] for name, part in panda.fields.items()}  # type: ignore[attr-defined]
    np.testing.assert_allclose(seen["cube_pos"][:2], 0, atol=0.031)  # where robosuite puts it
    np.testing.assert_allclose(np.linalg.norm(seen["eef_quat"]), 1, atol=1e-6)
    assert ((seen["cube_size"] >= 0.02) & (seen["cube_size"] <= 0.022)).all()


def test_a_dict_holds_the_same_fields() -> None:
    flat, named = (gym.make("robosuite/Stack-v0", observations=kind) for kind in ("flat", "dict"))
    (vector, _), (parts, _) = flat.reset(seed=1), named.reset(seed=1)
    assert named.observation_space.contains(parts)
    fields = flat.unwrapped.fields  # type: ignore[attr-defined]
    assert list(named.observation_space) == list(parts) == list(fields)  # type: ignore[call-overload]
    for name, part in fields.items():
        np.testing.assert_array_equal(parts[name], vector[part])


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controllers_have_their_own_actions(controller: str) -> None:
    env = gym.make("robosuite/Lift-v0", controller=controller)
    names = EMBODIMENTS["Panda"].action(controller)
    assert env.action_space.shape == (len(names),) and names[-1] == "gripper"
    _replays(env, env)


# --- seeds


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_repeats_its_episode_bit_for_bit(sims: dict[Any, gym.Env], task: str) -> None:
    env = sim(sims, task)
    first = episode(env, 3)
    others = [episode(env, 4), episode(env, None), episode(env, None)]
    assert len({first, *others}) == 4, "without a seed the env goes on with its own"
    assert episode(env, 3) == first
    assert [episode(env, 4), episode(env, None), episode(env, None)] == others


@pytest.mark.parametrize("arm", ["Panda", *OTHERS])
def test_seeds_and_states_are_exact_for_every_arm(sims: dict[Any, gym.Env], arm: str) -> None:
    env = sim(sims, "Lift", arm)
    first = episode(env, 7)
    assert episode(env, 8) != first and episode(env, 7) == first
    _replays(env, sim(sims, "Lift", arm))


def test_another_process_gives_the_same_episodes(sims: dict[Any, gym.Env]) -> None:
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "import gymnasium as gym, kairos_gym\n"
        "env = gym.make('robosuite/Lift-v0')\n"
        "from test_robosuite import episode\n"
        "print(episode(env, 11))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=HOUSE
    )
    assert done.stdout.split() == [episode(sim(sims, "Lift"), 11)]
    assert done.stderr == "", "robosuite's words about itself are kept quiet"


def test_a_cube_of_another_size_is_as_if_compiled_with_it(sims: dict[Any, gym.Env]) -> None:
    env: Any = sim(sims, "Lift").unwrapped
    compiled = robosuite.make("Lift", robots="Panda", use_camera_obs=False, has_offscreen_renderer=False, seed=5)
    size = np.array(compiled.cube.size)
    _resize_cube(env.model, env._inner.cube, size)
    theirs = compiled.sim.model._model
    for name in [name for name in dir(theirs) if name.startswith(("geom_", "body_", "dof_", "jnt_", "bvh_", "site_"))]:
        ours, wanted = getattr(env.model, name), getattr(theirs, name)
        if isinstance(wanted, np.ndarray) and wanted.dtype.kind == "f" and not name.endswith("rgba"):
            np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-9, err_msg=name)
    assert env.model.stat.meaninertia == pytest.approx(theirs.stat.meaninertia)


# --- exact states


@pytest.mark.parametrize("task", EXACT)
def test_a_replay_from_a_restored_state_is_bit_exact(sims: dict[Any, gym.Env], task: str) -> None:
    _replays(sim(sims, task), sim(sims, task))


def test_a_state_fits_another_env_of_the_same_task(sims: dict[Any, gym.Env]) -> None:
    _replays(sim(sims, "Lift"), gym.make("robosuite/Lift-v0"))


def _replays(env: gym.Env, other: gym.Env) -> None:
    """Holds ``other``, after an episode of its own, to what ``env`` plays from a state with a moving gripper."""
    env.reset(seed=1)
    before, after = actions_for(env, 1, 8), actions_for(env, 2, 12)
    play(env, before)
    state, shown = get_state(env), observation_of(env)
    first = play(env, after)
    episode(other, 2)
    set_state(other, state)
    np.testing.assert_array_equal(get_state(other), state)
    np.testing.assert_array_equal(observation_of(other), shown)
    for a, b in zip(first, play(other, after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_states_that_do_not_fit_are_refused(sims: dict[Any, gym.Env]) -> None:
    env = sim(sims, "Lift")
    env.reset(seed=0)
    state = get_state(env)
    for wrong in (state[:-1], state * np.nan):
        with pytest.raises(ValueError, match="a state of Lift is"):
            set_state(env, wrong)
    with pytest.raises(TypeError, match="Wipe can't be read"):
        get_state(sim(sims, "Wipe"))
    with pytest.raises(TypeError, match="Wipe can't be written"):
        set_state(sim(sims, "Wipe"), state)


@pytest.mark.parametrize("settings", [{}, {"observations": "dict"}])
def test_the_simulator_plans_on_the_truth(settings: dict[str, Any]) -> None:
    env = gym.make("robosuite/Lift-v0", **settings)
    truth = SimulatorDynamics("robosuite/Lift-v0", chunk=4, robots="Panda", **settings)
    env.reset(seed=4)
    for action in actions_for(env, 0, 3):
        env.step(action)
    state, actions = truth.capture(env), actions_for(env, 1, 4)
    two = LatentState({name: part.repeat_interleave(2, 0) for name, part in state.tensors.items()})
    _, imagined = truth.imagine(two, torch.from_numpy(np.stack([actions, actions[::-1]])))
    assert imagined.obs is not None
    for k, action in enumerate(actions):
        obs, reward, *_ = env.step(action)
        np.testing.assert_array_equal(imagined.obs[0, k], flatten(env.observation_space, obs))
        assert float(imagined.reward[0, k]) == np.float32(reward)
    assert (imagined.obs[0] != imagined.obs[1]).any()
    assert truth.spec.dt == pytest.approx(0.05)
    here = truth.coordinates(state)
    assert torch.equal(truth.displaced(state, 0 * here)["simulator"], state["simulator"])
    near = truth.displaced(state, torch.full_like(here, 1e-7))
    assert near["simulator"].shape == state["simulator"].shape
    _, moved = truth.imagine(near, torch.from_numpy(actions)[None])
    assert moved.obs is not None and 0 < (moved.obs[0] - imagined.obs[0]).abs().max() < 1e-2


def test_an_observation_does_not_make_a_state(sims: dict[Any, gym.Env]) -> None:
    env = sim(sims, "Lift")
    obs, _ = env.reset(seed=0)
    with pytest.raises(TypeError, match="doesn't determine"):
        state_from_observation(env, obs)


# --- ends


def test_success_terminates_and_the_time_limit_truncates() -> None:
    env = gym.make("robosuite/Lift-v0", max_episode_steps=60)
    obs, info = env.reset(seed=0)
    assert info == {"success": False}
    expert, terminated = Expert(env), False
    while not terminated:
        obs, reward, terminated, truncated, info = env.step(expert(obs))
        assert not truncated and info["success"] == terminated
    assert reward == pytest.approx(1.0)
    env.reset(seed=0)
    for step in range(60):
        _, _, terminated, truncated, info = env.step(np.zeros(7, np.float32))
        assert not terminated and not info["success"] and truncated == (step == 59)
    assert gym.spec("robosuite/Lift-v0").max_episode_steps == 200


def test_a_sparse_reward_pays_success_alone() -> None:
    env = gym.make("robosuite/Lift-v0", reward_shaping=False)
    obs, _ = env.reset(seed=0)
    expert, paid, terminated = Expert(env), [], False
    while not terminated:
        obs, reward, terminated, _, _ = env.step(expert(obs))
        paid.append(reward)
    assert paid == [0.0] * (len(paid) - 1) + [1.0]


def test_chunks_of_actions_are_played(sims: dict[Any, gym.Env]) -> None:
    env = make_real("robosuite/Lift-v0", chunk=3, robots="Panda")
    env.reset(seed=6)
    actions = actions_for(sim(sims, "Lift"), 0, 3)
    obs, *_, info = env.step(actions)
    sim(sims, "Lift").reset(seed=6)
    shown, paid = play(sim(sims, "Lift"), actions)
    np.testing.assert_array_equal(info["inner"]["obs"], shown)
    np.testing.assert_array_equal(obs, shown[-1])
    np.testing.assert_array_equal(info["inner"]["reward"], paid)


# --- images


@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")
def test_cameras_show_the_scene_the_right_way_up() -> None:
    settings: dict[str, Any] = {"cameras": ("agentview", "robot0_eye_in_hand"), "camera_size": 48}
    settings["render_mode"] = "rgb_array"
    try:
        env = gym.make("robosuite/Lift-v0", **settings)
    except RuntimeError as error:
        pytest.skip(str(error))
    check_env(env.unwrapped)
    obs, _ = env.reset(seed=0)
    assert list(env.observation_space) == list(obs) == ["state", "agentview", "robot0_eye_in_hand"]  # type: ignore[call-overload]
    image = obs["agentview"]
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8
    red = (image[..., 0].astype(int) - image[..., 1:].max(axis=-1)) > 60
    rows, columns = np.nonzero(red)
    # The cube lies about in the middle, where robosuite puts it; upside down it would lie above it.
    assert len(rows) > 3 and 22 < rows.mean() < 30 and 18 < columns.mean() < 26
    picture = env.render()
    assert isinstance(picture, np.ndarray) and picture.shape == (256, 256, 3)
    beside = gym.make("robosuite/Lift-v0", **settings)
    for _ in range(2):  # beside another env that draws, and after it is gone
        again, _ = env.reset(seed=0)
        np.testing.assert_array_equal(again["agentview"], image)
        beside.close()
    plain, _ = gym.make("robosuite/Lift-v0").reset(seed=0)
    np.testing.assert_array_equal(obs["state"], plain)
    with pytest.raises(ValueError, match="must be a Box of real numbers"):
        SimulatorDynamics("robosuite/Lift-v0", **settings)


def test_without_opengl_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['robosuite.renderers.context.egl_context'] = None\n"
        "import gymnasium as gym, kairos_gym\n"
        "gym.make('robosuite/Lift-v0').reset(seed=0)\n"
        "try: gym.make('robosuite/Lift-v0', cameras=('agentview',))\n"
        "except RuntimeError as error: print(error)\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=HOUSE
    )
    assert "MUJOCO_GL=egl" in done.stdout and "libegl1" in done.stdout


def test_without_robosuite_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['robosuite'] = None\n"
        "import gymnasium as gym, kairos_gym\nfrom envs import make_real\n"
        "for make in (gym.make, make_real):\n"
        "    try: make('robosuite/Lift-v0')\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HOUSE)
    assert done.stdout.count("pip install 'kairos_gym[robosuite]'") == 2


# --- arms and wrong arguments


@pytest.mark.parametrize("arm", ARMS)
def test_an_embodiment_is_the_arm_it_describes(sims: dict[Any, gym.Env], arm: str) -> None:
    env: Any = sim(sims, "Lift", arm).unwrapped
    described, robot, model = EMBODIMENTS[arm], env._robot, env.model
    assert described.name == arm == robot.name
    assert [f"robot0_{joint}" for joint in described.joints] == robot.robot_joints
    assert described.gripper == type(robot.gripper["right"]).__name__
    assert len(described.closing) == len(robot._ref_joint_gripper_actuator_indexes["right"]) or arm == "Jaco"
    limited = model.jnt_limited[robot._ref_joint_indexes].astype(bool)
    for bound, side in ((described.low, 0), (described.high, 1)):
        np.testing.assert_array_equal(np.isfinite(bound), limited)
        real = model.jnt_range[robot._ref_joint_indexes, side]
        np.testing.assert_allclose(np.array(bound)[limited], real[limited], atol=1e-4)
    np.testing.assert_allclose(described.torque, robot.torque_limits[1], atol=1e-6)
    np.testing.assert_allclose(robot.torque_limits[0], -robot.torque_limits[1])
    sizes = {name: part.stop - part.start for name, part in env.fields.items()}
    assert {name: sizes[name] for name in described.observation} == described.observation
    assert env.action_space.shape == (len(described.action("OSC_POSE")),)
    obs, _ = env.reset(seed=0)
    assert obs[env.fields["gripper_action"]] == 0
    for _ in range(3):
        obs = env.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))[0]
    assert obs[env.fields["gripper_action"]] == pytest.approx(3 * described.step)
    np.testing.assert_allclose(env._gripper.current_action, 3 * described.step * np.array(described.closing))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"robots": "Baxter"}, "Panda, Sawyer, IIWA, Jaco, Kinova3, UR5e, got 'Baxter'"),
        ({"robots": ["Panda"]}, "robots must be one of"),
        ({"controller": "IK_POSE"}, "OSC_POSE, OSC_POSITION, JOINT_POSITION, JOINT_TORQUE, got 'IK_POSE'"),
        ({"observations": "image"}, "flat, dict, got 'image'"),
        ({"cameras": "agentview"}, r"write cameras=\('agentview',\)"),
        ({"cameras": ("sky",)}, "no camera 'sky': its cameras are frontview"),
        ({"cameras": ("agentview",), "camera_size": 0}, "whole number from 1 on, got 0"),
        ({"control_freq": 30}, "has to divide.*got 30"),
    ],
)
def test_wrong_arguments_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gym.make("robosuite/Lift-v0", **settings)


def test_wrong_actions_are_refused(sims: dict[Any, gym.Env]) -> None:
    env = sim(sims, "Lift")
    env.reset(seed=0)
    for action, words in [(np.zeros(6), "shape"), (np.full(7, np.nan), "finite"), (np.full(7, 1.5), "outside")]:
        with pytest.raises(ValueError, match=words):
            env.unwrapped.step(action)


# --- experts


def solved(env: gym.Env, seeds: range, **settings: Any) -> int:
    """In how many episodes the expert succeeds."""
    wins = 0
    for seed in seeds:
        obs, info = env.reset(seed=seed)
        expert, ended = Expert(env, seed=seed, **settings), False
        while not ended:
            obs, _, terminated, truncated, info = env.step(expert(obs))
            ended = terminated or truncated
        wins += info["success"]
    return wins


@pytest.mark.parametrize("task", ["Lift", "Stack", "Door"])
def test_the_expert_solves_its_task(sims: dict[Any, gym.Env], task: str) -> None:
    assert solved(sim(sims, task), range(100, 103)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_the_expert_lifts_with_every_arm(sims: dict[Any, gym.Env], arm: str) -> None:
    assert solved(sim(sims, "Lift", arm), range(10)) >= 9


@pytest.mark.parametrize("settings", [{"noise": 0.3}, {"failure": "offset"}, {"failure": "drop"}])
def test_the_expert_recovers(sims: dict[Any, gym.Env], settings: dict[str, Any]) -> None:
    assert solved(sim(sims, "Lift"), range(3), **settings) >= 2


def test_an_expert_repeats_with_its_seed(sims: dict[Any, gym.Env]) -> None:
    env = sim(sims, "Lift")
    obs, _ = env.reset(seed=0)
    one, same, other = (Expert(env, noise=0.2, seed=seed)(obs) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and env.action_space.contains(one)


def test_experts_refuse_what_they_cannot_do(sims: dict[Any, gym.Env]) -> None:
    with pytest.raises(ValueError, match="experts for Lift, Stack, Door, not for Wipe"):
        Expert(sim(sims, "Wipe"))
    with pytest.raises(ValueError, match="OSC_POSE"):
        Expert(gym.make("robosuite/Lift-v0", controller="JOINT_POSITION"))
    with pytest.raises(ValueError, match="from 0 on, got -1"):
        Expert(sim(sims, "Lift"), noise=-1)
    with pytest.raises(ValueError, match="None, offset, drop, got 'trip'"):
        Expert(sim(sims, "Lift"), failure="trip")
