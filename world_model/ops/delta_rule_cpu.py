"""The gated delta rule in compiled code, forward and backward: what ``delta.delta_chunked`` computes, on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from world_model.ops.delta_rule_reads import reads_by_chunk
from world_model.ops.native import forbid_double_backward

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
    """``reads_by_chunk`` as delta.cpp takes it."""
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
    inputs = _seen(q, k, v, log_alpha, beta, state)
    return _Delta.apply(*inputs, tuple(at), library)  # type: ignore[no-any-return]


class _Mix(ctypes.Structure):
    """The struct Mix of delta.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("B", "F", "P", "H", "d", "clean", "chunk", "skip", "ldw", "lda", "ldgw", "ldga")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("world", "action", "gates_world", "gates_action", "log_rate", "state"),
                *("out_world", "out_action", "final", "out", "saved", "dout_world", "dout_action", "dfinal"),
                *("dworld", "daction", "dgates_world", "dgates_action", "dlog_rate", "dstate"),
            )
        ),
    ]


class _Mixing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        world: Tensor,
        action: Tensor,
        gates_world: Tensor,
        gates_action: Tensor,
        log_rate: Tensor,
        state: Tensor,
        at: tuple[int, ...],
        sizes: tuple[int, int, int],
        library: ctypes.CDLL,
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_rate, state = log_rate.contiguous(), state.contiguous()
        given = (world, action, gates_world, gates_action, log_rate, state)
        (batch, heads, _, d), inner = state.shape, world.shape[-1] // 3
        reads = _shape_of(at, sizes[0] * (world.shape[2] + 1))
        mixed = [x.new_empty(*x.shape[:-1], inner) for x in (world, action)]
        final, out = torch.empty_like(state), state.new_empty(batch, heads, len(at), d)
        saved = None
        call = _mix(given, sizes)
        if any(ctx.needs_input_grad):
            saved = state.new_empty(batch, heads, reads.chunks, d, -(-d // 16) * 16)
            call.saved = saved.data_ptr()
        call.out_world, call.out_action, call.final, call.out = (x.data_ptr() for x in (*mixed, final, out))
        library.mix_forward(ctypes.byref(call), ctypes.byref(reads))
        ctx.save_for_backward(*given, out, saved, final)
        ctx.at, ctx.sizes, ctx.library = at, sizes, library
        return mixed[0], mixed[1], final

    @staticmethod
    def backward(ctx: Any, *gains: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        *given, out, saved, final = ctx.saved_tensors
        gains = tuple(x.contiguous() for x in gains)
        grads = [x.new_empty(x.shape) for x in given]
        call = _mix(given, ctx.sizes)
        call.out, call.saved, call.final = out.data_ptr(), saved.data_ptr(), final.data_ptr()
        call.dout_world, call.dout_action, call.dfinal = (x.data_ptr() for x in gains)
        names = ("dworld", "daction", "dgates_world", "dgates_action", "dlog_rate", "dstate")
        for name, grad in zip(names, grads, strict=True):
            setattr(call, name, grad.data_ptr())
        reads = _shape_of(ctx.at, ctx.sizes[0] * (given[0].shape[2] + 1))
        ctx.library.mix_backward(ctypes.byref(call), ctypes.byref(reads))
        return *grads, None, None, None


def mix(
    library: ctypes.CDLL,
    world: Tensor,
    action: Tensor,
    gates_world: Tensor,
    gates_action: Tensor,
    log_rate: Tensor,
    state: Tensor,
    at: Sequence[int],
    sizes: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """All of a G layer's mixing (mot.py's ``Block._delta``) -> answers [B,F,P,I], [B,F,1,I], the memory [B,H,d,d].

    world [B,F,P,3*I], action [B,F,1,3*I]: queries, keys and values. gates [...,2*H]. log_rate [H], state [B,H,d,d].
    at: of the tokens that ask, after how many keys. sizes: the clean frames, at least 1; the frames of a noisy chunk;
    and how many tokens ask nothing and get zeros.
    """
    inputs = _seen(world, action, gates_world, gates_action, log_rate, state)
    return _Mixing.apply(*inputs, tuple(at), sizes, library)  # type: ignore[no-any-return]


def _seen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autograd sees them: a Function is told that weights want gradients also where nobody records any."""
    return tensors if torch.is_grad_enabled() else tuple(t.detach() for t in tensors)


def _mix(given: Sequence[Tensor], sizes: tuple[int, int, int]) -> _Mix:
    world, action, gates_world, gates_action, log_rate, state = given
    batch, frames, tokens, _ = world.shape
    heads, d = state.shape[1], state.shape[-1]
    rows = [x.flatten(0, -2) for x in (world, action, gates_world, gates_action)]  # views: their rows are evenly apart
    call = _Mix(batch, frames, tokens, heads, d, *sizes, *(x.stride(0) for x in rows))
    call.world, call.action, call.gates_world, call.gates_action = (x.data_ptr() for x in rows)
    call.log_rate, call.state = log_rate.data_ptr(), state.data_ptr()
    call.kept = rows
    return call


def _shape_of(at: tuple[int, ...], total: int) -> _Shape:
    """Of the reads alone."""
    order, upto, first = _reads(at, total)
    shape = _Shape(chunks=len(first) - 1)
    shape.order, shape.upto, shape.first = map(ctypes.addressof, (order, upto, first))
    shape.kept = (order, upto, first)  # the pointers are to these
    return shape


def _shape(q: Tensor, k: Tensor, v: Tensor, at: tuple[int, ...]) -> _Shape:
    (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
    shape, triple = _shape_of(at, total), ctypes.c_int64 * 3
    shape.B, shape.H, shape.T, shape.R, shape.d, shape.e = batch, heads, total, reads, d, e
    shape.q, shape.k, shape.v = (triple(*x.stride()[:3]) for x in (q, k, v))
    return shape


def _pointers(**tensors: Tensor) -> _Tensors:
    return _Tensors(**{name: t.data_ptr() for name, t in tensors.items()})
