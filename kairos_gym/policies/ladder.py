"""Policies of different skill for one simulator, to record experience with and to compare a dream on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from world_model.files import replace_atomically
from world_model.noise import bits, normal
from world_model.spaces import alike

Seeds = NDArray[np.int64]
HOLD = 8  # steps for which "held" keeps an action
PERIOD = 20  # steps of a "sine"
NOISES = (0.3, 0.6)  # std in half ranges of an action
STEPS = 12_000  # of training, the same for every task
ALGORITHMS = ("sac", "td3", "ddpg", "ppo", "a2c", "dqn")


@dataclass(frozen=True)
class Policy:
    """``act(obs, step, seeds) -> actions`` for N episodes side by side, and a name.

    obs: N elements of the observation space, stacked; step: how many steps the episodes have made; seeds: int64 [N],
    one of each episode; actions: N elements of the action space, stacked. It is a pure function, so a policy draws the
    same random numbers in the simulator and in a dream of it.
    """

    name: str
    act: Callable[[Any, int, Seeds], NDArray[Any]]


def ladder(env_id: str, folder: str | Path | None = None, *, seed: int = 0, progress: bool = True) -> list[Policy]:
    """Ten policies from doing nothing to skilled: ``scripted_policies`` and ``trained_policies`` -> list of Policy.

    Where a task has a scripted expert (robosuite's Lift, Stack and Door), ``expert_policies`` replace the trained ones.
    """
    from envs import make_real

    env = make_real(env_id)
    space = env.action_space
    try:
        skilled = expert_policies(env)
    except ValueError:  # no expert for this task, or not as it is observed and controlled here
        skilled = trained_policies(env_id, folder, seed=seed, progress=progress)
    env.close()
    return scripted_policies(space) + skilled


def expert_policies(env: gym.Env) -> list[Policy]:
    """A task's scripted expert: clean, with noise of 0.3, 0.6 and 1 half ranges, missing its aim, and letting go.

    Raises ValueError where there is none.
    """
    from envs import Expert

    Expert(env)

    def expert(failure: str | None) -> Callable[[Any, int, Seeds], NDArray[Any]]:
        experts: dict[int, Expert] = {}

        def act(obs: Any, step: int, seeds: Seeds) -> NDArray[Any]:
            for seed in map(int, seeds):
                if seed not in experts:
                    experts[seed] = Expert(env, failure=failure, seed=seed)
            return np.stack([experts[int(seed)].act(row, step) for row, seed in zip(obs, seeds, strict=True)])

        return act

    clean, space = Policy("expert", expert(None)), env.action_space
    assert isinstance(space, spaces.Box)
    return [
        clean,
        *(with_noise(clean, space, std) for std in (*NOISES, 1.0)),
        Policy("expert, aims beside", expert("offset")),
        Policy("expert, lets go", expert("drop")),
    ]


def scripted_policies(space: spaces.Space) -> list[Policy]:
    """Policies that ignore observations: still (the middle action), uniform, held (uniform, for 8 steps each), sine."""
    if isinstance(space, spaces.Discrete):
        first, n = int(space.start), int(space.n)

        def uniform_discrete(step: int, seeds: Seeds) -> NDArray[Any]:
            return first + (_bits(step, seeds) % n).astype(space.dtype)

        return [
            Policy("still", lambda obs, step, seeds: np.full(len(seeds), first, space.dtype)),
            Policy("uniform", lambda obs, step, seeds: uniform_discrete(step, seeds)),
            Policy("held", lambda obs, step, seeds: uniform_discrete(step // HOLD, seeds)),
            Policy("sine", lambda obs, step, seeds: np.full(len(seeds), first + step * n // PERIOD % n, space.dtype)),
        ]
    assert isinstance(space, spaces.Box)
    middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
    phase = np.linspace(0, 2 * np.pi, space.low.size, endpoint=False).reshape(space.shape)

    def rescale(unit: NDArray[Any], n: int) -> NDArray[Any]:
        """Numbers in [-1,1] as actions [n,...]."""
        return np.broadcast_to(middle + half * unit, (n, *space.shape)).astype(space.dtype)

    def uniform(step: int, seeds: Seeds) -> NDArray[Any]:
        random = _bits(step, seeds[:, None] * 1_000_003 + np.arange(space.low.size))
        return rescale((random / 2**62 - 1).reshape(-1, *space.shape), len(seeds))

    return [
        Policy("still", lambda obs, step, seeds: rescale(np.zeros(space.shape), len(seeds))),
        Policy("uniform", lambda obs, step, seeds: uniform(step, seeds)),
        Policy("held", lambda obs, step, seeds: uniform(step // HOLD, seeds)),
        Policy("sine", lambda obs, step, seeds: rescale(np.sin(2 * np.pi * step / PERIOD + phase), len(seeds))),
    ]


def trained_policies(
    env_id: str, folder: str | Path | None = None, *, seed: int = 0, steps: int = STEPS, progress: bool = True
) -> list[Policy]:
    """Policies that Stable-Baselines3 trains in the real simulator, with the same settings for every task.

    Soft actor-critic, or PPO where actions are discrete, after 1/8, 1/4, 1/2 and all of the ``steps``; the last one
    also with Gaussian noise of 0.3 and 0.6 half ranges on its actions. Their files are in ``folder`` (None: in
    ``runs/policies/<env_id>``); what is there already is not trained again.
    """
    _sb3()
    from envs import make_real

    env = make_real(env_id)
    algorithm = "ppo" if isinstance(env.action_space, spaces.Discrete) else "sac"
    folder = Path("runs") / "policies" / env_id.replace(":", "-") if folder is None else Path(folder)
    stages = [steps // 8, steps // 4, steps // 2, steps]
    files = [folder / f"{algorithm}-{seed}-{stage}.zip" for stage in stages]
    if not all(file.is_file() for file in files):
        if progress:
            print(f"Training policies in {env_id}: {steps} steps, once, into {folder}", file=sys.stderr)
        _train(env, algorithm, seed, stages, files)
    policies = [
        _from_sb3(_load_sb3(algorithm, file), f"{algorithm.upper()}, {stage:,} steps")
        for file, stage in zip(files, stages, strict=True)
    ]
    if isinstance(env.action_space, spaces.Box):
        policies += [with_noise(policies[-1], env.action_space, std) for std in NOISES]
    env.close()
    return policies


def with_noise(policy: Policy, space: spaces.Box, std: float) -> Policy:
    """The policy with Gaussian noise on its actions, ``std`` in half ranges, clipped to the space."""
    half, size = (space.high - space.low) / 2, space.low.size

    def act(obs: Any, step: int, seeds: Seeds) -> NDArray[Any]:
        noise = normal(torch.from_numpy(seeds), torch.full((len(seeds),), step), size).numpy()
        noisy = policy.act(obs, step, seeds) + std * half * noise.reshape(-1, *space.shape)
        return np.clip(noisy, space.low, space.high).astype(space.dtype)

    return Policy(f"{policy.name}, noise {std:g}", act)


def load_policy(source: str, env_id: str) -> Policy:
    """A Stable-Baselines3 policy for the simulator ``env_id`` from "algorithm:path", such as "ppo:runs/mine.zip".

    Such a file holds pickled Python: load only what you trust. Raises ValueError for an unknown algorithm or other
    spaces, FileNotFoundError where there is no such file.
    """
    from envs import make_real

    algorithm, colon, path = source.partition(":")
    if not colon or algorithm not in ALGORITHMS:
        raise ValueError(f"a policy is named algorithm:path with one of {', '.join(ALGORITHMS)}, got {source!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no policy file {path}")
    model, env = _load_sb3(algorithm, Path(path)), make_real(env_id)
    pairs = (model.observation_space, env.observation_space), (model.action_space, env.action_space)
    env.close()
    for ours, theirs in pairs:
        if not alike(ours, theirs):
            raise ValueError(f"the policy {path} is for {ours}, {env_id} has {theirs}")
    return _from_sb3(model, Path(path).stem)


def fingerprint(env_id: str, policies: Sequence[Policy]) -> str:
    """A short digest of what the policies do: equal for equal ones."""
    from envs import make_real

    env = make_real(env_id)
    digest = hashlib.sha256(version("kairos_gym").encode())
    obs, _ = env.reset(seed=0)
    env.close()
    batch = batch_of_one(obs)
    for policy in policies:
        digest.update(policy.name.encode() + np.ascontiguousarray(policy.act(batch, 3, np.array([7]))).tobytes())
    return digest.hexdigest()[:16]


def batch_of_one(obs: Any) -> Any:
    """An observation as a batch of one."""
    return {key: batch_of_one(part) for key, part in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]


def _train(env: Any, algorithm: str, seed: int, stages: list[int], files: list[Path]) -> None:
    """Train small networks, one update a step (12,000 steps take three to five CPU-minutes), and save each stage."""
    sb3 = _sb3()
    network = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    with torch.random.fork_rng(devices=[]):
        if algorithm == "sac":
            model: Any = sb3.SAC(
                network,
                env,
                seed=seed,
                learning_rate=1e-3,
                learning_starts=500,
                gamma=0.98,
                tau=0.01,
                policy_kwargs={"net_arch": [64, 64]},
                device="cpu",
            )
        else:
            model = sb3.PPO(network, env, seed=seed, n_steps=256, device="cpu")
        files[0].parent.mkdir(parents=True, exist_ok=True)
        done = 0
        for stage, file in zip(stages, files, strict=True):
            model.learn(stage - done, reset_num_timesteps=done == 0)
            done = stage
            replace_atomically(file, model.save)


def _sb3() -> Any:
    try:
        import stable_baselines3
    except ImportError as error:
        raise ImportError("learned policies need Stable-Baselines3: pip install 'kairos_gym[sb3]'") from error
    return stable_baselines3


def _load_sb3(algorithm: str, file: Path) -> Any:
    return getattr(_sb3(), algorithm.upper()).load(file, device="cpu")


def _from_sb3(model: Any, name: str) -> Policy:
    return Policy(name, lambda obs, step, seeds: model.predict(obs, deterministic=True)[0])


def _bits(step: int, seeds: NDArray[np.int64]) -> NDArray[np.int64]:
    """A whole number from 0 to 2^63 - 1 for each seed at that step."""
    return bits(torch.from_numpy(seeds), torch.full(seeds.shape, step)).numpy()
