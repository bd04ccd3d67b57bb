"""What a step of the env costs beside the network that it wraps, and whether it stays the same for 100,000 steps."""

from __future__ import annotations

import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

from kairos_gym.bench.kernels import kernels_of
from kairos_gym.dream.env import DreamEnv
from kairos_gym.dream.vector_env import DreamVectorEnv
from kairos_gym.models import load
from kairos_gym.report import Cell, as_text, machine
from world_model.contract import Imagined, Spec
from world_model.model.world_model import WorldModel
from world_model.ops.layout import Layout, Streams
from world_model.state import LatentState

SIZES = {1: 1000, 16: 600, 64: 300, 256: 100, 1024: 30}  # dreams: steps in a round
ROUNDS = 9


class TinyMLP:
    """Two hidden layers of 256 behind the ``Dynamics`` verbs: observation 17 and action 6, as HalfCheetah has them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(23, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 18)]
        self.net = nn.Sequential(*layers).requires_grad_(False)
        self.spec = Spec(spaces.Box(-np.inf, np.inf, (17,)), spaces.Box(-1, 1, (6,)), 1, 1.0)
        self.never = torch.zeros(0, 1, dtype=torch.bool)
        self.starts = SimpleNamespace(obs=torch.zeros(1, 1, 17), actions=torch.zeros(1, 1, 6))

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The bare network: obs [B,1,O], actions [B,1,A] -> the next obs [B,1,O], reward [B,1]."""
        out = self.net(torch.cat([obs, actions], -1))
        return obs + 0.01 * out[..., :17], out[..., 17]

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        return LatentState({"obs": torch.zeros(batch, 1, 17)})

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        return LatentState({"obs": obs[:, -1:]})

    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        obs, reward = self.forward(state["obs"], actions)
        if len(self.never) != len(reward):
            self.never = torch.zeros_like(reward, dtype=torch.bool)
        return LatentState({"obs": obs}), Imagined(obs, reward, self.never)


def env(model: str | None = None) -> dict[str, Any]:
    """Steps a CPU-second of the env beside those of the bare network, by turns in one run; medians of 9 rounds.

    Args:
        model: a shipped model or a folder; left out, a tiny MLP (2x256)
    """
    rows = [_row(load(model) if model else TinyMLP(), batch, steps) for batch, steps in SIZES.items()]
    names = [name for name in rows[-1] if name != "dreams"]
    cells: list[list[Cell]] = [
        [row["dreams"]] + [f"{row[name]:,.0f} ({row[name] / row[names[0]]:.0%})" for name in names] for row in rows
    ]
    print(as_text(["dreams", *names], cells))
    return {"bench": "env", "model": model or "MLP 2x256", "rows": rows, "machine": machine()}


def _row(model: Any, batch: int, steps: int) -> dict[str, Any]:
    vector, single = DreamVectorEnv(model, batch, max_episode_steps=10**9), DreamEnv(model, max_episode_steps=10**9)
    steps = steps if isinstance(model, TinyMLP) else max(3, steps // 30)
    played = np.random.default_rng(0).uniform(-1, 1, vector.action_space.shape or ()).astype(np.float32)
    low, high = model.spec.action_box.low, model.spec.action_box.high
    played = (low + (played + 1) / 2 * (high - low)).astype(np.float32)
    actions = torch.from_numpy(played)
    vector.reset(seed=0)
    single.reset(seed=0)
    begun = vector.state

    def network() -> None:
        obs, chunk = begun["obs"], actions[:, None]
        for _ in range(steps):
            obs, _ = model.forward(obs, chunk)

    def imagine() -> None:
        state, chunk = begun, actions[:, None]
        for _ in range(steps):
            state, _ = model.imagine(state, chunk)

    def vector_step() -> None:
        for _ in range(steps):
            vector.step(played)

    def torch_step() -> None:
        for _ in range(steps):
            vector.step_torch(actions)

    def single_step() -> None:
        for _ in range(steps):
            single.step(played[0])

    runs: dict[str, Callable[[], None]] = {"network": network} if isinstance(model, TinyMLP) else {}
    runs |= {"imagine": imagine, "DreamVectorEnv.step": vector_step, "step_torch": torch_step}
    if batch == 1:
        runs["DreamEnv.step"] = single_step
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            bare = name in ("network", "imagine")
            with torch.set_grad_enabled(not bare):  # as people call them: the envs see to it themselves
                began = time.thread_time()
                run()
                seconds[name].append(time.thread_time() - began)
    return {"dreams": batch} | {name: batch * steps / statistics.median(times) for name, times in seconds.items()}


def endurance(model: str | None = None, dreams: int = 64, steps: int = 100_000) -> dict[str, Any]:
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
    size, edge = vector.state.nbytes, max(1, steps // 100)
    seconds, memory, finite = [], [], True
    for done in range(0, steps, edge):
        began = time.thread_time()
        for i in range(edge):
            obs, *_ = vector.step(actions[(done + i) % len(actions)])
        seconds.append((time.thread_time() - began) / edge)
        finite &= bool(np.isfinite(obs).all())
        memory.append(_resident())
    tenth = max(1, len(seconds) // 10)
    row = {
        "bench": "endurance",
        "model": model or "MLP 2x256",
        "dreams": dreams,
        "steps": steps,
        "state_bytes": (size, vector.state.nbytes),
        "resident_mb": (memory[len(memory) // 10], memory[-1]),
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


def _beside_full_attention(world: WorldModel, frames: int) -> dict[str, Any]:
    """Milliseconds an imagined chunk of one dream that has seen so many frames, and the bytes of its memory."""
    full, layers = copy.deepcopy(world), list[FullAttention]()
    for block in full.trunk.blocks:
        layers.append(FullAttention(world, frames))
        block.mixing = layers[-1]  # type: ignore[assignment]
    low, high = world.scaling.action_low, world.scaling.action_high
    chunk = torch.zeros(1, world.config.chunk, world.config.action_dim).clamp(low, high)
    first = torch.zeros(1, 1, world.config.obs_dim)
    with kernels_of("torch"):  # the compiled step knows the model's own layers alone
        begun, full_start = (m.observe(m.initial(1), first) for m in (world, full))
    contenders = {
        "full attention, torch": (full, full_start, "torch"),
        "ours, torch": (world, begun, "torch"),
        "ours": (world, begun, "auto"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, (model, start, kernels) in contenders.items():
                with kernels_of(kernels):
                    state, began = start, time.thread_time()
                    for _ in range(5):
                        state, _ = model.imagine(state, chunk)
                    seconds[name].append((time.thread_time() - began) / 5)
    return {
        "frames": frames,
        "bytes": {"full attention": sum(layer.nbytes for layer in layers), "ours": begun.nbytes},
        "ms": {name: 1000 * statistics.median(times) for name, times in seconds.items()},
    }


def _resident() -> float:
    """Resident memory in MB: now where the kernel tells, else the most so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
