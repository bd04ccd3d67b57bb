"""Flow matching: the path from data to noise, its loss, the shape-aware shift and the Euler sampler.

z_s = (1-s) z_0 + s eps runs from the data (s=0) to noise (s=1) with velocity eps - z_0. The network here predicts z_0
itself (x-prediction); v = (z_s - z_0) / s turns one into the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

MIN_S = (
    0.25  # s is clamped to this in the velocity loss of an x-prediction, (x - z_0)^2 / s^2, whose weight would explode
)


def shift_factor(frames: int, tokens: int, m: float = 0.0, b: float = 0.0) -> float:
    """Kairos' shape-aware shift (arXiv 2606.16533): c = exp(m L + b) sqrt(F) for F frames of L tokens."""
    return math.exp(m * tokens + b) * math.sqrt(frames)


def shift(s: Tensor, c: float) -> Tensor:
    """s' = c s / (1 + (c-1) s), for s in [0,1]: larger chunks are more redundant and need more noise."""
    return c * s / (1 + (c - 1) * s)


def corrupt(clean: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    """The point z_s = (1-s) clean + s eps of the straight path; shapes [...] broadcast."""
    return (1 - s) * clean + s * eps


def velocity_loss(predicted: Tensor, clean: Tensor, s: Tensor) -> Tensor:
    """The squared velocity error of an x-prediction, elementwise: (v - (eps - z_0))^2 = (predicted - clean)^2 / s^2."""
    return (predicted - clean).square() / s.clamp_min(MIN_S).square()


def euler(denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, steps: int, c: float) -> Tensor:
    """Integrate from s=1 to s=0 in ``steps`` Euler steps on the shifted grid; z [B,...] is the point at s=1.

    denoise(z, s) -> predicted z_0, with s a scalar tensor. From zero one step gives the mean prediction.
    """
    grid = shift(torch.linspace(1, 0, steps + 1, device=z.device, dtype=z.dtype), c)
    for s, after in pairwise(grid):
        z = z + (after - s) * (z - denoise(z, s)) / s
    return z
