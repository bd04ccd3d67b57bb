"""The gated delta rule: the recurrence as a reference, a chunked form in torch, and the choice of the fastest form.

Gated DeltaNet (arXiv 2412.06464). Keys have unit length, 0 < beta < 1, alpha = exp(log_alpha) <= 1, and

    S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        o = S q / sqrt(d)

Shapes, in all forms: q [B,H,R,d], k [B,H,T,d], v [B,H,T,e], log_alpha and beta [B,H,T], state S [B,H,e,d].
Queries are independent of keys: query r reads the memory as it is after the first ``at[r]`` keys (by default query t
reads after key t). So a denoising chunk can read a memory that it never writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from world_model.ops.constants import index
from world_model.ops.delta_rule_cpu import delta_rule_cpu
from world_model.ops.dispatch import native_library, needs_grad, no_autocast, use_triton

MIN_LOG_ALPHA = -100.0  # exp(-100) is negligible, and with a lower bound sums of log alpha stay precise


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, at: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The delta rule in the fastest form for these tensors -> (o [B,H,R,e], final state [B,H,e,d])."""
    tensors, total = (q, k, v, log_alpha, beta, state), k.shape[2]
    reads = range(1, total + 1) if at is None else at
    fits = _fits(*tensors) and len(reads) == q.shape[2] and all(0 <= n <= total for n in reads)
    single = total > 0 and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    if fits and single and (library := native_library("delta")):
        return delta_rule_cpu(library, *tensors, reads)
    if fits and q.shape[-1] <= (128 if needs_grad(*tensors) else 256) and use_triton(*tensors):
        from world_model.ops.delta_rule_triton import delta_rule_triton

        return delta_rule_triton(*tensors, reads)
    with no_autocast(state):  # in the memory's precision, as in the kernels, since errors in it persist
        q, k, v, log_alpha, beta = (t.to(state.dtype) for t in tensors[:-1])
        return delta_rule_chunked(q, k, v, log_alpha, beta, state, at)


def _fits(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor) -> bool:
    """Whether the shapes fit: compiled code neither broadcasts nor checks them."""
    (batch, heads, total, d), e = k.shape, v.shape[-1]
    same = q.shape[:2] == (batch, heads) and q.shape[3] == d and v.shape[:3] == (batch, heads, total)
    return same and log_alpha.shape == beta.shape == (batch, heads, total) and state.shape == (batch, heads, e, d)


def delta_rule_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor, at: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The reference: one key at a time, in any dtype -> (o [B,H,R,e], final state [B,H,e,d])."""
    states = [state]
    for t in range(k.shape[2]):
        alpha = log_alpha[:, :, t].exp()[..., None, None]
        key, value = k[:, :, t, None, :], v[:, :, t, :, None]
        decayed = alpha * states[-1]
        error = value - (decayed * key).sum(-1, keepdim=True)  # of what the memory returns for this key
        states.append(decayed + beta[:, :, t, None, None] * error * key)
    reads = range(1, k.shape[2] + 1) if at is None else at
    o = [(states[n] * q[:, :, r, None, :]).sum(-1) for r, n in enumerate(reads)]
    out = torch.stack(o, 2) if o else q.new_zeros(*q.shape[:3], v.shape[-1])
    return out * q.shape[-1] ** -0.5, states[-1]


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    at: Sequence[int] | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same outputs, final state and gradients by matrix products over ``chunk`` keys at a time.

    With u_t = beta_t (v_t - alpha_t S_{t-1} k_t) the memory is S_t = alpha_t S_{t-1} + u_t k_t^T, and in a chunk the u
    solve a unit lower triangular system. It is solved by substitution: doubling a Neumann series overflows when keys
    are correlated. Decays enter only as exp of differences that are <= 0, so nothing overflows.
    """
    total = k.shape[2]
    if total == 0:
        return read(q, state), state
    reads = list(range(1, total + 1) if at is None else at)
    q, beta = q * q.shape[-1] ** -0.5, beta[..., None]
    log_alpha = log_alpha.clamp(min=MIN_LOG_ALPHA)
    order: list[int] = []
    outs: list[Tensor] = []
    for first in range(0, total, chunk):
        last = min(first + chunk, total)
        own_reads = [r for r, n in enumerate(reads) if first < n <= last or n == first == 0]
        kc, vc, bc = k[:, :, first:last], v[:, :, first:last], beta[:, :, first:last]
        decay = log_alpha[:, :, first:last].cumsum(-1)  # log of the product of alphas up to each key
        gap = decay[..., :, None] - decay[..., None, :]
        lower = (bc * (kc @ kc.mT) * gap.tril(-1).exp()).tril(-1)
        rhs = bc * (vc - decay.exp()[..., None] * (kc @ state.mT))
        u = torch.linalg.solve_triangular(lower, rhs, upper=False, unitriangular=True)  # [B,H,C,e]
        if own_reads:
            order += own_reads
            counts = index(tuple(reads[r] - first for r in own_reads), k.device)  # keys of the chunk before each read
            qc = q if own_reads == list(range(q.shape[2])) else q.index_select(2, index(tuple(own_reads), q.device))
            read_decay = torch.cat([torch.zeros_like(decay[..., :1]), decay], -1)[..., counts]  # [B,H,r]
            mask = torch.arange(last - first, device=k.device) < counts[:, None]
            gap = (read_decay[..., :, None] - decay[..., None, :]).masked_fill(~mask, -torch.inf)
            outs.append((qc @ kc.mT * gap.exp()) @ u + read_decay.exp()[..., None] * (qc @ state.mT))
        end = decay[..., -1:]
        state = end.exp()[..., None] * state + (u * (end - decay).exp()[..., None]).mT @ kc
    if not outs:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), state
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    if order != sorted(order):
        out = out.index_select(2, index(tuple(sorted(range(len(order)), key=order.__getitem__)), out.device))
    return out, state


def read(q: Tensor, state: Tensor) -> Tensor:
    """Read the memory without writing: q [B,H,R,d], state [B,H,e,d] -> [B,H,R,e]."""
    return (q * q.shape[-1] ** -0.5) @ state.mT
