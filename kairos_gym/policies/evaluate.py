"""Evaluates policies while they learn: whole episodes without noise, in the real simulator and in the dream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

EVAL_EPISODES = 10  # of each evaluation


class Evaluation(NamedTuple):
    """The returns of a policy from the same E starts, in the simulator and in the dream."""

    real: NDArray[np.float64]  # [E]
    imagined: NDArray[np.float64] | None  # [E]; None where nothing was dreamed


def evaluate(policy: Any, real: VecEnv, dream: VecEnv | None = None, *, seed: int = 1000) -> Evaluation:
    """One whole episode of ``policy``, without its noise, in each of the E envs of ``real`` -> Evaluation.

    Env e starts with seed + e. A ``dream`` of as many envs, whose ``reset`` takes the option "observation", starts at
    the very same observations.
    """
    real.seed(seed)
    starts = real.reset()
    real.seed(seed)
    returns = _play_episodes(policy, real)
    if dream is None:
        return Evaluation(returns, None)
    dream.seed(seed)
    dream.set_options([{"observation": start} for start in np.asarray(starts)])
    return Evaluation(returns, _play_episodes(policy, dream))


def _play_episodes(policy: Any, venv: VecEnv) -> NDArray[np.float64]:
    """The return of each env's first episode [E], in the order of the envs, unlike SB3's ``evaluate_policy``."""
    obs, returns, running = venv.reset(), np.zeros(venv.num_envs), np.ones(venv.num_envs, bool)
    while running.any():
        obs, rewards, done, _ = venv.step(policy.predict(obs, deterministic=True)[0])
        returns[running] += rewards[running]
        running &= ~done
    return returns


def make_eval_envs(env_id: str) -> tuple[VecEnv, int]:
    """EVAL_EPISODES real simulators to evaluate policies in, and the time limit of their episodes in steps.

    Raises ValueError where there is no such limit.
    """
    from stable_baselines3.common.vec_env import DummyVecEnv

    from envs import make_real

    envs = [make_real(env_id) for _ in range(EVAL_EPISODES)]
    spec = envs[0].spec
    if spec is None or spec.max_episode_steps is None:
        raise ValueError(f"{env_id} has no time limit, so an episode might never end")
    return DummyVecEnv([lambda env=env: env for env in envs]), spec.max_episode_steps  # type: ignore[misc]
