"""The compiled step is the torch step: outputs and memory, of any shape; and who needs torch has it."""

from __future__ import annotations

import copy
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import dreamt, tiny_model
from torch import Tensor

from world_model.contract import Imagined
from world_model.model.world_model import WorldModel
from world_model.ops import dispatch, native
from world_model.runtime.compiled_step import compiled_step
from world_model.state import LatentState

try:
    native.library("dream")
except native.KernelUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)

HOUSE = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAIROS_KERNELS", raising=False)


def evidence(model: WorldModel, batch: int, frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """obs [B,T,O] and the actions that led there [B,T,A], within the bounds."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(batch, frames, model.config.obs_dim, generator=g)
    return obs, 4 * torch.rand(batch, frames, model.config.action_dim, generator=g) - 2


def dream(
    model: WorldModel, batch: int, frames: int, chunks: list[int], **how: Any
) -> tuple[LatentState, list[Imagined]]:
    """A dream that begins with evidence and goes on by chunks, in the model's dtype."""
    obs, actions = (x.to(model.draft_error) for x in evidence(model, batch, frames))
    state = model.observe(model.initial(batch, torch.arange(batch)), obs, actions)
    out = []
    for i, k in enumerate(chunks):
        state, imagined = model.imagine(state, evidence(model, batch, k, seed=i + 1)[1].to(model.draft_error), **how)
        out.append(imagined)
    return state, out


def numbers(state: LatentState, dreamed: list[Imagined]) -> dict[str, Tensor]:
    out = dict(state.tensors)
    for i, x in enumerate(dreamed):
        out |= {f"obs {i}": dreamt(x), f"reward {i}": x.reward}
    return {name: t.double() for name, t in out.items()}


def assert_as(model: WorldModel, batch: int, frames: int, chunks: list[int], **how: Any) -> None:
    """The compiled step is about as near to the truth in float64 as the torch step is."""
    fast, dreamed = dream(model, batch, frames, chunks, **how)
    assert compiled_step(model, fast) is not None
    assert all(t.is_contiguous() for t in fast.tensors.values())
    assert all(x.terminated.dtype == torch.bool and x.terminated.shape == x.reward.shape for x in dreamed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAIROS_KERNELS", "torch")
        slow = numbers(*dream(model, batch, frames, chunks, **how))
        truth = numbers(*dream(copy.deepcopy(model).double(), batch, frames, chunks, **how))
    for name, t in numbers(fast, dreamed).items():
        assert t.shape == truth[name].shape
        usual = (slow[name] - truth[name]).abs().max() + 1e-6 * truth[name].abs().max().clamp_min(1.0)
        wrong = (t - truth[name]).abs().max()
        assert wrong <= 5 * usual, f"{name} is {wrong:.1e} off the truth, torch {usual:.1e}"


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.text("SDG", min_size=1, max_size=4),
    batch=st.sampled_from([1, 2, 3, 23, 24, 25, 50]),
    frames=st.integers(1, 6),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    tokens=st.integers(1, 3),
    head_dim=st.sampled_from([2, 5, 8, 16, 32, 40]),
    draft=st.booleans(),
    draft_frames=st.integers(1, 2),
    sampled=st.booleans(),
    flow_steps=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_any_shape(
    pattern: str, batch: int, frames: int, chunks: list[int], sampled: bool, flow_steps: int, seed: int, **sizes: Any
) -> None:
    model = tiny_model(pattern, seed=seed, **sizes)
    assert_as(model, batch, frames, chunks, sampled=sampled, flow_steps=flow_steps)


@pytest.mark.parametrize("pattern", ["SGDG", "GS"])
def test_the_sizes_that_ship(pattern: str) -> None:
    sizes: dict[str, Any] = dict(width=64, action_width=32, head_dim=32, window=8, dilation=4, taps=4)
    sizes |= dict(draft_width=96, draft_blocks=3)
    assert_as(tiny_model(pattern, obs_dim=17, action_dim=6, **sizes), 30, 20, [4, 1, 3])


@pytest.mark.parametrize("sizes", [dict(window=1), dict(window=2, chunk=6), dict(dilation=1, taps=1)])
def test_chunks_longer_than_the_windows(sizes: dict[str, Any]) -> None:
    assert_as(tiny_model("SDGS", seed=1, **sizes), 25, 4, [4, 3])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of other processors")
@pytest.mark.parametrize("without", [("-mno-avx512f",), ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma")])
def test_other_processors(without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *without))
    native.library.cache_clear()
    dispatch._library_or_none.cache_clear()
    try:
        for pattern, head_dim in (("DD", 2), ("SGDG", 5), ("GS", 32), ("GD", 40)):
            assert_as(tiny_model(pattern, head_dim=head_dim, tokens=2), 26, 5, [2, 4])
    finally:
        native.library.cache_clear()
        dispatch._library_or_none.cache_clear()


@pytest.fixture
def unwritten() -> Iterator[None]:
    """New memory is full of NaN, so that what is read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten")
def test_everything_is_written() -> None:
    assert torch.empty(3).isnan().all()
    for frames in (1, 2, 9):
        state, dreamed = dream(tiny_model("SDGS", draft_frames=2), 25, frames, [1, 4])
        assert all(t.isfinite().all() for t in state.tensors.values())
        assert all(dreamt(x).isfinite().all() and x.reward.isfinite().all() for x in dreamed)


def test_a_row_alone_a_row_of_many_and_more_threads() -> None:
    model = tiny_model("SGDG", seed=3)
    state, _ = dream(model, 60, 3, [])
    actions = evidence(model, 60, 4, seed=9)[1]
    after, all_of_them = model.imagine(state, actions, sampled=True)
    for row in (0, 7, 59):
        one, batch_of_one = model.imagine(state.select(torch.tensor([row])), actions[row : row + 1], sampled=True)
        torch.testing.assert_close(dreamt(batch_of_one)[0], dreamt(all_of_them)[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(one["2.k"][0], after["2.k"][row], rtol=0, atol=1e-5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again, threaded = model.imagine(state, actions, sampled=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(dreamt(threaded), dreamt(all_of_them))
    assert all(torch.equal(t, after[name]) for name, t in again.tensors.items())


def test_lost_dreams_stay_lost_and_alone() -> None:
    model = tiny_model("SG")
    state, _ = dream(model, 3, 2, [])
    obs = state["obs"].clone()
    obs[1] = torch.nan
    _, imagined = model.imagine(state.replace(obs=obs), evidence(model, 3, 2)[1])
    assert dreamt(imagined)[1].isnan().all() and dreamt(imagined)[[0, 2]].isfinite().all()


def test_what_is_wrong_is_said_as_ever() -> None:
    model = tiny_model("SG")
    state, _ = dream(model, 2, 1, [])
    for wrong in (torch.nan, 2.1, -torch.inf):
        actions = torch.zeros(2, 1, 2)
        actions[1, 0, 1] = wrong
        with pytest.raises(ValueError, match="actions must be finite and within"):
            model.imagine(state, actions)
    with pytest.raises(ValueError, match="call observe first"):
        model.imagine(model.initial(2), torch.zeros(2, 1, 2))


def test_states_of_another_form_are_torchs_business() -> None:
    model = tiny_model("SG")
    state, _ = dream(model, 2, 2, [])
    actions = evidence(model, 2, 1)[1]
    others = [
        dream(tiny_model("SG", head_dim=8), 2, 2, [])[0],
        dream(tiny_model("SG", window=5), 2, 2, [])[0],
        state.replace(obs=state["obs"].double()),
        state.replace(age=state["age"].int()),
        state.replace(extra=torch.ones(2)),
        LatentState({name: t for name, t in state.tensors.items() if name != "seed"}),
    ]
    for other in others:
        assert compiled_step(model, other) is None
    with pytest.raises(RuntimeError):
        model.imagine(others[0], actions)
    before = state.replace(age=torch.tensor([-(2**28), 5]))  # no memory at all, whoever computes
    with pytest.MonkeyPatch.context() as patch:
        ours = dreamt(model.imagine(before, actions)[1])
        patch.setenv("KAIROS_KERNELS", "torch")
        torch.testing.assert_close(ours, dreamt(model.imagine(before, actions)[1]), rtol=1e-4, atol=1e-4)


def test_the_callers_defaults_change_nothing() -> None:
    model = tiny_model("SG")
    state, _ = dream(model, 2, 2, [])
    actions = evidence(model, 2, 3)[1]
    want = dreamt(model.imagine(state, actions, sampled=True, flow_steps=7)[1])
    torch.set_default_dtype(torch.float64)
    try:
        got = dreamt(model.imagine(state, actions, sampled=True, flow_steps=5)[1])
        again = dreamt(model.imagine(state, actions, sampled=True, flow_steps=7)[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(want, again)
    torch.testing.assert_close(got, dreamt(model.imagine(state, actions, sampled=True, flow_steps=5)[1]))


def test_a_model_in_training_is_dreamt_by_torch() -> None:
    """An optimiser may write weights without a count of it."""
    model = tiny_model("SG")
    state, _ = dream(model, 2, 2, [])
    actions = evidence(model, 2, 1)[1]
    assert compiled_step(model, state) is not None
    assert model.draft is not None
    model.draft.requires_grad_(True)  # a part is enough
    assert compiled_step(model, state) is None
    assert dreamt(model.imagine(state, actions)[1]).requires_grad
    model.draft.requires_grad_(False)
    assert compiled_step(model, state) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled_step(model, state) is None


def test_weights_that_change_are_seen() -> None:
    model = tiny_model("SG")
    state, _ = dream(model, 2, 2, [])
    actions = evidence(model, 2, 1)[1]

    def dreamed() -> Tensor:
        return dreamt(model.imagine(state, actions)[1])

    first = dreamed()
    model.tokens.out.bias.add_(0.5)
    second = dreamed()
    assert not torch.allclose(first, second)
    weights = {name: t + 0.1 if name == "draft.out_proj.bias" else t for name, t in model.state_dict().items()}
    model.load_state_dict(weights)
    assert not torch.allclose(second, dreamed())
    third = dreamed()
    model.draft.out_proj.bias.data = model.draft.out_proj.bias.data + 0.1  # type: ignore[union-attr]
    assert not torch.allclose(third, dreamed())
    model.load_state_dict({name: t + 0.05 for name, t in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(dreamed(), dreamt(copy.deepcopy(model).imagine(state, actions)[1]))
    model.requires_grad_(False).double()
    assert compiled_step(model, state) is None
    model.float()
    model.scaling.obs_mean += 1.0
    torch.testing.assert_close(dreamed(), dreamt(copy.deepcopy(model).imagine(state, actions)[1]))
    torch.testing.assert_close(dreamed(), dreamt(pickle.loads(pickle.dumps(model)).imagine(state, actions)[1]))


def test_gradients_come_from_torch() -> None:
    model = tiny_model("SG")
    state, _ = dream(model, 2, 2, [])
    actions = evidence(model, 2, 2)[1].requires_grad_()
    assert compiled_step(model, state, actions) is None
    after, imagined = model.imagine(state, actions)
    dreamt(imagined).sum().backward()
    assert actions.grad is not None and actions.grad.abs().sum() > 0
    assert after["0.k"].requires_grad and compiled_step(model, after) is None
    with torch.no_grad():
        assert compiled_step(model, state, actions) is not None


def test_torch_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("SG")
    state, _ = dream(model, 2, 2, [])
    monkeypatch.setenv("KAIROS_KERNELS", "torch")
    assert compiled_step(model, state) is None
    monkeypatch.setenv("KAIROS_KERNELS", "fast")
    with pytest.raises(ValueError, match="KAIROS_KERNELS must be one of auto, torch, native, eager, got 'fast'"):
        compiled_step(model, state)


DREAM = """
import torch, kairos_gym
env = kairos_gym.DreamEnv("pendulum")
env.reset(seed=0)
for _ in range(3):
    env.step(env.action_space.sample())
print("dreamed")
"""


@pytest.mark.parametrize("choice, code", [("auto", 0), ("native", 1)])
def test_without_a_compiler(tmp_path: Path, choice: str, code: int) -> None:
    env = os.environ | {"CXX": "/no/such/compiler", "XDG_CACHE_HOME": str(tmp_path), "KAIROS_KERNELS": choice}
    done = subprocess.run([sys.executable, "-c", DREAM], cwd=HOUSE, env=env, capture_output=True, text=True)
    assert done.returncode == code
    assert ("dreamed" in done.stdout) == (code == 0)
    assert done.stderr.count("dream.cpp can't be compiled") == 1
    if not code:
        assert "works in plain torch, which is slower" in done.stderr
