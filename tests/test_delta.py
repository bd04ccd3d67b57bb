"""Every form of the delta rule is the slow recurrence, gradients too, and the memory forgets as it should."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from world_model.ops import native
from world_model.ops.delta_rule import delta_rule, delta_rule_chunked, delta_rule_recurrent

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
    d: int = 5,
    e: int = 3,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """B=2, H=2. Keys lie within about ``spread`` of one another; beta is about sigmoid(write)."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(2, 2, *shape, generator=g, dtype=dtype)

    k = F.normalize(randn(1, d) + spread * randn(total, d), dim=-1)
    beta = torch.sigmoid(write + randn(total))
    q, v, state = F.normalize(randn(reads, d), dim=-1), randn(total, e), randn(e, d)
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
    slow, fast = delta_rule_recurrent(*args, at=reads), delta_rule_chunked(*args, at=reads, chunk=chunk)
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
    out, final = delta_rule_recurrent(q, k, v, log_alpha, beta, state)
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
    out, final = delta_rule_chunked(*args, chunk=64)
    torch.testing.assert_close(out, delta_rule_recurrent(*args)[0], rtol=1e-3, atol=1e-3)
    for x in (final, *torch.autograd.grad(out.sum() + final.sum(), args)):
        assert x.isfinite().all()


@given(total=st.integers(1, 30), seed=st.integers(0, 10**6), spread=st.sampled_from([1e-3, 0.1, 3.0]))
@settings(max_examples=40)
def test_a_perturbation_shrinks_by_the_product_of_alphas(total: int, seed: int, spread: float) -> None:
    q, k, v, log_alpha, beta, state = (x.detach() for x in inputs(total, 0, seed=seed, spread=spread))
    g = torch.Generator().manual_seed(seed)
    off = torch.randn(state.shape, generator=g, dtype=torch.float64)
    moved = [delta_rule_chunked(q, k, v, log_alpha, beta, s, [])[1] for s in (state, state + off)]
    before, after = (torch.linalg.matrix_norm(x, ord=2) for x in (off, moved[1] - moved[0]))
    assert (after <= before * log_alpha.sum(-1).exp() + 1e-12).all()


def test_what_no_key_touches_shrinks_by_exactly_that() -> None:
    q, k, v, log_alpha, beta, state = (x.detach() for x in inputs(20, 0))
    k = F.normalize(k * torch.tensor([1.0, 1, 1, 1, 0]), dim=-1)
    off = torch.zeros_like(state)
    off[..., 4] = 1
    moved = [delta_rule_chunked(q, k, v, log_alpha, beta, s, [])[1] for s in (state, state + off)]
    torch.testing.assert_close(moved[1] - moved[0], off * log_alpha.sum(-1).exp()[..., None, None])


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_keys_may_forget_all(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs of decays of -1e4 and -infinity among mild ones, in float32: forward and all gradients."""
    monkeypatch.setenv("KAIROS_KERNELS", kernels)
    args = [x.detach() for x in inputs(40, 40, d=8, e=8)]
    args[3][..., ::7], args[3][..., 3::11] = -1e4, -torch.inf
    truth = everything(delta_rule_recurrent, args, None, 0)
    fast = everything(delta_rule, [x.float() for x in args], None, 0)
    for name, a, b in zip(("o", "S", *NAMES), truth, fast, strict=True):
        torch.testing.assert_close(b, a.nan_to_num(), rtol=1e-4, atol=1e-4, msg=f"{name} differs")


# --- the compiled form


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        native.library("delta")
    except native.KernelUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setenv("KAIROS_KERNELS", "native")


@pytest.fixture
def unwritten() -> Iterator[None]:
    """New memory is full of NaN, so that what is read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def everything(form: Any, args: Sequence[Tensor], reads: list[int] | None, seed: int) -> list[Tensor]:
    """Outputs, the final memory and all gradients of a loss that weighs every number differently, in float64."""
    args = [x.detach().requires_grad_() for x in args]
    out = form(*args, at=reads)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=g).to(x) for x in out]
    loss = sum((a * b).sum() for a, b in zip(out, weights, strict=True))
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, args, materialize_grads=True)
    return [x.detach().double() for x in (*out, *grads)]


@pytest.mark.usefixtures("compiled", "unwritten")
@given(
    total=st.integers(1, 70),
    at=st.none() | st.lists(st.floats(0, 1), max_size=40),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([1e-3, 0.1, 3.0]),
    forget=st.sampled_from([0.0, 0.1, 20.0]),
    write=st.sampled_from([-3.0, 0.0, 15.0]),
    d=st.sampled_from([2, 5, 16, 32, 40]),
    e=st.sampled_from([1, 3, 16, 33]),
)
@settings(max_examples=80, deadline=None)
def test_compiled_is_recurrent(
    total: int, at: list[float] | None, seed: int, spread: float, forget: float, write: float, d: int, e: int
) -> None:
    """About as near to the truth in float64 as the chunked torch form in float32 is."""
    reads = None if at is None else [round(x * total) for x in at]
    args = inputs(
        total, total if reads is None else len(reads), seed=seed, spread=spread, forget=forget, write=write, d=d, e=e
    )
    truth = everything(delta_rule_recurrent, args, reads, seed)
    single = [x.float() for x in args]
    torch_form, ours = everything(delta_rule_chunked, single, reads, seed), everything(delta_rule, single, reads, seed)
    for name, a, b, c in zip(("o", "final", *NAMES), truth, torch_form, ours, strict=True):
        if not a.numel():
            continue
        usual = (b - a).abs().max() + 3e-6 * a.abs().max().clamp_min(1.0)
        wrong = (c - a).abs().max()
        assert wrong <= 5 * usual, f"{name} is {wrong:.1e} off the truth, torch {usual:.1e}"


@pytest.mark.usefixtures("compiled", "unwritten")
@given(
    total=st.integers(1, 20),
    at=st.none() | st.lists(st.floats(0, 1), max_size=20),
    seed=st.integers(0, 10**6),
    write=st.sampled_from([-3.0, 0.0, 15.0]),
    d=st.sampled_from([2, 5, 16, 32, 40]),
    e=st.sampled_from([1, 3, 16, 33]),
)
@settings(max_examples=60, deadline=None)
def test_streamed_without_gradients_is_recurrent(
    total: int, at: list[float] | None, seed: int, write: float, d: int, e: int
) -> None:
    reads = None if at is None else [round(x * total) for x in at]
    args = inputs(total, total if reads is None else len(reads), seed=seed, write=write, d=d, e=e)
    q, k, v, log_alpha, beta, state = (x.float() for x in args)
    with torch.no_grad():
        ours = delta_rule(q, k, v, log_alpha, beta, state, reads)
        for a, b in zip(delta_rule_recurrent(*args, reads), ours, strict=True):
            torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiled")
def test_compiled_takes_views_and_more_threads() -> None:
    args = [x.float() for x in inputs(40, 40, d=16, e=16)]
    want = everything(delta_rule, args, None, 0)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3]]
    assert not views[0].is_contiguous()
    got = everything(delta_rule, [*views, *args[3:]], None, 0)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threaded = everything(delta_rule, args, None, 0)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(want, threaded, strict=True))


@pytest.mark.usefixtures("compiled")
def test_each_output_may_be_the_only_one_that_matters() -> None:
    forms: Any = (delta_rule_chunked, delta_rule)
    args = [x.float() for x in inputs(20, 20)]
    for which in (0, 1):
        slow, fast = (
            torch.autograd.grad(form(*xs)[which].sum(), xs, materialize_grads=True)
            for form, xs in ((f, [x.detach().requires_grad_() for x in args]) for f in forms)
        )
        for name, a, b in zip(NAMES, slow, fast, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=f"the gradient of {name} differs")


def test_doubles_go_through_torch() -> None:
    args = inputs(20, 20)
    for a, b in zip(delta_rule(*args), delta_rule_chunked(*args), strict=True):
        assert torch.equal(a, b)
