"""Compiled layers and attention are the torch ones: outputs and gradients, of any size, from views too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from world_model.model.config import WorldModelConfig
from world_model.model.transformer import Block
from world_model.ops import native
from world_model.ops.layout import Layout, Streams
from world_model.ops.linear import Layer, chain, norm_linear, silu_linear
from world_model.ops.window_attention import attend
from world_model.ops.window_layer_cpu import window_layer_cpu

try:
    native.library("dense")
except native.KernelUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)

SIZES = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 64, 100])


@pytest.fixture(autouse=True)
def one_thread_and_nan_where_nothing_was_written() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def everything(form: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of all inputs and weights, in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = form(*inputs)
    gain = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [
        x.detach().double()
        for x in (out, *torch.autograd.grad((out * gain).sum(), [*inputs, *weights], materialize_grads=True))
    ]


def assert_near(ours: list[Tensor], torch_form: list[Tensor], truth: list[Tensor]) -> None:
    for i, (a, b, c) in enumerate(zip(ours, torch_form, truth, strict=True)):
        assert a.shape == c.shape
        usual = (b - c).abs().max() + 3e-6 * c.abs().max().clamp_min(1.0)
        wrong = (a - c).abs().max()
        assert wrong <= 5 * usual, f"number {i} is {wrong:.1e} off the truth, torch {usual:.1e}"


def assert_as(form: Callable[..., Tensor], module: nn.Module, inputs: list[Tensor]) -> None:
    """The compiled form is about as near to the truth in float64 as the torch form is."""
    learn: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    ours = everything(form, inputs, learn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAIROS_KERNELS", "torch")
        torch_form = everything(form, inputs, learn)
        module.double()
        truth = everything(form, [x.double() for x in inputs], learn)
    assert_near(ours, torch_form, truth)


def made(size: int, out: int) -> tuple[Any, Any]:
    norm, layer = nn.LayerNorm(size), nn.Linear(size, out)
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm, layer


@settings(max_examples=40, deadline=None)
@given(rows=st.sampled_from([1, 5, 48, 96, 97, 200]), size=SIZES, out=SIZES, extra=st.integers(1, 3))
def test_layers(rows: int, size: int, out: int, extra: int) -> None:
    torch.manual_seed(0)
    x, base = torch.randn(rows, size), torch.randn(rows, out)
    for kind, wide in (("plain", 1), ("silu", 1), ("gated", 2)):
        _, layer = made(size, out)
        assert_as(lambda x: chain(x, [Layer(kind, layer)]), layer, [torch.randn(rows, wide * size)])  # noqa: B023
    norm, layer = made(size, out)
    if size > 1:  # of one number a norm leaves nothing
        assert_as(lambda x: norm_linear(x, norm, layer), nn.ModuleList([norm, layer]), [x])
    if extra < size:
        _, layer = made(size, out)
        assert_as(
            lambda x, extra, base: silu_linear(x, layer, extra=extra, base=base),
            layer,
            [x[:, extra:], x[:, :extra], base],
        )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 48, 97]),
    sizes=st.tuples(SIZES, SIZES.filter(lambda n: n > 1), SIZES),
    frozen=st.booleans(),
)
def test_a_chain_with_residuals(rows: int, sizes: tuple[int, int, int], frozen: bool) -> None:
    torch.manual_seed(0)
    size, width, out = sizes
    in_proj, out_proj, norms = nn.Linear(size, width), nn.Linear(width, out), [nn.LayerNorm(width) for _ in range(2)]
    wide, narrow = ([nn.Linear(a * width, b * width) for _ in range(2)] for a, b in ((1, 2), (1, 1)))
    layers = [Layer("plain", in_proj)]
    for i in range(2):
        layers += [Layer("norm", wide[i], norms[i]), Layer("gated", narrow[i], residual=True)]
    layers += [Layer("silu", out_proj)]
    modules = nn.ModuleList([in_proj, out_proj, *norms, *wide, *narrow]).requires_grad_(not frozen)
    assert_as(lambda x: chain(x, layers), modules, [torch.randn(rows, size)])


def test_layers_take_any_leading_shape_and_slices() -> None:
    torch.manual_seed(0)
    norm, layer = made(6, 4)
    wide = torch.randn(2, 3, 5, 20)
    for x in (wide[..., 3:9], wide.transpose(1, 2)[..., 3:9], wide[0, 0, 0, :6]):
        assert_as(lambda x: norm_linear(x, norm, layer), nn.ModuleList([norm, layer]), [x])
        norm.float(), layer.float()


def test_what_compiled_code_does_not_take_goes_through_torch() -> None:
    torch.manual_seed(0)
    norm, layer = made(6, 4)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert_as(lambda x: norm_linear(x, norm, layer), nn.ModuleList([norm, layer]), [torch.randn(7, 6)])
    layer.float(), norm.float()
    norm.eps = 1.0
    x = torch.randn(7, 6)
    torch.testing.assert_close(norm_linear(x, norm, layer), layer(norm(x)))
    with pytest.raises(RuntimeError, match="shape"):
        chain(torch.randn(7, 5), [Layer("plain", layer)])
    with torch.autocast("cpu", torch.bfloat16):
        assert chain(x, [Layer("plain", layer)]).dtype == torch.bfloat16


def test_second_derivatives_are_refused() -> None:
    _, layer = made(3, 2)
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivatives: set KAIROS_KERNELS=torch"):
        torch.autograd.grad(chain(x, [Layer("silu", layer)]).sum(), x, create_graph=True)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    frames=st.integers(1, 9),
    tokens=st.integers(1, 2),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 5, 16, 32]),
    asked=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_attention(batch: int, frames: int, tokens: int, heads: int, dim: int, asked: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    inner, total = heads * dim, frames * (tokens + 1)
    skip = max(0, frames - asked) * (tokens + 1)
    # What Linear gives is wider than queries, keys and values: rows lie apart.
    world = torch.randn(batch, frames, tokens, 3 * inner + 7, generator=g)[..., : 3 * inner]
    action = torch.randn(batch, frames, 1, 3 * inner + 2, generator=g)[..., : 3 * inner]
    bias = torch.randn(heads, total, total, generator=g)
    unseen = torch.rand(total, total, generator=g) < 0.5
    bias = bias.masked_fill(unseen & ~torch.eye(total, dtype=torch.bool), -torch.inf)[:, skip:]

    def plainly(world: Tensor, action: Tensor, bias: Tensor) -> Tensor:
        both = torch.cat([world, action], 2).flatten(1, 2)
        q, k, v = both.unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
        out = attend(q[:, :, skip:], k, v, bias).transpose(1, 2).flatten(2)
        return torch.cat([out.new_zeros(batch, skip, inner), out], 1).unflatten(1, (frames, tokens + 1))

    def ours(world: Tensor, action: Tensor, bias: Tensor) -> Tensor:
        return torch.cat(window_layer_cpu(native.library("attention"), Streams(world, action), bias, skip), 2)

    compiled = everything(ours, [world, action, bias], [])
    truth = everything(plainly, [x.double() for x in (world, action, bias)], [])
    assert_near(compiled, everything(plainly, [world, action, bias], []), truth)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from("SDG"),
    last=st.booleans(),
    clean=st.integers(1, 20),
    chunks=st.integers(0, 4),
    chunk=st.integers(1, 3),
    tokens=st.integers(1, 2),
    heads=st.integers(1, 2),
    dim=st.sampled_from([2, 5, 16, 32]),
    remembers=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_blocks(
    kind: str,
    last: bool,
    clean: int,
    chunks: int,
    chunk: int,
    tokens: int,
    heads: int,
    dim: int,
    remembers: bool,
    seed: int,
) -> None:
    """A whole layer of the trunk: what it gives, what it remembers, and the gradients of everything."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(width=8, action_width=6, window=3, dilation=2, taps=2, chunk=3)
    block = Block(kind, WorldModelConfig(3, 2, tokens=tokens, heads=heads, head_dim=dim, **sizes), last)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    layout = Layout(clean, tuple(sorted(torch.randint(0, clean + 1, (chunks,)).tolist())), chunk)
    inputs = [torch.randn(2, layout.frames, tokens, 8), torch.randn(2, layout.frames, 1, 6)]
    if remembers:
        inputs += [torch.randn_like(t) for t in block.mixing.empty(2, inputs[0]).values()]

    def whole(world: Tensor, action: Tensor, *memory: Tensor) -> Tensor:
        names = dict(zip(block.mixing.names, memory, strict=True)) if remembers else None
        out = block(world, action, layout, names, torch.tensor([1, 40]) if remembers else None)
        return torch.cat([x.flatten() for x in (out[0], out[1], *out[2].values())])

    assert_as(whole, block, inputs)
