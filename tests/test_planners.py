"""The planners find known optima, keep the bounds, repeat themselves exactly, and MPC feeds the memory in order."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import LQR, PointMass, TinyMLP, ToyDynamics, box_spec

import planners
import planners.scoring
from planners import (
    CEM,
    ICEM,
    MPC,
    MPPI,
    Gradient,
    Objective,
    Plan,
    Planner,
    PolicyGuided,
    Problem,
    RandomShooting,
    Search,
    score,
)
from world_model.contract import Dynamics, Imagined
from world_model.dynamics import Pessimistic
from world_model.state import LatentState

SMALL: list[Planner] = [
    RandomShooting(horizon=3, chunk=2, candidates=32),
    CEM(horizon=3, chunk=2, candidates=32, elites=6, iterations=3),
    MPPI(horizon=3, chunk=2, candidates=32, iterations=3),
    ICEM(horizon=3, chunk=2, candidates=32, elites=6, iterations=3),
    Gradient(horizon=3, chunk=2, starts=6, iterations=5),
]
each_planner = pytest.mark.parametrize("planner", SMALL, ids=lambda p: type(p).__name__)


class NoGo(PointMass):
    """A point mass whose reward is NaN in every step that plays an action above ``limit``."""

    def __init__(self, limit: float):
        super().__init__(dim=1)
        self.limit = limit

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        x, reward = super().step(x, u)
        return x, torch.where(u[:, 0] > self.limit, torch.nan, reward)


class Diary(ToyDynamics):
    """x' = x + u, reward -|x|; its state is a diary of the last frames seen and of the actions that led to them."""

    LENGTH = 12

    def __init__(self, chunk: int = 4):
        super().__init__(box_spec(1, 1, chunk=chunk))

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        empty = torch.full((batch, self.LENGTH, 1), torch.nan)
        assert seeds is not None
        return LatentState({"x": torch.zeros(batch, 1), "seen": empty, "led": empty, "seed": seeds})

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        led = torch.full_like(obs, torch.nan) if actions is None else actions
        assert led.shape == obs.shape
        diary = {"seen": obs, "led": led}
        return state.replace(
            x=obs[:, -1], **{k: torch.cat([state[k], v], 1)[:, -self.LENGTH :] for k, v in diary.items()}
        )

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return x + u, -x.abs().sum(-1)


class Witness:
    """Plans as another planner does and remembers every call's arguments and result."""

    def __init__(self, planner: Planner):
        self.planner, self.calls, self.plans = planner, [], []  # type: ignore[var-annotated]

    def plan(self, dynamics: Dynamics, state: LatentState, **kwargs: Any) -> Plan:
        self.calls.append({"state": state, **kwargs})
        self.plans.append(self.planner.plan(dynamics, state, **kwargs))
        return self.plans[-1]


# --- known optima ---------------------------------------------------------------------------------------------------

PATIENT: list[Planner] = [
    CEM(horizon=6, candidates=1000, elites=50, iterations=25, min_std=0.002),
    MPPI(horizon=6, candidates=1000, iterations=30, decay=0.9),
    CEM(horizon=2, chunk=3, candidates=1000, elites=50, iterations=25, min_std=0.002),
    MPPI(horizon=2, chunk=3, candidates=1000, iterations=30, decay=0.9),
    ICEM(horizon=6, candidates=1000, elites=50, iterations=25, min_std=0.002, colour=0.5, shrink=1.0),
    ICEM(horizon=2, chunk=3, candidates=1000, elites=50, iterations=25, min_std=0.002, colour=0.5, shrink=1.0),
    Gradient(horizon=6, iterations=60, lr=0.05),
    Gradient(horizon=2, chunk=3, iterations=60, lr=0.05),
]
POINT_STARTS = torch.tensor([[0.8, -0.4], [-0.3, 0.6]])
LQR_STARTS = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.5, 0.5]])
toys_and_starts = pytest.mark.parametrize("toy, x", [(PointMass(2), POINT_STARTS), (LQR(), LQR_STARTS)])


@toys_and_starts
@pytest.mark.parametrize("planner", PATIENT, ids=lambda p: f"{type(p).__name__}-K{p.chunk}")
def test_within_one_percent_of_the_optimum(toy: Any, x: Tensor, planner: Planner) -> None:
    optimum = toy.optimal_return(x, 6).float()
    for seed in range(3):
        plan = planner.plan(toy, toy.start(x), seed=seed)
        assert (plan.value <= optimum + 1e-5).all()
        assert ((optimum - plan.value) / optimum.abs() < 0.01).all()
        torch.testing.assert_close(score(toy, toy.start(x), plan.actions[:, None]).value[:, 0], plan.value)


@toys_and_starts
def test_random_shooting_is_near_the_optimum(toy: Any, x: Tensor) -> None:
    # N uniform points in d dimensions leave about N^(-1/d) of a half range to the best one, and refine nothing:
    # so almost exact for two steps, and within twice the optimal cost for the 6 or 12 numbers of six steps.
    for steps, gap in ((1, 0.06), (6, 1.0)):
        optimum = toy.optimal_return(x, steps).float()
        plan = RandomShooting(horizon=steps, candidates=4000).plan(toy, toy.start(x), seed=1)
        assert (plan.value <= optimum + 1e-5).all()
        assert ((optimum - plan.value) / optimum.abs() < gap).all()


def test_defaults_beat_doing_nothing_by_far() -> None:
    toy = PointMass(2)
    nothing = score(toy, toy.start(POINT_STARTS), torch.zeros(2, 1, 15, 1, 2)).value[:, 0]
    for planner in (RandomShooting(), CEM(), MPPI()):
        value = planner.plan(toy, toy.start(POINT_STARTS)).value
        assert (value > 0.6 * nothing).all()


# --- score ----------------------------------------------------------------------------------------------------------


def slow_score(toy: Any, x: Tensor, candidates: Tensor, discount: float, reward_fn: Any) -> Tensor:
    """What ``score`` promises, one candidate and one step at a time."""
    returns = torch.zeros(candidates.shape[:2])
    for b, n in np.ndindex(*candidates.shape[:2]):
        state, obs, total, t, over = toy.start(x[b : b + 1]), x[b], 0.0, 0, False
        for chunk in candidates[b, n]:
            state, imagined = toy.imagine(state, chunk[None])
            for k, action in enumerate(chunk):
                reward = imagined.reward[0, k] if reward_fn is None else reward_fn(obs, action, imagined.obs[0, k])
                total += 0.0 if over else discount**t * reward.item()
                over, obs, t = over or bool(imagined.terminated[0, k]), imagined.obs[0, k], t + 1
        returns[b, n] = total if math.isfinite(total) else -math.inf
    return returns


def odd_reward(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    return (next_obs - obs).sum(-1) * 3 + action[..., 0] - next_obs[..., 0] ** 2


@pytest.mark.parametrize("reward_fn", [None, odd_reward])
@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("toy", [TinyMLP(2, 2), PointMass(2, wall=0.05), NoGo(0.6)], ids=["mlp", "wall", "nan"])
def test_score_equals_the_slow_loop(toy: ToyDynamics, discount: float, reward_fn: Any, monkeypatch: Any) -> None:
    g = torch.Generator().manual_seed(0)
    dim = toy.spec.observation_box.shape[0]
    x = torch.rand(3, dim, generator=g) * 0.4 - 0.2
    candidates = torch.rand(3, 5, 3, 2, dim, generator=g) * 2 - 1
    truth = slow_score(toy, x, candidates, discount, reward_fn)
    objective = Objective(reward_fn=reward_fn, discount=discount)
    torch.testing.assert_close(score(toy, toy.start(x), candidates, objective, obs=x).value, truth)
    if reward_fn is None and not isinstance(toy, TinyMLP):  # the hard cases did occur
        easy = slow_score(PointMass(dim), x, candidates, discount, None)
        assert 0 < (truth == easy).sum() < truth.numel()
    monkeypatch.setattr(planners.scoring, "MAX_DREAMS", 4)  # slices that straddle the rows
    torch.testing.assert_close(score(toy, toy.start(x), candidates, objective, obs=x).value, truth)


def test_observations_are_decoded_only_for_a_reward_fn() -> None:
    asked: list[bool] = []

    class Listening(PointMass):
        def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
            asked.append(decode)
            return super().imagine(state, actions, decode=decode)

    toy, x = Listening(), POINT_STARTS
    score(toy, toy.start(x), torch.zeros(2, 3, 4, 1, 2))
    assert asked == [False] * 4
    score(toy, toy.start(x), torch.zeros(2, 3, 4, 1, 2), Objective(reward_fn=odd_reward), obs=x)
    assert asked[4:] == [True] * 4
    score(toy, toy.start(x), torch.zeros(2, 3, 4, 1, 2), Objective(value_fn=lambda o: o[:, 0]))
    assert asked[8:] == [False] * 3 + [True]


def test_score_keeps_no_graph() -> None:
    toy = TinyMLP()
    toy.w1.requires_grad_()
    assert not score(toy, toy.initial(1), torch.zeros(1, 2, 3, 1, 2)).value.requires_grad


SOME = torch.zeros(2, 3, 4, 1, 2)


@pytest.mark.parametrize(
    "candidates, objective, obs, message",
    [
        (torch.zeros(2, 3, 4, 2), {}, None, r"\[B,N,H,K,A\] with B=2"),
        (torch.zeros(3, 3, 4, 1, 2), {}, None, "B=2"),
        (torch.zeros(2, 3, 4, 1, 3), {}, None, "A=2"),
        (torch.zeros(2, 3, 4, 9, 2), {}, None, "K=9"),
        (SOME, {"reward_fn": odd_reward}, None, "pass the present observations"),
        (SOME, {"reward_fn": odd_reward}, torch.zeros(2, 5), r"obs \[2, 2\]"),
        (SOME, {"goal": torch.zeros(2)}, None, "pass the present observations"),
        (SOME, {"goal": torch.zeros(3, 2)}, torch.zeros(2, 2), r"goal must be \[2\] or \[2, 2\], got \[3, 2\]"),
        (SOME, {"reward_fn": lambda o, a, n: n}, torch.zeros(2, 2), "reward_fn must drop"),
        (SOME, {"cost_fn": lambda o, a, n: n, "cost_limit": 0.0}, torch.zeros(2, 2), "cost_fn must drop"),
        (SOME, {"value_fn": lambda o: o}, None, "value_fn must drop"),
        (SOME, {"value_fn": lambda o: 0.0}, None, "got float"),
        (SOME, {"goal": torch.zeros(2), "goal_weight": torch.ones(2, 2)}, torch.zeros(2, 2), "goal_weight must be"),
    ],
)
def test_score_names_what_does_not_fit(candidates: Tensor, objective: dict, obs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(PointMass(), PointMass().start(POINT_STARTS), candidates, Objective(**objective), obs=obs)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"discount": 0.0}, "discount must be in"),
        ({"goal": torch.zeros(2), "reward_fn": odd_reward}, "not both"),
        ({"goal_weight": torch.ones(2)}, "pass goal too"),
        ({"penalty": -1.0}, "penalty must be finite"),
        ({"penalty": 1.0}, "need a cost_fn"),
        ({"goal": torch.tensor([0.0, torch.nan])}, "goal must be a tensor of finite numbers"),
        ({"goal": torch.zeros(2), "goal_weight": torch.tensor([-1.0, 0.0])}, "goal_weight must be at least 0"),
        ({"cost_fn": odd_reward, "cost_limit": math.nan}, "cost_limit must be finite"),
        ({"cost_limit": 1.0}, "need a cost_fn"),
        ({"cost_fn": odd_reward}, "a cost_fn needs"),
    ],
)
def test_objectives_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


def first(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """A cost: how far dimension 0 is above 0."""
    return next_obs[..., 0].clamp(min=0)


def test_what_a_critic_a_goal_and_a_cost_add_up_to() -> None:
    """By hand, on a point that is told where to go: dt 0.1, 2 chunks of 2 steps, a wall in the way of one row."""
    toy, x = PointMass(1, wall=0.45), torch.tensor([[0.2], [0.0]])
    state, up = toy.start(x), torch.ones(2, 1, 2, 2, 1)  # 0.3, 0.4, 0.5 (the wall) and 0.1, 0.2, 0.3, 0.4

    def value(**objective: Any) -> list[float]:
        return score(toy, state, up, Objective(**objective), obs=x).value[:, 0].tolist()

    assert value() == pytest.approx([-1.2, -1.0])
    # The value of what lies beyond the horizon, but not beyond the end of an episode.
    assert value(value_fn=lambda o: 10 * o[:, 0], discount=0.5) == pytest.approx(
        [-0.3 - 0.4 / 2 - 0.5 / 4, -0.1 - 0.2 / 2 - 0.3 / 4 - 0.4 / 8 + 4 / 16]
    )
    assert value(goal=torch.tensor([0.5])) == pytest.approx([-0.2 - 0.1, -0.4 - 0.3 - 0.2 - 0.1])
    each = torch.tensor([[0.5], [0.0]])  # each row its own
    assert value(goal=each, goal_weight=torch.tensor([4.0])) == pytest.approx([-0.6, -2.0])
    assert value(cost_fn=first, penalty=2.0) == pytest.approx([-3.6, -3.0])
    assert value(goal=torch.tensor([0.5]), value_fn=lambda o: o[:, 0]) == pytest.approx([-0.3, -1.0 + 0.4])
    limited = score(toy, state, up, Objective(cost_fn=first, cost_limit=1.1, discount=0.5), obs=x)  # costs aren't
    assert limited.value[:, 0].tolist() == pytest.approx([-0.3 - 0.4 / 2 - 0.5 / 4, -0.1 - 0.2 / 2 - 0.3 / 4 - 0.4 / 8])
    assert limited.violation is not None and limited.violation[:, 0].tolist() == pytest.approx([0.1, 0.0], abs=1e-6)


def test_what_is_lost_comes_after_what_breaks_limits() -> None:
    """Of three plans one earns NaN and costs nothing, one costs NaN, one exceeds the limit: that is the best."""
    toy, x = NoGo(limit=0.5), torch.tensor([[0.0]])

    def cost(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return torch.where(action[..., 0] < -0.5, torch.nan, (action[..., 0] == 0).float())

    plans = torch.tensor([0.9, -0.9, 0.0]).view(1, 3, 1, 1, 1)
    scored = score(toy, toy.start(x), plans, Objective(cost_fn=cost, cost_limit=0.0), obs=x)
    assert scored.value.tolist() == [[-math.inf, -math.inf, 0.0]]
    assert scored.violation is not None and scored.violation.tolist() == [[math.inf, math.inf, 1.0]]
    assert scored.best(1).item() == 2


def test_futures_end_where_the_episode_does() -> None:
    toy, x = PointMass(1, wall=0.45), torch.tensor([[0.2], [0.0]])
    futures = score(toy, toy.start(x), torch.ones(2, 1, 2, 2, 1), futures=True).futures
    assert futures is not None
    torch.testing.assert_close(
        futures[:, 0, :, 0], torch.tensor([[0.3, 0.4, 0.5, torch.nan], [0.1, 0.2, 0.3, 0.4]]), equal_nan=True
    )


def test_rewards_of_any_dtype() -> None:
    toy, x = PointMass(2), POINT_STARTS
    for reward in (lambda o, a, n: n[..., 0] < 0.3, lambda o, a, n: -n.double().norm(dim=-1)):
        for planner in SMALL[:4]:
            plan = planner.plan(toy, toy.start(x), obs=x, objective=Objective(reward_fn=reward, discount=0.9))
            assert plan.value.dtype == plan.actions.dtype == torch.float32
    plan = CEM(3).plan(toy, toy.start(x), warm=Plan(torch.zeros(2, 3, 1, 2, dtype=torch.float64), torch.zeros(2)))
    assert plan.actions.dtype == torch.float32


def test_the_best_keep_the_limits_first() -> None:
    value = torch.tensor([[5.0, 1.0, 2.0, -torch.inf, 7.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    violation = torch.tensor([[0.5, 0.0, 0.0, torch.inf, 0.1], [3.0, 2.0, 2.0, 1.0, 4.0]])
    assert planners.Scores(value).best(3).tolist() == [[4, 0, 2], [4, 3, 2]]
    assert planners.Scores(value, violation).best(5).tolist() == [[2, 1, 4, 0, 3], [3, 2, 1, 0, 4]]


# --- what every planner promises -------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    planner=st.sampled_from(
        [*SMALL, CEM(horizon=3, chunk=2, candidates=32, elites=6, std=9.0)]
    ),  # almost all at the bounds
    low=st.lists(st.floats(-100, 100), min_size=1, max_size=3),
    width=st.floats(0.001, 50),
    dtype=st.sampled_from([np.float32, np.float64]),
    pull=st.floats(-100, 100),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_no_action_leaves_the_bounds(
    planner: Planner, low: list[float], width: float, dtype: Any, pull: float, seed: int
) -> None:
    lows = np.array(low, dtype)
    space = spaces.Box(lows, (lows + width).astype(dtype), dtype=dtype)

    class Guarded(ToyDynamics):
        """Pulls towards a corner of the box, and looks at every action that it is given."""

        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            played = u.detach().numpy()
            assert (played >= space.low).all() and (played <= space.high).all()
            return x, pull * u.sum(-1)

    toy = Guarded(replace(box_spec(1, len(low)), action_space=space))
    mpc = MPC(toy, planner, seed=seed % 2**31)
    for _ in range(3):
        for action in mpc.act(np.zeros(1, np.float32)):
            assert space.contains(action)
    plan = planner.plan(toy, toy.initial(2), seed=seed)
    assert all(space.contains(a) for a in plan.actions.flatten(0, 2).numpy().astype(dtype))


def test_actions_are_in_the_units_of_the_action_space() -> None:
    # Shifted and stretched bounds, one to each dimension; the best action is 30% up each of them.
    low, high = np.array([-3.0, 10.0], np.float32), np.array([-1.0, 50.0], np.float32)
    target = torch.from_numpy(low + 0.3 * (high - low))

    class Target(ToyDynamics):
        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return x, -(((u - target) / torch.tensor([2.0, 40.0])) ** 2).sum(-1)

    toy = Target(replace(box_spec(1, 2), action_space=spaces.Box(low, high)))
    for planner in (CEM(horizon=2, iterations=10), MPPI(horizon=2, iterations=10)):
        actions = planner.plan(toy, toy.initial(1)).actions
        torch.testing.assert_close(actions, target.expand_as(actions), rtol=0.01, atol=0)


@each_planner
def test_same_seed_same_plan_and_the_global_generator_is_left_alone(planner: Planner) -> None:
    toy = TinyMLP()
    state = toy.start(torch.ones(2, 3))
    before = torch.get_rng_state()
    first = planner.plan(toy, state, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = planner.plan(toy, state, seed=3), planner.plan(toy, state, seed=4)
    assert torch.equal(first.actions, again.actions) and torch.equal(first.value, again.value)
    assert not torch.equal(first.actions, other.actions)


@each_planner
def test_a_row_plans_the_same_alone_as_in_a_batch(planner: Planner) -> None:
    toy, seeds = PointMass(2), torch.tensor([5, 6, 7])
    state = toy.start([[0.5, 0.1], [-0.2, 0.4], [0.3, 0.3]])
    warm = Plan(torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(3))
    together = planner.plan(toy, state, seed=seeds, warm=warm)
    for b in range(3):
        row = torch.tensor([b])
        batch_of_one = planner.plan(
            toy, state.select(row), seed=seeds[row], warm=Plan(warm.actions[row], warm.value[row])
        )
        torch.testing.assert_close(batch_of_one.actions[0], together.actions[b])
        torch.testing.assert_close(batch_of_one.value[0], together.value[b])


@pytest.mark.parametrize("planner", SMALL[:2], ids=lambda p: type(p).__name__)
def test_a_warm_start_is_only_left_for_something_better(planner: Planner) -> None:
    toy = PointMass(1)
    state = toy.start([[0.6]])
    best = Plan(-torch.ones(1, 3, 2, 1), torch.zeros(1))  # full speed home
    plan = planner.plan(toy, state, warm=best)
    torch.testing.assert_close(plan.value, toy.optimal_return(state["x"], 6))
    assert planner.plan(toy, state).value < plan.value


def test_the_colour_of_noise() -> None:
    """Unit variance whatever the colour; the power at f is f**-exponent, so that slow noise goes further."""
    toy = PointMass(1)
    for exponent, (horizon, chunk) in itertools.product((0.0, 1.0, 2.0), ((8, 4), (11, 3), (1, 1), (1, 2))):
        search = Search(Problem(toy, toy.start([[0.0]])), (horizon, chunk))
        noise = search.coloured(20_000, exponent)[0, ..., 0].flatten(1)
        assert noise.shape == (20_000, horizon * chunk)
        torch.testing.assert_close(noise.var(0), torch.ones(horizon * chunk), rtol=0.06, atol=0)
        if horizon > 1:
            power = torch.fft.rfft(noise)[:, 1:].abs().square().mean(0)[: horizon * chunk // 2 - 1]
            expected = torch.arange(1, len(power) + 1) ** -exponent
            torch.testing.assert_close(power / power[0], expected, rtol=0.1, atol=0)


def test_icem_goes_on_with_its_elites() -> None:
    """What was good a chunk ago is a candidate again, shifted; a row that begins anew knows of none."""
    toy, planner = PointMass(2), ICEM(horizon=3, chunk=2, candidates=32, elites=10, iterations=3)
    first = planner.plan(toy, toy.start([[0.5, 0.1], [0.2, 0.2]]))
    assert first.elites is not None and first.elites.shape == (2, 3, 3, 2, 2)
    later = first.shifted(torch.zeros(2))
    assert later.elites is not None
    assert torch.equal(later.elites[:, :, :2], first.elites[:, :, 1:]) and not later.elites[:, :, 2].any()

    class Only(ToyDynamics):
        """Pays for one sequence of actions alone."""

        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return x, -(u - 0.123).abs().sum(-1)

    only = Only(box_spec(1, 1))
    known = Plan(torch.zeros(1, 2, 1, 1), torch.zeros(1), torch.full((1, 3, 2, 1, 1), 0.123))
    found = ICEM(horizon=2, candidates=10, elites=10, iterations=1).plan(only, only.initial(1), warm=known)
    assert found.value == 0 and torch.equal(found.actions, known.elites[:, 0])  # type: ignore[index]
    none = ICEM(horizon=2, candidates=10, elites=10, iterations=2, keep=0.0).plan(only, only.initial(1))
    assert none.elites is not None and none.elites.shape[1] == 0
    unknown = known._replace(elites=torch.full((1, 3, 2, 1, 1), torch.nan))
    kept = ICEM(horizon=2, candidates=10, elites=10, iterations=1).plan(
        only, only.initial(1), warm=unknown, keep_trace=True
    )
    assert kept.trace is not None and kept.trace.candidates.isfinite().all()
    for wrong in (torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 1, 2), torch.full((1, 3, 2, 1, 1), 1.5)):
        with pytest.raises(ValueError, match=r"warm\.elites must"):
            ICEM(horizon=2, candidates=10, elites=10).plan(only, only.initial(1), warm=known._replace(elites=wrong))


def test_icem_from_round_to_round() -> None:
    """Elites stay, the mean keeps a tenth of what it was, fewer are drawn, and noise has a colour."""
    toy = PointMass(1)
    planner = ICEM(horizon=20, candidates=400, elites=10, iterations=2, std=0.01, min_std=0.0)
    kept = planner.plan(toy, toy.start([[0.5]]), keep_trace=True).trace
    assert kept is not None
    one, two = kept.candidates[0, :400, :, 0, 0], kept.candidates[0, 400:, :, 0, 0]
    best = kept.scored.value[0, :400].topk(10).indices
    assert len(two) == 320 + 3 and torch.equal(two[-3:], one[best[:3]])
    torch.testing.assert_close(two[0], 0.9 * one[best].mean(0))  # the first mean was 0
    alike = (one[1:, 1:] * one[1:, :-1]).mean() / one[1:].square().mean()
    assert alike > 0.8  # white noise has 0


def test_mppi_gives_up_an_average_that_is_worse_than_what_it_averaged() -> None:
    class Hole(ToyDynamics):
        """Nothing is known between -0.25 and 0.25, where the average of what lies on both sides is."""

        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.where(u[:, 0].abs() < 0.25, torch.nan, 1 + 0 * u[:, 0])

    toy, planner = Hole(box_spec(1, 1)), MPPI(horizon=1, iterations=1)
    assert planner.plan(toy, toy.initial(1)).value == 1
    tight = PointMass(1)
    limited = Objective(cost_fn=lambda o, a, n: (a[..., 0].abs() < 0.25).float(), cost_limit=0.0)
    x = torch.zeros(1, 1)
    plan = planner.plan(tight, tight.start(x), obs=x, objective=limited)
    assert plan.violation == 0 and plan.actions.abs() >= 0.25


def test_gradients_leave_a_bound() -> None:
    """Which rounding had them pass: 0.8 is not half of a range above a middle, in float32."""

    class Target(ToyDynamics):
        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return x, -(u + 0.3).square().sum(-1)

    space = spaces.Box(np.array([-1.4], np.float32), np.array([0.8], np.float32))
    toy = Target(replace(box_spec(1, 1), action_space=space))
    warm = Plan(torch.full((1, 1, 1, 1), float(space.high[0])), torch.zeros(1))
    plan = Gradient(1, starts=1, iterations=200).plan(toy, toy.initial(1), warm=warm)
    assert plan.actions.item() == pytest.approx(-0.3, abs=0.01)


def test_gradients_need_dynamics_that_pass_them() -> None:
    class Blind(PointMass):
        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return super().step(x, u.detach())

    with pytest.raises(ValueError, match="pass no gradients"):
        Gradient(horizon=2).plan(Blind(1), PointMass(1).start([[0.5]]))
    critic = torch.nn.Linear(1, 1)  # whose own weights ask for gradients
    with pytest.raises(ValueError, match="pass no gradients"):
        Gradient(2).plan(Blind(1), PointMass(1).start([[0.5]]), objective=Objective(value_fn=lambda o: critic(o)[:, 0]))
    toy = PointMass(1)
    plan = Gradient(horizon=2).plan(toy, toy.start([[0.5]]))
    for off in (torch.no_grad(), torch.inference_mode()):  # around the planner gradients may be off
        with off:
            again = Gradient(horizon=2).plan(toy, toy.start([[0.5]]))
        assert torch.equal(plan.actions, again.actions)


def test_planners_end_the_episode_where_that_is_best() -> None:
    # Beyond the wall nothing is paid any more: one step of 0.86 or so instead of six on the way home.
    toy = PointMass(1, wall=0.85)
    for planner in (RandomShooting(horizon=6), CEM(horizon=6), MPPI(horizon=6, iterations=10)):
        plan = planner.plan(toy, toy.start([[0.8]]))
        assert plan.actions[0, 0, 0, 0] > 0.5
        assert -0.91 < plan.value < -0.85


def test_non_finite_returns_are_never_preferred() -> None:
    # The unlimited optimum lies in the middle of what earns NaN; with actions up to 0.5 six steps cost 3.75.
    toy = NoGo(limit=0.5)
    for planner in (CEM(horizon=6, iterations=10), MPPI(horizon=6, iterations=10), RandomShooting(horizon=6)):
        plan = planner.plan(toy, toy.start([[-0.8]]))
        assert plan.actions.max() <= 0.5
        assert -4.4 < plan.value < -3.7


def test_cem_finds_its_way_where_few_candidates_are_finite() -> None:
    # Only the plans that never push up are finite: 6 of 400 at first, far fewer than the 40 elites.
    toy = NoGo(limit=0.0)
    x = torch.full((10, 1), 0.8)
    value = CEM(horizon=6, iterations=5).plan(toy, toy.start(x), seed=torch.arange(10)).value
    assert value.mean() > 1.05 * toy.optimal_return(x[:1], 6)


@each_planner
def test_a_warm_start_that_alone_is_finite_is_kept(planner: Planner) -> None:
    class OnlyThis(ToyDynamics):
        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.where(u[:, 0] == 0.25, 1.0 + 0 * u[:, 0], torch.nan)

    toy, warm = OnlyThis(box_spec(1, 1)), Plan(torch.full((1, 3, 2, 1), 0.25), torch.zeros(1))
    plan = planner.plan(toy, toy.initial(1), warm=warm)
    assert torch.equal(plan.actions, warm.actions) and plan.value == 6


@each_planner
def test_where_nothing_is_finite_the_value_says_so_and_other_rows_do_not_suffer(planner: Planner) -> None:
    toy = PointMass(2)
    plan = planner.plan(toy, toy.start([[0.5, 0.1], [torch.nan, 0.0]]))
    batch_of_one = planner.plan(toy, toy.start([[0.5, 0.1]]))
    assert plan.value[1] == -torch.inf and plan.actions.isfinite().all()
    torch.testing.assert_close(plan.actions[0], batch_of_one.actions[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CEM(horizon=0), "horizon must be positive, got 0"),
        (lambda: CEM(elites=500), "elites <= candidates"),
        (lambda: CEM(elites=1), "2 <= elites"),
        (lambda: CEM(min_std=2.0), "min_std <= std"),
        (lambda: MPPI(temperature=0.0), "temperature must be positive"),
        (lambda: MPPI(std=float("nan")), "std must be positive"),
        (lambda: RandomShooting(candidates=-1), "candidates must be positive"),
        (lambda: ICEM(elites=500), "elites <= candidates"),
        (lambda: ICEM(min_std=2.0), "min_std <= std"),
        (lambda: ICEM(shrink=0.5), "shrink must be at least 1"),
        (lambda: ICEM(colour=float("nan")), "colour must be in"),
        (lambda: ICEM(keep=1.5), "keep must be in"),
        (lambda: Gradient(starts=0), "starts must be positive"),
    ],
)
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@each_planner
def test_plans_that_cannot_be_made(planner: Planner) -> None:
    toy = PointMass(2)
    with pytest.raises(ValueError, match=r"warm.actions must be \[B,H,K,A\] = \[1, 3, 2, 2\], got \[1, 4, 2, 2\]"):
        planner.plan(toy, toy.initial(1), warm=Plan(torch.zeros(1, 4, 2, 2), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"warm.actions must lie within"):
        planner.plan(toy, toy.initial(1), warm=Plan(torch.full((1, 3, 2, 2), 1.1), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"seed must be one int or int64 \[B\] with B=1"):
        planner.plan(toy, toy.initial(1), seed=torch.arange(2))
    with pytest.raises(ValueError, match="K=2; give 1 <= K <= 1"):
        planner.plan(PointMass(2, chunk=1), toy.initial(1))
    toy.spec = replace(toy.spec, action_space=spaces.Box(-np.inf, np.inf, (2,)))
    with pytest.raises(ValueError, match="bound it first"):
        planner.plan(toy, toy.initial(1))


# --- limits, repeated actions, and what a plan can tell --------------------------------------------------------------


@each_planner
def test_a_plan_keeps_its_limit_where_it_can(planner: Planner) -> None:
    """Full speed home costs 6 units of effort; half of that pays for half of the way, and six too much for none."""
    toy, x = PointMass(1), torch.tensor([[0.6], [-0.6]])

    def effort(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return action.abs().sum(-1)

    free = planner.plan(toy, toy.start(x), obs=x)
    assert free.violation is None
    limited = Objective(cost_fn=effort, cost_limit=3.0)
    plan = planner.plan(toy, toy.start(x), obs=x, objective=limited)
    assert plan.violation is not None and (plan.violation == 0).all()
    assert (plan.actions.abs().sum((1, 2, 3)) <= 3.0001).all() and (plan.value <= free.value).all()
    nothing = score(toy, toy.start(x), torch.zeros(2, 1, 3, 2, 1)).value[:, 0]
    assert (plan.value > nothing).all()
    hopeless = planner.plan(
        toy, toy.start(x), obs=x, objective=replace(limited, cost_fn=lambda o, a, n: 1 + effort(o, a, n))
    )
    assert hopeless.violation is not None and ((hopeless.violation >= 3) & (hopeless.violation < 4.5)).all()


def test_a_limit_holds_near_the_optimum() -> None:
    """With half of the effort the best is to use it all at once: 3 steps of full speed, then rest."""
    toy, x = PointMass(1), torch.tensor([[0.6]])
    limited = Objective(cost_fn=lambda o, a, n: a.abs().sum(-1), cost_limit=3.0)
    optimum = -(0.5 + 0.4 + 4 * 0.3)
    for planner in (CEM(horizon=6, iterations=20), MPPI(horizon=6, iterations=20), Gradient(horizon=6, iterations=100)):
        plan = planner.plan(toy, toy.start(x), obs=x, objective=limited)
        assert optimum - 0.06 < plan.value.item() <= optimum + 1e-5, planner


@each_planner
def test_one_action_for_a_whole_chunk(planner: Any) -> None:
    toy, x = TinyMLP(chunk=4), torch.ones(2, 3)
    steady = replace(planner, chunk=4, repeat=True)
    plan = steady.plan(toy, toy.start(x), keep_trace=True)
    assert plan.actions.shape == (2, 3, 4, 2) and (plan.actions == plan.actions[:, :, :1]).all()
    assert (plan.trace.candidates == plan.trace.candidates[..., :1, :]).all()
    again = steady.plan(toy, toy.start(x), warm=plan.shifted(torch.zeros(2)))
    assert (again.actions == again.actions[:, :, :1]).all()
    torch.testing.assert_close(score(toy, toy.start(x), plan.actions[:, None]).value[:, 0], plan.value)


@each_planner
def test_a_plan_tells_how_it_was_found(planner: Any) -> None:
    toy = PointMass(2)
    dreamed = {"CEM": 3 * 32 + 1, "MPPI": 3 * 32 + 1, "ICEM": 32 + 25 + 20 + 2 * 2, "Gradient": 6 * 6}
    assert planner.plan(toy, toy.start(POINT_STARTS)).evaluations == dreamed.get(type(planner).__name__, 32)
    state = toy.start(POINT_STARTS)
    plan, plain = planner.plan(toy, state, keep_trace=True), planner.plan(toy, state)
    assert torch.equal(plan.actions, plain.actions) and plain.trace is None
    kept, n = plan.trace, plan.evaluations
    assert n == plain.evaluations and plan.seconds > 0
    assert kept.candidates.shape == (2, n, 3, 2, 2) and kept.scored.futures.shape == (2, n, 6, 2)
    scored = score(toy, state, kept.candidates, futures=True)
    torch.testing.assert_close(kept.scored.value, scored.value)
    torch.testing.assert_close(kept.scored.futures, scored.futures)
    best = kept.scored.value.max(1).values
    assert torch.equal(plan.value, best) or isinstance(planner, MPPI)
    torch.testing.assert_close(
        kept.scored.futures[:, 0, :2], (POINT_STARTS[:, None] + 0.1 * kept.candidates[:, 0, 0].cumsum(1))
    )


# --- MPC ------------------------------------------------------------------------------------------------------------


def play(toy: ToyDynamics, x: Tensor, actions: Tensor) -> Tensor:
    """The real environment: x [B,O], actions [B,K,A] -> all that was seen, [B,K,O]."""
    obs = toy.imagine(toy.initial(len(x), torch.zeros(len(x), dtype=torch.int64)).replace(x=x), actions)[1].obs
    assert obs is not None
    return obs


def written(state: LatentState, b: int) -> list[tuple[float, float]]:
    """Row b of a diary: (action that led there or NaN, what was seen), oldest first."""
    seen = ~state["seen"][b, :, 0].isnan()
    return list(zip(state["led"][b, seen, 0].tolist(), state["seen"][b, seen, 0].tolist(), strict=True))


@pytest.mark.parametrize("chunk", [1, 3])
def test_mpc_remembers_every_frame_with_the_action_that_led_there(chunk: int) -> None:
    toy, witness = Diary(), Witness(RandomShooting(horizon=2, chunk=chunk, candidates=8))
    mpc = MPC(toy, witness, seed=5)
    inner, expected = None, [(math.nan, 2.0)]
    obs = np.array([2.0], np.float32)
    for _ in range(3):
        action = mpc.act(obs, inner_obs=inner)
        assert action.shape == ((1,) if chunk == 1 else (chunk, 1))
        np.testing.assert_equal(written(witness.calls[-1]["state"], 0), expected)
        actions = torch.from_numpy(action).view(1, chunk, 1)
        # The real frames differ from the dreamed ones, so that it shows which of them were written down.
        seen = play(toy, torch.from_numpy(obs)[None], actions)[0] + 0.01
        expected += list(zip(actions[0, :, 0].tolist(), seen[:, 0].tolist(), strict=True))
        inner, obs = seen.numpy() if chunk > 1 else None, seen[-1].numpy()
    assert witness.calls[0]["state"]["seed"].tolist() == [5]


def test_frames_that_were_not_seen_are_filled_in_with_the_prediction() -> None:
    toy, witness = Diary(), Witness(RandomShooting(horizon=2, chunk=3, candidates=8))
    mpc = MPC(toy, witness)
    actions = mpc.act(torch.tensor([2.0]))
    predicted = play(toy, torch.tensor([[2.0]]), actions[None])[0, :, 0]
    mpc.act(torch.tensor([9.0]))
    seen = [2.0, *predicted[:2].tolist(), 9.0]
    diary = written(witness.calls[-1]["state"], 0)
    assert [s for _, s in diary] == pytest.approx(seen)
    assert [a for a, _ in diary][1:] == pytest.approx(actions[:, 0].tolist())


def test_the_next_plan_starts_from_the_rest_of_the_last() -> None:
    space = spaces.Box(np.array([-1, 2], np.float32), np.array([1, 6], np.float32))
    toy = TinyMLP()
    toy.spec = replace(toy.spec, action_space=space)
    witness = Witness(RandomShooting(horizon=3, chunk=2, candidates=8))
    mpc = MPC(toy, witness)
    first = mpc.act(np.zeros(3))
    assert witness.calls[0]["warm"] is None
    np.testing.assert_array_equal(first, witness.plans[0].actions[0, 0])
    mpc.act(np.zeros(3))
    warm = witness.calls[1]["warm"].actions
    assert torch.equal(warm[:, :2], witness.plans[0].actions[:, 1:])
    assert torch.equal(warm[:, 2], torch.tensor([0.0, 4.0]).expand(1, 2, 2))  # the middle of the bounds


def test_warm_starts_help() -> None:
    toy, planner = PointMass(2), CEM(horizon=10, candidates=60, elites=6, iterations=2)

    def excess(warm: bool) -> float:
        """What 20 steps cost more than they have to."""
        mpc, x = MPC(toy, planner), POINT_STARTS.repeat(8, 1)
        mpc.reset(len(x))
        total = toy.optimal_return(x, 20).sum().item()
        for t in range(20):
            if not warm:
                mpc = MPC(toy, planner, seed=100 * t)
                mpc.reset(len(x))
            x, reward = toy.step(x, mpc.act(x))
            total -= reward.sum().item()
        return total

    assert excess(warm=True) < 0.7 * excess(warm=False)


@pytest.mark.parametrize("inner", [False, True])
@each_planner
def test_rows_with_episodes_of_their_own_act_as_they_would_alone(planner: Planner, inner: bool) -> None:
    toy, starts = Diary(), torch.tensor([[0.5], [-0.7], [0.2]])
    ends = {1: [True, False, False], 3: [False, True, True]}

    def episode(mpc: MPC, rows: list[int]) -> list[Tensor]:
        mpc.reset(len(rows))
        x, seen, played = starts[rows], None, []
        for t in range(5):
            played.append(mpc.act(x, inner_obs=seen))
            frames = play(toy, x, played[-1]) + 0.01
            x, seen = frames[:, -1], frames if inner else None
            if t in ends:
                done = torch.tensor(ends[t])[rows]
                mpc.reset_rows(done)
                x = torch.where(done[:, None], starts[rows] / 2, x)
        return played

    together = torch.stack(episode(MPC(toy, planner, seed=10), [0, 1, 2]))
    for b in range(3):
        torch.testing.assert_close(together[:, b : b + 1], torch.stack(episode(MPC(toy, planner, seed=10 + b), [b])))


def test_a_row_that_begins_anew_remembers_and_continues_nothing() -> None:
    toy, witness = Diary(), Witness(RandomShooting(horizon=2, chunk=2, candidates=64))
    mpc = MPC(toy, witness)
    mpc.reset(2)
    mpc.act(np.array([[0.9], [-0.8]]))
    mpc.reset_rows(np.array([False, True]))
    inner = np.array([[[0.3], [0.4]], [[np.nan], [np.nan]]])  # nothing was seen in row 1: its episode begins
    mpc.act(np.array([[0.4], [0.9]]), inner_obs=inner)
    state, warm = witness.calls[-1]["state"], witness.calls[-1]["warm"]
    assert [s for _, s in written(state, 0)] == pytest.approx([0.9, 0.3, 0.4])
    assert [s for _, s in written(state, 1)] == pytest.approx([0.9])
    assert warm.actions[0].any() and not warm.actions[1].any()


def test_every_row_and_decision_has_a_seed_of_its_own() -> None:
    toy, witness = PointMass(1), Witness(SMALL[1])
    mpc = MPC(toy, witness, seed=3)
    mpc.reset(2)
    for _ in range(3):
        mpc.act(np.array([[0.5], [0.1]]))
    seeds = torch.stack([call["seed"] for call in witness.calls])
    assert len(seeds.unique()) == 6
    batch_of_one = Witness(SMALL[1])
    MPC(toy, batch_of_one, seed=4).act(np.array([0.1]))
    assert batch_of_one.calls[0]["seed"].tolist() == [seeds[0, 1]]


def test_reset_begins_the_same_decisions_again() -> None:
    toy, x = TinyMLP(), np.ones(3)
    mpc = MPC(toy, SMALL[1], seed=2)
    first = [mpc.act(x) for _ in range(3)]
    mpc.reset()
    assert mpc.plan is None
    np.testing.assert_array_equal(first, [mpc.act(x) for _ in range(3)])
    assert not np.array_equal(first[0], MPC(toy, SMALL[1], seed=3).act(x))


def test_mpc_plans_from_a_given_state_and_goes_on_from_it() -> None:
    toy, witness = PointMass(2), Witness(SMALL[1])
    mpc = MPC(toy, witness)
    exact = toy.start([[0.7, -0.7]])
    mpc.act(np.zeros(2), state=exact)
    assert witness.calls[0]["state"] is exact
    assert mpc.plan is not None and (mpc.plan.actions[0, 0, 0] * torch.tensor([-1, 1]) > 0).all()
    mpc.act(np.full(2, 0.5))
    assert torch.equal(witness.calls[1]["state"]["x"], torch.full((1, 2), 0.5))
    assert witness.calls[1]["warm"] is not None


def test_mpc_passes_its_objective_on() -> None:
    def go_right(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return next_obs[..., 0] - obs[..., 0]

    mpc = MPC(PointMass(1), CEM(horizon=4, iterations=10), Objective(reward_fn=go_right))
    assert mpc.act(np.array([0.5])) == pytest.approx(1.0, abs=0.01)
    assert mpc.plan is not None and mpc.plan.value.item() == pytest.approx(0.4, abs=0.01)


def test_predict_is_what_stable_baselines_asks_of_a_policy() -> None:
    toy, planner = PointMass(2), SMALL[1]
    planner = replace(planner, chunk=1)  # type: ignore[type-var]
    mpc, twin = MPC(toy, planner, seed=1), MPC(toy, planner, seed=1)
    x = np.array([[0.5, 0.1], [0.2, -0.3]], np.float32)
    twin.reset(2)
    starts = np.ones(2, bool)
    for done in ([False, True], [True, True], [False, False]):
        actions, state = mpc.predict(x, state=None, episode_start=starts, deterministic=True)
        assert state is None
        np.testing.assert_array_equal(actions, twin.act(x))
        starts = np.array(done)
        twin.reset_rows(starts)
        x = x + 0.1 * actions
    assert mpc.predict(x[0])[0].shape == (2,)  # another number of rows begins anew
    assert mpc.predict(x[:1])[0].shape == (1, 2)
    decisions = mpc.plan
    with pytest.raises(ValueError, match="obs must have shape"):
        mpc.predict(np.zeros((2, 7)))
    assert mpc.plan is decisions  # a refused call forgets nothing


def test_mpc_solves_the_point_mass_from_numpy_with_the_action_space_dtype() -> None:
    toy, x = PointMass(2), np.array([0.6, -0.4])
    mpc = MPC(toy, CEM(horizon=8))
    for _ in range(10):
        action = mpc.act(x)
        assert isinstance(action, np.ndarray) and action.dtype == np.float32 and toy.spec.action_space.contains(action)
        x = x + 0.1 * action
    assert np.abs(x).max() < 0.05


def test_mpc_copies_what_it_is_shown() -> None:
    toy, witness = Diary(), Witness(SMALL[0])
    mpc, obs = MPC(toy, witness), np.array([0.5], np.float32)
    mpc.act(obs)
    obs[:] = 7.0  # many environments write the next observation into the same array
    assert witness.calls[0]["state"]["x"].item() == 0.5


def test_bad_evidence_is_refused_and_changes_nothing() -> None:
    toy = Diary()
    mpc, twin = MPC(toy, SMALL[0], seed=1), MPC(toy, SMALL[0], seed=1)
    ok = np.array([0.5])
    np.testing.assert_array_equal(mpc.act(ok), twin.act(ok))
    wrong: list[tuple[Any, dict, type[Exception], str]] = [
        ([0.5], {}, TypeError, "obs must be a numpy array or a tensor, got list"),
        (np.zeros(2), {}, ValueError, r"obs must have shape \[1\], got \[2\]"),
        (np.zeros((2, 1)), {}, ValueError, r"obs must have shape \[1, 1\], got \[2, 1\].*reset\(batch\)"),
        (np.array([np.nan]), {}, ValueError, "obs must be finite, got nan"),
        (np.array([1e300]), {}, ValueError, "obs must be finite, got inf"),
        (ok, {"inner_obs": np.zeros((3, 1))}, ValueError, r"inner_obs must have shape \[2, 1\], got \[3, 1\]"),
        (ok, {"inner_obs": np.array([[np.inf], [0.5]])}, ValueError, "inner_obs must be finite"),
        (ok, {"inner_obs": np.array([[0.1], [0.2]])}, ValueError, "inner_obs must end with obs.*reset_rows"),
        (ok, {"state": toy.initial(3, torch.zeros(3))}, ValueError, "state has 3 rows, but this MPC controls 1"),
        (ok, {"state": toy.initial(1, torch.zeros(1)), "inner_obs": ok}, ValueError, "inner_obs or state, not both"),
    ]
    for obs, kwargs, error, message in wrong:
        with pytest.raises(error, match=message):
            mpc.act(obs, **kwargs)
    with pytest.raises(ValueError, match=r"done must be bool \[1\]"):
        mpc.reset_rows(np.array([1]))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        mpc.reset(0)
    np.testing.assert_array_equal(mpc.act(ok), twin.act(ok))


def test_mpc_does_not_act_on_dreams_that_broke_down() -> None:
    mpc = MPC(NoGo(limit=-2.0), SMALL[1])
    with pytest.raises(FloatingPointError, match=r"rows \[0\]"):
        mpc.act(np.array([0.5]))


def test_a_proposal_is_where_the_search_begins() -> None:
    dynamics, planner = PointMass(dim=1), CEM(horizon=6, chunk=1, candidates=8, elites=2, iterations=1, std=0.01)
    obs = torch.tensor([[0.9, 0.0], [-0.4, 0.2]])[:, : dynamics.spec.observation_box.shape[0]]
    state = dynamics.observe(dynamics.initial(2, torch.arange(2)), obs[:, None])

    def policy(seen: Tensor) -> Tensor:
        return -3 * seen[:, :1]  # beyond the bounds, where it is clipped

    plan = PolicyGuided(planner, policy, proposals=2, std=0.01).plan(dynamics, state, obs=obs)
    dream, seen, actions = state, obs, []
    for _ in range(6):
        actions.append(policy(seen).clamp(-1, 1))
        dream, imagined = dynamics.imagine(dream, actions[-1][:, None])
        assert imagined.obs is not None
        seen = imagined.obs[:, 0]
    own = score(dynamics, state, torch.stack(actions, 1)[:, None, :, None])
    assert (plan.value >= own.value[:, 0]).all()
    assert (plan.actions[:, :, 0] - torch.stack(actions, 1)).abs().max() < 0.06
    with pytest.raises(ValueError, match="proposes from what it sees"):
        PolicyGuided(planner, policy).plan(dynamics, state)
    with pytest.raises(ValueError, match=r"policy must give \[R,A\] = \[6, 1\]"):
        PolicyGuided(planner, lambda seen: seen[:, 0], proposals=2).plan(dynamics, state, obs=obs)
    many = PolicyGuided(planner, policy).plan(dynamics, state, obs=obs, keep_trace=True)  # more than it dreams at once
    assert many.evaluations == 9 + 8 + 1 and (many.value >= own.value[:, 0]).all()


def test_proposals_are_noisy_in_half_ranges_and_last() -> None:
    """And a policy holds its action where the planner does."""
    toy = LQR()  # actions within +-4
    x = torch.zeros(1, 2)
    proposed = PolicyGuided(
        CEM(horizon=8, candidates=600, elites=2, iterations=1), lambda o: 0 * o[:, :1], proposals=500
    )
    plan = proposed.plan(toy, toy.start(x), obs=x, keep_trace=True)
    assert plan.trace is not None
    assert plan.trace.candidates[0, 100:600].std().item() == pytest.approx(0.1 * 4, rel=0.05)
    best = torch.full((1, 1, 8, 1, 1), 0.5)
    warm = Plan(torch.zeros(1, 8, 1, 1), torch.zeros(1), best)
    again = proposed.plan(toy, toy.start(x), obs=x, warm=warm, keep_trace=True)
    assert again.trace is not None and (again.trace.candidates[0] == 0.5).flatten(1).all(1).any()

    class Steady(ToyDynamics):
        """Pays for what the policy says at the first of three steps, played three times."""

        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, -(u - torch.sin(3 * (x / 3).floor())).abs().sum(-1)

    steady = Steady(box_spec(1, 1))
    held = PolicyGuided(CEM(2, 3, repeat=True), torch.sin, proposals=3)
    assert held.plan(steady, steady.start([[0.0]]), obs=torch.zeros(1, 1)).value == 0


@pytest.mark.parametrize("kind", [CEM, ICEM, MPPI, RandomShooting, Gradient])
def test_a_share_of_the_candidates_is_the_policys_and_the_last_plans(kind: Any) -> None:
    """Only the policy's own way is paid for, and it is one that no noise would find."""

    class Narrow(ToyDynamics):
        def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, -(u - torch.sin(x)).abs().sum(-1)

    toy = Narrow(box_spec(1, 1))
    planner = PolicyGuided(kind(horizon=4), torch.sin, proposals=3)
    value = planner.plan(toy, toy.start([[0.0], [2.0]]), obs=torch.tensor([[0.0], [2.0]])).value
    assert (value == 0).all() or (kind is MPPI and (value > -0.2).all())  # which gives its average
    seen = planner.plan(toy, toy.start([[0.0]]), obs=torch.zeros(1, 1), keep_trace=True)
    assert seen.trace is not None and seen.trace.scored.value.max() == 0  # MPPI dreamed it too
    lost = replace(planner, policy=lambda seen: torch.full_like(seen, torch.nan))  # the last plan is still there
    before = Plan(torch.sin(torch.arange(4.0)).view(1, 4, 1, 1), torch.zeros(1))
    plan = lost.plan(toy, toy.start([[0.0]]), obs=torch.zeros(1, 1), warm=before)
    assert plan.value == 0 or kind is MPPI
    together = MPC(toy, planner, seed=3)
    together.reset(2)
    played = [together.act(np.array([[0.1], [0.7]]))]
    together.reset_rows(np.array([False, True]))
    played.append(together.act(np.array([[1.1], [0.2]])))
    batch_of_one = MPC(toy, planner, seed=4)
    np.testing.assert_allclose(batch_of_one.act(np.array([0.7])), played[0][1], atol=1e-5)
    batch_of_one.reset_rows(np.array([True]))
    np.testing.assert_allclose(batch_of_one.act(np.array([0.2])), played[1][1], atol=1e-5)


# --- caution ----------------------------------------------------------------------------------------------------------


class Wary(PointMass):
    """A point mass that is paid for going right, and whose trust ends at 0.5: beyond, each step adds a doubt of 1."""

    class trust:
        @staticmethod
        def initial(seen: Tensor) -> Tensor:
            return torch.where(seen > 1, 0.0, 0.25)

        @staticmethod
        def propagate(doubt: Tensor, before: Tensor, actions: Tensor) -> Tensor:
            return doubt[:, None] + (before[..., 0] > 0.5).float().cumsum(1)

        @staticmethod
        def distance(before: Tensor, actions: Tensor) -> Tensor:
            return (before[..., 0] - 0.5).clamp_min(0)

    def step(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = super().step(x, u)
        return x, x[:, 0]


def test_doubt_is_paid_for_along_the_path_and_forgotten_when_something_is_seen() -> None:
    toy = Wary(1)
    wary = Pessimistic(toy, penalty=2.0, by="uncertainty")
    state = wary.observe(wary.initial(2), torch.tensor([[[0.4]], [[0.6]]]))
    actions = torch.zeros(2, 2, 1)
    (plain, _), (after, seen) = (toy.imagine(toy.start([[0.4], [0.6]]), actions), wary.imagine(state, actions))
    expected = toy.imagine(toy.start([[0.4], [0.6]]), actions)[1].reward - 2 * torch.tensor(
        [[0.25, 0.25], [1.25, 2.25]]
    )
    torch.testing.assert_close(seen.reward, expected)
    assert torch.equal(after["x"], plain["x"]) and wary.imagine(state, actions, decode=False)[1].obs is None
    _, later = wary.imagine(after, actions)  # the doubt goes on from chunk to chunk
    torch.testing.assert_close(later.reward[1], 0.6 - 2 * torch.tensor([3.25, 4.25]))
    # An objective knows nothing of doubt, which costs as much.
    paid = Objective(reward_fn=lambda o, a, n: n[..., 0])
    earned = score(wary, state, actions[:, None, None], paid, obs=torch.tensor([[0.4], [0.6]])).value
    torch.testing.assert_close(earned, expected.sum(1, keepdim=True))
    again = wary.observe(after, torch.tensor([[[0.4]], [[0.4]]]), actions[:, :1])
    torch.testing.assert_close(wary.imagine(again, actions)[1].reward, torch.full((2, 2), 0.4))
    came = wary.observe(wary.initial(1), torch.tensor([[[0.6], [0.4]]]), torch.zeros(1, 2, 1))  # it ends at the last
    torch.testing.assert_close(wary.imagine(came, actions[:1])[1].reward, torch.full((1, 2), 0.4))


def test_a_penalty_by_distance_asks_each_step_alone() -> None:
    toy, actions = Wary(1), torch.zeros(1, 2, 1)
    wary = Pessimistic(toy, penalty=2.0)
    state, _ = wary.imagine(wary.observe(wary.initial(1), torch.tensor([[[0.6]]])), actions)
    torch.testing.assert_close(wary.imagine(state, actions)[1].reward, torch.full((1, 2), 0.6 - 2 * 0.1))
    with pytest.raises(ValueError, match="'uncertainty' or 'distance'"):
        Pessimistic(toy, 1.0, by="fear")  # type: ignore[arg-type]


def test_a_penalty_counts_in_the_std_of_the_rewards_that_the_model_was_trained_on() -> None:
    toy, seen, actions = Wary(1), torch.tensor([[[0.6]]]), torch.zeros(1, 2, 1)
    costs = []
    for std in (None, 10.0):
        if std is not None:
            toy.scaling = SimpleNamespace(reward_std=torch.tensor(std))  # type: ignore[attr-defined]
        wary = Pessimistic(toy, penalty=2.0)
        costs.append(0.6 - wary.imagine(wary.observe(wary.initial(1), seen), actions)[1].reward)
    torch.testing.assert_close(costs[1], 10 * costs[0])


def test_a_cautious_plan_stays_where_the_model_knows() -> None:
    toy = Wary(1)
    for dynamics, beyond in (
        (toy, True),
        (Pessimistic(toy, 0.0), True),
        (Pessimistic(toy, 5.0, "uncertainty"), False),
        (Pessimistic(toy, 50.0), False),
    ):
        x = torch.zeros(1, 1)
        mpc = MPC(dynamics, CEM(horizon=6, candidates=64, elites=8))
        for _ in range(8):
            x, _ = toy.step(x, mpc.act(x))
        assert (x > 0.6).item() == beyond
    with pytest.raises(ValueError, match="kairos calibrate"):
        Pessimistic(PointMass(1), 1.0)
    with pytest.raises(ValueError, match="pessimistic already"):
        Pessimistic(Pessimistic(toy, 1.0), 1.0)
    with pytest.raises(ValueError, match=r"begin with Pessimistic\.initial"):
        MPC(Pessimistic(toy, 1.0), CEM()).act(torch.zeros(1, 1), state=toy.start([[0.0]]))
    with pytest.raises(ValueError, match="penalty must be at least 0"):
        Pessimistic(toy, -1.0)
