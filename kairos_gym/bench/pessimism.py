"""Whether plans that pay for the model's uncertainty have higher real returns, for models trained on little data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kairos_gym.bench.harness import Row
from kairos_gym.data.datasets import load_dataset
from kairos_gym.evaluation.calibrate import calibrate_model
from kairos_gym.evaluation.control import evaluate_planner, play_episodes
from kairos_gym.learning.recipes import RECIPES, model_config
from kairos_gym.report import machine
from planners import CEM, Plan
from world_model.dynamics import Pessimistic
from world_model.episodes import Episodes, spec_of
from world_model.model.world_model import WorldModel
from world_model.training.fit import fit

PLANNERS = {
    "pendulum": CEM(horizon=8, chunk=2, candidates=48, elites=6, iterations=3),
    "reacher": CEM(horizon=5, chunk=4, candidates=64, elites=8, iterations=3, std=0.12),
    "halfcheetah": CEM(horizon=6, chunk=2, candidates=64, elites=8, iterations=3),
}
LASTS = {"pendulum": 100, "reacher": 50, "halfcheetah": 80}  # steps of a real episode
UPDATES = {"draft_steps": 5000, "steps": 200}
CALIBRATION_EPISODES = 16
RUNGS = 10  # policies that take turns in a ladder's episodes


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
) -> Row:
    """Train on few episodes, calibrate on 16 others, and play for real with each penalty -> mean returns.

    Penalties are ``Pessimistic``'s, and so is ``by``. Each row has the mean difference to the same planner without one
    from the same starts, and its 95% interval over starts; "imagined" is the reward a step that plans without a penalty
    predicted, "real" the one that followed.

    task: pendulum, reacher or halfcheetah. dataset: whose episodes, "TASK/train-v0" where None. policies: which of
    every ten episodes count, for a ladder's are played by ten policies by turns. seed: of the training, and which
    episodes it has. start: starts are those of ``reset(seed=start)`` and the following seeds.
    """
    if task not in PLANNERS:
        raise ValueError(f"task must be one of {', '.join(PLANNERS)}, got {task!r}")
    env_id = f"{RECIPES[task].env},max_episode_steps={LASTS[task]}"
    name = f"{task}/train-v0" if dataset is None else dataset
    model = _train_on_few(task, env_id, name, policies, episodes_of_data, seed)
    recorder = _PlanRecorder(PLANNERS[task])
    plain = evaluate_planner(env_id, model, recorder, episodes=episodes, seed=start)
    space: Any = model.spec.action_space
    zeros = np.zeros((episodes, *space.shape), space.dtype)
    still = play_episodes(env_id, lambda obs, inner: zeros, episodes=episodes, seed=start)
    others = {
        str(penalty): evaluate_planner(
            env_id, Pessimistic(model, penalty, by), recorder.planner, episodes=episodes, seed=start
        )
        for penalty in penalties
    }
    rows: list[Row] = [{"penalty": "0", "mean": float(plain.returns.mean())}]
    for penalty, other in (others | {"no action": still}).items():
        gain = replace(other, returns=other.returns - plain.returns)
        mean, difference = float(other.returns.mean()), float(gain.returns.mean())
        rows.append({"penalty": penalty, "mean": mean, "difference": difference, "interval": gain.interval()})
    return {
        "bench": "pessimism",
        "task": task,
        "data": name,
        "policies": policies,
        "episodes_of_data": episodes_of_data,
        "by": by,
        "seed": seed,
        "start": start,
        "episodes": episodes,
        "reward_std": float(model.scaling.reward_std),
        "imagined": recorder.reward_per_step(),
        "real": float(plain.returns.sum() / sum(map(len, plain.actions))),
        "rows": rows,
        "machine": machine(),
    }


def _train_on_few(task: str, env_id: str, name: str, policies: tuple[int, ...], count: int, seed: int) -> WorldModel:
    """A model of ``count`` episodes of the dataset ``name``, calibrated on the last 16 of the same policies."""
    from envs import make_real

    source, recipe = load_dataset(name), RECIPES[task]
    chosen = [e for e in range(source.total_episodes) if e % RUNGS in policies]
    first = seed * count
    if count < 1 or first + count + CALIBRATION_EPISODES > len(chosen):
        raise ValueError(
            f"{name} has {len(chosen)} episodes of these policies: not enough for episodes_of_data={count} with "
            f"{seed=} and {CALIBRATION_EPISODES} to calibrate on"
        )
    few = Episodes.from_minari(source, chosen[first : first + count])
    env = make_real(env_id)
    spec = spec_of(env, 4)
    env.close()
    folder = Path("runs") / f"few-{name.replace('/', '-')}-{''.join(map(str, policies))}-{count}-{seed}"
    config = replace(recipe.train, **UPDATES, seed=seed)
    model = fit(model_config(recipe, spec), spec, few, config, out=folder)
    held_out = Episodes.from_minari(source, chosen[-CALIBRATION_EPISODES:])
    calibrate_model(model, few, [held_out], [name], seed=seed)
    return model


class _PlanRecorder:
    """A planner that records the imagined returns of its plans."""

    def __init__(self, planner: CEM):
        self.planner, self.values = planner, torch.zeros(0)

    def plan(self, *args: Any, **options: Any) -> Plan:
        """See ``Planner.plan``."""
        result = self.planner.plan(*args, **options)
        self.values = torch.cat([self.values, result.value])
        return result

    def reward_per_step(self) -> float:
        """The mean imagined reward of a step, over all plans."""
        return float(self.values.mean()) / (self.planner.horizon * self.planner.chunk)
