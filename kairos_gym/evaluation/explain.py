"""Explains one decision: all futures that a planner dreamed up for it, the one it chose, and what really happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from planners import MPC, Objective, Plan, Planner
from world_model.contract import Dynamics
from world_model.spaces import flatten


class Explained(NamedTuple):
    """One decision of an episode."""

    plan: Plan  # B=1, with all that was dreamed for it
    obs: NDArray[np.float32]  # [O], where it was made
    real: NDArray[np.float32]  # [T,O], what the chosen actions then led to in the simulator; T < H*K where it ended


def explain(
    env_id: str,
    dynamics: Dynamics,
    planner: Planner,
    objective: Objective = Objective(),
    *,
    decision: int = 5,
    seed: int = 0,
) -> Explained:
    """Play the simulator ``env_id`` from ``reset(seed=seed)`` to a decision, then the whole plan that is made there.

    Raises ValueError where the episode ends before that decision (0 is the first).
    """
    from envs import SimulatorDynamics, make_real

    if decision < 0:
        raise ValueError(f"decision must be at least 0, the episode's first, got {decision}")
    env: Any = make_real(env_id)
    mpc = MPC(dynamics, planner, objective, seed=seed)
    now, seen = flatten(env.observation_space, env.reset(seed=seed)[0]), None

    def play(actions: NDArray[Any]) -> tuple[NDArray[Any], bool]:
        frames, ended = [], False
        for action in actions:
            obs, _, terminated, truncated, _ = env.step(action.astype(env.action_space.dtype))
            frames.append(flatten(env.observation_space, obs))
            if ended := terminated or truncated:
                break
        return np.stack(frames), ended

    def act() -> NDArray[Any]:
        if isinstance(dynamics, SimulatorDynamics):  # not all observations tell the state
            return mpc.act(now, state=dynamics.capture(env))
        return mpc.act(now, inner_obs=seen)

    for number in range(decision):
        seen, over = play(act().reshape(-1, *env.action_space.shape))
        if over:
            raise ValueError(f"this episode ends after {number + 1} decisions: explain an earlier one than {decision}")
        now = seen[-1]
    mpc.keep_trace = True
    act()
    assert mpc.plan is not None
    real, _ = play(mpc.plan.actions[0].flatten(0, 1).cpu().numpy())
    env.close()
    return Explained(mpc.plan, now.astype(np.float32), real.astype(np.float32))


def draw_decision(explained: Explained, dims: Sequence[int] | None = None) -> Figure:
    """The fan of futures over time in some dimensions of the observation, and what each was imagined to earn.

    dims: those to draw; None takes up to three in which the futures differ most.
    """
    plan, kept = explained.plan, explained.plan.trace
    if kept is None or kept.scored.futures is None:
        raise ValueError("this plan has no trace: plan with keep_trace=True")
    futures, value = kept.scored.futures[0].cpu().numpy(), kept.scored.value[0].cpu().numpy()
    chosen = int((kept.candidates[0] == plan.actions[0]).flatten(1).all(1).nonzero()[0, 0])
    if dims is None:
        spread = _std(futures, 0).max(0) / np.maximum(_std(futures, (0, 1)), 1e-6)  # at a step, over that of all
        dims = sorted(np.argsort(-spread, kind="stable")[:3].tolist())
    if len(dims) == 0 or not all(0 <= dim < futures.shape[-1] for dim in dims):
        raise ValueError(f"dims must be some of 0 to {futures.shape[-1] - 1}, got {list(dims)}")
    fits = np.isfinite(value) if kept.scored.violation is None else kept.scored.violation[0].cpu().numpy() <= 0
    rank = np.empty(len(value))
    rank[np.argsort(value, kind="stable")] = np.linspace(0, 1, len(value))
    figure = Figure(figsize=(3.2 * (len(dims) + 1), 2.9), layout="constrained")
    *axes, right = figure.subplots(1, len(dims) + 1)
    colours = np.where(fits[:, None], colormaps["viridis"](rank), colormaps["Reds"](0.5))
    for ax, dim in zip(axes, dims, strict=True):
        paths = np.concatenate([np.full((len(futures), 1), explained.obs[dim]), futures[..., dim]], 1)
        for i in np.argsort(value, kind="stable"):
            ax.plot(paths[i], color=colours[i], linewidth=0.5, alpha=0.35, rasterized=True)
        ax.plot(paths[chosen], color="#c2410c", linewidth=2.2, label="chosen, as imagined")
        real = np.concatenate([explained.obs[None], explained.real])[:, dim]
        ax.plot(real, color="#1c2430", linewidth=1.3, linestyle="--", label="as simulated")
        ax.set(title=f"observation {dim}", xlabel="step")
    axes[0].legend(frameon=False, fontsize=8)
    finite = np.isfinite(value)
    right.scatter(np.flatnonzero(finite), value[finite], c=colours[finite], s=6)
    right.scatter([chosen], [value[chosen]], color="#c2410c", s=40, zorder=3)
    right.set(title="imagined return", xlabel="evaluation")
    for ax in (*axes, right):
        ax.spines[["top", "right"]].set_visible(False)
    rate = plan.evaluations / plan.seconds
    figure.suptitle(
        f"{plan.evaluations} futures of {futures.shape[1]} steps in {1000 * plan.seconds:.0f} ms "
        f"({rate:,.0f} a second); the chosen one earns {plan.value[0]:.3g}",
        fontsize=10,
    )
    return figure


def _std(futures: NDArray[np.float32], axis: Any) -> NDArray[np.float32]:
    """Of what is imagined; 0 where nothing is any more."""
    return np.nan_to_num(np.ma.std(np.ma.masked_invalid(futures), axis).filled(0))
