"""The gated delta rule in compiled code on a CPU, forward and backward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from world_model.ops.delta_rule_reads import reads_by_chunk
from world_model.ops.dispatch import forbid_double_backward

_CHUNK = 16  # as in delta.cpp


class _Shape(ctypes.Structure):
    """The struct Shape of delta.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "T", "R", "d", "e")),
        *((name, ctypes.c_int64 * 3) for name in ("q", "k", "v")),
        ("chunks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("order", "upto", "first")),
    ]


class _Tensors(ctypes.Structure):
    """The struct Tensors of delta.cpp."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("q", "k", "v", "log_alpha", "beta", "state", "out", "final", "saved", "dout", "dfinal"),
            *("dq", "dk", "dv", "dlog_alpha", "dbeta", "dstate"),
        )
    ]


@lru_cache(maxsize=256)
def _reads(at: tuple[int, ...], total: int) -> tuple[Any, Any, Any]:
    """``reads_by_chunk`` as C arrays."""
    reads = reads_by_chunk(at, -(-total // _CHUNK), _CHUNK)
    return tuple((ctypes.c_int32 * max(len(x), 1))(*x) for x in reads)  # type: ignore[return-value]


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
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        q, k, v, log_alpha, beta, state, out, saved = ctx.saved_tensors
        shape = _shape(q, k, v, ctx.at)
        dout, dfinal = (None if x is None else x.contiguous() for x in (dout, dfinal))
        grads = [x.new_empty(x.shape) for x in (q, k, v, log_alpha, beta, state)]
        names = ("dq", "dk", "dv", "dlog_alpha", "dbeta", "dstate")
        tensors = _pointers(q=q, k=k, v=v, log_alpha=log_alpha, beta=beta, state=state, out=out, saved=saved)
        for name, t in (("dout", dout), ("dfinal", dfinal), *zip(names, grads, strict=True)):
            setattr(tensors, name, None if t is None else t.data_ptr())
        ctx.library.delta_backward(ctypes.byref(shape), ctypes.byref(tensors), torch.get_num_threads())
        return *grads, None, None


def delta_rule_cpu(
    library: ctypes.CDLL,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    at: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """As ``delta_rule_chunked``, for float32 tensors on the CPU and at least one key."""
    inputs = detached_without_grad(q, k, v, log_alpha, beta, state)
    return _Delta.apply(*inputs, tuple(at), library)  # type: ignore[no-any-return]


def detached_without_grad(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detach the tensors if gradients are disabled: ``needs_input_grad`` of a Function is True even then."""
    return tensors if torch.is_grad_enabled() else tuple(t.detach() for t in tensors)


def reads_struct(at: tuple[int, ...], total: int) -> _Shape:
    """The C struct with only the read times filled in."""
    order, upto, first = _reads(at, total)
    shape = _Shape(chunks=len(first) - 1)
    shape.order, shape.upto, shape.first = map(ctypes.addressof, (order, upto, first))
    shape.alive = (order, upto, first)  # the pointers refer to these
    return shape


def _shape(q: Tensor, k: Tensor, v: Tensor, at: tuple[int, ...]) -> _Shape:
    (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
    shape, triple = reads_struct(at, total), ctypes.c_int64 * 3
    shape.B, shape.H, shape.T, shape.R, shape.d, shape.e = batch, heads, total, reads, d, e
    shape.q, shape.k, shape.v = (triple(*x.stride()[:3]) for x in (q, k, v))
    return shape


def _pointers(**tensors: Tensor) -> _Tensors:
    return _Tensors(**{name: t.data_ptr() for name, t in tensors.items()})
