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
MORE = 10  # times as many samples for the simulator's own learner
FRESH = 5000  # the seed of the first of the starts that say what a policy earns; no policy is judged from them before
Way = Literal["dream", "sb3", "sb3-small"]


def learning(
    task: str,
    way: Way = "dream",
    seed: int = 0,
    samples: int | None = None,
    max_error: float | None = LoopConfig.max_error,
    penalty: float = 0.0,
    target: float | None = None,
    out: Path = Path("runs/learning"),
) -> dict[str, Any]:
    """Learn a policy and play 10 episodes from fresh starts with its last form, without its noise.

    way: "dream", the loop with ``samples`` N real steps; "sb3", Stable-Baselines3's SAC with its own settings in the
    simulator, played after N and after 10 N steps; "sb3-small", the same with the settings that the loop's SAC has.
    samples: N, SAMPLES where None. max_error, penalty, target: the loop's; --max-error None lets every dream go on for
    its 32 steps, with 5% of real steps. Beginning anew each time, in ``out``.
    """
    n = SAMPLES[task] if samples is None else samples
    about = {"bench": "learning", "task": task, "way": way, "seed": seed, "samples": n, "machine": machine()}
    began = time.process_time()
    if way == "dream":
        from stable_baselines3 import SAC

        guards = {"max_error": max_error, "penalty": penalty}
        folder = out / "-".join(map(str, (task, n, seed, max_error, penalty)))
        shutil.rmtree(folder, ignore_errors=True)
        config = LoopConfig(samples=n, round_steps=n // 10, seed=seed, target=target, **guards)  # type: ignore[arg-type]
        rows = loop(task, folder, config, progress=False)
        cpu = time.process_time() - began
        policy: Any = SAC.load(folder / "last.zip")
        best: Any = SAC.load(folder / "best.zip")
        curve = [{key: np.mean(row[key]) for key in row} for row in rows]
        played = {"returns": _returns(policy, task), "best": _returns(best, task)}
        return about | guards | {"used": rows[-1]["steps"], "cpu_seconds": cpu, **played, "rounds": curve}
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
