"""The self-improving loop: play for real, train the world model on all real steps, train the policy in its dreams."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.data.datasets import load_dataset
from kairos_gym.evaluation.calibrate import MIN_DREAMS, dream_errors
from kairos_gym.evaluation.windows import Windows
from kairos_gym.learning.learn import start_states, to_replay_buffer
from kairos_gym.learning.loop_config import LoopConfig
from kairos_gym.policies.evaluate import EVAL_EPISODES, make_eval_envs
from world_model.conformal import ConformalBound, fit_bound
from world_model.contract import Spec
from world_model.episodes import Episodes, spec_of
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import WorldModel
from world_model.training.config import FitConfig
from world_model.training.fit import fit

if TYPE_CHECKING:
    from kairos_gym.policies.sb3 import TrainingRecord

CHUNK = 4  # the longest number of steps that a model imagines at once
PATTERN = "SG"  # the layers: on small data as good as "SGDG", in half the time
REAL_SHARE = 0.05  # of a batch where no error bound says how far dreams can be trusted; MBPO's
FIRST_EPISODES = 4  # at least, into which the first, random round is divided


def loop(
    env_id: str, out: str | Path, config: LoopConfig = LoopConfig(), *, progress: bool = True, **settings: Any
) -> list[dict[str, Any]]:
    """Learn a policy for the simulator ``env_id`` from few real steps -> the row of each round's evaluation.

    Each round plays the policy for real, measures on these new episodes how wrong the model's dreams are, trains the
    model further on all episodes so far, and then the policy, by Stable-Baselines3's SAC, in dreams that start at real
    states (MBPO, https://arxiv.org/abs/1906.08253). A dream ends where its own error bound passes ``max_error``. If L
    steps can be trusted on average, L of 1 + L steps that the policy learns from are imagined, and it makes 1 + L
    updates for each real step, at most ``updates``.

    out: the folder of ``kairos_gym.policies.sb3.TrainingRecord`` (take "best.zip", the policy with the highest return
        from the ten starts of an evaluation), with "world", a model for each round, and "data", a Minari dataset for
        each.
    settings: SAC's own, over those of ``kairos_gym.policies.sb3``.

    A call that was killed goes on where it is repeated. In a script of your own, ``torch.set_num_threads(1)`` makes it
    several times as fast.

    Raises ValueError for a wrong argument, and for a simulator without a time limit or whose observations or actions
    are no Box [N].
    """
    run = Loop(env_id, Path(out), config, settings)
    with tqdm(total=config.samples, initial=run.used, unit="step", desc="real", disable=not progress) as bar:
        while not run.done:
            row = run.round()
            bar.set_postfix_str(f"return {np.mean(row['real']):.1f}, imagined {np.mean(row['imagined']):.1f}", False)
            bar.update(run.used - bar.n)
    return run.record.rows


class ModelErrors(NamedTuple):
    """How wrong a model was on a round's new episodes, which it had not seen."""

    trust: ConformalBound
    length: float  # the mean number of steps for which dreams of these episodes can be trusted
    quantiles: dict[str, float]  # 90% of their errors, "error_1" and "error_8" after 1 and 8 steps


class Loop:
    """One loop, between two rounds."""

    def __init__(self, env_id: str, out: Path, config: LoopConfig, settings: dict[str, Any]):
        from envs import make_real
        from kairos_gym.policies.sb3 import TrainingRecord, serialise_settings

        self.env_id, self.out, self.config, self.settings = env_id, out, config, settings
        env = make_real(env_id)
        self.spec = _vector_spec(env)
        env.close()
        # More samples, or another target, may be asked for later.
        about = {name: value for name, value in asdict(config).items() if name not in ("samples", "target")}
        self.record: TrainingRecord = TrainingRecord(
            out, {"simulator": env_id, **about, **serialise_settings(settings)}
        )
        self.real, self.limit = make_eval_envs(env_id)
        self.episodes: Episodes | None = None
        self.world: WorldModel | None = None
        self.policy: Any = None  # SB3's SAC, from the first round on
        for number, row in enumerate(self.record.rows):
            with _minari_in(out / "data"):
                self._add(_cut(Episodes.from_minari(load_dataset(_dataset_id(number))), row["steps"] - self.used))
        if self.record.rows:
            self.world = WorldModel.from_pretrained(self._model_folder(len(self.record.rows) - 1))
            self.policy = self.record.load("sac")

    @property
    def used(self) -> int:
        """Real steps so far."""
        return 0 if self.episodes is None else int((self.episodes.index > 0).sum())

    @property
    def done(self) -> bool:
        """Whether the target is reached, or less than half a round is left."""
        rows, target = self.record.rows, self.config.target
        reached = bool(rows) and target is not None and np.mean(rows[-1]["real"]) >= target
        return reached or 2 * (self.config.samples - self.used) < self.config.round_steps

    def round(self) -> dict[str, Any]:
        """Play, measure the model on the new episodes, train it, train the policy, evaluate it -> the record's row."""
        from kairos_gym.dream.sb3_vec_env import DreamVecEnv
        from kairos_gym.policies.evaluate import evaluate

        number, timer = len(self.record.rows), PhaseTimer()
        if self.policy is not None:
            self.policy.set_random_seed(self._seed(number))
        new = self._collect(number)
        timer.stop("play")
        errors = self._measure_error(new, number)
        timer.stop("trust")
        self._add(new)
        self.world = self._train_model(number, errors)
        timer.stop("model")
        share, updates = self._schedule(errors)
        self._train_policy(share, round(updates * int((new.index > 0).sum())), number)
        timer.stop("policy")
        dream = DreamVecEnv(self.world, EVAL_EPISODES, max_episode_steps=self.limit)
        evaluation = evaluate(self.policy, self.real, dream)
        measured = {} if errors is None else {"trusted": errors.length, **errors.quantiles}
        more = {**measured, "real_share": share, "updates": updates, **timer.seconds}
        self.record.add(self.policy, self.used, evaluation, **more)
        return self.record.rows[-1]

    def _seed(self, number: int) -> int:
        return 1000 * self.config.seed + number

    def _model_folder(self, number: int) -> Path:
        return self.out / "world" / f"round-{number:03d}"

    def _add(self, new: Episodes) -> None:
        self.episodes = new if self.episodes is None else Episodes.join([self.episodes, new])

    def _collect(self, number: int) -> Episodes:
        """The real episodes of a round: random ones in the first, then the policy's own, its noise included."""
        first, left = number == 0, self.config.samples - self.used
        steps = self.config.round_steps * (2 if first else 1)
        if 2 * (left - steps) < self.config.round_steps:  # too few steps would be left for a last round
            steps = left
        longest = max(CHUNK, steps // FIRST_EPISODES) if first else steps
        dataset_id = _dataset_id(number)
        with _minari_in(self.out / "data"):
            if get_dataset_path(dataset_id).exists():  # from a call that was stopped after it
                return _cut(Episodes.from_minari(load_dataset(dataset_id)), left)
            config = CollectConfig(seed=self._seed(number), steps=steps, episode_steps=min(longest, self.limit))
            policy = None if first else self._act
            return _cut(
                Episodes.from_minari(collect(self.env_id, dataset_id, config, policy=policy, progress=False)), left
            )

    def _act(self, obs: Any) -> Any:
        return self.policy.predict(obs, deterministic=False)[0]

    def _fit(self, episodes: Episodes, out: Path, number: int, begin: WorldModel | None) -> WorldModel:
        (obs_dim,), (action_dim,) = self.spec.observation_box.shape, self.spec.action_box.shape
        shape = WorldModelConfig(obs_dim=obs_dim, action_dim=action_dim, pattern=PATTERN, chunk=CHUNK)
        config = FitConfig(
            draft_steps=self.config.draft_steps,
            steps=self.config.memory_steps,
            weight_decay=self.config.weight_decay,
            seed=self._seed(number),
            save_every=1000,
        )
        card = {"env": self.env_id, "time_limit": self.limit}
        return fit(shape, self.spec, episodes, config, out=out, begin=begin, card=card, progress=False)

    def _measure_error(self, new: Episodes, number: int) -> ModelErrors | None:
        """How wrong dreams of episodes are that the model has not seen; None where no setting depends on it."""
        config, model, seen = self.config, self.world, self.episodes
        if config.max_error is None and not config.penalty:
            return None
        if model is None or seen is None:  # the first round: train on every other episode, measure on the others
            seen, new = new.pick(lambda e: e % 2 == 0), new.pick(lambda e: e % 2 == 1)
            model = self._fit(seen, self.out / "world" / "half", number, None)
        at = (new.left > 0).nonzero()[:, 0]
        at = at[:: 2 if len(at) > 2 * MIN_DREAMS else 1]
        order = torch.randperm(len(at), generator=torch.Generator().manual_seed(self._seed(number)))
        windows = Windows(new, at[order], torch.ones(len(at), dtype=torch.int64), config.horizon)
        dreamed = dream_errors(model, windows, model.scaling.obs_std)
        fitted, measured = dreamed.part(slice(len(at) // 2)), dreamed.part(slice(len(at) // 2, None))
        trust = fit_bound(model.fingerprint(), seen.steps(), fitted, measured, measured, seed=number, updates=300)
        trusted = measured.bound(trust, config.confidence) <= (config.max_error or np.inf)
        quantiles = {f"error_{h}": _quantile(dreamed.error[:, h - 1]) for h in (1, 8) if h <= config.horizon}
        return ModelErrors(trust, float(trusted.cumprod(1).sum(1).float().mean()), quantiles)

    def _train_model(self, number: int, errors: ModelErrors | None) -> WorldModel:
        """The model, trained further on all episodes, with its error bound; its dreams start at real states."""
        episodes, out = self.episodes, self._model_folder(number)
        assert episodes is not None
        model = self._fit(episodes, out, number, self.world)
        model.starts = start_states(episodes)
        if errors is not None:
            # The bound was measured on the model before, to which the new episodes were new; now they are known too.
            model.trust = errors.trust.transfer(model.fingerprint(), episodes.steps(), seed=number)
        model.save_pretrained(out)
        return model

    def _schedule(self, errors: ModelErrors | None) -> tuple[float, float]:
        """The share of real steps in what the policy learns from, and its updates for each real step."""
        if errors is None or self.config.max_error is None:
            return REAL_SHARE, self.config.updates
        return 1 / (1 + errors.length), min(self.config.updates, 1 + errors.length)

    def _train_policy(self, share: float, updates: int, number: int) -> None:
        """Train the policy in dreams that start at real states, and on real steps."""
        from kairos_gym.dream.sb3_vec_env import DreamVecEnv
        from kairos_gym.policies.sb3 import MixedReplayBuffer, make_algorithm
        from world_model.dynamics import Pessimistic

        config, episodes = self.config, self.episodes
        assert episodes is not None
        model: Any = self.world
        if config.penalty:
            model = Pessimistic(model, config.penalty)
        confidence = None if config.max_error is None else config.confidence
        venv = DreamVecEnv(
            model,
            config.dreams,
            max_episode_steps=config.horizon,
            max_error=config.max_error,
            confidence=confidence,
        )
        venv.seed(self._seed(number))
        if self.policy is None:
            settings = {"replay_buffer_class": MixedReplayBuffer, "learning_starts": 0, **self.settings}
            self.policy = make_algorithm("sac", venv, seed=self._seed(number), **settings)
        self.policy.set_env(venv)
        buffer: MixedReplayBuffer = self.policy.replay_buffer
        buffer.real = to_replay_buffer(episodes, self.spec, self.policy)
        buffer.share = share
        steps = -(-updates // self.policy.gradient_steps)  # of all dreams at once
        self.policy.learn(steps * config.dreams, log_interval=None, reset_num_timesteps=False)


def _dataset_id(number: int) -> str:
    return f"round-{number:03d}-v0"


class PhaseTimer:
    """CPU seconds, by the phases of a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.process_time()

    def stop(self, phase: str) -> None:
        """The time since the last phase was this one's."""
        now = time.process_time()
        self.seconds[f"seconds_{phase}"], self._start = round(now - self._start, 2), now


def _vector_spec(env: gym.Env) -> Spec:
    """The simulator's spaces. Raises ValueError where they are no Box [N]."""
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"the loop learns from {name} that are a Box [N], and this simulator's are {space}")
    return spec_of(env, CHUNK)


def _cut(episodes: Episodes, steps: int) -> Episodes:
    """Only the first so many steps, whatever episode they end in."""
    keep = (episodes.index > 0).cumsum(0) <= steps
    keep &= (episodes.index > 0) | (keep.roll(-1) & (episodes.left > 0))  # no episode without a step
    short = Episodes(*(x[keep] for x in vars(episodes).values()))
    last = short.starts()[-1]
    left = short.left.clone()
    left[last:] = len(left) - 1 - torch.arange(int(last), len(left))
    return replace(short, left=left)


def _quantile(error: torch.Tensor) -> float:
    valid = error[~error.isnan()]
    return float(valid.quantile(0.9)) if len(valid) else float("nan")


@contextmanager
def _minari_in(folder: Path) -> Iterator[None]:
    """Minari's datasets are in ``folder`` within this context."""
    name, folder = "MINARI_DATASETS_PATH", folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
