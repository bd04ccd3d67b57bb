"""The gated delta rule on a GPU: few keys are written one by one; many, or with gradients, by chunks."""

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

_CHUNK = 16  # keys of a chunk, and reads in one tile


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
    offset = row * E * D + e[None, :] * D + d[:, None]
    memory = tl.load(state + offset, mask=in_d[:, None] & in_e[None, :], other=0.0).to(tl.float32)  # [d,e]
    for n in range(total + 1):
        if n > 0:
            t = n - 1
            key = tl.load(k + b * k_batch + h * k_head + t * k_token + d, mask=in_d, other=0.0).to(tl.float32)
            value = tl.load(v + b * v_batch + h * v_head + t * v_token + e, mask=in_e, other=0.0).to(tl.float32)
            memory = memory * tl.exp(tl.load(log_alpha + row * total + t).to(tl.float32))
            delta = value - tl.sum(memory * key[:, None], 0)
            delta = delta * tl.load(beta + row * total + t).to(tl.float32)
            memory = memory + key[:, None] * delta[None, :]
        for r in range(tl.load(first + n), tl.load(first + n + 1)):
            index = tl.load(order + r)
            query = tl.load(q + b * q_batch + h * q_head + index * q_token + d, mask=in_d, other=0.0).to(tl.float32)
            out_r = tl.sum(memory * query[:, None], 0) * scale
            tl.store(out + (row * reads + index) * E + e, out_r, mask=in_e)
    if total > 0:
        tl.store(final + offset, memory, mask=in_d[:, None] & in_e[None, :])


@triton.jit
def _inverse(lower, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + lower)^-1 [C,C] by substitution, which is exact also where keys are correlated."""
    i = tl.arange(0, C)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for n in range(C):
        column = tl.sum(tl.where(i[None, :] == n, lower, 0.0), 1)
        inverse -= column[:, None] * tl.sum(tl.where(i[:, None] == n, inverse, 0.0), 0)[None, :]
    return inverse


@triton.jit
def _load_chunk(k, v, log_alpha, beta, k_token, v_token, t, d, e, in_t, in_d, in_e):  # type: ignore[no-untyped-def]
    """Keys [C,d] and values [C,e] at tokens t, log alpha and beta [C], in float32."""
    key = tl.load(k + t[:, None] * k_token + d[None, :], mask=in_t[:, None] & in_d[None, :], other=0.0)
    value = tl.load(v + t[:, None] * v_token + e[None, :], mask=in_t[:, None] & in_e[None, :], other=0.0)
    log_alpha_t = tl.maximum(tl.load(log_alpha + t, mask=in_t, other=0.0).to(tl.float32), -100.0)
    beta_t = tl.load(beta + t, mask=in_t, other=0.0).to(tl.float32)
    return key.to(tl.float32), value.to(tl.float32), log_alpha_t, beta_t


@triton.jit
def _chunk_writes(key, value, log_alpha, beta, memory, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a chunk of keys [C,d] writes to memory [d,e].

    -> g, the log of the product of alphas up to each key [C]; g at the chunk's end; the decayed products of each key
    with those before it [C,C]; (I + L)^-1 [C,C], where L is beta times those; the error of the memory's output for each
    key [C,e]; u [C,e].
    """
    i = tl.arange(0, C)
    # One order of summation for all keys, so that rounding never lets g grow.
    g = tl.sum(tl.where(i[:, None] >= i[None, :], log_alpha[None, :], 0.0), 1)
    end = tl.sum(tl.where(i == C - 1, g, 0.0), 0)
    gap = tl.where(i[:, None] > i[None, :], g[:, None] - g[None, :], float("-inf"))
    products = dot(key, tl.trans(key)) * tl.exp(gap)
    inverse = _inverse(beta[:, None] * products, C)
    error = value - tl.exp(g)[:, None] * dot(key, memory)
    return g, end, products, inverse, error, dot(inverse, beta[:, None] * error)


@triton.jit
def _read_weights(n, g, scale, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of each u [R,C], and of the memory before the chunk [R], in reads after n [R] keys of the chunk."""
    i = tl.arange(0, C)
    upto = tl.sum(tl.where(i[None, :] == n[:, None] - 1, g[None, :], 0.0), 1)
    gap = tl.where(i[None, :] < n[:, None], upto[:, None] - g[None, :], float("-inf"))
    return scale * tl.exp(gap), scale * tl.exp(upto)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, log_alpha, beta, state, out, final, saved, order, counts, first,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, total, reads, chunks, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, C: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // heads, row % heads
    i, d, e = tl.arange(0, C), tl.arange(0, BLOCK_D), tile * BLOCK_E + tl.arange(0, BLOCK_E)
    in_d, in_e = d < D, e < E
    offset, inside = e[None, :] * D + d[:, None], in_d[:, None] & in_e[None, :]
    q, k, v = q + b * q_batch + h * q_head, k + b * k_batch + h * k_head, v + b * v_batch + h * v_head
    memory = tl.load(state + row * E * D + offset, mask=inside, other=0.0)  # [d,e]
    for c in range(chunks):
        if SAVE:
            tl.store(saved + (row * chunks + c) * E * D + offset, memory, mask=inside)
        t = c * C + i
        in_t = t < total
        key, value, log_alpha_t, beta_t = _load_chunk(
            k, v, log_alpha + row * total, beta + row * total, k_token, v_token, t, d, e, in_t, in_d, in_e
        )
        g, end, _, _, _, u = _chunk_writes(key, value, log_alpha_t, beta_t, memory, C)
        last = tl.load(first + c + 1)
        for r in range(tl.load(first + c), last, C):
            in_r = r + i < last
            index, n = tl.load(order + r + i, mask=in_r, other=0), tl.load(counts + r + i, mask=in_r, other=0)
            query = tl.load(q + index[:, None] * q_token + d[None, :], mask=in_r[:, None] & in_d[None, :], other=0.0)
            query = query.to(tl.float32)
            new, old = _read_weights(n, g, scale, C)
            out_r = dot(new * dot(query, tl.trans(key)), u) + old[:, None] * dot(query, memory)
            out_at = out + (row * reads + index[:, None]) * E + e[None, :]
            tl.store(out_at, out_r, mask=in_r[:, None] & in_e[None, :])
        memory = tl.exp(end) * memory + dot(tl.trans(key), tl.exp(end - g)[:, None] * u)
    tl.store(final + row * E * D + offset, memory, mask=inside)


@triton.jit
def _writes_backward(  # type: ignore[no-untyped-def]
    key, beta, memory, g, products, inverse, error, u, du, earlier, dmemory, dlog_alpha, C: tl.constexpr
):  # fmt: skip
    """From the gradient du [C,e] through ``_chunk_writes`` -> dkey, dvalue, dlog_alpha, dbeta and dmemory.

    earlier, dmemory and dlog_alpha: what they are without these writes. See ``_backward`` for ``earlier``.
    """
    i = tl.arange(0, C)
    du = dot(tl.trans(inverse), du)  # from here on of the system's right side
    dlower = -dot(du, tl.trans(u))  # counts below the diagonal, as ``products`` does
    gap = tl.where(i[:, None] > i[None, :], g[:, None] - g[None, :], float("-inf"))
    dproducts = beta[:, None] * tl.exp(gap) * dlower
    later = dot(dproducts, key) - (beta * tl.exp(g))[:, None] * dot(du, tl.trans(memory))
    earlier += dot(tl.trans(dproducts), key)
    dmemory -= dot(tl.trans(key), (beta * tl.exp(g))[:, None] * du)
    dg = tl.sum(key * (later - earlier), 1)  # summed by no scan: github.com/triton-lang/triton/issues/4362
    dlog_alpha += tl.sum(tl.where(i[:, None] >= i[None, :], dg[:, None], 0.0), 0)
    dbeta = tl.sum(du * error, 1) + tl.sum(dlower * products, 1)
    return later + earlier, beta[:, None] * du, dlog_alpha, dbeta, dmemory


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    q, k, v, log_alpha, beta, saved, dout, dfinal, dq, dk, dv, dlog_alpha, dbeta, dstate, order, counts, first,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, total, reads, chunks, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tile * tl.num_programs(0) + row  # of gradients that are summed over the tiles of e
    b, h = row // heads, row % heads
    i, d, e = tl.arange(0, C), tl.arange(0, BLOCK_D), tile * BLOCK_E + tl.arange(0, BLOCK_E)
    in_d, in_e = d < D, e < E
    offset, inside = e[None, :] * D + d[:, None], in_d[:, None] & in_e[None, :]
    q, k, v = q + b * q_batch + h * q_head, k + b * k_batch + h * k_head, v + b * v_batch + h * v_head
    dmemory = tl.load(dfinal + row * E * D + offset, mask=inside, other=0.0)  # [d,e]
    for step in range(chunks):
        c = chunks - 1 - step
        t = c * C + i
        in_t = t < total
        memory = tl.load(saved + (row * chunks + c) * E * D + offset, mask=inside, other=0.0)
        key, value, log_alpha_t, beta_t = _load_chunk(
            k, v, log_alpha + row * total, beta + row * total, k_token, v_token, t, d, e, in_t, in_d, in_e
        )
        g, end, products, inverse, error, u = _chunk_writes(key, value, log_alpha_t, beta_t, memory, C)

        # A key's gradient has two parts, ``later`` from terms with +g_i in an exponent and ``earlier`` from those with
        # -g_j, since dg = key . (later - earlier).
        left = tl.exp(end - g)[:, None]
        du, earlier = left * dot(key, dmemory), left * dot(u, tl.trans(dmemory))
        dlog_alpha_t = tl.zeros([C], tl.float32) + tl.exp(end) * tl.sum(dmemory * memory) + tl.sum(key * earlier)
        dmemory = tl.exp(end) * dmemory
        last = tl.load(first + c + 1)
        for r in range(tl.load(first + c), last, C):
            in_r = r + i < last
            index, n = tl.load(order + r + i, mask=in_r, other=0), tl.load(counts + r + i, mask=in_r, other=0)
            query = tl.load(q + index[:, None] * q_token + d[None, :], mask=in_r[:, None] & in_d[None, :], other=0.0)
            dout_r = dout + (row * reads + index[:, None]) * E + e[None, :]
            dout_r = tl.load(dout_r, mask=in_r[:, None] & in_e[None, :], other=0.0).to(tl.float32)
            query = query.to(tl.float32)
            new, old = _read_weights(n, g, scale, C)
            dscore = new * dot(dout_r, tl.trans(u))
            dquery = dot(dscore, key) + old[:, None] * dot(dout_r, tl.trans(memory))
            du += dot(tl.trans(new * dot(query, tl.trans(key))), dout_r)
            earlier += dot(tl.trans(dscore), query)
            dlog_alpha_t += tl.sum(tl.where(i[None, :] < n[:, None], tl.sum(query * dquery, 1)[:, None], 0.0), 0)
            dmemory += dot(tl.trans(old[:, None] * query), dout_r)
            dquery_at = dq + (part * reads + index[:, None]) * D + d[None, :]
            tl.store(dquery_at, dquery, mask=in_r[:, None] & in_d[None, :])

        dkey, dvalue, dlog_alpha_t, dbeta_t, dmemory = _writes_backward(
            key, beta_t, memory, g, products, inverse, error, u, du, earlier, dmemory, dlog_alpha_t, C
        )
        dkey_at = dk + (part * total + t[:, None]) * D + d[None, :]
        dvalue_at = dv + (row * total + t[:, None]) * E + e[None, :]
        tl.store(dkey_at, dkey, mask=in_t[:, None] & in_d[None, :])
        tl.store(dvalue_at, dvalue, mask=in_t[:, None] & in_e[None, :])
        tl.store(dlog_alpha + part * total + t, dlog_alpha_t, mask=in_t)
        tl.store(dbeta + part * total + t, dbeta_t, mask=in_t)
    tl.store(dstate + row * E * D + offset, dmemory, mask=inside)


@constant
def _reads(at: tuple[int, ...], total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The reads in time order [R], and the position in it of the first read after at least n keys [T+2]."""
    order = sorted(range(len(at)), key=at.__getitem__)
    first = [sum(n < key for n in at) for key in range(total + 2)]
    return torch.tensor(order, dtype=torch.int64, device=device), torch.tensor(first, device=device)


@constant
def _chunk_reads(at: tuple[int, ...], chunks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``reads_by_chunk`` on the device."""
    order, counts, first = (
        torch.tensor(x, dtype=torch.int64, device=device) for x in reads_by_chunk(at, chunks, _CHUNK)
    )
    return order, counts, first


def _run_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, at: tuple[int, ...], save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By chunks -> outputs, final state and, if ``save``, for the backward pass the state before each chunk."""
    (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
    chunks = max(triton.cdiv(total, _CHUNK), 1)
    out, final = q.new_empty(batch, heads, reads, e), torch.empty_like(state)
    saved = state.new_empty(batch, heads, chunks, e, d) if save else None
    tiles, blocks = _blocks(d, e)
    _forward[(batch * heads, tiles)](
        q, k, v, log_alpha, beta, state, out, final, saved, *_chunk_reads(at, chunks, q.device),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        heads, total, reads, chunks, d**-0.5, **blocks, SAVE=save,
    )  # fmt: skip
    return out, final, saved


def _blocks(d: int, e: int) -> tuple[int, dict[str, int]]:
    """The number of tiles that e is cut into, and the sizes of a program that writes by chunks.

    ``tl.dot`` needs at least 16 of everything. Beyond that sizes are small, warps many and loads not pipelined: in
    products of full float32 each thread holds whole rows, so larger programs run out of registers.
    """
    block_d = max(16, triton.next_power_of_2(d))
    block_e = 32 if e > 16 and block_d <= 32 else 16
    sizes = dict(D=d, E=e, BLOCK_D=block_d, BLOCK_E=block_e, C=_CHUNK)
    return triton.cdiv(e, block_e), {**sizes, "num_warps": 4 if block_d <= 32 else 8, "num_stages": 1}


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.at = args
        out, final, saved = _run_chunks(*_contiguous(*tensors), ctx.at, save=True)
        ctx.save_for_backward(*tensors, saved)
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward()
        *inputs, saved = ctx.saved_tensors
        q, k, v, log_alpha, beta, state = _contiguous(*inputs)
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
        return *(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)), None


def _contiguous(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the kernels need them: a token's numbers side by side, gates and state contiguous, the state in float32."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v, log_alpha.contiguous(), beta.contiguous(), state.float().contiguous()


def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, at: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """As ``delta_rule_recurrent``; tokens in any float dtype, the state in float32.

    Raises ValueError for d above 256, or above 128 with gradients. A program handles at most 32 of e.
    """
    (batch, heads, reads, d), total, e = q.shape, k.shape[2], v.shape[-1]
    tensors = (q, k, v, log_alpha, beta, state)
    if d > (largest := 128 if needs_grad(*tensors) else 256):
        raise ValueError(f"a head of this kernel has at most {largest} numbers here, got {d}")
    if needs_grad(*tensors):
        return _Delta.apply(*tensors, tuple(at))  # type: ignore[no-any-return]
    q, k, v, log_alpha, beta, state = _contiguous(*tensors)
    if total > _CHUNK and d <= 128:
        return _run_chunks(q, k, v, log_alpha, beta, state, tuple(at), save=False)[:2]
    out, final = q.new_empty(batch, heads, reads, e), torch.empty_like(state) if total else state
    block_e = min(32, triton.next_power_of_2(e))
    _stream[(batch * heads, triton.cdiv(e, block_e))](
        q, k, v, log_alpha, beta, state, out, final, *_reads(tuple(at), total, q.device),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        heads, total, reads, d**-0.5,
        D=d, E=e, BLOCK_D=triton.next_power_of_2(d), BLOCK_E=block_e,
    )  # fmt: skip
    return out, final
