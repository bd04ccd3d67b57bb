"""The noise is a pure function of (seed, step): splitmix64 and Box-Muller, and it looks like noise."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from world_model.noise import bits, normal

INT64 = st.integers(-(2**63), 2**63 - 1)


def splitmix64(x: int) -> int:
    """The first output of a splitmix64 generator that is seeded with x, on Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def reference(seed: int, step: int, index: int) -> float:
    key = splitmix64(splitmix64(splitmix64(seed) + step) + index)
    radius, angle = ((key >> 40) + 1) / 2**24, (splitmix64(key) >> 40) / 2**24
    return math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * angle)


def test_reference_is_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0


@given(st.lists(st.tuples(INT64, INT64), min_size=1, max_size=5))
@settings(max_examples=50)
def test_bits_are_the_reference(pairs: list[tuple[int, int]]) -> None:
    seed, step = torch.tensor(pairs).T
    expected = [splitmix64(splitmix64(splitmix64(s) + t)) >> 1 for s, t in pairs]
    assert bits(seed, step).tolist() == expected


@given(st.lists(st.tuples(INT64, INT64), min_size=1, max_size=5), st.integers(1, 6))
@settings(max_examples=50)
def test_noise_is_the_reference(pairs: list[tuple[int, int]], size: int) -> None:
    seed, step = torch.tensor(pairs).T
    noise = normal(seed, step, size, dtype=torch.float64)
    expected = [[reference(s, t, i) for i in range(size)] for s, t in pairs]
    torch.testing.assert_close(noise, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_noise_depends_on_nothing_but_seed_step_and_place() -> None:
    seed = torch.arange(-3, 3)[:, None].expand(6, 5) * 10**17
    step = torch.arange(5).expand(6, 5) + 10**6
    noise = normal(seed, step, 7)
    assert noise.shape == (6, 5, 7) and noise.dtype == torch.float32
    torch.manual_seed(1)
    assert torch.equal(noise, normal(seed, step, 7)), "a global generator is in it"
    assert torch.equal(noise[4, 2:], normal(seed[4, 2:], step[4, 2:], 7))
    assert torch.equal(noise[..., :3], normal(seed, step, 3))


def test_noise_is_standard_normal_and_independent() -> None:
    seed, step = torch.meshgrid(torch.arange(60), torch.arange(60), indexing="ij")
    noise = normal(seed, step, 60, dtype=torch.float64)  # 216,000 numbers: a mean's own error is 0.002
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    quantiles = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    found = torch.special.ndtr(noise.flatten().quantile(quantiles))
    assert (found - quantiles).abs().max() < 0.006
    for dim, name in enumerate(("seed", "step", "place")):
        one, next_one = noise.narrow(dim, 0, 59), noise.narrow(dim, 1, 59)
        for a, b in ((one, next_one), (one.square() - 1, next_one.square() - 1)):
            assert abs((a * b).mean()) < 0.02, f"neighbours in {name} hang together"
    assert len(noise.unique()) > 0.99 * noise.numel()
