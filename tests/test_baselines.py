"""Baselines: exact where a known system is theirs, and as good as a world model to an env or a planner."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from gymnasium.utils.env_checker import check_env
from toys import LQR, ToyDynamics, box_spec

from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.dream.envs import DreamEnv, DreamVectorEnv
from planners import CEM, Objective
from world_model.dynamics.baselines import Baseline, fit_constant, fit_ensemble, fit_linear
from world_model.episodes import Episodes, spec_of


def recorded(toy: ToyDynamics, episodes: int = 20, steps: int = 12) -> Episodes:
    """What a toy does under random actions."""
    g, parts = torch.Generator().manual_seed(0), []
    box = toy.spec.action_box
    for _ in range(episodes):
        x = torch.rand(1, toy.spec.observation_box.shape[0], generator=g) * 2 - 1
        actions = (torch.rand(steps, box.shape[0], generator=g) * 2 - 1) * float(box.high[0])
        obs, rewards = [x[0]], []
        for u in actions:
            x, reward = toy.step(x, u[None])
            obs.append(x[0])
            rewards.append(reward[0])
        parts.append((torch.stack(obs), actions, torch.stack(rewards), torch.zeros(steps)))
    return Episodes.stack(tuple(array.numpy() for array in part) for part in parts)  # type: ignore[misc]


@pytest.fixture(scope="module")
def fitted() -> list[Baseline]:
    toy = LQR()
    data = recorded(toy)
    return [
        fit_constant(toy.spec, data),
        fit_linear(toy.spec, data),
        fit_ensemble(toy.spec, data, cpu_seconds=0.2),
    ]


def test_a_linear_system_is_the_linear_models() -> None:
    toy = LQR()
    model = fit_linear(toy.spec, recorded(toy))
    x, actions = (
        torch.tensor([[0.5, -0.3], [-0.2, 0.1]]),
        torch.rand(2, 8, 1, generator=torch.Generator().manual_seed(1)),
    )
    state = model.observe(model.initial(2), x[:, None])
    _, dreamed = model.imagine(state, actions)
    _, real = toy.imagine(toy.start(x), actions)
    assert dreamed.obs is not None and torch.allclose(dreamed.obs, real.obs, atol=1e-4)  # type: ignore[arg-type]


def test_nothing_moves_in_the_constant_model(fitted: list[Baseline]) -> None:
    model = fitted[0]
    x = torch.tensor([[0.5, -0.3]])
    _, imagined = model.imagine(model.observe(model.initial(1), x[:, None]), torch.ones(1, 4, 1))
    assert imagined.obs is not None and torch.allclose(imagined.obs, x[:, None].expand(1, 4, 2), atol=1e-6)
    assert torch.allclose(imagined.reward, model.scaling.reward_mean.expand(1, 4)) and not imagined.terminated.any()


def test_a_planner_is_at_home_in_the_linear_model() -> None:
    """Cross-entropy search, on the model alone, for an optimum that the true system knows."""
    toy = LQR()
    model = fit_linear(toy.spec, recorded(toy, episodes=100))
    x = torch.tensor([[1.0, 0.0]])

    def reward_fn(before: torch.Tensor, u: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return -((after @ toy.q) * after).sum(-1) - ((u @ toy.r) * u).sum(-1)  # quadratic: the model has it not

    planner = CEM(horizon=8, chunk=1, candidates=200, elites=20, iterations=8)
    plan = planner.plan(
        model, model.observe(model.initial(1), x[:, None]), obs=x, objective=Objective(reward_fn=reward_fn)
    )
    played = plan.actions.reshape(1, -1, 1)
    _, real = toy.imagine(toy.start(x), played)
    assert real.reward.sum() > 1.15 * toy.optimal_return(x, 8).item()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_is_an_environment(fitted: list[Baseline], which: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(DreamEnv(fitted[which], max_episode_steps=20), skip_render_check=True)
    envs = DreamVectorEnv(fitted[which], 3, max_episode_steps=4)
    envs.reset(seed=0)
    blob = envs.snapshot()
    for _ in range(6):
        envs.step(envs.action_space.sample())
    envs.restore(blob)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_row_dreams_the_same_alone(fitted: list[Baseline], which: int) -> None:
    model, x = fitted[which], torch.rand(5, 1, 2)
    actions = torch.rand(5, 3, 1)
    whole = model.imagine(model.observe(model.initial(5), x), actions)[1]
    batch_of_one = model.imagine(model.observe(model.initial(1), x[3:4]), actions[3:4])[1]
    assert torch.allclose(whole.obs[3:4], batch_of_one.obs, atol=1e-5)  # type: ignore[index, arg-type]


def test_shapes_are_checked(fitted: list[Baseline]) -> None:
    model = fitted[0]
    with pytest.raises(ValueError, match="obs must be"):
        model.observe(model.initial(2), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="actions must be"):
        model.imagine(model.initial(2), torch.zeros(2, 1, 2))
    with pytest.raises(ValueError, match="K from 1 to 8"):
        model.imagine(model.initial(2), torch.zeros(2, 9, 1))


def test_fingerprints_tell_models_apart(fitted: list[Baseline]) -> None:
    assert len({model.fingerprint() for model in fitted}) == 3


def test_an_ensemble_of_no_time_is_its_seed() -> None:
    toy = LQR()
    data = recorded(toy)
    one, same, other = (fit_ensemble(toy.spec, data, cpu_seconds=1e-9, seed=s) for s in (3, 3, 4))
    assert one.card["updates"] <= 1 and one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_the_pole_that_falls_ends_the_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """InvertedPendulum ends where |angle| > 0.2: a threshold on the angle's square."""
    from envs import make_real

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = Episodes.from_minari(
        collect("InvertedPendulum-v5", "ip/x-v0", CollectConfig(seed=0, episodes=200), progress=False)
    )
    spec = spec_of(make_real("InvertedPendulum-v5"), 1)
    model = fit_linear(spec, episodes)
    at = (episodes.index > 0).nonzero()[:, 0]
    state = model.observe(model.initial(len(at)), episodes.obs[at - 1][:, None])
    ends = model.imagine(state, episodes.action[at][:, None])[1].terminated[:, 0]
    assert (ends == episodes.terminated[at]).float().mean() > 0.97
    assert ends[episodes.terminated[at]].float().mean() > 0.9


def test_nothing_to_learn_from_what_never_moves() -> None:
    """A dimension that never moves doesn't spoil the least squares."""

    class Still(LQR):
        def __init__(self) -> None:
            super().__init__()
            self.spec = box_spec(3, 1, bound=4.0)

        def step(self, x: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            moved, reward = super().step(x[:, :2], u)
            return torch.cat([moved, torch.ones_like(x[:, :1])], -1), reward

    toy = Still()
    data = recorded(toy)
    data.obs[:, 2] = 1.0
    model = fit_linear(toy.spec, data)
    assert model.weight.isfinite().all() and model.weight.abs().max() < 1e3
