"""What a step of the env costs beside the network that it wraps."""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from kairos_gym.bench.harness import Job, Row
from kairos_gym.dream.envs import DreamEnv, DreamVectorEnv
from kairos_gym.evaluation.timing import interleaved_rates
from kairos_gym.models import load
from kairos_gym.report import Cell, as_text, machine
from world_model.contract import Imagined, Spec
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


def env(model: str | None = None) -> Row:
    """Steps a CPU-second of the env beside those of the bare network, by turns in one run; medians of 9 rounds.

    Args:
        model: a shipped model or a folder; left out, a tiny MLP (2x256)
    """
    rows = [_measure(load(model) if model else TinyMLP(), batch, steps) for batch, steps in SIZES.items()]
    names = [name for name in rows[-1] if name != "dreams"]
    cells: list[list[Cell]] = [
        [row["dreams"]] + [f"{row[name]:,.0f} ({row[name] / row[names[0]]:.0%})" for name in names] for row in rows
    ]
    print(as_text(["dreams", *names], cells))
    return {"bench": "env", "model": model or "MLP 2x256", "rows": rows, "machine": machine()}


def _measure(model: Any, batch: int, steps: int) -> Row:
    """Steps a CPU-second, by the name of what steps."""
    vector, single = DreamVectorEnv(model, batch, max_episode_steps=10**9), DreamEnv(model, max_episode_steps=10**9)
    steps = steps if isinstance(model, TinyMLP) else max(3, steps // 30)
    units = np.random.default_rng(0).uniform(-1, 1, vector.action_space.shape or ()).astype(np.float32)
    low, high = model.spec.action_box.low, model.spec.action_box.high
    actions = (low + (units + 1) / 2 * (high - low)).astype(np.float32)
    tensors = torch.from_numpy(actions)
    vector.reset(seed=0)
    single.reset(seed=0)
    start = vector.state

    # Gradients are off for what has no env around it: the envs switch them off themselves.
    @torch.no_grad()
    def network() -> float:
        obs, chunk = start["obs"], tensors[:, None]
        for _ in range(steps):
            obs, _ = model.forward(obs, chunk)
        return batch * steps

    @torch.no_grad()
    def imagine() -> float:
        state, chunk = start, tensors[:, None]
        for _ in range(steps):
            state, _ = model.imagine(state, chunk)
        return batch * steps

    def vector_step() -> float:
        for _ in range(steps):
            vector.step(actions)
        return batch * steps

    def torch_step() -> float:
        for _ in range(steps):
            vector.step_torch(tensors)
        return batch * steps

    def single_step() -> float:
        for _ in range(steps):
            single.step(actions[0])
        return steps

    jobs: dict[str, Job] = {"network": network} if isinstance(model, TinyMLP) else {}
    jobs |= {"imagine": imagine, "DreamVectorEnv.step": vector_step, "step_torch": torch_step}
    if batch == 1:
        jobs["DreamEnv.step"] = single_step
    rates = interleaved_rates(jobs, ROUNDS)
    return {"dreams": batch} | {name: statistics.median(rate) for name, rate in rates.items()}
