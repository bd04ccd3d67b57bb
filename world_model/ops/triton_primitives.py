"""What the kernels of a GPU share: exact products, the tokens of two streams in the order of time, norms, a softmax."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def dot(a, b):  # type: ignore[no-untyped-def]
    """In full float32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tokens(world, action, world_row, action_row, n, column, inside, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a dream's tokens n the numbers at ``column``, in float32: a frame has P of the world's, then the action's.

    world and action point to the dream's first rows, which are world_row and action_row numbers apart; n, column and
    inside broadcast.
    """
    frame, place = n // (P + 1), n % (P + 1)
    x = tl.load(world + (frame * P + place) * world_row + column, mask=inside & (place < P), other=0.0)
    y = tl.load(action + frame * action_row + column, mask=inside & (place == P), other=0.0)
    return x.to(tl.float32) + y.to(tl.float32)


@triton.jit
def answer(world, action, row, n, column, inside, x, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write x where ``tokens`` would read it; the rows of both are ``row`` numbers apart."""
    frame, place = n // (P + 1), n % (P + 1)
    tl.store(world + (frame * P + place) * row + column, x, mask=inside & (place < P))
    tl.store(action + frame * row + column, x, mask=inside & (place == P))


@triton.jit
def length(x, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What ``F.normalize`` divides by, with the axis kept."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, AXIS, keep_dims=True)), 1e-12)


@triton.jit
def normed(x, inside, D: tl.constexpr, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The layer norm of a G layer's answers: x is 0 outside."""
    x = tl.where(inside, x - tl.sum(x, AXIS, keep_dims=True) / D, 0.0)
    return x / tl.sqrt(tl.sum(x * x, AXIS, keep_dims=True) / D + 1e-2)


@triton.jit
def attended(score, value, best, mass, mixed):  # type: ignore[no-untyped-def]
    """A softmax goes on to more keys: score [R,M], value [M,d] -> highest score, sum [R] and weighted values [R,d].

    It begins with a best of -1e30, which is finite: while a query has seen -inf alone, its sum stays 0.
    """
    higher = tl.maximum(best, tl.max(score, 1))
    weight, kept = tl.exp(score - higher[:, None]), tl.exp(best - higher)
    return higher, kept * mass + tl.sum(weight, 1), kept[:, None] * mixed + dot(weight, value)


def rows(x: Tensor) -> Tensor:
    """[...,N] -> [rows,N], a view where rows are evenly apart."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()
