"""The temporal mixing of a G layer: tokens of both streams write and read one gated delta memory, by the fastest route.

Clean frames write the memory, token by token, and read it as it stands after each. The frames of a noisy chunk read
the memory as it stood before the chunk, never write it, and see each other by plain attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from world_model.ops.delta_layer_cpu import delta_layer_cpu
from world_model.ops.delta_rule import delta_rule
from world_model.ops.dispatch import needs_grad, single_thread_library, use_triton
from world_model.ops.layout import Layout, Streams
from world_model.ops.window_attention import attend


def delta_layer(
    qkv: Streams, gates: Streams, log_rate: Tensor, state: Tensor, layout: Layout, *, last: bool
) -> tuple[Streams, Tensor]:
    """Mix the layout's frames -> outputs [B,F,P,H*d] and [B,F,1,H*d], the memory after the clean frames [B,H,d,d].

    qkv [...,3*H*d]: queries, keys and values; gates [...,2*H]: decay, then write strength; log_rate [H]; state
    [B,H,d,d]. last: in the last layer nobody reads the outputs of clean frames, so they may be missing or zero.
    """
    heads, dim = log_rate.shape[0], qkv.world.shape[-1] // 3 // log_rate.shape[0]
    fits = state.shape == (len(qkv.world), heads, dim, dim)  # compiled code broadcasts nothing and checks no shape
    if fits and layout.clean and (library := single_thread_library("delta", qkv.world, state)):
        at, skip = read_times(layout, qkv.group, last)
        sizes = (layout.clean, layout.chunk, skip)
        return delta_layer_cpu(library, qkv, gates, log_rate, state, at, sizes)
    if fits and _streams_on_gpu(qkv, log_rate, state, layout, dim):
        from world_model.ops.delta_layer_triton import read_chunk, write_chunk

        if layout.noisy:
            return Streams(*read_chunk(*qkv, state)), state
        world, action, state = write_chunk(*qkv, *gates, log_rate, state, outputs=not last)
        return Streams(world, action), state
    return delta_layer_torch(qkv, gates, log_rate, state, layout, last=last)


def delta_layer_torch(
    qkv: Streams, gates: Streams, log_rate: Tensor, state: Tensor, layout: Layout, *, last: bool
) -> tuple[Streams, Tensor]:
    """``delta_layer`` in torch, the truth that the other routes are tested against."""
    q, k, v = qkv.split_heads(log_rate.shape[0])
    dim, cut = q.shape[-1], layout.clean * qkv.group
    q, k = F.normalize(torch.stack([q, k]), dim=-1)
    log_alpha, beta = _gate_values(gates.in_time()[:, :cut], log_rate)
    at, skip = read_times(layout, qkv.group, last)
    out, state = delta_rule(q[:, :, skip:], k[:, :, :cut], v[:, :, :cut], log_alpha, beta, state, at)
    out = F.layer_norm(out * dim**0.5, (dim,), eps=1e-2)
    if layout.noisy:
        chunks = len(layout.starts)
        qc, kc, vc = (x[:, :, cut:].unflatten(2, (chunks, -1)).transpose(1, 2).flatten(0, 1) for x in (q * dim, k, v))
        own = attend(qc, kc, vc, q.new_zeros(1, 1, 1)).unflatten(0, (-1, chunks)).transpose(1, 2).flatten(2, 3)
        clean = cut - skip
        out = torch.cat([out[:, :, :clean], out[:, :, clean:] + own], 2)
    return Streams.of_heads(out, qkv.group), state


def delta_layer_writes(qkv: Streams, gates: Streams, log_rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What clean frames write -> unit keys and values [B,H,N,d], log alpha and beta [B,H,N]."""
    _, k, v = qkv.split_heads(log_rate.shape[0])
    return F.normalize(k, dim=-1), v, *_gate_values(gates.in_time(), log_rate)


def read_times(layout: Layout, group: int, last: bool) -> tuple[list[int], int]:
    """After how many keys each query reads the memory, and how many queries before them are left out."""
    cut = layout.clean * group
    skip = cut if last else 0
    noisy = (start * group for start in layout.starts for _ in range(layout.chunk * group))
    return [*range(1 + skip, cut + 1), *noisy], skip


def _gate_values(gates: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
    """gates [B,N,2*H] -> log alpha and beta, each [B,H,N]."""
    decay, beta = gates.to(log_rate.dtype).unflatten(-1, (2, -1)).permute(2, 0, 3, 1)
    return -log_rate.exp()[:, None] * F.softplus(decay), torch.sigmoid(beta)


def _streams_on_gpu(qkv: Streams, log_rate: Tensor, state: Tensor, layout: Layout, dim: int) -> bool:
    """Whether the Triton kernels apply: they pass no gradients, and take clean frames or one chunk, not both."""
    tensors = (*qkv, state, log_rate)
    alone = len(layout.starts) + (layout.clean > 0) == 1
    return alone and dim <= 256 and not needs_grad(*tensors) and use_triton(*tensors)
