"""Sliding and dilated sliding attention over buffers that hold the last few frames.

Kairos (arXiv 2606.16533) slides two-sided windows over a whole clip; a stream has no future, so here a window is
causal between chunks, and inside the chunk being denoised every frame sees every other.

The buffers are shift registers: the newest frame is last. A state is immutable, so a write copies the buffer anyway,
and without a ring's wrap-around every slot has a fixed age.
"""

from __future__ import annotations

import torch
from torch import Tensor

from world_model.ops.constants import constant
from world_model.ops.layout import Layout


@constant
def visible(
    layout: Layout,
    past: int,
    stride: int,
    reach: int,
    group: int,
    ahead: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Which of M keys each of the layout's R tokens sees -> (select [reach+ahead+1, R*M], mask [R,M]).

    The keys are those of ``past`` frames in the buffers, then the layout's own, ``group`` tokens a frame. A query sees
    the keys at offsets stride, 2*stride, ..., reach before it that its memory holds; a clean frame sees itself too, a
    noisy one its whole chunk. mask is 0 where a query sees a key, else -inf; select is 1 in row ``offset + ahead``, so
    that [H, reach+ahead+1] @ select, with one bias per offset, is the bias of every score.
    """
    noisy_times = [start + i for start in layout.starts for i in range(layout.chunk)]
    noisy_limits = [start for start in layout.starts for _ in range(layout.chunk)]
    query = torch.tensor([*range(layout.clean), *noisy_times])
    limit = torch.tensor([*range(layout.clean), *noisy_limits])  # sees memory strictly before this time
    key = torch.cat([torch.arange(-past, 0), query])
    chunk = torch.tensor([*range(layout.clean), *(layout.clean + limit for limit in noisy_limits)])
    offset = query[:, None] - key
    remembered = (offset % stride == 0) & (offset <= reach) & (key < limit[:, None])
    remembered[:, past + layout.clean :] = False
    together = torch.zeros_like(remembered)
    together[:, past:] = chunk[:, None] == chunk
    sees, offset = (x.repeat_interleave(group, 0).repeat_interleave(group, 1) for x in (remembered | together, offset))
    select = torch.zeros(reach + ahead + 1, offset.numel())
    select[(offset.flatten() + ahead).clamp(0, reach + ahead), torch.arange(offset.numel())] = 1.0
    select, mask = select * sees.flatten(), torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
    return select.to(device, dtype), mask.to(device, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Softmax attention with an additive bias over ``past`` keys and values, then k and v.

    q [B,H,R,d], k and v [B,H,M,d], past two of [B,H,W,d], bias [H,R,W+M] or [B,H,R,W+M] -> [B,H,R,d]. Torch's fused
    attention passes no gradient to a bias, and would need past and own keys copied into one tensor.
    """
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.mT
    if past is None:
        return torch.softmax(scores + bias, -1) @ v
    weight = torch.softmax(torch.cat([q @ past[0].mT, scores], -1) + bias, -1)
    cut = past[0].shape[2]
    return weight[..., :cut] @ past[1] + weight[..., cut:] @ v
