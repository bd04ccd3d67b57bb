"""The gated delta rule on a GPU without gradients: one program a head streams all keys, its memory kept on the chip."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _stream(  # type: ignore[no-untyped-def]
    q, k, v, log_alpha, beta, state, out, final, order, first,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, total, reads, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // heads, row % heads
    d, e = tl.arange(0, BLOCK_D), tile * BLOCK_E + tl.arange(0, BLOCK_E)
    in_d, in_e = d < D, e < E
    here = row * E * D + e[None, :] * D + d[:, None]
    memory = tl.load(state + here, mask=in_d[:, None] & in_e[None, :], other=0.0).to(tl.float32)  # [d,e]
    for n in range(total + 1):
        if n > 0:
            t = n - 1
            key = tl.load(k + b * k_batch + h * k_head + t * k_token + d, mask=in_d, other=0.0).to(tl.float32)
            value = tl.load(v + b * v_batch + h * v_head + t * v_token + e, mask=in_e, other=0.0).to(tl.float32)
            memory = memory * tl.exp(tl.load(log_alpha + row * total + t).to(tl.float32))
            wrong = value - tl.sum(memory * key[:, None], 0)
            wrong = wrong * tl.load(beta + row * total + t).to(tl.float32)
            memory = memory + key[:, None] * wrong[None, :]
        for r in range(tl.load(first + n), tl.load(first + n + 1)):
            which = tl.load(order + r)
            query = tl.load(q + b * q_batch + h * q_head + which * q_token + d, mask=in_d, other=0.0).to(tl.float32)
            told = tl.sum(memory * query[:, None], 0) * scale
            tl.store(out + (row * reads + which) * E + e, told, mask=in_e)
    tl.store(final + here, memory, mask=in_d[:, None] & in_e[None, :])


@lru_cache(maxsize=256)
def _reads(at: tuple[int, ...], total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Reads in the order of time [R], and from which one on they come after n keys [T+2]."""
    order = sorted(range(len(at)), key=at.__getitem__)
    first = [sum(n < key for n in at) for key in range(total + 2)]
    return torch.tensor(order, dtype=torch.int64, device=device), torch.tensor(first, device=device)


def delta_triton(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, at: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """As ``delta.delta_recurrent``; tokens in any float dtype, the memory in float32.

    d at most 256; of e each program takes 32 at most, so more programs share a wide head.
    """
    (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
    if d > 256:
        raise ValueError(f"a head of this kernel has at most 256 numbers, got {d}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    state = state.float().contiguous()
    out, final = q.new_empty(batch, heads, reads, e), torch.empty_like(state)
    order, first = _reads(tuple(at), total, q.device)
    block_e = min(32, triton.next_power_of_2(e))
    _stream[(batch * heads, triton.cdiv(e, block_e))](
        q, k, v, log_alpha.contiguous(), beta.contiguous(), state, out, final, order, first,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        heads, total, reads, d**-0.5,
        D=d, E=e, BLOCK_D=triton.next_power_of_2(d), BLOCK_E=block_e,
    )  # fmt: skip
    return out, final
