"""Policies learned by Stable-Baselines3 in any vectorised env, and judged in the real one as they learn."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

try:
    from stable_baselines3 import PPO, SAC, TD3
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise ImportError("policies are learned by Stable-Baselines3: pip install 'kairos_gym[sb3]'") from error

Algorithm = Literal["sac", "td3", "ppo"]
ALGORITHMS: dict[str, type[Any]] = {"sac": SAC, "td3": TD3, "ppo": PPO}
# An update of nets this small costs a quarter of one of SB3's own 256 x 256, and dreams are cheap beside either.
NETS: dict[str, Any] = {"net_arch": [64, 64], "optimizer_kwargs": {"fused": True}}
REPLAY = {"learning_rate": 1e-3, "tau": 0.01, "buffer_size": 100_000, "batch_size": 256, "train_freq": 1}
# What differs from SB3's own settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "sac": REPLAY,
    "td3": REPLAY,
    "ppo": {"learning_rate": 1e-3, "n_steps": 64, "batch_size": 512, "gae_lambda": 0.9},
}
DREAMS_AN_UPDATE = 8  # steps of single dreams for each gradient update of SAC and TD3


class Judged(NamedTuple):
    """What a policy earned from the same E starts, in the simulator and in the dream."""

    real: NDArray[np.float64]  # [E]
    imagined: NDArray[np.float64] | None  # [E]; None where nothing was dreamed


def judge(policy: Any, real: VecEnv, dream: VecEnv | None = None, *, seed: int = 1000) -> Judged:
    """One whole episode of ``policy``, without its noise, in each of the E envs of ``real`` -> Judged.

    Env e begins with seed + e. A ``dream`` of as many envs, whose ``reset`` takes the option "observation", begins at
    the very same observations.
    """
    real.seed(seed)
    starts = real.reset()
    real.seed(seed)
    earned = _returns(policy, real)
    if dream is None:
        return Judged(earned, None)
    dream.seed(seed)
    dream.set_options([{"observation": start} for start in np.asarray(starts)])
    return Judged(earned, _returns(policy, dream))


def _returns(policy: Any, venv: VecEnv) -> NDArray[np.float64]:
    returns, _ = evaluate_policy(policy, venv, venv.num_envs, return_episode_rewards=True, warn=False)
    return np.asarray(returns, np.float64)


class Mixed(ReplayBuffer):
    """A replay buffer of imagined steps of whose batches a ``share`` are ``real`` ones (Dyna; arXiv 1906.08253)."""

    real: ReplayBuffer | None = None
    share = 0.0

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        n = 0 if self.real is None else round(self.share * batch_size)
        if self.real is None or n == 0:
            return super().sample(batch_size, env)
        real = self.real.sample(n, env)
        if n == batch_size:
            return real
        imagined = super().sample(batch_size - n, env)
        pairs: Any = zip(real, imagined, strict=True)
        both: list[Any] = [None if a is None else torch.cat([a, b]) for a, b in pairs]
        return ReplayBufferSamples(*both)


def make(algorithm: Algorithm, venv: Any, *, seed: int = 0, **settings: Any) -> BaseAlgorithm:
    """An SB3 algorithm that learns in ``venv``, with SETTINGS and over them ``settings``.

    Raises ValueError for an unknown name.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    own = dict(SETTINGS[algorithm])
    if algorithm != "ppo":
        dreams = getattr(venv, "num_envs", 1)
        own |= {"gradient_steps": max(1, dreams // DREAMS_AN_UPDATE), "learning_starts": 10 * dreams}
    made = {**own, "policy_kwargs": deepcopy(NETS), "seed": seed, "device": "cpu", **settings}
    return ALGORITHMS[algorithm]("MlpPolicy", venv, **made)


def learn(
    algorithm: Algorithm,
    venv: VecEnv,
    real: VecEnv,
    out: str | Path,
    *,
    steps: int,
    every: int,
    dream: VecEnv | None = None,
    seed: int = 0,
    about: dict[str, Any] | None = None,
    progress: bool = True,
    **settings: Any,
) -> BaseAlgorithm:
    """Learn for ``steps`` steps in ``venv``, judged in ``real`` each time after ``every`` -> the algorithm at its end.

    dream: as many dreams as ``real`` has envs, to say each time what the policy was imagined to earn (see ``judge``).
    settings: the algorithm's own, over SETTINGS. The folder ``out`` is that of ``Record``; the same call goes on from
    what was kept there last. about: what else has to be the same then, such as what ``venv`` is made of.
    """
    own = {"algorithm": algorithm, "seed": seed, **{name: repr(value) for name, value in settings.items()}}
    record = Record(out, {**own, **(about or {})})
    if record.last.is_file():
        model = ALGORITHMS[algorithm].load(record.last, venv, device="cpu")
        if record.replay.is_file():
            model.load_replay_buffer(record.replay)
    else:
        model = make(algorithm, venv, seed=seed, **settings)
    judging = _Judging(record, real, dream, every)
    if model.num_timesteps < steps:
        more = steps - model.num_timesteps
        model.learn(more, judging, log_interval=None, reset_num_timesteps=False, progress_bar=progress)
        judging.judge()
    return model


class Record:
    """What is kept of a policy that learns, in a folder: the same in ``learn`` and in the loop.

    "judged.jsonl" has a line for each time that it was judged; "best.zip" is the policy that earned most for real and
    "last.zip" the latest, with its imagined experience in "replay.pkl"; "logs" are TensorBoard's, with the imagined and
    the real return in one plot. "about.json" says ``about`` what it is.

    Raises ValueError where the folder is about something else.
    """

    def __init__(self, out: str | Path, about: dict[str, Any]):
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        told = self.out / "about.json"
        if not told.is_file():
            _replace(told, lambda part: part.write_text(json.dumps(about, indent=2)))
        kept = json.loads(told.read_text())
        if other := [
            f"{k} {kept.get(k)!r}, not {about.get(k)!r}" for k in {**kept, **about} if kept.get(k) != about.get(k)
        ]:
            raise ValueError(
                f"{out} is of another call, with {'; '.join(other)}: choose another folder, or repeat that call"
            )
        self.best, self.last, self.replay = (self.out / name for name in ("best.zip", "last.zip", "replay.pkl"))
        self._judged = self.out / "judged.jsonl"
        text = self._judged.read_text() if self._judged.is_file() else ""
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def add(self, model: Any, steps: int, judged: Judged, **more: Any) -> None:
        """Keep the policy after so many ``steps``, what it earned, and whatever else is to be known of that time."""
        earned = {"real": judged.real.tolist()}
        if judged.imagined is not None:
            earned["imagined"] = judged.imagined.tolist()
        if all(judged.real.mean() > np.mean(row["real"]) for row in self.rows):
            _replace(self.best, model.save)
        if hasattr(model, "replay_buffer"):
            _replace(self.replay, model.save_replay_buffer)
        _replace(self.last, model.save)
        self.rows.append({"steps": steps, **earned, **more})
        with open(self._judged, "a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        with SummaryWriter(str(self.out / "logs")) as log:
            log.add_scalars("return", {name: float(np.mean(values)) for name, values in earned.items()}, steps)
            for name, value in more.items():
                if isinstance(value, int | float):
                    log.add_scalar(name, value, steps)


def _replace(path: Path, save: Any) -> None:
    """Save under another name first, so that what was there is lost only when the new is whole."""
    part = path.with_name(f"part-{path.name}")
    save(part)
    os.replace(part, path)


class _Judging(BaseCallback):
    """Judges the policy after every so many steps of its training."""

    def __init__(self, record: Record, real: VecEnv, dream: VecEnv | None, every: int):
        super().__init__()
        self.record, self.real, self.dream, self.every = record, real, dream, every

    def _on_step(self) -> bool:
        if self.num_timesteps - self._at() >= self.every:
            self.judge()
        return True

    def _at(self) -> int:
        return self.record.rows[-1]["steps"] if self.record.rows else 0

    def judge(self) -> None:
        if self._at() < self.num_timesteps:
            self.record.add(self.model, self.num_timesteps, judge(self.model, self.real, self.dream))
