"""The shipped models: small, documented, valid environments, and true to the simulator that they dream of."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import kairos_gym
from envs import SimulatorDynamics
from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.evaluation.calibrate import draw_calibration_windows
from kairos_gym.evaluation.control import evaluate_planner
from kairos_gym.evaluation.open_loop import open_loop
from kairos_gym.learning.recipes import RECIPES
from kairos_gym.models import ZOO
from planners import CEM
from world_model.dynamics.baselines import fit_constant
from world_model.episodes import Episodes


def test_every_recipe_is_shipped() -> None:
    assert kairos_gym.shipped() == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_card_tells_where_its_model_is_from(name: str) -> None:
    card = kairos_gym.load(name).card
    assert card["env"] == RECIPES[name].env
    assert card["time_limit"] == gym.spec(card["env"].split(",")[0]).max_episode_steps
    behaviours = {"uniform", "held"} if RECIPES[name].behaviour == "mixed" else set()
    assert set(card["errors"]["test"]) == {"all"} | behaviours
    assert sum(file.stat().st_size for file in (ZOO / name).iterdir()) < 5e6


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_check_env(name: str, chunk: int) -> None:
    env = gym.make("kairos_gym/Dream-v0", model=name, chunk=chunk, disable_env_checker=True).unwrapped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)
    # The simulators' own spaces: MuJoCo's observations have no bounds, and their actions aren't all in [-1, 1].
    explained = ("Box observation space minimum value is -inf", "Box observation space maximum value is inf",
                 "symmetric and normalized", "not a 1D")  # fmt: skip
    messages = [str(warning.message) for warning in caught]
    assert [m for m in messages if not any(e in m for e in explained)] == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_bound_holds_on_a_second_set(name: str) -> None:
    model = kairos_gym.load(name)
    few = name == "lift"  # robosuite takes its time: 200 dreams, of which 90% are 180 by no more than luck
    assert model.trust is not None and model.trust.counts[0] >= (200 if few else 1000)
    for h, told in model.card["trust"]["second"].items():
        assert abs(told["coverage"] - 0.9) <= (0.05 if few else 0.03), h


@pytest.mark.parametrize("name", RECIPES)
def test_the_dream_follows_the_simulator(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fresh episodes: a tenth (a quarter) of the error where nothing moves, after 1 and after 8 steps."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    model = kairos_gym.load(name)
    settings: dict[str, Any] = {"episodes": 24, "behaviour": "expert"} if name == "lift" else {"episodes": 60}
    config = CollectConfig(seed=99, episode_steps=40, **settings)
    dataset = collect(RECIPES[name].env, "fresh/test-v0", config, progress=False)
    episodes = Episodes.from_minari(dataset)
    windows, std = replace(draw_calibration_windows(episodes, seed=0), horizon=8), model.scaling.obs_std
    dreamed = windows.errors(windows.dream(model), std)
    still = fit_constant(model.spec, episodes)
    unmoved = windows.errors(windows.dream(still), std)
    for h in (1, 4 if name == "invertedpendulum" else 8):  # an unbalanced pole has fallen by then
        assert len(dreamed.nrmse(h)) >= 10
        share = 0.25 if name in ("halfcheetah", "pusher", "lift") else 0.1
        assert dreamed.nrmse(h).median() < share * unmoved.nrmse(h).median()


def test_a_plan_that_was_dreamed_up_swings_the_pole_up() -> None:
    planner = CEM(horizon=15, chunk=2, candidates=64, elites=8, iterations=3)
    played = evaluate_planner(
        RECIPES["swingup"].env, kairos_gym.load("swingup"), planner, episodes=1, seed=100, progress=False
    )
    assert played.returns[0] > 165  # 180 on the simulator itself
    assert played.observations[0][-50:, 1].min() > 0.95


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_simulator_itself_has_no_error(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = collect(
        "Pendulum-v1", "fresh/test-v0", CollectConfig(seed=98, episodes=4, episode_steps=60), progress=False
    )
    truth = SimulatorDynamics("Pendulum-v1", chunk=4)
    result = open_loop(truth, Episodes.from_minari(dataset), torch.ones(3), horizon=32, trajectories=4, chunk=chunk)
    assert result.obs_error.abs().max() < 1e-2  # float32 observations, in a chaotic system
    assert result.nrmse(1).max() < 1e-5
