"""Imagined against simulated: how faithful a dream is to its simulator, for how long, for which policies, and where."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kairos_gym.agreement import Agreement, agreement
from kairos_gym.calibrate import Doubted, coverage, doubted
from kairos_gym.experience import Experience, experience
from kairos_gym.models import load
from kairos_gym.open_loop import CONTEXT, OpenLoop, Windows
from kairos_gym.policies import Policy, ladder
from kairos_gym.report import machine
from kairos_gym.rollouts import Result, Rollouts, SuccessFn, play_dream, play_real
from world_model.baselines import fit_constant, fit_ensemble, fit_linear
from world_model.bounds import MemoryDrift, memory_drift
from world_model.contract import Dynamics, Imagined
from world_model.model import WorldModel
from world_model.trust import Trust

OFF = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # how far off the simulator itself is started, in std of each coordinate
SHOWN = (1e-3, 1e-2)  # of these, the ones that every table shows
MODEL = "the model"
SHUFFLED = "the model, actions shuffled"


@dataclass(frozen=True)
class Ends:
    """Episodes' ends in the W open-loop stretches, simulated and dreamed."""

    both: int
    only_simulated: int
    only_dreamed: int
    neither: int
    steps_apart: float | None  # median, where both end


@dataclass(frozen=True)
class Speed:
    """Simulator steps a second of thread CPU time, on one thread; medians of interleaved rounds."""

    simulator: float
    dream: dict[int, float]  # by the number of dreams side by side


@dataclass(frozen=True)
class Comparison:
    """All that ``compare`` measured. ``numbers`` is all of it as JSON takes it."""

    name: str  # of the model
    dt: float  # seconds of a simulator step
    chunk: int
    rollouts: Rollouts
    windows: Windows
    std: Tensor  # [O] the unit of every observation error
    dreamed: Imagined  # [W,h,...] the model's dream of the windows
    errors: dict[str, OpenLoop]  # open loop, by the name of the dynamics; the model is the first
    results: dict[str, Result]  # closed loop, likewise
    ends: Ends
    speed: Speed
    trust: Trust | None  # the model's own, where it was calibrated
    doubted: Doubted  # the windows, as ``trust`` sees them
    memory: dict[int, MemoryDrift]  # of each gated-delta layer: written from dreamed and from real frames
    state_bytes: dict[int, int]  # what one dream remembers, by the steps that it has made
    experience: str | None  # what the references were fitted on

    @property
    def horizons(self) -> list[int]:
        """1, 8, 32 and the longest that was dreamed."""
        longest = self.windows.horizon
        return sorted({h for h in (1, 8, 32) if h < longest} | {longest})

    def of_policy(self, p: int) -> Tensor:
        """The windows that policy ``p`` played, int64."""
        per = len(self.rollouts.seeds)
        return torch.arange(p * per, (p + 1) * per)

    def drift(self, imagined: Imagined) -> Tensor:
        """How far the distribution of dreamed states is from that of the simulated ones -> [h,O], in std.

        The 1-Wasserstein distance of each dimension at each step, over the windows that last so long.
        """
        real, *_, valid = self.windows.real
        assert imagined.obs is not None
        apart = []
        for t in range(self.windows.horizon):
            two = ((x[valid[:, t], t] / self.std).sort(0).values for x in (imagined.obs, real))
            dreamed, simulated = two
            apart.append(
                (dreamed - simulated).abs().mean(0) if len(simulated) else torch.full_like(self.std, torch.nan)
            )
        return torch.stack(apart)

    def equivalent(self, horizon: int) -> float | None:
        """How far off a start, in std of its coordinates, makes the simulator as wrong as the model in the median.

        Interpolated between the starts of ``OFF`` on logarithmic scales; NaN beyond them, None without a simulator.
        """
        pairs = [(by, self.errors[off(by)].nrmse(horizon)) for by in OFF if off(by) in self.errors]
        wrong = self.errors[MODEL].nrmse(horizon)
        if not pairs or not len(wrong):
            return None
        x = np.log([max(errors.median().item(), 1e-12) for _, errors in pairs])
        y, at = np.log([by for by, _ in pairs]), math.log(max(wrong.median().item(), 1e-12))
        order = np.argsort(x)
        return math.exp(np.interp(at, x[order], y[order])) if x.min() <= at <= x.max() else math.nan

    def usable(self, error: OpenLoop, limit: float) -> int:
        """How many steps the median dream stays within an NRMSE of ``limit``; 0 where not even one."""
        medians = [error.nrmse(h) for h in range(1, self.windows.horizon + 1)]
        over = [i for i, e in enumerate(medians) if not len(e) or e.median() > limit]
        return over[0] if over else self.windows.horizon

    def agreement(self, name: str) -> Agreement:
        """How the returns of the dynamics ``name`` agree with the simulator's."""
        return agreement(self.results[name].returns, self.rollouts.result.returns)

    def numbers(self) -> dict[str, Any]:
        """Every figure, as plain numbers, lists and dicts; what is not a number is None."""
        rollouts, names = self.rollouts, [policy.name for policy in self.rollouts.policies]
        h = self.horizons
        reward = self.windows.real[2][self.windows.real[4]]
        mine = self.errors[MODEL]
        found = {
            "model": self.name,
            "env": rollouts.env_id,
            "machine": machine(),
            "settings": {
                "chunk": self.chunk,
                "episodes": len(rollouts.seeds),
                "seeds": [int(rollouts.seeds[0]), int(rollouts.seeds[-1])],
                "starts_refused_as_solved": rollouts.refused,
                "time_limit": rollouts.limit,
                "windows": len(self.windows.at),
                "context": int(self.windows.seen.max()),
                "horizon": self.windows.horizon,
                "references_fitted_on": self.experience,
            },
            "error_by_horizon": {name: {t: spread(e.nrmse(t)) for t in h} for name, e in self.errors.items()},
            "median_error_at_every_step": {
                name: [_median(e.nrmse(t)) for t in range(1, self.windows.horizon + 1)]
                for name, e in self.errors.items()
            },
            "steps_within": {
                name: {str(limit): self.usable(e, limit) for limit in (0.1, 0.3)} for name, e in self.errors.items()
            },
            "equivalent_perturbation": {t: self.equivalent(t) for t in h},
            "error_by_policy": {
                name: {t: spread(mine.part(self.of_policy(p)).nrmse(t)) for t in h} for p, name in enumerate(names)
            },
            "error_by_dimension": {t: _rms(mine.obs_error[:, t - 1]).tolist() for t in h},
            "reward_error": {
                name: {t: _rms(e.reward_error[:, t - 1, None]).item() / max(reward.std().item(), 1e-9) for t in h}
                for name, e in self.errors.items()
            },
            "ends": asdict(self.ends),
            "drift": {t: self.drift(self.dreamed)[t - 1].tolist() for t in h},
            "policies": {
                name: {
                    "simulated": _played(rollouts.result, p),
                    **{who: _played(result, p) for who, result in self.results.items()},
                }
                for p, name in enumerate(names)
            },
            "agreement": {name: _told(self.agreement(name), names) for name in self.results},
            "trust": self._trusted(),
            "memory": {layer: _remembered(drift, h) for layer, drift in self.memory.items()},
            "speed": asdict(self.speed),
            "state_bytes": self.state_bytes,
        }
        return _plain(found)

    def _trusted(self) -> dict[str, Any] | None:
        """How often the bound of 90% held, over all windows and over those of each policy."""
        if self.trust is None:
            return None
        h = [t for t in self.horizons if t <= self.trust.horizon]
        whole = {"all": coverage(self.doubted, self.trust, h)}
        return whole | {
            policy.name: coverage(self.doubted.part(self.of_policy(p)), self.trust, h)
            for p, policy in enumerate(self.rollouts.policies)
        }

    def log(self, folder: str | Path) -> None:
        """The figures by horizon and the headline as TensorBoard scalars in ``folder``."""
        from torch.utils.tensorboard import SummaryWriter

        numbers = self.numbers()
        with SummaryWriter(str(folder)) as writer:
            for name, medians in numbers["median_error_at_every_step"].items():
                for t, error in enumerate(medians, 1):
                    if error is not None:
                        writer.add_scalar(f"median error/{name}", error, t)
            for name, told in numbers["agreement"].items():
                for what in ("pearson", "spearman", "regret"):
                    if told[what][0] is not None:
                        writer.add_scalar(f"{what}/{name}", told[what][0], 0)


def compare(
    model: str | Path | Dynamics,
    env_id: str | None = None,
    *,
    policies: Sequence[Policy] | None = None,
    episodes: int = 16,
    seed: int = 10_000,
    horizon: int = 64,
    context: int = CONTEXT,
    chunk: int = 1,
    limit: int | None = None,
    success_fn: SuccessFn | None = None,
    references: bool = True,
    progress: bool = True,
) -> Comparison:
    """Hold a dream against the simulator ``env_id``: the same starts, policies and dice, dreamed and simulated.

    model: a shipped model's name, a folder, a hub id, or any ``Dynamics``. env_id: None takes the one on its card.
    policies: 3 or more; None takes ``kairos_gym.policies.ladder``, which trains some where it hasn't yet.
    episodes: starts, the same for every policy; start e is that of ``reset(seed=seed + e)``.
    horizon, context: in the open-loop part a dream sees ``context`` real frames (fewer in short episodes) and goes on
        for ``horizon`` steps with the actions really played, ``chunk`` at a time. In the closed-loop part it sees the
        first frame alone, and the policies act on what is dreamed, until the time limit.
    limit: steps of an episode; None takes the simulator's own.
    success_fn: which of N observations show the task solved; starts that do are refused.
    references: measure beside it what knows less (nothing moves, a linear model, the PETS ensemble with as much
        CPU time as the model had), fitted on the model's own training data, which is recorded again where it can be.

    Raises ValueError for wrong arguments, spaces that differ, and where an evaluation episode is in the training data;
    FileNotFoundError where the training data can't be had (or pass references=False).
    """
    if horizon < 1 or context < 1 or episodes < 2:
        raise ValueError(f"horizon and context must be at least 1, episodes 2; got {horizon=}, {context=}, {episodes=}")
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    world: Any = load(model) if isinstance(model, str | Path) else model
    card = getattr(world, "card", None) or {}
    env_id = env_id or card.get("env")
    if env_id is None:
        raise ValueError(f"the card of {name} names no simulator: say which")
    _expect_spaces(world, name, env_id)
    if not 1 <= chunk <= world.spec.chunk:
        raise ValueError(f"chunk must be 1 to {world.spec.chunk}, this model's longest, got {chunk}")
    say = _teller(progress)
    data = experience(card) if references else None
    say("policies")
    rollouts = play_real(
        env_id,
        ladder(env_id, progress=progress) if policies is None else policies,
        episodes=episodes,
        seed=seed,
        at_least=context + horizon,
        limit=limit,
        success_fn=success_fn,
        progress=progress,
    )
    expect_apart(data, world, rollouts)
    windows = draw_windows(rollouts, horizon, context, seed)
    std = _unit(world, data, rollouts)
    say("the dream")
    dreamed = windows.dream(world, chunk=chunk)
    # With other windows' actions: a model that is no worse with them doesn't listen to actions.
    others = windows.real[1].roll(len(windows.at) // 2 + 1, 0)
    errors = {
        MODEL: windows.against(dreamed, std),
        SHUFFLED: windows.against(windows.dream(world, actions=others, chunk=chunk), std),
    }
    results = {MODEL: play_dream(world, rollouts, success_fn=success_fn)}
    for reference, dynamics in _references(world, data, card, say).items():
        errors[reference] = windows.against(windows.dream(dynamics), std)
        results[reference] = play_dream(dynamics, rollouts, success_fn=success_fn)
    say("the simulator against itself")
    errors |= _chaos(windows, rollouts, std, seed)
    say("speed")
    return Comparison(
        name,
        world.spec.dt,
        chunk,
        rollouts,
        windows,
        std,
        dreamed,
        errors,
        results,
        _ends(windows, dreamed),
        _speed(world, rollouts),
        getattr(world, "trust", None),
        doubted(world, windows, std, dreamed),
        _memory(world, windows, dreamed),
        _state_bytes(world, windows),
        None if data is None else data.name,
    )


def draw_windows(rollouts: Rollouts, horizon: int, context: int, seed: int) -> Windows:
    """One stretch of each episode, at a random place; an episode too short for all is dreamed from its middle."""
    episodes = rollouts.episodes
    first = episodes.starts()
    length = episodes.left[first].numpy()  # steps
    least = np.minimum(context - 1, length // 2)
    most = np.maximum(least, length - horizon)
    at = torch.from_numpy(np.random.default_rng(seed).integers(least, most + 1))
    return Windows(episodes, first + at, (at + 1).clamp_max(context), horizon, rollouts.states)


def expect_apart(data: Experience | None, world: Any, rollouts: Rollouts) -> None:
    """Raises ValueError where an evaluation episode shares a step with the training data, or a start with the model."""
    theirs = rollouts.episodes
    if data is not None and (shared := data.episodes.shared(theirs)).any():
        raise ValueError(
            f"{int(shared.sum())} steps of the evaluation are in the training data {data.name}, the first in episode "
            f"{int((theirs.index[: int(shared.nonzero()[0, 0]) + 1] == 0).sum()) - 1}: choose another seed"
        )
    starts = getattr(world, "starts", None)
    if data is None and starts is not None:
        known = {row.tobytes() for row in starts.obs[:, 0].cpu().numpy()}
        same = [e for e, f in enumerate(rollouts.starts[0].tolist()) if theirs.obs[f].numpy().tobytes() in known]
        if same:
            raise ValueError(
                f"evaluation episodes {same} begin where training episodes did: choose another seed than "
                f"{int(rollouts.seeds[0])}"
            )


def spread(error: Tensor) -> dict[str, float | int | None]:
    """RMS, median and quantiles of the errors [n] of n dreams."""
    if not len(error):
        return {"n": 0, "rms": None, "median": None}
    quantiles = {f"q{int(100 * q)}": torch.quantile(error, q).item() for q in (0.1, 0.25, 0.75, 0.9)}
    return {"n": len(error), "rms": _rms(error[:, None]).item(), "median": error.median().item(), **quantiles}


def _references(
    world: Any, data: Experience | None, card: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    if data is None:
        return {}
    seconds = float(card.get("fit", {}).get("cpu_seconds", 100.0))
    say(f"references, the ensemble for {seconds:.0f} CPU-seconds")
    spec, episodes = world.spec, data.episodes
    return {
        "nothing moves": fit_constant(spec, episodes),
        "linear": fit_linear(spec, episodes),
        "PETS ensemble": fit_ensemble(spec, episodes, cpu_seconds=seconds),
    }


def off(by: float) -> str:
    return f"simulator, {by:g} std off"


def _chaos(windows: Windows, rollouts: Rollouts, std: Tensor, seed: int) -> dict[str, OpenLoop]:
    """The simulator against itself from starts that are a little off: what no model can be asked to beat."""
    from envs import SimulatorDynamics

    if windows.states is None or rollouts.states is None:
        return {}
    simulator = SimulatorDynamics(rollouts.env_id)
    exact = windows.begin(simulator)
    usual = simulator.coordinates(simulator.at(rollouts.states)).std(0)
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(windows.at), len(usual)))) * usual
    return {
        off(by): windows.against(windows.dream(simulator, state=simulator.displaced(exact, by * noise)), std)
        for by in OFF
    }


def _ends(windows: Windows, dreamed: Imagined) -> Ends:
    _, _, _, real, valid = windows.real
    never = windows.horizon
    ours, theirs = (torch.where(x.any(1), x.int().argmax(1), never) for x in (dreamed.terminated, real))
    lasts = valid.sum(1)  # a recording that was cut short says nothing of what the dream does afterwards
    ours = torch.where((ours >= lasts) & (theirs == never), never, ours)
    a, b = ours < never, theirs < never
    apart = (ours - theirs)[a & b].abs().float()
    return Ends(
        int((a & b).sum()),
        int((~a & b).sum()),
        int((a & ~b).sum()),
        int((~a & ~b).sum()),
        apart.median().item() if len(apart) else None,
    )


def _speed(world: Any, rollouts: Rollouts, rounds: int = 5) -> Speed:
    """By turns, so that whatever else the machine does meets all alike."""
    from envs import make_real

    env = make_real(rollouts.env_id, max_episode_steps=10**9)
    env.reset(seed=0)
    env.action_space.seed(0)
    played = [env.action_space.sample() for _ in range(64)]

    def simulate() -> int:
        for action in played:
            if env.step(action)[2]:
                env.reset()
        return len(played)

    def dreaming(batch: int) -> Callable[[], int]:
        first = rollouts.starts.flatten()[torch.arange(batch) % rollouts.starts.numel()]
        windows = Windows(rollouts.episodes, first, torch.ones_like(first), 1, rollouts.states)
        state, actions = windows.begin(world), windows.real[1]

        def play() -> int:
            with torch.inference_mode():
                for _ in range(8):
                    world.imagine(state, actions)
            return 8 * batch

        return play

    jobs = {0: simulate, **{batch: dreaming(batch) for batch in (1, 64, 1024)}}
    rates: dict[int, list[float]] = {key: [] for key in jobs}
    for _ in range(rounds):
        for key, job in jobs.items():
            begun = time.thread_time()
            steps = job()
            rates[key].append(steps / max(time.thread_time() - begun, 1e-9))
    env.close()
    simulator, *dreams = (float(np.median(rate)) for rate in rates.values())
    return Speed(simulator, dict(zip((1, 64, 1024), dreams, strict=True)))


def _state_bytes(world: Any, windows: Windows) -> dict[int, int]:
    one = Windows(windows.episodes, windows.at[:1], windows.seen[:1], 1, windows.states)
    state, found = one.begin(world), {}
    action = windows.real[1][:1, :1]
    with torch.inference_mode():
        for t in range(257):
            if t in (0, 1, 16, 256):
                found[t] = state.nbytes
            state, _ = world.imagine(state, action)
    return found


def _memory(world: Any, windows: Windows, dreamed: Imagined) -> dict[int, MemoryDrift]:
    if not isinstance(world, WorldModel) or "G" not in world.config.pattern:
        return {}
    assert dreamed.obs is not None
    real, actions, *_ = windows.real
    sound = dreamed.obs.isfinite().all(-1).all(-1)
    state = windows.begin(world).select(sound.nonzero()[:, 0])
    return memory_drift(world, state, real[sound], dreamed.obs[sound], actions[sound])


def _remembered(drift: MemoryDrift, horizons: list[int]) -> dict[str, Any]:
    """Medians over the windows, of each head; errors and bounds over the memory's own size."""

    def by_step(x: Tensor) -> dict[int, Any]:
        return {h: (x / drift.size)[..., h].median(0).values.tolist() for h in horizons}

    return {
        "steps_remembered": drift.reach.median(0).values.tolist(),
        "error": by_step(drift.error),
        "bound": by_step(drift.running),
        "closed_bound": by_step(drift.closed),
        "tightness": drift.tightness.median(0).values.tolist(),
        "violations": int((drift.error > drift.running * (1 + 1e-3) + 1e-4).sum()),
    }


def _unit(world: Any, data: Experience | None, rollouts: Rollouts) -> Tensor:
    """The std of each dimension in the training data; in the evaluation where that isn't known."""
    if isinstance(world, WorldModel):
        return world.scaling.obs_std.cpu()
    std = (rollouts if data is None else data).episodes.obs.std(0)
    return torch.where(std > 1e-6, std, 1.0)


def _expect_spaces(world: Any, name: str, env_id: str) -> None:
    from envs import make_real

    env = make_real(env_id)
    for space in ("observation_space", "action_space"):
        ours, theirs = getattr(world.spec, space), getattr(env, space)
        if ours.shape != theirs.shape or type(ours) is not type(theirs):
            raise ValueError(f"{name} has an {space} {ours}, {env_id} {theirs}: is it its simulator?")
    env.close()


def _teller(progress: bool) -> Callable[[str], None]:
    def say(what: str) -> None:
        if progress:
            print(f"compare: {what}", file=sys.stderr)

    return say


def _rms(x: Tensor) -> Tensor:
    """Over the first dimension, NaN left out."""
    return x.square().nanmean(0).sqrt()


def _median(error: Tensor) -> float:
    return error.median().item() if len(error) else math.nan


def _played(result: Result, p: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "return": result.returns[p].mean(),
        "steps": result.steps[p].mean(),
        "ended": result.terminated[p].mean(),
        "lost": int(result.lost[p].sum()),
    }
    if result.success is not None:
        found["success"] = np.isfinite(result.success[p]).mean()
        found["steps_to_success"] = np.median(result.success[p])
    return found


def _told(found: Agreement, names: list[str]) -> dict[str, Any]:
    return {**asdict(found), "chosen": names[found.chosen], "best": names[found.best]}


def _plain(x: Any) -> Any:
    """Only what JSON has: keys as text, NaN and infinity as None."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x
