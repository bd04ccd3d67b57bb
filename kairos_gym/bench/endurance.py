"""Many steps of many dreams: whether a dream's memory and the cost of a step stay the same."""

from __future__ import annotations

import copy
import resource
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kairos_gym.bench.env import TinyMLP
from kairos_gym.bench.harness import Job, Row, imagine_job, kernels_of
from kairos_gym.dream.envs import DreamVectorEnv
from kairos_gym.evaluation.timing import interleaved_rates
from kairos_gym.models import load
from kairos_gym.report import machine
from world_model.model.world_model import WorldModel
from world_model.ops.layout import Layout, Streams

ROUNDS = 9
CALLS = 5  # chunks imagined in a row, of a turn


def endurance(model: str | None = None, dreams: int = 64, steps: int = 100_000) -> Row:
    """Many steps of many dreams: the bytes of their state, resident memory, and what a step costs early and late.

    Milliseconds a step are medians of the first tenth, of all and of the last tenth. Of a world model also beside what
    one dream costs whose layers are full attention with a cache of all frames.

    Args:
        model: a shipped model or a folder; left out, a tiny MLP (2x256)
        dreams: how many side by side
        steps: how many of each
    """
    world: Any = load(model) if model else TinyMLP()
    vector = DreamVectorEnv(world, dreams, max_episode_steps=10**9)
    vector.reset(seed=0)
    vector.action_space.seed(0)
    actions = [vector.action_space.sample() for _ in range(64)]
    size, count = vector.state.nbytes, max(1, steps // 100)
    seconds, resident, finite = [], [], True
    for played in range(0, steps, count):
        start = time.thread_time()
        for i in range(count):
            obs, *_ = vector.step(actions[(played + i) % len(actions)])
        seconds.append((time.thread_time() - start) / count)
        finite &= bool(np.isfinite(obs).all())
        resident.append(_resident())
    tenth = max(1, len(seconds) // 10)
    row = {
        "bench": "endurance",
        "model": model or "MLP 2x256",
        "dreams": dreams,
        "steps": steps,
        "state_bytes": (size, vector.state.nbytes),
        "resident_mb": (resident[len(resident) // 10], resident[-1]),
        "ms_a_step": [1000 * statistics.median(part) for part in (seconds[:tenth], seconds, seconds[-tenth:])],
        "finite": finite,
        "machine": machine(),
    }
    if model:
        frames = [n for n in (100, 1000, 10_000, 100_000) if n <= max(steps, 100)]
        row["one_dream_after_frames"] = [_beside_full_attention(world, n) for n in frames]
    return row


class FullAttention(nn.Module):
    """Takes the place of a layer's mixing and attends to every frame there ever was: its cache grows for ever."""

    names, gates = ("age",), 0

    def __init__(self, world: WorldModel, frames: int):
        """As if ``frames`` frames had been seen. The cache is written in place and never copied."""
        super().__init__()
        config = world.config
        self.heads, self.group = config.heads, config.tokens + 1
        room = (frames + 1000) * self.group
        self.cache = torch.randn(2, 1, self.heads, room, config.head_dim)  # keys and values
        self.length = frames * self.group  # tokens written so far
        self.nbytes = 4 * self.cache[:, :, :, : self.length].numel()

    def empty(self, batch: int, like: Tensor) -> dict[str, Tensor]:
        return {"age": like.new_zeros(batch)}

    def forward(
        self, qkv: Streams, gates: Streams, layout: Layout, memory: dict[str, Tensor], age: Tensor | None
    ) -> tuple[Streams, dict[str, Tensor]]:
        q, k, v = qkv.split_heads(self.heads)
        end = self.length + k.shape[2]
        self.cache[0, :, :, self.length : end], self.cache[1, :, :, self.length : end] = k, v
        mixed = F.scaled_dot_product_attention(q, *self.cache[:, :, :, :end])
        if layout.clean:
            self.length = end
        return Streams.of_heads(mixed, self.group), memory


def _beside_full_attention(world: WorldModel, frames: int) -> Row:
    """Milliseconds an imagined chunk of one dream that has seen so many frames, and the bytes of its memory."""
    full, layers = copy.deepcopy(world), list[FullAttention]()
    for block in full.trunk.blocks:
        layers.append(FullAttention(world, frames))
        block.mixing = layers[-1]  # type: ignore[assignment]
    low, high = world.scaling.action_low, world.scaling.action_high
    chunk = torch.zeros(1, world.config.chunk, world.config.action_dim).clamp(low, high)
    first = torch.zeros(1, 1, world.config.obs_dim)
    with kernels_of("torch"):  # the compiled step knows the model's own layers alone
        ours_start, full_start = (m.observe(m.initial(1), first) for m in (world, full))
    jobs: dict[str, Job] = {
        "full attention, torch": kernels_of("torch")(imagine_job(full, full_start, chunk, CALLS)),
        "ours, torch": kernels_of("torch")(imagine_job(world, ours_start, chunk, CALLS)),
        "ours": kernels_of("auto")(imagine_job(world, ours_start, chunk, CALLS)),
    }
    rates = interleaved_rates(jobs, ROUNDS)
    return {
        "frames": frames,
        "bytes": {"full attention": sum(layer.nbytes for layer in layers), "ours": ours_start.nbytes},
        "ms": {name: 1000 * world.config.chunk / statistics.median(rate) for name, rate in rates.items()},
    }


def _resident() -> float:
    """Resident memory in MB: now where the kernel tells, else the most so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
