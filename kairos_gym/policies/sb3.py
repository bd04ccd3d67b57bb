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
    from stable_baselines3.common.logger import Logger
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


class Evaluation(NamedTuple):
    """What a policy earned from the same E starts, in the simulator and in the dream."""

    real: NDArray[np.float64]  # [E]
    imagined: NDArray[np.float64] | None  # [E]; None where nothing was dreamed


def evaluate(policy: Any, real: VecEnv, dream: VecEnv | None = None, *, seed: int = 1000) -> Evaluation:
    """One whole episode of ``policy``, without its noise, in each of the E envs of ``real`` -> Evaluation.

    Env e begins with seed + e. A ``dream`` of as many envs, whose ``reset`` takes the option "observation", begins at
    the very same observations.
    """
    real.seed(seed)
    starts = real.reset()
    real.seed(seed)
    earned = _returns(policy, real)
    if dream is None:
        return Evaluation(earned, None)
    dream.seed(seed)
    dream.set_options([{"observation": start} for start in np.asarray(starts)])
    return Evaluation(earned, _returns(policy, dream))


def _returns(policy: Any, venv: VecEnv) -> NDArray[np.float64]:
    """By env; Stable-Baselines3's ``evaluate_policy`` gives them in the order in which episodes end."""
    obs, total, going = venv.reset(), np.zeros(venv.num_envs), np.ones(venv.num_envs, bool)
    while going.any():
        obs, rewards, done, _ = venv.step(policy.predict(obs, deterministic=True)[0])
        total[going] += rewards[going]
        going &= ~done
    return total


class MixedReplayBuffer(ReplayBuffer):
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


def make_algorithm(algorithm: Algorithm, venv: Any, *, seed: int = 0, **settings: Any) -> BaseAlgorithm:
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
    return _silent(ALGORITHMS[algorithm]("MlpPolicy", venv, **made))


def _silent(model: Any) -> Any:
    """Without SB3's own logger, which would leave an empty folder behind for every call of ``train_policy``."""
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
    """Learn for ``steps`` steps in ``venv``, judged in ``real`` each time after ``every`` -> the algorithm at its end.

    dream: as many dreams as ``real`` has envs, to say each time what the policy was imagined to earn (see ``evaluate``).
    settings: the algorithm's own, over SETTINGS. The folder ``out`` is that of ``TrainingRecord``; the same call goes on from
    what was kept there last. about: what else has to be the same then, such as what ``venv`` is made of.
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
    """Settings as a ``TrainingRecord`` can keep and compare them."""
    return {name: getattr(value, "__qualname__", repr(value)) for name, value in settings.items()}


class TrainingRecord:
    """What is kept of a policy that learns, in a folder: the same in ``train_policy`` and in the loop.

    "evaluations.jsonl" has a line for each time that it was judged; "best.zip" is the policy that earned most for real and
    "last-STEPS.zip" the latest, with what it learns from in "replay-STEPS.pkl"; "logs" are TensorBoard's, with the
    imagined and the real return in one plot. "about.json" says ``about`` what it is.

    Raises ValueError where the folder is about something else.
    """

    def __init__(self, out: str | Path, about: dict[str, Any]):
        self.out, self.about = Path(out), about
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must be a folder, and {out} is a file: choose another name")
        kept = self._told
        had = json.loads(kept.read_text()) if kept.is_file() else json.loads(json.dumps(about))
        if other := [
            f"{k} {had.get(k)!r}, not {about.get(k)!r}" for k in {**had, **about} if had.get(k) != about.get(k)
        ]:
            raise ValueError(
                f"{out} is of another call, with {'; '.join(other)}: choose another folder, or repeat that call"
            )
        text = self._evaluations.read_text() if self._evaluations.is_file() else ""
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
    def _told(self) -> Path:
        return self.out / "about.json"

    @property
    def _evaluations(self) -> Path:
        return self.out / "evaluations.jsonl"

    def load(self, algorithm: Algorithm, venv: VecEnv | None = None) -> Any:
        """The latest policy, with what it learns from, to go on in ``venv``."""
        model = _silent(ALGORITHMS[algorithm].load(self.last, venv, device="cpu"))
        if self.replay.is_file():
            model.load_replay_buffer(self.replay)
        return model

    def add(self, model: Any, steps: int, evaluation: Evaluation, **more: Any) -> None:
        """Keep the policy after so many ``steps``, what it earned, and whatever else is to be known of that time.

        All of it counts only once its line is in "evaluations.jsonl".
        """
        self.out.mkdir(parents=True, exist_ok=True)
        earned = {"real": evaluation.real.tolist()}
        if evaluation.imagined is not None:
            earned["imagined"] = evaluation.imagined.tolist()
        if all(evaluation.real.mean() > np.mean(row["real"]) for row in self.rows):
            _replace(self.best, model.save)
        stale = [self.last, self.replay] if self.rows else []
        self.rows.append({"steps": steps, **earned, **more})
        if hasattr(model, "replay_buffer"):
            _replace(self.replay, model.save_replay_buffer)
        _replace(self.last, model.save)
        _replace(self._told, lambda part: part.write_text(json.dumps(self.about, indent=2)))
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        _replace(self._evaluations, lambda part: part.write_text(lines))
        for path in stale:
            path.unlink(missing_ok=True)
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


class _EvalCallback(BaseCallback):
    """Judges the policy after every so many steps of its training."""

    def __init__(self, record: TrainingRecord, real: VecEnv, dream: VecEnv | None, every: int):
        super().__init__()
        self.record, self.real, self.dream, self.every = record, real, dream, every

    def _on_step(self) -> bool:
        if self.num_timesteps - self._at() >= self.every:
            self.evaluate()
        return True

    def _at(self) -> int:
        return self.record.rows[-1]["steps"] if self.record.rows else 0

    def evaluate(self) -> None:
        if self._at() < self.num_timesteps:
            self.record.add(self.model, self.num_timesteps, evaluate(self.model, self.real, self.dream))
