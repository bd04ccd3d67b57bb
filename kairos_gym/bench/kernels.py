"""What the compiled kernels are worth, in one run with the torch forms, the machine's limits and the simulator."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kairos_gym.models import load
from kairos_gym.report import machine
from world_model.episodes import Episodes
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import WorldModel
from world_model.ops.delta_rule import delta_rule, delta_rule_chunked, delta_rule_recurrent
from world_model.ops.native import library
from world_model.state import LatentState
from world_model.training.config import FitConfig
from world_model.training.run import TrainingRun

DREAMS = (1, 16, 64, 256, 1024)
ROUNDS = 7


def step(chunk: int = 4) -> dict[str, Any]:
    """Env steps a CPU-second of a whole imagined step, HalfCheetah's sizes, over the torch form's and the simulator's.

    Two models: the shipped one (layers SG) and one of four layers (SGDG, random weights, which cost the same). Beside
    them the arithmetic floor, the multiply-adds that the step needs at the rate that this processor has at best, and
    ``mujoco.rollout`` of the real HalfCheetah. One thread, by turns in one run, medians of 7 rounds.
    """
    shipped, four = worlds()
    jobs: dict[str, Callable[[], float]] = {"arithmetic": _arithmetic(), "mujoco.rollout": _rollout()}
    for world in (shipped, four):
        for batch in DREAMS:
            for kernels in ("native", "torch"):
                name = f"{world.config.pattern} {batch} {kernels}"
                jobs[name] = _dreaming(world, batch, chunk, kernels)
    rates = _by_turns(jobs)
    peak = rates.pop("arithmetic")
    rows: list[dict[str, Any]] = []
    for world in (shipped, four):
        needed = 2 * multiply_adds(world.config, chunk)
        for batch in DREAMS:
            ours, torch_form = (rates[f"{world.config.pattern} {batch} {kernels}"] for kernels in ("native", "torch"))
            rows.append(
                {
                    "layers": world.config.pattern,
                    "dreams": batch,
                    "steps_per_cpu_second": statistics.median(ours),
                    "torch": statistics.median(torch_form),
                    "over_torch": _ratio(ours, torch_form),
                    "over_mujoco": _ratio(ours, rates["mujoco.rollout"]),
                    "floor_over_ours": _ratio(peak, ours) / needed,
                }
            )
    for row in rows:
        print(
            "| {layers} | {dreams} | {steps_per_cpu_second:,.0f} | {torch:,.0f} | {over_torch:.1f}x | "
            "{over_mujoco:.1f}x | {floor_over_ours:.1f}x |".format(**row)
        )
    return {
        "bench": "step",
        "chunk": chunk,
        "peak_gflops": statistics.median(peak) / 1e9,
        "mujoco_rollout": statistics.median(rates["mujoco.rollout"]),
        "rows": rows,
        "machine": machine(),
    }


def worlds() -> tuple[WorldModel, WorldModel]:
    """The shipped HalfCheetah (layers SG), and one of its widths and four layers (SGDG) with random weights."""
    shipped: Any = load("halfcheetah")
    four = WorldModel(replace(shipped.config, pattern="SGDG"), shipped.spec).eval().requires_grad_(False)
    four.scaling.load_state_dict(shipped.scaling.state_dict())
    return shipped, four


def begun(world: WorldModel, batch: int, chunk: int) -> tuple[LatentState, Tensor]:
    """Dreams that have seen one frame, and what they are to play [B,K,A]."""
    low, high = world.scaling.action_low, world.scaling.action_high
    shape = (batch, chunk, world.config.action_dim)
    actions = low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(low.device)
    state = world.observe(world.initial(batch), torch.zeros(batch, 1, world.config.obs_dim, device=low.device))
    return state, actions


def multiply_adds(config: WorldModelConfig, chunk: int) -> float:
    """What one env step of the mean dream needs, at the least: products and attention, each element once."""
    o, a, p, d, da = config.obs_dim, config.action_dim, config.tokens, config.width, config.action_width
    inner, group = config.heads * config.head_dim, config.tokens + 1
    total = 0.0
    for i, kind in enumerate(config.pattern):
        last = i + 1 == len(config.pattern)
        gates = 2 * config.heads if kind == "G" else 0
        read_and_write = p * d * 2 * inner + da * 2 * inner  # keys and values
        world = p * d * (inner + config.expand * d) + p * (inner + config.expand * d) * d
        action = 0 if last else da * (inner + config.expand * da) + (inner + config.expand * da) * da
        asking = p if last else group  # queries of a noisy frame
        total += read_and_write + world + action  # denoise
        total += read_and_write + (p * d + da) * gates + (0 if last else world + action)  # write
        if kind == "G":
            noisy = config.head_dim + group * chunk * 2  # the memory, then the chunk's own keys and values
            written = (2 if last else 3) * config.head_dim * group
            total += inner * (asking * noisy + written)
        else:
            stride, reach = (1, config.window) if kind == "S" else (config.dilation, config.dilation * config.taps)
            seen = (
                sum(
                    len(range(stride, reach + 1, stride)) - sum(k % stride == 0 and k > 0 for k in range(f + 1))
                    for f in range(chunk)
                )
                / chunk
            )  # of the buffer, by the chunk's frames
            total += 2 * inner * asking * group * (seen + chunk)
            total += 0 if last else 2 * inner * group * group * (len(range(stride, reach + 1, stride)) + 1)
    total += 4 * o * p * d + p * d * o + o * p * d + 2 * a * da  # tokens in and out
    w = config.draft_width
    if config.draft:
        total += (config.draft_frames * o + a) * w + config.draft_blocks * 3 * w * w + w * 2 * o
    return total + (3 * o + a) * w + w * w + 2 * w + 2 * p * d


def memory() -> dict[str, Any]:
    """Nanoseconds a token and head of the delta rule, H=4, d=32: compiled, the best form in torch, and the floor.

    Training: B=64 and 64, 256, 1024 tokens, forward and both ways. Streaming: B=1, 64, 1024 memories, 1, 4, 16 tokens
    onto them without gradients. The floor of a forward pass is its 3 d^2 multiply-adds at the rate that this processor
    has at best, or the bytes that it must read and write at the rate of a large copy, whichever takes longer. One
    thread, by turns in one run.
    """
    torch_forms: dict[str, Any] = {f"chunk {c}": partial(delta_rule_chunked, chunk=c) for c in (16, 32, 64)}
    rows: list[dict[str, Any]] = []
    for tokens in (64, 256, 1024):
        args = _keys(64, 4, tokens, 32)
        jobs = {("compiled", part): _delta_job(delta_rule, args, part) for part in ("forward", "both")}
        jobs |= {
            (name, part): _delta_job(f, args, part) for name, f in torch_forms.items() for part in ("forward", "both")
        }
        rows.append({"what": "training", "dreams": 64, "tokens": tokens} | _against_floor(jobs, 64, tokens))
    for batch in DREAMS[::2]:
        for tokens in (1, 4, 16):
            args = _keys(batch, 4, tokens, 32)
            jobs = {("compiled", "forward"): _delta_job(delta_rule, args, "forward")}
            jobs |= {
                (name, "forward"): _delta_job(form, args, "forward")
                for name, form in (torch_forms | {"recurrence": delta_rule_recurrent}).items()
            }
            rows.append({"what": "streaming", "dreams": batch, "tokens": tokens} | _against_floor(jobs, batch, tokens))
    for row in rows:
        both = f"{row['both']:.0f} | {row['torch_both']:.0f}" if "both" in row else "- | -"
        print(
            "| {what} | {dreams} | {tokens} | {forward:.0f} | {torch_forward:.0f} | {over_floor:.1f}x | ".format(**row)
            + f"{both} |"
        )
    return {"bench": "memory", "rows": rows, "machine": machine()}


def _delta_job(form: Callable[..., tuple[Tensor, Tensor]], args: list[Tensor], part: str) -> Callable[[], float]:
    count = args[1].shape[:3].numel()
    often = max(1, 200_000 // count)

    def run() -> float:
        for _ in range(often):
            if part == "forward":
                with torch.no_grad():
                    form(*args)
            else:
                out = form(*args)
                torch.autograd.grad(out, args, [torch.ones_like(x) for x in out])
        return float(often * count)

    return run


def _against_floor(jobs: dict[tuple[str, str], Callable[[], float]], batch: int, tokens: int) -> dict[str, float]:
    source = torch.ones(16 << 20)
    target = torch.empty_like(source)

    def copied() -> float:
        target.copy_(source)
        return 8.0 * source.numel()

    rates = _by_turns({"arithmetic": _arithmetic(), "copy": copied} | {"/".join(k): v for k, v in jobs.items()}, 5)
    ns = {name: 1e9 / statistics.median(rate) for name, rate in rates.items()}
    operations = 2 * 3 * 32 * 32
    moved = 4 * (4 * 32 + 2) + 2 * 4 * 32 * 32 / tokens  # bytes: tokens in and out, and the memory
    floor = max(operations * ns["arithmetic"], moved * ns["copy"])
    found = {"forward": ns["compiled/forward"], "floor": floor, "over_floor": ns["compiled/forward"] / floor}
    found["torch_forward"] = min(t for name, t in ns.items() if name.endswith("/forward") and "compiled" not in name)
    if "compiled/both" in ns:
        found["both"] = ns["compiled/both"]
        found["torch_both"] = min(t for name, t in ns.items() if name.endswith("/both") and "compiled" not in name)
    return found


def updates() -> dict[str, Any]:
    """Milliseconds of CPU time an update of ``fit``, HalfCheetah's sizes, compiled and in plain torch.

    The draft's phase and the memory's, on episodes of noise, which cost the same. One thread, by turns in one run.
    """
    shipped: Any = load("halfcheetah")
    rng, steps = np.random.default_rng(0), 200
    episodes = Episodes.stack(
        (rng.normal(size=(steps + 1, 17)), rng.uniform(-1, 1, (steps, 6)), rng.normal(size=steps), np.zeros(steps))
        for _ in range(100)
    )
    length = FitConfig(draft_steps=10**6, steps=10**6)
    jobs: dict[str, Callable[[], float]] = {}

    def updating(run: TrainingRun, first: int, kernels: str) -> Callable[[], float]:
        def some() -> float:
            with kernels_of(kernels):
                for i in range(40):  # all chunk lengths alike
                    run.update(first + i)
            return 40.0

        return some

    for kernels in ("native", "torch"):
        for phase, first in (("draft", 0), ("memory", length.draft_steps)):
            model = WorldModel(shipped.config, shipped.spec)
            model.scaling.measure(episodes)
            jobs[f"{phase}, {kernels}"] = updating(TrainingRun(model, episodes, length, Path(), ""), first, kernels)
    rates = _by_turns(jobs)
    return {
        "bench": "updates",
        "ms": {name: 1e3 / statistics.median(rate) for name, rate in rates.items()},
        "over_torch": {p: _ratio(rates[f"{p}, native"], rates[f"{p}, torch"]) for p in ("draft", "memory")},
        "machine": machine(),
    }


def speed(path: Path = Path("reports/bench.jsonl"), out: Path = Path("docs/kernels.svg")) -> None:
    """Draw what ``memory`` and ``step`` measured last."""
    from matplotlib.figure import Figure

    rows = {row["bench"]: row for row in map(json.loads, path.read_text().splitlines()) if "bench" in row}
    if missing := {"memory", "step"} - set(rows):
        raise ValueError(f"nothing measured yet by kairos bench {' and '.join(sorted(missing))}: run that first")
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    dark, blue, orange = "#1c2430", "#2563a8", "#c2410c"
    shapes = [row for row in rows["memory"]["rows"] if row["dreams"] > 1]
    at = range(len(shapes))
    for column, colour, name in (("forward", blue, "compiled"), ("torch_forward", orange, "the best form in torch")):
        left.plot(at, [row[column] / row["floor"] for row in shapes], "o", color=colour, label=name)
    left.axhline(1, color=dark, linewidth=1, label="the machine's limit")
    left.set_xticks(at, [f"{row['what']}\nB={row['dreams']}\nT={row['tokens']}" for row in shapes], fontsize=6)
    left.set(yscale="log", ylabel="time over the limit", title="the delta rule, forward")
    for layers, style in (("SG", "-"), ("SGDG", "--")):
        mine = [row for row in rows["step"]["rows"] if row["layers"] == layers]
        dreams = [row["dreams"] for row in mine]
        for column, colour, name in (("steps_per_cpu_second", blue, "compiled"), ("torch", orange, "torch")):
            right.plot(dreams, [row[column] for row in mine], style, color=colour, label=f"{layers}, {name}")
        limit = statistics.median(row["steps_per_cpu_second"] * row["floor_over_ours"] for row in mine)
        right.axhline(limit, color=dark, linestyle=style, linewidth=1, label=f"{layers}, arithmetic alone")
    right.axhline(rows["step"]["mujoco_rollout"], color="#15803d", linewidth=1, label="mujoco.rollout")
    right.set_xscale("log")
    right.set_xticks(DREAMS, map(str, DREAMS))
    right.minorticks_off()
    right.set(yscale="log", xlabel="dreams", ylabel="env steps a CPU-second", title="a whole step")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(out, metadata={"Date": None})


def _keys(batch: int, heads: int, tokens: int, d: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k = F.normalize(torch.randn(2, batch, heads, tokens, d, generator=g), dim=-1)
    v, state = torch.randn(batch, heads, tokens, d, generator=g), torch.randn(batch, heads, d, d, generator=g)
    log_alpha = -0.1 * torch.rand(batch, heads, tokens, generator=g)
    beta = torch.rand(batch, heads, tokens, generator=g)
    return [x.clone().requires_grad_() for x in (q, k, v, log_alpha, beta, state)]


def _by_turns(jobs: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Each job's units a CPU-second, all jobs once a round: what else the machine does meets all alike."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for lap in range(rounds + 1):
        for name, job in jobs.items():
            begun = time.process_time()
            units = job()
            took = time.process_time() - begun
            if lap:  # the first warms up
                rates[name].append(units / took)
    return rates


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _arithmetic() -> Callable[[], float]:
    lib = library("peak")
    lib.peak_arithmetic.restype = ctypes.c_double
    result = ctypes.c_float()
    return lambda: float(lib.peak_arithmetic(ctypes.c_long(20_000_000), ctypes.byref(result)))


@contextmanager
def kernels_of(choice: str) -> Iterator[None]:
    before = os.environ.get("KAIROS_KERNELS")
    os.environ["KAIROS_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["KAIROS_KERNELS"]
        else:
            os.environ["KAIROS_KERNELS"] = before


def _dreaming(world: WorldModel, batch: int, chunk: int, kernels: str) -> Callable[[], float]:
    state, actions = begun(world, batch, chunk)
    calls, env_steps = (8, 4096) if kernels == "native" else (2, 512)  # of a turn, at least
    steps = max(calls, env_steps // (batch * chunk))

    def run() -> float:
        dream = state
        with kernels_of(kernels), torch.inference_mode():
            for _ in range(steps):
                dream, _ = world.imagine(dream, actions)
        return float(steps * batch * chunk)

    return run


def _rollout() -> Callable[[], float]:
    from mujoco import MjData, mj_stateSize, mjtState, rollout

    from envs import make_real

    sim: Any = make_real("HalfCheetah-v5").unwrapped
    steps, full = 500, mjtState.mjSTATE_FULLPHYSICS
    rng = np.random.default_rng(0)
    control = np.repeat(rng.uniform(-1, 1, (1, steps, sim.model.nu)), sim.frame_skip, 1)
    state = np.zeros((1, mj_stateSize(sim.model, full)))
    state[0, 1 : 1 + sim.model.nq] = sim.init_qpos
    data = MjData(sim.model)

    def run() -> float:
        rollout.rollout(sim.model, data, state, control)
        return float(steps)

    return run
