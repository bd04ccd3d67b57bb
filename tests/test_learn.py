"""Policies learned in dreams: toys with known optima, a perfect dream, what is kept, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny import dreamer
from toys import PointMass

from envs import SimulatorDynamics, make_real
from kairos_gym import DreamVecEnv, load
from kairos_gym.learning.learn import learn as learn_in_dream
from kairos_gym.learning.learn_config import LearnConfig
from kairos_gym.policies.evaluate import Evaluation, evaluate
from kairos_gym.policies.sb3 import (
    ALGORITHMS,
    Algorithm,
    MixedReplayBuffer,
    TrainingRecord,
    make_algorithm,
    train_policy,
)
from world_model.dynamics import Pessimistic
from world_model.episodes import StartStates


def mass(dreams: int, steps: int = 12) -> DreamVecEnv:
    """Points within +-1 of home that have 12 steps to get there."""
    toy: Any = PointMass(1, dt=0.2)
    toy.starts = StartStates(torch.linspace(-1, 1, 41).view(-1, 1, 1), torch.zeros(41, 1, 1))
    return DreamVecEnv(toy, dreams, max_episode_steps=steps)


def filled(reward: float, size: int = 50) -> ReplayBuffer:
    box = spaces.Box(-1, 1, (2,))
    buffer = MixedReplayBuffer(size, box, box)
    for _ in range(size):
        obs = np.zeros((1, 2), np.float32)
        buffer.add(obs, obs, obs, np.array([reward]), np.array([False]), [{}])
    return buffer


@pytest.mark.parametrize(("share", "real"), [(0.0, 0), (0.05, 5), (0.5, 50), (0.996, 100), (1.0, 100)])
def test_a_share_of_every_batch_is_real(share: float, real: int) -> None:
    mixed = filled(0.0)
    assert isinstance(mixed, MixedReplayBuffer)
    mixed.share = share
    assert mixed.sample(100).rewards.sum() == 0, "without real steps all are imagined"
    mixed.real = filled(1.0)
    batch = mixed.sample(100)
    assert batch.rewards.sum() == real
    assert len(batch.observations) == len(batch.dones) == 100


def test_a_perfect_dream_promises_what_is_earned() -> None:
    real = DummyVecEnv([lambda: make_real("Pendulum-v1")] * 3)
    truth: Any = SimulatorDynamics("Pendulum-v1")
    truth.starts = StartStates(torch.tensor([[[1.0, 0.0, 0.0]]]), torch.zeros(1, 1, 1))
    dream = DreamVecEnv(truth, 3, max_episode_steps=200)
    policy = make_algorithm("sac", dream, seed=1)
    evaluation = evaluate(policy, real, dream, seed=5)
    assert evaluation.imagined is not None and len(set(evaluation.real)) == 3
    np.testing.assert_allclose(evaluation.imagined, evaluation.real, rtol=1e-3)
    np.testing.assert_array_equal(evaluate(policy, real, seed=5).real, evaluation.real)
    assert not np.array_equal(evaluate(policy, real, seed=6).real, evaluation.real)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_learns_to_go_home(algorithm: Algorithm, tmp_path: Path) -> None:
    steps = 60_000 if algorithm == "ppo" else 12_000
    model = train_policy(algorithm, mass(32), mass(8), tmp_path, steps=steps, every=steps // 2, progress=False)
    venv = mass(41)
    venv.set_options([{"observation": np.array([x], np.float32)} for x in np.linspace(-1, 1, 41)])
    obs: Any = venv.reset()
    start, total = torch.from_numpy(obs), np.zeros(41)
    for _ in range(12):
        obs, reward, _, _ = venv.step(model.predict(obs, deterministic=True)[0])
        total += reward
    best = PointMass(1, dt=0.2).optimal_return(start, 12)
    still = -12 * start.abs()[:, 0]
    assert total.mean() > best.mean() - 0.1 * (best - still).mean()


def test_what_is_kept_and_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere := tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    venv, real = mass(8), mass(4)

    def run(steps: int, **more: Any) -> Any:
        return train_policy("sac", venv, real, tmp_path, steps=steps, every=400, dream=mass(4), progress=False, **more)

    first = run(800)
    assert first.num_timesteps == 800
    kept = (tmp_path / "evaluations.jsonl").read_text()
    rows = [json.loads(line) for line in kept.splitlines()]
    assert [row["steps"] for row in rows] == [400, 800]
    assert all(len(row["real"]) == 4 and row["imagined"] == row["real"] for row in rows), "both are the same toy"
    run(800)
    assert (tmp_path / "evaluations.jsonl").read_text() == kept, "what is done is not done again"
    last = run(1200)
    assert last.num_timesteps == 1200 and last.replay_buffer.size() >= 1200 // 8 - 1
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    best = SAC.load(tmp_path / "best.zip", device="cpu")
    assert evaluate(best, real).real.mean() == pytest.approx(max(np.mean(row["real"]) for row in rows))
    assert not list(elsewhere.iterdir()), "nothing is left anywhere else"
    with pytest.raises(ValueError, match=r"seed 0, not 1.*another folder"):
        run(1600, seed=1)


@pytest.mark.filterwarnings("ignore:You are trying to run PPO")
def test_a_model_names_its_simulator(tmp_path: Path) -> None:
    made = learn_in_dream(
        load("pendulum"), tmp_path, LearnConfig(algorithm="ppo", steps=640, dreams=32), progress=False
    )
    assert made.num_timesteps >= 640
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert len(rows[-1]["real"]) == 10
    np.testing.assert_allclose(rows[-1]["imagined"], rows[-1]["real"], rtol=0.1)  # the shipped model is that good
    assert {path.name for path in tmp_path.iterdir()} >= {
        "best.zip",
        "logs",
        "about.json",
        f"last-{made.num_timesteps}.zip",
    }


@pytest.mark.filterwarnings("ignore:You are trying to run PPO")
def test_guards_and_rewards_reach_the_dreams(tmp_path: Path, made: list[tuple[Any, dict[str, Any]]]) -> None:
    evaluation = "Pendulum-v1,max_episode_steps=5"
    one: Any = lambda obs, action, next_obs: np.ones(len(obs))  # noqa: E731
    config = LearnConfig(algorithm="ppo", steps=640, dreams=32, max_error=0.2, penalty=2.0)
    learn_in_dream("pendulum", tmp_path, config, env_id=evaluation, reward_fn=one, progress=False)
    (plain, shown), (wary, kwargs) = sorted(made, key=lambda pair: isinstance(pair[0], Pessimistic))
    assert wary.penalty == 2.0 and wary.dynamics is plain
    assert kwargs == {"max_error": 0.2, "reward_fn": one} and shown == {"max_episode_steps": 5, "reward_fn": one}
    row = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[-1])
    assert row["imagined"] == [5.0] * 10, "as long as for real, in the reward that was asked for"
    with pytest.raises(ValueError, match="reward_fn"):
        learn_in_dream("pendulum", tmp_path, config, env_id=evaluation, progress=False)


def test_the_best_is_kept_and_a_line_is_the_last_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, model = TrainingRecord(tmp_path, {"a": 1}), make_algorithm("sac", mass(2))
    record.add(model, 1, Evaluation(np.array([3.0]), None))
    best = (tmp_path / "best.zip").read_bytes()
    record.add(model, 2, Evaluation(np.array([1.0]), None))
    assert (tmp_path / "best.zip").read_bytes() == best
    assert {path.name for path in tmp_path.glob("*-*")} == {"last-2.zip", "replay-2.pkl"}

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "save", killed)
        record.add(model, 3, Evaluation(np.array([0.0]), None))
    again = TrainingRecord(tmp_path, {"a": 1})
    assert again.rows == record.rows[:2] and again.last.is_file() and again.replay.is_file()
    with pytest.raises(ValueError, match="a 1, not 2"):
        TrainingRecord(tmp_path, {"a": 2})


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no simulator"):
        learn_in_dream(dreamer(), tmp_path)
    with pytest.raises(ValueError, match="at least 1280"):
        learn_in_dream("pendulum", tmp_path, LearnConfig(steps=100))
    with pytest.raises(ValueError, match="evaluate it in another simulator"):
        learn_in_dream("pendulum", tmp_path, env_id="Reacher-v5")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'dqn'"):
        make_algorithm("dqn", mass(2))  # type: ignore[arg-type]


def test_a_pessimistic_dream_is_an_env_like_any() -> None:
    model = load("pendulum")
    plain, wary = DreamVecEnv(model, 4), DreamVecEnv(Pessimistic(model, 1.0), 4)
    for venv in (plain, wary):
        venv.seed(0)
    np.testing.assert_array_equal(np.asarray(plain.reset()), np.asarray(wary.reset()))
    actions = np.zeros((4, 1), np.float32)
    (a, full, *_), (b, less, *_) = plain.step(actions), wary.step(actions)
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
    assert (less < full).all()
    blob = wary.dreams.snapshot()
    with pytest.raises(ValueError, match="pessimistic"):
        plain.dreams.restore(blob)
