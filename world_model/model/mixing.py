"""The temporal mixing of a layer: what it learns, and what it remembers of the frames before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from world_model.model.config import WorldModelConfig
from world_model.ops.delta_layer import delta_layer
from world_model.ops.layout import Layout, Streams
from world_model.ops.window_layer import Window, window_layer

Memory = dict[str, Tensor]  # a layer's tensors, each [B, ...]


class DeltaMixing(nn.Module):
    """G: the gated delta rule (arXiv 2412.06464), whose memory is one matrix [d,d] a head, however long the past."""

    names = ("S",)

    def __init__(self, config: WorldModelConfig, last: bool):
        super().__init__()
        self.heads, self.dim, self.last = config.heads, config.head_dim, last
        self.gates = 2 * self.heads  # decay and write strength
        # Memories of about 2 to 200 tokens at first, spread over the heads, as Mamba-2 has them (arXiv 2405.21060).
        self.log_rate = nn.Parameter(torch.linspace(-0.7, -5.0, self.heads))

    def empty(self, batch: int, like: Tensor) -> Memory:
        """The memory of B dreams that have seen nothing."""
        return {"S": like.new_zeros(batch, self.heads, self.dim, self.dim)}

    def forward(
        self, qkv: Streams, gates: Streams, layout: Layout, memory: Memory | None, age: Tensor | None
    ) -> tuple[Streams, Memory]:
        state = (memory or self.empty(len(qkv.world), qkv.world))["S"]
        mixed, state = delta_layer(qkv, gates, self.log_rate, state, layout, last=self.last)
        return mixed, {"S": state}


class WindowMixing(nn.Module):
    """S and D: attention over a sliding or dilated window, whose memory is the keys and values of the last frames."""

    names = ("k", "v")
    gates = 0

    def __init__(self, kind: str, config: WorldModelConfig, last: bool):
        super().__init__()
        self.heads, self.dim, self.last = config.heads, config.head_dim, last
        stride, past = (1, config.window) if kind == "S" else (config.dilation, config.dilation * config.taps)
        self.window = Window(stride, past, config.chunk - 1)
        self.buffer = past * (config.tokens + 1)  # tokens
        self.relative_bias = nn.Parameter(torch.zeros(self.heads, past + config.chunk))

    def empty(self, batch: int, like: Tensor) -> Memory:
        """The memory of B dreams that have seen nothing."""
        return {name: like.new_zeros(batch, self.heads, self.buffer, self.dim) for name in self.names}

    def forward(
        self, qkv: Streams, gates: Streams, layout: Layout, memory: Memory | None, age: Tensor | None
    ) -> tuple[Streams, Memory]:
        return window_layer(qkv, self.relative_bias, self.window, layout, memory, age, last=self.last)
