"""Counter-based noise: a pure function of (seed, step), the same alone, in any row of a batch, or after a fork."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# splitmix64 (https://doi.org/10.1145/2660193.2660195), in signed 64-bit integers, whose products wrap as unsigned do.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's own copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def bits(seed: Tensor, step: Tensor) -> Tensor:
    """A random whole number from 0 to 2^63 - 1 for each (seed, step) pair, int64 [...] -> int64 [...]."""
    return _shift(_mix(_mix(_mix(seed) + step)), 1)


def normal(seed: Tensor, step: Tensor, size: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise, ``size`` numbers for each (seed, step) pair -> [..., size].

    seed, step: int64 of one shape [...]. Equal pairs give equal numbers, whatever the other pairs are. Each number
    comes from its own counter by splitmix64 and Box-Muller, so it doesn't depend on ``size`` either.
    """
    index = torch.arange(size, device=seed.device)
    key = _mix(_mix(_mix(seed) + step)[..., None] + index)
    radius = (_shift(key, 40).to(torch.float64) + 1) / 2**24  # (0, 1]: never log(0)
    angle = _shift(_mix(key), 40).to(torch.float64) / 2**24
    return ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).to(dtype)
