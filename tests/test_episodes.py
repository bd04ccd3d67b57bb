"""Recorded experience to windows: they never cross an episode, and bad data is refused in one sentence."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from world_model.episodes import Episodes, spec_of

Episode = tuple[Any, Any, Any, Any]


def episode(steps: int, number: int = 0, obs_dim: int = 2) -> Episode:
    """Every number tells its episode and its frame: obs 100*number + t, action 100*number + t + 0.5, reward -t."""
    t = np.arange(steps + 1.0)
    obs = np.repeat(100 * number + t[:, None], obs_dim, 1)
    ended = np.zeros(steps, bool)
    ended[-1:] = number % 2 == 1
    return obs, 100 * number + t[1:, None] + 0.5, -t[1:], ended


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5), frames=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_windows_are_slices_of_one_episode(lengths: list[int], frames: int, seed: int) -> None:
    raw = [episode(steps, number) for number, steps in enumerate(lengths)]
    episodes = Episodes.stack(raw)
    assert episodes.obs.dtype == episodes.action.dtype == episodes.reward.dtype == torch.float32
    places = [(number, t) for number, steps in enumerate(lengths) for t in range(steps + 1)]
    assert len(episodes.obs) == len(places)
    begins = [f for f, (_, t) in enumerate(places) if t == 0]
    assert episodes.starts().tolist() == begins
    at = torch.randint(len(places), (6,), generator=torch.Generator().manual_seed(seed))
    obs, action, reward, ended, valid = episodes.windows(at, frames)
    for b, f in enumerate(at.tolist()):
        number, begin = places[f]
        observations, actions, rewards, terminated = raw[number]
        for i in range(frames):
            t = min(begin + i, lengths[number])
            inside = begin + i <= lengths[number]
            assert valid[b, i] == inside
            assert obs[b, i].tolist() == observations[t].tolist()
            assert action[b, i].tolist() == (actions[t - 1].tolist() if t else [0.0])
            assert reward[b, i] == (rewards[t - 1] if t else 0.0)
            assert ended[b, i] == (inside and t > 0 and terminated[t - 1])


def test_joined_episodes_stay_in_order() -> None:
    raw = [episode(steps, number) for number, steps in enumerate((2, 0, 3))]
    joined = Episodes.join([Episodes.stack(raw[:1]), Episodes.stack(raw[1:])])
    assert joined.fingerprint() == Episodes.stack(raw).fingerprint()
    for parts in ([], [Episodes.stack(raw), Episodes.stack([episode(2, obs_dim=3)])]):
        with pytest.raises(ValueError, match="episodes of one kind"):
            Episodes.join(parts)


def test_episodes_that_are_known_are_found() -> None:
    some = Episodes.stack([episode(3, 0), episode(2, 1)])
    assert some.holds(Episodes.stack([episode(2, 1), episode(3, 2), episode(4, 0), episode(0, 0)])).tolist() == [
        True,
        False,
        False,
        False,
    ]


def with_part(place: int, value: Any) -> list[Episode]:
    good = list(episode(3, 1))
    good[place] = value
    return [episode(3), tuple(good)]


def holed(place: int, value: float = float("nan")) -> list[Episode]:
    part = episode(3, 1)[place].copy()
    part[1] = value
    return with_part(place, part)


BAD = {
    "no episodes": ([], "no episodes"),
    "no rewards": (with_part(2, None), "episode 1 has no rewards"),
    "no terminations": (with_part(3, None), "episode 1 has no terminated"),
    "no observations": (with_part(0, None), "episode 1 has no observations"),
    "a dictionary of observations": (with_part(0, {"image": np.zeros(4)}), "episode 1 has no observations"),
    "NaN observation": (holed(0), "episode 1 has observations"),
    "NaN action": (holed(1), "episode 1 has actions"),
    "infinite reward": (holed(2, float("inf")), "episode 1 has rewards"),
    "too large for float32": (holed(0, 1e39), "episode 1"),
    "one observation short": (with_part(0, np.zeros((3, 2))), "episode 1: expected observations"),
    "one reward short": (with_part(2, np.zeros(2)), "episode 1: expected observations"),
    "one termination more": (with_part(3, np.zeros(4, bool)), "episode 1: expected observations"),
    "images": (with_part(0, np.zeros((4, 8, 8))), "episode 1: expected observations"),
    "flat actions": (with_part(1, np.zeros(3)), "episode 1: expected observations"),
    "rewards in a column": (with_part(2, np.zeros((3, 1))), "episode 1: expected observations"),
    "terminations in a column": (with_part(3, np.zeros((3, 1), bool)), "episode 1: expected observations"),
    "words": (with_part(0, np.array([["a", "b"]] * 4)), "episode 1"),
    "another observation size": ([episode(3), episode(3, 1, obs_dim=5)], "episode 1"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_data_is_refused(bad: str) -> None:
    episodes, says = BAD[bad]
    with pytest.raises(ValueError, match=says):
        Episodes.stack(episodes)


def test_spec_of_takes_the_simulators_own_spaces() -> None:
    with gym.make("Pendulum-v1") as env:
        spec = spec_of(env, 4)
        assert spec.observation_space == env.observation_space and spec.action_space == env.action_space
        assert spec.chunk == 4 and spec.dt == 0.05
    with gym.make("CartPole-v1") as env:
        assert spec_of(env, 4).action_box.shape == (2,)  # one-hot
    with gym.make("FrozenLake-v1") as env, pytest.raises(ValueError, match="observation space must be a Box"):
        spec_of(env, 4)
