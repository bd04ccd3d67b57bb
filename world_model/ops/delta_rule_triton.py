"""The gated delta rule on a GPU: few keys are streamed one by one, many are written by chunks, with gradients too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from world_model.ops.constants import constant
from world_model.ops.delta_rule_reads import reads_by_chunk
from world_model.ops.dispatch import forbid_double_backward, needs_grad
from world_model.ops.triton_primitives import dot

_CHUNK = 16  # keys that are written at once, and reads that are answered at once


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
    if total > 0:
        tl.store(final + here, memory, mask=in_d[:, None] & in_e[None, :])


@triton.jit
def _inverse(lower, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + lower)^-1 [C,C] by substitution, which is exact also where keys resemble one another."""
    i = tl.arange(0, C)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for n in range(C):
        column = tl.sum(tl.where(i[None, :] == n, lower, 0.0), 1)
        inverse -= column[:, None] * tl.sum(tl.where(i[:, None] == n, inverse, 0.0), 0)[None, :]
    return inverse


@triton.jit
def _written(key, value, log_alpha, beta, memory, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """How a chunk of keys [C,d] writes onto memory [d,e].

    -> g, the log of the product of alphas up to each key [C]; g of them all; what each key finds of those before it
    [C,C]; (I + L)^-1 [C,C], where L is beta times that; what memory answers each key amiss [C,e]; and u [C,e].
    """
    i = tl.arange(0, C)
    g = tl.sum(tl.where(i[:, None] >= i[None, :], log_alpha[None, :], 0.0), 1)  # all in one order: it never grows
    end = tl.sum(tl.where(i == C - 1, g, 0.0), 0)
    gap = tl.where(i[:, None] > i[None, :], g[:, None] - g[None, :], float("-inf"))
    alike = dot(key, tl.trans(key)) * tl.exp(gap)
    inverse = _inverse(beta[:, None] * alike, C)
    wrong = value - tl.exp(g)[:, None] * dot(key, memory)
    return g, end, alike, inverse, wrong, dot(inverse, beta[:, None] * wrong)


@triton.jit
def _seen(n, g, scale, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """What reads after n [R] keys of a chunk see of each u [R,C], and of the memory before the chunk [R]."""
    i = tl.arange(0, C)
    upto = tl.sum(tl.where(i[None, :] == n[:, None] - 1, g[None, :], 0.0), 1)
    gap = tl.where(i[None, :] < n[:, None], upto[:, None] - g[None, :], float("-inf"))
    return scale * tl.exp(gap), scale * tl.exp(upto)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, log_alpha, beta, state, out, final, saved, order, seen, first,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, total, reads, chunks, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, C: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // heads, row % heads
    i, d, e = tl.arange(0, C), tl.arange(0, BLOCK_D), tile * BLOCK_E + tl.arange(0, BLOCK_E)
    in_d, in_e = d < D, e < E
    here, inside = e[None, :] * D + d[:, None], in_d[:, None] & in_e[None, :]
    q, k, v = q + b * q_batch + h * q_head, k + b * k_batch + h * k_head, v + b * v_batch + h * v_head
    memory = tl.load(state + row * E * D + here, mask=inside, other=0.0)  # [d,e]
    for c in range(chunks):
        if KEEP:
            tl.store(saved + (row * chunks + c) * E * D + here, memory, mask=inside)
        t = c * C + i
        in_t = t < total
        key = tl.load(k + t[:, None] * k_token + d[None, :], mask=in_t[:, None] & in_d[None, :], other=0.0)
        value = tl.load(v + t[:, None] * v_token + e[None, :], mask=in_t[:, None] & in_e[None, :], other=0.0)
        log_alpha_t = tl.maximum(tl.load(log_alpha + row * total + t, mask=in_t, other=0.0).to(tl.float32), -100.0)
        beta_t = tl.load(beta + row * total + t, mask=in_t, other=0.0).to(tl.float32)
        key = key.to(tl.float32)
        g, end, _, _, _, u = _written(key, value.to(tl.float32), log_alpha_t, beta_t, memory, C)
        last = tl.load(first + c + 1)
        for r in range(tl.load(first + c), last, C):
            in_r = r + i < last
            which, n = tl.load(order + r + i, mask=in_r, other=0), tl.load(seen + r + i, mask=in_r, other=0)
            query = tl.load(q + which[:, None] * q_token + d[None, :], mask=in_r[:, None] & in_d[None, :], other=0.0)
            query = query.to(tl.float32)
            new, old = _seen(n, g, scale, C)
            told = dot(new * dot(query, tl.trans(key)), u) + old[:, None] * dot(query, memory)
            told_at = out + (row * reads + which[:, None]) * E + e[None, :]
            tl.store(told_at, told, mask=in_r[:, None] & in_e[None, :])
        memory = tl.exp(end) * memory + dot(tl.trans(key), tl.exp(end - g)[:, None] * u)
    tl.store(final + row * E * D + here, memory, mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    q, k, v, log_alpha, beta, saved, dout, dfinal, dq, dk, dv, dlog_alpha, dbeta, dstate, order, seen, first,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, total, reads, chunks, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tile * tl.num_programs(0) + row  # of what all tiles of e have a share in
    b, h = row // heads, row % heads
    i, d, e = tl.arange(0, C), tl.arange(0, BLOCK_D), tile * BLOCK_E + tl.arange(0, BLOCK_E)
    in_d, in_e = d < D, e < E
    here, inside = e[None, :] * D + d[:, None], in_d[:, None] & in_e[None, :]
    q, k, v = q + b * q_batch + h * q_head, k + b * k_batch + h * k_head, v + b * v_batch + h * v_head
    dmemory = tl.load(dfinal + row * E * D + here, mask=inside, other=0.0)  # [d,e]
    for back in range(chunks):
        c = chunks - 1 - back
        t = c * C + i
        in_t = t < total
        memory = tl.load(saved + (row * chunks + c) * E * D + here, mask=inside, other=0.0)
        key = tl.load(k + t[:, None] * k_token + d[None, :], mask=in_t[:, None] & in_d[None, :], other=0.0)
        value = tl.load(v + t[:, None] * v_token + e[None, :], mask=in_t[:, None] & in_e[None, :], other=0.0)
        log_alpha_t = tl.maximum(tl.load(log_alpha + row * total + t, mask=in_t, other=0.0).to(tl.float32), -100.0)
        beta_t = tl.load(beta + row * total + t, mask=in_t, other=0.0).to(tl.float32)
        key = key.to(tl.float32)
        g, end, alike, inverse, wrong, u = _written(key, value.to(tl.float32), log_alpha_t, beta_t, memory, C)

        # Where an exponent has +g_i a key's gradient is ``later``, where it has -g_j ``earlier``: then dg is k . both.
        left = tl.exp(end - g)[:, None]
        du, earlier = left * dot(key, dmemory), left * dot(u, tl.trans(dmemory))
        dlog_alpha_t = tl.zeros([C], tl.float32) + tl.exp(end) * tl.sum(dmemory * memory) + tl.sum(key * earlier)
        dmemory = tl.exp(end) * dmemory
        last = tl.load(first + c + 1)
        for r in range(tl.load(first + c), last, C):
            in_r = r + i < last
            which, n = tl.load(order + r + i, mask=in_r, other=0), tl.load(seen + r + i, mask=in_r, other=0)
            query = tl.load(q + which[:, None] * q_token + d[None, :], mask=in_r[:, None] & in_d[None, :], other=0.0)
            gain = dout + (row * reads + which[:, None]) * E + e[None, :]
            gain = tl.load(gain, mask=in_r[:, None] & in_e[None, :], other=0.0).to(tl.float32)
            query = query.to(tl.float32)
            new, old = _seen(n, g, scale, C)
            dscore = new * dot(gain, tl.trans(u))
            dquery = dot(dscore, key) + old[:, None] * dot(gain, tl.trans(memory))
            du += dot(tl.trans(new * dot(query, tl.trans(key))), gain)
            earlier += dot(tl.trans(dscore), query)
            dlog_alpha_t += tl.sum(tl.where(i[None, :] < n[:, None], tl.sum(query * dquery, 1)[:, None], 0.0), 0)
            dmemory += dot(tl.trans(old[:, None] * query), gain)
            dquery_at = dq + (part * reads + which[:, None]) * D + d[None, :]
            tl.store(dquery_at, dquery, mask=in_r[:, None] & in_d[None, :])

        du = dot(tl.trans(inverse), du)  # from here on of the right side
        dlower = -dot(du, tl.trans(u))  # counts where ``alike`` does, below the diagonal
        gap = tl.where(i[:, None] > i[None, :], g[:, None] - g[None, :], float("-inf"))
        dalike = beta_t[:, None] * tl.exp(gap) * dlower
        later = dot(dalike, key) - (beta_t * tl.exp(g))[:, None] * dot(du, tl.trans(memory))
        earlier += dot(tl.trans(dalike), key)
        dmemory -= dot(tl.trans(key), (beta_t * tl.exp(g))[:, None] * du)
        dg = tl.sum(key * (later - earlier), 1)  # summed up by no scan: github.com/triton-lang/triton/issues/4362
        dlog_alpha_t += tl.sum(tl.where(i[:, None] >= i[None, :], dg[:, None], 0.0), 0)
        dbeta_t = tl.sum(du * wrong, 1) + tl.sum(dlower * alike, 1)
        dkey_at = dk + (part * total + t[:, None]) * D + d[None, :]
        dvalue_at = dv + (row * total + t[:, None]) * E + e[None, :]
        tl.store(dkey_at, later + earlier, mask=in_t[:, None] & in_d[None, :])
        tl.store(dvalue_at, beta_t[:, None] * du, mask=in_t[:, None] & in_e[None, :])
        tl.store(dlog_alpha + part * total + t, dlog_alpha_t, mask=in_t)
        tl.store(dbeta + part * total + t, dbeta_t, mask=in_t)
    tl.store(dstate + row * E * D + here, dmemory, mask=inside)


@constant
def _reads(at: tuple[int, ...], total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Reads in the order of time [R], and from which one on they come after n keys [T+2]."""
    order = sorted(range(len(at)), key=at.__getitem__)
    first = [sum(n < key for n in at) for key in range(total + 2)]
    return torch.tensor(order, dtype=torch.int64, device=device), torch.tensor(first, device=device)


@constant
def _chunk_reads(at: tuple[int, ...], chunks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``reads_by_chunk`` on the device."""
    order, seen, first = (torch.tensor(x, dtype=torch.int64, device=device) for x in reads_by_chunk(at, chunks, _CHUNK))
    return order, seen, first


def _write(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, at: tuple[int, ...], keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By chunks -> answers, the memory after, and where it is kept for the way back, that before each chunk."""
    (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
    chunks = max(triton.cdiv(total, _CHUNK), 1)
    out, final = q.new_empty(batch, heads, reads, e), torch.empty_like(state)
    saved = state.new_empty(batch, heads, chunks, e, d) if keep else None
    tiles, blocks = _blocks(d, e)
    _forward[(batch * heads, tiles)](
        q, k, v, log_alpha, beta, state, out, final, saved, *_chunk_reads(at, chunks, q.device),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        heads, total, reads, chunks, d**-0.5, **blocks, KEEP=keep,
    )  # fmt: skip
    return out, final, saved


def _blocks(d: int, e: int) -> tuple[int, dict[str, int]]:
    """Into how many tiles e is cut, and the sizes of a program that writes by chunks.

    Products want 16 and more of everything. Beyond that sizes are small, warps many and loads not ahead of time, since
    in products of full float32 each thread holds whole rows: larger programs have more than there are registers for.
    """
    block_d = max(16, triton.next_power_of_2(d))
    block_e = 32 if e > 16 and block_d <= 32 else 16
    sizes = dict(D=d, E=e, BLOCK_D=block_d, BLOCK_E=block_e, C=_CHUNK)
    return triton.cdiv(e, block_e), {**sizes, "num_warps": 4 if block_d <= 32 else 8, "num_stages": 1}


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.at = args
        out, final, saved = _write(*_ready(*tensors), ctx.at, keep=True)
        ctx.save_for_backward(*tensors, saved)
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        *given, saved = ctx.saved_tensors
        q, k, v, log_alpha, beta, state = _ready(*given)
        (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
        tiles, blocks = _blocks(d, e)
        dq, dk = (saved.new_empty(tiles, batch, heads, n, d) for n in (reads, total))
        dlog_alpha, dbeta = (saved.new_empty(tiles, batch, heads, total) for _ in range(2))
        dv, dstate = saved.new_empty(v.shape), torch.empty_like(state)
        _backward[(batch * heads, tiles)](
            q, k, v, log_alpha, beta, saved, dout.contiguous(), dfinal.contiguous(),
            dq, dk, dv, dlog_alpha, dbeta, dstate, *_chunk_reads(ctx.at, saved.shape[2], q.device),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            heads, total, reads, saved.shape[2], d**-0.5, **blocks,
        )  # fmt: skip
        grads = (dq.sum(0), dk.sum(0), dv, dlog_alpha.sum(0), dbeta.sum(0), dstate)
        return *(grad.to(x.dtype) for grad, x in zip(grads, given, strict=True)), None


def _ready(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the kernels take them: a token's numbers side by side, gates and memory without gaps."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v, log_alpha.contiguous(), beta.contiguous(), state.float().contiguous()


def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, at: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """As ``delta.delta_recurrent``; tokens in any float dtype, the memory in float32.

    d at most 256, or 128 with gradients; of e each program takes 32 at most, so more programs share a wide head.
    """
    (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
    tensors = (q, k, v, log_alpha, beta, state)
    if d > (most := 128 if needs_grad(*tensors) else 256):
        raise ValueError(f"a head of this kernel has at most {most} numbers here, got {d}")
    if needs_grad(*tensors):
        return _Delta.apply(*tensors, tuple(at))  # type: ignore[no-any-return]
    q, k, v, log_alpha, beta, state = _ready(*tensors)
    if total > _CHUNK and d <= 128:
        return _write(q, k, v, log_alpha, beta, state, tuple(at), keep=False)[:2]
    out, final = q.new_empty(batch, heads, reads, e), torch.empty_like(state) if total else state
    block_e = min(32, triton.next_power_of_2(e))
    _stream[(batch * heads, triton.cdiv(e, block_e))](
        q, k, v, log_alpha, beta, state, out, final, *_reads(tuple(at), total, q.device),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        heads, total, reads, d**-0.5,
        D=d, E=e, BLOCK_D=triton.next_power_of_2(d), BLOCK_E=block_e,
    )  # fmt: skip
    return out, final
