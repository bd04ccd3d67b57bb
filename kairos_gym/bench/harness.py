"""What the benches share: the file of rows, the choice of kernels, a clock for GPUs, and jobs to time."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kairos_gym.models import load
from world_model.model.world_model import WorldModel
from world_model.ops.native import library
from world_model.state import LatentState

Job = Callable[[], float]  # for ``interleaved_rates``
Row = dict[str, Any]
ROWS = Path("reports/bench.jsonl")


def append_row(row: Row, path: Path = ROWS) -> None:
    """Print a row and append it to the file that ``read_rows`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


def read_rows(path: Path = ROWS) -> list[Row]:
    """All rows measured so far, oldest first. Raises FileNotFoundError where nothing has been measured."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def kernels_of(choice: str) -> Iterator[None]:
    """Compute with other kernels (see ``KAIROS_KERNELS``) in a ``with`` block or a decorated function."""
    before = os.environ.get("KAIROS_KERNELS")
    os.environ["KAIROS_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["KAIROS_KERNELS"]
        else:
            os.environ["KAIROS_KERNELS"] = before


def gpu_clock() -> float:
    """Seconds, once the GPU has finished all work so far."""
    torch.cuda.synchronize()
    return time.perf_counter()


def make_worlds() -> tuple[WorldModel, WorldModel]:
    """The shipped HalfCheetah (layers SG), and one of its widths and four layers (SGDG) with random weights."""
    shipped: Any = load("halfcheetah")
    four = WorldModel(replace(shipped.config, pattern="SGDG"), shipped.spec).eval().requires_grad_(False)
    four.scaling.load_state_dict(shipped.scaling.state_dict())
    return shipped, four


def start_dreams(world: WorldModel, batch: int, chunk: int, first: Tensor | None = None) -> tuple[LatentState, Tensor]:
    """Dreams that have seen one frame ``first`` [B,1,O] (zeros where None), and random actions [B,K,A] for them."""
    low, high = world.scaling.action_low, world.scaling.action_high
    shape = (batch, chunk, world.config.action_dim)
    actions = low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(low.device)
    if first is None:
        first = torch.zeros(batch, 1, world.config.obs_dim, device=low.device)
    return world.observe(world.initial(batch), first), actions


def imagine_job(world: WorldModel, state: LatentState, actions: Tensor, calls: int) -> Job:
    """Imagine actions [B,K,A] so many times in a row, from ``state`` on -> the number of env steps."""

    def job() -> float:
        dream = state
        with torch.inference_mode():
            for _ in range(calls):
                dream, _ = world.imagine(dream, actions)
        return float(calls * actions.shape[0] * actions.shape[1])

    return job


def arithmetic_job() -> Job:
    """Multiply and add as fast as this processor can -> the number of floating-point operations."""
    lib = library("peak")
    lib.peak_arithmetic.restype = ctypes.c_double
    result = ctypes.c_float()
    return lambda: float(lib.peak_arithmetic(ctypes.c_long(20_000_000), ctypes.byref(result)))
