"""Imagined against simulated: how faithful a dream is to its simulator, for how long, for which policies, and where."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kairos_gym.data.training_data import TrainingData, load_training_data
from kairos_gym.evaluation.calibrate import dream_errors
from kairos_gym.evaluation.comparison import MODEL, OFF, SHUFFLED, Comparison, Speed, TerminationCounts, off
from kairos_gym.evaluation.memory_bounds import MemoryDrift, memory_drift
from kairos_gym.evaluation.rollouts import Rollouts, SuccessFn, play_dream, play_real
from kairos_gym.evaluation.windows import CONTEXT, OpenLoopErrors, Windows
from kairos_gym.models import load
from kairos_gym.policies.ladder import Policy, ladder
from world_model.contract import Dynamics, Imagined
from world_model.dynamics.baselines import fit_constant, fit_ensemble, fit_linear
from world_model.model.world_model import WorldModel
from world_model.spaces import alike


def compare(
    model: str | Path | Dynamics,
    env_id: str | None = None,
    *,
    policies: Sequence[Policy] | None = None,
    also: Sequence[Policy] = (),
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
    policies: 3 or more of different names; None takes ``kairos_gym.policies.ladder.ladder``, which trains some where it hasn't
        yet. also: more beside these.
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
    if policies is not None:
        _expect_names([*policies, *also])
    if not 1 <= chunk <= world.spec.chunk:
        raise ValueError(f"chunk must be 1 to {world.spec.chunk}, this model's longest, got {chunk}")
    say = _teller(progress)
    data = load_training_data(card) if references else None
    say("policies")
    players = [*(ladder(env_id, progress=progress) if policies is None else policies), *also]
    _expect_names(players)
    rollouts = play_real(
        env_id,
        players,
        episodes=episodes,
        seed=seed,
        at_least=context + horizon,
        limit=limit,
        success_fn=success_fn,
        progress=progress,
    )
    expect_unseen(data, world, rollouts)
    windows = draw_windows(rollouts, horizon, context, seed)
    std = _unit(world, data, rollouts)
    say("the dream")
    dreamed = windows.dream(world, chunk=chunk)
    # With other windows' actions: a model that is no worse with them doesn't listen to actions.
    others = windows.recorded.action.roll(len(windows.at) // 2 + 1, 0)
    errors = {
        MODEL: windows.errors(dreamed, std),
        SHUFFLED: windows.errors(windows.dream(world, actions=others, chunk=chunk), std),
    }
    results = {MODEL: play_dream(world, rollouts, success_fn=success_fn)}
    for reference, dynamics in _references(world, data, card, say).items():
        errors[reference] = windows.errors(windows.dream(dynamics), std)
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
        dream_errors(world, windows, std, dreamed),
        _memory(world, windows, dreamed),
        _state_bytes(world, windows),
        data,
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


def expect_unseen(data: TrainingData | None, world: Any, rollouts: Rollouts) -> None:
    """Raises ValueError where an evaluation episode is in part in the training data, or shares a start with the model.

    A hundredth of an episode's steps may be known: policies that end in a cycle come back to the same states for ever.
    """
    theirs = rollouts.episodes
    if data is not None:
        steps = data.episodes.known_steps(theirs)
        much = steps > 0.01 * theirs.left[theirs.starts()]
        if much.any():
            raise ValueError(
                f"{int(steps.sum())} steps of the evaluation are in the training data {data.name}, the first in "
                f"episode {int(much.nonzero()[0, 0])}: choose another seed"
            )
    starts = getattr(world, "starts", None)
    if starts is not None:
        known = {row.tobytes() for row in starts.obs[:, 0].cpu().numpy()}
        same = [e for e, f in enumerate(rollouts.starts[0].tolist()) if theirs.obs[f].numpy().tobytes() in known]
        if same and len(known) > 1:  # a simulator may have but one start
            raise ValueError(
                f"evaluation episodes {same} begin where training episodes did: choose another seed than "
                f"{int(rollouts.seeds[0])}"
            )


def _references(
    world: Any, data: TrainingData | None, card: dict[str, Any], say: Callable[[str], None]
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


def _chaos(windows: Windows, rollouts: Rollouts, std: Tensor, seed: int) -> dict[str, OpenLoopErrors]:
    """The simulator against itself from starts that are a little off: what no model can be asked to beat."""
    from envs import SimulatorDynamics

    if windows.states is None or rollouts.states is None:
        return {}
    simulator = SimulatorDynamics(rollouts.env_id)
    exact = windows.observe(simulator)
    usual = simulator.coordinates(simulator.at(rollouts.states)).std(0)
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(windows.at), len(usual)))) * usual
    return {
        off(by): windows.errors(windows.dream(simulator, state=simulator.displaced(exact, by * noise)), std)
        for by in OFF
    }


def _ends(windows: Windows, dreamed: Imagined) -> TerminationCounts:
    _, _, _, real, valid = windows.recorded
    never = windows.horizon
    ours, theirs = (torch.where(x.any(1), x.int().argmax(1), never) for x in (dreamed.terminated, real))
    lasts = valid.sum(1)  # a recording that was cut short says nothing of what the dream does afterwards
    ours = torch.where((ours >= lasts) & (theirs == never), never, ours)
    a, b = ours < never, theirs < never
    apart = (ours - theirs)[a & b].abs().float()
    return TerminationCounts(
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
        state, actions = windows.observe(world), windows.recorded.action

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
    state, found = one.observe(world), {}
    action = windows.recorded.action[:1, :1]
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
    real, actions, *_ = windows.recorded
    sound = dreamed.obs.isfinite().all(-1).all(-1)
    if not sound.any():
        return {}
    state = windows.observe(world).select(sound.nonzero()[:, 0])
    return memory_drift(world, state, real[sound], dreamed.obs[sound], actions[sound])


def _unit(world: Any, data: TrainingData | None, rollouts: Rollouts) -> Tensor:
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
        if not alike(ours, theirs):
            raise ValueError(f"{name} has an {space} {ours}, {env_id} {theirs}: is it its simulator?")
    env.close()


def _expect_names(policies: Sequence[Policy]) -> None:
    names = [policy.name for policy in policies]
    if len(names) < 3 or len(set(names)) < len(names) or "all" in names:
        raise ValueError(f"3 policies or more are needed, of different names other than 'all', got {names}")


def _teller(progress: bool) -> Callable[[str], None]:
    def say(what: str) -> None:
        if progress:
            print(f"compare: {what}", file=sys.stderr)

    return say
