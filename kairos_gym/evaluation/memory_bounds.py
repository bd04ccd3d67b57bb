"""Bounds: what theory says of a dream's memory, and of windows, computed beside what is measured.

Memory (Kairos, arXiv 2606.16533; the gated delta rule, arXiv 2412.06464). A token maps a layer's memory S to
alpha S (I - beta k k^T) + beta v k^T. With unit keys and 0 < beta < 1 this shrinks the Frobenius distance of two
memories to at most alpha times its size, and to exactly that in directions across k. (The paper's lemma asks for
|k|^2 < 1 - alpha, which unit keys never meet, so the factor here is alpha itself.) Take a memory S that is written from
dreamed frames and S* from the real ones; e_t = |S_t - S*_t|; rho_t the product of the alphas of a dreamed frame; and
xi_t the distance of what the dreamed and the real frame make of the same S*_{t-1}. Then

    e_t <= rho_t e_{t-1} + xi_t        and so        e_t <= rho^t e_0 + (1 - rho^t) / (1 - rho) xi

with rho and xi the largest of all steps. This bounds the memory, not the error of the decoded observations: a small
error of the memory may be large in what is read from it, and xi itself grows with the error of what was dreamed.
Windows forget all at once and need no bound; layers above them are bounded for the inputs that they get.

Windows (the paper's first theorem). Say that what a window shows leaves two outcomes open, mu1 with probability a and
mu2 with probability 1 - a, in an event of probability P. Then no predictor that sees the window alone has a mean
squared error below P a (1 - a) (mu1 - mu2)^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from world_model.model.mixing import DeltaMixing
from world_model.model.transformer import Block
from world_model.model.world_model import WorldModel
from world_model.ops.delta_layer import delta_layer_writes
from world_model.ops.delta_rule import delta_rule_recurrent
from world_model.ops.layout import Layout
from world_model.state import LatentState


@dataclass(frozen=True)
class MemoryDrift:
    """One gated-delta layer along T frames, for B dreams and each of its H heads."""

    error: Tensor  # [B,H,T+1] e_t, Frobenius; the first is before any frame
    rho: Tensor  # [B,H,T] rho_t, to which a dreamed frame shrinks any difference, at most
    xi: Tensor  # [B,H,T] xi_t, what one dreamed frame changes
    size: Tensor  # [B,H,T+1] Frobenius norm of the real memory: the scale of all these

    @property
    def running_bound(self) -> Tensor:
        """The bound with each step's own rho_t and xi_t -> [B,H,T+1]."""
        bounds = [self.error[..., 0]]
        for rho, xi in zip(self.rho.unbind(-1), self.xi.unbind(-1), strict=True):
            bounds.append(rho * bounds[-1] + xi)
        return torch.stack(bounds, -1)

    @property
    def closed_bound(self) -> Tensor:
        """The closed form, with the largest rho and xi of each dream and head -> [B,H,T+1]."""
        rho, xi = (x.amax(-1, keepdim=True) for x in (self.rho, self.xi))
        powers = rho ** torch.arange(self.error.shape[-1], dtype=rho.dtype, device=rho.device)
        before = torch.cat([torch.zeros_like(rho), powers[..., :-1]], -1).cumsum(-1)
        return powers * self.error[..., :1] + before * xi

    @property
    def retained(self) -> Tensor:
        """How much of a difference at the start is left, at most: the cumulative product of rho -> [B,H,T]."""
        return self.rho.cumprod(-1)

    @property
    def reach(self) -> Tensor:
        """Effective memory [B,H]: the steps after which a difference has shrunk to 1/e, at the mean rate."""
        return -1 / self.rho.clamp_min(1e-300).log().mean(-1)

    @property
    def tightness(self) -> Tensor:
        """The measured error over the running bound after the last frame, 1 where the bound is attained -> [B,H]."""
        return self.error[..., -1] / self.running_bound[..., -1].clamp_min(1e-300)


@torch.no_grad()
def memory_drift(
    model: WorldModel,
    state: LatentState,
    real: Tensor,
    dreamed: Tensor,
    actions: Tensor,
    other: LatentState | None = None,
) -> dict[int, MemoryDrift]:
    """Let the model observe real and dreamed frames [B,T,O], both with actions [B,T,A] -> MemoryDrift of each G layer.

    state: the memory of both at first, or of the real one alone, where ``other`` is that of the dreamed one.
    Raises ValueError where the shapes differ or no layer is a G.
    """
    if real.shape != dreamed.shape or real.shape[:2] != actions.shape[:2]:
        raise ValueError(
            "real and dreamed frames must be [B,T,O] and actions [B,T,A], got "
            f"{tuple(real.shape)}, {tuple(dreamed.shape)} and {tuple(actions.shape)}"
        )
    blocks = list(model.trunk.blocks)
    layers = [i for i, block in enumerate(blocks) if block.kind == "G"]
    if not layers:
        raise ValueError(f"no layer of {model.config.pattern!r} is a gated delta rule (G)")
    scaling, tokens, one_frame = model.scaling, model.tokens, Layout(1)
    memories = [dict(s.tensors) for s in (state, state if other is None else other)]  # real, dreamed
    age = state["age"]
    error = {i: [_norm(memories[1][f"{i}.S"] - memories[0][f"{i}.S"])] for i in layers}
    size = {i: [_norm(memories[0][f"{i}.S"])] for i in layers}
    rho: dict[int, list[Tensor]] = {i: [] for i in layers}
    xi: dict[int, list[Tensor]] = {i: [] for i in layers}
    for t in range(real.shape[1]):
        action = tokens.actions(scaling.action(actions[:, t : t + 1]), (age == 0)[:, None])
        worlds = [tokens.clean(scaling.obs(frames[:, t : t + 1])) for frames in (real, dreamed)]
        plays = [action, action]
        for i, block in enumerate(blocks):
            writes = _writes(block, worlds[1], plays[1]) if i in layers else None
            before = memories[0].get(f"{i}.S")
            for side in (0, 1):
                memory = {name: memories[side][f"{i}.{name}"] for name in block.mixing.names}
                worlds[side], plays[side], memory = block(worlds[side], plays[side], one_frame, memory, age)
                memories[side] |= {f"{i}.{name}": x for name, x in memory.items()}
            if writes is not None:
                keys, values, log_alpha, beta = writes
                assert before is not None
                _, with_dreamed = delta_rule_recurrent(keys[:, :, :0], keys, values, log_alpha, beta, before, [])
                after_real, after_dreamed = (side[f"{i}.S"] for side in memories)
                xi[i].append(_norm(with_dreamed - after_real))
                rho[i].append(log_alpha.sum(-1).exp())
                error[i].append(_norm(after_dreamed - after_real))
                size[i].append(_norm(after_real))
        age = age + 1
    return {i: MemoryDrift(*(torch.stack(parts[i], -1) for parts in (error, rho, xi, size))) for i in layers}


def window_floor(outcomes: Tensor) -> tuple[float, float]:
    """The mean squared errors that no predictor can go below that sees a situation alone -> the theorem's, the exact.

    outcomes [N,M]: for each of N situations that a window may show, M outcomes of the same probability. For the
    theorem's, each situation's outcomes are split into two parts, where that gives the largest floor, and each part
    stands for its mean. The exact one is the mean variance. Raises ValueError for M below 2.
    """
    ordered = outcomes.double().sort(-1).values
    m = ordered.shape[-1]
    if m < 2:
        raise ValueError(f"a situation needs 2 outcomes or more, got {m}")
    n = torch.arange(1, m, dtype=torch.float64)
    left = ordered.cumsum(-1)[..., :-1]
    gap = left / n - (ordered.sum(-1, keepdim=True) - left) / (m - n)
    between = n / m * (1 - n / m) * gap.square()
    return between.amax(-1).mean().item(), ordered.var(-1, correction=0).mean().item()


def _writes(block: Block, world: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a G layer writes for clean frames -> unit keys and values [B,H,N,d], log alpha and beta [B,H,N]."""
    assert isinstance(block.mixing, DeltaMixing)
    qkv, gates, _ = block.project(world, action)
    return delta_layer_writes(qkv, gates, block.mixing.log_rate)


def _norm(memory: Tensor) -> Tensor:
    """Frobenius norm of [B,H,e,d] -> [B,H]."""
    return memory.flatten(-2).norm(dim=-1)
