"""A whole G layer's mixing on a GPU, without gradients, in one kernel: a program for each head of each dream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from world_model.ops.triton_primitives import as_rows, dot, layer_norm, load_tokens, norm, store_tokens, update_softmax

_BLOCK = 16  # tokens in one tile


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    world, action, state, out_world, out_action, world_row, action_row, heads, frames, scale,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * C
    b, h, inner, count = row // heads, row % heads, heads * D, frames * (P + 1)
    i, e = tl.arange(0, C), tl.arange(0, BLOCK_D)
    in_e = (e < D)[None, :]
    world, action = world + b * frames * P * world_row + h * D, action + b * frames * action_row + h * D
    n = (first + i)[:, None]
    in_n = n < count
    query = load_tokens(world, action, world_row, action_row, n, e[None, :], in_n & in_e, P)
    length = norm(query, 1)
    out = tl.zeros([C, BLOCK_D], tl.float32)
    for start in range(0, D, C):  # in parts, since a large memory doesn't fit on the chip
        d = start + i
        part = load_tokens(world, action, world_row, action_row, n, d[None, :], in_n & (d < D)[None, :], P)
        memory = state + row * D * D + e[None, :] * D + d[:, None]
        out += dot(part, tl.load(memory, mask=(d < D)[:, None] & in_e, other=0.0))
    out = layer_norm(out / length, in_e, D, 1)

    # The frames of a chunk attend to each other; the memory holds what came before them.
    query = query / length * scale
    highest = tl.full([C], -1e30, tl.float32)
    total, mixed = tl.zeros([C], tl.float32), tl.zeros([C, BLOCK_D], tl.float32)
    for start in range(0, count, C):
        m = (start + i)[:, None]
        inside = (m < count) & in_e
        key = load_tokens(world + inner, action + inner, world_row, action_row, m, e[None, :], inside, P)
        value = load_tokens(world + 2 * inner, action + 2 * inner, world_row, action_row, m, e[None, :], inside, P)
        score = tl.where((start + i < count)[None, :], dot(query, tl.trans(key / norm(key, 1))), float("-inf"))
        highest, total, mixed = update_softmax(score, value, highest, total, mixed)
    out_world, out_action = out_world + b * frames * P * inner + h * D, out_action + b * frames * inner + h * D
    store_tokens(out_world, out_action, inner, n, e[None, :], in_n & in_e, out + mixed / total[:, None], P)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    world, action, gates_world, gates_action, log_rate, state, out_world, out_action, final,
    world_row, action_row, gates_world_row, gates_action_row, heads, frames,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h, inner = row // heads, row % heads, heads * D
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    offset, inside = row * D * D + d[None, :] * D + d[:, None], in_d[:, None] & in_d[None, :]
    world, action = world + b * frames * P * world_row + h * D, action + b * frames * action_row + h * D
    gates_world, gates_action = (
        gates_world + b * frames * P * gates_world_row,
        gates_action + b * frames * gates_action_row,
    )
    out_world, out_action = out_world + b * frames * P * inner + h * D, out_action + b * frames * inner + h * D
    rate = tl.exp(tl.load(log_rate + h).to(tl.float32))
    memory = tl.load(state + offset, mask=inside, other=0.0)  # [d,e]
    for n in range(frames * (P + 1)):
        decay = load_tokens(gates_world, gates_action, gates_world_row, gates_action_row, n, h, h < heads, P)
        beta = load_tokens(gates_world, gates_action, gates_world_row, gates_action_row, n, heads + h, h < heads, P)
        decay = tl.maximum(decay, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(decay)))  # softplus
        key = load_tokens(world + inner, action + inner, world_row, action_row, n, d, in_d, P)
        key = key / norm(key, 0)
        value = load_tokens(world + 2 * inner, action + 2 * inner, world_row, action_row, n, d, in_d, P)
        memory = memory * tl.exp(-rate * decay)
        delta = (value - tl.sum(memory * key[:, None], 0)) * tl.sigmoid(beta)
        memory = memory + key[:, None] * delta[None, :]
        if READ:
            query = load_tokens(world, action, world_row, action_row, n, d, in_d, P)
            out = tl.sum(memory * (query / norm(query, 0))[:, None], 0)
            store_tokens(out_world, out_action, inner, n, d, in_d, layer_norm(out, in_d, D, 0), P)
    tl.store(final + offset, memory, mask=inside)


def read_chunk(qkv_w: Tensor, qkv_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One noisy chunk: qkv [B,K,P,3*I] and [B,K,1,3*I], memory [B,H,d,d] -> outputs [B,K,P,I] and [B,K,1,I].

    As ``delta_layer_torch`` with ``Layout(0, (0,), K)``.
    """
    (batch, frames, count, width), (_, heads, d, _) = qkv_w.shape, state.shape
    world, action = as_rows(qkv_w), as_rows(qkv_a)
    out_w, out_a = (x.new_empty(*x.shape[:3], width // 3) for x in (qkv_w, qkv_a))
    _read[(batch * heads, triton.cdiv(frames * (count + 1), _BLOCK))](
        world, action, state.float().contiguous(), out_w, out_a,
        world.stride(0), action.stride(0), heads, frames, d**0.5,
        P=count, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), C=_BLOCK, num_stages=1,
    )  # fmt: skip
    return out_w, out_a


def write_chunk(
    qkv_w: Tensor, qkv_a: Tensor, gate_w: Tensor, gate_a: Tensor, log_rate: Tensor, state: Tensor, outputs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Write F clean frames, token by token -> outputs [B,F,P,I] and [B,F,1,I], the memory after them [B,H,d,d].

    As ``delta_layer_torch`` with ``Layout(F)``. gate [...,2*H], log_rate [H]. outputs: False leaves them out, which
    then have no frames.
    """
    (batch, frames, count, width), (_, heads, d, _) = qkv_w.shape, state.shape
    world, action, gates_w, gates_a = (as_rows(x) for x in (qkv_w, qkv_a, gate_w, gate_a))
    out_w, out_a = (x.new_empty(batch, frames if outputs else 0, x.shape[2], width // 3) for x in (qkv_w, qkv_a))
    state = state.float().contiguous()
    final, block = torch.empty_like(state), triton.next_power_of_2(d)
    _write[(batch * heads,)](
        world, action, gates_w, gates_a, log_rate, state, out_w, out_a, final,
        world.stride(0), action.stride(0), gates_w.stride(0), gates_a.stride(0), heads, frames,
        P=count, D=d, BLOCK_D=block, READ=outputs, num_warps=min(max(block**2 // 1024, 1), 16), num_stages=1,
    )  # fmt: skip
    return out_w, out_a, final
