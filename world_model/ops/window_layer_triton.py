"""Window attention over buffers and the pass's own tokens on a GPU, without gradients; it also shifts the buffers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from world_model.ops.triton_primitives import as_rows, dot, load_tokens, store_tokens, update_softmax

_BLOCK = 16  # queries of one program, and keys in one tile


@triton.jit
def _window(  # type: ignore[no-untyped-def]
    world, action, bias, old_k, old_v, age, out_world, out_action, new_k, new_v,
    world_row, action_row, bias_head, bias_query, heads, frames, past, queries, cut, scale,
    P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, inner, count, size = row // heads, row % heads, heads * D, frames * (P + 1), past * (P + 1)
    i, d = tl.arange(0, C), tl.arange(0, BLOCK_D)[None, :]
    in_d = d < D
    world, action = world + b * frames * P * world_row + h * D, action + b * frames * action_row + h * D
    old_k, old_v = old_k + row * size * D, old_v + row * size * D
    new_k, new_v = new_k + row * size * D, new_v + row * size * D
    r = (tile * C + i)[:, None]
    query = load_tokens(world, action, world_row, action_row, count - queries + r, d, (r < queries) & in_d, P) * scale
    bias = bias + h * bias_head + r * bias_query
    frames_seen = tl.load(age + b)
    highest = tl.full([C], -1e30, tl.float32)
    total, mixed = tl.zeros([C], tl.float32), tl.zeros([C, BLOCK_D], tl.float32)
    for start in range(0, size, C):
        n, m = start + i[None, :], start + i[:, None]
        key = tl.load(old_k + m * D + d, mask=(m < size) & in_d, other=0.0)
        value = tl.load(old_v + m * D + d, mask=(m < size) & in_d, other=0.0)
        if SHIFT:
            stays = (tile == 0) & (m >= cut) & (m < size) & in_d
            tl.store(new_k + (m - cut) * D + d, key, mask=stays)
            tl.store(new_v + (m - cut) * D + d, value, mask=stays)
        score = dot(query, tl.trans(key)) + tl.load(bias + n, mask=(r < queries) & (n < size), other=0.0).to(tl.float32)
        written = (past - n // (P + 1) <= frames_seen) & (n < size)
        highest, total, mixed = update_softmax(tl.where(written, score, float("-inf")), value, highest, total, mixed)
    for start in range(0, count, C):
        n, m = start + i[None, :], start + i[:, None]
        inside = (m < count) & in_d
        key = load_tokens(world + inner, action + inner, world_row, action_row, m, d, inside, P)
        value = load_tokens(world + 2 * inner, action + 2 * inner, world_row, action_row, m, d, inside, P)
        if SHIFT:
            slot = size + m - cut
            enters = (tile == 0) & (m < cut) & (slot >= 0) & in_d
            tl.store(new_k + slot * D + d, key, mask=enters)
            tl.store(new_v + slot * D + d, value, mask=enters)
        own_bias = tl.load(bias + size + n, mask=(r < queries) & (n < count), other=0.0).to(tl.float32)
        score = tl.where(n < count, dot(query, tl.trans(key)) + own_bias, float("-inf"))
        highest, total, mixed = update_softmax(score, value, highest, total, mixed)
    out_frames = queries // (P + 1)
    out_world, out_action = out_world + b * out_frames * P * inner + h * D, out_action + b * out_frames * inner + h * D
    store_tokens(out_world, out_action, inner, r, d, (r < queries) & in_d, mixed / total[:, None], P)


def attend_window(
    qkv_w: Tensor, qkv_a: Tensor, bias: Tensor, memory_k: Tensor, memory_v: Tensor, age: Tensor, clean: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``window_layer_torch`` with buffers -> outputs [B,F',P,I] and [B,F',1,I], the buffers after the clean frames.

    qkv [B,F,P,3*I] and [B,F,1,3*I]: the first ``clean`` frames enter the buffers. memory [B,H,W*(P+1),d]: W frames, of
    which the last ``age`` [B] have been written. bias [H,R,N]: for the R tokens of the last F' frames, -inf for keys
    that they don't see.
    """
    (batch, frames, count, width), (_, heads, size, d) = qkv_w.shape, memory_k.shape
    group, queries = count + 1, bias.shape[1]
    world, action = as_rows(qkv_w), as_rows(qkv_a)
    old_k, old_v = (x.float().contiguous() for x in (memory_k, memory_v))
    new_k, new_v = (torch.empty_like(x) if clean else x for x in (old_k, old_v))
    out_w, out_a = (x.new_empty(batch, queries // group, x.shape[2], width // 3) for x in (qkv_w, qkv_a))
    _window[(batch * heads, max(triton.cdiv(queries, _BLOCK), 1))](
        world, action, bias, old_k, old_v, age.contiguous(), out_w, out_a, new_k, new_v,
        world.stride(0), action.stride(0), *bias.stride()[:2],
        heads, frames, size // group, queries, clean * group, d**-0.5,
        P=count, D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), C=_BLOCK, SHIFT=clean > 0, num_stages=1,
    )  # fmt: skip
    return out_w, out_a, new_k, new_v
