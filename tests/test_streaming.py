"""What is streamed is what was trained; denoising only reads; a dream is a pure function; memory is constant."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SIZES, dreamt, tiny_model
from torch import Tensor
from toys import box_spec

from world_model.episodes import Episodes
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import DraftPrediction, WorldModel
from world_model.noise import normal
from world_model.ops.layout import Layout
from world_model.state import LatentState
from world_model.training.config import FitConfig
from world_model.training.fit import fit

TIGHT: dict[str, Any] = {"rtol": 0, "atol": 1e-10}
PATTERNS = st.text("SDG", min_size=1, max_size=4)


def evidence(model: WorldModel, batch: int, frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """obs [B,T,O] and the actions that led there [B,T,A], within the bounds, in the model's dtype."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(batch, frames, model.config.obs_dim, generator=g).to(model.draft_error)
    return obs, (4 * torch.rand(batch, frames, model.config.action_dim, generator=g) - 2).to(model.draft_error)


def memory_of(state: LatentState) -> dict[str, Tensor]:
    return {name: t for name, t in state.tensors.items() if name not in ("seed", "age", "obs", "before")}


def assert_same(a: LatentState, b: LatentState, **tolerance: Any) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, t in a.tensors.items():
        assert torch.allclose(t, b[name], **tolerance), f"{name} differs by {(t - b[name]).abs().max()}"


def denoise(model: WorldModel, state: LatentState, z: Tensor, s: float, play: Tensor) -> tuple[Tensor, Tensor]:
    """z [B,K,O] and scaled actions [B,K,A] onto a memory -> residual [B,K,O], features [B,K,P*D]."""
    before = model.scaling.obs(state["before"]) if "before" in state.tensors else None
    predict_draft = DraftPrediction(
        *(x[:, None] for x in model.predict_draft(model.scaling.obs(state["obs"]), play, before))
    )
    level = torch.full((1, 1, 1, 1), s, dtype=z.dtype)
    layout = Layout(0, (0,), z.shape[1])
    residual, features, _ = model.refine(
        layout, z[:, None], level, predict_draft, play[:, None], memory=memory_of(state), age=state["age"]
    )
    return residual[:, 0], features[:, 0]


@given(
    pattern=PATTERNS,
    tokens=st.integers(1, 3),
    window=st.integers(1, 6),
    dilation=st.integers(1, 3),
    taps=st.integers(1, 3),
    k=st.integers(1, 4),
    spare=st.integers(0, 2),
    history=st.integers(1, 20),
    starts=st.sets(st.integers(1, 20), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, 20), max_size=4),
    batch=st.integers(1, 3),
    s=st.floats(0.01, 1),
    draft=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_streamed_is_trained(
    pattern: str, tokens: int, window: int, dilation: int, taps: int, k: int, spare: int, history: int,
    starts: set[int], cuts: set[int], batch: int, s: float, draft: int, seed: int,
) -> None:  # fmt: skip
    model = tiny_model(
        pattern,
        tokens=tokens,
        window=window,
        dilation=dilation,
        taps=taps,
        chunk=k + spare,
        draft=draft > 0,
        draft_frames=max(draft, 1),
        seed=seed,
        dtype=torch.float64,
    )
    obs, act = evidence(model, batch, max(history, *starts) + k, seed)
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, len(starts), k, 3, generator=g, dtype=torch.float64)
    # The training form: all frames of the history and all noisy chunks in one pass.
    begins = sorted(starts)
    frames = max(history, *starts)
    scaled, scaled_act = model.scaling.obs(obs), model.scaling.action(act)
    play = torch.stack([scaled_act[:, t : t + k] for t in begins], 1)
    start, before = (torch.stack([scaled[:, max(t - n, 0)] for t in begins], 1) for n in (1, 2))
    predict_draft = model.predict_draft(start, play, before)
    first = (torch.arange(frames) == 0).expand(batch, -1)
    clean = (scaled[:, :frames], scaled_act[:, :frames], first)
    level = torch.full((1, 1, 1, 1), s, dtype=torch.float64)
    trained, features, memory = model.refine(Layout(frames, tuple(begins), k), z, level, predict_draft, play, clean)
    # Streamed: the evidence cut anywhere, and before each chunk's start one denoising pass that reads the memory.
    state = model.initial(batch)
    for t, after in itertools.pairwise(sorted({0, frames, *starts, *(cut for cut in cuts if cut < frames)})):
        state = model.observe(state, obs[:, t:after], act[:, t:after])
        if after in starts:
            c = begins.index(after)
            residual, hidden = denoise(model, state, z[:, c], s, play[:, c])
            torch.testing.assert_close(residual, trained[:, c], **TIGHT)
            torch.testing.assert_close(hidden, features[:, c], **TIGHT)
    assert (state["age"] == frames).all()
    assert_same(LatentState(memory_of(state)), LatentState(memory), **TIGHT)


@given(
    pattern=PATTERNS,
    tokens=st.integers(1, 3),
    k=st.integers(1, 4),
    history=st.integers(1, 12),
    sampled=st.booleans(),
    steps=st.integers(1, 3),
    frames=st.integers(1, 2),
)
@settings(max_examples=25)
def test_imagine_by_hand(
    pattern: str, tokens: int, k: int, history: int, sampled: bool, steps: int, frames: int
) -> None:
    model = tiny_model(pattern, tokens=tokens, draft_frames=frames, dtype=torch.float64)
    obs, act = evidence(model, 2, history + k)
    state = model.observe(model.initial(2, torch.tensor([5, -6])), obs[:, :history], act[:, :history])
    after, imagined = model.imagine(state, act[:, history:], sampled=sampled, flow_steps=steps)

    start, play = model.scaling.obs(obs[:, history - 1]), model.scaling.action(act[:, history:])
    z = torch.zeros(2, k, 3, dtype=torch.float64)
    for i in range(k if sampled else 0):  # keyed by the dream's own seed and the absolute step, not by the chunk
        z[:, i] = normal(torch.tensor([5, -6]), torch.full((2,), history + i), 3, dtype=z.dtype)
    c = k**0.5
    levels = [c * s / (1 + (c - 1) * s) for s in np.linspace(1, 0, steps + 1)]
    for s, below in itertools.pairwise(levels):
        clean, features = denoise(model, state, z, s, play)
        z = clean + (z - clean) * below / s
    predict_draft = model.predict_draft(start, play, model.scaling.obs(obs[:, max(history - 2, 0)]))
    scaled = predict_draft.mean + predict_draft.scale * z
    torch.testing.assert_close(dreamt(imagined), model.scaling.raw_obs(scaled), **TIGHT)
    reward_head = model.predict_reward(torch.cat([start[:, None], scaled[:, :-1]], 1), play, scaled, features)
    reward = reward_head[..., 0] * model.scaling.reward_std + model.scaling.reward_mean
    torch.testing.assert_close(imagined.reward, reward, **TIGHT)
    assert torch.equal(imagined.terminated, reward_head[..., 1] > 0)
    assert_same(after, model.observe(state, dreamt(imagined), act[:, history:]), **TIGHT)


def test_a_dream_stays_within_the_bounds() -> None:
    """Where an observation's bound is met is also where the next step begins."""
    model = tiny_model(dtype=torch.float64)
    obs, act = evidence(model, 4, 9)
    state = model.observe(model.initial(4), obs[:, :5], act[:, :5])
    free = dreamt(model.imagine(state, act[:, 5:])[1])
    model.scaling.obs_high[0] = bound = free[..., 0].median()
    after, imagined = model.imagine(state, act[:, 5:])
    assert (free[..., 0] > bound + 1e-3).any() and (dreamt(imagined)[..., 0] <= bound + 1e-9).all()
    assert_same(after, model.observe(state, dreamt(imagined), act[:, 5:]), **TIGHT)


@given(pattern=PATTERNS, tokens=st.integers(1, 2), ages=st.lists(st.integers(1, 9), min_size=2, max_size=4))
@settings(max_examples=15)
def test_dreams_of_different_ages_share_a_batch(pattern: str, tokens: int, ages: list[int]) -> None:
    model = tiny_model(pattern, tokens=tokens, dtype=torch.float64)
    batch_of_one = []
    for row, age in enumerate(ages):
        obs, act = evidence(model, 1, age, seed=row)
        batch_of_one.append(model.observe(model.initial(1, torch.tensor([row])), obs, act))
    together = LatentState(
        {name: torch.cat([state[name] for state in batch_of_one]) for name in batch_of_one[0].tensors}
    )
    _, actions = evidence(model, len(ages), 3)
    after, imagined = model.imagine(together, actions, sampled=True)
    for row, state in enumerate(batch_of_one):
        own_after, own = model.imagine(state, actions[row : row + 1], sampled=True)
        torch.testing.assert_close(dreamt(imagined)[row], dreamt(own)[0], **TIGHT)
        assert_same(after.select(torch.tensor([row])), own_after, **TIGHT)


def test_the_action_before_the_first_frame_is_ignored() -> None:
    model = tiny_model(dtype=torch.float64)
    obs, act = evidence(model, 2, 4)
    other = act.clone()
    other[:, 0] = 1.5
    state = model.observe(model.initial(2), obs, act)
    assert_same(model.observe(model.initial(2), obs, other), state, **TIGHT)
    piecewise = model.observe(model.observe(model.initial(2), obs[:, :1]), obs[:, 1:], act[:, 1:])
    assert_same(piecewise, state, **TIGHT)
    other[:, 1] = 1.5
    assert not torch.allclose(model.observe(model.initial(2), obs, other)["1.k"], state["1.k"])


# -- denoising reads memory; only the clean chunk writes it ------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["S", "D", "G", "SDGG"])
def test_denoising_only_reads(pattern: str) -> None:
    model = tiny_model(pattern)
    obs, act = evidence(model, 3, 10)
    state = model.observe(model.initial(3), obs[:, :6], act[:, :6])
    before = {name: t.clone() for name, t in state.tensors.items()}
    for sampled, flow_steps, decode in itertools.product((False, True), (1, 4), (True, False)):
        after, imagined = model.imagine(state, act[:, 6:], sampled=sampled, flow_steps=flow_steps)
        for name, t in before.items():
            assert torch.equal(state[name], t), f"imagine changed {name} of the state that it was given"
        # The dream's own clean observations, shown to the old state as evidence, write all there is to write.
        assert_same(after, model.observe(state, dreamt(imagined), act[:, 6:]), rtol=1e-5, atol=1e-5)
        again, undecoded = model.imagine(state, act[:, 6:], sampled=sampled, flow_steps=flow_steps, decode=decode)
        assert_same(again, after, rtol=0, atol=0)
        assert torch.equal(undecoded.reward, imagined.reward) and torch.equal(undecoded.terminated, imagined.terminated)
        assert (undecoded.obs is None) == (not decode)


def test_noise_never_reaches_the_memory_in_training() -> None:
    model = tiny_model()
    obs, act = evidence(model, 2, 9)
    scaled, play = model.scaling.obs(obs), model.scaling.action(act)
    clean = (scaled, play, torch.zeros(2, 9, dtype=torch.bool))
    chunks = play.unflatten(1, (3, 3))
    predict_draft = model.predict_draft(scaled[:, [0, 3, 6]], chunks)
    layout, level = Layout(9, (1, 4, 7), 3), torch.ones(1, 1, 1, 1)
    noises = torch.zeros(2, 3, 3, 3), torch.full((2, 3, 3, 3), 50.0)
    quiet, loud = (model.refine(layout, z, level, predict_draft, chunks, clean) for z in noises)
    assert not torch.allclose(quiet[0], loud[0])
    assert all(torch.equal(t, loud[2][name]) for name, t in quiet[2].items())


def test_a_state_shares_no_tensor_with_its_caller() -> None:
    """Keeping a reference is a snapshot, also where the caller reuses the buffers that went in or came out."""
    model = tiny_model()
    seeds, (obs, act) = torch.tensor([3, 4]), evidence(model, 2, 1)
    fresh = model.initial(2, seeds)
    seen = model.observe(fresh, obs, act)
    after, imagined = model.imagine(seen, act)
    blobs = [state.to_bytes() for state in (fresh, seen, after)]
    for buffer in (seeds, obs, act, dreamt(imagined), imagined.reward):
        buffer.zero_()
    assert fresh.to_bytes() == blobs[0], "initial keeps the caller's seeds"
    assert seen.to_bytes() == blobs[1], "observe keeps the caller's observation"
    assert after.to_bytes() == blobs[2], "imagine hands out the state's own observation"


# -- a dream is a pure function of (weights, start, actions, seed) -----------------------------------------------------


def test_a_dream_is_the_same_wherever_it_runs() -> None:
    model = tiny_model("SDGG")
    batch, seeds = 6, torch.tensor([0, 1, 2**40, -5, 1, 9])
    obs, act = evidence(model, batch, 5)
    _, plan = evidence(model, batch, 12, seed=1)

    def dream(state: LatentState, plan: Tensor) -> tuple[LatentState, Tensor]:
        parts = []
        for chunk in plan.split(4, 1):
            state, imagined = model.imagine(state, chunk, sampled=True, flow_steps=4)
            parts.append(torch.cat([dreamt(imagined), imagined.reward[..., None]], -1))
        return state, torch.cat(parts, 1)

    start = model.observe(model.initial(batch, seeds), obs, act)
    _, whole = dream(start, plan)
    same: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    for b in range(batch):
        one = slice(b, b + 1)
        batch_of_one = model.observe(model.initial(1, seeds[one]), obs[one], act[one])
        torch.testing.assert_close(dream(batch_of_one, plan[one])[1], whole[one], **same)
    rows = torch.tensor([4, 0, 0, 5, 3])
    torch.testing.assert_close(dream(start.select(rows), plan[rows])[1], whole[rows], **same)
    torch.testing.assert_close(
        dream(start.expand(3), plan.repeat_interleave(3, 0))[1], whole.repeat_interleave(3, 0), **same
    )
    # Forked, saved and loaded half-way.
    halfway, first = dream(start, plan[:, :4])
    torch.testing.assert_close(first, whole[:, :4], **same)
    for moved in (
        halfway,
        LatentState.from_bytes(halfway.to_bytes()),
        halfway.expand(2).select(torch.arange(0, 12, 2)),
    ):
        torch.testing.assert_close(dream(moved, plan[:, 4:])[1], whole[:, 4:], **same)


def test_seeds_matter_to_sampled_dreams_alone() -> None:
    model = tiny_model()
    obs, act = (x.expand(3, -1, -1) for x in evidence(model, 1, 4))
    state = model.observe(model.initial(3, torch.tensor([7, 8, 7])), obs, act)
    sampled, mean = (model.imagine(state, act, sampled=on, flow_steps=4)[1] for on in (True, False))
    first, other, again = dreamt(sampled)
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other, atol=1e-2)
    torch.testing.assert_close(dreamt(mean)[0], dreamt(mean)[1])


def test_a_lost_dream_takes_no_other_with_it() -> None:
    model = tiny_model()
    obs, act = evidence(model, 3, 4)
    state = model.observe(model.initial(3), obs, act)
    lost = state.replace(obs=torch.where(torch.arange(3)[:, None] == 1, torch.nan, state["obs"]))
    for _ in range(2):
        state, good = model.imagine(state, act)
        lost, bad = model.imagine(lost, act)
        assert dreamt(bad)[1].isnan().all()
        torch.testing.assert_close(dreamt(bad)[[0, 2]], dreamt(good)[[0, 2]])


# -- constant memory ---------------------------------------------------------------------------------------------------


def held(state: LatentState) -> int:
    """The bytes that a state keeps alive, views or not."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.tensors.values()}.values())


def test_a_state_has_one_size_at_every_age() -> None:
    model = tiny_model("SDG")
    obs, act = evidence(model, 2, 300)
    fresh = model.initial(2)
    state = model.observe(fresh, obs[:, :1])
    for chunk in act[:, :200].split(4, 1):
        state, _ = model.imagine(state, chunk)
        assert state.nbytes == fresh.nbytes
        assert held(state) < 3 * fresh.nbytes
    long = model.observe(fresh, obs, act)
    assert long.nbytes == fresh.nbytes
    assert held(long) < 3 * fresh.nbytes, "a state keeps its whole history alive behind a view"


def resident() -> int:
    """Bytes of this process that lie in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


@on_linux
def test_long_evidence_leaves_nothing_behind() -> None:
    model = tiny_model("SDG")
    obs, act = evidence(model, 1, 1000)
    model.observe(model.initial(1), obs[:, :100], act[:, :100])
    before = resident()
    model.observe(model.initial(1), obs, act)
    assert resident() - before < 50 * 2**20, "a thousand frames are 20 kB, and their memory a few"


@pytest.mark.slow
@on_linux
def test_a_hundred_thousand_steps(tmp_path: Path) -> None:
    """10,000 chunks of 10 steps of a trained model: the same bytes, nothing left behind, every number finite."""
    rng = np.random.default_rng(0)
    data = []
    for _ in range(40):  # a damped spring that is pushed about
        x, actions = rng.normal(size=2), rng.uniform(-1, 1, (40, 1))
        obs = [x := np.array([[1, 0.2], [-0.2, 0.9]]) @ x + [0, 0.2 * u] for (u,) in [(0.0,), *actions]]
        data.append((np.array(obs), actions, -np.abs(obs)[1:, 0], np.zeros(40, bool)))
    config = WorldModelConfig(2, 1, chunk=10, **{**SIZES, "pattern": "SG", "heads": 1, "draft_width": 16})
    train = FitConfig(draft_steps=300, steps=100, frames=10, draft_ema=0.98, ema=0.98, lr=5e-3)
    model = fit(config, box_spec(2, 1, chunk=10), Episodes.stack(data), train, out=tmp_path, progress=False)
    state = model.observe(model.initial(1), torch.zeros(1, 1, 2))
    g = torch.Generator().manual_seed(0)
    sizes, residents = set(), []
    for number in range(10_000):
        state, imagined = model.imagine(state, 2 * torch.rand(1, 10, 1, generator=g) - 1)
        sizes.add(state.nbytes)
        if number % 1000 == 999:
            residents.append(resident())
            assert dreamt(imagined).abs().max() < 10 and imagined.reward.isfinite().all()
            assert all(t.isfinite().all() for t in state.tensors.values())
    assert state["age"].item() == 100_001
    assert len(sizes) == 1
    assert residents[-1] - residents[0] < 10 * 2**20, "9,000 chunks left something behind"
