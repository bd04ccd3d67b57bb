"""A whole G layer's mixing on a GPU without gradients: one kernel, in which each dream's each head is a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from world_model.ops.triton_primitives import answer, attended, dot, length, normed, rows, tokens

_BLOCK = 16  # tokens that are looked at at once


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    world, action, state, out_world, out_action, world_row, action_row, heads, frames, scale,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * C
    b, h, inner, total = row // heads, row % heads, heads * D, frames * (P + 1)
    i, e = tl.arange(0, C), tl.arange(0, BLOCK_D)
    in_e = (e < D)[None, :]
    world, action = world + b * frames * P * world_row + h * D, action + b * frames * action_row + h * D
    n = (first + i)[:, None]
    asked = n < total
    query = tokens(world, action, world_row, action_row, n, e[None, :], asked & in_e, P)
    size = length(query, 1)
    told = tl.zeros([C, BLOCK_D], tl.float32)
    for part in range(0, D, C):  # a large memory has no room on the chip
        d = part + i
        some = tokens(world, action, world_row, action_row, n, d[None, :], asked & (d < D)[None, :], P)
        here = state + row * D * D + e[None, :] * D + d[:, None]
        told += dot(some, tl.load(here, mask=(d < D)[:, None] & in_e, other=0.0))
    told = normed(told / size, in_e, D, 1)

    # The frames of a chunk see each other by plain attention; what lies before them only by the memory.
    query = query / size * scale
    best, mass, mixed = tl.full([C], -1e30, tl.float32), tl.zeros([C], tl.float32), tl.zeros([C, BLOCK_D], tl.float32)
    for start in range(0, total, C):
        m = (start + i)[:, None]
        key = tokens(world + inner, action + inner, world_row, action_row, m, e[None, :], (m < total) & in_e, P)
        value = tokens(
            world + 2 * inner, action + 2 * inner, world_row, action_row, m, e[None, :], (m < total) & in_e, P
        )
        score = tl.where((start + i < total)[None, :], dot(query, tl.trans(key / length(key, 1))), float("-inf"))
        best, mass, mixed = attended(score, value, best, mass, mixed)
    out_world, out_action = out_world + b * frames * P * inner + h * D, out_action + b * frames * inner + h * D
    answer(out_world, out_action, inner, n, e[None, :], asked & in_e, told + mixed / mass[:, None], P)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    world, action, gates_world, gates_action, log_rate, state, out_world, out_action, final,
    world_row, action_row, gates_world_row, gates_action_row, heads, frames,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ASK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h, inner = row // heads, row % heads, heads * D
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    here, inside = row * D * D + d[None, :] * D + d[:, None], in_d[:, None] & in_d[None, :]
    world, action = world + b * frames * P * world_row + h * D, action + b * frames * action_row + h * D
    gates_world, gates_action = (
        gates_world + b * frames * P * gates_world_row,
        gates_action + b * frames * gates_action_row,
    )
    out_world, out_action = out_world + b * frames * P * inner + h * D, out_action + b * frames * inner + h * D
    rate = tl.exp(tl.load(log_rate + h).to(tl.float32))
    memory = tl.load(state + here, mask=inside, other=0.0)  # [d,e]
    for n in range(frames * (P + 1)):
        forget = tokens(gates_world, gates_action, gates_world_row, gates_action_row, n, h, h < heads, P)
        beta_t = tokens(gates_world, gates_action, gates_world_row, gates_action_row, n, heads + h, h < heads, P)
        forget = tl.maximum(forget, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(forget)))  # softplus
        key = tokens(world + inner, action + inner, world_row, action_row, n, d, in_d, P)
        key = key / length(key, 0)
        value = tokens(world + 2 * inner, action + 2 * inner, world_row, action_row, n, d, in_d, P)
        memory = memory * tl.exp(-rate * forget)
        wrong = (value - tl.sum(memory * key[:, None], 0)) * tl.sigmoid(beta_t)
        memory = memory + key[:, None] * wrong[None, :]
        if ASK:
            query = tokens(world, action, world_row, action_row, n, d, in_d, P)
            told = tl.sum(memory * (query / length(query, 0))[:, None], 0)
            answer(out_world, out_action, inner, n, d, in_d, normed(told, in_d, D, 0), P)
    tl.store(final + here, memory, mask=inside)


def read_chunk(qkv_w: Tensor, qkv_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A noisy chunk reads the memory [B,H,d,d]: qkv [B,K,P,3*I], [B,K,1,3*I] -> answers [B,K,P,I], [B,K,1,I].

    As ``Block._delta`` of ``Layout(0, (0,), K)``.
    """
    (batch, frames, count, three), (_, heads, d, _) = qkv_w.shape, state.shape
    world, action = rows(qkv_w), rows(qkv_a)
    out_w, out_a = (x.new_empty(*x.shape[:3], three // 3) for x in (qkv_w, qkv_a))
    _read[(batch * heads, triton.cdiv(frames * (count + 1), _BLOCK))](
        world, action, state.float().contiguous(), out_w, out_a,
        world.stride(0), action.stride(0), heads, frames, d**0.5,
        P=count, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), C=_BLOCK, num_stages=1,
    )  # fmt: skip
    return out_w, out_a


def write_chunk(
    qkv_w: Tensor, qkv_a: Tensor, gate_w: Tensor, gate_a: Tensor, log_rate: Tensor, state: Tensor, ask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean frames are written, one token after the other -> answers [B,F,P,I], [B,F,1,I], the memory after [B,H,d,d].

    As ``Block._delta`` of ``Layout(F)``. gate [...,2*H], log_rate [H]. Where nobody asks, answers have no frames.
    """
    (batch, frames, count, three), (_, heads, d, _) = qkv_w.shape, state.shape
    world, action, gates_w, gates_a = (rows(x) for x in (qkv_w, qkv_a, gate_w, gate_a))
    out_w, out_a = (x.new_empty(batch, frames if ask else 0, x.shape[2], three // 3) for x in (qkv_w, qkv_a))
    state = state.float().contiguous()
    final, block = torch.empty_like(state), triton.next_power_of_2(d)
    _write[(batch * heads,)](
        world, action, gates_w, gates_a, log_rate, state, out_w, out_a, final,
        world.stride(0), action.stride(0), gates_w.stride(0), gates_a.stride(0), heads, frames,
        P=count, D=d, BLOCK_D=block, ASK=ask, num_warps=min(max(block**2 // 1024, 1), 16), num_stages=1,
    )  # fmt: skip
    return out_w, out_a, final
