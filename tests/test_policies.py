"""Policies: pure functions within the action space, trained once, and a user's own beside them."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.policies.ladder import fingerprint, load_policy, scripted_policies, trained_policies, with_noise
from world_model.episodes import Episodes

SPACES = [spaces.Box(-2, 1, (2, 2)), spaces.Box(0, 1, (3,), np.float64), spaces.Discrete(3, start=1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies of Pendulum that were trained for no time at all."""
    folder = tmp_path_factory.mktemp("policies")
    trained_policies("Pendulum-v1", folder, steps=64, progress=False)
    return folder


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("which", range(4))
def test_a_scripted_policy_is_a_pure_function_into_the_space(space: spaces.Space, which: int) -> None:
    policy = scripted_policies(space)[which]
    seeds = np.arange(5, dtype=np.int64)
    for step in (0, 3, 8, 21):
        whole = policy.act(None, step, seeds)
        assert all(space.contains(action) for action in whole)
        again = policy.act(None, step, seeds[[3, 1]])
        assert np.array_equal(again, whole[[3, 1]]), "neither order nor company matters"


def test_uniform_actions_are_uniform_and_held_ones_are_held() -> None:
    space = SPACES[0]
    assert isinstance(space, spaces.Box)
    _, uniform, held, _ = scripted_policies(space)
    drawn = uniform.act(None, 5, np.arange(4000, dtype=np.int64))
    assert np.allclose(drawn.mean(0), -0.5, atol=0.05) and np.allclose(drawn.std(0), 3 / 12**0.5, atol=0.05)
    seeds = np.arange(3, dtype=np.int64)
    assert np.array_equal(held.act(None, 0, seeds), held.act(None, 7, seeds))
    assert not np.array_equal(held.act(None, 7, seeds), held.act(None, 8, seeds))


def test_training_happens_once(folder: Path) -> None:
    files = sorted(folder.glob("*.zip"))
    assert [file.name for file in files] == ["sac-0-16.zip", "sac-0-32.zip", "sac-0-64.zip", "sac-0-8.zip"]
    written = [file.stat().st_mtime_ns for file in files]
    again = trained_policies("Pendulum-v1", folder, steps=64, progress=False)
    assert [file.stat().st_mtime_ns for file in files] == written
    assert [policy.name for policy in again][-1] == "SAC, 64 steps, noise 0.6" and len(again) == 6
    obs, seeds = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, -3.0]], np.float32), np.array([4, 9])
    for policy in again:
        whole = policy.act(obs, 3, seeds)
        assert whole.shape == (2, 1) and (np.abs(whole) <= 2).all()
        assert np.allclose(policy.act(obs[1:], 3, seeds[1:]), whole[1:], atol=1e-6)


def test_noise_is_of_its_size_and_its_seed() -> None:
    space = spaces.Box(-1, 1, (1,))
    still = scripted_policies(space)[0]
    policy, seeds = with_noise(still, space, 0.3), np.arange(4000, dtype=np.int64)
    moved = policy.act(None, 0, seeds)
    assert moved.std() == pytest.approx(0.3, abs=0.02)
    assert np.array_equal(policy.act(None, 0, seeds[7:8]), moved[7:8])
    assert not np.array_equal(policy.act(None, 1, seeds), moved)


def test_a_users_own_policy(folder: Path) -> None:
    policy = load_policy(f"sac:{folder / 'sac-0-64.zip'}", "Pendulum-v1")
    assert policy.name == "sac-0-64"
    assert policy.act(np.zeros((3, 3), np.float32), 0, np.arange(3)).shape == (3, 1)
    with pytest.raises(ValueError, match="algorithm:path with one of sac, "):
        load_policy("magic:x.zip", "Pendulum-v1")
    with pytest.raises(FileNotFoundError, match=r"no policy file none\.zip"):
        load_policy("sac:none.zip", "Pendulum-v1")
    with pytest.raises(ValueError, match="InvertedPendulum-v5 has"):
        load_policy(f"sac:{folder / 'sac-0-64.zip'}", "InvertedPendulum-v5")


def test_discrete_actions_are_learned_by_ppo(tmp_path: Path) -> None:
    found = trained_policies("CartPole-v1", tmp_path, steps=8, progress=False)
    assert [policy.name for policy in found] == ["PPO, 1 steps", "PPO, 2 steps", "PPO, 4 steps", "PPO, 8 steps"]
    space = gym.make("CartPole-v1").action_space
    assert all(space.contains(a) for a in found[-1].act(np.zeros((2, 4), np.float32), 0, np.arange(2)))


def test_every_policy_takes_its_turn_in_a_dataset(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    turns = scripted_policies(gym.make("Pendulum-v1").action_space) + trained_policies(
        "Pendulum-v1", folder, steps=64, progress=False
    )
    monkeypatch.setattr("kairos_gym.data.actors.ladder", lambda env_id, **_: turns)
    config = CollectConfig(seed=0, episodes=12, episode_steps=12, behaviour="ladder")
    whole = collect("Pendulum-v1", "a-v0", config, progress=False)
    episodes = Episodes.from_minari(whole)
    played = episodes.action[episodes.index > 0].view(12, 12)
    assert not played[0].any() and played[1].std() > 0.5 and not played[10].any()
    assert whole.storage.metadata["recipe"]["policies"] == fingerprint("Pendulum-v1", turns)
    again = Episodes.from_minari(collect("Pendulum-v1", "b-v0", config, progress=False))
    assert again.fingerprint() == episodes.fingerprint()
    monkeypatch.setattr("kairos_gym.data.actors.ladder", lambda env_id, **_: turns[:9])
    with pytest.raises(ValueError, match="collected with policies"):
        collect("Pendulum-v1", "a-v0", config, progress=False)
