"""What gradients through the dream teach a policy in a given CPU time, beside SAC in the same dream."""

from __future__ import annotations

import time
from typing import Any, Literal

from kairos_gym.bench.harness import Row
from kairos_gym.bench.learning import real_returns
from kairos_gym.dream.envs import DreamVectorEnv
from kairos_gym.models import load
from kairos_gym.report import machine

DREAMS = 64


def gradients(
    model: str,
    algorithm: Literal["shac", "sac"] = "shac",
    cpu_seconds: tuple[float, ...] = (10.0, 30.0),
    seed: int = 0,
) -> Row:
    """Learn in a shipped model's dream for so many CPU-seconds, and play 10 real episodes from fresh starts after each.

    algorithm: "shac", by gradients through the dream, or "sac", by Stable-Baselines3, as ``kairos learn`` has them.
    """
    from kairos_gym.dream.sb3_vec_env import DreamVecEnv
    from kairos_gym.policies.sb3 import make_algorithm
    from kairos_gym.policies.shac import ActorCritic
    from world_model.dynamics.draft_dynamics import DraftDynamics

    world, returns, spent = load(model), {}, 0.0
    if algorithm == "shac":
        policy: Any = ActorCritic.from_spec(world.spec, seed=seed)
        policy.start(DreamVectorEnv(DraftDynamics(world), DREAMS, autoreset_mode="SameStep"), seed)
    else:
        venv = DreamVecEnv(world, DREAMS)
        venv.seed(seed)
        policy = make_algorithm("sac", venv, seed=seed)
    for budget in sorted(cpu_seconds):
        end = time.process_time() + budget - spent

        def has_time(*_: object, end: float = end) -> bool:
            return time.process_time() < end

        if algorithm == "shac":
            while has_time():
                policy.rollout()
        else:
            policy.learn(10**9, has_time, log_interval=None, reset_num_timesteps=False)
        returns[str(budget)], spent = real_returns(policy, str(world.card["env"])), budget
    about = {"bench": "gradients", "model": model, "algorithm": algorithm, "seed": seed}
    return about | {"steps": policy.num_timesteps, "returns": returns, "machine": machine()}
