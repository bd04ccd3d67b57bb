"""Behaviour cloning recovers a policy from what it played, and keeps the bounds."""

import numpy as np
import pytest
import torch
from toys import box_spec

from kairos_gym.policies.cloning import best_episodes, clone
from world_model.episodes import Episodes


def played(count: int, gain: float, seed: int = 0) -> Episodes:
    """A point that a linear policy pushes towards 0, from random starts."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        x = [rng.uniform(-1, 1, 2)]
        u = []
        for _ in range(10):
            u.append(np.clip(-gain * x[-1], -1, 1))
            x.append(x[-1] + 0.3 * u[-1])
        rewards = -np.abs(np.stack(x[1:])).sum(1)
        rows.append((np.stack(x), np.stack(u), rewards, np.zeros(10, bool)))
    return Episodes.stack(rows)


def test_a_clone_does_what_was_done() -> None:
    policy = clone(box_spec(2, 2, chunk=1), played(60, 0.8), updates=800)
    obs = torch.rand(64, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    assert (policy(obs) + 0.8 * obs).abs().max() < 0.1
    assert (policy(1e6 * obs).abs() <= 1).all()
    assert not any(p.requires_grad for p in policy.parameters())


def test_the_best_episodes_are_those_that_earned_most() -> None:
    good, bad = played(3, 0.8), played(6, 0.0)
    chosen = best_episodes(Episodes.join([bad, good]), 1 / 3)
    assert torch.equal(chosen.obs, good.obs)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 0"):
        best_episodes(good, 0.0)
