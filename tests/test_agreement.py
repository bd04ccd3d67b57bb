"""Agreement: correlations, ranks and regret against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kairos_gym.evaluation.agreement import agreement, pearson, ranks


def test_equal_returns_agree_wholly() -> None:
    returns = np.random.default_rng(0).normal(size=(8, 16)) + np.arange(8)[:, None]
    same = agreement(returns, returns)
    assert np.allclose(same.pearson, 1) and np.allclose(same.spearman, 1)
    assert same.regret == (0.0, 0.0, 0.0) and same.chosen == same.best == 7


def test_a_reversed_order_is_told_and_costs_the_whole_range() -> None:
    real = np.repeat(np.arange(5.0)[:, None], 4, 1)
    wrong = agreement(-real, real)
    assert np.allclose(wrong.pearson, -1) and np.allclose(wrong.spearman, -1)
    assert wrong.regret[0] == 4 and (wrong.chosen, wrong.best) == (0, 4)


def test_spearman_sees_the_order_alone() -> None:
    real = np.repeat(np.array([[1.0], [2.0], [3.0], [4.0]]), 3, 1)
    found = agreement(np.exp(3 * real), real)
    assert found.spearman[0] == pytest.approx(1) and found.pearson[0] < 0.9


def test_noise_has_wide_intervals_and_signal_narrow_ones() -> None:
    rng = np.random.default_rng(1)
    skill = np.linspace(0, 10, 10)[:, None]
    close = agreement(skill + rng.normal(size=(10, 16)), skill + rng.normal(size=(10, 16)))
    chance = agreement(rng.normal(size=(10, 16)), rng.normal(size=(10, 16)))
    assert close.spearman[1] > 0.8 and close.spearman[0] >= 0.95
    assert chance.spearman[1] < 0 < chance.spearman[2]


def test_no_spread_is_no_correlation() -> None:
    assert np.isnan(agreement(np.ones((4, 3)), np.random.default_rng(0).normal(size=(4, 3))).pearson[0])


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_ranks_share_the_mean_among_equals(values: list[int]) -> None:
    x = np.array(values, float)
    got = ranks(x)
    assert got.sum() == len(x) * (len(x) - 1) / 2
    for value in set(values):
        where = np.flatnonzero(np.sort(x) == value)
        assert np.allclose(got[x == value], where.mean())


@given(st.integers(0, 1000))
def test_pearson_is_numpys(seed: int) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, 7))
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])


@pytest.mark.parametrize(
    ("imagined", "simulated", "what"),
    [
        (np.ones((4, 2)), np.ones((4, 3)), "must both be"),
        (np.ones((2, 3)), np.ones((2, 3)), "3 policies"),
        (np.full((4, 2), np.nan), np.ones((4, 2)), "finite"),
    ],
)
def test_what_makes_no_sense_is_refused(imagined: np.ndarray, simulated: np.ndarray, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        agreement(imagined, simulated)
