"""The Mixture-of-Transformers trunk: weights per modality, one shared memory (Kairos, arXiv 2606.16533).

World tokens and action tokens have their own norms, projections and feed-forward weights and meet only in the temporal
mixing, where both read and write the same memory. One forward serves training (many frames, many noisy chunks, no
memory before them), evidence (clean frames onto a memory) and denoising (one noisy chunk onto a memory), so that
what is streamed is what was trained.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from world_model.model.config import WorldModelConfig
from world_model.ops.delta_rule import delta
from world_model.ops.delta_rule_cpu import mix
from world_model.ops.linear import norm_linear, silu_linear
from world_model.ops.native import compiled, needs_grad, use_triton
from world_model.ops.window_attention import Layout, attend, visible
from world_model.ops.window_attention_cpu import attend_streams

Memory = dict[str, Tensor]  # a layer's tensors, each [B, ...]


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

    def split(self, x: Tensor) -> list[Tensor]:
        """[...,D] -> queries, keys and values [...,3*inner], gates [...,g], feed-forward [...,expand*D]."""
        return list(norm_linear(x, self.norm, self.in_proj).split(self.sizes, -1))

    def join(self, x: Tensor, mixed: Tensor, hidden: Tensor) -> Tensor:
        return silu_linear(hidden, self.out_proj, beside=mixed, base=x)


class Block(nn.Module):
    """One layer: the temporal mixing that its letter names, beside a feed-forward (in parallel, one residual).

    After the last layer only noisy world tokens are read, so there the others stop at what they write into the memory.
    """

    def __init__(self, kind: str, config: WorldModelConfig, last: bool):
        super().__init__()
        self.last = last
        self.kind, self.heads, self.dim = kind, config.heads, config.head_dim
        self.group = config.tokens + 1  # tokens a frame: the world's, then the action's
        inner = self.heads * self.dim
        gates = 2 * self.heads if kind == "G" else 0
        self.world = Stream(config.width, inner, gates, config.expand)
        self.action = Stream(config.action_width, inner, gates, 0 if last else config.expand)
        if last:
            del self.action.out_proj
        if kind == "G":
            # Memories of about 2 to 200 tokens to begin with, spread over the heads (as in Mamba-2).
            self.log_rate = nn.Parameter(torch.linspace(-0.7, -5.0, self.heads))
        else:
            self.stride, self.past = (
                (1, config.window) if kind == "S" else (config.dilation, config.dilation * config.taps)
            )
            self.ahead = config.chunk - 1  # inside a chunk a frame sees up to this many frames ahead
            self.relative_bias = nn.Parameter(torch.zeros(self.heads, self.past + config.chunk))

    @property
    def names(self) -> tuple[str, ...]:
        return ("S",) if self.kind == "G" else ("k", "v")

    def empty(self, batch: int, like: Tensor) -> Memory:
        """The memory of a dream that has seen nothing."""
        return {name: like.new_zeros(self._shape(batch)) for name in self.names}

    def _shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of each tensor of the memory."""
        return batch, self.heads, self.dim if self.kind == "G" else self.past * self.group, self.dim

    def forward(
        self, world: Tensor, action: Tensor, layout: Layout, memory: Memory | None, age: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """world [B,F,P,D], action [B,F,1,Da] of the layout's frames -> the same, and the memory after the clean frames.

        The last layer gives the world tokens of the noisy frames alone.
        memory: None stands for an empty one. age: int64 [B], frames that each row's memory has seen (None: 0).
        """
        qkv_w, gate_w, hidden_w = self.world.split(world)
        qkv_a, gate_a, hidden_a = self.action.split(action)
        if self.kind == "G":
            memory = memory or self.empty(world.shape[0], world)
        state = memory["S"] if memory is not None and self.kind == "G" else None
        fits = memory is not None and all(t.shape == self._shape(world.shape[0]) for t in memory.values())
        given = (qkv_w, qkv_a, gate_w, gate_a, layout, memory, age)
        if state is not None and fits and layout.clean and (library := compiled("delta", world, state)):
            at, skip = self._reads(layout)
            sizes = (layout.clean, layout.chunk, skip)
            mixed_w, mixed_a, state = mix(library, qkv_w, qkv_a, gate_w, gate_a, self.log_rate, state, at, sizes)
            new = {"S": state}
        elif self.kind != "G" and memory is None and (library := compiled("attention", world)):
            mixed_w, mixed_a = attend_streams(library, qkv_w, qkv_a, *self._bias(layout, 0, world))
            new = self._last_frames(qkv_w[:, : layout.clean], qkv_a[:, : layout.clean])
        elif memory is not None and fits and self._streams(layout, qkv_w, qkv_a, *memory.values()):
            mixed_w, mixed_a, new = self._streamed(*given)
        else:
            mixed_w, mixed_a, new = self._mixed(*given)
        if self.last:
            mixed_w = mixed_w[:, mixed_w.shape[1] - layout.noisy :]
            return (
                self.world.join(world[:, layout.clean :], mixed_w, hidden_w[:, layout.clean :]),
                action,
                new,
            )
        return self.world.join(world, mixed_w, hidden_w), self.action.join(action, mixed_a, hidden_a), new

    def _mixed(
        self,
        qkv_w: Tensor,
        qkv_a: Tensor,
        gate_w: Tensor,
        gate_a: Tensor,
        layout: Layout,
        memory: Memory | None,
        age: Tensor | None,
    ) -> tuple[Tensor, Tensor, Memory]:
        """The temporal mixing -> answers of the frames that are asked for [B,F,P,I], [B,F,1,I], the memory after."""
        q, k, v = self._tokens(qkv_w, qkv_a)
        if self.kind == "G":
            assert memory is not None
            mixed, new = self._delta(q, k, v, torch.cat([gate_w, gate_a], 2).flatten(1, 2), layout, memory["S"])
        else:
            mixed, new = self._window(q, k, v, layout, memory, age)
        return *self._apart(mixed), new

    def _streams(self, layout: Layout, *tensors: Tensor) -> bool:
        """Whether a GPU's kernels do it: they pass no gradients, and a G layer's take clean frames or one chunk."""
        tensors = (*tensors, self.log_rate if self.kind == "G" else self.relative_bias)
        batch_of_one = self.kind != "G" or len(layout.starts) + (layout.clean > 0) == 1
        return batch_of_one and self.dim <= 256 and not needs_grad(*tensors) and use_triton(*tensors)

    def _streamed(
        self,
        qkv_w: Tensor,
        qkv_a: Tensor,
        gate_w: Tensor,
        gate_a: Tensor,
        layout: Layout,
        memory: Memory | None,
        age: Tensor | None,
    ) -> tuple[Tensor, Tensor, Memory]:
        """``_mixed`` onto a memory in one kernel of a GPU."""
        from world_model.ops.delta_layer_triton import read_chunk, write_chunk
        from world_model.ops.window_attention_triton import attend_window

        assert memory is not None
        if self.kind != "G":
            assert age is not None
            bias, _ = self._bias(layout, self.past, self.relative_bias)
            mixed_w, mixed_a, k, v = attend_window(qkv_w, qkv_a, bias, memory["k"], memory["v"], age, layout.clean)
            return mixed_w, mixed_a, {"k": k, "v": v}
        if layout.noisy:
            return *read_chunk(qkv_w, qkv_a, memory["S"]), memory
        mixed_w, mixed_a, state = write_chunk(
            qkv_w, qkv_a, gate_w, gate_a, self.log_rate, memory["S"], ask=not self.last
        )
        return mixed_w, mixed_a, {"S": state}

    def written(self, world: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a G layer writes for clean frames -> unit keys, values [B,H,N,d], log alpha, beta [B,H,N]."""
        qkv_w, gate_w, _ = self.world.split(world)
        qkv_a, gate_a, _ = self.action.split(action)
        _, k, v = self._tokens(qkv_w, qkv_a)
        return F.normalize(k, dim=-1), v, *self._gates(torch.cat([gate_w, gate_a], 2).flatten(1, 2))

    def _tokens(self, qkv_w: Tensor, qkv_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of both streams' tokens in the order of time, each [B,H,N,d]."""
        tokens = torch.cat([qkv_w, qkv_a], 2).flatten(1, 2)  # [B,F*(P+1),3*inner]
        q, k, v = tokens.unflatten(-1, (3, self.heads, self.dim)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _apart(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """What all tokens were answered [B,H,N,d] -> the two streams' [B,F,P,I], [B,F,1,I]."""
        tokens = mixed.transpose(1, 2).flatten(-2).unflatten(1, (-1, self.group))
        return tokens[:, :, :-1], tokens[:, :, -1:]

    def _gates(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Log alpha and beta, each [B,H,N]."""
        rate, beta = gates.to(self.log_rate.dtype).unflatten(-1, (2, self.heads)).permute(2, 0, 3, 1)
        return -self.log_rate.exp()[:, None] * F.softplus(rate), torch.sigmoid(beta)

    def _delta(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, layout: Layout, state: Tensor
    ) -> tuple[Tensor, Memory]:
        q, k = F.normalize(torch.stack([q, k]), dim=-1)
        cut = layout.clean * self.group
        log_alpha, beta = self._gates(gates[:, :cut])
        at, skip = self._reads(layout)
        keys, values = k[:, :, :cut], v[:, :, :cut]
        out, state = delta(q[:, :, skip:], keys, values, log_alpha, beta, state, at)
        out = F.layer_norm(out * self.dim**0.5, (self.dim,), eps=1e-2)
        if layout.noisy:
            # The frames of a chunk see each other by plain attention; what lies before them only by the memory.
            count = len(layout.starts)
            qc, kc, vc = (
                x[:, :, cut:].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1) for x in (q * self.dim, k, v)
            )
            own = attend(qc, kc, vc, q.new_zeros(1, 1, 1)).unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)
            before = cut - skip
            out = torch.cat([out[:, :, :before], out[:, :, before:] + own], 2)
        return out, {"S": state}

    def _reads(self, layout: Layout) -> tuple[list[int], int]:
        """After how many keys each query of a G layer reads, and how many before them nobody asks for."""
        cut = layout.clean * self.group
        skip = cut if self.last else 0
        noisy = (start * self.group for start in layout.starts for _ in range(layout.chunk * self.group))
        return [*range(1 + skip, cut + 1), *noisy], skip

    def _window(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, memory: Memory | None, age: Tensor | None
    ) -> tuple[Tensor, Memory]:
        past = 0 if memory is None else self.past
        cut = layout.clean * self.group
        bias, skip = self._bias(layout, past, q)
        if memory is not None:
            assert age is not None
            alive = torch.arange(past, 0, -1, device=q.device) <= age[:, None]  # [B,past]: slots already written
            alive = F.pad(alive.repeat_interleave(self.group, -1), (0, layout.frames * self.group), value=True)
            bias = bias + torch.where(alive, 0.0, -torch.inf).to(q)[:, None, None]
        out = attend(q[:, :, skip:], k, v, bias, None if memory is None else (memory["k"], memory["v"]))
        if memory is None:
            return out, self._filled(k[:, :, :cut], v[:, :, :cut])
        if not cut:
            return out, memory
        size = self.past * self.group
        return out, {
            name: torch.cat([memory[name][:, :, cut:], x[:, :, :cut][:, :, -size:]], 2)
            for name, x in (("k", k), ("v", v))
        }

    def _bias(self, layout: Layout, past: int, like: Tensor) -> tuple[Tensor, int]:
        """What is added to the scores of all queries that are asked [H,R,N], and how many before them are not."""
        sizes = (self.stride, self.past, self.group, self.ahead)
        select, mask = visible(layout, past, *sizes, like.device, like.dtype)
        skip = layout.clean * self.group if self.last else 0
        return ((self.relative_bias @ select).unflatten(-1, mask.shape) + mask)[:, skip:], skip

    def _last_frames(self, qkv_w: Tensor, qkv_a: Tensor) -> Memory:
        """The buffers after clean frames before which there was nothing."""
        _, k, v = self._tokens(qkv_w[:, -self.past :], qkv_a[:, -self.past :])
        return self._filled(k, v)

    def _filled(self, k: Tensor, v: Tensor) -> Memory:
        """Keys and values of clean frames before which there was nothing: the empty slots come first."""
        size = self.past * self.group
        return {name: F.pad(x, (0, 0, size, 0))[:, :, -size:] for name, x in (("k", k), ("v", v))}


class Trunk(nn.Module):
    """The layers of the pattern, one after the other, each with its own memory."""

    def __init__(self, config: WorldModelConfig):
        super().__init__()
        self.blocks: Iterable[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(kind, config, last=i + 1 == len(config.pattern)) for i, kind in enumerate(config.pattern)
        )

    def empty(self, batch: int, like: Tensor) -> Memory:
        """The memories of all layers, named ``"<layer>.<tensor>"``, for B dreams that have seen nothing."""
        return {f"{i}.{name}": t for i, block in enumerate(self.blocks) for name, t in block.empty(batch, like).items()}

    def forward(
        self, world: Tensor, action: Tensor, layout: Layout, memory: Memory | None = None, age: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """world [B,F,P,D], action [B,F,1,Da] -> the noisy world tokens [B,C*K,P,D], memories after the clean frames."""
        after: Memory = {}
        for i, block in enumerate(self.blocks):
            own = None if memory is None else {name: memory[f"{i}.{name}"] for name in block.names}
            world, action, new = block(world, action, layout, own, age)
            after |= {f"{i}.{name}": t for name, t in new.items()}
        return world, after
