"""Bounds: the memory bound holds on every run, is attained where it should be, and the floor under windows is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from kairos_gym.evaluation.memory_bounds import MemoryDrift, _writes, memory_drift, window_floor
from world_model.state import LatentState

PATTERNS = ["G", "GG", "SG", "DG", "GS", "SGDG", "GDGS"]


def holds(drift: MemoryDrift) -> None:
    assert drift.error.isfinite().all() and drift.rho.max() < 1
    for bound in (drift.running_bound, drift.closed_bound):
        assert (drift.error <= bound * (1 + 1e-9) + 1e-9).all()
    assert (drift.running_bound <= drift.closed_bound * (1 + 1e-9) + 1e-9).all()


def case(pattern: str, tokens: int, heads: int, frames: int, size: float, apart: bool, seed: int) -> None:
    model = tiny_model(pattern, tokens=tokens, heads=heads, seed=seed % 7, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    past, real = draw(2, 3, 3), 2 * draw(2, frames, 3)
    dreamed = real + size * draw(2, frames, 3)
    play = torch.rand(2, 3 + frames, 2, generator=g, dtype=torch.float64) * 4 - 2
    state = model.observe(model.initial(2), past, play[:, :3])
    other = model.observe(model.initial(2), past + draw(2, 3, 3), play[:, :3]) if apart else None
    drifts = memory_drift(model, state, real, dreamed, play[:, 3:], other)
    assert list(drifts) == [i for i, kind in enumerate(pattern) if kind == "G"]
    for drift in drifts.values():
        holds(drift)
        assert apart or not drift.error[..., 0].any()
    # What was bounded is what the model remembers.
    ends = [
        model.observe(begin, frames_, play[:, 3:])
        for begin, frames_ in ((state, real), (state if other is None else other, dreamed))
    ]
    for i, drift in drifts.items():
        true = (ends[1][f"{i}.S"] - ends[0][f"{i}.S"]).flatten(-2).norm(dim=-1)
        assert torch.allclose(drift.error[..., -1], true, atol=1e-9)


CASES = dict(
    pattern=st.sampled_from(PATTERNS),
    tokens=st.integers(1, 3),
    heads=st.integers(1, 3),
    frames=st.integers(1, 9),
    size=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 100.0]),
    apart=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_the_bound_holds(**chosen: object) -> None:
    case(**chosen)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(**CASES)
def test_the_bound_holds_in_a_thousand_cases(**chosen: object) -> None:
    case(**chosen)  # type: ignore[arg-type]


def test_equal_frames_make_no_error() -> None:
    model = tiny_model("SG", dtype=torch.float64)
    frames, play = torch.randn(2, 5, 3).double(), torch.zeros(2, 5, 2).double()
    drift = memory_drift(model, model.initial(2), frames, frames, play)[1]
    assert drift.error.max() < 1e-12 and drift.xi.max() < 1e-12
    assert torch.allclose(drift.retained[..., -1], drift.rho.prod(-1))


def test_the_bound_is_attained_across_the_keys() -> None:
    """Memories that differ across every key that is written shrink by alpha and no more."""
    model = tiny_model("G", dtype=torch.float64, head_dim=6)
    frames, play = torch.randn(1, 1, 3).double(), torch.zeros(1, 1, 2).double()
    state = model.observe(model.initial(1), frames, play)
    block = next(iter(model.trunk.blocks))
    keys, *_ = _writes(
        block, model.tokens.clean(model.scaling.obs(frames)), model.tokens.actions(model.scaling.action(play))
    )
    across = torch.linalg.svd(keys[0, 0], full_matrices=True).Vh[-1]  # a direction that no token's key has a part in
    moved = state["0.S"].clone()
    moved[0, 0] += across  # each row
    other = LatentState({**state.tensors, "0.S": moved})
    drift = memory_drift(model, state, frames, frames, play, other)[0]
    assert drift.tightness[0, 0] == pytest.approx(1, abs=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    model, frames = tiny_model("SD"), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="no layer of 'SD'"):
        memory_drift(model, model.initial(1), frames, frames, torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="must be"):
        memory_drift(tiny_model("G"), model.initial(1), frames, frames[:, :1], torch.zeros(1, 2, 2))


def test_the_floor_of_two_outcomes_is_the_theorems() -> None:
    """mu1 = 0 with chance 1/4, mu2 = 2 with chance 3/4, in half of all situations."""
    open_ = torch.tensor([0.0, 2.0, 2.0, 2.0])
    two, exact = window_floor(torch.stack([open_, torch.ones(4)]))
    assert two == pytest.approx(0.5 * 0.25 * 0.75 * 4) and exact == pytest.approx(two)


def test_the_floor_of_a_uniform_outcome() -> None:
    two, exact = window_floor(torch.linspace(0, 1, 1000)[None])
    assert exact == pytest.approx(1 / 12, rel=0.01) and two == pytest.approx(0.75 * exact, rel=0.01)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_no_window_goes_below_the_floor(seed: int) -> None:
    outcomes = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).double()
    two, exact = window_floor(outcomes)
    best = (outcomes - outcomes.mean(1, keepdim=True)).square().mean().item()  # the mean is the best guess there is
    assert two <= exact + 1e-12 and exact == pytest.approx(best)
