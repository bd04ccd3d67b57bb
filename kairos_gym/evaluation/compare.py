"""Imagined against simulated: how faithful a dream is to its simulator, for how long, for which policies, and where."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kairos_gym.data.training_data import TrainingData, load_training_data
from kairos_gym.evaluation.calibrate import dream_errors
from kairos_gym.evaluation.compare_config import CompareConfig
from kairos_gym.evaluation.comparison import (
    MODEL,
    PERTURBATIONS,
    SHUFFLED,
    Comparison,
    Speed,
    TerminationCounts,
    perturbed,
)
from kairos_gym.evaluation.memory_bounds import MemoryDrift, memory_drift
from kairos_gym.evaluation.rollouts import Rollouts, SuccessFn, play_dream, play_real
from kairos_gym.evaluation.timing import interleaved_rates
from kairos_gym.evaluation.windows import OpenLoopErrors, Windows
from kairos_gym.models import load
from kairos_gym.policies.ladder import Policy, ladder
from world_model.contract import Dynamics, Imagined
from world_model.dynamics.baselines import fit_constant, fit_ensemble, fit_linear
from world_model.model.world_model import WorldModel
from world_model.spaces import alike

BATCHES = (1, 64, 1024)  # dreams side by side, whose speed is measured


def compare(
    model: str | Path | Dynamics,
    config: CompareConfig = CompareConfig(),
    *,
    env_id: str | None = None,
    policies: Sequence[Policy] | None = None,
    also: Sequence[Policy] = (),
    success_fn: SuccessFn | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare a dream with its simulator: the same starts, policies and random numbers, dreamed and simulated.

    Open loop, a dream sees real frames and goes on with the actions that were really played. Closed loop, it sees the
    first frame alone, and the policies act on what is dreamed, until the time limit.

    model: a shipped model's name, a folder, a hub id, or any ``Dynamics``. env_id: None takes the one on its card.
    policies: 3 or more of different names; None takes ``kairos_gym.policies.ladder.ladder``, which trains some of them
        where that hasn't been done yet. also: more of them.
    success_fn: which of N observations show the task solved; starts that do are rejected.

    Raises ValueError for wrong arguments, spaces that differ, and where an evaluation episode is in the training data;
    FileNotFoundError where the references need training data that can't be had.
    """
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    world: Any = load(model) if isinstance(model, str | Path) else model
    card = _card(world)
    env_id = env_id or card.get("env")
    if env_id is None:
        raise ValueError(f"the card of {name} names no simulator: say which")
    _expect_spaces(world, name, env_id)
    if policies is not None:
        _expect_names([*policies, *also])
    if not 1 <= config.chunk <= world.spec.chunk:
        raise ValueError(f"chunk must be 1 to {world.spec.chunk}, this model's longest, got {config.chunk}")
    data = load_training_data(card) if config.references else None
    _print("policies", progress)
    players = [*(ladder(env_id, progress=progress) if policies is None else policies), *also]
    _expect_names(players)
    rollouts = play_real(
        env_id,
        players,
        episodes=config.episodes,
        seed=config.seed,
        at_least=config.context + config.horizon,
        limit=config.episode_steps,
        success_fn=success_fn,
        progress=progress,
    )
    expect_unseen(data, world, rollouts)
    return _measure(name, world, rollouts, data, config, success_fn, progress)


def _measure(
    name: str,
    world: Any,
    rollouts: Rollouts,
    data: TrainingData | None,
    config: CompareConfig,
    success_fn: SuccessFn | None,
    progress: bool,
) -> Comparison:
    """Dream what was played, with the model and with what it is compared with."""
    windows = draw_windows(rollouts, config)
    std = _std(world, data, rollouts)
    _print("the dream", progress)
    dreamed = windows.dream(world, chunk=config.chunk)
    # With other windows' actions: a model that is no worse with them doesn't follow the actions.
    shuffled = windows.recorded.action.roll(len(windows.at) // 2 + 1, 0)
    errors = {
        MODEL: windows.errors(dreamed, std),
        SHUFFLED: windows.errors(windows.dream(world, actions=shuffled, chunk=config.chunk), std),
    }
    results = {MODEL: play_dream(world, rollouts, success_fn=success_fn)}
    for reference, dynamics in _fit_references(world, data, progress).items():
        errors[reference] = windows.errors(windows.dream(dynamics), std)
        results[reference] = play_dream(dynamics, rollouts, success_fn=success_fn)
    _print("the simulator against itself", progress)
    errors |= _perturb_simulator(windows, rollouts, std, config.seed)
    _print("speed", progress)
    return Comparison(
        name=name,
        dt=world.spec.dt,
        chunk=config.chunk,
        rollouts=rollouts,
        windows=windows,
        std=std,
        dreamed=dreamed,
        errors=errors,
        results=results,
        ends=_count_terminations(windows, dreamed),
        speed=_measure_speed(world, rollouts),
        trust=getattr(world, "trust", None),
        dream_errors=dream_errors(world, windows, std, dreamed),
        memory=_memory_drift(world, windows, dreamed),
        state_bytes=_state_bytes(world, windows),
        experience=data,
    )


def draw_windows(rollouts: Rollouts, config: CompareConfig) -> Windows:
    """One window in each episode, at a random place; in an episode too short for all of it, at its middle."""
    episodes = rollouts.episodes
    first = episodes.starts()
    length = episodes.left[first].numpy()  # steps
    earliest = np.minimum(config.context - 1, length // 2)
    latest = np.maximum(earliest, length - config.horizon)
    at = torch.from_numpy(np.random.default_rng(config.seed).integers(earliest, latest + 1))
    return Windows(episodes, first + at, (at + 1).clamp_max(config.context), config.horizon, rollouts.states)


def expect_unseen(data: TrainingData | None, world: Any, rollouts: Rollouts) -> None:
    """Raises ValueError where an evaluation episode is in the training data, or begins where a training episode did.

    A hundredth of an episode's steps may be known: policies that end in a cycle return to the same states for ever.
    """
    episodes = rollouts.episodes
    if data is not None:
        steps = data.episodes.known_steps(episodes)
        known = steps > 0.01 * episodes.left[episodes.starts()]
        if known.any():
            raise ValueError(
                f"{int(steps.sum())} steps of the evaluation are in the training data {data.name}, the first in "
                f"episode {int(known.nonzero()[0, 0])}: choose another seed"
            )
    starts = getattr(world, "starts", None)
    if starts is not None:
        seen = {row.tobytes() for row in starts.obs[:, 0].cpu().numpy()}
        same = [e for e, f in enumerate(rollouts.starts[0].tolist()) if episodes.obs[f].numpy().tobytes() in seen]
        if same and len(seen) > 1:  # a simulator may have but one start
            raise ValueError(
                f"evaluation episodes {same} begin where training episodes did: choose another seed than "
                f"{int(rollouts.seeds[0])}"
            )


def _card(world: Any) -> dict[str, Any]:
    return getattr(world, "card", None) or {}


def _fit_references(world: Any, data: TrainingData | None, progress: bool) -> dict[str, Any]:
    """Simpler models, fitted on the model's own training data; the ensemble for as much CPU time as the model had."""
    if data is None:
        return {}
    seconds = float(_card(world).get("fit", {}).get("cpu_seconds", 100.0))
    _print(f"references, the ensemble for {seconds:.0f} CPU-seconds", progress)
    spec, episodes = world.spec, data.episodes
    return {
        "nothing moves": fit_constant(spec, episodes),
        "linear": fit_linear(spec, episodes),
        "PETS ensemble": fit_ensemble(spec, episodes, cpu_seconds=seconds),
    }


def _perturb_simulator(windows: Windows, rollouts: Rollouts, std: Tensor, seed: int) -> dict[str, OpenLoopErrors]:
    """The errors of the simulator itself from starts that are a little off: no model can be expected to beat them."""
    from envs import SimulatorDynamics

    if windows.states is None or rollouts.states is None:
        return {}
    simulator = SimulatorDynamics(rollouts.env_id)
    exact = windows.observe(simulator)
    scale = simulator.coordinates(simulator.at(rollouts.states)).std(0)
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(windows.at), len(scale)))) * scale
    return {
        perturbed(by): windows.errors(windows.dream(simulator, state=simulator.displaced(exact, by * noise)), std)
        for by in PERTURBATIONS
    }


def _count_terminations(windows: Windows, dreamed: Imagined) -> TerminationCounts:
    recorded, never = windows.recorded, windows.horizon
    ours, theirs = (
        torch.where(ends.any(1), ends.int().argmax(1), never) for ends in (dreamed.terminated, recorded.terminated)
    )
    lasts = recorded.valid.sum(1)  # where a recording was cut short, what the dream does afterwards doesn't count
    ours = torch.where((ours >= lasts) & (theirs == never), never, ours)
    in_dream, in_simulator = ours < never, theirs < never
    apart = (ours - theirs)[in_dream & in_simulator].abs().float()
    return TerminationCounts(
        both=int((in_dream & in_simulator).sum()),
        only_simulated=int((~in_dream & in_simulator).sum()),
        only_dreamed=int((in_dream & ~in_simulator).sum()),
        neither=int((~in_dream & ~in_simulator).sum()),
        steps_apart=apart.median().item() if len(apart) else None,
    )


def _measure_speed(world: Any, rollouts: Rollouts, rounds: int = 5) -> Speed:
    """Steps a CPU-second of the simulator and of dreams side by side, medians over rounds in which all take turns."""
    from envs import make_real

    env = make_real(rollouts.env_id, max_episode_steps=10**9)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(64)]

    def simulate() -> float:
        for action in actions:
            if env.step(action)[2]:
                env.reset()
        return len(actions)

    def imagine(batch: int) -> float:
        state, actions = starts[batch]
        with torch.inference_mode():
            for _ in range(8):
                world.imagine(state, actions)
        return 8 * batch

    starts = {}
    for batch in BATCHES:
        first = rollouts.starts.flatten()[torch.arange(batch) % rollouts.starts.numel()]
        windows = Windows(rollouts.episodes, first, torch.ones_like(first), 1, rollouts.states)
        starts[batch] = windows.observe(world), windows.recorded.action
    rates = interleaved_rates({0: simulate, **{batch: partial(imagine, batch) for batch in BATCHES}}, rounds)
    env.close()
    medians = {batch: statistics.median(rate) for batch, rate in rates.items()}
    return Speed(simulator=medians.pop(0), dream=medians)


def _state_bytes(world: Any, windows: Windows) -> dict[int, int]:
    """The size of one dream's state after 0, 1, 16 and 256 steps."""
    one = Windows(windows.episodes, windows.at[:1], windows.seen[:1], 1, windows.states)
    state, sizes = one.observe(world), {}
    action = windows.recorded.action[:1, :1]
    with torch.inference_mode():
        for t in range(257):
            if t in (0, 1, 16, 256):
                sizes[t] = state.nbytes
            state, _ = world.imagine(state, action)
    return sizes


def _memory_drift(world: Any, windows: Windows, dreamed: Imagined) -> dict[int, MemoryDrift]:
    """How the gated-delta layers' memory of dreamed frames differs from that of real ones, where dreams are finite."""
    if not isinstance(world, WorldModel) or "G" not in world.config.pattern:
        return {}
    assert dreamed.obs is not None
    finite = dreamed.obs.isfinite().all(-1).all(-1)
    if not finite.any():
        return {}
    state, recorded = windows.observe(world).select(finite.nonzero()[:, 0]), windows.recorded
    return memory_drift(world, state, recorded.obs[finite], dreamed.obs[finite], recorded.action[finite])


def _std(world: Any, data: TrainingData | None, rollouts: Rollouts) -> Tensor:
    """The std of each dimension in the training data, or in the evaluation where that isn't known -> [O]."""
    if isinstance(world, WorldModel):
        return world.scaling.obs_std.cpu()
    std = (rollouts if data is None else data).episodes.obs.std(0)
    return torch.where(std > 1e-6, std, 1.0)


def _expect_spaces(world: Any, name: str, env_id: str) -> None:
    from envs import make_real

    env = make_real(env_id)
    for space in ("observation_space", "action_space"):
        ours, theirs = getattr(world.spec, space), getattr(env, space)
        if not alike(ours, theirs):
            raise ValueError(f"{name} has an {space} {ours}, {env_id} {theirs}: is it its simulator?")
    env.close()


def _expect_names(policies: Sequence[Policy]) -> None:
    names = [policy.name for policy in policies]
    if len(names) < 3 or len(set(names)) < len(names) or "all" in names:
        raise ValueError(f"3 policies or more are needed, of different names other than 'all', got {names}")


def _print(message: str, progress: bool) -> None:
    if progress:
        print(f"compare: {message}", file=sys.stderr)
