"""Trains policies by Stable-Baselines3 in any vectorised env, and evaluates them in the real one as they learn."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

try:
    from stable_baselines3 import PPO, SAC, TD3
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import VecEnv
except ImportError as error:
    raise ImportError("policies are learned by Stable-Baselines3: pip install 'kairos_gym[sb3]'") from error

from kairos_gym.policies.evaluate import Evaluation, evaluate
from world_model.files import expect_same_recipe, replace_atomically, write_atomically

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


class MixedReplayBuffer(ReplayBuffer):
    """A replay buffer of imagined steps; a ``share`` of each batch is drawn from the ``real`` ones instead.

    Dyna, as MBPO does it (https://arxiv.org/abs/1906.08253).
    """

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
        fields: list[Any] = [None if a is None else torch.cat([a, b]) for a, b in pairs]
        return ReplayBufferSamples(*fields)


def make_algorithm(algorithm: Algorithm, venv: Any, *, seed: int = 0, **settings: Any) -> BaseAlgorithm:
    """An SB3 algorithm that learns in ``venv``, with SETTINGS and, over them, ``settings``.

    Raises ValueError for an unknown name.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    defaults = dict(SETTINGS[algorithm])
    if algorithm != "ppo":
        dreams = getattr(venv, "num_envs", 1)
        defaults |= {"gradient_steps": max(1, dreams // DREAMS_AN_UPDATE), "learning_starts": 10 * dreams}
    merged = {**defaults, "policy_kwargs": deepcopy(NETS), "seed": seed, "device": "cpu", **settings}
    return _without_logger(ALGORITHMS[algorithm]("MlpPolicy", venv, **merged))


def _without_logger(model: Any) -> Any:
    """Remove SB3's own logger, which would leave an empty folder behind for every call of ``train_policy``."""
    model.set_logger(Logger(None, []))
    return model


def train_policy(
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
    """Learn for ``steps`` steps in ``venv``, evaluated in ``real`` after each ``every`` -> the algorithm at its end.

    out: the folder, as ``TrainingRecord`` describes it; the same call goes on from what was saved there last.
    dream: as many dreams as ``real`` has envs, to measure the imagined return too (see ``evaluate``).
    about: what else has to be the same for a call to go on, such as what ``venv`` is made of.
    settings: the algorithm's own, over SETTINGS.
    """
    record = TrainingRecord(
        out, {"algorithm": algorithm, "seed": seed, **serialise_settings(settings), **(about or {})}
    )
    model: Any = record.load(algorithm, venv) if record.rows else make_algorithm(algorithm, venv, seed=seed, **settings)
    callback = _EvalCallback(record, real, dream, every)
    if model.num_timesteps < steps:
        more = steps - model.num_timesteps
        model.learn(more, callback, log_interval=None, reset_num_timesteps=False, progress_bar=progress)
        callback.evaluate()
    return model


def serialise_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as text that a ``TrainingRecord`` can store and compare."""
    return {name: getattr(value, "__qualname__", repr(value)) for name, value in settings.items()}


class TrainingRecord:
    """A policy in training, in a folder; ``train_policy``, SHAC and the loop go on from it.

    "evaluations.jsonl" has a line for each evaluation: the steps so far, the real and the imagined returns. "best.zip"
    is the policy with the highest real return, "last-STEPS.zip" the latest, with its replay buffer in
    "replay-STEPS.pkl". "logs" are TensorBoard's, with the imagined and the real return in one plot. "about.json" says
    what the training is ``about``: algorithm, seed, settings, simulator, model.

    Raises ValueError where the folder is about something else, or ``out`` is a file.
    """

    def __init__(self, out: str | Path, about: dict[str, Any]):
        self.out, self.about = Path(out), about
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must be a folder, and {out} is a file: choose another name")
        if self._about_file.is_file():
            found = json.loads(self._about_file.read_text())
            expect_same_recipe(found, about, f"{out} was made", "choose another folder, or repeat that call")
        text = self._evaluations_file.read_text() if self._evaluations_file.is_file() else ""
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    @property
    def best(self) -> Path:
        return self.out / "best.zip"

    @property
    def last(self) -> Path:
        return self.out / f"last-{self.rows[-1]['steps']}.zip"

    @property
    def replay(self) -> Path:
        return self.out / f"replay-{self.rows[-1]['steps']}.pkl"

    @property
    def steps(self) -> int:
        """At the last evaluation."""
        return int(self.rows[-1]["steps"]) if self.rows else 0

    @property
    def _about_file(self) -> Path:
        return self.out / "about.json"

    @property
    def _evaluations_file(self) -> Path:
        return self.out / "evaluations.jsonl"

    def load(self, algorithm: Algorithm, venv: VecEnv | None = None) -> Any:
        """The latest policy, with its replay buffer, to go on in ``venv``."""
        model = _without_logger(ALGORITHMS[algorithm].load(self.last, venv, device="cpu"))
        if self.replay.is_file():
            model.load_replay_buffer(self.replay)
        return model

    def add(self, model: Any, steps: int, evaluation: Evaluation, **more: Any) -> None:
        """Save the policy after so many ``steps``, its returns, and ``more`` numbers for the same line.

        All of it counts only once its line is in "evaluations.jsonl".
        """
        self.out.mkdir(parents=True, exist_ok=True)
        returns = {"real": evaluation.real.tolist()}
        if evaluation.imagined is not None:
            returns["imagined"] = evaluation.imagined.tolist()
        if all(evaluation.real.mean() > np.mean(row["real"]) for row in self.rows):
            replace_atomically(self.best, model.save)
        stale = [self.last, self.replay] if self.rows else []
        self.rows.append({"steps": steps, **returns, **more})
        if hasattr(model, "replay_buffer"):
            replace_atomically(self.replay, model.save_replay_buffer)
        replace_atomically(self.last, model.save)
        write_atomically(self._about_file, json.dumps(self.about, indent=2).encode())
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self._evaluations_file, lines.encode())
        for path in stale:
            path.unlink(missing_ok=True)
        with SummaryWriter(str(self.out / "logs")) as log:
            log.add_scalars("return", {name: float(np.mean(values)) for name, values in returns.items()}, steps)
            for name, value in more.items():
                if isinstance(value, int | float):
                    log.add_scalar(name, value, steps)


class _EvalCallback(BaseCallback):
    """Evaluates the policy after every so many steps of its training."""

    def __init__(self, record: TrainingRecord, real: VecEnv, dream: VecEnv | None, every: int):
        super().__init__()
        self.record, self.real, self.dream, self.every = record, real, dream, every

    def _on_step(self) -> bool:
        if self.num_timesteps - self.record.steps >= self.every:
            self.evaluate()
        return True

    def evaluate(self) -> None:
        if self.record.steps < self.num_timesteps:
            self.record.add(self.model, self.num_timesteps, evaluate(self.model, self.real, self.dream))
