"""Lift in the real robosuite: how often a plan made in the dream lifts the cube, beside other policies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from kairos_gym.bench.harness import Row
from kairos_gym.data.episode import RecordedEpisode
from kairos_gym.evaluation.intervals import wilson
from kairos_gym.learning.recipes import RECIPES, collect_split, load_task_data, model_config
from kairos_gym.models import load
from kairos_gym.policies.cloning import best_episodes, clone
from kairos_gym.report import machine
from planners import CEM, MPC, Objective, PolicyGuided
from world_model.contract import StepFn
from world_model.episodes import Episodes
from world_model.training.fit import fit

PolicyName = Literal[
    "dream", "guided", "random-data", "truth", "truth-budget", "sac", "clone", "clone-best", "expert", "random"
]
RewardName = Literal["staged", "simple", "learned"]
Act = Callable[[NDArray[Any], "NDArray[Any] | None"], NDArray[Any]]  # obs [O], the last steps' obs [K,O] -> actions
MakeAct = Callable[[int], Act]  # of an episode's number
HOLD = 5  # steps for which the cube must stay lifted at the end
PLANNER = CEM(horizon=8, chunk=2, candidates=192, elites=20, iterations=3, std=0.35, min_std=0.1)
SMALL_PLANNER = replace(PLANNER, candidates=48, elites=8)  # the simulator is some hundred times slower than the dream
BEST = 1 / 3  # of the episodes, those with the highest return
POLICY_UPDATES = 50_000


def lift(policy: PolicyName, reward: RewardName = "staged", episodes: int = 50, seed: int = 30_000) -> Row:
    """Play Lift for real -> how many of ``episodes`` starts end with the cube held up for 5 steps, within 200.

    policy: "dream", planning in the shipped model; "guided", the same with the search begun at a behaviour clone's
        plan; "random-data", in a model of the same recipe trained on random actions alone; "truth", on the simulator
        itself with a quarter of the candidates; "truth-budget", in the dream with as few; "sac", SAC trained in the
        dream; "clone" and "clone-best", behaviour cloning on all data and on the best third; "expert"; "random".
    reward: the planners' objective: ``envs.robosuite.rewards`` staged or simple, or the reward that the model predicts.
    Starts are those of ``reset(seed=seed)`` and the following seeds, without those that are solved already. Planners
    look at every second step, the others at each.
    """
    from envs import make_real

    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    env: Any = make_real(RECIPES["lift"].env)
    make_act, columns = _make_policy(policy, reward, env)
    held: dict[int, bool] = {}  # by the start's seed
    steps, sizes, thinking, refused = [], set(), 0.0, 0
    bar = tqdm(total=episodes, unit="episode")
    while len(held) < episodes:
        number = seed + len(held) + refused
        episode = RecordedEpisode(env, number)
        if episode.successes[0]:
            refused += 1
            continue
        sizes.add(tuple(episode.obs[env.unwrapped.fields["cube_size"]].tolist()))
        act, last_obs = make_act(number - seed), None
        while not (episode.done or _is_held(episode)):
            start = time.thread_time()
            actions = act(episode.obs, last_obs).reshape(-1, env.action_space.shape[0])
            thinking += time.thread_time() - start
            first = len(episode.observations)
            for action in actions.astype(np.float32):
                episode.step(action)
                if episode.done or _is_held(episode):
                    break
            last_obs = np.stack(episode.observations[first:])
        held[number] = _is_held(episode)
        steps.append(len(episode.actions))
        bar.set_postfix_str(f"{sum(held.values())} lifted", refresh=False)
        bar.update()
    bar.close()
    env.close()
    about = {"bench": "lift", "policy": policy, "reward": reward if "planner" in columns else None, **columns}
    return about | {
        "episodes": episodes,
        "seed": seed,
        "refused": refused,
        "cube_sizes": len(sizes),
        **_successes(held, steps),
        "cpu_seconds_thinking": thinking / episodes,
        "machine": machine(),
    }


def _is_held(episode: RecordedEpisode) -> bool:
    """Whether the cube has been lifted for the last HOLD steps."""
    return all(episode.successes[-HOLD:])  # at the reset it was not lifted


def _successes(held: dict[int, bool], steps: list[int]) -> Row:
    """How many starts ended with the cube held, the rate's interval, and the steps that these took."""
    lifted = sum(held.values())
    took = [n for n, success in zip(steps, held.values(), strict=True) if success]
    return {
        "lifted": lifted,
        "success": lifted / len(held),
        "wilson_95": wilson(lifted, len(held)),
        "median_steps_of_the_lifted": statistics.median(took) if took else None,
        "failed": [seed for seed, success in held.items() if not success],
    }


def _make_policy(name: PolicyName, reward: RewardName, env: Any) -> tuple[MakeAct, dict[str, Any]]:
    """What gives an episode its ``act``, and columns of the row: the data that it learned from, its planner."""
    from envs import Expert
    from envs.robosuite.rewards import simple_lift, staged_lift

    if name == "random":
        return _uniform(env.action_space), {"data": None}
    if name == "expert":
        return lambda episode: _reactive(Expert(env, seed=episode)), {"data": None}
    fields = env.unwrapped.fields
    if name == "sac":
        return _dreamed_policy(staged_lift(fields)), {"data": "all"}
    if name in ("clone", "clone-best"):
        return _clone(name == "clone-best"), {"data": "all" if name == "clone" else "best third"}
    reward_fn = {"staged": staged_lift(fields), "simple": simple_lift(fields), "learned": None}[reward]
    return _planning(name, Objective(reward_fn=reward_fn), env)


def _planning(name: PolicyName, objective: Objective, env: Any) -> tuple[MakeAct, dict[str, Any]]:
    """Planning in a dream or, for "truth", in the simulator."""
    from envs import SimulatorDynamics

    planner: Any = SMALL_PLANNER if name.startswith("truth") else PLANNER
    columns = {"data": "all", "planner": repr(planner)}
    if name == "truth":
        simulator = SimulatorDynamics(RECIPES["lift"].env)

        def make_exact(episode: int) -> Act:
            mpc = MPC(simulator, planner, objective, seed=episode)
            return lambda obs, inner: mpc.act(obs, state=simulator.capture(env))

        return make_exact, columns | {"data": None}
    world: Any = load("lift") if name != "random-data" else _fit_random_data()
    if name == "random-data":
        columns["data"] = "as many random steps"
    if name == "guided":
        task = load_task_data("lift")
        planner = PolicyGuided(planner, clone(task.spec, task.train))

    def make_dreaming(episode: int) -> Act:
        mpc = MPC(world, planner, objective, seed=episode)
        return lambda obs, inner: mpc.act(obs, inner_obs=inner)

    return make_dreaming, columns


def _fit_random_data() -> Any:
    """A model of the shipped one's recipe, trained on as many episodes of random actions."""
    recipe, task = RECIPES["lift"], load_task_data("lift")
    episodes = Episodes.from_minari(collect_split(recipe, "random", 3, recipe.episodes, "mixed"))
    config = model_config(recipe, task.spec)
    return fit(config, task.spec, episodes, recipe.train, out=Path("runs") / "lift-random")


def _uniform(space: Any) -> MakeAct:
    def make(episode: int) -> Act:
        rng = np.random.default_rng(episode)
        return lambda obs, inner: rng.uniform(space.low, space.high)

    return make


def _dreamed_policy(reward_fn: StepFn) -> MakeAct:
    """SAC, trained in pessimistic dreams that start at the experts' states, and by a quarter on the experts' steps."""
    from kairos_gym.dream.sb3_vec_env import DreamVecEnv
    from kairos_gym.learning.learn import start_states, to_replay_buffer
    from kairos_gym.policies.sb3 import MixedReplayBuffer, make_algorithm
    from world_model.dynamics import Pessimistic

    world, real = load("lift"), load_task_data("lift").train
    world.starts = start_states(real)
    venv = DreamVecEnv(Pessimistic(world, 1.0), 64, max_episode_steps=16, reward_fn=reward_fn)
    venv.seed(0)
    nets = {"net_arch": [128, 128], "optimizer_kwargs": {"fused": True}}
    settings: dict[str, Any] = {
        "replay_buffer_class": MixedReplayBuffer,
        "learning_starts": 0,
        "gamma": 0.97,
        "policy_kwargs": nets,
    }
    policy: Any = make_algorithm("sac", venv, **settings)
    steps = (real.index > 0).nonzero()[:, 0]
    reward = torch.zeros(len(real.obs))
    reward[steps] = reward_fn(real.obs[steps - 1], real.action[steps], real.obs[steps])
    policy.replay_buffer.real = to_replay_buffer(real, world.spec, policy, reward)
    policy.replay_buffer.share = 0.25
    policy.learn(POLICY_UPDATES // policy.gradient_steps * venv.num_envs, log_interval=None)
    return lambda episode: _reactive(lambda obs: policy.predict(obs, deterministic=True)[0])


def _clone(only_best: bool) -> MakeAct:
    task = load_task_data("lift")
    policy = clone(task.spec, best_episodes(task.train, BEST) if only_best else task.train)
    return lambda episode: _reactive(lambda obs: policy(torch.from_numpy(obs)).numpy())


def _reactive(policy: Callable[[NDArray[Any]], NDArray[Any]]) -> Act:
    """A policy that needs the present observation alone."""
    return lambda obs, inner: policy(obs)
