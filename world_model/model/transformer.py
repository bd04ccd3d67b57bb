"""The Mixture-of-Transformers trunk: weights per modality, one shared memory (Kairos, arXiv 2606.16533).

World tokens and action tokens have their own norms, projections and feed-forward weights and meet only in the temporal
mixing, where both read and write the same memory. One forward serves training (many frames, many noisy chunks, no
memory before them), evidence (clean frames onto a memory) and denoising (one noisy chunk onto a memory), so that
what is streamed is what was trained.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from world_model.model.config import WorldModelConfig
from world_model.model.mixing import DeltaMixing, Memory, WindowMixing
from world_model.ops.layout import Layout, Streams
from world_model.ops.linear import norm_linear, silu_linear


class Stream(nn.Module):
    """One modality's weights in one layer: a norm, one projection in (mixing and feed-forward at once), one out."""

    def __init__(self, width: int, inner: int, gates: int, expand: int):
        super().__init__()
        self.sizes = [3 * inner, gates, expand * width]
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, sum(self.sizes))
        self.out_proj = nn.Linear(inner + expand * width, width)
        nn.init.zeros_(self.out_proj.bias)
        self.out_proj.weight.data *= 0.5

    def project(self, x: Tensor) -> list[Tensor]:
        """[...,D] -> queries, keys and values [...,3*inner], gates [...,g], feed-forward [...,expand*D]."""
        return list(norm_linear(x, self.norm, self.in_proj).split(self.sizes, -1))

    def join(self, x: Tensor, mixed: Tensor, hidden: Tensor) -> Tensor:
        """x [...,D] plus the projection of what was mixed [...,inner] and of silu(hidden) [...,expand*D]."""
        return silu_linear(hidden, self.out_proj, extra=mixed, base=x)


class Block(nn.Module):
    """One layer: temporal mixing of its kind (S, D or G), beside a feed-forward (in parallel, one residual).

    After the last layer only noisy world tokens are read, so there the others stop at what they write into the memory.
    """

    def __init__(self, kind: str, config: WorldModelConfig, last: bool):
        super().__init__()
        self.kind, self.last = kind, last
        self.mixing = DeltaMixing(config, last) if kind == "G" else WindowMixing(kind, config, last)
        inner, gates = config.heads * config.head_dim, self.mixing.gates
        self.world = Stream(config.width, inner, gates, config.expand)
        self.action = Stream(config.action_width, inner, gates, 0 if last else config.expand)
        if last:
            del self.action.out_proj

    def project(self, world: Tensor, action: Tensor) -> tuple[Streams, Streams, Streams]:
        """Tokens of both streams -> queries, keys and values; gates; feed-forward."""
        qkv, gates, hidden = zip(self.world.project(world), self.action.project(action), strict=True)
        return Streams(*qkv), Streams(*gates), Streams(*hidden)

    def forward(
        self, world: Tensor, action: Tensor, layout: Layout, memory: Memory | None, age: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """world [B,F,P,D], action [B,F,1,Da] of the layout's frames -> the same, and the memory after the clean frames.

        The last layer gives the world tokens of the noisy frames alone.
        memory: None stands for an empty one. age: int64 [B], frames that each row's memory has seen (None: 0).
        """
        qkv, gates, hidden = self.project(world, action)
        mixed, memory = self.mixing(qkv, gates, layout, memory, age)
        if self.last:
            noisy, clean = mixed.world.shape[1] - layout.noisy, layout.clean
            return self.world.join(world[:, clean:], mixed.world[:, noisy:], hidden.world[:, clean:]), action, memory
        world = self.world.join(world, mixed.world, hidden.world)
        return world, self.action.join(action, mixed.action, hidden.action), memory


class Trunk(nn.Module):
    """The layers of the pattern, one after the other, each with its own memory."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.blocks: Iterable[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(kind, config, last=i + 1 == len(config.pattern)) for i, kind in enumerate(config.pattern)
        )

    def empty(self, batch: int, like: Tensor) -> Memory:
        """The memories of all layers, named ``"<layer>.<tensor>"``, for B dreams that have seen nothing."""
        return {
            f"{i}.{name}": t
            for i, block in enumerate(self.blocks)
            for name, t in block.mixing.empty(batch, like).items()
        }

    def forward(
        self, world: Tensor, action: Tensor, layout: Layout, memory: Memory | None = None, age: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """world [B,F,P,D], action [B,F,1,Da] -> the noisy world tokens [B,C*K,P,D], memories after the clean frames."""
        after: Memory = {}
        for i, block in enumerate(self.blocks):
            own = None if memory is None else {name: memory[f"{i}.{name}"] for name in block.mixing.names}
            world, action, new = block(world, action, layout, own, age)
            after |= {f"{i}.{name}": t for name, t in new.items()}
        return world, after
