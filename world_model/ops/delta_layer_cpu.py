"""A whole G layer's mixing in compiled code on a CPU, forward and backward."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from world_model.ops.delta_rule_cpu import detached_without_grad, reads_struct
from world_model.ops.dispatch import forbid_double_backward
from world_model.ops.layout import Streams


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
        inputs = (world, action, gates_world, gates_action, log_rate, state)
        (batch, heads, _, d), inner = state.shape, world.shape[-1] // 3
        reads = reads_struct(at, sizes[0] * (world.shape[2] + 1))
        mixed = [x.new_empty(*x.shape[:-1], inner) for x in (world, action)]
        final, out = torch.empty_like(state), state.new_empty(batch, heads, len(at), d)
        saved = None
        call = _mix(inputs, sizes)
        if any(ctx.needs_input_grad):
            saved = state.new_empty(batch, heads, reads.chunks, d, -(-d // 16) * 16)
            call.saved = saved.data_ptr()
        call.out_world, call.out_action, call.final, call.out = (x.data_ptr() for x in (*mixed, final, out))
        library.mix_forward(ctypes.byref(call), ctypes.byref(reads))
        ctx.save_for_backward(*inputs, out, saved, final)
        ctx.at, ctx.sizes, ctx.library = at, sizes, library
        return mixed[0], mixed[1], final

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        *inputs, out, saved, final = ctx.saved_tensors
        grad_outputs = tuple(x.contiguous() for x in grad_outputs)
        grads = [x.new_empty(x.shape) for x in inputs]
        call = _mix(inputs, ctx.sizes)
        call.out, call.saved, call.final = out.data_ptr(), saved.data_ptr(), final.data_ptr()
        call.dout_world, call.dout_action, call.dfinal = (x.data_ptr() for x in grad_outputs)
        names = ("dworld", "daction", "dgates_world", "dgates_action", "dlog_rate", "dstate")
        for name, grad in zip(names, grads, strict=True):
            setattr(call, name, grad.data_ptr())
        reads = reads_struct(ctx.at, ctx.sizes[0] * (inputs[0].shape[2] + 1))
        ctx.library.mix_backward(ctypes.byref(call), ctypes.byref(reads))
        return *grads, None, None, None


def delta_layer_cpu(
    library: ctypes.CDLL,
    qkv: Streams,
    gates: Streams,
    log_rate: Tensor,
    state: Tensor,
    at: Sequence[int],
    sizes: tuple[int, int, int],
) -> tuple[Streams, Tensor]:
    """As ``delta_layer_torch``, for at least one clean frame -> outputs [B,F,P,I], [B,F,1,I], the memory [B,H,d,d].

    sizes: clean frames, frames of a noisy chunk, and how many queries are left out first, whose outputs are zero. at:
    after how many keys each of the others reads.
    """
    inputs = detached_without_grad(*qkv, *gates, log_rate, state)
    world, action, final = _Mixing.apply(*inputs, tuple(at), sizes, library)
    return Streams(world, action), final


def _mix(inputs: Sequence[Tensor], sizes: tuple[int, int, int]) -> _Mix:
    world, action, gates_world, gates_action, log_rate, state = inputs
    batch, frames, tokens, _ = world.shape
    heads, d = state.shape[1], state.shape[-1]
    rows = [x.flatten(0, -2) for x in (world, action, gates_world, gates_action)]  # views: their rows are evenly spaced
    call = _Mix(batch, frames, tokens, heads, d, *sizes, *(x.stride(0) for x in rows))
    call.world, call.action, call.gates_world, call.gates_action = (x.data_ptr() for x in rows)
    call.log_rate, call.state = log_rate.data_ptr(), state.data_ptr()
    call.alive = rows  # the pointers refer to these
    return call
