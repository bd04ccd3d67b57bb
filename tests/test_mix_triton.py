"""The GPU's kernels of a layer's mixing, interpreted on the CPU, are the torch form of that layer in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
pytest.importorskip("triton", exc_type=ImportError)

from tiny import dreamt, tiny_model  # noqa: E402

from world_model.model.config import WorldModelConfig  # noqa: E402
from world_model.model.transformer import Block  # noqa: E402
from world_model.ops import delta_layer, delta_rule, window_layer  # noqa: E402
from world_model.ops.layout import Layout, Streams  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    """New memory is full of NaN, so that what is read before it was written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU torch has not all of them
    yield
    torch.use_deterministic_algorithms(False)


def force_triton(patch: pytest.MonkeyPatch) -> None:
    """Mix with the Triton kernels, on a CPU by interpretation, and never in torch."""
    for module in (delta_layer, window_layer, delta_rule):
        patch.setattr(module, "use_triton", lambda *_: True)
        patch.setattr(module, "single_thread_library", lambda *_: None, raising=False)
    for module in (delta_layer, window_layer):
        patch.delattr(module, f"{module.__name__.rpartition('.')[2]}_torch")


def layer(kind: str, last: bool, seed: int, **sizes: Any) -> Block:
    """A layer whose every weight is random."""
    torch.manual_seed(seed)
    block = Block(kind, WorldModelConfig(3, 2, pattern=kind, width=8, action_width=6, **sizes), last)
    for p in block.requires_grad_(False).parameters():
        p.add_(0.3 * torch.randn_like(p))
    return block.to(DEVICE)


def assert_as(
    block: Block, layout: Layout, ages: list[int], dtype: torch.dtype = torch.float32, tokens: int = 1
) -> None:
    """Of random tokens, splits of wider rows, onto a random memory."""
    parts = []
    for count, stream in ((tokens, block.world), (1, block.action)):
        wide = torch.randn(len(ages), layout.frames, count, sum(stream.sizes)).to(DEVICE, dtype)
        parts.append(wide.split(stream.sizes, -1))
    qkv, gates, _ = (Streams(*both) for both in zip(*parts, strict=True))
    empty = block.mixing.empty(len(ages), torch.ones(1, device=DEVICE))
    memory = {name: torch.randn_like(t) for name, t in empty.items()}
    age = torch.tensor(ages, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        for module in (delta_layer, window_layer):
            patch.setattr(module, "use_triton", lambda *_: False)
        exact: Any = copy.deepcopy(block.mixing).double()
        wide_memory = {name: t.double() for name, t in memory.items()}
        truth = exact(*(Streams(*(x.double() for x in part)) for part in (qkv, gates)), layout, wide_memory, age)
    with pytest.MonkeyPatch.context() as patch:
        force_triton(patch)
        ours = block.mixing(qkv, gates, layout, memory, age)
    truth, ours = (*truth[0], truth[1]), (*ours[0], ours[1])
    near = 2e-2 if dtype == torch.bfloat16 else 3e-5
    for a, b in zip(truth[:2], ours[:2], strict=True):
        assert b.dtype == dtype
        torch.testing.assert_close(b.double(), a[:, a.shape[1] - b.shape[1] :], rtol=near, atol=near)
        assert a.shape == b.shape
    for name, a in truth[2].items():
        assert ours[2][name].dtype == torch.float32
        torch.testing.assert_close(ours[2][name].double(), a, rtol=3e-5, atol=3e-5)
        assert layout.clean or ours[2][name] is memory[name]


@given(
    kind=st.sampled_from("SDG"),
    last=st.booleans(),
    clean=st.booleans(),
    frames=st.integers(1, 4),
    ages=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([2, 5, 16, 20]),
    window=st.integers(1, 8),
    dilation=st.integers(1, 3),
    taps=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=50, deadline=None)
def test_streamed_is_mixed(
    kind: str, last: bool, clean: bool, frames: int, ages: list[int], seed: int, dtype: torch.dtype, **sizes: int
) -> None:
    layout = Layout(frames) if clean else Layout(0, (0,), frames)
    assert_as(layer(kind, last, seed, **sizes), layout, ages, dtype, sizes["tokens"])


def test_windows_take_clean_frames_and_chunks_at_once() -> None:
    assert_as(layer("S", False, 0, head_dim=4, window=3), Layout(5, (1, 3), 2), [0, 2, 7])
    assert_as(layer("D", True, 1, head_dim=4, dilation=2, taps=2), Layout(3, (1,), 2), [0, 5])


def test_many_tokens() -> None:
    for kind in "SG":
        assert_as(layer(kind, False, 2, head_dim=4, tokens=7, window=2), Layout(9), [1], tokens=7)
        assert_as(layer(kind, False, 3, head_dim=4, tokens=7, window=2), Layout(0, (0,), 4), [3], tokens=7)


@pytest.mark.parametrize("pattern", ["SGDG", "GS"])
def test_a_dream_goes_through_them(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAIROS_KERNELS", "torch")
    model = tiny_model(pattern, tokens=2).to(DEVICE)

    def dream() -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        obs, actions = (torch.randn(2, 5, n, generator=g).clamp(-2, 2).to(DEVICE) for n in (3, 2))
        state = model.observe(model.initial(2), obs, actions)
        out = []
        for k in (4, 1, 3):
            state, imagined = model.imagine(state, actions[:, :k], flow_steps=2)
            out += [dreamt(imagined), imagined.reward]
        return [*out, *state.tensors.values()]

    slow = dream()
    force_triton(monkeypatch)
    for a, b in zip(slow, dream(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
