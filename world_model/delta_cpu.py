"""The gated delta rule in compiled code, forward and backward: what ``delta.delta_chunked`` computes, on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 16  # as in delta.cpp


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "T", "R", "d", "e")),
        *((name, ctypes.c_int64 * 3) for name in ("q", "k", "v")),
        ("chunks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("order", "upto", "first")),
    ]


class _Tensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("q", "k", "v", "log_alpha", "beta", "state", "out", "final", "saved", "dout", "dfinal"),
            *("dq", "dk", "dv", "dlog_alpha", "dbeta", "dstate"),
        )
    ]


@lru_cache(maxsize=256)
def _reads(at: tuple[int, ...], total: int) -> tuple[Any, Any, Any]:
    """Reads by the chunk that they come after -> which [R], how many of its keys they see [R], first [chunks+1]."""
    chunks = -(-total // _CHUNK)
    of = [max(n - 1, 0) // _CHUNK for n in at]
    order = sorted(range(len(at)), key=of.__getitem__)
    upto = [at[r] - of[r] * _CHUNK for r in order]
    first = [sum(c < chunk for c in of) for chunk in range(chunks + 1)]
    return tuple((ctypes.c_int32 * max(len(x), 1))(*x) for x in (order, upto, first))  # type: ignore[return-value]


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_alpha: Tensor,
        beta: Tensor,
        state: Tensor,
        at: tuple[int, ...],
        library: ctypes.CDLL,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        log_alpha, beta, state = log_alpha.contiguous(), beta.contiguous(), state.contiguous()
        shape = _shape(q, k, v, at)
        out, final = q.new_empty(*q.shape[:3], v.shape[-1]), torch.empty_like(state)
        tensors = _pointers(q=q, k=k, v=v, log_alpha=log_alpha, beta=beta, state=state, out=out, final=final)
        saved = None
        if any(ctx.needs_input_grad):
            width = -(-v.shape[-1] // 16) * 16  # whole vectors, whatever the processor's
            saved = q.new_empty(*q.shape[:2], shape.chunks, q.shape[-1], width)
            tensors.saved = saved.data_ptr()
        library.delta_forward(ctypes.byref(shape), ctypes.byref(tensors), torch.get_num_threads())
        ctx.save_for_backward(q, k, v, log_alpha, beta, state, out, saved)
        ctx.at, ctx.library = at, library
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_alpha, beta, state, out, saved = ctx.saved_tensors
        shape = _shape(q, k, v, ctx.at)
        dout, dfinal = (None if x is None else x.contiguous() for x in (dout, dfinal))
        grads = [torch.empty(x.shape) for x in (q, k, v, log_alpha, beta, state)]
        names = ("dq", "dk", "dv", "dlog_alpha", "dbeta", "dstate")
        tensors = _pointers(q=q, k=k, v=v, log_alpha=log_alpha, beta=beta, state=state, out=out, saved=saved)
        for name, t in (("dout", dout), ("dfinal", dfinal), *zip(names, grads, strict=True)):
            setattr(tensors, name, None if t is None else t.data_ptr())
        ctx.library.delta_backward(ctypes.byref(shape), ctypes.byref(tensors), torch.get_num_threads())
        return *grads, None, None


def delta_cpu(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    at: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """As ``delta.delta_chunked``, of float32 tensors on the CPU and at least one key."""
    return _Delta.apply(q, k, v, log_alpha, beta, state, tuple(at), library)  # type: ignore[no-any-return]


def _shape(q: Tensor, k: Tensor, v: Tensor, at: tuple[int, ...]) -> _Shape:
    (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
    order, upto, first = _reads(at, total)
    triple = ctypes.c_int64 * 3
    strides = (triple(*x.stride()[:3]) for x in (q, k, v))
    shape = _Shape(batch, heads, total, reads, d, e, *strides, len(first) - 1)
    shape.order, shape.upto, shape.first = map(ctypes.addressof, (order, upto, first))
    shape.kept = (order, upto, first)  # the pointers are to these
    return shape


def _pointers(**tensors: Tensor) -> _Tensors:
    return _Tensors(**{name: t.data_ptr() for name, t in tensors.items()})
