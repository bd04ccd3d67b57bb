"""The GPU's kernels, interpreted on the CPU, are the slow recurrence, gradients too; on a GPU they are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_delta import NAMES, everything, inputs
from torch import Tensor

GPU = torch.cuda.is_available()
pytest.importorskip("triton", exc_type=ImportError)

from world_model.ops.delta_rule import delta_rule, delta_rule_chunked, delta_rule_recurrent  # noqa: E402
from world_model.ops.delta_rule_triton import delta_rule_triton  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
FORM: Any = delta_rule_triton  # tensors may come as a list
TRUTH: Any = delta_rule_recurrent
DISPATCHED: Any = delta_rule


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    """New memory is full of NaN, so that what is read before it was written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU torch has not all of them
    yield
    torch.use_deterministic_algorithms(False)


@given(
    total=st.integers(0, 40),
    at=st.none() | st.lists(st.floats(0, 1), max_size=12),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([1e-3, 3.0]),
    write=st.sampled_from([-3.0, 0.0, 15.0]),
    d=st.sampled_from([2, 5, 16, 32]),
    e=st.sampled_from([1, 3, 32, 40]),
)
@settings(max_examples=25, deadline=None)
def test_streamed_is_recurrent(
    total: int, at: list[float] | None, seed: int, spread: float, write: float, d: int, e: int
) -> None:
    reads = list(range(1, total + 1)) if at is None else [round(x * total) for x in at]
    args = [x.detach() for x in inputs(total, len(reads), seed=seed, spread=spread, write=write, d=d, e=e)]
    q, k, v, log_alpha, beta, state = args
    truth = delta_rule_recurrent(q, k, v, log_alpha, beta, state, reads)
    q, k, v, log_alpha, beta, state = (x.float().to(DEVICE) for x in args)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # a view
    for a, b in zip(truth, delta_rule_triton(q, k, v, log_alpha, beta, state, reads), strict=True):
        torch.testing.assert_close(b.double().cpu(), a, rtol=1e-4, atol=1e-4)


def test_tokens_in_bfloat16_the_memory_in_float32() -> None:
    args = [x.detach() for x in inputs(10, 10, d=16, e=16)]
    q, k, v, log_alpha, beta, state = (x.to(DEVICE, torch.bfloat16) for x in args)
    out, final = delta_rule_triton(q, k, v, log_alpha, beta, state.float(), range(1, 11))
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    q, k, v, log_alpha, beta, state = (x.double() for x in (q, k, v, log_alpha, beta, state))
    truth = delta_rule_recurrent(q, k, v, log_alpha, beta, state)
    torch.testing.assert_close(final.double().cpu(), truth[1].cpu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double().cpu(), truth[0].cpu(), rtol=2e-2, atol=2e-2)


def test_with_no_keys_the_memory_is_no_copy() -> None:
    q, k, v, log_alpha, beta, state = (x.detach().float().to(DEVICE) for x in inputs(0, 3))
    out, final = delta_rule_triton(q, k, v, log_alpha, beta, state, [0, 0, 0])
    torch.testing.assert_close(out, delta_rule_recurrent(q, k, v, log_alpha, beta, state, [0, 0, 0])[0])
    assert final.data_ptr() == state.data_ptr()


# --- with gradients


def on_device(*args: Tensor) -> list[Tensor]:
    """In float32 and as views: heads lie between tokens, and there is more of everything than is meant."""
    q, k, v, *rest = (x.detach().float().to(DEVICE) for x in args)
    tokens = (torch.cat([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : x.shape[-1]] for x in (q, k, v))
    return [*tokens, *rest]


@given(
    total=st.integers(0, 50) | st.sampled_from([16, 17, 32, 48]),
    at=st.none() | st.lists(st.floats(0, 1), max_size=40),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([1e-3, 0.1, 3.0]),
    forget=st.sampled_from([0.0, 0.1, 20.0]),
    write=st.sampled_from([-3.0, 0.0, 15.0]),
    d=st.sampled_from([2, 5, 16, 33]),
    e=st.sampled_from([1, 3, 16, 40]),
)
@settings(max_examples=20, deadline=None)
def test_trained_is_recurrent(
    total: int, at: list[float] | None, seed: int, spread: float, forget: float, write: float, d: int, e: int
) -> None:
    """About as near to the truth in float64 as the chunked torch form in float32 is."""
    reads = list(range(1, total + 1)) if at is None else [round(x * total) for x in at]
    args = inputs(total, len(reads), seed=seed, spread=spread, forget=forget, write=write, d=d, e=e)
    truth = everything(delta_rule_recurrent, args, reads, seed)
    torch_form = everything(delta_rule_chunked, [x.float() for x in args], reads, seed)
    ours = everything(delta_rule_triton, on_device(*args), reads, seed)
    for name, a, b, c in zip(("o", "final", *NAMES), truth, torch_form, ours, strict=True):
        if not a.numel():
            continue
        usual = (b - a).abs().max() + 3e-6 * a.abs().max().clamp_min(1.0)
        wrong = (c.cpu() - a).abs().max()
        assert wrong <= 5 * usual, f"{name} is {wrong:.1e} off the truth, torch {usual:.1e}"


@pytest.mark.parametrize("which", [0, 1])
def test_each_output_may_be_the_only_one_that_matters(which: int) -> None:
    for kernel_choice in range(which, 6):  # the memory hangs on no query
        grads: list[Tensor] = []
        for form, args in ((TRUTH, inputs(18, 18)), (FORM, on_device(*inputs(18, 18)))):
            xs = [x.detach().requires_grad_(i == kernel_choice) for i, x in enumerate(args)]
            grads += torch.autograd.grad(form(*xs, at=range(1, 19))[which].sum(), xs[kernel_choice])
        a, b = grads
        torch.testing.assert_close(b.double().cpu(), a, rtol=1e-4, atol=1e-5)


def test_gradients_in_the_dtype_of_what_they_are_of() -> None:
    *tokens, state = (x.detach() for x in inputs(20, 20, d=16, e=16))
    half = [*(x.to(DEVICE, torch.bfloat16) for x in tokens), state.to(DEVICE, torch.float32)]
    ours = everything(delta_rule_triton, half, list(range(1, 21)), 0)
    truth = everything(delta_rule_recurrent, [x.double() for x in half], None, 0)
    for a, b in zip(truth, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)
    half = [x.requires_grad_() for x in half]
    out, final = FORM(*half, at=range(1, 21))
    grads = torch.autograd.grad(out.float().sum() + final.sum(), half)
    assert [x.dtype for x in grads] == [x.dtype for x in half]


def test_second_derivatives_are_refused() -> None:
    args = [x.requires_grad_() for x in on_device(*inputs(3, 3))]
    out, _ = FORM(*args, at=range(1, 4))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(out.sum(), args, create_graph=True)


def test_the_door_takes_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAIROS_KERNELS", "torch")  # not the compiled form of a CPU
    monkeypatch.setattr("world_model.ops.delta_rule.use_triton", lambda *_: True)
    out, _ = DISPATCHED(*(x.requires_grad_() for x in on_device(*inputs(20, 20))))
    assert "_Delta" in type(out.grad_fn).__name__
