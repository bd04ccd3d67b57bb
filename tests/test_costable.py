"""A dynamics as stable-worldmodel's solvers ask for it costs what it doesn't earn, whatever way it is asked."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import LQR, PointMass, TinyMLP

import kairos_gym
from planners import Costable, Objective, score
from world_model.state import LatentState

B, N, H = 3, 5, 4


def value(dynamics: Any, state: LatentState, candidates: Tensor, **objective: Any) -> Tensor:
    return score(dynamics, state, candidates, Objective(**objective)).value


def shown(rows: Tensor) -> Tensor:
    """What a solver makes of an entry [B,...] of the info dict: [B,N,...]."""
    return rows.unsqueeze(1).expand(len(rows), N, *rows.shape[1:])


class Pushed(PointMass):
    """A point mass that the last action seen has moved far away."""

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        return self.start(obs[:, -1] if actions is None else obs[:, -1] + 10 * actions[:, -1])


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("toy", [PointMass(), LQR(), TinyMLP()], ids=lambda toy: type(toy).__name__)
def test_a_cost_is_minus_the_return(toy: Any, block: int) -> None:
    size = toy.spec.action_box.shape[0]
    obs = torch.randn(B, *toy.spec.observation_box.shape)
    candidates = 2 * torch.rand(B, N, H, block * size) - 1
    expected = -value(toy, toy.start(obs), candidates.unflatten(-1, (block, size)))
    costs = Costable(toy).get_cost({"observation": shown(obs)}, candidates)
    assert costs.shape == (B, N)
    torch.testing.assert_close(costs, expected)
    frames: Any
    for frames in (shown(obs[:, None]), np.array(shown(obs)), shown(obs).double()):
        torch.testing.assert_close(Costable(toy).get_cost({"observation": frames}, candidates), expected)
    there = Costable(toy, Objective(discount=0.5), key="state").get_cost({"state": shown(obs)}, candidates)
    torch.testing.assert_close(
        there, -value(toy, toy.start(obs), candidates.unflatten(-1, (block, size)), discount=0.5)
    )


def test_the_shipped_model() -> None:
    model = kairos_gym.load("reacher")
    assert model.starts is not None
    obs = model.starts.obs[:B, 0]
    candidates = 2 * torch.rand(B, N, H, 4) - 1
    state = model.observe(model.initial(B), obs[:, None])
    expected = -value(model, state, candidates.unflatten(-1, (2, 2)))
    costable = Costable(model)
    with torch.inference_mode():  # as most of the solvers are
        torch.testing.assert_close(costable.get_cost({"observation": shown(obs[:, None])}, candidates), expected)
    infos = {key: shown(tensor) for key, tensor in costable.info(state).items()}
    torch.testing.assert_close(costable.get_cost(infos, candidates), expected)


def test_the_past_counts() -> None:
    toy, obs, led = Pushed(), torch.randn(B, 2, 2), torch.randn(B, 2, 2)
    candidates = torch.rand(B, N, H, 2)
    costs = Costable(toy).get_cost({"observation": shown(obs), "action": shown(led)}, candidates)
    torch.testing.assert_close(costs, -value(toy, toy.start(obs[:, -1] + 10 * led[:, -1]), candidates.unsqueeze(3)))


def test_actions_are_clipped_and_have_units() -> None:
    toy, infos = PointMass(), {"observation": shown(torch.randn(B, 2))}
    candidates = torch.randn(B, N, H, 2)
    clipped = Costable(toy).get_cost(infos, candidates.clamp(-1, 1))
    torch.testing.assert_close(Costable(toy).get_cost(infos, candidates), clipped)
    percent = Costable(toy, to_actions=lambda actions: actions / 100)
    torch.testing.assert_close(percent.get_cost(infos, 100 * candidates), clipped)


def test_each_row_may_have_a_goal() -> None:
    toy, obs, goal = PointMass(), torch.randn(B, 2), torch.randn(B, 2)
    candidates = 2 * torch.rand(B, N, H, 2) - 1
    costable = Costable(toy, goal="goal")
    infos = {"observation": shown(obs), "goal": shown(goal)}
    # A point mass on its way to a goal is one on its way home from as far away.
    home = Objective(goal=torch.zeros(2))
    expected = -score(toy, toy.start(obs - goal), candidates.unsqueeze(3), home, obs=obs - goal).value
    torch.testing.assert_close(costable.get_cost(infos, candidates), expected)
    infos |= {key: shown(tensor) for key, tensor in costable.info(toy.start(obs)).items()}
    torch.testing.assert_close(costable.get_cost(infos, candidates), expected)


def test_gradients_reach_the_candidates() -> None:
    candidates = torch.zeros(B, N, H, 2, requires_grad=True)
    costs = Costable(PointMass()).get_cost({"observation": shown(torch.ones(B, 2))}, candidates)
    costs.sum().backward()
    assert candidates.grad is not None and (candidates.grad > 0).all()  # further away costs more


@pytest.mark.parametrize(
    "infos, shape, said",
    [
        ({"pixels": torch.zeros(B, N, 2)}, (B, N, H, 2), "no 'observation', only"),
        ({"observation": torch.zeros(B, N, 3)}, (B, N, H, 2), "and O=2"),
        ({"observation": torch.zeros(B, N, 2, 2)}, (B, N, H, 2), "no 'action'"),
        ({"observation": torch.zeros(B, N, 2)}, (B, N, H, 3), "A=2, got"),
        ({"observation": torch.zeros(B, N, 2)}, (B, N, 2), "A=2, got"),
        ({"observation": torch.zeros(B, N, 2)}, (B + 1, N, H, 2), "B=4 and O=2"),
        ({"observation": torch.zeros(B, N, 2)}, (B, N, H, 18), "1 <= K <= 8"),
        ({"state.y": torch.zeros(B, N, 2)}, (B, N, H, 2), "no 'state.x'"),
    ],
)
def test_what_does_not_fit_is_said(infos: dict[str, Tensor], shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Costable(PointMass()).get_cost(infos, torch.zeros(shape))


def test_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="a penalty instead of a cost_limit"):
        Costable(PointMass(), Objective(cost_fn=lambda o, a, n: a[..., 0].abs(), cost_limit=1.0))
