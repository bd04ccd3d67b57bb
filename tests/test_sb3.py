"""DreamVecEnv is what Stable-Baselines3's DummyVecEnv makes of as many DreamEnvs, and its algorithms learn in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from toys import PointMass
from walks import Walk

from kairos_gym import DreamEnv, DreamVecEnv, load
from kairos_gym.evaluation.control import evaluate_planner
from planners import CEM, MPC


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chunk", [1, 3])
def test_sb3s_own_checker(chunk: int) -> None:
    check_env(DreamEnv(Walk(), chunk=chunk))


@pytest.mark.parametrize("chunk", [1, 3])
def test_it_is_what_dummy_vec_env_makes_of_dream_envs(chunk: int) -> None:
    kwargs: dict[str, Any] = dict(model=Walk(wall=0.5), chunk=chunk, sampled=True, max_episode_steps=7)
    ours, theirs = DreamVecEnv(num_envs=5, **kwargs), DummyVecEnv([lambda: DreamEnv(**kwargs)] * 5)
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    for env in (ours, theirs):
        env.seed(3)
    np.testing.assert_array_equal(np.asarray(ours.reset()), np.asarray(theirs.reset()))
    ours.action_space.seed(0)
    ends, cut = 0, 0
    for _ in range(60):
        actions = np.stack([ours.action_space.sample() for _ in range(5)])
        got, want = ours.step(actions), theirs.step(actions)
        for x, y in zip(got[:3], want[:3], strict=True):
            assert isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
            np.testing.assert_allclose(x, y, atol=1e-6)
        assert got[1].dtype == want[1].dtype == np.float32
        for done, x, y in zip(got[2], got[3], want[3], strict=True):
            assert x["TimeLimit.truncated"] == y["TimeLimit.truncated"]
            assert ("terminal_observation" in x) == ("terminal_observation" in y) == done
            if done:
                np.testing.assert_allclose(x["terminal_observation"], y["terminal_observation"], atol=1e-6)
                ends, cut = ends + 1, cut + x["TimeLimit.truncated"]
    assert 3 < cut < ends - 3, "too few ends, of both kinds, to have tried anything"


def test_stock_wrappers() -> None:
    env: Any = VecNormalize(VecMonitor(DreamVecEnv(Walk(), 4, max_episode_steps=5)))
    env.reset()
    episodes = [info["episode"]["l"] for _ in range(10) for info in env.step(np.zeros((4, 2)))[3] if "episode" in info]
    assert episodes == [5] * 8 and env.obs_rms.count > 40


def test_each_dream_is_reached() -> None:
    env = DreamVecEnv(Walk(), 3, max_episode_steps=5)
    env.seed(0)
    env.reset()
    assert env.get_attr("max_episode_steps") == [5] * 3 and env.get_attr("chunk", indices=1) == [1]
    env.set_attr("mark", "me", indices=[1])
    assert env.get_attr("mark", indices=[1]) == ["me"] and not env.has_attr("mark")
    blob = env.env_method("snapshot", indices=2)[0]
    env.step(np.ones((3, 2)))
    before = env.dreams.observations
    env.env_method("restore", blob, indices=[0])
    np.testing.assert_array_equal(env.dreams.observations[1:], before[1:])
    assert not np.array_equal(env.dreams.observations[0], before[0])
    assert env.env_is_wrapped(Monitor) == [False] * 3
    env.set_options({"observation": np.array([0.5, 0.5])})
    np.testing.assert_array_equal(env.reset(), np.full((3, 2), 0.5))
    assert not np.array_equal(env.reset(), np.full((3, 2), 0.5)), "options hold for one reset"
    env.close()


def test_bad_actions_leave_it_usable() -> None:
    env = DreamVecEnv(Walk(), 2)
    env.reset()
    for bad in (np.zeros((3, 2)), np.full((2, 2), np.nan), np.full((2, 2), 7.0)):
        with pytest.raises(ValueError, match="action"):
            env.step(bad)
    env.step(np.zeros((2, 2)))
    with pytest.raises(TypeError, match="autoreset_mode"):
        DreamVecEnv(Walk(), 2, autoreset_mode="Disabled")


class Home(PointMass):
    """A point that should go home from within +-1, with starts."""

    def __init__(self) -> None:
        super().__init__(dt=0.2)
        box = gym.spaces.Box(-4, 4, (2,), np.float32)
        self.spec = type(self.spec)(box, self.spec.action_space, self.spec.chunk, self.spec.dt)
        grid = torch.cartesian_prod(torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9))
        self.starts = SimpleNamespace(obs=grid[:, None], actions=torch.zeros(81, 1, 2))


@pytest.mark.slow
def test_ppo_learns_in_a_dream() -> None:
    model, steps = Home(), 12
    best = float(model.optimal_return(model.starts.obs[:, 0], steps).mean())
    venv = VecMonitor(DreamVecEnv(model, 64, max_episode_steps=steps))
    venv.seed(0)
    learner = PPO("MlpPolicy", venv, n_steps=48, batch_size=768, gamma=0.9, learning_rate=2e-3, seed=0, device="cpu")
    before = np.mean(evaluate_policy(learner, venv, n_eval_episodes=256)[0])
    learner.learn(40_000)
    after = np.mean(evaluate_policy(learner, venv, n_eval_episodes=256)[0])
    print(before, after, best)
    assert before < 2 * best and after > 1.15 * best, (before, after, best)


def test_a_planner_is_a_policy_for_sb3() -> None:
    """``evaluate_policy`` plays real episodes with an MPC, side by side, as ``kairos_gym.evaluation.control`` does."""
    planner = CEM(horizon=5, candidates=16, elites=4, iterations=2)
    sims = DummyVecEnv([lambda: Monitor(gym.make("Pendulum-v1"))] * 3)
    sims.seed(100)
    mpc = MPC(load("pendulum"), planner, seed=100)
    returns, _ = evaluate_policy(mpc, sims, n_eval_episodes=3, return_episode_rewards=True)  # type: ignore[arg-type]
    played = evaluate_planner("Pendulum-v1", load("pendulum"), planner, episodes=3, seed=100, progress=False)
    np.testing.assert_allclose(returns, played.returns, rtol=1e-3)
    dreams = DreamVecEnv("pendulum", num_envs=4, max_episode_steps=20)
    mean: Any = evaluate_policy(mpc, dreams, n_eval_episodes=4, warn=False)[0]  # type: ignore[arg-type]
    assert -400 < mean < 0
