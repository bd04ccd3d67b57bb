"""The self-improving loop: its budget to the step, what trust makes of its schedule, how it goes on, that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from toys import PointMass, box_spec

from kairos_gym import DreamVecEnv
from kairos_gym.learning.learn import to_replay_buffer
from kairos_gym.learning.loop import REAL_SHARE, Loop, ModelErrors, _cut, loop
from kairos_gym.learning.loop_config import LoopConfig
from kairos_gym.policies.evaluate import evaluate, make_eval_envs
from kairos_gym.policies.sb3 import make_algorithm
from world_model.dynamics import Pessimistic
from world_model.episodes import Episodes, StartStates
from world_model.model.world_model import WorldModel

QUICK: dict[str, Any] = dict(round_steps=50, horizon=8, updates=1, dreams=8, draft_steps=20, memory_steps=2)


def walks(lengths: list[int]) -> Episodes:
    return Episodes.stack(
        (np.full((n + 1, 1), i), np.zeros((n, 1)), np.arange(n), np.arange(n) == n - 1) for i, n in enumerate(lengths)
    )


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_a_cut_holds_that_many_steps(lengths: list[int], data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, sum(lengths)))
    found = _cut(walks(lengths), steps)
    kept, left = [], steps
    for n in lengths:
        kept += [min(n, left)] if left else []
        left -= min(n, left)
    assert (found.left[found.starts()]).tolist() == kept
    assert (found.index + found.left).tolist() == [n for n in kept for _ in range(n + 1)]
    assert bool(found.terminated[-1]) == (kept[-1] == lengths[len(kept) - 1]), "an episode that was cut has no end"
    assert found.obs[:, 0].tolist() == [i for i, n in enumerate(kept) for _ in range(n + 1)]


def mass() -> Any:
    toy: Any = PointMass(1)
    toy.starts = StartStates(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    return toy


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in found]


def test_it_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop("Pendulum-v1", whole, LoopConfig(samples=210, **QUICK), progress=False)
    Loop("Pendulum-v1", parts, LoopConfig(samples=210, **QUICK), {}).round()
    run = Loop("Pendulum-v1", parts, LoopConfig(samples=210, **QUICK), {})
    assert run.used == 100
    run.round()
    loop("Pendulum-v1", parts, LoopConfig(samples=210, **QUICK), progress=False)
    assert [row["steps"] for row in rows(whole)] == [100, 150, 210], "two rounds, one, and one with the rest"
    assert rows(parts) == rows(whole)
    a, b = (SAC.load(out / "last-210.zip", device="cpu").policy.state_dict() for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    world = WorldModel.from_pretrained(parts / "world" / "round-002")
    assert world.starts is not None and len(world.starts.obs) == 210, "dreams begin at every real state that led on"
    assert world.trust is not None
    loop("Pendulum-v1", parts, LoopConfig(samples=280, **QUICK), progress=False)
    assert [row["steps"] for row in rows(parts)] == [100, 150, 210, 280], "more steps may be asked for later"
    with pytest.raises(ValueError, match="seed 0, not 3"):
        loop("Pendulum-v1", parts, LoopConfig(samples=210, seed=3, **QUICK), progress=False)


def test_trust_makes_the_schedule(tmp_path: Path) -> None:
    run = Loop("Pendulum-v1", tmp_path, LoopConfig(updates=10), {})
    for length, share, updates in ((0.0, 1.0, 1.0), (4.0, 0.2, 5.0), (19.0, 0.05, 10)):
        assert run._schedule(ModelErrors(None, length, {})) == (share, updates)  # type: ignore[arg-type]
    free = Loop("Pendulum-v1", tmp_path / "free", LoopConfig(max_error=None, updates=7), {})
    assert free._schedule(None) == (REAL_SHARE, 7)


def test_what_the_policy_learns_from(tmp_path: Path, made: list[tuple[Any, dict[str, Any]]]) -> None:
    """Real states to begin at, the trusted length, the penalty, the schedule's share, and each real step as it was."""
    config = LoopConfig(samples=100, max_error=0.3, penalty=1.5, confidence=0.8, **QUICK)
    run = Loop("Pendulum-v1", tmp_path, config, {})
    row = run.round()
    (model, kwargs), _ = made
    assert isinstance(model, Pessimistic) and model.penalty == 1.5
    assert kwargs == {"max_episode_steps": 8, "max_error": 0.3, "confidence": 0.8}
    mixed, episodes = run.policy.replay_buffer, run.episodes
    assert mixed.share == row["real_share"] == 1 / (1 + row["trusted"])
    assert isinstance(mixed.real, ReplayBuffer) and episodes is not None and mixed.real.size() == 100
    at = (episodes.index > 0).nonzero()[:, 0]
    np.testing.assert_array_equal(mixed.real.observations[:, 0], episodes.obs[at - 1])
    np.testing.assert_array_equal(mixed.real.next_observations[:, 0], episodes.obs[at])
    np.testing.assert_allclose(mixed.real.actions[:, 0], episodes.action[at] / 2, atol=1e-6)  # within +-2 there
    np.testing.assert_array_equal(mixed.real.rewards[:, 0], episodes.reward[at])


def test_real_ends_are_ends() -> None:
    spec = box_spec(1, 1)
    found = to_replay_buffer(walks([3, 2]), spec, make_algorithm("sac", DreamVecEnv(mass(), 2)))
    assert found.dones[:, 0].tolist() == [0, 0, 1, 0, 1] and found.rewards[:, 0].tolist() == [0, 1, 2, 0, 1]


def test_unguarded_dreams_are_not_measured(tmp_path: Path) -> None:
    told = loop("Pendulum-v1", tmp_path, LoopConfig(samples=100, max_error=None, **QUICK), progress=False)
    assert len(told) == 1 and "trusted" not in told[0] and told[0]["real_share"] == REAL_SHARE


def test_a_target_stops_it(tmp_path: Path) -> None:
    config = LoopConfig(samples=1000, target=-1e9, **QUICK)
    assert len(loop("Pendulum-v1", tmp_path, config, progress=False)) == 1
    assert len(loop("Pendulum-v1", tmp_path, config, progress=False)) == 1


def test_mistakes(tmp_path: Path) -> None:
    for env_id, match in (("CartPole-v1", "actions"), ("FrozenLake-v1", "observations")):
        with pytest.raises(ValueError, match=match):
            loop(env_id, tmp_path / env_id)
    for name in ("samples", "round_steps", "updates", "max_error", "confidence"):
        with pytest.raises(ValueError, match=name):
            LoopConfig(**{name: 0})  # type: ignore[arg-type]
    for name in ("penalty", "seed", "memory_steps"):
        with pytest.raises(ValueError, match=name):
            LoopConfig(**{name: -1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="half a round, 125, got 100"):
        LoopConfig(samples=100)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        loop("Pendulum-v1", tmp_path / "file")
    assert not (tmp_path / "CartPole-v1").exists(), "a mistake leaves nothing behind"


@pytest.mark.slow
def test_pendulum_from_400_steps(tmp_path: Path) -> None:
    loop("Pendulum-v1", tmp_path, LoopConfig(samples=400, round_steps=100), progress=False)
    earned = evaluate(SAC.load(tmp_path / "best.zip", device="cpu"), make_eval_envs("Pendulum-v1")[0], seed=77).real
    assert earned.mean() > -250, "doing nothing earns about -1200, the best policies -150"
