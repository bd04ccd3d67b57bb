"""Explains one decision: all futures that a planner dreamed for it, the one it chose, and what really happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kairos_gym.data.episode import RecordedEpisode
from kairos_gym.plots import INK, ORANGE, panels
from planners import MPC, Objective, Plan, Planner
from world_model.contract import Dynamics, ExactDynamics
from world_model.spaces import flatten


class Explained(NamedTuple):
    """One decision of an episode."""

    plan: Plan  # B=1, with its trace: all that was dreamed for it
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
    from envs import make_real

    if decision < 0:
        raise ValueError(f"decision must be at least 0, the episode's first, got {decision}")
    env: Any = make_real(env_id)
    mpc = MPC(dynamics, planner, objective, seed=seed)
    episode, inner_obs = RecordedEpisode(env, seed), None

    def vectors(frames: list[Any]) -> NDArray[Any]:
        return np.stack([flatten(env.observation_space, frame) for frame in frames])

    def decide() -> NDArray[Any]:
        obs = flatten(env.observation_space, episode.obs)
        if isinstance(dynamics, ExactDynamics):  # an observation may not determine the state
            return mpc.act(obs, state=dynamics.capture(env))
        return mpc.act(obs, inner_obs=inner_obs)

    for number in range(decision):
        inner_obs = vectors(episode.play(decide().reshape(-1, *env.action_space.shape)))
        if episode.done:
            raise ValueError(f"this episode ends after {number + 1} decisions: explain an earlier one than {decision}")
    mpc.keep_trace = True
    decide()
    assert mpc.plan is not None
    obs = flatten(env.observation_space, episode.obs)
    real = vectors(episode.play(mpc.plan.actions[0].flatten(0, 1).cpu().numpy()))
    env.close()
    return Explained(mpc.plan, obs.astype(np.float32), real.astype(np.float32))


def draw_decision(explained: Explained, dims: Sequence[int] | None = None) -> Figure:
    """Draw the futures over time in some dimensions of the observation, and the return imagined for each.

    dims: those to draw; None takes up to three in which the futures differ most. Raises ValueError for others than
    there are, and for a plan without a trace.
    """
    plan, trace = explained.plan, explained.plan.trace
    if trace is None or trace.scored.futures is None:
        raise ValueError("this plan has no trace: plan with keep_trace=True")
    futures, value = trace.scored.futures[0].cpu().numpy(), trace.scored.value[0].cpu().numpy()
    chosen = int((trace.candidates[0] == plan.actions[0]).flatten(1).all(1).nonzero()[0, 0])
    if dims is None:
        spread = _std(futures, 0).max(0) / np.maximum(_std(futures, (0, 1)), 1e-6)  # at a step, over that of all
        dims = sorted(np.argsort(-spread, kind="stable")[:3].tolist())
    if len(dims) == 0 or not all(0 <= dim < futures.shape[-1] for dim in dims):
        raise ValueError(f"dims must be some of 0 to {futures.shape[-1] - 1}, got {list(dims)}")
    allowed = np.isfinite(value) if trace.scored.violation is None else trace.scored.violation[0].cpu().numpy() <= 0
    order = np.argsort(value, kind="stable")
    rank = np.empty(len(value))
    rank[order] = np.linspace(0, 1, len(value))
    colours = np.where(allowed[:, None], colormaps["viridis"](rank), colormaps["Reds"](0.5))
    figure, (*axes, right) = panels((3.2 * (len(dims) + 1), 2.9), len(dims) + 1)
    for panel, dim in zip(axes, dims, strict=True):
        start = np.full((len(futures), 1), explained.obs[dim])
        paths = np.concatenate([start, futures[..., dim]], 1)
        real = np.concatenate([explained.obs[None], explained.real])[:, dim]
        _draw_futures(panel, paths, real, colours, order, chosen)
        panel.set(title=f"observation {dim}", xlabel="step")
    axes[0].legend(frameon=False, fontsize=8)
    finite = np.isfinite(value)
    right.scatter(np.flatnonzero(finite), value[finite], c=colours[finite], s=6)
    right.scatter([chosen], [value[chosen]], color=ORANGE, s=40, zorder=3)
    right.set(title="imagined return", xlabel="evaluation")
    rate = plan.evaluations / plan.seconds
    figure.suptitle(
        f"{plan.evaluations} futures of {futures.shape[1]} steps in {1000 * plan.seconds:.0f} ms "
        f"({rate:,.0f} a second); the chosen one has an imagined return of {plan.value[0]:.3g}",
        fontsize=10,
    )
    return figure


def _draw_futures(
    axes: Axes, paths: NDArray[Any], real: NDArray[Any], colours: NDArray[Any], order: NDArray[Any], chosen: int
) -> None:
    """One dimension of all futures [N,T+1], the worst first, so that better ones lie above them."""
    for i in order:
        axes.plot(paths[i], color=colours[i], linewidth=0.5, alpha=0.35, rasterized=True)
    axes.plot(paths[chosen], color=ORANGE, linewidth=2.2, label="chosen, as imagined")
    axes.plot(real, color=INK, linewidth=1.3, linestyle="--", label="as simulated")


def _std(futures: NDArray[np.float32], axis: Any) -> NDArray[np.float32]:
    """The standard deviation of the futures that have not ended; 0 where all have."""
    return np.nan_to_num(np.ma.std(np.ma.masked_invalid(futures), axis).filled(0))
