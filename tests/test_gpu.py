"""On a GPU the shipped models dream, carry environments and are planned with as on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import dreamt, tiny_model
from torch import Tensor

import kairos_gym
from kairos_gym import DreamVectorEnv
from planners import CEM, MPC, Gradient
from world_model.contract import Imagined
from world_model.model.world_model import WorldModel
from world_model.state import LatentState

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["torch", "eager", "auto"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAIROS_KERNELS", request.param)


def begun(model: WorldModel, batch: int) -> tuple[LatentState, Tensor]:
    """Dreams that begin as real episodes did, and 8 chunks to play [8,B,K,A]."""
    assert model.starts is not None
    obs = model.starts.obs[torch.arange(batch) % len(model.starts.obs), :1].to(model.draft_error)
    low, high = model.scaling.action_low, model.scaling.action_high
    g = torch.Generator().manual_seed(0)
    chance = torch.rand(8, batch, model.config.chunk, model.config.action_dim, generator=g)
    return model.observe(model.initial(batch), obs), low + (high - low) * chance.to(low)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", kairos_gym.shipped())
def test_a_shipped_model_dreams_as_on_a_cpu(name: str) -> None:
    dreams: list[list[Imagined]] = []
    for model in (kairos_gym.load(name), kairos_gym.load(name).cuda()):
        state, actions = begun(model, 5)
        dreams.append([])
        for chunk in actions:
            state, imagined = model.imagine(state, chunk)
            dreams[-1].append(Imagined(*(t.cpu() for t in imagined if t is not None)))
    std = kairos_gym.load(name).scaling.obs_std
    for here, there in zip(*dreams, strict=True):
        torch.testing.assert_close(dreamt(there) / std, dreamt(here) / std, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(there.reward, here.reward, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("confidence", [None, 0.9])
def test_an_env_of_dreams_is_the_one_on_a_cpu(confidence: float | None) -> None:
    envs = [
        DreamVectorEnv(model, 4, chunk=2, max_episode_steps=6, confidence=confidence)
        for model in (kairos_gym.load("reacher"), kairos_gym.load("reacher").cuda())
    ]
    envs[0].action_space.seed(0)
    seen = [env.reset(seed=3)[0] for env in envs]
    np.testing.assert_allclose(seen[1], seen[0], atol=1e-6)
    for _ in range(8):
        action = envs[0].action_space.sample()
        here, there = (env.step(action) for env in envs)
        for a, b in zip(here[:4], there[:4], strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3)
        assert here[4].keys() == there[4].keys()
        if confidence:
            mine, others = (infos["trust"]["error_bound"] for infos in (there[4], here[4]))
            np.testing.assert_allclose(mine, others, rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_what_was_imagined_stays_there() -> None:
    env = DreamVectorEnv(kairos_gym.load("reacher").cuda(), 4, chunk=2)
    env.reset(seed=0)
    actions = torch.full((4, 2, 2), 0.5, device="cuda", requires_grad=True)
    obs, reward, *ends, infos = env.step_torch(actions)
    assert all(t.is_cuda for t in (obs, reward, *ends, *infos["imagined"]))
    (gain,) = torch.autograd.grad(reward.sum(), actions)
    assert gain.isfinite().all() and gain.any()


@pytest.mark.usefixtures("kernels")
def test_dreams_are_kept_and_copied() -> None:
    env = DreamVectorEnv(kairos_gym.load("reacher").cuda(), 3)
    env.reset(seed=0)
    env.action_space.seed(0)
    env.step(env.action_space.sample())
    kept, action = env.snapshot(), env.action_space.sample()
    first = env.step(action)[0]
    env.reset(options={"reset_mask": np.array([True, False, True])})
    env.restore(kept)
    fork = env.fork(2)
    np.testing.assert_allclose(env.step(action)[0], first, atol=1e-6)
    np.testing.assert_allclose(fork.step(action.repeat(2, 0))[0], first.repeat(2, 0), atol=1e-6)


@pytest.mark.usefixtures("kernels")
def test_what_is_planned_together_is_planned_alone() -> None:
    model = kairos_gym.load("reacher").cuda()
    state, _ = begun(model, 3)
    planner = CEM(3, 4, candidates=16, elites=4, iterations=2)
    whole = planner.plan(model, state, seed=torch.arange(3))
    for b in range(3):
        batch_of_one = planner.plan(model, state.select(torch.tensor([b], device="cuda")), seed=b)
        torch.testing.assert_close(whole.actions[b : b + 1], batch_of_one.actions, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(whole.value[b : b + 1], batch_of_one.value, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("kernels")
def test_control_goes_through_the_host() -> None:
    model = kairos_gym.load("reacher").cuda()
    mpc = MPC(model, CEM(3, 4, candidates=16, elites=4, iterations=2))
    mpc.reset(2)
    assert model.starts is not None
    obs = model.starts.obs[:2, 0].numpy()
    for _ in range(3):
        mpc.reset_rows(np.array([False, True]))
        actions = mpc.act(obs)
        assert actions.shape == (2, 4, 2) and actions.dtype == np.float32 and np.abs(actions).max() <= 1


@pytest.mark.usefixtures("kernels")
def test_gradients_are_those_of_a_cpu() -> None:
    ascent = []
    for device in ("cpu", "cuda"):
        model = tiny_model("SDG").to(device)
        state = model.observe(model.initial(2), torch.zeros(2, 1, 3, device=device))
        actions = torch.full((2, 4, 2), 0.5, device=device, requires_grad=True)
        after, imagined = model.imagine(state, actions)
        _, later = model.imagine(after, actions)
        ascent.append(torch.autograd.grad(dreamt(later).sum() + later.reward.sum() + imagined.reward.sum(), actions)[0])
    torch.testing.assert_close(ascent[1].cpu(), ascent[0], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_gradients_plan() -> None:
    model = kairos_gym.load("reacher").cuda()
    state, _ = begun(model, 2)
    first, best = (Gradient(3, 4, starts=4, iterations=n).plan(model, state, seed=1) for n in (1, 10))
    assert (best.value > first.value).all() and best.actions.is_cuda
