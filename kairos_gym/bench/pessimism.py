"""Caution where data are few: whether plans that pay for ignorance earn more in the real simulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kairos_gym.data.datasets import load_dataset
from kairos_gym.evaluation.calibrate import calibrate_model
from kairos_gym.evaluation.control import plan, play
from kairos_gym.learning.recipes import RECIPES, model_config
from kairos_gym.report import machine
from planners import CEM, Plan
from world_model.dynamics import Pessimistic
from world_model.episodes import Episodes, spec_of
from world_model.training.fit import fit

PLANNERS = {
    "pendulum": CEM(horizon=8, chunk=2, candidates=48, elites=6, iterations=3),
    "reacher": CEM(horizon=5, chunk=4, candidates=64, elites=8, iterations=3, std=0.12),
    "halfcheetah": CEM(horizon=6, chunk=2, candidates=64, elites=8, iterations=3),
}
LASTS = {"pendulum": 100, "reacher": 50, "halfcheetah": 80}  # steps of a real episode
UPDATES = {"draft_steps": 5000, "steps": 200}
KEPT = 16  # episodes to calibrate on
RUNGS = 10  # policies that play by turns in a ladder's episodes


def pessimism(
    task: str,
    episodes_of_data: int = 8,
    dataset: str | None = None,
    policies: tuple[int, ...] = tuple(range(RUNGS)),
    by: Literal["uncertainty", "distance"] = "distance",
    penalties: tuple[float, ...] = (1.0, 2.0, 5.0),
    episodes: int = 20,
    seed: int = 0,
    start: int = 6000,
) -> dict[str, Any]:
    """Train on few episodes, calibrate on 16 others, and play for real with each penalty -> mean returns.

    Penalties are ``Pessimistic``'s, and so is ``by``. Each row has the mean difference to the same planner without one
    from the same starts, and its 95% interval over starts; "imagined" is what plans without a penalty promised a step,
    "real" what a step then earned.

    task: pendulum, reacher or halfcheetah. dataset: whose episodes, "TASK/train-v0" where None. policies: which of
    every ten episodes count, for a ladder's are played by ten policies by turns. seed: of the training, and which
    episodes it has. start: starts are those of ``reset(seed=start)`` and the following seeds.
    """
    from envs import make_real

    if task not in PLANNERS:
        raise ValueError(f"task must be one of {', '.join(PLANNERS)}, got {task!r}")
    recipe, planner = RECIPES[task], PLANNERS[task]
    env_id = f"{recipe.env},max_episode_steps={LASTS[task]}"
    name = f"{task}/train-v0" if dataset is None else dataset
    source = load_dataset(name)
    chosen = [e for e in range(source.total_episodes) if e % RUNGS in policies]
    first = seed * episodes_of_data
    if episodes_of_data < 1 or first + episodes_of_data + KEPT > len(chosen):
        raise ValueError(
            f"{name} has {len(chosen)} episodes of these policies: not enough for {episodes_of_data=} with {seed=} "
            f"and {KEPT} to calibrate on"
        )
    few = Episodes.from_minari(source, chosen[first : first + episodes_of_data])
    env = make_real(env_id)
    spec = spec_of(env, 4)
    env.close()
    folder = f"few-{name.replace('/', '-')}-{''.join(map(str, policies))}-{episodes_of_data}-{seed}"
    model = fit(
        model_config(recipe, spec), spec, few, replace(recipe.train, **UPDATES, seed=seed), out=Path("runs") / folder
    )
    calibrate_model(model, few, [Episodes.from_minari(source, chosen[-KEPT:])], [name], seed=seed)

    promised = _Promised(planner)
    plain = plan(env_id, model, promised, episodes=episodes, seed=start)
    space: Any = spec.action_space
    rest = np.zeros((episodes, *space.shape), space.dtype)
    still = play(env_id, lambda obs, inner: rest, episodes=episodes, seed=start)
    played = {
        str(p): plan(env_id, Pessimistic(model, p, by), planner, episodes=episodes, seed=start) for p in penalties
    }
    rows = [{"penalty": "0", "mean": float(plain.returns.mean())}]
    for penalty, other in (played | {"no action": still}).items():
        more = replace(other, returns=other.returns - plain.returns)
        mean, difference = float(other.returns.mean()), float(more.returns.mean())
        rows.append({"penalty": penalty, "mean": mean, "difference": difference, "interval": more.interval()})
    return {
        "bench": "caution",
        "task": task,
        "data": name,
        "policies": policies,
        "episodes_of_data": episodes_of_data,
        "by": by,
        "seed": seed,
        "start": start,
        "episodes": episodes,
        "reward_std": float(model.scaling.reward_std),
        "imagined": promised.mean(),
        "real": float(plain.returns.sum() / sum(map(len, plain.actions))),
        "rows": rows,
        "machine": machine(),
    }


class _Promised:
    """A planner that remembers what its plans were imagined to earn."""

    def __init__(self, planner: CEM):
        self.planner, self.values = planner, torch.zeros(0)

    def plan(self, *args: Any, **options: Any) -> Plan:
        """See ``Planner.plan``."""
        found = self.planner.plan(*args, **options)
        self.values = torch.cat([self.values, found.value])
        return found

    def mean(self) -> float:
        """A step's share, over all plans."""
        return float(self.values.mean()) / (self.planner.horizon * self.planner.chunk)
