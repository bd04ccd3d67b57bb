"""The cost of planning beside the network inside it, and the returns of plans: six libraries' CEM on shared dynamics.

From the root of the repository:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install -r benchmarks/peers/requirements.txt -r benchmarks/peers/plans-requirements.txt
    /tmp/peers/bin/pip install --no-deps mbrl==0.2.0 torch-world==0.2.0 stable-worldmodel==0.1.1 simulusion==1.1.0 \\
        torchvision==0.28.0
    OMP_NUM_THREADS=1 PYTHONPATH=. /tmp/peers/bin/python benchmarks/peers/plans.py

All search with 400 candidates, 40 elites, 5 iterations and 15 steps, actions within +-1, in float32 on one thread, and
each library's own rollout must give the bare loop's returns of given candidates before anything is timed or scored.
Time is the CPU time of the thread; the contenders take turns, in another order each round. A plan is scored by its
return in the dynamics themselves, from 20 starts: a point mass and a double integrator, whose best possible returns
are known, planned once and as MPC, and the network, planned once. Intervals are 95%, over the starts.

Differences between them: Kairos Gym evaluates the mean with every iteration and returns the best sequence evaluated.
The others return the last mean; mbrl-lib can do both and is set up as its own PETS is, with a truncated normal and a
tenth of the last mean and variance. stable-worldmodel and Simulusion have no bounds: here their models clip their
inputs, and their plans are clipped. The first samples' standard deviation is 0.5, but 1 in Simulusion and TorchRL,
where it is fixed. Between the decisions of MPC, Kairos Gym, mbrl-lib and stable-worldmodel (as its policy does) go on
with the rest of the last plan; the others start anew. TorchRL returns a plan's first action only, so its plans can't be
scored.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from math import sqrt
from statistics import mean, median, stdev
from typing import Any

import torch
from network import Net, machine
from plan_contenders import CONTENDERS, Bare, Budget, Contender
from plan_tasks import Integrator, PointMass, real_returns
from torch import Tensor

PACKAGES = ("torch", "gymnasium", "torch-world", "stable-worldmodel", "simulusion", "mbrl", "torchrl")


def starts(net: Any, count: int) -> list[Tensor]:
    """Observations [O], uniform within +-1."""
    return list(2 * torch.rand(count, *net.observations.shape, generator=torch.Generator().manual_seed(7)) - 1)


def check(net: Any, contenders: Sequence[Contender]) -> None:
    """Raises AssertionError where a contender's returns are not the dynamics', or a plan breaks a bound."""
    obs = starts(net, 1)[0]
    actions = 2 * torch.rand(50, 15, *net.actions.shape) - 1
    for contender in contenders:
        returns, plan = contender.returns(obs, actions), contender.plan(obs, 0)
        torch.testing.assert_close(returns, real_returns(net, obs, actions), rtol=1e-5, atol=1e-5, msg=contender.name)
        assert plan.shape in ((15, *net.actions.shape), (1, *net.actions.shape)) and plan.abs().max() <= 1


def seconds(contender: Contender, observations: Sequence[Tensor]) -> float:
    """CPU time of a plan."""
    start = time.thread_time()
    for seed, obs in enumerate(observations):
        contender.plan(obs, seed)
    return (time.thread_time() - start) / len(observations)


def overheads(net: Any, budgets: Sequence[Budget], rounds: int) -> dict[tuple[str, Budget], list[float]]:
    """(contender, budget) -> the seconds of a plan in each round."""
    times: dict[tuple[str, Budget], list[float]] = {}
    contenders = {budget: [kind(net, budget) for kind in CONTENDERS] for budget in budgets}
    gc.disable()  # as timeit does
    for r in range(-1, rounds):  # the first round warms up
        for budget, several in contenders.items():
            observations = starts(net, max(1, 2000 // budget.candidates))
            turn = r % len(several)
            for contender in several[turn:] + several[:turn]:
                plan_seconds = seconds(contender, observations)
                if r >= 0:
                    times.setdefault((contender.name, budget), []).append(plan_seconds)
            gc.collect()
    gc.enable()
    return times


def plan_return(net: Any, contender: Contender, obs: Tensor, seed: int) -> float | None:
    """The return of one plan from obs [O]; None where only its first action is known."""
    plan = contender.plan(obs, seed)
    return None if len(plan) == 1 else float(real_returns(net, obs, plan[None]))


def mpc_return(net: Any, contender: Contender, obs: Tensor, seed: int, steps: int) -> float:
    """The return of so many decisions from obs [O], each planned anew."""
    contender.start(seed)
    total = 0.0
    for _ in range(steps):
        action = contender.act(obs)
        assert action.abs().max() <= 1
        next_obs, reward = net(obs[None], action[None])
        obs, total = next_obs[0], total + float(reward)
    return total


def interval(values: Sequence[float]) -> str:
    """Mean and its 95% interval (Student's, for 20 values)."""
    half = 2.093 * stdev(values) / sqrt(len(values))
    return f"{mean(values):.4f} ± {half:.4f}"


def regrets(net: Any, episodes: int, steps: int) -> dict[str, tuple[str, str]]:
    """name -> how far plans, and MPC of so many steps (0: none), are below the best possible return.

    Where that isn't known, it is the bare loop's plan from the same start and seed.
    """
    contenders = [kind(net, Budget()) for kind in CONTENDERS]
    check(net, contenders)
    table: dict[str, tuple[str, str]] = {}
    pairs = list(enumerate(starts(net, episodes)))
    best: Callable[[Tensor, int], float] | None = getattr(net, "best", None)
    if best is None:
        tops = [float(real_returns(net, obs, contenders[0].plan(obs, seed)[None])) for seed, obs in pairs]
    else:
        tops = [best(obs, Budget.horizon) for _, obs in pairs]
    for contender in contenders:
        plans = [plan_return(net, contender, obs, seed) for seed, obs in pairs]
        of_plans = [top - value for top, value in zip(tops, plans, strict=True) if value is not None]
        of_mpc = [best(obs, steps) - mpc_return(net, contender, obs, seed, steps) for seed, obs in pairs if best]
        table[contender.name] = (interval(of_plans) if of_plans else "-", interval(of_mpc) if of_mpc else "-")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30, help="decisions of an episode of MPC")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    budgets = (Budget(64, 8, 3), Budget(), Budget(2000, 200))
    with torch.no_grad():
        mlp = regrets(net, args.episodes, 0)
        point, integrator = (regrets(toy, args.episodes, args.steps) for toy in (PointMass(), Integrator()))
        times = overheads(net, budgets, args.rounds)

    print("| | " + " | ".join(f"{b.candidates} x {b.iterations} x {b.horizon}" for b in budgets), end=" | ")
    print("ms a plan | point mass: plan | MPC | integrator: plan | MPC | network: plan |")
    print("| --- |" + " --- |" * (len(budgets) + 6))
    for name in (kind.name for kind in CONTENDERS):
        cells = []
        for budget in budgets:
            ratios = sorted(a / b for a, b in zip(times[name, budget], times[Bare.name, budget], strict=True))
            quarter = len(ratios) // 4
            cells.append(f"{median(ratios):.3f} ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})")
        cells.append(f"{1000 * median(times[name, Budget()]):.1f}")
        print(f"| {name} | " + " | ".join((*cells, *point[name], *integrator[name], mlp[name][0])) + " |")
    print(
        "\nCPU time over the bare loop's with so many candidates x iterations x steps, median of "
        f"{args.rounds} rounds (quartiles); then how far below the best possible return, on the network the bare "
        f"loop's, {args.episodes} starts. {machine(PACKAGES)}."
    )


if __name__ == "__main__":
    main()
