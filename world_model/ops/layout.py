"""Which frames one pass of the transformer holds, and the tokens of its two streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The frames of one pass: first ``clean`` real ones, at times 0, 1, ...; then noisy chunks of ``chunk`` frames.

    The noisy chunk that starts at time ``starts[j]`` sees the memory as it stood before that time, and itself.
    """

    clean: int
    starts: tuple[int, ...] = ()
    chunk: int = 1

    @property
    def noisy(self) -> int:
        return len(self.starts) * self.chunk

    @property
    def frames(self) -> int:
        return self.clean + self.noisy


class Streams(NamedTuple):
    """One quantity of both modalities' tokens: a frame has P world tokens, then one action token."""

    world: Tensor  # [B,F,P,...]
    action: Tensor  # [B,F,1,...]

    @property
    def group(self) -> int:
        """Tokens a frame, P + 1."""
        return self.world.shape[2] + 1

    def in_time(self) -> Tensor:
        """All tokens in the order of time -> [B,F*(P+1),...]."""
        return torch.cat([self.world, self.action], 2).flatten(1, 2)

    def split_heads(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [...,3*H*d] of both streams -> each [B,H,N,d], in the order of time."""
        q, k, v = self.in_time().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    @classmethod
    def of_heads(cls, tokens: Tensor, group: int) -> Streams:
        """All heads' output in the order of time [B,H,N,d] -> both streams, [B,F,P,H*d] and [B,F,1,H*d]."""
        frames = tokens.transpose(1, 2).flatten(-2).unflatten(1, (-1, group))
        return cls(frames[:, :, :-1], frames[:, :, -1:])
