"""Linear layers with their norms, activations and residuals; on a CPU one pass of compiled code, gradients too."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from world_model.ops.dispatch import forbid_double_backward, single_thread_library

KINDS = ("plain", "norm", "silu", "gated")  # in dense.cpp's order


class Layer(NamedTuple):
    """One linear layer, y = f(x) W^T + b, with f by ``kind``.

    "plain": x; "norm": the layer norm of x; "silu": silu(x); "gated": value * silu(gate), for x = [value, gate].
    """

    kind: str
    linear: nn.Linear
    norm: nn.LayerNorm | None = None
    residual: bool = False  # whether to add the x of the layer before, which must have a norm


def chain(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Apply the layers one after another: x [...,I] -> [...,O]."""
    weights = (w for w in _weights(layers) if w is not None)
    if _fits(x, layers) and (library := single_thread_library("dense", x, *weights)):
        return _apply(library, x, layers)
    before = x
    for layer in layers:
        y = F.linear(_activate(x, layer), layer.linear.weight, layer.linear.bias)
        before, x = x, before + y if layer.residual else y
    return x


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x)): x [...,I] -> [...,O]."""
    return chain(x, [Layer("norm", linear, norm)])


def silu_linear(x: Tensor, linear: nn.Linear, *, extra: Tensor, base: Tensor) -> Tensor:
    """base + linear([extra, silu(x)]): x [...,E], extra [...,I-E], base [...,O] -> [...,O]."""
    rows, layers = x.shape[:-1], [Layer("silu", linear)]
    fits = base.shape == (*rows, linear.out_features) and extra.shape[:-1] == rows
    fits = fits and x.shape[-1] + extra.shape[-1] == linear.in_features and linear.bias is not None
    if fits and (library := single_thread_library("dense", x, extra, base, linear.weight, linear.bias)):
        return _apply(library, x, layers, extra, base)
    return base + linear(torch.cat([extra, F.silu(x)], -1))


def _fits(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether the sizes fit and the norms have torch's default form: compiled code checks neither."""
    size = x.shape[-1]
    for layer in layers:
        norm, linear = layer.norm, layer.linear
        if linear.bias is None or size != (2 if layer.kind == "gated" else 1) * linear.in_features:
            return False
        if norm is not None and (norm.eps != 1e-5 or norm.bias is None or norm.normalized_shape != (size,)):
            return False
        size = linear.out_features
    return True


def _activate(x: Tensor, layer: Layer) -> Tensor:
    match layer.kind:
        case "norm":
            assert layer.norm is not None
            return F.layer_norm(x, layer.norm.normalized_shape, layer.norm.weight, layer.norm.bias, layer.norm.eps)
        case "silu":
            return F.silu(x)
        case "gated":
            value, gate = x.chunk(2, -1)
            return value * F.silu(gate)
    return x


class _Call(ctypes.Structure):
    """The struct Dense of dense.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "ldx", "ldp")),
        *((name, ctypes.c_int32) for name in ("kind", "in_", "out", "beside_in")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "beside", "base", "gain", "shift", "weight", "bias", "y", "dy"),
                *("dx", "dbeside", "dgain", "dshift", "dweight", "dbias", "also"),
            )
        ),
    ]


def _apply(
    library: ctypes.CDLL,
    x: Tensor,
    layers: Sequence[Layer],
    extra: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """extra: concatenated in front of f(x). base: added to y."""
    rows = [None if t is None else _rows(t) for t in (x, extra, base)]
    weights = [None if w is None else w.contiguous() for w in _weights(layers)]
    y = _Dense.apply(*rows, _plan(layers), library, *weights)
    return y.view(*x.shape[:-1], y.shape[-1]) if x.ndim != 2 else y  # type: ignore[no-any-return]


def _plan(layers: Sequence[Layer]) -> tuple[tuple[int, bool], ...]:
    return tuple((KINDS.index(layer.kind), layer.residual) for layer in layers)


def _weights(layers: Sequence[Layer]) -> list[Tensor | None]:
    weights: list[Tensor | None] = []
    for layer in layers:
        weights += [None, None] if layer.norm is None else [layer.norm.weight, layer.norm.bias]
        weights += [layer.linear.weight, layer.linear.bias]
    return weights


def _rows(t: Tensor) -> Tensor:
    t = t.reshape(-1, t.shape[-1]) if t.ndim != 2 else t
    return t if t.stride(-1) == 1 else t.contiguous()


class PreallocatedMLP:
    """A ``chain`` with preallocated buffers, for a training loop; it writes gradients into the weights' ``grad``.

    It has at most one batch of ``rows`` in flight, and the weights and their ``grad`` must not be reallocated.
    """

    def __init__(self, library: ctypes.CDLL, layers: Sequence[Layer], rows: int):
        self._library = library
        sizes = [layers[0].linear.in_features, *(layer.linear.out_features for layer in layers)]
        self._xs, self._dys = ([torch.zeros(rows, size) for size in sizes] for _ in range(2))
        weights = _weights(layers)
        plan = _plan(layers)
        self._calls = _calls(plan, self._xs, None, weights)
        grads = [None if w is None else w.grad for w in weights]
        assert all(w is None or (g is not None and g.is_contiguous()) for w, g in zip(weights, grads, strict=True))
        _set_gradients(self._calls, plan, self._dys, grads, needs_dx=False)

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """x [rows,I], in parts side by side -> [rows,O], the leaf of a new autograd graph."""
        torch.cat(list(parts), -1, out=self._xs[0])
        self._library.dense_forward(self._calls, len(self._calls))
        self._out = self._xs[-1].detach().requires_grad_()
        return self._out

    def backward(self) -> None:
        """From ``forward``'s output, whose ``grad`` autograd has set, on to the weights."""
        if self._out.grad is None:  # the loss doesn't depend on it
            return
        self._dys[-1].copy_(self._out.grad)
        self._library.dense_backward(self._calls, len(self._calls))


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        extra: Tensor | None,
        base: Tensor | None,
        plan: tuple[tuple[int, bool], ...],
        library: ctypes.CDLL,
        *weights: Tensor | None,
    ) -> Tensor:
        base = None if base is None else base.contiguous()
        xs = [x]
        for out in weights[2::4]:
            assert out is not None
            xs.append(x.new_empty(len(x), len(out)))
        calls = _calls(plan, xs, extra, weights)
        if base is not None:
            calls[0].base = base.data_ptr()
        library.dense_forward(calls, len(calls))
        ctx.save_for_backward(extra, *xs[:-1], *weights)
        ctx.plan, ctx.library, ctx.has_base = plan, library, base is not None
        return xs[-1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        plan = ctx.plan
        extra, *tensors = ctx.saved_tensors
        xs, weights = tensors[: len(plan)], tensors[len(plan) :]
        calls = _calls(plan, xs, extra, weights)
        dys = [*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs), dy.contiguous()]
        needs_dweight, needs_dx = any(ctx.needs_input_grad[5:]), any(ctx.needs_input_grad[:2])
        grads = [w.new_empty(w.shape) if needs_dweight and w is not None else None for w in weights]
        dextra = None if extra is None else extra.new_empty(extra.shape)
        _set_gradients(calls, plan, dys, grads, needs_dx)
        if dextra is not None:
            calls[0].dbeside = dextra.data_ptr()
        ctx.library.dense_backward(calls, len(calls))
        return dys[0] if needs_dx else None, dextra, dys[-1] if ctx.has_base else None, None, None, *grads


def _calls(
    plan: tuple[tuple[int, bool], ...], xs: Sequence[Tensor], extra: Tensor | None, weights: Sequence[Tensor | None]
) -> Any:
    """The fields of the forward pass; ``_set_gradients`` adds those of the backward pass, which needs no last y."""
    calls = (_Call * len(plan))()
    for i, call in enumerate(calls):
        if i + 1 < len(xs):
            call.y = xs[i + 1].data_ptr()
        if plan[i][1]:
            call.base = xs[i - 1].data_ptr()
        norm_weight, norm_bias, weight, bias = weights[4 * i : 4 * i + 4]
        assert weight is not None and bias is not None
        x = xs[i]
        call.rows, call.ldx, call.kind = len(x), x.stride(0), plan[i][0]
        call.out, call.in_ = weight.shape
        call.x, call.weight, call.bias = x.data_ptr(), weight.data_ptr(), bias.data_ptr()
        if norm_weight is not None and norm_bias is not None:
            call.gain, call.shift = norm_weight.data_ptr(), norm_bias.data_ptr()
    if extra is not None:
        calls[0].ldp, calls[0].beside_in, calls[0].beside = extra.stride(0), extra.shape[1], extra.data_ptr()
    return calls


def _set_gradients(
    calls: Any,
    plan: tuple[tuple[int, bool], ...],
    dys: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs_dx: bool,
) -> None:
    """Add the fields of the backward pass. needs_dx: whether the gradient of the first x is needed."""
    for i, call in enumerate(calls):
        call.dy = dys[i + 1].data_ptr()
        if i or needs_dx:
            call.dx = dys[i].data_ptr()
        for name, grad in zip(("dgain", "dshift", "dweight", "dbias"), grads[4 * i : 4 * i + 4], strict=True):
            if grad is not None:
                setattr(call, name, grad.data_ptr())
        if plan[i][1]:
            calls[i - 1].also = dys[i + 1].data_ptr()
