"""The temporal mixing of an S or D layer: attention over a sliding or dilated window, by the fastest route."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from world_model.ops.dispatch import needs_grad, single_thread_library, use_triton
from world_model.ops.layout import Layout, Streams
from world_model.ops.window_attention import attend, visible
from world_model.ops.window_layer_cpu import window_layer_cpu

Buffers = dict[str, Tensor]  # "k" and "v" of the last frames, each [B,H,past*(P+1),d]


class Window(NamedTuple):
    """Which frames a query sees: those ``stride``, 2*stride, ..., ``past`` frames before it, and its own chunk."""

    stride: int
    past: int
    ahead: int  # inside a chunk a frame sees up to this many frames ahead


def window_layer(
    qkv: Streams,
    relative_bias: Tensor,
    window: Window,
    layout: Layout,
    buffers: Buffers | None,
    age: Tensor | None,
    *,
    last: bool,
) -> tuple[Streams, Buffers]:
    """Mix the layout's frames -> outputs [B,F,P,H*d] and [B,F,1,H*d], the buffers after the clean frames.

    qkv [...,3*H*d]; relative_bias [H,past+ahead+1]. buffers: None where there is no past. age: int64 [B], how many
    frames each row's buffers have seen. last: in the last layer the outputs of clean frames are left out.
    """
    heads, dim = relative_bias.shape[0], qkv.world.shape[-1] // 3 // relative_bias.shape[0]
    if buffers is None:
        if library := single_thread_library("attention", qkv.world):
            mixed = window_layer_cpu(library, qkv, *_bias(relative_bias, window, layout, qkv.group, 0, qkv.world, last))
            return mixed, _last_frames(qkv, layout, heads, window.past)
    elif _streams_on_gpu(qkv, relative_bias, buffers, (len(qkv.world), heads, window.past * qkv.group, dim)):
        from world_model.ops.window_layer_triton import attend_window

        assert age is not None
        bias, _ = _bias(relative_bias, window, layout, qkv.group, window.past, relative_bias, last)
        world, action, k, v = attend_window(*qkv, bias, buffers["k"], buffers["v"], age, layout.clean)
        return Streams(world, action), {"k": k, "v": v}
    return window_layer_torch(qkv, relative_bias, window, layout, buffers, age, last=last)


def window_layer_torch(
    qkv: Streams,
    relative_bias: Tensor,
    window: Window,
    layout: Layout,
    buffers: Buffers | None,
    age: Tensor | None,
    *,
    last: bool,
) -> tuple[Streams, Buffers]:
    """``window_layer`` in torch, the truth that the other routes are tested against."""
    q, k, v = qkv.split_heads(relative_bias.shape[0])
    group, past = qkv.group, 0 if buffers is None else window.past
    cut = layout.clean * group
    bias, skip = _bias(relative_bias, window, layout, group, past, q, last)
    if buffers is None:
        out = attend(q[:, :, skip:], k, v, bias)
        return Streams.of_heads(out, group), _filled(k[:, :, :cut], v[:, :, :cut], past=window.past * group)
    assert age is not None
    written = torch.arange(past, 0, -1, device=q.device) <= age[:, None]  # [B,past]
    written = F.pad(written.repeat_interleave(group, -1), (0, layout.frames * group), value=True)
    bias = bias + torch.where(written, 0.0, -torch.inf).to(q)[:, None, None]
    out = attend(q[:, :, skip:], k, v, bias, (buffers["k"], buffers["v"]))
    if cut:
        size = past * group
        new = (("k", k), ("v", v))
        buffers = {name: torch.cat([buffers[name][:, :, cut:], x[:, :, :cut][:, :, -size:]], 2) for name, x in new}
    return Streams.of_heads(out, group), buffers


def _bias(
    relative_bias: Tensor, window: Window, layout: Layout, group: int, past: int, like: Tensor, last: bool
) -> tuple[Tensor, int]:
    """What is added to the scores of the queries that count [H,R,N], and how many queries before them are left out.

    past: frames in the buffers.
    """
    select, mask = visible(layout, past, window.stride, window.past, group, window.ahead, like.device, like.dtype)
    skip = layout.clean * group if last else 0
    return ((relative_bias @ select).unflatten(-1, mask.shape) + mask)[:, skip:], skip


def _last_frames(qkv: Streams, layout: Layout, heads: int, past: int) -> Buffers:
    """The buffers after clean frames with nothing before them."""
    kept = Streams(*(x[:, : layout.clean][:, -past:] for x in qkv))
    _, k, v = kept.split_heads(heads)
    return _filled(k, v, past=past * qkv.group)


def _filled(k: Tensor, v: Tensor, *, past: int) -> Buffers:
    """Keys and values of clean frames with nothing before them, padded in front to ``past`` tokens, or cut to them."""
    return {name: F.pad(x, (0, 0, past, 0))[:, :, -past:] for name, x in (("k", k), ("v", v))}


def _streams_on_gpu(qkv: Streams, relative_bias: Tensor, buffers: Buffers, shape: tuple[int, ...]) -> bool:
    """Whether the Triton kernel applies: it passes no gradients. shape: of each buffer."""
    tensors = (*qkv, *buffers.values(), relative_bias)
    fits = all(t.shape == shape for t in buffers.values())
    return fits and shape[-1] <= 256 and not needs_grad(*tensors) and use_triton(*tensors)
