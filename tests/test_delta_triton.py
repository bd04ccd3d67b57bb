"""The GPU's streaming kernel, interpreted on the CPU, is the slow recurrence; on a GPU it is compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_delta import inputs

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined
pytest.importorskip("triton", exc_type=ImportError)

from world_model.delta import delta_recurrent  # noqa: E402
from world_model.delta_triton import delta_triton  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    """New memory is full of NaN, so that what is read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@given(
    total=st.integers(0, 20),
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
    truth = delta_recurrent(q, k, v, log_alpha, beta, state, reads)
    q, k, v, log_alpha, beta, state = (x.float().to(DEVICE) for x in args)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # a view
    for a, b in zip(truth, delta_triton(q, k, v, log_alpha, beta, state, reads), strict=True):
        torch.testing.assert_close(b.double().cpu(), a, rtol=1e-4, atol=1e-4)


def test_tokens_in_bfloat16_the_memory_in_float32() -> None:
    args = [x.detach() for x in inputs(10, 10, d=16, e=16)]
    q, k, v, log_alpha, beta, state = (x.to(DEVICE, torch.bfloat16) for x in args)
    out, final = delta_triton(q, k, v, log_alpha, beta, state.float(), range(1, 11))
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    q, k, v, log_alpha, beta, state = (x.double() for x in (q, k, v, log_alpha, beta, state))
    truth = delta_recurrent(q, k, v, log_alpha, beta, state)
    torch.testing.assert_close(final.double().cpu(), truth[1].cpu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double().cpu(), truth[0].cpu(), rtol=2e-2, atol=2e-2)
