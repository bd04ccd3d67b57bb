"""A whole imagined step on a GPU: plain torch, Triton kernels, CUDA graphs over them, and all of it in bfloat16."""

from __future__ import annotations

import statistics

import torch

from kairos_gym.bench.harness import Job, Row, gpu_clock, imagine_job, kernels_of, make_worlds, start_dreams
from kairos_gym.evaluation.timing import interleaved_rates
from kairos_gym.report import machine
from world_model.model.world_model import WorldModel

DREAMS = (1, 16, 256, 1024, 4096, 16_384)
FORMS = {"torch": ("torch", False), "triton": ("eager", False), "graph": ("auto", False), "bf16": ("auto", True)}
ROUNDS = 7
CALLS = 10  # in a row, of a turn


def gpu(chunk: int = 4) -> Row:
    """Env steps a second of HalfCheetah's sizes on a GPU, layers SG (the shipped model) and SGDG; by turns in one run.

    Raises RuntimeError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("kairos bench gpu needs a GPU that torch can use, and sees none")
    rows = []
    for world in (world.cuda() for world in make_worlds()):
        for batch in DREAMS:
            jobs = {name: _job(world, batch, chunk, *form) for name, form in FORMS.items()}
            rates = interleaved_rates(jobs, ROUNDS, clock=gpu_clock)  # the first round compiles and captures
            medians = {name: statistics.median(rate) for name, rate in rates.items()}
            rows.append({"layers": world.config.pattern, "dreams": batch} | medians)
            print("| " + " | ".join(f"{x:,.0f}" if isinstance(x, float) else str(x) for x in rows[-1].values()) + " |")
    return {"bench": "gpu", "chunk": chunk, "rows": rows, "machine": machine()}


def _job(world: WorldModel, batch: int, chunk: int, kernels: str, half: bool) -> Job:
    job = imagine_job(world, *start_dreams(world, batch, chunk), CALLS)
    if half:
        job = torch.autocast("cuda", torch.bfloat16)(job)
    return kernels_of(kernels)(job)
