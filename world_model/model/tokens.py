"""Observations and actions to tokens, and world tokens to the features that the readouts take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from world_model.model.config import WorldModelConfig


class Tokens(nn.Module):
    """Embeds frames, each as P world tokens and one action token, and reads world tokens out.

    Tokens keep the weights' precision, also under autocast, since every layer adds to them.
    """

    frequencies: Tensor

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        size, p, d = config.obs_dim, config.tokens, config.width
        self.shape = (p, d)
        self.clean_in = nn.Linear(size, p * d)
        self.noisy_in = nn.Linear(4 * size, p * d)
        self.level_in = nn.Linear(16, p * d)
        self.position = nn.Parameter(torch.zeros(config.chunk, p * d))  # of a noisy frame in its chunk
        self.action_in = nn.Linear(config.action_dim, config.action_width)
        self.no_action = nn.Parameter(torch.randn(config.action_width) * 0.1)  # in place of a first frame's action
        self.norm = nn.LayerNorm(p * d)
        self.out = nn.Linear(p * d, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("frequencies", torch.exp2(torch.arange(8.0)) * torch.pi / 2, persistent=False)

    def clean(self, obs: Tensor) -> Tensor:
        """Normalised observations [B,T,O] -> world tokens [B,T,P,D]."""
        return self.clean_in(obs).to(self.position.dtype).unflatten(-1, self.shape)

    def noisy(self, z: Tensor, s: Tensor, draft: Tensor, change: Tensor, log_std: Tensor) -> Tensor:
        """The frames of C chunks that are being denoised -> world tokens [B,C,K,P,D].

        z [B,C,K,O]: the scaled residual at noise level s [B or 1,C or 1,1,1]. The draft's prediction, its change since
        the chunk's start and its log std, each [B,C,K,O], are known without noise.
        """
        angle = s * self.frequencies
        level = self.level_in(torch.cat([angle.sin(), angle.cos()], -1))
        x = self.noisy_in(torch.cat([z, draft, change, log_std], -1))
        return (x + level + self.position[: z.shape[2]]).unflatten(-1, self.shape)

    def actions(self, actions: Tensor, first: Tensor | None = None) -> Tensor:
        """Actions in [-1,1] [B,T,A] -> action tokens [B,T,1,Da]; first: bool [B,T], frames that no action led to."""
        x = self.action_in(actions).to(self.no_action.dtype)
        if first is not None:
            x = torch.where(first[..., None], self.no_action, x)
        return x[:, :, None]

    def features(self, world: Tensor) -> Tensor:
        """World tokens [B,F,P,D] -> the inputs of the readouts [B,F,P*D]."""
        return self.norm(world.flatten(-2))
