"""Policies from few real steps: what is learned through the dream, beside learning in the simulator itself."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kairos_gym.learn import judges
from kairos_gym.loop import loop
from kairos_gym.loop_config import LoopConfig
from kairos_gym.report import machine

SAMPLES = {"Pendulum-v1": 1000, "InvertedPendulum-v5": 1000, "Reacher-v5": 4000, "HalfCheetah-v5": 4000}  # N
# What differs from LoopConfig. Half a cheetah touches the ground here and there, so no model of 4,000 steps knows it to
# a fifth of a standard deviation: dreams may be more wrong, steps that the model knows little of cost, and fewer
# updates keep it from learning its few steps by heart. Chosen with seeds 0 and 1.
SETTINGS: dict[str, dict[str, Any]] = {
    "HalfCheetah-v5": {"max_error": 1.0, "penalty": 1.0, "updates": 10, "draft_steps": 1000, "weight_decay": 0.1}
}
GUARDS: dict[str, dict[str, Any]] = {
    "both": {},
    "cut": {"penalty": 0.0},
    "penalty": {"max_error": None},
    "none": {"max_error": None, "penalty": 0.0},
}
MORE = 10  # times as many samples for the simulator's own learner
FRESH = 5000  # the seed of the first of the starts that say what a policy earns; no policy is judged from them before
Way = Literal["dream", "sb3", "sb3-small"]
Guard = Literal["both", "cut", "penalty", "none"]


def learning(
    task: str,
    way: Way = "dream",
    seed: int = 0,
    samples: int | None = None,
    guard: Guard = "both",
    target: float | None = None,
    out: Path = Path("runs/learning"),
) -> dict[str, Any]:
    """Learn a policy and play 10 episodes from fresh starts with its last form, without its noise.

    way: "dream", the loop with ``samples`` N real steps; "sb3", Stable-Baselines3's SAC with its own settings in the
    simulator, played after N and after 10 N steps; "sb3-small", the same with the settings that the loop's SAC has.
    samples: N, SAMPLES where None. guard: "both" of the task's guards against the model's mistakes, dreams cut short
    and a penalty where it has one, or one or none of them: dreams of 32 steps, and 5% of real steps in what the policy
    learns from. target: the loop's. It begins anew each time, in ``out``.
    """
    n = SAMPLES[task] if samples is None else samples
    about = {"bench": "learning", "task": task, "way": way, "seed": seed, "samples": n, "machine": machine()}
    began = time.process_time()
    if way == "dream":
        from stable_baselines3 import SAC

        folder = out / f"{task}-{n}-{seed}-{guard}"
        shutil.rmtree(folder, ignore_errors=True)
        own = {**SETTINGS.get(task, {}), **GUARDS[guard]}
        config = LoopConfig(samples=n, round_steps=n // 10, seed=seed, target=target, **own)
        rows = loop(task, folder, config, progress=False)
        cpu = time.process_time() - began
        policy: Any = SAC.load(folder / "last.zip")
        best: Any = SAC.load(folder / "best.zip")
        curve = [{key: float(np.mean(row[key])) for key in row} for row in rows]
        played = {"returns": _returns(policy, task), "best": _returns(best, task)}
        return about | {
            "guard": guard,
            "settings": own,
            "used": rows[-1]["steps"],
            "cpu_seconds": cpu,
            **played,
            "rounds": curve,
        }
    from stable_baselines3 import SAC

    from envs import make_real
    from planners.policy import make

    env = make_real(task)
    small = {"gradient_steps": 1, "learning_starts": 100}
    policy = SAC("MlpPolicy", env, seed=seed) if way == "sb3" else make("sac", env, seed=seed, **small)
    found: dict[str, Any] = {}
    for times in (1, MORE):
        policy.learn(times * n - policy.num_timesteps, log_interval=None, reset_num_timesteps=False)
        name = {1: "returns", MORE: f"returns_{MORE}n"}[times]
        found |= {name.replace("returns", "cpu_seconds"): time.process_time() - began}
        found |= {name: _returns(policy, task)}
    return about | found


def _returns(policy: Any, task: str) -> list[float]:
    from planners.policy import judge

    return judge(policy, judges(task), seed=FRESH).real.tolist()
