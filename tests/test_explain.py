"""A decision explained: what was dreamed for it, what was chosen, and what the simulator then did."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from envs import SimulatorDynamics
from kairos_gym.evaluation.explain import draw_decision, explain
from planners import CEM, MPPI, Objective, Planner


@pytest.mark.parametrize("planner", [CEM(4, 2, candidates=20, elites=4, iterations=2), MPPI(6, candidates=20)])
def test_what_the_truth_foresees_happens(planner: Planner, tmp_path: Path) -> None:
    explained = explain("Pendulum-v1", SimulatorDynamics("Pendulum-v1"), planner, decision=3, seed=1)
    plan, kept = explained.plan, explained.plan.trace
    assert kept is not None and kept.scored.futures is not None
    chosen = (kept.candidates[0] == plan.actions[0]).flatten(1).all(1)
    np.testing.assert_allclose(kept.scored.futures[0, chosen][0], explained.real, atol=1e-4)
    figure = draw_decision(explained)
    *axes, returns = figure.axes
    assert [ax.get_title() for ax in axes] == ["observation 0", "observation 1", "observation 2"]
    assert len(axes[0].lines) == plan.evaluations + 2
    dots = returns.collections[0]
    assert isinstance(dots, PathCollection) and np.shape(dots.get_offsets()) == (plan.evaluations, 2)
    figure.savefig(tmp_path / "plan.svg")
    assert [ax.get_title() for ax in draw_decision(explained, [2]).axes] == ["observation 2", "imagined return"]


def test_ends_and_limits_show(tmp_path: Path) -> None:
    """A pole falls in most futures, and where it may not go they are red."""
    env = "InvertedPendulum-v5"
    limit = Objective(cost_fn=lambda o, a, n: (n[..., 0] > 0.02).float(), cost_limit=0.0)
    explained = explain(env, SimulatorDynamics(env), CEM(20, candidates=30, elites=4, std=1.0), limit, decision=0)
    scored = explained.plan.trace.scored  # type: ignore[union-attr]
    assert scored.futures.isnan().any() and (scored.violation > 0).any()  # type: ignore[union-attr, operator]
    draw_decision(explained).savefig(tmp_path / "plan.svg")
    for dims in ([7], [-1], []):
        with pytest.raises(ValueError, match="dims must be some of 0 to 3"):
            draw_decision(explained, dims)
    with pytest.raises(ValueError, match="decision must be at least 0"):
        explain(env, SimulatorDynamics(env), CEM(1), decision=-1)
    with pytest.raises(ValueError, match=r"ends after \d+ decisions: explain an earlier one than 400"):
        explain(env, SimulatorDynamics(env), CEM(1, candidates=2, elites=2, iterations=1), decision=400)
