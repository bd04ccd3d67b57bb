"""The gated delta rule of Kairos Gym beside flash-linear-attention's: its reference on a CPU, its kernels on a GPU.

From the root of the repository (torch 2.13.0's build for CUDA where there is a GPU):

    python3 -m venv /tmp/fla
    /tmp/fla/bin/pip install torch==2.13.0 triton==3.7.1 numpy==1.26.4 packaging==25.0
    /tmp/fla/bin/pip install --no-deps fla-core==0.6.0 einops==0.8.2
    OMP_NUM_THREADS=1 PYTHONPATH=. /tmp/fla/bin/python benchmarks/peers/delta.py

Unit keys, d = 32, float32; the memory goes in and comes out. Each takes tensors in its own layout. Before anything is
timed, outputs, memories and gradients of both must be near those of torch in float64; the errors are printed, since on
a GPU flash-linear-attention multiplies in TF32. There from 8 to 8,192 heads and 1 to 8,192 keys: "forward" without
gradients, where flash-linear-attention has a streaming kernel and a chunked one, of which the faster counts, and "both"
ways by its chunked one. On a CPU it has two references only, made for clarity rather than speed: the faster counts.
Median of several turns, by events on a GPU, by the thread's CPU time on a CPU. Beside them plain torch, by chunks of 64
keys.
"""

from __future__ import annotations

import platform
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

warnings.filterwarnings("ignore")  # it warns that there is no GPU

from fla.ops.gated_delta_rule import naive  # noqa: E402

from world_model.ops.delta_rule import delta_rule, delta_rule_chunked  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
D = 32
Form = Callable[..., tuple[Tensor, Tensor]]
errors_raised: set[str] = set()  # by flash-linear-attention, in rows that it leaves out


def peers(keys: int) -> dict[str, tuple[Form, tuple[str, ...]]]:
    """flash-linear-attention's implementations, and whether each can do "forward" and "both"."""
    if not GPU:
        recurrent: Any = naive.naive_recurrent_gated_delta_rule
        return {
            "reference": (recurrent, ("forward",)),
            "chunks": (naive.naive_chunk_gated_delta_rule, ("forward", "both")),
        }
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    forms: dict[str, tuple[Form, tuple[str, ...]]] = {"recurrent": (fused_recurrent_gated_delta_rule, ("forward",))}
    if keys > 1:
        forms["chunks"] = (chunk_gated_delta_rule, ("forward", "both"))
    return forms


def inputs(batch: int, heads: int, keys: int) -> dict[str, Tensor]:
    """In our layout: q, k, v [B,H,T,d], g (log alpha) and beta [B,H,T], state [B,H,e,d]."""
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, batch, heads, keys, D, device=DEVICE), dim=-1)
    v, state = torch.randn(batch, heads, keys, D, device=DEVICE), torch.randn(batch, heads, D, D, device=DEVICE)
    g, beta = -0.1 * torch.rand(batch, heads, keys, device=DEVICE), torch.rand(batch, heads, keys, device=DEVICE)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}


def ours(form: Form, tensors: dict[str, Tensor]) -> tuple[Callable[[], tuple[Tensor, Tensor]], list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    return partial(form, *leaves), leaves


def theirs(form: Form, tensors: dict[str, Tensor]) -> tuple[Callable[[], tuple[Tensor, Tensor]], list[Tensor]]:
    leaves = [x.mT if name == "state" else x.transpose(1, 2) for name, x in tensors.items()]
    leaves = [x.contiguous().requires_grad_() for x in leaves]
    names = ("q", "k", "v", "g", "beta", "initial_state")
    return partial(form, **dict(zip(names, leaves, strict=True)), output_final_state=True), leaves


def job(run: Callable[[], tuple[Tensor, Tensor]], leaves: list[Tensor], part: str) -> Callable[[], list[Tensor]]:
    """Once forward, or both ways with output gradients of one -> outputs, memory and gradients."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return list(run())

    def both() -> list[Tensor]:
        out = run()
        return [*out, *torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])]

    return forward if part == "forward" else both


def max_error(truth: list[Tensor], others: list[Tensor], transposed: bool) -> float:
    """The largest relative error among outputs, memory and the six gradients. transposed: in the peers' layout."""
    errors = []
    for i, (a, b) in enumerate(zip(truth, others, strict=True)):
        if transposed:
            b = b.mT if i in (1, 7) else b.transpose(1, 2)
        errors.append(float((b[: len(a)] - a).norm() / a.norm()))
    assert all(error < 0.05 for error in errors), errors
    return max(errors)


def seconds(jobs: dict[str, Callable[[], list[Tensor]]], turns: int = 9) -> dict[str, float]:
    """Of one call, median of ``turns``, in which the contenders alternate."""
    repeats = {}
    for name, run in jobs.items():  # warms up, and measures how many calls make a turn of some 20 ms
        run()
        repeats[name] = max(1, min(200, int(0.02 / max(timed(run, 1), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(turns):
        for name in list(jobs)[:: 1 if turn % 2 else -1]:
            times[name].append(timed(jobs[name], repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def timed(run: Callable[[], list[Tensor]], repeats: int) -> float:
    if not GPU:
        start_time = time.thread_time()
        for _ in range(repeats):
            run()
        return (time.thread_time() - start_time) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def row(batch: int, heads: int, keys: int, part: str) -> None:
    tensors = inputs(batch, heads, keys)
    jobs = {
        name: job(*ours(form, tensors), part) for name, form in (("ours", delta_rule), ("torch", delta_rule_chunked))
    }
    truth = job(*ours(delta_rule_chunked, {name: x[:2].double() for name, x in tensors.items()}), part)()
    errors = {name: max_error(truth, run(), transposed=False) for name, run in jobs.items()}
    for name, (form, parts) in peers(keys).items():
        if part in parts:
            run = job(*theirs(form, tensors), part)
            try:
                errors[name] = max_error(truth, run(), transposed=True)
            except RuntimeError as error:  # on some GPUs it refuses some versions of Triton
                errors_raised.add(str(error))
            else:
                jobs[name] = run
    ns = {name: t * 1e9 / (batch * heads * keys) for name, t in seconds(jobs).items()}
    cells = [part, batch * heads, keys, f"{ns['ours']:.4g}", f"{ns['torch']:.4g}"]
    peer_names = [name for name in ns if name not in ("ours", "torch")]
    if peer_names:
        best = min(peer_names, key=ns.__getitem__)
        cells += [f"{ns[best]:.4g} ({best})", f"{ns[best] / ns['ours']:.2f}x", f"{errors['ours']:.0e}"]
        cells.append(f"{errors[best]:.0e}")
    else:
        cells += ["-", "-", f"{errors['ours']:.0e}", "-"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    where = torch.cuda.get_device_name() if GPU else f"{platform.processor() or platform.machine()}, no GPU"
    print(f"{where}; torch {torch.__version__}, fla-core {version('fla-core')}; {date.today()}\n")
    columns = ["", "heads", "keys", "ours, ns a key and head", "torch", "flash-linear-attention", "ours is faster by"]
    columns += ["ours is off by", "theirs"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    sizes = [(h, t) for h in (8, 64, 512, 8192) for t in (1, 4, 16, 64, 256, 1024, 8192) if h * t <= 1 << 23]
    if not GPU:
        sizes = [(h, t) for h in (8, 256) for t in (1, 16, 64, 256)]
    for heads, keys in sizes:
        for part in ("forward", "both"):
            if part == "forward" or keys >= 64:
                row(max(1, heads // 4), min(heads, 4), keys, part)
    print(*errors_raised, sep="\n")


if __name__ == "__main__":
    main()
