"""What the Triton kernels share: products in full float32, tokens of two streams in time order, norms, a softmax."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def dot(a, b):  # type: ignore[no-untyped-def]
    """The matrix product in full float32, not TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_tokens(world, action, world_row, action_row, n, column, inside, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers at ``column`` of a dream's tokens n, in float32; a frame has P world tokens, then an action token.

    world and action point to the dream's first rows; world_row and action_row are the rows' strides. n, column and the
    mask ``inside`` broadcast.
    """
    frame, place = n // (P + 1), n % (P + 1)
    x = tl.load(world + (frame * P + place) * world_row + column, mask=inside & (place < P), other=0.0)
    y = tl.load(action + frame * action_row + column, mask=inside & (place == P), other=0.0)
    return x.to(tl.float32) + y.to(tl.float32)


@triton.jit
def store_tokens(world, action, row, n, column, inside, x, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write x where ``load_tokens`` would read it; ``row`` is the stride of both streams' rows."""
    frame, place = n // (P + 1), n % (P + 1)
    tl.store(world + (frame * P + place) * row + column, x, mask=inside & (place < P))
    tl.store(action + frame * row + column, x, mask=inside & (place == P))


@triton.jit
def norm(x, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The length that ``F.normalize`` divides by, at least 1e-12; the axis stays."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, AXIS, keep_dims=True)), 1e-12)


@triton.jit
def layer_norm(x, inside, D: tl.constexpr, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The layer norm of a G layer's outputs, which has no weights; x is 0 outside."""
    x = tl.where(inside, x - tl.sum(x, AXIS, keep_dims=True) / D, 0.0)
    return x / tl.sqrt(tl.sum(x * x, AXIS, keep_dims=True) / D + 1e-2)


@triton.jit
def update_softmax(score, value, highest, total, mixed):  # type: ignore[no-untyped-def]
    """Extend an online softmax (arXiv 1805.02867) by M keys, with score [R,M] and value [M,d].

    -> the highest score [R], the sum of weights [R] and the weighted sum of values [R,d]. Start with a highest score of
    -1e30, which is finite: then the sum stays 0 for a query that has only had scores of -inf.
    """
    new_highest = tl.maximum(highest, tl.max(score, 1))
    weight, rescale = tl.exp(score - new_highest[:, None]), tl.exp(highest - new_highest)
    return new_highest, rescale * total + tl.sum(weight, 1), rescale[:, None] * mixed + dot(weight, value)


def as_rows(x: Tensor) -> Tensor:
    """[...,N] -> [rows,N], a view where the rows are evenly spaced."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()
