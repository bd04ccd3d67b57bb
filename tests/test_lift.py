"""Lift from end to end: experts recorded, rewards and success read off observations, policies that skill separates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs import Expert, SimulatorDynamics, make_real
from envs.robosuite.rewards import lifted, simple_lift, staged_lift
from kairos_gym.bench.lift import PLANNER, lift
from kairos_gym.data import collect as recording
from kairos_gym.data.actors import EXPERT_VARIANTS
from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.data.datasets import simulator_of
from kairos_gym.evaluation.control import evaluate_planner
from kairos_gym.evaluation.intervals import wilson
from kairos_gym.models import load
from kairos_gym.policies.ladder import ladder
from planners import CEM, MPC, Objective

robosuite = pytest.importorskip("robosuite", exc_type=ImportError)

HELD_UP = "robosuite/Lift-v0,terminate_on_success=False"


def test_an_id_brings_arguments_along() -> None:
    env = make_real("robosuite/Lift-v0,robots=Sawyer,control_freq=10")
    assert env.unwrapped.embodiment.name == "Sawyer" and env.unwrapped.dt == 0.1  # type: ignore[attr-defined]
    assert make_real("Pendulum-v1,g=9.0").unwrapped.g == 9.0  # type: ignore[attr-defined]
    assert make_real("Pendulum-v1,g=9.0", g=8.0).unwrapped.g == 8.0  # type: ignore[attr-defined]
    seeing = make_real("robosuite/Lift-v0,cameras=('agentview', 'frontview'),robots=IIWA", disable_env_checker=True)
    assert list(seeing.observation_space) == ["state", "agentview", "frontview"]  # type: ignore[call-overload]


@pytest.mark.parametrize("arguments", ["robots", "robots=", "robots=Panda,robots=IIWA", "g=f(3)", "1=2", "g=1)+f(h=2"])
def test_arguments_of_an_id_have_one_form(arguments: str) -> None:
    with pytest.raises(ValueError, match="look like name=value"):
        make_real(f"robosuite/Lift-v0,{arguments}")


@pytest.mark.parametrize("name", ["terminate_on_success", "reward_shaping"])
def test_a_switch_is_true_or_false(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of True, False, got 'no'"):
        make_real(f"robosuite/Lift-v0,{name}=no")


def test_without_termination_a_cube_can_be_held() -> None:
    env = make_real(HELD_UP)
    obs, _ = env.reset(seed=3)
    expert, fields, told, ends = Expert(env), env.unwrapped.fields, [], []  # type: ignore[attr-defined]
    seen = []
    for _ in range(50):
        obs, _, terminated, _, info = env.step(expert(obs))
        seen.append(obs)
        told.append(info["success"])
        ends.append(terminated)
    assert sum(told) > 10 and not any(ends)
    assert lifted(torch.from_numpy(np.stack(seen)), fields).tolist() == told


@pytest.fixture(scope="module")
def way() -> tuple[torch.Tensor, Any]:
    """What the expert sees on its way, [T,O], and the fields."""
    env = make_real(HELD_UP)
    seen = [env.reset(seed=5)[0]]
    expert = Expert(env)
    for _ in range(35):
        seen.append(env.step(expert(seen[-1]))[0])
    return torch.from_numpy(np.stack(seen)), env.unwrapped.fields  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [simple_lift, staged_lift])
def test_a_reward_grows_along_the_experts_way(make: Any, way: tuple[torch.Tensor, Any]) -> None:
    seen, fields = way
    reward = make(fields)(seen[:-1], torch.zeros(len(seen) - 1, 7), seen[1:])
    up = lifted(seen[1:], fields)
    assert reward.shape == up.shape
    first, high = reward[0], reward[up]
    assert len(high) > 3 and reward[~up].max() < high.max()
    assert first < reward[len(reward) // 2] < high.max()
    batch = make(fields)(seen[:-1].expand(2, -1, -1), torch.zeros(2, len(seen) - 1, 7), seen[1:].expand(2, -1, -1))
    assert torch.allclose(batch[1], reward)


def test_the_staged_reward_asks_for_an_upright_hand_and_open_fingers(way: tuple[torch.Tensor, Any]) -> None:
    seen, fields = way
    reward, here = staged_lift(fields), seen[8].clone()
    assert here[fields["gripper_action"]] < 0 and not lifted(here, fields)
    closed, tilted = here.clone(), here.clone()
    closed[fields["gripper_action"]] = 1.0
    tilted[fields["eef_quat"]] = torch.tensor([0.6, 0.6, 0.4, 0.3])
    assert reward(here, here[:7], closed) < reward(here, here[:7], here)
    assert reward(here, here[:7], tilted) < reward(here, here[:7], here)
    longer = here.clone()
    longer[fields["eef_quat"]] *= 1.1  # as dreams have them
    assert torch.allclose(reward(here, here[:7], longer), reward(here, here[:7], here), atol=1e-5)


def test_experts_are_recorded_with_the_simulators_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    config = CollectConfig(episodes=5, episode_steps=45, behaviour="expert", seed=1)
    dataset = collect(HELD_UP, "lift/a-v0", config, progress=False)
    assert simulator_of(dataset) == HELD_UP
    episodes = list(dataset.iterate_episodes())
    assert {len(e.rewards) for e in episodes} == {45}  # success ended none
    best = [e.rewards.max() for e in episodes]
    assert min(best[:2]) == 1.0  # a clean and a noisy expert lift
    assert len(EXPERT_VARIANTS) == 8 and "interrupted" in EXPERT_VARIANTS[4]
    restored = dataset.recover_environment()
    assert restored.unwrapped.spec.kwargs["terminate_on_success"] is False
    again = collect(HELD_UP, "lift/b-v0", config, progress=False)
    for one, same in zip(episodes, again.iterate_episodes(), strict=True):
        np.testing.assert_array_equal(one.observations, same.observations)
        np.testing.assert_array_equal(one.actions, same.actions)
    with pytest.raises(ValueError, match="was collected with env_id"):
        collect("robosuite/Lift-v0", "lift/a-v0", config, progress=False)


def test_there_is_no_expert_for_every_simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there are experts for Lift, Stack, Door"):
        recording.collect(
            "Pendulum-v1", "pp/a-v0", CollectConfig(seed=0, episodes=1, behaviour="expert"), progress=False
        )
    assert not list(tmp_path.iterdir())


def test_experts_take_the_place_of_trained_policies_in_a_ladder() -> None:
    policies = ladder("robosuite/Lift-v0", progress=False)
    assert len(policies) == 10 and policies[4].name == "expert"
    env = gym.make("robosuite/Lift-v0")
    obs = np.stack([env.reset(seed=seed)[0] for seed in (0, 1, 2)])
    seeds = np.arange(3)
    for policy in policies:
        actions = policy.act(obs, 20, seeds)
        assert actions.shape == (3, 7) and env.action_space.contains(actions[0])
        np.testing.assert_array_equal(policy.act(obs[1:], 20, seeds[1:]), actions[1:])  # a pure function


def test_a_pose_shows_what_was_observed(way: tuple[torch.Tensor, Any]) -> None:
    seen, fields = way
    env: Any = make_real("robosuite/Lift-v0")
    env.reset(seed=77)  # another cube, elsewhere
    env.unwrapped.set_pose(seen[-1].numpy())
    shown = env.unwrapped._get_obs()
    for name in ("eef_pos", "cube_pos", "cube_quat", "cube_size", "joint_pos", "gripper_qpos"):
        np.testing.assert_allclose(shown[fields[name]], seen[-1][fields[name]], atol=1e-6, err_msg=name)
    stack: Any = make_real("robosuite/Stack-v0")
    with pytest.raises(TypeError, match="only flat observations of Lift can be drawn, not those of Stack"):
        stack.unwrapped.set_pose(stack.reset(seed=0)[0])


def test_the_true_simulator_plans_from_states_that_observations_do_not_tell() -> None:
    name = "robosuite/Lift-v0,max_episode_steps=2"
    played = evaluate_planner(
        name, SimulatorDynamics(name), CEM(horizon=1, candidates=4, iterations=1, elites=2), episodes=1
    )
    assert played.returns.shape == (1,) and 0 <= played.returns[0] <= 2


def test_lift_needs_an_episode() -> None:
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        lift("random", episodes=0)


def test_wilsons_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-4)


@pytest.mark.slow
def test_a_plan_in_the_dream_lifts_the_cube_for_real() -> None:
    env: Any = make_real("robosuite/Lift-v0")
    wins = 0
    for seed in range(300, 304):
        mpc = MPC(load("lift"), PLANNER, Objective(reward_fn=staged_lift(env.unwrapped.fields)), seed=seed)
        obs, info = env.reset(seed=seed)
        seen, over = None, False
        while not over:
            frames = []
            for action in mpc.act(obs, inner_obs=seen):
                obs, _, terminated, truncated, info = env.step(action)
                frames.append(obs)
                over = terminated or truncated
                if over:
                    break
            seen = np.stack(frames)
        wins += info["success"]
    assert wins >= 2
