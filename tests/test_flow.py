"""Flow matching where the answer is known: Gaussians, whose denoiser has a closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from world_model.ops.flow import MIN_S, corrupt, euler, shift, shift_factor, velocity_loss

MEAN, STD = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 1.5], dtype=torch.float64)
FACTORS = st.floats(0.05, 20)


def posterior(z: Tensor, s: Tensor) -> Tensor:
    """E[z_0 | z_s] for z_0 ~ N(MEAN, STD^2) and z_s = (1-s) z_0 + s eps."""
    gain = (1 - s) * STD.square() / ((1 - s).square() * STD.square() + s.square())
    return MEAN + gain * (z - (1 - s) * MEAN)


@pytest.mark.parametrize("c", [0.5, 1.0, 3.0])
def test_euler_carries_noise_to_the_target(c: float) -> None:
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean(0)) / noise.std(0)
    sample = euler(posterior, noise, 400, c)
    torch.testing.assert_close(sample.mean(0), MEAN, rtol=0, atol=0.01)
    torch.testing.assert_close(sample.std(0), STD, rtol=0.02, atol=0)
    # The flow of a Gaussian onto a Gaussian is the straight one: each sample keeps its rank.
    torch.testing.assert_close(sample, MEAN + STD * noise, rtol=0, atol=0.1)


@given(FACTORS)
def test_one_step_from_zero_is_the_mean(c: float) -> None:
    torch.testing.assert_close(euler(posterior, torch.zeros(3, 2, dtype=torch.float64), 1, c), MEAN.expand(3, 2))


def test_euler_asks_at_the_shifted_levels_and_ends_on_the_last_answer() -> None:
    asked: list[float] = []

    def denoise(z: Tensor, s: Tensor) -> Tensor:
        asked.append(s.item())
        return torch.full_like(z, 7.0)

    assert torch.allclose(euler(denoise, torch.randn(4), 4, 2.0), torch.tensor(7.0))
    assert asked == pytest.approx([2 * s / (1 + s) for s in (1, 0.75, 0.5, 0.25)])


@given(FACTORS)
def test_shift(c: float) -> None:
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift(s, c)
    assert shifted[0] == 0 and shifted[-1] == pytest.approx(1)
    assert (shifted.diff() > 0).all()
    # In odds the shift is a plain factor: s'/(1-s') = c s/(1-s).
    inner, inner_shifted = s[1:-1], shifted[1:-1]
    torch.testing.assert_close(inner_shifted / (1 - inner_shifted), c * inner / (1 - inner))


def test_shift_factor_is_the_papers() -> None:
    assert shift_factor(1, 1) == 1
    assert shift_factor(9, 5) == pytest.approx(3)
    assert shift_factor(4, 3, m=0.1, b=-0.2) == pytest.approx(2 * math.exp(0.1 * 3 - 0.2))


@given(st.floats(MIN_S, 1))
def test_velocity_loss_is_the_squared_velocity_error(level: float) -> None:
    g = torch.Generator().manual_seed(0)
    clean, eps, predicted = (torch.randn(50, generator=g, dtype=torch.float64) for _ in range(3))
    s = torch.tensor(level, dtype=torch.float64)
    z = corrupt(clean, eps, s)
    velocity = (z - predicted) / s
    torch.testing.assert_close(velocity_loss(predicted, clean, s), (velocity - (eps - clean)).square())


def test_velocity_loss_is_held_back_near_the_data() -> None:
    near = velocity_loss(torch.ones(1), torch.zeros(1), torch.tensor(0.0))
    assert near == velocity_loss(torch.ones(1), torch.zeros(1), torch.tensor(MIN_S)) == pytest.approx(MIN_S**-2)
