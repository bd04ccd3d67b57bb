"""Normalised observations and actions to tokens, and tokens back to what is read off them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from world_model.model.config import WorldModelConfig


class Tokens(nn.Module):
    """A frame is P world tokens and one action token; here are the doors in and out of both streams.

    The streams have the weights' own precision, also under autocast: layers add to them.
    """

    frequencies: Tensor

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        size, p, d = config.obs_dim, config.tokens, config.width
        self.shape = (p, d)
        self.clean_in = nn.Linear(size, p * d)
        self.noisy_in = nn.Linear(4 * size, p * d)
        self.level_in = nn.Linear(16, p * d)
        self.position = nn.Parameter(torch.zeros(config.chunk, p * d))  # where in its chunk a noisy frame stands
        self.action_in = nn.Linear(config.action_dim, config.action_width)
        self.no_action = nn.Parameter(
            torch.randn(config.action_width) * 0.1
        )  # stands for the action before a first frame
        self.norm = nn.LayerNorm(p * d)
        self.out = nn.Linear(p * d, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("frequencies", torch.exp2(torch.arange(8.0)) * torch.pi / 2, persistent=False)

    def clean(self, obs: Tensor) -> Tensor:
        """Normalised observations [B,T,O] -> [B,T,P,D]."""
        return self.clean_in(obs).to(self.position.dtype).unflatten(-1, self.shape)

    def noisy(self, z: Tensor, s: Tensor, draft: Tensor, change: Tensor, log_std: Tensor) -> Tensor:
        """The frames being denoised -> [B,C,K,P,D], for C chunks.

        z [B,C,K,O] the scaled residual at noise level s [B or 1,C or 1,1,1]; and what is known without it, all
        [B,C,K,O]: the draft, its change since the chunk's start, and its log std.
        """
        angle = s * self.frequencies
        level = self.level_in(torch.cat([angle.sin(), angle.cos()], -1))
        x = self.noisy_in(torch.cat([z, draft, change, log_std], -1))
        return (x + level + self.position[: z.shape[2]]).unflatten(-1, self.shape)

    def actions(self, actions: Tensor, first: Tensor | None = None) -> Tensor:
        """Scaled actions [B,T,A] -> [B,T,1,Da]; ``first`` (bool [B,T]) marks frames that no action led to."""
        x = self.action_in(actions).to(self.no_action.dtype)
        if first is not None:
            x = torch.where(first[..., None], self.no_action, x)
        return x[:, :, None]

    def features(self, world: Tensor) -> Tensor:
        """World tokens [B,F,P,D] -> [B,F,P*D], what the readouts read."""
        return self.norm(world.flatten(-2))
