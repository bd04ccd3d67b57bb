"""DreamVectorEnv keeps Gymnasium's vector conventions: it is what SyncVectorEnv makes of as many DreamEnvs."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as wrappers
from test_vectors import same
from tiny import dreamer
from walks import Walk

import kairos_gym
from kairos_gym import DreamEnv, DreamVectorEnv
from kairos_gym.dream.steps import ImaginedArrays, all_continue
from world_model.contract import Imagined, Spec
from world_model.state import LatentState


def begun(model: Any = None, num_envs: int = 3, **kwargs: Any) -> DreamVectorEnv:
    env = DreamVectorEnv(model or Walk(), num_envs, **kwargs)
    env.reset(seed=0)
    return env


def zeros(env: DreamVectorEnv) -> Any:
    return np.zeros_like(env.action_space.sample())


# -- Gymnasium's conventions -------------------------------------------------------------------------------------------


def expect_same_infos(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Equal where the masks of Gymnasium's infos say that there is something."""
    said = {key for key in a if not key.startswith("_") and a[f"_{key}"].any()}
    assert said == {key for key in b if not key.startswith("_") and b[f"_{key}"].any()}
    for key in said:
        mask = a[f"_{key}"]
        np.testing.assert_array_equal(mask, b[f"_{key}"])
        if isinstance(a[key], dict):
            expect_same_infos(a[key], b[key])
        else:
            for row in np.flatnonzero(mask):
                np.testing.assert_allclose(a[key][row], b[key][row], atol=1e-6)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_it_is_what_sync_vector_env_makes_of_dream_envs(mode: AutoresetMode, chunk: int, sampled: bool) -> None:
    kwargs: dict[str, Any] = dict(model=Walk(wall=0.5), chunk=chunk, sampled=sampled, max_episode_steps=7)
    ours = DreamVectorEnv(num_envs=5, autoreset_mode=mode, **kwargs)
    theirs: Any = SyncVectorEnv([lambda: DreamEnv(**kwargs)] * 5, autoreset_mode=mode)
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space", "num_envs"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.metadata == theirs.metadata
    (a, info_a), (b, info_b) = ours.reset(seed=3), theirs.reset(seed=3)
    np.testing.assert_array_equal(a, b)
    assert info_a == info_b == {} and a.dtype == b.dtype
    ours.action_space.seed(0)
    ended = np.zeros(2, int)
    for _ in range(60):
        action = ours.action_space.sample()
        got, want = ours.step(action), theirs.step(action)
        for x, y in zip(got[:4], want[:4], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)
            assert x.dtype == y.dtype
        expect_same_infos(got[4], want[4])
        assert ours.observation_space.contains(got[0])
        ended += [got[2].sum(), got[3].sum()]
        done = got[2] | got[3]
        if mode is AutoresetMode.DISABLED and done.any():
            a, b = (env.reset(options={"reset_mask": done})[0] for env in (ours, theirs))
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert (ended > 3).all(), "too few ends, of both kinds, to have tried anything"


def test_make_vec() -> None:
    env = gym.make_vec(
        "kairos_gym/Dream-v0", num_envs=4, vectorization_mode="vector_entry_point", model=Walk(), chunk=2,
        max_episode_steps=4, autoreset_mode="SameStep",
    )  # fmt: skip
    assert isinstance(env, DreamVectorEnv) and env.max_episode_steps == 4
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP and env.spec is not None
    obs, _ = env.reset(seed=0)
    assert obs.shape == (4, 2)


def test_stock_wrappers() -> None:
    env: Any = wrappers.RecordEpisodeStatistics(begun(max_episode_steps=5))
    env = wrappers.DictInfoToList(env)
    env.reset(seed=0)
    seen = []
    for _ in range(13):
        *_, infos = env.step(np.zeros((3, 2), np.float32))
        seen += [info["episode"]["l"] for info in infos if "episode" in info]
        assert all(info["imagined"]["obs"].shape == (1, 2) for info in infos if "imagined" in info)
    assert seen == [5] * 6, "two episodes of five steps in each, and the steps that begin the next"
    normal = wrappers.NormalizeObservation(wrappers.RescaleAction(begun(), -2.0, 2.0))
    normal.reset(seed=0)
    assert normal.step(np.full((3, 2), 2.0, np.float32))[0].shape == (3, 2)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_dream_env() -> None:
    env, batch_of_one = begun(), DreamEnv(Walk())
    batch_of_one.reset(seed=1)
    row = env.row(1)
    one = np.ones(2, np.float32)
    for x, y in zip(row.step(one)[:4], batch_of_one.step(one)[:4], strict=True):
        np.testing.assert_allclose(x, y)
    np.testing.assert_array_equal(row.step(one)[0], env.observations[1])
    np.testing.assert_array_equal(env.observations[0], begun().observations[0], "the others stand still")
    row.close()
    env.step(zeros(env))
    with pytest.raises(IndexError, match="3 dreams"):
        env.row(3)


def test_seeds_and_resets() -> None:
    env = begun()
    first = env.reset(seed=[4, None, 4])[0]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(env.reset(seed=[4, 5, 6])[0][0], DreamEnv(Walk()).reset(seed=4)[0])
    assert len({tuple(row) for _ in range(9) for row in env.reset()[0]}) == 5, "resets begin at all starts in the end"
    obs, _ = env.reset(options={"observation": [[0, 0], [1, 1], [0.5, 0]]})
    np.testing.assert_array_equal(obs, np.array([[0, 0], [1, 1], [0.5, 0]]))
    mask = np.array([False, True, False])
    obs, _ = env.reset(
        options={"observation": np.full((3, 2, 2), 0.25), "actions": np.ones((3, 2, 2)), "reset_mask": mask}
    )
    np.testing.assert_array_equal(obs, np.array([[0, 0], [0.25, 0.25], [0.5, 0]]))
    np.testing.assert_allclose(env.step(zeros(env))[0][1], 0.25 + 0.8 * 0.1)


def test_a_row_that_ended_by_itself_begins_again_with_the_others() -> None:
    for mode in ("NextStep", "SameStep"):
        env = begun(max_episode_steps=2, autoreset_mode=mode)
        for _ in range(2):
            env.row(1).step(np.ones(2, np.float32))
        env.step(zeros(env))
        env.step(zeros(env))


def test_forks_share_nothing() -> None:
    env = begun(num_envs=2, sampled=True)
    forks = env.fork(3, rows=[1])
    assert forks.num_envs == 3 and forks.max_episode_steps == env.max_episode_steps
    before = env.observations
    actions = np.array([[1, 1], [1, 1], [-1, 0]], np.float32)
    obs = forks.step(actions)[0]
    np.testing.assert_array_equal(obs[0], obs[1])
    assert not np.allclose(obs[0], obs[2])
    np.testing.assert_array_equal(env.observations, before)
    np.testing.assert_allclose(env.step(np.ones((2, 2), np.float32))[0][1], obs[0], atol=1e-6)
    env.close()
    forks.step(actions)
    one = DreamEnv(Walk())
    one.reset(seed=0)
    assert one.fork(2).num_envs == 2


def test_a_snapshot_is_of_a_row_too() -> None:
    env, batch_of_one = begun(sampled=True), DreamEnv(Walk(), sampled=True)
    action = np.ones(2, np.float32)
    env.step(np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(batch_of_one.restore(env.snapshot([2])), env.observations[2])
    step = batch_of_one.step(action)[0]
    np.testing.assert_allclose(env.row(2).step(action)[0], step, atol=1e-6)
    env.restore(batch_of_one.snapshot(), rows=[0])
    np.testing.assert_allclose(env.observations[0], step, atol=1e-6)
    np.testing.assert_array_equal(batch_of_one.reset()[0], env.row(0).reset()[0])


def test_the_state_does_not_grow() -> None:
    env = begun(dreamer(), 2)
    size, blob = env.state.nbytes, len(env.snapshot())
    for _ in range(50):
        env.step(zeros(env))
    assert (env.state.nbytes, len(env.snapshot())) == (size, blob)


# -- step_torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", AutoresetMode)
def test_step_torch_is_step(mode: AutoresetMode) -> None:
    ours, torch_ = (begun(Walk(wall=0.4), chunk=2, max_episode_steps=6, autoreset_mode=mode) for _ in range(2))
    ours.action_space.seed(0)
    for _ in range(20):
        action = ours.action_space.sample()
        want, got = ours.step(action), torch_.step_torch(torch.from_numpy(action))
        for x, y in zip(want[:4], got[:4], strict=True):
            np.testing.assert_allclose(x, y.numpy(), atol=1e-6)
        assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == torch.bool
        if "final_obs" in want[4]:
            for row in np.flatnonzero(want[4]["_final_obs"]):
                np.testing.assert_allclose(got[4]["final_obs"][row], want[4]["final_obs"][row], atol=1e-6)
        done = want[2] | want[3]
        if mode is AutoresetMode.DISABLED and done.any():
            for env in (ours, torch_):
                env.reset(options={"reset_mask": done})


def test_gradients_flow_where_actions_ask_for_them() -> None:
    def gained(actions: torch.Tensor) -> torch.Tensor:
        env = DreamVectorEnv(Walk(wall=9.0), 2)
        env.reset(options={"observation": np.full((2, 2), 0.3)})
        return sum((env.step_torch(u)[1].sum() for u in actions.unbind()), torch.zeros(()))

    actions = torch.full((3, 2, 2), 0.2, requires_grad=True)
    gained(actions).backward()
    assert actions.grad is not None
    for at in np.ndindex(3, 2, 2):
        nudged = actions.detach().clone()
        nudged[at] += 0.1
        torch.testing.assert_close(
            (gained(nudged) - gained(actions.detach())) / 0.1, actions.grad[at], atol=1e-4, rtol=1e-4
        )
    env = begun()
    env.step_torch(torch.zeros(3, 2, requires_grad=True))
    assert env.state["x"].requires_grad
    env.step_torch(torch.zeros(3, 2))
    assert not env.state["x"].requires_grad
    push = torch.zeros(3, 2, requires_grad=True)
    env.step_torch(push)
    env.reset(options={"reset_mask": np.array([False, True, False])})
    obs = env.step_torch(torch.zeros(3, 2, requires_grad=True))[0]
    (grad,) = torch.autograd.grad(obs.sum(), push)
    assert grad[1].eq(0).all() and grad[[0, 2]].ne(0).all(), "the others go on"
    env.detach()
    assert not env.state["x"].requires_grad


def test_nothing_is_decoded_that_nobody_asks_for() -> None:
    class Counted(Walk):
        decoded = 0

        def imagine(self, state: LatentState, actions: torch.Tensor, *, decode: bool = True, **kwargs: Any) -> Any:
            self.decoded += decode
            return super().imagine(state, actions, decode=decode, **kwargs)

    model = Counted()
    env = begun(model, max_episode_steps=3)
    for _ in range(5):
        obs, reward, *_ = env.step_torch(torch.zeros(3, 2), decode=False)
        assert obs is None and reward.shape == (3,)
    assert model.decoded == 0 and env.observations is None
    blob = env.snapshot()
    assert env.row(0).restore(env.snapshot([1])) is None, "nobody knows what it would show"
    assert begun(max_episode_steps=3).restore(blob) is None
    env.reset(options={"reset_mask": np.array([True, False, False])})
    assert env.observations is None
    assert env.step(zeros(env))[0].shape == (3, 2) and model.decoded == 1


# -- rewards and ends of one's own -------------------------------------------------------------------------------------


def in_torch(obs: Any, action: Any, next_obs: Any) -> Any:
    return (next_obs - obs).norm(dim=-1) + action.sum(-1)


def in_numpy(obs: Any, action: Any, next_obs: Any) -> Any:
    return np.linalg.norm(next_obs.copy() - obs, axis=-1) + action.astype(np.float32).sum(-1)


@pytest.mark.parametrize("function", [in_torch, in_numpy])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_reward_of_ones_own(function: Any, chunk: int) -> None:
    env = begun(reward_fn=function, chunk=chunk)
    before, action = env.observations, np.full((3, chunk, 2), 0.5, np.float32)
    _, reward, *_, infos = env.step(action[:, 0] if chunk == 1 else action)
    frames = np.concatenate([before[:, None], infos["imagined"]["obs"]], 1)
    want = np.linalg.norm(np.diff(frames, axis=1), axis=-1) + action.sum(-1)
    np.testing.assert_allclose(infos["imagined"]["reward"], want, atol=1e-5)
    np.testing.assert_allclose(reward, want.sum(1), atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [lambda o, a, n: n[:, 0] > 0.35, lambda o, a, n: np.where(n.astype(np.float64)[:, 0] > 0.35, True, False)],
)
def test_an_end_of_ones_own(function: Any) -> None:
    env = begun(termination_fn=function, chunk=2, autoreset_mode="Disabled")
    env.reset(options={"observation": [[0.0, 0], [0.2, 0], [0.3, 0]]})
    _, reward, terminated, truncated, _ = env.step(np.tile([1.0, 0], (3, 2, 1)))
    assert terminated.tolist() == [False, True, True] and not truncated.any()
    np.testing.assert_allclose(reward, [-0.1 - 0.28, -0.3 - 0.48, -0.4], atol=1e-6)


def test_a_gradient_through_numpy_is_refused() -> None:
    for first in (True, False):
        env = begun(reward_fn=in_numpy)
        if first:
            env.step(zeros(env))
        with pytest.raises((ValueError, RuntimeError, AttributeError)):
            env.step_torch(torch.zeros(3, 2, requires_grad=True))
    begun(reward_fn=in_torch).step_torch(torch.zeros(3, 2, requires_grad=True))[1].sum().backward()


def test_functions_see_what_a_step_shows() -> None:
    space = spaces.Dict({"b": spaces.Box(-1, 1, (1,)), "a": spaces.Box(-2, 2, (1,))})

    class Choice(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.spec = Spec(space, spaces.Discrete(2, start=5), 4, 0.1)

    seen: list[Any] = []

    def reward(obs: Any, action: Any, next_obs: Any) -> Any:
        seen.append((obs, action, next_obs))
        return next_obs["a"][:, 0]

    env = begun(Choice(), num_envs=2, reward_fn=reward)
    obs, gained, *_ = env.step([5, 6])
    ((before, action, after),) = seen
    assert list(before) == ["a", "b"] and action.tolist() == [5, 6]
    assert same(obs, {key: part.numpy() for key, part in after.items()})
    np.testing.assert_allclose(gained, obs["a"][:, 0])


# -- errors ------------------------------------------------------------------------------------------------------------


def shorter(env: DreamVectorEnv) -> bytes:
    return env.snapshot()[:-3]


def flipped(env: DreamVectorEnv) -> bytes:
    blob = bytearray(env.snapshot())
    blob[-20] ^= 4
    return bytes(blob)


BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "too few actions": (lambda e: e.step(np.zeros((2, 2))), ValueError, "shape"),
    "one action": (lambda e: e.step(np.zeros(2)), ValueError, "shape"),
    "NaN": (lambda e: e.step(np.full((3, 2), np.nan)), ValueError, "finite"),
    "infinity": (lambda e: e.step(np.full((3, 2), np.inf)), ValueError, "finite"),
    "out of range": (lambda e: e.step([[0, 0], [0, 1.5], [0, 0]]), ValueError, r"1.5 at \(1, 1\) is outside"),
    "words": (lambda e: e.step([["a", "b"]] * 3), TypeError, "real numbers"),
    "bools": (lambda e: e.step(np.ones((3, 2), bool)), TypeError, "real numbers"),
    "nothing": (lambda e: e.step(None), TypeError, "real numbers"),
    "torch: shape": (lambda e: e.step_torch(torch.zeros(3)), ValueError, "float32"),
    "torch: dtype": (lambda e: e.step_torch(torch.zeros(3, 2).double()), ValueError, "float64"),
    "torch: NaN": (lambda e: e.step_torch(torch.full((3, 2), torch.nan)), ValueError, "finite"),
    "torch: numpy": (lambda e: e.step_torch(np.zeros((3, 2), np.float32)), TypeError, "tensor"),
    "seeds: too few": (lambda e: e.reset(seed=[1, 2]), ValueError, "3 of them"),
    "seeds: negative": (lambda e: e.reset(seed=-1), ValueError, "from 0 on"),
    "seeds: real": (lambda e: e.reset(seed=[0.5, 1, 2]), ValueError, "whole number"),
    "seeds: yes": (lambda e: e.reset(seed=True), ValueError, "whole number"),
    "options: a number": (lambda e: e.reset(options=5), TypeError, "dict"),
    "restore: one bit": (lambda e: e.restore(flipped(e)), ValueError, "checksum"),
    "row: a part": (lambda e: e.row(1.5), IndexError, "3 dreams"),
    "seeds: a word": (lambda e: e.reset(seed="abc"), ValueError, "whole number"),
    "options: unknown": (lambda e: e.reset(options={"obs": 1}), ValueError, "unknown reset options"),
    "options: one row": (lambda e: e.reset(options={"observation": [0, 0]}), ValueError, r"\[3,2\] or \[3,T,2\]"),
    "options: NaN": (lambda e: e.reset(options={"observation": np.full((3, 2), np.nan)}), ValueError, "finite"),
    "options: outside": (lambda e: e.reset(options={"observation": np.full((3, 2), 9)}), ValueError, "outside"),
    "mask: numbers": (lambda e: e.reset(options={"reset_mask": np.ones(3)}), TypeError, "bool"),
    "mask: length": (lambda e: e.reset(options={"reset_mask": np.ones(2, bool)}), ValueError, "shape"),
    "mask: nobody": (lambda e: e.reset(options={"reset_mask": np.zeros(3, bool)}), ValueError, "a True"),
    "restore: cut short": (lambda e: e.restore(shorter(e)), ValueError, "whole snapshot"),
    "restore: nothing": (lambda e: e.restore(b""), ValueError, "whole snapshot"),
    "restore: words": (lambda e: e.restore("dream"), TypeError, "bytes"),
    "restore: another model's": (lambda e: e.restore(begun(Walk(seed=1)).snapshot()), ValueError, "same weights"),
    "restore: other shapes": (lambda e: e.restore(begun(num_envs=2).snapshot()), ValueError, "holds 2 dreams"),
    "restore: too old": (lambda e: e.restore(old()), ValueError, "max_episode_steps"),
    "restore: rows": (lambda e: e.restore(e.snapshot([0, 1]), [1, 1]), ValueError, "different"),
    "snapshot: rows": (lambda e: e.snapshot([3]), ValueError, "0 to 2"),
    "snapshot: no rows": (lambda e: e.snapshot([]), ValueError, "0 to 2"),
    "fork: none": (lambda e: e.fork(0), ValueError, "at least 1"),
    "fork: negative": (lambda e: e.fork(-1), ValueError, "at least 1"),
    "fork: a part": (lambda e: e.fork(1.5), ValueError, "whole number"),
    "fork: rows": (lambda e: e.fork(1, [-1]), ValueError, "0 to 2"),
    "render": (lambda e: e.render(), ValueError, "render_mode"),
}


def old() -> bytes:
    env = begun(max_episode_steps=20)
    for _ in range(12):
        env.step(zeros(env))
    return env.snapshot()


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_one_clear_exception_and_changes_nothing(name: str) -> None:
    call, error, says = BAD_CALLS[name]
    env, same_ = begun(), begun()
    with pytest.raises(error, match=says):
        call(env)
    for _ in range(10):  # into the next episode
        np.testing.assert_array_equal(env.step(zeros(env))[0], same_.step(zeros(same_))[0])


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"num_envs": 0}, ValueError, "num_envs"),
        ({"num_envs": -2}, ValueError, "num_envs"),
        ({"num_envs": 2.0}, ValueError, "num_envs"),
        ({"chunk": 5}, ValueError, "from 1 to 4"),
        ({"max_episode_steps": 0}, ValueError, "max_episode_steps"),
        ({"autoreset_mode": "Sometimes"}, ValueError, "Sometimes"),
        ({"reward_fn": 3}, TypeError, "reward_fn"),
        ({"termination_fn": "end"}, TypeError, "termination_fn"),
        ({"render_mode": "rgb_array"}, ValueError, "no simulator"),
        ({"model": object()}, TypeError, "Dynamics"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        DreamVectorEnv(**{"model": Walk(), "num_envs": 2, **kwargs})


def test_order_of_calls() -> None:
    env = DreamVectorEnv(Walk(), 2, autoreset_mode="Disabled", max_episode_steps=1)
    for call in (lambda: env.step(np.zeros((2, 2))), env.snapshot, lambda: env.fork(1)):
        with pytest.raises(ResetNeeded, match="not begun"):
            call()
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ResetNeeded, match=r"dreams \[1\] have not begun"):
        env.step(np.zeros((2, 2)))
    env.reset(seed=0)
    env.step(np.zeros((2, 2)))
    with pytest.raises(ResetNeeded, match="ended"):
        env.step(np.zeros((2, 2)))
    env.close()
    env.close()
    late: list[Any] = [env.reset, env.snapshot, lambda: env.restore(b""), lambda: env.fork(1)]
    late += [lambda: env.step(np.zeros((2, 2))), lambda: env.step_torch(torch.zeros(2, 2))]
    for closed in late:
        with pytest.raises(ClosedEnvironmentError, match="closed"):
            closed()
    with pytest.raises(ValueError, match="begin again from"):
        DreamVectorEnv(Walk(starts=False), 2)
    nothing = DreamVectorEnv(Walk(starts=False), 2, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match="keeps no real starts"):
        nothing.reset()
    nothing.reset(options={"observation": np.zeros((2, 2))})


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda o, a, n: n, "one number a step"),
        (lambda o, a, n: 1.0, "one number a step"),
        (lambda o, a: 1.0, "fails"),
        (lambda o, a, n: n[:, 7], "fails"),
        (lambda o, a, n: n[:, 0] > 0, "must return"),
    ],
)
def test_bad_functions(function: Any, says: str) -> None:
    env = begun(reward_fn=function)
    before = env.observations
    with pytest.raises(ValueError, match=says):
        env.step(zeros(env))
    np.testing.assert_array_equal(env.observations, before)
    with pytest.raises(ValueError, match="decode=False"):
        begun(reward_fn=in_torch).step_torch(torch.zeros(3, 2), decode=False)


@pytest.mark.parametrize("what", ["", "nan", "inf", "end", "undecoded"])
def test_whether_a_step_is_plain_is_told_alike_on_any_device(what: str) -> None:
    obs, reward, ends = torch.ones(2, 3, 4), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    ends[1, 2] = what == "end"
    obs[0, 1, 2] = {"nan": torch.nan, "inf": -torch.inf}.get(what, 1.0)
    imagined = Imagined(None if what == "undecoded" else obs, reward, ends)
    assert (
        all_continue(imagined, ImaginedArrays.from_tensors(imagined))
        == all_continue(imagined, None)
        == (what in ("", "undecoded"))
    )


def test_shipped_models() -> None:
    for name in kairos_gym.shipped():
        env = DreamVectorEnv(name, 3, chunk=4)
        env.reset(seed=0)
        assert env.observation_space.contains(env.step(env.action_space.sample())[0])
