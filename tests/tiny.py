"""Tiny world models whose every number is random: what is zero or one at birth hides mistakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from toys import box_spec

from world_model.contract import Imagined
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import StartStates, WorldModel

SIZES: dict[str, Any] = dict(
    width=8, action_width=6, heads=2, head_dim=4, window=3, dilation=2, taps=2, draft_width=8, draft_blocks=1
)


def tiny_model(
    pattern: str = "SDG",
    *,
    obs_dim: int = 3,
    action_dim: int = 2,
    chunk: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **sizes: Any,
) -> WorldModel:
    """Weights, units and the draft's usual error all random; actions within +-2."""
    config = WorldModelConfig(obs_dim, action_dim, pattern=pattern, chunk=chunk, **{**SIZES, **sizes})
    torch.manual_seed(seed)
    model = WorldModel(config, box_spec(obs_dim, action_dim, bound=2.0, chunk=chunk)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for name in ("obs_mean", "reward_mean"):
            getattr(model.scaling, name).normal_()
        for positive in (model.scaling.obs_std, model.scaling.reward_std, model.scaling.step_std, model.draft_error):
            positive.uniform_(0.3, 1.5)
        model.terminates.fill_(True)
    return model.eval().requires_grad_(False)


def dreamer(pattern: str = "SDG") -> WorldModel:
    """A tiny world model to begin dreams with, which never ends one."""
    model = tiny_model(pattern)
    model.terminates.fill_(False)
    torch.manual_seed(1)
    model.starts = StartStates(torch.randn(6, 2, 3), torch.rand(6, 2, 2))
    return model


def dreamt(imagined: Imagined) -> Tensor:
    """The observations [B,K,O] of a chunk that was decoded."""
    assert imagined.obs is not None
    return imagined.obs
