"""Window attention without buffers in compiled code on a CPU, forward and backward."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from world_model.ops.dispatch import forbid_double_backward
from world_model.ops.layout import Streams


class _Call(ctypes.Structure):
    """The struct Attention of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "F", "P", "H", "d", "skip", "ldw", "lda")),
        ("scale", ctypes.c_float),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("world", "action", "bias", "out_world", "out_action", "dout_world", "dout_action"),
                *("dworld", "daction", "dbias"),
            )
        ),
    ]


def window_layer_cpu(library: ctypes.CDLL, qkv: Streams, bias: Tensor, skip: int) -> Streams:
    """As ``window_layer_torch``: qkv [B,F,P,3*I] and [B,F,1,3*I] -> outputs [B,F,P,I] and [B,F,1,I].

    bias [H,R,N]: for the queries of all N tokens but the first ``skip``, whose outputs are zero.
    """
    return Streams(*_Attend.apply(*qkv, bias, skip, library))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, world: Tensor, action: Tensor, bias: Tensor, skip: int, library: ctypes.CDLL
    ) -> tuple[Tensor, Tensor]:
        bias = bias.contiguous()
        out = [x.new_empty(*x.shape[:-1], x.shape[-1] // 3) for x in (world, action)]
        call = _call(world, action, bias, skip)
        call.out_world, call.out_action = (x.data_ptr() for x in out)
        library.attention_forward(ctypes.byref(call))
        ctx.save_for_backward(world, action, bias)
        ctx.skip, ctx.library = skip, library
        return out[0], out[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        world, action, bias = ctx.saved_tensors
        grad_outputs = tuple(x.contiguous() for x in grad_outputs)
        grads = [x.new_empty(x.shape) for x in (world, action, bias)]
        call = _call(world, action, bias, ctx.skip)
        call.dout_world, call.dout_action = (x.data_ptr() for x in grad_outputs)
        call.dworld, call.daction, call.dbias = (x.data_ptr() for x in grads)
        ctx.library.attention_backward(ctypes.byref(call))
        return *grads, None, None


def _call(world: Tensor, action: Tensor, bias: Tensor, skip: int) -> _Call:
    (batch, frames, tokens, width), heads = world.shape, bias.shape[0]
    world, action = world.flatten(0, -2), action.flatten(0, -2)  # views: the rows are evenly spaced
    dim = width // 3 // heads
    call = _Call(batch, frames, tokens, heads, dim, skip, world.stride(0), action.stride(0), dim**-0.5)
    call.world, call.action, call.bias = world.data_ptr(), action.data_ptr(), bias.data_ptr()
    call.alive = (world, action)  # the pointers refer to these
    return call
