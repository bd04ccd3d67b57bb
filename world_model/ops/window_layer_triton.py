"""Window attention over remembered and own tokens on a GPU without gradients, which moves the buffers on too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from world_model.ops.triton_primitives import answer, attended, dot, rows, tokens

_BLOCK = 16  # queries that a program has, and keys that it looks at at once


@triton.jit
def _window(  # type: ignore[no-untyped-def]
    world, action, bias, old_k, old_v, age, out_world, out_action, new_k, new_v,
    world_row, action_row, bias_head, bias_query, heads, frames, past, asked, cut, scale,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, MOVE: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, inner, total, size = row // heads, row % heads, heads * D, frames * (P + 1), past * (P + 1)
    i, d = tl.arange(0, C), tl.arange(0, BLOCK_D)[None, :]
    in_d = d < D
    world, action = world + b * frames * P * world_row + h * D, action + b * frames * action_row + h * D
    old_k, old_v = old_k + row * size * D, old_v + row * size * D
    new_k, new_v = new_k + row * size * D, new_v + row * size * D
    r = (tile * C + i)[:, None]
    query = tokens(world, action, world_row, action_row, total - asked + r, d, (r < asked) & in_d, P) * scale
    bias = bias + h * bias_head + r * bias_query
    known = tl.load(age + b)
    best, mass, mixed = tl.full([C], -1e30, tl.float32), tl.zeros([C], tl.float32), tl.zeros([C, BLOCK_D], tl.float32)
    for start in range(0, size, C):
        n, m = start + i[None, :], start + i[:, None]
        key = tl.load(old_k + m * D + d, mask=(m < size) & in_d, other=0.0)
        value = tl.load(old_v + m * D + d, mask=(m < size) & in_d, other=0.0)
        if MOVE:
            moved = (tile == 0) & (m >= cut) & (m < size) & in_d
            tl.store(new_k + (m - cut) * D + d, key, mask=moved)
            tl.store(new_v + (m - cut) * D + d, value, mask=moved)
        score = dot(query, tl.trans(key)) + tl.load(bias + n, mask=(r < asked) & (n < size), other=0.0).to(tl.float32)
        written = (past - n // (P + 1) <= known) & (n < size)
        best, mass, mixed = attended(tl.where(written, score, float("-inf")), value, best, mass, mixed)
    for start in range(0, total, C):
        n, m = start + i[None, :], start + i[:, None]
        mine = (m < total) & in_d
        key = tokens(world + inner, action + inner, world_row, action_row, m, d, mine, P)
        value = tokens(world + 2 * inner, action + 2 * inner, world_row, action_row, m, d, mine, P)
        if MOVE:
            to = size + m - cut
            moved = (tile == 0) & (m < cut) & (to >= 0) & in_d
            tl.store(new_k + to * D + d, key, mask=moved)
            tl.store(new_v + to * D + d, value, mask=moved)
        more = tl.load(bias + size + n, mask=(r < asked) & (n < total), other=0.0).to(tl.float32)
        score = tl.where(n < total, dot(query, tl.trans(key)) + more, float("-inf"))
        best, mass, mixed = attended(score, value, best, mass, mixed)
    answered = asked // (P + 1)
    out_world, out_action = out_world + b * answered * P * inner + h * D, out_action + b * answered * inner + h * D
    answer(out_world, out_action, inner, r, d, (r < asked) & in_d, mixed / mass[:, None], P)


def attend_window(
    qkv_w: Tensor, qkv_a: Tensor, bias: Tensor, memory_k: Tensor, memory_v: Tensor, age: Tensor, clean: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``Block._window`` with a memory -> answers [B,F',P,I], [B,F',1,I] and the buffers after the clean frames.

    qkv [B,F,P,3*I], [B,F,1,3*I]: the first ``clean`` frames are written. memory [B,H,W*(P+1),d], of which ``age`` [B]
    frames are. bias [H,R,N] for the R tokens of the last F' frames; -inf in it is what isn't seen.
    """
    (batch, frames, count, three), (_, heads, size, d) = qkv_w.shape, memory_k.shape
    group, asked = count + 1, bias.shape[1]
    world, action = rows(qkv_w), rows(qkv_a)
    old_k, old_v = (x.float().contiguous() for x in (memory_k, memory_v))
    new_k, new_v = (torch.empty_like(x) if clean else x for x in (old_k, old_v))
    out_w, out_a = (x.new_empty(batch, asked // group, x.shape[2], three // 3) for x in (qkv_w, qkv_a))
    _window[(batch * heads, max(triton.cdiv(asked, _BLOCK), 1))](
        world, action, bias, old_k, old_v, age.contiguous(), out_w, out_a, new_k, new_v,
        world.stride(0), action.stride(0), *bias.stride()[:2],
        heads, frames, size // group, asked, clean * group, d**-0.5,
        P=count, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), C=_BLOCK, MOVE=clean > 0, num_stages=1,
    )  # fmt: skip
    return out_w, out_a, new_k, new_v
