"""mbrl-lib's MBPO trained on a given number of real steps: its real return and CPU time, as a line of JSON.

From the root of the repository:

    python3 -m venv /tmp/mbpo
    /tmp/mbpo/bin/pip install -r benchmarks/peers/mbpo-requirements.txt
    /tmp/mbpo/bin/pip install --no-deps mbrl==0.2.0
    OMP_NUM_THREADS=1 /tmp/mbpo/bin/python benchmarks/peers/mbpo.py Pendulum-v1 --samples 1000 --seed 0

Its own ``mbrl.algorithms.mbpo.train``, ensemble and SAC, with the settings that it ships for the task, or for the one
most like it: InvertedPendulum's for InvertedPendulum and Pendulum, HalfCheetah's, and Pusher's for Reacher. What
differs from what it ships:

- ``--samples`` counts every real step. It ships 5,000 steps of an untrained policy before those of training; here they
  are at most a quarter of all steps. Training ends with the last real step and its updates, also within an epoch.
- Its evaluation after each epoch, and saving the policy that did best in it, are left out. The last policy counts; it
  is evaluated, as after each fifth of the steps, without noise in ten real episodes.
- It was made for Hydra 1.0 and Gymnasium 0.26. Since 1.1 Hydra builds nested parts of a configuration beforehand, which
  is switched off here; Gymnasium 1.4 needs no change.

Its loop is unchanged: the ensemble is first trained after ``--every`` (as shipped: 200 or 250) steps of training, until
when the policy is untrained, and after exploration it acts without noise. ``--explore``, ``--every`` and ``--updates``
can be set for fewer steps than it was made for.

``cpu_seconds`` is the CPU time of training without the evaluations, and ``parts`` are the shares of the ensemble, its
rollouts and SAC's updates; the rest is mostly the real steps. One thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium
import mbrl
import mbrl.util.common
import numpy as np
import torch
from mbrl.algorithms import mbpo
from mbrl.env import termination_fns
from mbrl.planning.sac_wrapper import SACAgent
from mbrl.third_party.pytorch_sac_pranz24.sac import SAC
from omegaconf import OmegaConf

SETTINGS = {  # the file in mbrl-lib's conf/overrides, and what ends a dreamed episode
    "Pendulum-v1": ("mbpo_inv_pendulum", "no_termination"),
    "InvertedPendulum-v5": ("mbpo_inv_pendulum", "inverted_pendulum"),
    "Reacher-v5": ("mbpo_pusher", "no_termination"),
    "HalfCheetah-v5": ("mbpo_halfcheetah", "no_termination"),
}
EPISODES = 10


def settings(
    overrides: str,
    seed: int,
    samples: int,
    explore: int | None = None,
    every: int | None = None,
    updates: int | None = None,
) -> Any:
    """mbrl-lib's configuration as its own main.yaml composes it, with our changes."""
    shipped = Path(mbrl.__file__).parent / "examples" / "conf"
    parts = {"algorithm": "mbpo", "dynamics_model": "gaussian_mlp_ensemble", "overrides": overrides}
    cfg = OmegaConf.create({part: OmegaConf.load(shipped / part / f"{name}.yaml") for part, name in parts.items()})
    cfg.update(seed=seed, device="cpu", log_frequency_agent=1000)
    for built in (cfg.algorithm.agent, cfg.dynamics_model):
        built._recursive_ = False  # as it was in Hydra 1.0
    if explore is None:
        explore = min(cfg.algorithm.initial_exploration_steps, samples // 4)
    cfg.algorithm.initial_exploration_steps = explore
    cfg.overrides.num_steps = samples  # more than are left after exploration: the environment ends training
    if every is not None:
        cfg.overrides.freq_train_model = every
    if updates is not None:
        cfg.overrides.num_sac_updates_per_step = updates
    return cfg


class Enough(Exception):
    """All real steps are played."""


class Counted(gymnasium.Wrapper):  # type: ignore[type-arg]
    """An environment that calls ``each`` with the steps played, before every further one, and ends after ``limit``."""

    def __init__(self, env: gymnasium.Env[Any, Any], limit: int, each: Callable[[int], None]):
        super().__init__(env)
        self.limit, self.each, self.played = limit, each, 0

    def step(self, action: Any) -> Any:
        self.each(self.played)
        if self.played == self.limit:
            raise Enough
        self.played += 1
        return self.env.step(action)


def evaluate(env: gymnasium.Env[Any, Any], agent: SACAgent) -> list[float]:
    """The return of each real episode. Training's random numbers are not affected."""
    returns = []
    with torch.random.fork_rng(devices=[]):  # the policy draws numbers even when it acts without noise
        for episode in range(EPISODES):
            obs, _ = env.reset(seed=1000 + episode)
            total, over = 0.0, False
            while not over:
                obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
                total, over = total + float(reward), terminated or truncated
            returns.append(total)
    return returns


def train(name: str, samples: int, cfg: Any) -> dict[str, Any]:
    """Train with ``samples`` real steps -> returns, CPU time and counts."""
    spent: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    agents: list[SACAgent] = []
    returns: dict[int, list[float]] = {}
    fifths = {samples * k // 5 for k in range(1, 6)}
    evaluated = gymnasium.make(name)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - start
                calls[part] += 1

        return wrapped

    def make_agent(sac: SAC) -> SACAgent:
        agents.append(SACAgent(sac))
        return agents[-1]

    def each(played: int) -> None:
        if played in fifths and played not in returns:
            returns[played] = timed("evaluation", evaluate)(evaluated, agents[-1])

    mbpo.SACAgent = make_agent
    mbpo.evaluate = lambda *_: -np.inf  # never better than the best, so that nothing is saved
    mbpo.rollout_model_and_populate_sac_buffer = timed("rollouts", mbpo.rollout_model_and_populate_sac_buffer)
    SAC.update_parameters = timed("policy", SAC.update_parameters)
    common = mbrl.util.common
    common.train_model_and_save_model_and_data = timed("model", common.train_model_and_save_model_and_data)

    env = Counted(gymnasium.make(name), samples, each)
    env.reset(seed=cfg.seed)
    env.action_space.seed(cfg.seed + 2)  # as mbrl-lib does
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    ends = getattr(termination_fns, SETTINGS[name][1])
    start = time.process_time()
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        with suppress(Enough):
            mbpo.train(env, evaluated, ends, cfg, work_dir=folder)
        cpu_seconds = time.process_time() - start - spent.pop("evaluation", 0.0)
    assert env.played == samples
    last = returns[samples]
    return {
        "return": float(np.mean(last)),
        "returns": last,
        "after": {str(played): float(np.mean(values)) for played, values in returns.items()},
        "cpu_seconds": round(cpu_seconds, 1),
        "parts": {part: round(seconds, 1) for part, seconds in spent.items()},
        "policy_updates": calls["policy"],
        "model_trainings": calls["model"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", choices=SETTINGS)
    parser.add_argument("--samples", type=int, required=True, help="real steps, those of exploration among them")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--settings", help="which of mbrl-lib's conf/overrides (default: see above)")
    parser.add_argument("--explore", type=int, help="real steps of the untrained policy (default: see above)")
    parser.add_argument("--every", type=int, help="real steps between trainings of the model (default: as shipped)")
    parser.add_argument("--updates", type=int, help="policy updates a real step (default: as shipped)")
    parser.add_argument("--out", type=Path, help="a file to which the line is appended too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not 0 < (args.samples // 4 if args.explore is None else args.explore) < args.samples:
        parser.error("there has to be a real step of exploration, and one after it")
    shipped = args.settings or SETTINGS[args.env][0]
    cfg = settings(shipped, args.seed, args.samples, args.explore, args.every, args.updates)
    row = {
        "env": args.env,
        "samples": args.samples,
        "seed": args.seed,
        "settings": shipped,
        "explore": cfg.algorithm.initial_exploration_steps,
        "every": cfg.overrides.freq_train_model,
        "updates": cfg.overrides.num_sac_updates_per_step,
        **train(args.env, args.samples, cfg),
    }
    line = json.dumps(row)
    print(line)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
