"""Lift in the real robosuite: how often a plan dreamed up lifts the cube, beside all that it has to beat."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from kairos_gym.learning.recipes import RECIPES, collect_split, load_task_data, model_config
from kairos_gym.models import load
from kairos_gym.policies.cloning import best_episodes, clone
from kairos_gym.report import machine
from planners import CEM, MPC, Objective, PolicyGuided
from world_model.episodes import Episodes
from world_model.training.fit import fit

Who = Literal[
    "dream", "proposed", "random-data", "truth", "truth-budget", "policy", "clone", "clone-best", "expert", "random"
]
Wanted = Literal["staged", "simple", "learned"]
Act = Callable[[NDArray[Any], "NDArray[Any] | None"], NDArray[Any]]
HOLD = 5  # steps for which the cube must stay lifted at the end
PLANNER = CEM(horizon=8, chunk=2, candidates=192, elites=20, iterations=3, std=0.35, min_std=0.1)
# The simulator is some hundred times slower than the dream.
FRUGAL = replace(PLANNER, candidates=48, elites=8)
BEST = 1 / 3  # of the episodes, those with the highest return
POLICY_UPDATES = 50_000
DREAMS, ROUNDS = (1, 256), 7


def lift(who: Who, reward: Wanted = "staged", episodes: int = 50, seed: int = 30_000) -> dict[str, Any]:
    """Play Lift for real -> how many of ``episodes`` starts end with the cube held up for 5 steps, within 200.

    who: "dream", planning in the shipped model; "proposed", the same with the search begun at a behaviour clone's
        plan; "random-data", in a model of the same recipe trained on random actions alone; "truth", on the simulator
        itself with a quarter of the candidates; "truth-budget", in the dream with as few; "policy", SAC trained in the
        dream; "clone" and "clone-best", behaviour cloning on all data and on the best third; "expert"; "random".
    reward: what planners want: ``envs.robosuite.rewards`` staged or simple, or the reward that the model predicts.
    Starts are those of ``reset(seed=seed)`` and the following seeds, without those that are solved already. Planners
    look at every second step, the others at each.
    """
    from envs import make_real

    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    env: Any = make_real(RECIPES["lift"].env)
    begin, about = _player(who, reward, env)
    held: dict[int, bool] = {}  # by the start's seed
    steps, sizes, thinking, refused = [], set(), 0.0, 0
    bar = tqdm(total=episodes, unit="episode")
    while len(held) < episodes:
        number = seed + len(held) + refused
        obs, info = env.reset(seed=number)
        if info["success"]:
            refused += 1
            continue
        sizes.add(tuple(obs[env.unwrapped.fields["cube_size"]].tolist()))
        act = begin(number - seed)
        lasted, made, seen = 0, 0, None
        over = False
        while lasted < HOLD and not over:
            begun = time.thread_time()
            actions = act(obs, seen).reshape(-1, env.action_space.shape[0])
            thinking += time.thread_time() - begun
            frames = []
            for action in actions:
                obs, _, _, over, info = env.step(action.astype(np.float32))
                frames.append(obs)
                made, lasted = made + 1, lasted + 1 if info["success"] else 0
                if lasted == HOLD or over:
                    break
            seen = np.stack(frames)
        held[number] = lasted == HOLD
        steps.append(made)
        bar.set_postfix_str(f"{sum(held.values())} lifted", refresh=False)
        bar.update()
    bar.close()
    env.close()
    lifted = sum(held.values())
    low, high = wilson(lifted, episodes)
    won = [n for n, h in zip(steps, held.values(), strict=True) if h]
    return {
        "bench": "lift",
        "who": who,
        "reward": reward if who in ("dream", "proposed", "random-data", "truth", "truth-budget") else None,
        **about,
        "episodes": episodes,
        "seed": seed,
        "refused": refused,
        "cube_sizes": len(sizes),
        "lifted": lifted,
        "success": lifted / episodes,
        "wilson_95": [low, high],
        "median_steps_of_the_lifted": statistics.median(won) if won else None,
        "cpu_seconds_thinking": thinking / episodes,
        "failed": [start for start, h in held.items() if not h],
        "machine": machine(),
    }


def _player(who: Who, reward: Wanted, env: Any) -> tuple[Callable[[int], Act], dict[str, Any]]:
    """What plays: given an episode's number, a fresh ``act``; and what a reader should know of it."""
    from envs import Expert, SimulatorDynamics
    from envs.robosuite.rewards import simple_lift, staged_lift

    if who == "random":
        space = env.action_space

        def uniform(number: int) -> Act:
            rng = np.random.default_rng(number)
            return lambda obs, seen: rng.uniform(space.low, space.high)

        return uniform, {"data": None}
    if who == "expert":
        return lambda number: _alone(Expert(env, seed=number)), {"data": None}
    if who == "policy":
        return _dreamed_policy(staged_lift(env.unwrapped.fields)), {"data": "all"}
    if who in ("clone", "clone-best"):
        return _cloning(who == "clone-best"), {"data": "all" if who == "clone" else "best third"}
    fields = env.unwrapped.fields
    wanted = {"staged": staged_lift(fields), "simple": simple_lift(fields), "learned": None}[reward]
    planner: Any = FRUGAL if who.startswith("truth") else PLANNER
    about = {"data": "all", "planner": repr(planner)}
    world: Any
    if who == "truth":
        simulator = SimulatorDynamics(RECIPES["lift"].env)

        def true(number: int) -> Act:
            mpc = MPC(simulator, planner, Objective(reward_fn=wanted), seed=number)
            return lambda obs, seen: mpc.act(obs, state=simulator.capture(env))

        return true, about | {"data": None}
    if who == "random-data":
        recipe, task = RECIPES["lift"], load_task_data("lift")
        episodes = Episodes.from_minari(collect_split(recipe, "random", 3, recipe.episodes, "mixed"))
        world = fit(
            model_config(recipe, task.spec), task.spec, episodes, recipe.train, out=Path("runs") / "lift-random"
        )
        about["data"] = "as many random steps"
    else:
        world = load("lift")
    if who == "proposed":
        task = load_task_data("lift")
        planner = PolicyGuided(planner, clone(task.spec, task.train))

    def dreaming(number: int) -> Act:
        mpc = MPC(world, planner, Objective(reward_fn=wanted), seed=number)
        return lambda obs, seen: mpc.act(obs, inner_obs=seen)

    return dreaming, about


def _dreamed_policy(wanted: Any) -> Callable[[int], Act]:
    """SAC, trained in cautious dreams that begin at the experts' states, and by a quarter on the experts' own steps."""
    from kairos_gym.dream.sb3_vec_env import DreamVecEnv
    from kairos_gym.learning.learn import start_states, to_replay_buffer
    from kairos_gym.policies.sb3 import MixedReplayBuffer, make_algorithm
    from world_model.dynamics import Pessimistic

    world, real = load("lift"), load_task_data("lift").train
    world.starts = start_states(real)
    venv = DreamVecEnv(Pessimistic(world, 1.0), 64, max_episode_steps=16, reward_fn=wanted)
    venv.seed(0)
    nets = {"net_arch": [128, 128], "optimizer_kwargs": {"fused": True}}
    own: dict[str, Any] = {
        "replay_buffer_class": MixedReplayBuffer,
        "learning_starts": 0,
        "gamma": 0.97,
        "policy_kwargs": nets,
    }
    policy: Any = make_algorithm("sac", venv, **own)
    at = (real.index > 0).nonzero()[:, 0]
    reward = torch.zeros(len(real.obs))
    reward[at] = wanted(real.obs[at - 1], real.action[at], real.obs[at])
    policy.replay_buffer.real = to_replay_buffer(real, world.spec, policy, reward)
    policy.replay_buffer.share = 0.25
    policy.learn(POLICY_UPDATES // policy.gradient_steps * venv.num_envs, log_interval=None)
    return lambda number: _alone(lambda obs: policy.predict(obs, deterministic=True)[0])


def _cloning(only_best: bool) -> Callable[[int], Act]:
    task = load_task_data("lift")
    policy = clone(task.spec, best_episodes(task.train, BEST) if only_best else task.train)
    return lambda number: _alone(lambda obs: policy(torch.from_numpy(obs)).numpy())


def _alone(policy: Callable[[NDArray[Any]], NDArray[Any]]) -> Act:
    return lambda obs, seen: policy(obs)


def wilson(won: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a success rate (95%): it stays within [0,1], and says something also of 0 or all of n."""
    rate = won / of
    middle = (rate + z * z / (2 * of)) / (1 + z * z / of)
    half = z * sqrt(rate * (1 - rate) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def lift_speed() -> dict[str, Any]:
    """Dreamed Lift steps a CPU-second, 1 and 256 dreams at once and 1 or 4 steps at a time, over robosuite's own.

    One thread, by turns in one run, so that whatever else the machine does meets all alike; medians of 7 rounds.
    """
    from envs import make_real

    world: Any = load("lift")
    env = make_real(RECIPES["lift"].env, max_episode_steps=10**9)
    env.reset(seed=0)
    env.action_space.seed(0)

    def simulate() -> int:
        for _ in range(64):
            env.step(env.action_space.sample())
        return 64

    def dreaming(batch: int, chunk: int) -> Callable[[], int]:
        assert world.starts is not None
        first = world.starts.obs[torch.arange(batch) % len(world.starts.obs)]
        state = world.observe(world.initial(batch), first)
        low, high = (torch.from_numpy(bound) for bound in (world.spec.action_box.low, world.spec.action_box.high))
        actions = low + (high - low) * torch.rand(batch, chunk, len(low), generator=torch.Generator().manual_seed(0))

        def play() -> int:
            dream = state
            with torch.inference_mode():
                for _ in range(16):
                    dream, _ = world.imagine(dream, actions)
            return 16 * batch * chunk

        return play

    jobs = {"robosuite": simulate}
    jobs |= {f"{batch} dreams, chunk {chunk}": dreaming(batch, chunk) for batch in DREAMS for chunk in (1, 4)}
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            begun = time.thread_time()
            steps = job()
            rates[name].append(steps / (time.thread_time() - begun))
    env.close()
    base = rates["robosuite"]
    over = {n: statistics.median(a / b for a, b in zip(r, base, strict=True)) for n, r in rates.items()}
    return {
        "bench": "lift_speed",
        "steps_per_cpu_second": {name: statistics.median(rate) for name, rate in rates.items()},
        "over_robosuite": {name: ratio for name, ratio in over.items() if name != "robosuite"},
        "machine": machine(),
    }
