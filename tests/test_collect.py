"""Recording experience: the same data for the same command, killed in between or not."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv

from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def record(dataset: minari.MinariDataset) -> list[tuple[bytes, ...]]:
    """Every byte of every episode."""
    return [
        (e.observations.tobytes(), e.actions.tobytes(), e.rewards.tobytes(), e.terminations.tobytes())
        for e in dataset.iterate_episodes()
    ]


def test_the_same_command_gives_the_same_data_and_another_seed_other_data() -> None:
    first = record(collect("Reacher-v5", "a-v0", CollectConfig(seed=1, episodes=4), progress=False))
    assert record(collect("Reacher-v5", "b-v0", CollectConfig(seed=1, episodes=4), progress=False)) == first
    assert len({episode[0] for episode in first}) == 4, "every episode has its own seed"
    assert record(collect("Reacher-v5", "c-v0", CollectConfig(seed=2, episodes=4), progress=False)) != first
    assert record(collect("Reacher-v5", "d-v0", CollectConfig(seed=1, episodes=2), progress=False)) == first[:2]


def test_several_workers_give_the_same_data() -> None:
    one = collect("Reacher-v5", "one-v0", CollectConfig(seed=1, episodes=7), progress=False)
    two = collect("Reacher-v5", "two-v0", CollectConfig(seed=1, episodes=7, workers=2), progress=False)
    assert record(one) == record(two)
    whole = collect(
        "Pendulum-v1", "steps-v0", CollectConfig(seed=1, steps=450, episode_steps=100, workers=2), progress=False
    )
    assert whole.total_episodes == 5


class Deadly:
    """A policy that kills its process at its n-th action; with a ``mark``, a file, only the first time."""

    def __init__(self, n: int, mark: Path | None = None):
        self.n, self.mark, self.calls = n, mark, 0

    def __call__(self, obs: np.ndarray) -> list[float]:
        self.calls += 1
        if self.calls == self.n and not (self.mark and self.mark.exists()):
            if self.mark:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [0.0]


def test_a_worker_that_dies_is_replaced(datasets: Path) -> None:
    config = CollectConfig(seed=3, episodes=8, workers=2)
    mark = datasets / "mark"
    whole = collect("Pendulum-v1", "dies-v0", config, policy=Deadly(250, mark), progress=False)
    assert mark.exists() and whole.total_episodes == 8
    assert record(collect("Pendulum-v1", "calm-v0", config, policy=Deadly(250, mark), progress=False)) == record(whole)


def test_workers_that_keep_dying_are_given_up(datasets: Path) -> None:
    with pytest.raises(RuntimeError, match="workers died 3 times before episode 0"):
        collect(
            "Pendulum-v1", "dead-v0", CollectConfig(seed=3, episodes=8, workers=2), progress=False, policy=Deadly(50)
        )


def test_what_is_kept_is_what_the_simulator_gave() -> None:
    dataset = collect(
        "Reacher-v5", "reacher/mixed-v0", CollectConfig(seed=0, steps=110, episode_steps=40), progress=False
    )
    assert (dataset.total_episodes, dataset.total_steps) == (3, 120), "the last episode is finished"
    assert list(minari.list_local_datasets()) == ["reacher/mixed-v0"]
    loaded = minari.load_dataset("reacher/mixed-v0")
    env = loaded.recover_environment()
    seeds = [metadata["seed"] for metadata in loaded.storage.get_episode_metadata(range(3))]
    for episode, seed in zip(loaded.iterate_episodes(), seeds, strict=True):
        obs, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(episode.observations[0], obs)
        for t, action in enumerate(episode.actions):
            obs, reward, terminated, truncated, _ = env.step(action)
            np.testing.assert_array_equal(episode.observations[t + 1], obs)
            assert (episode.rewards[t], episode.terminations[t], episode.truncations[t]) == (
                reward,
                terminated,
                truncated,
            )
        assert truncated and len(episode.actions) == 40
    recipe = loaded.storage.metadata["recipe"]
    assert recipe["env_id"] == "Reacher-v5" and recipe["seed"] == 0 and recipe["behaviour"] == "mixed"
    assert recipe["steps"] == 110 and set(recipe["versions"]) == {"gymnasium", "numpy", "mujoco"}


def holds(actions: np.ndarray) -> list[int]:
    """How many steps each action was held."""
    changes = np.flatnonzero((np.diff(actions, axis=0) != 0).any(axis=1)) + 1
    return np.diff([0, *changes, len(actions)]).tolist()


def test_the_behaviours() -> None:
    kept = {
        behaviour: [
            e.actions
            for e in collect(
                "Pendulum-v1", f"{behaviour}-v0", CollectConfig(seed=0, episodes=4, behaviour=behaviour), progress=False
            ).iterate_episodes()
        ]
        for behaviour in ("uniform", "held", "mixed")
    }
    assert all(set(holds(actions)) == {1} for actions in kept["uniform"])
    for actions in kept["held"]:
        assert max(holds(actions)) == 8 and len(set(holds(actions))) > 4
    assert [max(holds(actions)) > 1 for actions in kept["mixed"]] == [False, True, False, True]
    everything = np.concatenate(kept["uniform"])
    assert everything.min() < -1.9 and everything.max() > 1.9 and abs(everything.mean()) < 0.2


def test_a_policy_of_ones_own() -> None:
    def against_the_motion(obs: np.ndarray) -> list[float]:
        return [float(np.clip(-obs[2], -2, 2))]

    dataset = collect(
        "Pendulum-v1", "own-v0", CollectConfig(seed=0, episodes=1), policy=against_the_motion, progress=False
    )
    episode = dataset[0]
    np.testing.assert_allclose(episode.actions[:, 0], np.clip(-episode.observations[:-1, 2], -2, 2))
    assert "against_the_motion" in dataset.storage.metadata["algorithm_name"]
    with pytest.raises(ValueError, match="not in the action space"):
        collect("Pendulum-v1", "wild-v0", CollectConfig(seed=0, episodes=1), policy=lambda obs: [3.0], progress=False)


def test_a_killed_run_goes_on_and_gives_what_an_unbroken_one_gives(
    datasets: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = (
        "from kairos_gym.data.collect import collect; from kairos_gym.data.collect_config import CollectConfig; "
        "collect('Pendulum-v1', 'pendulum/k-v0', CollectConfig(seed=5, episodes=60))"
    )
    process = subprocess.Popen([sys.executable, "-c", command])
    journal = datasets / "pendulum" / ".k-v0.part" / "episodes.journal"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 0):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "the same command goes on" in capfd.readouterr().err
    assert list(minari.list_local_datasets()) == [], "nothing half-done may look like a dataset"
    resumed = collect("Pendulum-v1", "pendulum/k-v0", CollectConfig(seed=5, episodes=60))
    assert "going on after" in capfd.readouterr().err
    assert record(resumed) == record(
        collect("Pendulum-v1", "whole-v0", CollectConfig(seed=5, episodes=60), progress=False)
    )
    assert list((datasets / "pendulum").glob(".*")) == [], "nothing is left over"


class Interrupted:
    """A pure policy, and somebody who presses Ctrl-C after a number of its actions."""

    def __init__(self, after: float):
        self.left = after

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return np.tanh(obs[:1])


@pytest.mark.parametrize("lost", [0, 1, 700, 10_000])
def test_an_interrupted_run_keeps_its_episodes_even_if_its_last_record_is_torn(
    datasets: Path, capfd: pytest.CaptureFixture[str], lost: int
) -> None:
    def run(dataset_id: str, after: float, episodes: int = 6) -> minari.MinariDataset:
        return collect("Pendulum-v1", dataset_id, CollectConfig(seed=0, episodes=episodes), policy=Interrupted(after))

    with pytest.raises(KeyboardInterrupt):
        run("torn-v0", after=3 * 200 + 50)
    assert "3 episodes with 600 steps are saved" in capfd.readouterr().err
    journal = datasets / ".torn-v0.part" / "episodes.journal"
    os.truncate(journal, journal.stat().st_size - lost)
    resumed = run("torn-v0", after=np.inf)
    assert f"going on after {3 - (lost > 0) - (lost > 5000)} episodes" in capfd.readouterr().err
    assert record(resumed) == record(run("whole-v0", after=np.inf))


def test_less_can_be_asked_for_after_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt):
        collect("Pendulum-v1", "less-v0", CollectConfig(seed=0, episodes=6), policy=Interrupted(800), progress=False)
    dataset = collect(
        "Pendulum-v1", "less-v0", CollectConfig(seed=0, episodes=2), policy=Interrupted(0), progress=False
    )
    assert (dataset.total_episodes, dataset.total_steps) == (2, 400)


def test_a_finished_dataset_is_returned_without_playing() -> None:
    first = collect(
        "Pendulum-v1", "done-v0", CollectConfig(seed=0, episodes=1), policy=Interrupted(200), progress=False
    )
    again = collect("Pendulum-v1", "done-v0", CollectConfig(seed=0, episodes=1), policy=Interrupted(0), progress=False)
    assert record(again) == record(first)


@pytest.mark.parametrize("finished", [True, False])
def test_what_another_command_collected_is_not_touched(finished: bool) -> None:
    if finished:
        collect("Pendulum-v1", "taken-v0", CollectConfig(seed=0, episodes=1), progress=False)
    else:
        with pytest.raises(KeyboardInterrupt):
            collect(
                "Pendulum-v1", "taken-v0", CollectConfig(seed=0, episodes=2), policy=Interrupted(250), progress=False
            )
    with pytest.raises(ValueError, match=r"seed 0, not 1.*another dataset_id"):
        collect("Pendulum-v1", "taken-v0", CollectConfig(seed=1, episodes=1), progress=False)
    with pytest.raises(ValueError, match="env_id 'Pendulum-v1', not 'Reacher-v5'"):
        collect("Reacher-v5", "taken-v0", CollectConfig(seed=0, episodes=1), progress=False)
    with pytest.raises(ValueError, match="not 'held'"):
        collect("Pendulum-v1", "taken-v0", CollectConfig(seed=0, episodes=1, behaviour="held"), progress=False)
    with pytest.raises(ValueError, match="episode_steps None, not 20"):
        collect("Pendulum-v1", "taken-v0", CollectConfig(seed=0, episodes=1, episode_steps=20), progress=False)
    if finished:
        with pytest.raises(ValueError, match="episodes 1, not 2"):
            collect("Pendulum-v1", "taken-v0", CollectConfig(seed=0, episodes=2), progress=False)


def test_two_runs_cannot_write_the_same_dataset(datasets: Path) -> None:
    part = datasets / ".busy-v0.part"
    part.mkdir()
    with open(part / "episodes.journal", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process"):
            collect("Pendulum-v1", "busy-v0", CollectConfig(seed=0, episodes=1), progress=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either steps or episodes"),
        ({"steps": 1, "episodes": 1}, "either steps or episodes"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"episodes": -1}, "episodes must be at least 1"),
        ({"steps": 1, "episode_steps": 0}, "episode_steps must be at least 1"),
        ({"steps": 1, "seed": -1}, "seed must be 0 or more"),
        ({"steps": 1, "workers": 0}, "workers must be at least 1"),
        ({"steps": 1, "behaviour": "wild"}, "'uniform', 'held', 'mixed', 'ladder'"),
        ({"steps": 1, "behaviour": "held", "policy": Interrupted(0)}, "leave out behaviour"),
        ({"steps": 1, "dataset_id": "no version"}, "'name-v0'"),
        ({"steps": 1, "dataset_id": "no-version"}, "'name-v0'"),
        ({"steps": 1, "dataset_id": "g/name-v0"}, "two or more letters"),
        ({"steps": 1, "env_id": "FrozenLake-v1"}, "observation space must be a Box"),
        ({"steps": 1, "env_id": "Endless-v0"}, "--episode-steps"),
        ({"steps": 1, "env_id": "Nameless-v0"}, "'module:Class'"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_nothing_behind(
    datasets: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], words: str
) -> None:
    endless = gym.envs.registration.EnvSpec("Endless-v0", gym.spec("Pendulum-v1").entry_point)
    nameless = gym.envs.registration.EnvSpec("Nameless-v0", lambda **given: PendulumEnv(**given), max_episode_steps=9)
    monkeypatch.setitem(gym.registry, "Endless-v0", endless)
    monkeypatch.setitem(gym.registry, "Nameless-v0", nameless)
    given: dict[str, Any] = {"env_id": "Pendulum-v1", "dataset_id": "x-v0", "policy": None} | arguments
    env_id, dataset_id, policy = (given.pop(name) for name in ("env_id", "dataset_id", "policy"))
    with pytest.raises(ValueError, match=words):
        collect(env_id, dataset_id, CollectConfig(**given), policy=policy, progress=False)
    assert list(datasets.iterdir()) == []
