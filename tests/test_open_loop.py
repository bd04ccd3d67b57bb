"""Imagined against simulated: which episodes are scored, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from tiny import tiny_model
from toys import PointMass

from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.evaluation.open_loop import OpenLoopErrors, open_loop, score
from kairos_gym.evaluation.windows import Windows
from world_model.episodes import Episodes
from world_model.model.world_model import WorldModel


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def pendulum(**card: object) -> WorldModel:
    model = tiny_model(obs_dim=3, action_dim=1)
    model.card = {"env": "Pendulum-v1", **card}
    return model


def walk(lengths: list[int], dim: int = 2) -> Episodes:
    """Episodes of the point mass with so many steps each, under random actions."""
    toy, g, parts = PointMass(dim), torch.Generator().manual_seed(0), []
    for steps in lengths:
        actions = torch.rand(steps, dim, generator=g) * 2 - 1
        x, obs, rewards = torch.rand(1, dim, generator=g), [], []
        obs.append(x[0])
        for u in actions:
            x, reward = toy.step(x, u[None])
            obs.append(x[0])
            rewards.append(reward[0])
        parts.append((torch.stack(obs), actions, torch.stack(rewards), torch.zeros(steps)))
    return Episodes.stack(tuple(array.numpy() for array in part) for part in parts)  # type: ignore[misc]


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("begin", [None, 0, 3])
def test_the_truth_makes_no_error(chunk: int, begin: int | None) -> None:
    episodes, toy = walk([12, 5, 30, 12]), PointMass()
    sizes = {"horizon": 6, "context": 2, "chunk": chunk, "trajectories": 3, "begin": begin}
    result = open_loop(toy, episodes, torch.ones(2), **sizes)  # type: ignore[arg-type]
    assert result.obs_error.shape == (3, 6, 2) and result.reward_error.shape == (3, 6)
    assert result.obs_error.abs().max() < 1e-5 and result.reward_error.abs().max() < 1e-5
    with pytest.raises(ValueError, match="3 episodes have"):
        open_loop(toy, episodes, torch.ones(2), **{**sizes, "trajectories": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"horizon": 0}, {"context": 0}, {"chunk": 0}, {"trajectories": 0}, {"begin": -1}])
def test_open_loop_refuses_numbers_that_make_no_sense(wrong: dict[str, int]) -> None:
    sizes = {"horizon": 2, "context": 2, "trajectories": 1, **wrong}
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be"):
        open_loop(PointMass(), walk([12]), torch.ones(2), **sizes)  # type: ignore[arg-type]


def test_a_table_has_only_steps_that_were_dreamed() -> None:
    result = OpenLoopErrors(torch.ones(2, 16, 3), torch.zeros(2, 16))
    assert result.table() == {"h1": {"rms": 1.0, "median": 1.0}, "h8": {"rms": 1.0, "median": 1.0}}
    for step in (0, 17):
        with pytest.raises(ValueError, match=f"16 steps were dreamed.* {step}$"):
            result.table([step])


def test_only_what_training_left_out_is_scored() -> None:
    dataset = collect("Pendulum-v1", "a-v0", CollectConfig(seed=0, episodes=6, episode_steps=12), progress=False)
    model = pendulum(data={"dataset": "a-v0", "held_out": 2})
    result = score(model, "a-v0", horizon=8, context=2)
    last = Episodes.from_minari(dataset, range(4, dataset.total_episodes))
    expected = open_loop(model, last, model.scaling.obs_std, horizon=8, context=2, trajectories=2)
    assert torch.equal(result.obs_error, expected.obs_error)
    assert len(score(model, "a-v0", horizon=8, context=2, trajectories=1).obs_error) == 1
    with pytest.raises(ValueError, match="left out the last 2 episodes of a-v0, so 3 can't"):
        score(model, "a-v0", horizon=8, context=2, trajectories=3)
    with pytest.raises(ValueError, match="left out the last 0 episodes"):
        score(pendulum(data={"dataset": "a-v0", "held_out": 0}), "a-v0", horizon=8, context=2)
    other = pendulum(data={"dataset": "b-v0", "held_out": 2})
    assert len(score(other, "a-v0", horizon=8, context=2).obs_error) == 6, "all are new to this one"


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari would like an author, a permalink, ...
def test_short_episodes_are_left_out_before_the_last_ones_are_taken() -> None:
    rng, box = np.random.default_rng(0), gym.spaces.Box
    buffers = [
        EpisodeBuffer(
            observations=rng.normal(size=(steps + 1, 3)).astype(np.float32),
            actions=rng.uniform(-2, 2, (steps, 1)).astype(np.float32),
            rewards=rng.normal(size=steps),
            terminations=np.arange(steps) == steps - 1,
            truncations=np.zeros(steps, bool),
        )
        for steps in (12, 12, 12, 5, 5, 5)
    ]
    spaces = {"observation_space": box(-np.inf, np.inf, (3,)), "action_space": box(-2, 2, (1,))}
    dataset = minari.create_dataset_from_buffers("short-v0", buffers, **spaces)
    model = pendulum()
    result = score(model, "short-v0", horizon=8, context=2, trajectories=2)
    long = Episodes.from_minari(dataset, range(1, 3))
    expected = open_loop(model, long, model.scaling.obs_std, horizon=8, context=2, trajectories=2)
    assert torch.equal(result.obs_error, expected.obs_error)
    with pytest.raises(ValueError, match=r"3 of the 6 episodes .* = 10 frames, 4 are needed, the longest has 13"):
        score(model, "short-v0", horizon=8, context=2, trajectories=4)


def test_another_simulators_data_are_refused() -> None:
    collect("Reacher-v5", "reacher-v0", CollectConfig(seed=0, episodes=1), progress=False)
    with pytest.raises(ValueError, match=r"the model dreams Pendulum-v1, but dataset reacher-v0 .* Reacher-v5"):
        score(pendulum(), "reacher-v0", horizon=4)
    unnamed = pendulum()
    unnamed.card = {}
    with pytest.raises(ValueError, match=r"the model has the observation_space Box.*\(3,\).*, dataset reacher-v0"):
        score(unnamed, "reacher-v0", horizon=4)


def test_a_missing_dataset_is_told_how_to_get() -> None:
    with pytest.raises(FileNotFoundError, match=r"no dataset none/such-v0 .*kairos collect SIMULATOR none/such-v0"):
        score(pendulum(), "none/such-v0")


def test_a_dream_that_ended_stays_where_it_ended() -> None:
    class Falls(PointMass):
        """Ends where x passes 0.5, and says NaN from then on."""

        def __init__(self) -> None:
            super().__init__(wall=0.5)

    episodes = walk([12, 12])
    at = episodes.starts()
    windows = Windows(episodes, at, torch.ones(2, dtype=torch.int64), 10)
    right = torch.ones(2, 10, 2)
    dreamed = windows.dream(Falls(), actions=right)
    assert dreamed.obs is not None and dreamed.obs.isfinite().all() and dreamed.terminated[:, -1].all()
    for row in range(2):
        end = int(dreamed.terminated[row].int().argmax())
        assert torch.equal(dreamed.obs[row, end:], dreamed.obs[row, end].expand(10 - end, 2))
        assert dreamed.obs[row, end, 0] > 0.5 and not dreamed.reward[row, end + 1 :].any()


def test_windows_of_every_length_see_what_they_should() -> None:
    """The toy remembers the last frame alone, so whatever it saw before, the truth makes no error until the end."""
    episodes = walk([12, 3, 30])
    at = episodes.starts() + torch.tensor([4, 1, 0])
    windows = Windows(episodes, at, torch.tensor([5, 2, 1]), 6)
    error = windows.errors(windows.dream(PointMass(), chunk=4), torch.ones(2))
    assert error.obs_error.isnan().all(-1).sum(1).tolist() == [0, 4, 0], "the second episode ends after two steps"
    assert error.obs_error.nan_to_num().abs().max() < 1e-5
    assert error.nrmse(6).shape == (2,) and error.table([1])["h1"]["rms"] < 1e-5


def test_a_dream_that_is_no_number_is_infinitely_wrong() -> None:
    episodes = walk([12])
    windows = Windows(episodes, episodes.starts(), torch.ones(1, dtype=torch.int64), 3)
    dreamed = windows.dream(PointMass())
    assert dreamed.obs is not None
    bad = dreamed._replace(obs=dreamed.obs.index_fill(1, torch.tensor([2]), torch.nan))
    assert windows.errors(bad, torch.ones(2)).table([2, 3])["h3"]["rms"] == float("inf")
