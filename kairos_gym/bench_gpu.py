"""A whole imagined step on a GPU: plain torch, Triton kernels, CUDA graphs over them, and all of it in bfloat16."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from kairos_gym.bench_kernels import kernels_of
from kairos_gym.models import load
from kairos_gym.report import machine
from world_model.model import WorldModel

DREAMS = (1, 16, 256, 1024, 4096, 16_384)
FORMS = {"torch": ("torch", False), "triton": ("auto", False), "graph": ("native", False), "bf16": ("native", True)}
ROUNDS = 7


def gpu(chunk: int = 4) -> dict[str, Any]:
    """Env steps a second of HalfCheetah's sizes on a GPU, layers SG (the shipped model) and SGDG; by turns in one run.

    Raises RuntimeError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("kairos bench gpu needs a GPU that torch can use, and sees none")
    shipped: Any = load("halfcheetah")
    four = WorldModel(replace(shipped.config, pattern="SGDG"), shipped.spec).eval().requires_grad_(False)
    four.scaling.load_state_dict(shipped.scaling.state_dict())
    rows = []
    for world in (shipped.cuda(), four.cuda()):
        for batch in DREAMS:
            jobs = {name: _job(world, batch, chunk, *form) for name, form in FORMS.items()}
            rates: dict[str, list[float]] = {name: [] for name in jobs}
            for lap in range(ROUNDS + 1):
                for name, job in jobs.items():
                    seconds = job()
                    if lap:  # the first compiles, captures and warms up
                        rates[name].append(10 * batch * chunk / seconds)
            middle = {name: statistics.median(rate) for name, rate in rates.items()}
            rows.append({"layers": world.config.pattern, "dreams": batch} | middle)
            print("| " + " | ".join(f"{x:,.0f}" if isinstance(x, float) else str(x) for x in rows[-1].values()) + " |")
    return {"bench": "gpu", "chunk": chunk, "rows": rows, "machine": machine()}


def _job(world: WorldModel, batch: int, chunk: int, kernels: str, half: bool) -> Callable[[], float]:
    low, high = world.scaling.action_low, world.scaling.action_high
    actions = low + (high - low) * torch.rand(batch, chunk, len(low), device=low.device)
    begun = world.observe(world.initial(batch), torch.zeros(batch, 1, world.config.obs_dim, device=low.device))

    def run() -> float:
        """Seconds of ten calls in a row."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        state = begun
        precision = torch.autocast("cuda", torch.bfloat16) if half else nullcontext()
        with kernels_of(kernels), torch.inference_mode(), precision:
            start.record()
            for _ in range(10):
                state, _ = world.imagine(state, actions)
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return run
