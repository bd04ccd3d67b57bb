"""Linear layers with what goes before and after them; on a CPU each is one pass of compiled code, gradients too."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from world_model.native import available

_PLAIN, _NORM, _SILU, _GATED = range(4)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x [...,I] -> [...,O]."""
    if library := _compiled(x, layer):
        return _apply(library, _PLAIN, x, layer)
    return F.linear(x, layer.weight, layer.bias)


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """The layer of the norm of x [...,I] -> [...,O]."""
    if library := _compiled(x, layer):
        return _apply(library, _NORM, x, layer, norm=norm)
    return F.linear(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps), layer.weight, layer.bias)


def silu_linear(x: Tensor, layer: nn.Linear, *, beside: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """base + the layer of [beside, silu(x)]: x [...,E], beside [...,I-E], base [...,O] -> [...,O]."""
    if library := _compiled(x, layer):
        return _apply(library, _SILU, x, layer, beside=beside, base=base)
    x = F.silu(x) if beside is None else torch.cat([beside, F.silu(x)], -1)
    y = F.linear(x, layer.weight, layer.bias)
    return y if base is None else base + y


def gated_linear(x: Tensor, layer: nn.Linear, *, base: Tensor) -> Tensor:
    """base + the layer of value * silu(gate), for x = [value, gate]: x [...,2I], base [...,O] -> [...,O]."""
    if library := _compiled(x, layer):
        return _apply(library, _GATED, x, layer, base=base)
    value, gate = x.chunk(2, -1)
    return base + F.linear(value * F.silu(gate), layer.weight, layer.bias)


def _compiled(x: Tensor, layer: nn.Linear) -> ctypes.CDLL | None:
    """One thread only: with more, torch shares a product out, and this doesn't."""
    fits = x.device.type == "cpu" and x.dtype == layer.weight.dtype == torch.float32 and torch.get_num_threads() == 1
    return available("dense") if fits else None


class _Call(ctypes.Structure):
    """The struct Dense of dense.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "ldx", "ldp")),
        *((name, ctypes.c_int32) for name in ("kind", "in_", "out", "beside_in")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "beside", "base", "gain", "shift", "weight", "bias", "y", "dy"),
                *("dx", "dbeside", "dgain", "dshift", "dweight", "dbias"),
            )
        ),
    ]


def _apply(
    library: ctypes.CDLL,
    kind: int,
    x: Tensor,
    layer: nn.Linear,
    *,
    beside: Tensor | None = None,
    base: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
) -> Tensor:
    gain, shift = (None, None) if norm is None else (norm.weight, norm.bias)
    rows = [None if t is None else _rows(t) for t in (x, beside, base)]
    y = _Dense.apply(*rows, gain, shift, layer.weight, layer.bias, kind, library)
    return y.view(*x.shape[:-1], y.shape[-1]) if x.ndim != 2 else y  # type: ignore[no-any-return]


def _rows(t: Tensor) -> Tensor:
    t = t.reshape(-1, t.shape[-1]) if t.ndim != 2 else t
    return t if t.stride(-1) == 1 else t.contiguous()


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beside: Tensor | None,
        base: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        kind: int,
        library: ctypes.CDLL,
    ) -> Tensor:
        base = None if base is None else base.contiguous()
        y = x.new_empty(len(x), len(weight))
        call = _call(kind, x=x, beside=beside, gain=gain, shift=shift, weight=weight, bias=bias, base=base, y=y)
        library.dense_forward(ctypes.byref(call))
        ctx.save_for_backward(x, beside, gain, shift, weight, bias)
        ctx.kind, ctx.library, ctx.based = kind, library, base is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, beside, gain, shift, weight, bias = ctx.saved_tensors
        dy = dy.contiguous()
        grads = [
            None if t is None or not (need or i) else torch.empty(t.shape)
            for i, (t, need) in enumerate(
                zip(
                    (x, beside, gain, shift, weight, bias),
                    (any(ctx.needs_input_grad[:4]), *[True] * 5),
                    strict=True,
                )
            )
        ]
        names = ("dx", "dbeside", "dgain", "dshift", "dweight", "dbias")
        call = _call(
            ctx.kind,
            x=x,
            beside=beside,
            gain=gain,
            shift=shift,
            weight=weight,
            bias=bias,
            dy=dy,
            **dict(zip(names, grads, strict=True)),
        )
        ctx.library.dense_backward(ctypes.byref(call))
        dx, dbeside, *weights = grads
        return dx, dbeside, dy if ctx.based else None, *weights, None, None


def _call(kind: int, **tensors: Tensor | None) -> _Call:
    x, beside, weight = tensors["x"], tensors["beside"], tensors["weight"]
    assert x is not None and weight is not None
    out, size = weight.shape
    call = _Call(len(x), x.stride(0), 0, kind, size, out, 0)
    if beside is not None:
        call.ldp, call.beside_in = beside.stride(0), beside.shape[1]
    for name, t in tensors.items():
        if t is not None:
            setattr(call, name, t.data_ptr())
    return call
