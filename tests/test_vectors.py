"""Spaces as vectors: what goes in comes out, whatever stands before it, and nothing is guessed on the way."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tables  # noqa: F401, registers its simulator
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

import kairos_gym
from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.learning.train import train
from kairos_gym.learning.train_config import TrainConfig
from world_model.contract import Spec
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import WorldModel
from world_model.spaces import (
    ActionCheck,
    alike,
    chunked,
    flat_box,
    flatten,
    space_from_json,
    space_to_json,
    unflatten,
)

BOX = spaces.Box(np.array([[-1, 0], [2, -5]], np.float32), np.array([[1, 3], [4, np.inf]], np.float32))
SPACES: dict[str, spaces.Space] = {
    "vector": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "table": BOX,
    "choice": spaces.Discrete(4, start=-1),
    "dict": spaces.Dict({"b": spaces.Dict({"x": BOX}), "a": spaces.Box(0.0, 1.0, (1,), np.float64)}),
}


def stack(samples: list[Any]) -> Any:
    if isinstance(samples[0], dict):
        return {key: stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", SPACES)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 4))
def test_back_and_forth(name: str, seed: int, batch: int) -> None:
    space = SPACES[name]
    space.seed(seed)
    samples = [space.sample() for _ in range(batch)]
    flat = flatten(space, stack(samples))
    assert flat.shape == (batch, *flat_box(space).shape)
    for row, sample in zip(flat, samples, strict=True):
        np.testing.assert_allclose(row, np.asarray(spaces.utils.flatten(space, sample)), rtol=1e-6)
        assert same(unflatten(space, row), sample)
    assert same(unflatten(space, flat), stack(samples))
    assert same(unflatten(space, torch.from_numpy(flat)), stack(samples))
    assert same(unflatten(space, flat[None]), stack([stack(samples)]))


def in_order(*names: str) -> spaces.Dict:
    """Three parts that differ in size, listed in the order given; from a dict Gymnasium would sort them."""
    sizes = {"pos": 1, "goal": 2, "angle": 3}
    return spaces.Dict([(name, spaces.Box(0.0, 9.0, (sizes[name],), np.float64)) for name in names])


ORDERS = list(permutations(("pos", "goal", "angle")))


@pytest.mark.parametrize("names", ORDERS)
def test_the_order_of_a_dict_changes_nothing(names: tuple[str, ...]) -> None:
    values = {"pos": np.array([1.0]), "goal": np.array([2.0, 3.0]), "angle": np.array([4.0, 5.0, 6.0])}
    space, other = in_order(*names), in_order(*ORDERS[0])
    flat = flatten(space, values)
    np.testing.assert_array_equal(flat, flatten(other, values))
    assert same(unflatten(space, flat), values) and list(unflatten(space, flat)) == list(names)
    assert alike(space, other) and flat_box(space) == flat_box(other)
    again = space_from_json(json.loads(json.dumps(space_to_json(space))))
    assert isinstance(again, spaces.Dict) and list(again) == list(names) and again == space


def test_a_saved_model_of_a_dict_sees_the_same(tmp_path: Path) -> None:
    """The fault: saving sorted the parts, so a loaded model took the angle for the position."""
    obs, action = in_order("pos", "goal", "angle"), spaces.Box(-1.0, 1.0, (1,), np.float32)
    spec = Spec(obs, action, 2, 0.1)
    torch.manual_seed(0)
    model = (
        WorldModel(WorldModelConfig(obs_dim=6, action_dim=1, pattern="SG", chunk=2), spec).eval().requires_grad_(False)
    )
    model.save_pretrained(tmp_path)
    start = {"pos": np.array([1.0]), "goal": np.array([2.0, 3.0]), "angle": np.array([4.0, 5.0, 6.0])}
    seen = []
    for world in (model, WorldModel.from_pretrained(tmp_path)):
        env = kairos_gym.DreamEnv(world)
        first, _ = env.reset(seed=0, options={"observation": start})
        assert same(first, start) and [*first] == ["pos", "goal", "angle"]
        seen.append(env.step(np.zeros(1, np.float32))[0])
    assert same(*seen)


@pytest.mark.parametrize(
    ("space", "inner"),
    [
        (spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2, 3))),
        (spaces.Discrete(3, start=1), spaces.MultiDiscrete([3, 3], start=[1, 1])),
    ],
)
def test_a_chunk_of_actions_has_a_space(space: spaces.Space, inner: spaces.Space) -> None:
    assert chunked(space, 2) == inner


@pytest.mark.parametrize(
    ("space", "bad", "error", "says"),
    [
        (BOX, np.zeros((2, 3)), ValueError, "shape"),
        (BOX, [[0, 0], [3, np.nan]], ValueError, r"finite, got nan at \(1, 1\)"),
        (BOX, [[0, 0], [3, np.inf]], ValueError, "finite"),
        (BOX, [[0, 0], [3, -6]], ValueError, r"-6 at \(1, 1\) is outside \[-5"),
        (BOX, [[0, 1e300], [3, 0]], ValueError, "outside"),
        (BOX, "left", TypeError, "real numbers"),
        (spaces.Discrete(4, start=-1), 3, ValueError, r"outside \[-1, 2\]"),
        (spaces.Discrete(4, start=-1), 1.0, TypeError, "whole numbers"),
        (spaces.Discrete(4, start=-1), True, TypeError, "whole numbers"),
        (spaces.Discrete(4, start=-1), [1], ValueError, "shape"),
        (spaces.MultiDiscrete([3, 3]), [0, 3], ValueError, r"3 at \(1,\) is outside \[0, 2\]"),
    ],
)
def test_bad_actions(space: spaces.Space, bad: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ActionCheck(space)(bad)


def test_what_rescaling_rounds_off_is_forgiven() -> None:
    space = spaces.Box(-3.0, -0.8, (1,), np.float32)
    rescaled = space.low + np.float32(0.5) * (np.float32(1.0) + 1) * (space.high - space.low)  # as SB3's SAC does
    assert rescaled > space.high and ActionCheck(space)(rescaled) == space.high


@pytest.mark.parametrize("space", [*SPACES.values(), spaces.MultiDiscrete([3, 2])])
def test_actions_of_the_space_are_taken_as_they_are(space: spaces.Space) -> None:
    if isinstance(space, spaces.Dict):
        return
    space.seed(0)
    for _ in range(20):
        action = space.sample()
        taken = ActionCheck(space)(action)
        assert np.array_equal(taken, action) and taken.dtype == space.dtype


@pytest.mark.parametrize(
    ("obs", "act", "says"),
    [
        (spaces.Discrete(3), BOX, "observation space"),
        (spaces.Box(0, 255, (8, 8), np.uint8), BOX, "observation space"),
        (spaces.Dict({"a": spaces.MultiBinary(2)}), BOX, "observation space"),
        (BOX, spaces.MultiBinary(2), "action space"),
        (BOX, spaces.Dict({"a": BOX}), "action space"),
        (BOX, spaces.Box(0, 9, (1,), np.int64), "action space"),
    ],
)
def test_spaces_that_no_model_takes(obs: spaces.Space, act: spaces.Space, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Spec(obs, act, 1, 1.0)


@pytest.mark.parametrize("simulator", ["CartPole-v1", "tables:tables/Table-v0"])
def test_from_the_simulator_to_the_dream(simulator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices and tables for actions, dicts for observations, episodes that end: recorded, learned, kept, dreamed."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = collect(simulator, "it-v0", CollectConfig(seed=0, episodes=12), progress=False)
    train("it-v0", tmp_path / "model", TrainConfig(pattern="SG", draft_steps=60, steps=20, held_out=4), progress=False)
    model, real = WorldModel.from_pretrained(tmp_path / "model"), gym.make(simulator)
    assert model.spec.observation_space == real.observation_space == dataset.observation_space
    assert model.spec.action_space == real.action_space
    for chunk in (1, 4):
        env = gym.make("kairos_gym/Dream-v0", model=model, chunk=chunk).unwrapped
        check_env(env, skip_render_check=True)  # CartPole has no state to set
        obs, _ = env.reset(seed=1)
        assert real.observation_space.contains(obs)
        for _ in range(3):
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            assert real.observation_space.contains(obs)
            if terminated or truncated:
                break


def test_spaces_are_alike_whatever_their_bounds() -> None:
    box, wide = spaces.Box(-1, 1, (2,)), spaces.Box(-9, 9, (2,))
    pair = spaces.Dict({"a": box, "b": spaces.Discrete(3)})
    assert alike(box, wide) and alike(pair, spaces.Dict({"a": wide, "b": spaces.Discrete(3)}))
    for one, other in (
        (box, spaces.Box(-1, 1, (3,))),
        (box, spaces.Discrete(2)),
        (spaces.Discrete(3), spaces.Discrete(3, start=1)),
        (pair, spaces.Dict({"a": box})),
        (pair, spaces.Dict({"a": box, "c": spaces.Discrete(3)})),
        (pair, spaces.Dict({"a": box, "b": spaces.Discrete(4)})),
    ):
        assert not alike(one, other) and not alike(other, one)
