"""Policies that learn by gradients through dreams: toys with known optima, what is kept, the draft alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tiny import dreamt, tiny_model
from torch import Tensor
from toys import PointMass, box_spec

from envs import SimulatorDynamics
from kairos_gym import DreamVectorEnv, load
from kairos_gym.learning.learn import learn
from kairos_gym.learning.learn_config import LearnConfig
from kairos_gym.policies.shac import ActorCritic, ShacConfig
from world_model.contract import Spec
from world_model.dynamics.draft_dynamics import DraftDynamics
from world_model.episodes import StartStates

STEPS = 12


def mass(dreams: int, wall: float = float("inf")) -> DreamVectorEnv:
    """Points within +-1 of home that have 12 steps to get there."""
    toy: Any = PointMass(1, dt=0.2, wall=wall)
    toy.starts = StartStates(torch.linspace(-1, 1, 41).view(-1, 1, 1), torch.zeros(41, 1, 1))
    return DreamVectorEnv(toy, dreams, max_episode_steps=STEPS, autoreset_mode="SameStep")


def earned(agent: ActorCritic) -> tuple[Tensor, Tensor, Tensor]:
    """What it earns from starts all over, what can be earned, and what standing still earns: [41]."""
    toy = PointMass(1, dt=0.2)
    start = x = torch.linspace(-1, 1, 41)[:, None]
    total = torch.zeros(41)
    for _ in range(STEPS):
        x, reward = toy.step(x, torch.from_numpy(agent.predict(x.numpy())[0]))
        total += reward
    return total, toy.optimal_return(start, STEPS), -STEPS * start.abs()[:, 0]


@pytest.mark.parametrize("wall", [float("inf"), 1.05])
def test_it_learns_to_go_home(wall: float) -> None:
    env = mass(32, wall)
    agent = ActorCritic.from_spec(env.model.spec)
    agent.start(env, 0)
    for _ in range(120):
        agent.rollout()
    total, best, still = earned(agent)
    assert total.mean() > best.mean() - 0.1 * (best - still).mean()
    assert agent.num_timesteps == 120 * 16 * 32


def test_a_horizon_sees_no_further_than_its_critic() -> None:
    """One step of gradient is enough where each step pays for itself."""
    env = mass(32)
    agent = ActorCritic.from_spec(env.model.spec, config=ShacConfig(horizon=1, discount=0.0, entropy=0.0))
    agent.start(env, 0)
    for _ in range(400):
        agent.rollout()
    total, best, still = earned(agent)
    assert total.mean() > best.mean() - 0.15 * (best - still).mean()


def test_it_goes_on_from_what_was_kept(tmp_path: Path) -> None:
    env = mass(8)
    one = ActorCritic.from_spec(env.model.spec, seed=3, config=ShacConfig(horizon=5, width=16))
    one.start(env, 0)
    one.rollout()
    one.save(tmp_path / "kept.zip")
    other = ActorCritic.load(tmp_path / "kept.zip")
    assert other.num_timesteps == 40 and other.config == one.config
    for agent in (one, other):
        agent.start(env, 7)
        agent.rollout()
    weights = other.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in one.state_dict().items())
    obs = np.array([[0.3], [-0.2]], np.float32)
    assert np.array_equal(one.predict(obs)[0][1], other.predict(obs[1])[0])


def test_what_it_cannot_learn_from() -> None:
    box = box_spec(2, 1)
    with pytest.raises(ValueError, match="must be vectors"):
        ActorCritic.from_spec(Spec(box.observation_space, spaces.Discrete(3), 1, 1.0))
    with pytest.raises(ValueError, match="finite bounds"):
        ActorCritic.from_spec(Spec(box.observation_space, spaces.Box(-np.inf, np.inf, (1,)), 1, 1.0))
    truth: Any = SimulatorDynamics("Pendulum-v1")
    truth.starts = StartStates(torch.tensor([[[1.0, 0.0, 0.0]]]), torch.zeros(1, 1, 1))
    env = DreamVectorEnv(truth, 2, max_episode_steps=9, autoreset_mode="SameStep")
    agent = ActorCritic.from_spec(truth.spec)
    agent.start(env, 0)
    with pytest.raises(ValueError, match="pass no gradient"):
        agent.rollout()


def test_a_name_is_enough(tmp_path: Path) -> None:
    def run(steps: int, **more: Any) -> Any:
        config = LearnConfig(algorithm="shac", steps=steps, dreams=8)
        return learn("pendulum", tmp_path, config, progress=False, **more)

    assert run(1280, horizon=8).num_timesteps == 1280
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 10
    assert run(1408, horizon=8).num_timesteps >= 1408, "more steps may be asked for later"
    assert ActorCritic.load(tmp_path / "best.zip").config.horizon == 8
    with pytest.raises(ValueError, match="another folder"):
        run(1408, horizon=4)
    with pytest.raises(ValueError, match="no gradient"):
        learn("pendulum", tmp_path / "b", LearnConfig(algorithm="shac", penalty=1.0))


@pytest.mark.parametrize("frames", [1, 2])
def test_the_draft_alone(frames: int) -> None:
    model = tiny_model(draft_frames=frames)
    draft_dynamics = DraftDynamics(model)
    torch.manual_seed(2)
    obs, actions = torch.randn(5, 2, 3), torch.rand(5, 4, 2, requires_grad=True)
    state = draft_dynamics.observe(draft_dynamics.initial(5), obs, torch.zeros(5, 2, 2))
    after, imagined = draft_dynamics.imagine(state, actions)
    scaling = model.scaling
    predict_draft = model.predict_draft(scaling.obs(obs[:, 1]), scaling.action(actions), scaling.obs(obs[:, 0]))
    torch.testing.assert_close(dreamt(imagined), scaling.raw_obs(predict_draft.mean))
    torch.testing.assert_close(after["obs"], dreamt(imagined)[:, -1])
    for k in range(4):
        state, one = draft_dynamics.imagine(state, actions[:, k : k + 1])
        torch.testing.assert_close(dreamt(one)[:, 0], dreamt(imagined)[:, k])
        torch.testing.assert_close(one.reward[:, 0], imagined.reward[:, k])
    (slope,) = torch.autograd.grad(imagined.reward.sum(), actions)
    assert slope.shape == actions.shape and bool((slope != 0).all()), "every action counts"
    once = draft_dynamics.observe(draft_dynamics.initial(5), obs[:, :1])
    assert torch.equal(once["before"], once["obs"]), "a first frame stands for the one before it too"
    again = draft_dynamics.observe(once, obs[:, 1:], torch.zeros(5, 1, 2))
    assert torch.equal(again["before"], obs[:, 0])
    assert draft_dynamics.fingerprint() != model.fingerprint()
    with pytest.raises(ValueError, match="no draft"):
        DraftDynamics(tiny_model(draft=False))


def test_it_dreams_nearly_what_the_model_does() -> None:
    model = load("pendulum")
    actions = torch.rand(4, 1, 1) * 4 - 2
    ends = []
    for world in (model, DraftDynamics(model)):
        env = DreamVectorEnv(world, 4, autoreset_mode="SameStep")
        env.reset(seed=0)
        ends.append([env.step_torch(actions[:, 0])[0] for _ in range(8)][-1])
    torch.testing.assert_close(*ends, rtol=0.02, atol=0.02)
