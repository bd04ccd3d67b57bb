"""The real simulators: exact states, chunked actions, and the truth behind a world model's verbs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import kairos_gym  # noqa: F401  (names the swing-up)
from envs import (
    ChunkedActions,
    SimulatorDynamics,
    get_state,
    make_real,
    observation_of,
    render_observation,
    set_state,
    state_from_observation,
)
from envs.simulator import _READOUTS
from envs.swingup import compute_reward
from kairos_gym.evaluation.control import play_random
from world_model.contract import Dynamics, State
from world_model.state import LatentState

SWING_UP = "kairos_gym/CartPoleSwingUp-v0"
DETERMINED = [  # tasks whose observation determines their state
    "Pendulum-v1",
    "InvertedPendulum-v5",
    "InvertedDoublePendulum-v5",
    "Reacher-v5",
    "HalfCheetah-v5",
    "Swimmer-v5",
    "Hopper-v5",
    "Walker2d-v5",
    SWING_UP,
]
MAIN = [
    "Pendulum-v1",
    "InvertedPendulum-v5",
    "Reacher-v5",
    "HalfCheetah-v5",
    "Pusher-v5",
    "Hopper-v5",
    "Ant-v5",
    SWING_UP,
]


@pytest.fixture(scope="module")
def sims() -> dict[str, gym.Env]:
    return {}


def started(sims: dict[str, gym.Env], env_id: str, seed: int, warm_up: int = 3) -> tuple[gym.Env, np.ndarray]:
    """An env in the middle of an episode, gently played so that none terminates, and what it shows."""
    env = sims.setdefault(env_id, make_real(env_id))
    obs, _ = env.reset(seed=seed)
    for action in actions_for(env, seed, warm_up):
        obs = env.step(0.2 * action)[0]
    return env, obs


def actions_for(env: gym.Env, seed: int, steps: int) -> np.ndarray:
    """Uniform actions [steps,A]."""
    space = env.unwrapped.action_space
    assert isinstance(space, gym.spaces.Box)
    rng = np.random.default_rng(seed)
    return rng.uniform(space.low, space.high, (steps, *space.shape)).astype(np.float32)


def play(env: gym.Env, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the simulator gives for actions [T,A], whether or not an episode has ended."""
    steps = [env.unwrapped.step(action)[:3] for action in actions]
    return tuple(np.array(column) for column in zip(*steps, strict=True))  # type: ignore[return-value]


# --- states


@pytest.mark.parametrize("env_id", [*DETERMINED, "Pusher-v5", "Ant-v5", "Humanoid-v5"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), between=st.integers(0, 30))
def test_a_replay_from_a_restored_state_is_bit_exact(
    sims: dict[str, gym.Env], env_id: str, seed: int, between: int
) -> None:
    env, _ = started(sims, env_id, seed)
    state, actions = get_state(env), actions_for(env, seed + 1, 12)
    first = play(env, actions)
    play(env, actions_for(env, seed + 2, between))
    set_state(env, state)
    np.testing.assert_array_equal(get_state(env), state)
    for a, b in zip(first, play(env, actions), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("env_id", DETERMINED)
def test_a_state_can_be_moved_to_another_env(env_id: str) -> None:
    env, other = make_real(env_id), make_real(env_id)
    env.reset(seed=0)
    other.reset(seed=1)
    play(env, 0.2 * actions_for(env, 0, 5))
    set_state(other, get_state(env))
    np.testing.assert_array_equal(observation_of(other), observation_of(env))
    actions = actions_for(env, 1, 5)
    for a, b in zip(play(env, actions), play(other, actions), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("env_id", DETERMINED)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_an_observation_gives_the_state_back(sims: dict[str, gym.Env], env_id: str, seed: int) -> None:
    env, obs = started(sims, env_id, seed)
    actions = actions_for(env, seed + 1, 2)
    then = play(env, actions)
    set_state(env, state_from_observation(env, obs))
    known = slice(0, 8) if env_id in ("Reacher-v5", "InvertedDoublePendulum-v5") else slice(None)  # the rest lags
    np.testing.assert_allclose(observation_of(env)[known], obs[known], atol=1e-6)
    for a, b in zip(then, play(env, actions), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_an_angle_is_read_by_its_direction(sims: dict[str, gym.Env]) -> None:
    env, obs = started(sims, "Reacher-v5", 0)
    dreamed = obs.copy()
    dreamed[:4] *= 1.3
    np.testing.assert_allclose(state_from_observation(env, dreamed), state_from_observation(env, obs), atol=1e-12)


def test_reading_a_state_from_an_observation_leaves_the_env_alone(sims: dict[str, gym.Env]) -> None:
    env, obs = started(sims, "HalfCheetah-v5", 0)
    before = get_state(env)
    state_from_observation(env, np.zeros_like(obs))
    np.testing.assert_array_equal(get_state(env), before)


def test_hidden_speeds_are_refused_but_can_be_drawn(sims: dict[str, gym.Env]) -> None:
    env, obs = started(sims, "Pusher-v5", 0)
    with pytest.raises(ValueError, match="hides the speed"):
        state_from_observation(env, obs)
    set_state(env, state_from_observation(env, obs, pose_only=True))
    np.testing.assert_allclose(observation_of(env)[14:], obs[14:], atol=0.02)  # the bodies lag one substep behind

    env, obs = started(sims, "Hopper-v5", 0)
    obs[-1] = 10.0
    with pytest.raises(ValueError, match="hides the speed"):
        state_from_observation(env, obs)


def test_what_no_state_can_be_read_from(sims: dict[str, gym.Env]) -> None:
    env, obs = started(sims, "Ant-v5", 0)
    with pytest.raises(TypeError, match="Ant-v5 doesn't determine"):
        state_from_observation(env, obs)
    with pytest.raises(TypeError, match="CartPole-v1 is neither"):
        get_state(gym.make("CartPole-v1"))
    env, obs = started(sims, "Reacher-v5", 0)
    with pytest.raises(ValueError, match="1 non-finite"):
        state_from_observation(env, np.append(obs[:-1], np.nan))
    with pytest.raises(ValueError, match=r"shape \(9,\)"):
        state_from_observation(env, obs[:-1])
    with pytest.raises(ValueError, match="finite numbers"):
        set_state(env, get_state(env)[:-1])
    with pytest.raises(TypeError, match="render_mode"):
        render_observation(env, obs)


def test_drawing_an_observation_draws_the_env_that_shows_it() -> None:
    pytest.importorskip("pygame")
    env, other = (make_real("Pendulum-v1", render_mode="rgb_array") for _ in range(2))
    obs, _ = env.reset(seed=3)
    other.reset(seed=4)
    picture = render_observation(other, obs)
    np.testing.assert_array_equal(picture, np.asarray(env.render()))
    assert (render_observation(other, [-1.0, 0.0, 0.0]) != picture).any()


# --- the swing-up


@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")  # MuJoCo's observations are unbounded
@pytest.mark.filterwarnings("ignore:.*test the rendering:UserWarning")
def test_the_swing_up_is_an_env_that_begins_below_and_never_terminates() -> None:
    env = make_real(SWING_UP, max_episode_steps=40)
    check_env(env.unwrapped, skip_render_check=True)
    obs, _ = env.reset(seed=0)
    assert obs[1] < -0.99
    steps = [env.step(np.ones(1, dtype=np.float32)) for _ in range(40)]
    assert [step[2] for step in steps] == [False] * 40 and [step[3] for step in steps] == [False] * 39 + [True]
    assert all(0 <= float(step[1]) <= 1 for step in steps)
    assert 1.4 < max(step[0][0] for step in steps) < 1.6, "the rail ends"
    assert gym.spec(SWING_UP).max_episode_steps == 250


def test_upright_in_the_middle_earns_one_and_hanging_nothing() -> None:
    obs = np.array([[0.0, 1, 0, 0, 0], [1.0, 1, 0, 0, 0], [0, 1, 0, 0, 3], [0, -1, 0, 0, 0]])
    half = (1 + np.exp(-1)) / 2
    np.testing.assert_allclose(compute_reward(obs, np.zeros((4, 1))), [1, half, half, 0], atol=1e-12)
    assert compute_reward(obs[0], np.ones(1)) == pytest.approx(0.8)


def test_whoever_pumps_energy_into_the_pole_and_then_balances_it_swings_it_up() -> None:
    env = make_real(SWING_UP)
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        total, seen, truncated = 0.0, [], False
        while not truncated:
            place, cosine, sine, speed, turning = obs
            energy = cosine + turning**2 / 46  # of the pole, 1 where it stands still upright
            push = 0.9 * (energy - 1.25) * turning * cosine - 0.2 * place - 0.1 * speed
            if cosine > 0.81:
                push = 1.3 * place + 9.9 * np.arctan2(sine, cosine) + 1.5 * speed + 1.9 * turning
            obs, reward, _, truncated, _ = env.step(np.clip([push], -1, 1).astype(np.float32))
            total += float(reward)
            seen.append(obs)
        assert total > 160 and np.array(seen)[-50:, 1].min() > 0.99
    assert play_random(SWING_UP, episodes=3).returns.max() < 40


# --- chunked actions


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "InvertedPendulum-v5", "Reacher-v5"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), chunk=st.integers(1, 9))
def test_a_chunk_is_its_actions_one_by_one(sims: dict[str, gym.Env], env_id: str, seed: int, chunk: int) -> None:
    env = sims.setdefault(env_id, make_real(env_id))
    chunked = ChunkedActions(sims.setdefault(env_id + " chunked", make_real(env_id)), chunk)
    env.reset(seed=seed)
    chunked.reset(seed=seed)
    ended = False
    for n in range(60):
        if ended:
            break
        actions = actions_for(env, seed + n, chunk)
        rows = []
        for action in actions:
            rows.append(env.step(action))
            if rows[-1][2] or rows[-1][3]:
                break
        obs, reward, terminated, truncated, info = chunked.step(actions)
        np.testing.assert_array_equal(obs, rows[-1][0])
        assert reward == pytest.approx(sum(float(row[1]) for row in rows))
        assert (terminated, truncated) == rows[-1][2:4]
        np.testing.assert_array_equal(info["inner"]["obs"], [row[0] for row in rows])
        np.testing.assert_array_equal(info["inner"]["reward"], [float(row[1]) for row in rows])
        np.testing.assert_array_equal(info["inner"]["terminated"], [row[2] for row in rows])
        ended = terminated or truncated


def test_a_chunk_stops_where_the_episode_ends() -> None:
    env = make_real("InvertedPendulum-v5", chunk=100)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(np.full((100, 1), 3.0, dtype=np.float32))
    played = len(info["inner"]["reward"])
    assert terminated and not truncated and played < 100
    assert info["inner"]["terminated"].tolist() == [False] * (played - 1) + [True]
    assert reward == played - 1  # one for every step that it stays up

    env = make_real("Reacher-v5", chunk=8)  # 50 steps: six chunks and a quarter
    env.reset(seed=0)
    lengths = []
    truncated = False
    while not truncated:
        _, _, _, truncated, info = env.step(np.zeros((8, 2), dtype=np.float32))
        lengths.append(len(info["inner"]["reward"]))
    assert lengths == [8] * 6 + [2]


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")  # that's what a wrapper is
@pytest.mark.filterwarnings("ignore:.*Box action space.*:UserWarning")  # Pendulum's torque reaches 2, not 1
@pytest.mark.filterwarnings("ignore:.*Box observation space.*:UserWarning")  # MuJoCo's observations are unbounded
@pytest.mark.filterwarnings("ignore:.*test the rendering:UserWarning")
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Reacher-v5", "HalfCheetah-v5"])
def test_gymnasium_accepts_the_chunked_env(env_id: str) -> None:
    env = make_real(env_id, chunk=3)
    assert env.action_space.shape == (3, *env.unwrapped.action_space.shape)  # type: ignore[misc]
    check_env(env, skip_render_check=True)
    assert env.spec is not None
    again = gym.make(env.spec)
    assert again.action_space == env.action_space


def test_one_action_a_step_is_the_simulator_itself() -> None:
    env = make_real("Pendulum-v1", max_episode_steps=7)
    assert env.action_space.shape == (1,)
    assert env.spec is not None and env.spec.max_episode_steps == 7


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.zeros(2), "shape"),
        (np.zeros((4, 2)), "shape"),
        ([[0.0, 0.0], [0.0, np.nan], [0.0, 0.0]], "finite"),
        ([[0.0, 0.0], [0.0, 1.01], [0.0, 0.0]], r"1.01 at \(1, 1\) is outside.*clip or rescale"),
    ],
)
def test_wrong_actions_are_refused_before_anything_is_played(actions: object, words: str) -> None:
    env = make_real("Reacher-v5", chunk=3)
    env.reset(seed=0)
    before = get_state(env)
    with pytest.raises(ValueError, match=words):
        env.step(actions)
    np.testing.assert_array_equal(get_state(env), before)


def test_wrong_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="from 1 on, got 0"):
        make_real("Pendulum-v1", chunk=0)
    with pytest.raises(ValueError, match="Box or a Discrete"):
        odd = gym.make("CartPole-v1")
        odd.action_space = gym.spaces.MultiBinary(2)
        ChunkedActions(odd, chunk=2)
    with pytest.raises(gym.error.NameNotFound):
        make_real("Reecher-v5")


def test_without_mujoco_the_error_names_the_extra_and_pendulum_works() -> None:
    script = (
        "import sys; sys.modules['mujoco'] = None\n"
        "from envs import make_real, SimulatorDynamics\n"
        "make_real('Pendulum-v1', chunk=2); SimulatorDynamics('Pendulum-v1')\n"
        "try: make_real('Reacher-v5')\n"
        "except ImportError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'kairos_gym[mujoco]'" in out.stdout


# --- the truth behind a world model's verbs


@pytest.fixture(scope="module")
def truths() -> dict[str, SimulatorDynamics]:
    return {}


def truth(truths: dict[str, SimulatorDynamics], env_id: str) -> SimulatorDynamics:
    if env_id not in truths:
        truths[env_id] = SimulatorDynamics(env_id)
    return truths[env_id]


@pytest.mark.parametrize("env_id", MAIN)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), cut=st.integers(1, 7))
def test_imagined_is_what_the_real_env_gives(
    sims: dict[str, gym.Env], truths: dict[str, SimulatorDynamics], env_id: str, seed: int, cut: int
) -> None:
    env, _ = started(sims, env_id, seed)
    dynamics = truth(truths, env_id)
    state = dynamics.capture(env)
    actions = actions_for(env, seed + 1, 8)
    obs, reward, terminated = play(env, actions)
    chunks = torch.from_numpy(actions)[None]
    state, first = dynamics.imagine(state, chunks[:, :cut])
    _, second = dynamics.imagine(state, chunks[:, cut:])
    assert first.obs is not None and second.obs is not None
    imagined = torch.cat([first.terminated, second.terminated], dim=1)[0].numpy()
    np.testing.assert_array_equal(imagined, np.maximum.accumulate(terminated))
    lives = 1 + int(np.argmax(imagined)) if imagined.any() else 8
    dreamed = torch.cat([first.obs, second.obs], dim=1)[0].numpy()
    np.testing.assert_allclose(dreamed[:lives], obs[:lives].astype(np.float32), rtol=1e-6, atol=1e-6)
    earned = torch.cat([first.reward, second.reward], dim=1)[0].numpy()
    np.testing.assert_allclose(earned[:lives], reward[:lives].astype(np.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "InvertedPendulum-v5", "Reacher-v5", "HalfCheetah-v5", SWING_UP])
def test_observing_starts_at_the_last_observation(
    sims: dict[str, gym.Env], truths: dict[str, SimulatorDynamics], env_id: str
) -> None:
    dynamics = truth(truths, env_id)
    shown, then, actions = [], [], []
    for seed in range(3):
        env, obs = started(sims, env_id, seed)
        shown.append([np.zeros_like(obs), obs])
        actions.append(actions_for(env, seed, 4))
        then.append(play(env, actions[-1]))
    evidence = torch.tensor(np.array(shown), dtype=torch.float32)
    state = dynamics.observe(dynamics.initial(3), evidence, torch.zeros(3, 2, *dynamics.spec.action_box.shape))
    _, imagined = dynamics.imagine(state, torch.from_numpy(np.array(actions)))
    assert imagined.obs is not None
    alive = ~np.array([row[2] for row in then])
    np.testing.assert_allclose(imagined.obs.numpy()[alive], np.array([row[0] for row in then])[alive], atol=1e-4)
    np.testing.assert_allclose(imagined.reward.numpy()[alive], np.array([row[1] for row in then])[alive], atol=1e-4)


@pytest.mark.parametrize("env_id", MAIN)
def test_a_future_is_the_same_alone_and_in_any_row(
    sims: dict[str, gym.Env], truths: dict[str, SimulatorDynamics], env_id: str
) -> None:
    dynamics: Dynamics = truth(truths, env_id)
    states = [truths[env_id].capture(started(sims, env_id, seed)[0]) for seed in range(3)]
    batch = LatentState({name: torch.cat([s[name] for s in states]) for name in states[0].tensors})
    actions = torch.from_numpy(actions_for(sims[env_id], 9, 12)).reshape(3, 4, -1)
    kept = batch.to_bytes()
    after, imagined = dynamics.imagine(batch, actions)
    assert batch.to_bytes() == kept, "imagine must leave the state it was given as it is"
    assert isinstance(after, LatentState) and isinstance(after, State) and after.tensors.keys() == batch.tensors.keys()
    assert after.nbytes == batch.nbytes
    for row, state in enumerate(states):
        batch_of_one, mine = dynamics.imagine(LatentState.from_bytes(state.to_bytes()), actions[row : row + 1])
        assert batch_of_one.to_bytes() == after.select(torch.tensor([row])).to_bytes()
        for a, b in zip(mine[:3], imagined[:3], strict=True):  # obs, reward, terminated
            assert a is not None and b is not None and torch.equal(a[0], b[row])
    _, blind = dynamics.imagine(batch, actions, decode=False)
    assert blind.obs is None and torch.equal(blind.reward, imagined.reward)
    assert imagined.reward.dtype == torch.float32 and imagined.terminated.dtype == torch.bool


def test_an_episode_that_ended_stays_ended_until_something_new_is_observed() -> None:
    dynamics = SimulatorDynamics("InvertedPendulum-v5", chunk=20)
    start = torch.zeros(2, 1, 4)
    state = dynamics.observe(dynamics.initial(2), start)
    actions = torch.zeros(2, 20, 1)
    actions[1] = 3.0
    fallen, imagined = dynamics.imagine(state, actions)
    end = int(imagined.terminated[1].int().argmax())
    assert not imagined.terminated[0].any() and imagined.reward[0].sum() == 20
    assert 0 < end < 19 and imagined.terminated[1, end:].all() and not imagined.terminated[1, :end].any()
    assert imagined.obs is not None and (imagined.obs[1, end:] == imagined.obs[1, end]).all()
    later, imagined = dynamics.imagine(fallen, actions[:, :3])
    assert imagined.terminated.tolist() == [[False] * 3, [True] * 3]
    assert imagined.reward.tolist() == [[1.0] * 3, [0.0] * 3]
    assert torch.equal(later["simulator"][1], fallen["simulator"][1])
    again, _ = dynamics.imagine(dynamics.observe(later, start), actions[:, :1])
    assert not again["ended"].any()


@pytest.mark.parametrize("env_id", _READOUTS)
def test_bare_mujoco_is_the_envs_own_step(sims: dict[str, gym.Env], env_id: str) -> None:
    """To the last bit of the state, also where an episode ends on the way or has ended before."""
    dynamics = SimulatorDynamics(env_id)
    states = [dynamics.capture(started(sims, env_id, seed)[0]) for seed in range(6)]
    simulator = torch.cat([state["simulator"] for state in states]).numpy()
    actions = actions_for(sims[env_id], 0, 6 * 25).reshape(6, 25, -1)
    ended = np.arange(6) == 2
    bare = dynamics._roll_out_mujoco(simulator, actions, ended)
    stepped = dynamics._roll_out_env(simulator, actions, ended)
    np.testing.assert_array_equal(bare.simulator, stepped.simulator)
    np.testing.assert_array_equal(bare.terminated, stepped.terminated)
    np.testing.assert_allclose(bare.obs, stepped.obs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(bare.reward, stepped.reward, rtol=1e-6, atol=1e-6)  # Gymnasium's effort is in float32
    if env_id == "InvertedPendulum-v5":
        ends = bare.terminated.argmax(1)
        assert ((ends > 0) & (ends < 24)).any(), "one has to end on the way"


def test_the_simulators_own_settings_reach_the_truth() -> None:
    plain, heavy = SimulatorDynamics("HalfCheetah-v5"), SimulatorDynamics("HalfCheetah-v5", ctrl_cost_weight=5.0)
    actions = torch.full((1, 1, 6), 0.5)
    start = torch.zeros(1, 1, 17)
    rewards = [float(d.imagine(d.observe(d.initial(1), start), actions)[1].reward) for d in (plain, heavy)]
    assert rewards[0] - rewards[1] == pytest.approx((5.0 - 0.1) * 6 * 0.25, rel=1e-5)


def test_the_spec_is_the_simulators(truths: dict[str, SimulatorDynamics]) -> None:
    spec = truth(truths, "Reacher-v5").spec
    env = make_real("Reacher-v5")
    assert (spec.observation_space, spec.action_space) == (env.observation_space, env.action_space)
    assert spec.chunk == 8 and spec.dt == pytest.approx(0.02)


def test_the_truth_refuses_what_it_cannot_play(sims: dict[str, gym.Env], truths: dict[str, SimulatorDynamics]) -> None:
    dynamics = truth(truths, "Reacher-v5")
    state = dynamics.capture(started(sims, "Reacher-v5", 0)[0])
    for actions, words in [
        (torch.zeros(1, 2), r"\[B,K,A\]"),
        (torch.zeros(1, 9, 2), "1<=K<=8"),
        (torch.zeros(2, 1, 2), "B=1"),
        (torch.full((1, 1, 2), torch.nan), "finite, 2 of 2"),
        (torch.full((1, 1, 2), 1.5), "outside.*clip or rescale"),
    ]:
        with pytest.raises(ValueError, match=words):
            dynamics.imagine(state, actions)
    with pytest.raises(ValueError, match="observed nothing yet"):
        dynamics.imagine(dynamics.initial(1), torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="O=10"):
        dynamics.observe(state, torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="non-finite"):
        dynamics.observe(state, torch.full((1, 1, 10), torch.nan))
    with pytest.raises(ValueError, match="can't continue Pendulum-v1"):
        dynamics.capture(make_real("Pendulum-v1"))
    with pytest.raises(ValueError, match="one for each future"):
        dynamics.initial(2, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 1"):
        SimulatorDynamics("Pendulum-v1", chunk=0)
    with pytest.raises(TypeError, match="CartPole-v1"):
        SimulatorDynamics("CartPole-v1")


SEVEN = [
    "Pendulum-v1",
    "InvertedPendulum-v5",
    "Reacher-v5",
    "HalfCheetah-v5",
    "InvertedDoublePendulum-v5",
    "Pusher-v5",
    SWING_UP,
]


@pytest.mark.parametrize("env_id", SEVEN)
def test_a_displaced_future_is_near_and_by_zero_the_same(env_id: str) -> None:
    env, simulator = make_real(env_id), SimulatorDynamics(env_id)
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(3):
        env.step(env.action_space.sample())
    state = simulator.capture(env)
    here = simulator.coordinates(state)
    g = torch.Generator().manual_seed(0)
    by = torch.randn(here.shape, generator=g, dtype=torch.float64)
    same, near = simulator.displaced(state, 0 * by), simulator.displaced(state, 1e-6 * by)
    assert torch.equal(same["simulator"], state["simulator"])
    assert torch.allclose(simulator.coordinates(near) - here, 1e-6 * by, atol=1e-12)
    low, high = (torch.as_tensor(bound) for bound in (simulator.spec.action_box.low, simulator.spec.action_box.high))
    actions = (low + (high - low) * torch.rand(1, 2, len(low), generator=g)).float()
    obs, moved = (simulator.imagine(s, actions)[1].obs for s in (state, near))
    assert obs is not None and moved is not None
    assert 0 < (obs - moved).abs().max() < 1e-2, "a little off: a little different"
    for wrong in (by[:, :-1], by * torch.nan):
        with pytest.raises(ValueError, match="displacement must be finite"):
            simulator.displaced(state, wrong)
    with pytest.raises(ValueError, match="states of this simulator are"):
        simulator.at(state["simulator"][:, 1:])


def test_training_goes_on_after_something_was_drawn() -> None:
    """Mesa's software renderer and Triton, which torch's first optimizer loads, crashed in this order."""
    code = (
        "import torch; from envs import make_real\n"
        "env = make_real('Reacher-v5', render_mode='rgb_array'); env.reset(seed=0)\n"
        "try: env.render()\n"
        "except Exception: print('nothing to draw with')\n"
        "torch.optim.Adam(torch.nn.Linear(2, 2).parameters()); print('trains')"
    )
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True
    )
    if "nothing to draw with" in done.stdout:
        pytest.skip("no EGL here")
    assert done.returncode == 0 and "trains" in done.stdout, done.stderr[-500:]
