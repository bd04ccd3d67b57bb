"""The chunked delta rule is the slow recurrence, gradients too, and the memory forgets perturbations as it should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from world_model.delta import delta_chunked, delta_recurrent

NAMES = ("q", "k", "v", "log_alpha", "beta", "state")


def inputs(
    total: int,
    reads: int,
    *,
    seed: int = 0,
    spread: float = 1.0,
    forget: float = 0.1,
    write: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """B=2, H=2, d=5, e=3. Keys lie within about ``spread`` of one another; beta is about sigmoid(write)."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(2, 2, *shape, generator=g, dtype=dtype)

    k = F.normalize(randn(1, 5) + spread * randn(total, 5), dim=-1)
    beta = torch.sigmoid(write + randn(total))
    q, v, state = F.normalize(randn(reads, 5), dim=-1), randn(total, 3), randn(3, 5)
    log_alpha = -forget * randn(total).abs()
    for x in (q, k, v, log_alpha, beta, state):
        x.requires_grad_()
    return q, k, v, log_alpha, beta, state


@given(
    total=st.integers(0, 40),
    chunk=st.integers(1, 64),
    at=st.none() | st.lists(st.floats(0, 1), max_size=12),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([1e-3, 0.1, 3.0]),
    forget=st.sampled_from([0.0, 0.1, 20.0]),
    write=st.sampled_from([-3.0, 0.0, 15.0]),
)
@settings(max_examples=80)
def test_chunked_is_recurrent(
    total: int, chunk: int, at: list[float] | None, seed: int, spread: float, forget: float, write: float
) -> None:
    reads = None if at is None else [round(x * total) for x in at]  # unsorted, repeated, 0 and the end among them
    args = inputs(total, total if reads is None else len(reads), seed=seed, spread=spread, forget=forget, write=write)
    slow, fast = delta_recurrent(*args, at=reads), delta_chunked(*args, at=reads, chunk=chunk)
    g = torch.Generator().manual_seed(seed)
    loss_slow = loss_fast = torch.zeros((), dtype=torch.float64)
    for a, b in zip(slow, fast, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)
        weight = torch.randn(a.shape, generator=g, dtype=torch.float64)
        loss_slow, loss_fast = loss_slow + (a * weight).sum(), loss_fast + (b * weight).sum()
    grads = [torch.autograd.grad(loss, args, materialize_grads=True) for loss in (loss_slow, loss_fast)]
    for name, a, b in zip(NAMES, *grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8, msg=f"the gradient of {name} differs")


def test_recurrence_is_the_formula() -> None:
    """S_t = alpha S (I - beta k k^T) + beta v k^T, o = S q / sqrt(d), written with matrices."""
    q, k, v, log_alpha, beta, state = (x.detach() for x in inputs(4, 4))
    out, final = delta_recurrent(q, k, v, log_alpha, beta, state)
    for b in range(2):
        for h in range(2):
            s = state[b, h]
            for t in range(4):
                key, value = k[b, h, t, :, None], v[b, h, t, :, None]
                forget = torch.eye(5, dtype=torch.float64) - beta[b, h, t] * key @ key.mT
                s = log_alpha[b, h, t].exp() * s @ forget + beta[b, h, t] * value @ key.mT
                torch.testing.assert_close(out[b, h, t], s @ q[b, h, t] / 5**0.5)
            torch.testing.assert_close(final[b, h], s)


@pytest.mark.parametrize("forget", [0.0, 40.0], ids=["never forgets", "forgets at once"])
def test_float32_stays_finite_where_keys_are_the_same(forget: float) -> None:
    args = inputs(128, 128, spread=0.0, forget=forget, write=15.0, dtype=torch.float32)
    out, final = delta_chunked(*args, chunk=64)
    torch.testing.assert_close(out, delta_recurrent(*args)[0], rtol=1e-3, atol=1e-3)
    for x in (final, *torch.autograd.grad(out.sum() + final.sum(), args)):
        assert x.isfinite().all()


@given(total=st.integers(1, 30), seed=st.integers(0, 10**6), spread=st.sampled_from([1e-3, 0.1, 3.0]))
@settings(max_examples=40)
def test_a_perturbation_shrinks_by_the_product_of_alphas(total: int, seed: int, spread: float) -> None:
    q, k, v, log_alpha, beta, state = (x.detach() for x in inputs(total, 0, seed=seed, spread=spread))
    g = torch.Generator().manual_seed(seed)
    off = torch.randn(state.shape, generator=g, dtype=torch.float64)
    moved = [delta_chunked(q, k, v, log_alpha, beta, s, [])[1] for s in (state, state + off)]
    before, after = (torch.linalg.matrix_norm(x, ord=2) for x in (off, moved[1] - moved[0]))
    assert (after <= before * log_alpha.sum(-1).exp() + 1e-12).all()


def test_what_no_key_touches_shrinks_by_exactly_that() -> None:
    q, k, v, log_alpha, beta, state = (x.detach() for x in inputs(20, 0))
    k = F.normalize(k * torch.tensor([1.0, 1, 1, 1, 0]), dim=-1)
    off = torch.zeros_like(state)
    off[..., 4] = 1
    moved = [delta_chunked(q, k, v, log_alpha, beta, s, [])[1] for s in (state, state + off)]
    torch.testing.assert_close(moved[1] - moved[0], off * log_alpha.sum(-1).exp()[..., None, None])
