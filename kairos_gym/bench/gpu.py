"""A whole imagined step on a GPU: plain torch, Triton kernels, CUDA graphs over them, and all of it in bfloat16."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from kairos_gym.bench.kernels import begun, kernels_of, worlds
from kairos_gym.report import machine
from world_model.model.world_model import WorldModel

DREAMS = (1, 16, 256, 1024, 4096, 16_384)
FORMS = {"torch": ("torch", False), "triton": ("eager", False), "graph": ("auto", False), "bf16": ("auto", True)}
ROUNDS = 7


def gpu(chunk: int = 4) -> dict[str, Any]:
    """Env steps a second of HalfCheetah's sizes on a GPU, layers SG (the shipped model) and SGDG; by turns in one run.

    Raises RuntimeError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("kairos bench gpu needs a GPU that torch can use, and sees none")
    rows = []
    for world in (world.cuda() for world in worlds()):
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
    start_state, actions = begun(world, batch, chunk)

    def run() -> float:
        """Seconds of ten calls in a row."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        state = start_state
        precision = torch.autocast("cuda", torch.bfloat16) if half else nullcontext()
        with kernels_of(kernels), torch.inference_mode(), precision:
            start.record()
            for _ in range(10):
                state, _ = world.imagine(state, actions)
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return run
