"""A whole imagined step: compiled, in torch, beside the real simulator and the processor's arithmetic."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from kairos_gym.bench.harness import Job, Row, arithmetic_job, imagine_job, kernels_of, make_worlds, start_dreams
from kairos_gym.evaluation.timing import interleaved_rates, median_ratio
from kairos_gym.report import machine
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import WorldModel

DREAMS = (1, 16, 64, 256, 1024)
ROUNDS = 7


def step(chunk: int = 4) -> Row:
    """Env steps a CPU-second of a whole imagined step, HalfCheetah's sizes, over the torch form's and the simulator's.

    Two models: the shipped one (layers SG) and one of four layers (SGDG, random weights, which cost the same). Beside
    them the arithmetic floor, the multiply-adds that the step needs at the rate that this processor has at best, and
    ``mujoco.rollout`` of the real HalfCheetah. One thread, by turns in one run, medians of 7 rounds.
    """
    worlds = make_worlds()
    jobs: dict[str, Job] = {"arithmetic": arithmetic_job(), "mujoco.rollout": _rollout_job()}
    for world in worlds:
        for batch in DREAMS:
            for kernels in ("native", "torch"):
                jobs[f"{world.config.pattern} {batch} {kernels}"] = _step_job(world, batch, chunk, kernels)
    rates = interleaved_rates(jobs, ROUNDS, clock=time.process_time)
    peak = rates.pop("arithmetic")
    rows: list[Row] = []
    for world in worlds:
        layers, operations = world.config.pattern, 2 * multiply_adds(world.config, chunk)
        for batch in DREAMS:
            ours, torch_form = (rates[f"{layers} {batch} {kernels}"] for kernels in ("native", "torch"))
            rows.append(
                {
                    "layers": layers,
                    "dreams": batch,
                    "steps_per_cpu_second": statistics.median(ours),
                    "torch": statistics.median(torch_form),
                    "over_torch": median_ratio(ours, torch_form),
                    "over_mujoco": median_ratio(ours, rates["mujoco.rollout"]),
                    "floor_over_ours": median_ratio(peak, ours) / operations,
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


def multiply_adds(config: WorldModelConfig, chunk: int) -> float:
    """The fewest that one env step of the mean dream needs: products and attention, each element once."""
    o, a, p, d, da = config.obs_dim, config.action_dim, config.tokens, config.width, config.action_width
    inner, group = config.heads * config.head_dim, config.tokens + 1
    total = 0.0
    for i, kind in enumerate(config.pattern):
        last = i + 1 == len(config.pattern)
        gates = 2 * config.heads if kind == "G" else 0
        read_and_write = p * d * 2 * inner + da * 2 * inner  # keys and values
        world = p * d * (inner + config.expand * d) + p * (inner + config.expand * d) * d
        action = 0 if last else da * (inner + config.expand * da) + (inner + config.expand * da) * da
        queries = p if last else group  # of a noisy frame
        total += read_and_write + world + action  # denoise
        total += read_and_write + (p * d + da) * gates + (0 if last else world + action)  # write
        if kind == "G":
            noisy = config.head_dim + group * chunk * 2  # the memory, then the chunk's own keys and values
            written = (2 if last else 3) * config.head_dim * group
            total += inner * (queries * noisy + written)
        else:
            stride, reach = (1, config.window) if kind == "S" else (config.dilation, config.dilation * config.taps)
            seen = (
                sum(
                    len(range(stride, reach + 1, stride)) - sum(k % stride == 0 and k > 0 for k in range(f + 1))
                    for f in range(chunk)
                )
                / chunk
            )  # of the buffer, by the chunk's frames
            total += 2 * inner * queries * group * (seen + chunk)
            total += 0 if last else 2 * inner * group * group * (len(range(stride, reach + 1, stride)) + 1)
    total += 4 * o * p * d + p * d * o + o * p * d + 2 * a * da  # tokens in and out
    w = config.draft_width
    if config.draft:
        total += (config.draft_frames * o + a) * w + config.draft_blocks * 3 * w * w + w * 2 * o
    return total + (3 * o + a) * w + w * w + 2 * w + 2 * p * d


def _step_job(world: WorldModel, batch: int, chunk: int, kernels: str) -> Job:
    calls, env_steps = (8, 4096) if kernels == "native" else (2, 512)  # of a turn, at least
    state, actions = start_dreams(world, batch, chunk)
    return kernels_of(kernels)(imagine_job(world, state, actions, max(calls, env_steps // (batch * chunk))))


def _rollout_job() -> Job:
    """Play the real HalfCheetah with ``mujoco.rollout`` -> how many env steps."""
    from mujoco import MjData, mj_stateSize, mjtState, rollout

    from envs import make_real

    sim: Any = make_real("HalfCheetah-v5").unwrapped
    steps, full = 500, mjtState.mjSTATE_FULLPHYSICS
    rng = np.random.default_rng(0)
    control = np.repeat(rng.uniform(-1, 1, (1, steps, sim.model.nu)), sim.frame_skip, 1)
    state = np.zeros((1, mj_stateSize(sim.model, full)))
    state[0, 1 : 1 + sim.model.nq] = sim.init_qpos
    data = MjData(sim.model)

    def job() -> float:
        rollout.rollout(sim.model, data, state, control)
        return float(steps)

    return job
