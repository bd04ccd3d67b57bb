"""The delta rule alone: compiled, in torch, and the least time that this machine could take for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kairos_gym.bench.harness import Job, Row, arithmetic_job
from kairos_gym.evaluation.timing import interleaved_rates
from kairos_gym.report import machine
from world_model.ops.delta_rule import delta_rule, delta_rule_chunked, delta_rule_recurrent

HEADS, WIDTH = 4, 32  # H and d, HalfCheetah's
ROUNDS = 5


def memory() -> Row:
    """Nanoseconds a token and head of the delta rule, H=4, d=32: compiled, the best form in torch, and the floor.

    Training: B=64 and 64, 256, 1024 tokens, forward and both ways. Streaming: B=1, 64, 1024 memories, 1, 4, 16 tokens
    onto them without gradients. The floor of a forward pass is its 3 d^2 multiply-adds at the rate that this processor
    has at best, or the bytes that it must read and write at the rate of a large copy, whichever takes longer. One
    thread, by turns in one run.
    """
    training: dict[str, Any] = {f"chunk {c}": partial(delta_rule_chunked, chunk=c) for c in (16, 32, 64)}
    streaming = training | {"recurrence": delta_rule_recurrent}
    rows = [_measure("training", training, ("forward", "both"), 64, tokens) for tokens in (64, 256, 1024)]
    rows += [
        _measure("streaming", streaming, ("forward",), batch, tokens)
        for batch in (1, 64, 1024)
        for tokens in (1, 4, 16)
    ]
    for row in rows:
        both = f"{row['both']:.0f} | {row['torch_both']:.0f}" if "both" in row else "- | -"
        print(
            "| {what} | {dreams} | {tokens} | {forward:.0f} | {torch_forward:.0f} | {over_floor:.1f}x | ".format(**row)
            + f"{both} |"
        )
    return {"bench": "memory", "rows": rows, "machine": machine()}


def _measure(what: str, torch_forms: dict[str, Any], passes: tuple[str, ...], batch: int, tokens: int) -> Row:
    """One row of the table. passes: "forward", "both" (forward and backward)."""
    source = torch.ones(16 << 20)
    target = torch.empty_like(source)

    def copy() -> float:
        target.copy_(source)
        return 8.0 * source.numel()

    inputs = _make_inputs(batch, tokens)
    jobs: dict[str, Job] = {"arithmetic": arithmetic_job(), "copy": copy}
    for name, form in ({"compiled": delta_rule} | torch_forms).items():
        jobs |= {f"{name}/{direction}": _delta_job(form, inputs, direction) for direction in passes}
    rates = interleaved_rates(jobs, ROUNDS, clock=time.process_time)
    ns = {name: 1e9 / statistics.median(rate) for name, rate in rates.items()}
    operations = 2 * 3 * WIDTH * WIDTH
    moved = 4 * (4 * WIDTH + 2) + 2 * 4 * WIDTH * WIDTH / tokens  # bytes: tokens in and out, and the memory
    floor = max(operations * ns["arithmetic"], moved * ns["copy"])
    row: Row = {"what": what, "dreams": batch, "tokens": tokens, "forward": ns["compiled/forward"], "floor": floor}
    row["over_floor"] = row["forward"] / floor
    row["torch_forward"] = min(ns[f"{name}/forward"] for name in torch_forms)
    if "both" in passes:
        row["both"] = ns["compiled/both"]
        row["torch_both"] = min(ns[f"{name}/both"] for name in torch_forms)
    return row


def _delta_job(form: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], direction: str) -> Job:
    """Apply ``form`` many times -> how many tokens and heads that were."""
    count = inputs[1].shape[:3].numel()
    calls = max(1, 200_000 // count)

    def job() -> float:
        for _ in range(calls):
            if direction == "forward":
                with torch.no_grad():
                    form(*inputs)
            else:
                out = form(*inputs)
                torch.autograd.grad(out, inputs, [torch.ones_like(x) for x in out])
        return float(calls * count)

    return job


def _make_inputs(batch: int, tokens: int) -> list[Tensor]:
    """q, k, v [B,H,T,d], log_alpha and beta [B,H,T], state [B,H,d,d], in the order that ``delta_rule`` takes them."""
    g = torch.Generator().manual_seed(0)
    q, k = F.normalize(torch.randn(2, batch, HEADS, tokens, WIDTH, generator=g), dim=-1)
    v, state = (
        torch.randn(batch, HEADS, tokens, WIDTH, generator=g),
        torch.randn(batch, HEADS, WIDTH, WIDTH, generator=g),
    )
    log_alpha = -0.1 * torch.rand(batch, HEADS, tokens, generator=g)
    beta = torch.rand(batch, HEADS, tokens, generator=g)
    return [x.clone().requires_grad_() for x in (q, k, v, log_alpha, beta, state)]
