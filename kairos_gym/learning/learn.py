"""Learns a policy in a model's dream and evaluates it in the real simulator as it learns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymnasium import spaces
from torch import Tensor
from tqdm import tqdm

from kairos_gym.dream.envs import DreamVectorEnv
from kairos_gym.learning.learn_config import LearnConfig
from kairos_gym.models import load
from kairos_gym.policies.evaluate import EVAL_EPISODES, make_eval_envs
from world_model.contract import Dynamics, Spec
from world_model.dynamics.draft_dynamics import DraftDynamics
from world_model.episodes import Episodes, StartStates
from world_model.spaces import alike

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.vec_env import VecEnv

    from kairos_gym.policies.shac import ActorCritic

EVALUATIONS = 10  # of a training


def learn(
    model: str | Path | Dynamics,
    out: str | Path,
    config: LearnConfig = LearnConfig(),
    *,
    env_id: str | None = None,
    reward_fn: Any = None,
    progress: bool = True,
    **settings: Any,
) -> BaseAlgorithm | ActorCritic:
    """Learn a policy in the dream of ``model`` -> the algorithm; ``out`` holds its best policy.

    out: a folder, as ``kairos_gym.policies.sb3.TrainingRecord`` describes it.
    env_id: the simulator to evaluate the policy in; None takes the one that the model was trained on.
    reward_fn: as a dream env takes it, in place of the learned reward; real returns stay the simulator's own.
    settings: the algorithm's own, over those of ``kairos_gym.policies.sb3`` or ``kairos_gym.policies.shac.ShacConfig``.

    Dreams start at the model's start states and last whole episodes. SHAC learns in the model's draft alone, where it
    has one. ``max_error`` and ``penalty`` (``world_model.dynamics.Pessimistic``) keep a policy from exploiting the
    model's mistakes.

    A call that was killed goes on from its last evaluation where it is repeated. In a script of your own,
    ``torch.set_num_threads(1)`` makes it several times as fast.

    Raises ValueError for a model without a simulator, for one that wasn't calibrated where a guard needs it, and for
    spaces that aren't the simulator's or that the algorithm can't learn with.
    """
    from kairos_gym.dream.sb3_vec_env import DreamVecEnv
    from kairos_gym.policies.sb3 import train_policy
    from world_model.dynamics import Pessimistic

    world: Any = load(model) if isinstance(model, str | Path) else model
    env_id = env_id or (getattr(world, "card", None) or {}).get("env")
    if env_id is None:
        raise ValueError("the model's card names no simulator: say which one to evaluate in (env_id, --env)")
    real, limit = make_eval_envs(env_id)
    _expect_spaces(world.spec, env_id, real, config.algorithm)
    dream = DreamVecEnv(world, EVAL_EPISODES, max_episode_steps=limit, reward_fn=reward_fn)
    about = _about(world, env_id, config, reward_fn)
    if config.algorithm == "shac":
        # The memory would cost seven times as much again, and where gradients help it adds little.
        dynamics = DraftDynamics(world) if getattr(world, "draft", None) is not None else world
        env = DreamVectorEnv(dynamics, config.dreams, reward_fn=reward_fn, autoreset_mode="SameStep")
        return _learn_shac(env, real, dream, out, config, about, progress, settings)
    dynamics = Pessimistic(world, config.penalty) if config.penalty else world
    venv = DreamVecEnv(dynamics, config.dreams, max_error=config.max_error, reward_fn=reward_fn)
    venv.seed(config.seed)
    return train_policy(
        config.algorithm,
        venv,
        real,
        out,
        steps=config.total_steps,
        every=max(1, config.total_steps // EVALUATIONS),
        dream=dream,
        seed=config.seed,
        about=about,
        progress=progress,
        **settings,
    )


def _learn_shac(
    env: DreamVectorEnv,
    real: VecEnv,
    dream: VecEnv,
    out: str | Path,
    config: LearnConfig,
    about: dict[str, Any],
    progress: bool,
    settings: dict[str, Any],
) -> ActorCritic:
    """``kairos_gym.policies.sb3.train_policy`` for SHAC."""
    from kairos_gym.policies.evaluate import evaluate
    from kairos_gym.policies.sb3 import TrainingRecord, serialise_settings
    from kairos_gym.policies.shac import ActorCritic, ShacConfig

    seed, steps = config.seed, config.total_steps
    record = TrainingRecord(out, {"algorithm": "shac", "seed": seed, **about, **serialise_settings(settings)})
    if record.rows:
        agent = ActorCritic.load(record.last)
    else:
        agent = ActorCritic.from_spec(env.model.spec, seed=seed, config=ShacConfig(**settings))
    agent.start(env, seed + agent.num_timesteps)
    with tqdm(total=steps, initial=agent.num_timesteps, unit="step", disable=not progress) as bar:
        while agent.num_timesteps < steps:
            next_evaluation = min(steps, agent.num_timesteps + max(1, steps // EVALUATIONS))
            while agent.num_timesteps < next_evaluation:
                agent.rollout()
                bar.update(agent.num_timesteps - bar.n)
            record.add(agent, agent.num_timesteps, evaluate(agent, real, dream))
    return agent


def _about(world: Any, env_id: str, config: LearnConfig, reward_fn: Any) -> dict[str, Any]:
    """What has to be the same for a training to go on."""
    return {
        "simulator": env_id,
        "model": world.fingerprint() if hasattr(world, "fingerprint") else type(world).__qualname__,
        "dreams": config.dreams,
        "max_error": config.max_error,
        "penalty": config.penalty,
        "reward_fn": None if reward_fn is None else getattr(reward_fn, "__qualname__", "of its own"),
    }


def _expect_spaces(spec: Spec, env_id: str, real: VecEnv, algorithm: str) -> None:
    for name, ours, theirs in (
        ("observations", real.observation_space, spec.observation_space),
        ("actions", real.action_space, spec.action_space),
    ):
        if not alike(ours, theirs):
            raise ValueError(f"{env_id} has {name} {ours}, the model {theirs}: evaluate it in another simulator")
        if algorithm != "ppo" and (not isinstance(ours, spaces.Box) or len(ours.shape) != 1):
            raise ValueError(f"{algorithm} learns with {name} that are a Box [N], got {ours}: ppo may do")


def start_states(episodes: Episodes) -> StartStates:
    """Every state of the episodes but the last of each, for dreams to start at."""
    at = (episodes.left > 0).nonzero()[:, 0]
    return StartStates(episodes.obs[at][:, None], episodes.action[at][:, None])


def to_replay_buffer(episodes: Episodes, spec: Spec, policy: Any, reward: Tensor | None = None) -> ReplayBuffer:
    """All steps of ``episodes`` as Stable-Baselines3's off-policy algorithm ``policy`` learns from them.

    reward: [F] in place of the recorded one.
    """
    from stable_baselines3.common.buffers import ReplayBuffer

    rewards = episodes.reward if reward is None else reward
    at = (episodes.index > 0).nonzero()[:, 0]
    buffer = ReplayBuffer(len(at), spec.observation_space, spec.action_space, device="cpu")
    for t in at.tolist():
        obs, next_obs, action = (x[None].numpy() for x in (episodes.obs[t - 1], episodes.obs[t], episodes.action[t]))
        done = episodes.terminated[t].numpy()[None]
        buffer.add(obs, next_obs, policy.policy.scale_action(action), rewards[t].numpy()[None], done, [{}])
    return buffer
