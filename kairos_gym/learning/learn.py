"""Learns a policy in a model's dream and judges it in the real simulator as it learns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gymnasium import spaces
from torch import Tensor
from tqdm import tqdm

from kairos_gym.dream.vector_env import DreamVectorEnv
from kairos_gym.models import load
from world_model.contract import Dynamics, Spec
from world_model.dynamics.draft_dynamics import DraftDynamics
from world_model.episodes import Episodes, StartStates
from world_model.spaces import alike

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.vec_env import VecEnv

    from kairos_gym.policies.sb3 import Algorithm
    from kairos_gym.policies.shac import ActorCritic

EVAL_EPISODES = 10  # episodes that say what a policy earns
STEPS = {"shac": 2_000_000}  # of single dreams, which cost SHAC a tenth of what they cost the others


def learn(
    model: str | Path | Dynamics,
    out: str | Path,
    *,
    env_id: str | None = None,
    algorithm: Algorithm | Literal["shac"] = "sac",
    steps: int | None = None,
    dreams: int = 64,
    max_error: float | None = None,
    penalty: float = 0.0,
    reward_fn: Any = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> BaseAlgorithm | ActorCritic:
    """Learn a policy in the dream of ``model`` -> the algorithm; ``out`` keeps its best policy.

    env_id: the simulator that judges the policy, about ten times in all, by 10 episodes; without it, the one that the
        model was trained on.
    algorithm: Stable-Baselines3's "sac", "td3" or "ppo"; or "shac" (``kairos_gym.policies.shac``), which sends gradients
        through the dream, that of the model's draft alone where it has one. settings: its own, over those of
        ``kairos_gym.policies.sb3`` or of ``kairos_gym.policies.shac.ShacConfig``.
    steps: of single dreams in all, 100,000 (for shac 2,000,000) where None; ``dreams`` go on side by side, in whole
        episodes from the model's starts.
    max_error: cuts dreams short where they may be wrong by more, ``penalty`` makes steps far from the training data
        cost (see ``planners.Pessimistic``): two guards against a policy that lives on the model's mistakes. Neither goes
        with shac.
    reward_fn: as a dream env takes it, in place of the learned reward; for real the simulator's own counts.

    The folder ``out`` is described at ``kairos_gym.policies.sb3.TrainingRecord``. A call that was killed goes on where it is repeated
    from the last of these times. In a script of your own, ``torch.set_num_threads(1)`` makes it several times as fast.

    Raises ValueError for a wrong argument, for a model without a simulator and for one that wasn't calibrated where a
    guard needs it.
    """
    from kairos_gym.dream.sb3_vec_env import DreamVecEnv
    from kairos_gym.policies.sb3 import train_policy
    from world_model.dynamics import Pessimistic

    steps = STEPS.get(algorithm, 100_000) if steps is None else steps
    if steps < 20 * dreams:
        raise ValueError(f"steps must be at least {20 * dreams}, twenty for each of the {dreams} dreams, got {steps}")
    world: Any = load(model) if isinstance(model, str | Path) else model
    env_id = env_id or (getattr(world, "card", None) or {}).get("env")
    if env_id is None:
        raise ValueError("the model's card names no simulator: say which one judges (env_id, --env)")
    real, limit = make_eval_envs(env_id)
    for what, ours, theirs in (
        ("observations", real.observation_space, world.spec.observation_space),
        ("actions", real.action_space, world.spec.action_space),
    ):
        if not alike(ours, theirs):
            raise ValueError(f"{env_id} has {what} {ours}, the model {theirs}: another simulator has to judge")
        if algorithm != "ppo" and (not isinstance(ours, spaces.Box) or len(ours.shape) != 1):
            raise ValueError(f"{algorithm} learns with {what} that are a Box [N], got {ours}: ppo may do")
    eval_dream = DreamVecEnv(world, EVAL_EPISODES, max_episode_steps=limit, reward_fn=reward_fn)
    about = {
        "simulator": env_id,
        "model": world.fingerprint() if hasattr(world, "fingerprint") else type(world).__qualname__,
        "dreams": dreams,
        "max_error": max_error,
        "penalty": penalty,
        "reward_fn": None if reward_fn is None else getattr(reward_fn, "__qualname__", "of its own"),
    }
    if algorithm == "shac":
        if penalty or max_error is not None:
            raise ValueError("max_error and penalty pass no gradient on: choose one of the algorithms that sample")
        # The memory would cost seven times as much again, and where gradients help it adds little.
        draft_dynamics = DraftDynamics(world) if getattr(world, "draft", None) is not None else world
        env = DreamVectorEnv(draft_dynamics, dreams, reward_fn=reward_fn, autoreset_mode="SameStep")
        return _learn_shac(
            env, real, eval_dream, out, steps=steps, seed=seed, about=about, progress=progress, **settings
        )
    guarded = Pessimistic(world, penalty) if penalty else world
    venv = DreamVecEnv(guarded, dreams, max_error=max_error, reward_fn=reward_fn)
    venv.seed(seed)
    return train_policy(
        algorithm,
        venv,
        real,
        out,
        steps=steps,
        every=max(1, steps // 10),
        dream=eval_dream,
        seed=seed,
        about=about,
        progress=progress,
        **settings,
    )


def _learn_shac(
    env: DreamVectorEnv,
    real: VecEnv,
    dream: VecEnv,
    out: str | Path,
    *,
    steps: int,
    seed: int,
    about: dict[str, Any],
    progress: bool,
    **settings: Any,
) -> ActorCritic:
    """``kairos_gym.policies.sb3.train_policy`` for SHAC."""
    from kairos_gym.policies.sb3 import TrainingRecord, evaluate, serialise_settings
    from kairos_gym.policies.shac import ActorCritic, ShacConfig

    record = TrainingRecord(out, {"algorithm": "shac", "seed": seed, **about, **serialise_settings(settings)})
    if record.rows:
        agent = ActorCritic.load(record.last)
    else:
        agent = ActorCritic.from_spec(env.model.spec, seed=seed, config=ShacConfig(**settings))
    agent.start(env, seed + agent.num_timesteps)
    with tqdm(total=steps, initial=agent.num_timesteps, unit="step", disable=not progress) as bar:
        while agent.num_timesteps < steps:
            until = min(steps, agent.num_timesteps + max(1, steps // 10))
            while agent.num_timesteps < until:
                agent.rollout()
                bar.update(agent.num_timesteps - bar.n)
            record.add(agent, agent.num_timesteps, evaluate(agent, real, dream))
    return agent


def make_eval_envs(env_id: str) -> tuple[VecEnv, int]:
    """As many real simulators as judge a policy, and the steps that their episodes may have.

    Raises ValueError where there is no such limit.
    """
    from stable_baselines3.common.vec_env import DummyVecEnv

    from envs import make_real

    made = [make_real(env_id) for _ in range(EVAL_EPISODES)]
    spec = made[0].spec
    if spec is None or spec.max_episode_steps is None:
        raise ValueError(f"{env_id} has no time limit, so an episode might never end")
    return DummyVecEnv([lambda env=env: env for env in made]), spec.max_episode_steps  # type: ignore[misc]


def start_states(episodes: Episodes) -> StartStates:
    """Dreams that begin at every real state from which an episode went on."""
    at = (episodes.left > 0).nonzero()[:, 0]
    return StartStates(episodes.obs[at][:, None], episodes.action[at][:, None])


def to_replay_buffer(episodes: Episodes, spec: Spec, policy: Any, reward: Tensor | None = None) -> ReplayBuffer:
    """All steps of ``episodes`` as Stable-Baselines3's off-policy algorithm ``policy`` learns from them.

    reward: [F] in place of what was earned.
    """
    from stable_baselines3.common.buffers import ReplayBuffer

    rewards = episodes.reward if reward is None else reward
    at = (episodes.index > 0).nonzero()[:, 0]
    found = ReplayBuffer(len(at), spec.observation_space, spec.action_space, device="cpu")
    for t in at.tolist():
        obs, after, action = (x[None].numpy() for x in (episodes.obs[t - 1], episodes.obs[t], episodes.action[t]))
        ended = episodes.terminated[t].numpy()[None]
        found.add(obs, after, policy.policy.scale_action(action), rewards[t].numpy()[None], ended, [{}])
    return found
