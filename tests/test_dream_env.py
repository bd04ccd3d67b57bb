"""DreamEnv keeps Gymnasium's contract, the model's promises and its own, on dynamics whose every step is known."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.utils.env_checker import check_env
from torch import Tensor
from toys import PointMass

import kairos_gym
from kairos_gym import DreamEnv
from world_model.contract import Imagined, Spec
from world_model.state import LatentState


class Point(PointMass):
    """A point mass that keeps starts: row s of them begins at (s/10, -s/10)."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        line = torch.arange(5)[:, None, None] / 10
        self.starts = SimpleNamespace(obs=torch.cat([line, -line], dim=-1), actions=torch.zeros(5, 1, 2))
        self.card: dict[str, Any] = {}


class Bounded(Point):
    """A point whose spec says that it stays within +-0.2, which its dream doesn't know."""

    def __init__(self) -> None:
        super().__init__()
        self.spec: Spec = Spec(spaces.Box(-0.2, 0.2, (2,), np.float64), self.spec.action_space, 8, 0.1)


class Noisy(Point):
    """A point that is pushed by a number made of its own seed and age, as a model's sampled dream is."""

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        assert seeds is not None and seeds.dtype == torch.int64
        return LatentState({"x": torch.zeros(batch, 2), "seed": seeds})

    def imagine(  # type: ignore[override]
        self, state: LatentState, actions: Tensor, *, decode: bool = True, sampled: bool = False, flow_steps: int = 1
    ) -> tuple[LatentState, Imagined]:
        push = (state["seed"] % 1000)[:, None, None] / 1e4 * sampled
        state, imagined = super().imagine(state, actions, decode=True)
        assert imagined.obs is not None
        return state, imagined._replace(reward=imagined.reward + flow_steps, obs=imagined.obs + push)


def begun(model: Any = None, at: Any = (0.0, 0.0), **kwargs: Any) -> DreamEnv:
    env = DreamEnv(model or Point(), **kwargs)
    env.reset(seed=0, options={"observation": at})
    return env


ONE = np.ones(2, np.float32)


# -- Gymnasium's contract ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"chunk": 4}, {"max_episode_steps": 5}])
def test_check_env(kwargs: dict[str, Any]) -> None:
    env = gym.make("kairos_gym/Dream-v0", model=Bounded(), **kwargs).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)


def test_check_env_of_an_unbounded_space_warns_of_that_only() -> None:
    # Most MuJoCo tasks have observations without bounds; the dream's space is the simulator's own, so it says the same.
    with pytest.warns(UserWarning) as caught:
        check_env(gym.make("kairos_gym/Dream-v0", model=Point()).unwrapped)
    assert {str(w.message).split(".")[0][-40:] for w in caught} == {
        "observation space minimum value is -infinity"[-40:],
        "observation space maximum value is infinity"[-40:],
    }


def test_gymnasium_imports_the_package_by_the_id_alone() -> None:
    code = (
        "import gymnasium as gym\n"
        "try: gym.make('kairos_gym:kairos_gym/Dream-v0', model='no such model')\n"
        "except FileNotFoundError as error: print(error)"
    )
    house = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=house, capture_output=True, text=True, check=True)
    assert "no such model" in done.stdout and "ship with kairos_gym" in done.stdout


def test_spaces_are_copies() -> None:
    model = Point()
    first, second = DreamEnv(model), DreamEnv(model)
    first.action_space.seed(0)
    second.action_space.seed(0)
    a = first.action_space.sample()
    second.action_space.sample()
    assert np.array_equal(second.action_space.sample(), first.action_space.sample()), "they share a generator"
    assert first.action_space == model.spec.action_space and a.shape == (2,)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_one_chunk_is_its_steps() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 2)).astype(np.float32)
    single, chunked = begun(), begun(chunk=4)
    steps = [single.step(action) for action in actions]
    obs, reward, terminated, truncated, info = chunked.step(actions)
    np.testing.assert_allclose(obs, steps[-1][0], atol=1e-6)
    assert reward == pytest.approx(sum(step[1] for step in steps), abs=1e-6)
    assert (terminated, truncated) == (False, False)
    np.testing.assert_allclose(info["imagined"]["obs"], [step[0] for step in steps], atol=1e-6)
    np.testing.assert_allclose(info["imagined"]["reward"], [step[1] for step in steps], atol=1e-6)


def test_a_chunk_ends_where_it_terminates() -> None:
    env = begun(Point(wall=0.15), chunk=4)  # reached by the second step; the toy then imagines NaN
    obs, reward, terminated, truncated, info = env.step(np.ones((4, 2)))
    np.testing.assert_allclose(obs, [0.2, 0.2], atol=1e-6)
    assert reward == pytest.approx(-(0.2 + 0.4), abs=1e-6)
    assert (terminated, truncated) == (True, False) and "non_finite" not in info
    assert info["imagined"]["terminated"][:2].tolist() == [False, True]
    with pytest.raises(ResetNeeded, match="ended"):
        env.step(np.ones((4, 2)))


def test_time_limit_counts_inner_steps() -> None:
    env = begun(chunk=4, max_episode_steps=6)
    assert env.step(np.ones((4, 2)))[2:4] == (False, False)
    obs, reward, terminated, truncated, _ = env.step(np.ones((4, 2)))
    np.testing.assert_allclose(obs, [0.6, 0.6], atol=1e-6)
    assert reward == pytest.approx(-(1.0 + 1.2), abs=1e-5)
    assert (terminated, truncated) == (False, True)


def test_time_limit_comes_from_the_card() -> None:
    model = Point()
    model.card = {"time_limit": 1}
    assert begun(model).step(ONE)[3] is True
    assert begun(model, max_episode_steps=2).step(ONE)[3] is False


def test_a_dream_that_turns_non_finite_ends() -> None:
    class Broken(Point):
        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            x, reward = super().step(x, u)
            return torch.where(x > 0.25, torch.inf, x), reward

    env = begun(Broken(), chunk=4)
    obs, reward, terminated, truncated, info = env.step(np.ones((4, 2)))
    np.testing.assert_allclose(obs, [0.2, 0.2], atol=1e-6)
    assert reward == pytest.approx(-(0.2 + 0.4), abs=1e-6)
    assert (terminated, truncated, info["non_finite"]) == (False, True, True)
    env = begun(Broken(), at=[0.2, 0.0])
    obs, reward, terminated, truncated, info = env.step(ONE)
    np.testing.assert_allclose(obs, [0.2, 0.0], atol=1e-6)
    assert (reward, terminated, truncated, info["non_finite"]) == (0.0, False, True, True)


def test_the_observation_is_contained_and_the_dream_goes_on_from_what_it_said() -> None:
    env = begun(Bounded(), at=[0.15, 0.0])
    obs, _, _, _, info = env.step(ONE)
    assert obs.dtype == np.float64 and env.observation_space.contains(obs) and obs[0] == 0.2
    np.testing.assert_allclose(info["imagined"]["obs"], [[0.25, 0.1]], atol=1e-6)
    np.testing.assert_allclose(env.step(ONE)[4]["imagined"]["obs"], [[0.35, 0.2]], atol=1e-6)


def test_what_is_handed_out_is_not_the_state() -> None:
    env, same = begun(), begun()
    obs, _, _, _, info = env.step(ONE)
    same.step(ONE)
    obs[:] = 7
    with pytest.raises(ValueError, match="read-only"):
        info["imagined"]["obs"][:] = 7
    assert np.array_equal(env.step(ONE)[0], same.step(ONE)[0])


def test_sampled_and_flow_steps_reach_the_model() -> None:
    plain, sampled = begun(Noisy()), begun(Noisy(), sampled=True, flow_steps=3)
    (a, ra, *_), (b, rb, *_) = plain.step(ONE), sampled.step(ONE)
    assert not np.allclose(a, b) and rb - ra == pytest.approx(2, abs=1e-5)


def test_same_seed_same_dream() -> None:
    def dream(seed: int) -> list[np.ndarray]:
        env = DreamEnv(Noisy(), sampled=True)
        first, _ = env.reset(seed=seed)
        frames = [first, env.step(ONE)[0]]
        second, _ = env.reset()
        return [*frames, second, env.step(ONE)[0]]

    assert np.array_equal(dream(3), dream(3))
    starts = {tuple(frame) for seed in range(20) for frame in dream(seed)[::2]}
    assert len(starts) == 5, "resets should begin at all of the starts in the end"
    env = DreamEnv(Noisy(), sampled=True)
    ends = {tuple(env.reset(options={"observation": [0, 0]})[0] + env.step(ONE)[0]) for _ in range(5)}
    assert len(ends) == 5, "each episode dreams its own noise"


# -- resets -----------------------------------------------------------------------------------------------------------


def test_reset_begins_at_a_context() -> None:
    class Recorder(Point):
        def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
            self.seen_obs, self.seen_actions = obs, actions
            return super().observe(state, obs, actions)

    model = Recorder()
    env, context, actions = DreamEnv(model), np.array([[0, 0], [0.1, 0.1]]), np.array([[0, 0], [1, 1]])
    obs, _ = env.reset(options={"observation": context, "actions": actions})
    np.testing.assert_allclose(obs, context[-1], atol=1e-6)
    assert model.seen_obs.shape == (1, 2, 2) and model.seen_actions is not None
    np.testing.assert_allclose(model.seen_actions, actions[None])
    env.reset(options={"observation": context[0]})
    assert model.seen_obs.shape == (1, 1, 2) and model.seen_actions is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"obs": [0, 0]}, "unknown reset options"),
        ({"actions": [[0, 0]]}, "needs 'observation'"),
        ({"observation": [0, 0, 0]}, r"expected the shape \[...,2\]"),
        ({"observation": "here"}, "elements of"),
        ({"observation": [0, np.nan]}, "finite"),
        ({"observation": [0, 0.5]}, "outside the observation space"),
        ({"observation": [[0, 0], [0, 0]]}, "needs 'actions'"),
        ({"observation": [[0, 0], [0, 0]], "actions": [[0, 0]]}, "needs 'actions'"),
        ({"observation": [0, 0], "actions": [0, 0]}, "goes with"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    env = begun(Bounded())
    with pytest.raises(ValueError, match=says):
        env.reset(options=options)
    env.step(ONE)  # the dream that was is still there


def test_a_model_without_starts_asks_for_one() -> None:
    env = DreamEnv(PointMass())
    with pytest.raises(ValueError, match="options="):
        env.reset()
    env.reset(options={"observation": [0, 0]})


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "error", "says"),
    [
        (np.ones(3), ValueError, "shape"),
        (np.ones((1, 2)), ValueError, "shape"),
        (0.5, ValueError, "shape"),
        ([0.0, np.nan], ValueError, "finite"),
        ([0.0, 1.5], ValueError, "1.5 at .* is outside"),
        ([0.0, 1e300], ValueError, "outside"),
        (["left", "right"], TypeError, "real numbers"),
        ([True, False], TypeError, "real numbers"),
        (None, TypeError, "real numbers"),
    ],
)
def test_bad_actions_leave_the_dream_as_it_was(action: Any, error: type[Exception], says: str) -> None:
    env, same = begun(), begun()
    with pytest.raises(error, match=says):
        env.step(action)
    assert np.array_equal(env.step(ONE)[0], same.step(ONE)[0])


def test_actions_may_be_of_any_number_type() -> None:
    for action in ([1, 1], np.ones(2, np.float64) + 1e-12, torch.ones(2)):
        assert np.array_equal(begun().step(action)[0], begun().step(ONE)[0])


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"chunk": 0}, "from 1 to 8"),
        ({"chunk": 9}, "from 1 to 8"),
        ({"chunk": 2.0}, "from 1 to 8"),
        ({"flow_steps": 0}, "flow_steps"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"render_mode": "rgb_array"}, "card names no simulator"),
        ({"render_mode": "human"}, "render_mode"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DreamEnv(Point(), **kwargs)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="Dynamics"):
        DreamEnv(object())  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="ship with kairos_gym"):
        DreamEnv("no such model")
    for name in kairos_gym.shipped():
        with pytest.raises(FileNotFoundError, match=name):
            kairos_gym.load("./no/such/folder")


def test_order_of_calls() -> None:
    env = DreamEnv(Point())
    with pytest.raises(ResetNeeded, match="not begun"):
        env.step(ONE)
    env.reset()
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(ONE)):
        with pytest.raises(ClosedEnvironmentError, match="closed"):
            call()


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_render_draws_what_was_dreamed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")

    class Pendulum(Point):
        """Not the real pendulum's motion, but its observations: (cos, sin, speed), and +-2 of torque."""

        def __init__(self) -> None:
            super().__init__(dim=3)
            high = np.array([1, 1, 8], np.float32)
            self.spec = Spec(spaces.Box(-high, high), spaces.Box(-2, 2, (1,)), 8, 0.05)
            self.card = {"env": "Pendulum-v1"}

        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cat([-x[:, :2], u], dim=1), u[:, 0]  # half a turn each step

    env = DreamEnv(Pendulum(), render_mode="rgb_array")
    with pytest.raises(ResetNeeded):
        env.render()
    up = np.array([1.0, 0.0, 0.0])
    env.reset(options={"observation": up})
    pictures = [env.render()]
    for _ in range(2):
        env.step([0.0])
        pictures.append(env.render())
    assert pictures[0].dtype == np.uint8 and pictures[0].shape[2] == 3
    assert not np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])
    env.close()
    with pytest.raises(ValueError, match="render_mode"):
        DreamEnv(Pendulum()).render()
