"""What planning costs beside the network inside it, and what plans are worth: six libraries' CEM on shared dynamics.

From the root of the repository:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install -r benchmarks/peers/requirements.txt -r benchmarks/peers/plans-requirements.txt
    /tmp/peers/bin/pip install --no-deps mbrl==0.2.0 torch-world==0.2.0 stable-worldmodel==0.1.1 simulusion==1.1.0 \\
        torchvision==0.28.0
    OMP_NUM_THREADS=1 PYTHONPATH=. /tmp/peers/bin/python benchmarks/peers/plans.py

All search with 400 candidates, 40 elites, 5 iterations and 15 steps, actions within +-1, in float32 on one thread, and
each library's own rollout must come to the bare loop's returns of given candidates before anything is timed or scored.
Time is the CPU time of the thread; the contenders take turns, in another order each round. What a plan is worth is what
the dynamics themselves pay for it, from 20 starts: a point mass and a double integrator, whose best possible returns
are known, planned once and as MPC, and the network, planned once. Intervals are 95%, over the starts.

What they do differently. Ours dreams the mean with every iteration and returns the best sequence that it dreamed. The
others return the last mean; mbrl-lib can do both and is set up as its own PETS is, with a truncated normal and a tenth
of the last mean and variance. stable-worldmodel and Simulusion know no bounds: here their models clip what they are
given, and what they return is clipped. The first samples' standard deviation is 0.5, but 1 in Simulusion and TorchRL,
where it is fixed. Between the decisions of MPC ours, mbrl-lib and stable-worldmodel (as its policy does) go on with the
rest of the last plan, the others begin anew. TorchRL gives a plan's first action only, so that its plans can't be
scored.
"""

from __future__ import annotations

import argparse
import gc
import io
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, median, stdev
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from mbrl.env.termination_fns import no_termination
from mbrl.models import ModelEnv
from mbrl.planning import create_trajectory_optim_agent_for_model
from omegaconf import OmegaConf
from peers import Net, NetDynamics, NetEnv, NetModel, machine
from simulusion.controller.rssm_policy import RSSMPolicy
from tensordict import TensorDict
from torch import Tensor, nn
from torch_world.models.base import WorldModel
from torch_world.planning import CEM as TorchWorldCEM
from torchrl.modules import CEMPlanner

from planners import CEM, MPC, Costable

try:
    import torchvision  # noqa: F401
except RuntimeError:  # built for CUDA beside a torch that isn't: its operators are missing, which nobody here uses
    sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
from stable_worldmodel import PlanConfig
from stable_worldmodel.solver import CEMSolver

STD = 0.5  # of the first samples, where it can be chosen

# -- dynamics ----------------------------------------------------------------------------------------------------------


class PointMass(nn.Module):
    """x' = x + u / 10, reward -|x'|_1: full speed home, then rest. obs [B,2], action [B,2]."""

    observations = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    actions = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        obs = obs + 0.1 * action
        return obs, -obs.abs().sum(-1, keepdim=True)

    def best(self, obs: Tensor, steps: int) -> float:
        """The best possible return of so many steps from obs [2]."""
        gone = 0.1 * torch.arange(1, steps + 1)
        return -float((obs.abs()[:, None] - gone).clamp(min=0).sum())


class Integrator(nn.Module):
    """Position and velocity, pushed by 4 u for 0.2 s, with quadratic costs. obs [B,2], action [B,1].

    From |obs| <= 1 the best actions are the linear regulator's, within the bounds.
    """

    observations = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    actions = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.tensor([[1.0, 0.2], [0.0, 1.0]]), torch.tensor([[0.08], [0.8]])
        self.q, self.r = torch.tensor([1.0, 0.1]), torch.tensor([0.8])

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        obs = obs @ self.a.T + action @ self.b.T
        return obs, -(self.q * obs**2).sum(-1, keepdim=True) - self.r * action**2

    def best(self, obs: Tensor, steps: int) -> float:
        """The best possible return of so many steps from obs [2]."""
        a, b, q, r, x = (m.double() for m in (self.a, self.b, self.q.diag(), self.r.diag(), obs))
        p = torch.zeros_like(q)
        for _ in range(steps):
            m = q + p
            p = a.T @ (m - m @ b @ torch.linalg.solve(r + b.T @ m @ b, b.T @ m)) @ a
        return -float(x @ p @ x)


def earned(net: Any, obs: Tensor, actions: Tensor) -> Tensor:
    """What the dynamics pay: obs [O], actions [N,H,A] -> returns [N]."""
    obs, total = obs.expand(len(actions), -1), torch.zeros(len(actions), 1)
    for action in actions.unbind(1):
        obs, reward = net(obs, action)
        total = total + reward
    return total[:, 0]


# -- contenders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    candidates: int = 400
    elites: int = 40
    iterations: int = 5
    horizon: int = 15


class Contender:
    """One library's CEM on the dynamics ``net``."""

    name: str

    def __init__(self, net: Any, budget: Budget):
        raise NotImplementedError

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        """What its own rollout says: obs [O], actions [N,H,A] -> returns [N]."""
        raise NotImplementedError

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        """obs [O] -> actions [H,A], or the first of them alone [1,A]."""
        raise NotImplementedError

    def begin(self, seed: int) -> None:
        """An episode begins."""
        self.seed = 1000 * seed

    def act(self, obs: Tensor) -> Tensor:
        """obs [O] -> the action to play [A]."""
        self.seed += 1
        return self.plan(obs, self.seed)[0]


class Bare(Contender):
    name = "a bare torch loop"

    def __init__(self, net: Any, budget: Budget):
        self.net, self.budget = net, budget
        self.shape = (budget.candidates, budget.horizon, *net.actions.shape)

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        return earned(self.net, obs, actions)

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        mean, std = torch.zeros(self.shape[1:]), torch.full(self.shape[1:], STD)
        for _ in range(self.budget.iterations):
            samples = (mean + std * torch.randn(self.shape)).clamp(-1, 1)
            elites = samples[earned(self.net, obs, samples).topk(self.budget.elites).indices]
            mean, std = elites.mean(0), elites.std(0)
        return mean


class Again(Bare):
    name = "the same again"


class Ours(Contender):
    name = "**Kairos Gym**"

    def __init__(self, net: Any, budget: Budget):
        self.dynamics = NetDynamics(net)
        self.planner = CEM(
            horizon=budget.horizon, candidates=budget.candidates, elites=budget.elites, iterations=budget.iterations
        )

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        state = self.dynamics.observe(self.dynamics.initial(1), obs[None, None])
        return self.planner.plan(self.dynamics, state, seed=seed).actions[0, :, 0]

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        costs = Costable(self.dynamics).get_cost({"observation": obs[None, None]}, actions[None])
        return -costs[0]

    def begin(self, seed: int) -> None:
        self.mpc = MPC(self.dynamics, self.planner, seed=seed)

    def act(self, obs: Tensor) -> Tensor:
        return self.mpc.act(obs[None])[0]


class Wide(Ours):
    name = "the same, `std=1.0`"

    def __init__(self, net: Any, budget: Budget):
        super().__init__(net, budget)
        self.planner = replace(self.planner, std=1.0)


class Mbrl(Contender):
    name = "mbrl-lib, `TrajectoryOptimizerAgent`"

    def __init__(self, net: Any, budget: Budget):
        simulator: Any = SimpleNamespace(observation_space=net.observations, action_space=net.actions)
        self.env = ModelEnv(simulator, NetModel(net), no_termination)
        optimizer = {  # as its PETS is configured
            "_target_": "mbrl.planning.CEMOptimizer",
            "num_iterations": budget.iterations,
            "elite_ratio": budget.elites / budget.candidates,
            "population_size": budget.candidates,
            "lower_bound": "???",
            "upper_bound": "???",
            "alpha": 0.1,
            "device": "cpu",
            "return_mean_elites": True,
            "clipped_normal": False,
        }
        agent = {
            "_target_": "mbrl.planning.TrajectoryOptimizerAgent",
            "_recursive_": False,
            "optimizer_cfg": optimizer,
            "action_lb": "???",
            "action_ub": "???",
            "planning_horizon": budget.horizon,
        }
        self.agent = create_trajectory_optim_agent_for_model(self.env, OmegaConf.create(agent))

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.env.evaluate_action_sequences(actions, obs.numpy(), 1)

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        self.begin(seed)
        return torch.from_numpy(self.agent.plan(obs.numpy()))

    def begin(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.agent.reset()

    def act(self, obs: Tensor) -> Tensor:
        return torch.from_numpy(self.agent.act(obs.numpy()))


class TorchRL(Contender):
    name = "TorchRL, `CEMPlanner`"

    def __init__(self, net: Any, budget: Budget):
        self.env = NetEnv(net)
        self.planner = CEMPlanner(self.env, budget.horizon, budget.iterations, budget.candidates, budget.elites)

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        steps = iter(actions.unbind(1))
        went = self.env.rollout(
            actions.shape[1],
            lambda _: next(steps),
            auto_reset=False,
            tensordict=TensorDict({"observation": obs.expand(len(actions), -1)}, [len(actions)], device="cpu"),
        )
        return went["next", "reward"].sum((1, 2))

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return self.planner(TensorDict({"observation": obs[None]}, [1], device="cpu"))["action"]


class TorchWorldModel(WorldModel):
    """The network as torch-world asks for it: a latent [...,O+1] is an observation and the reward that came with it."""

    history = 1

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def encode(self, obs: Tensor) -> Tensor:
        return torch.cat([obs, torch.zeros(1)])

    def predict(self, z: Tensor, actions: Tensor) -> Tensor:
        return torch.cat(self.net(z[:, 0, :-1], actions[:, 0]), -1)[:, None]

    def cost(self, z: Tensor, goal: Tensor) -> Tensor:
        return -z[:, :, -1].sum(1)


class TorchWorld(Contender):
    name = "torch-world, `CEM`"

    def __init__(self, net: Any, budget: Budget):
        self.model = TorchWorldModel(net)
        self.planner = TorchWorldCEM(
            budget.horizon, *net.actions.shape, budget.candidates, budget.elites, budget.iterations, STD, (-1.0, 1.0)
        )

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        z = self.model.encode(obs).expand(len(actions), 1, -1)
        return -self.model.cost(self.model.rollout(z, actions), z[:, 0])

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        z = self.model.encode(obs)[None, None]
        return self.planner(self.model, z, z[:, 0], generator=torch.Generator().manual_seed(seed))[0]


class Costs:
    """The network as stable-worldmodel's solvers ask for it."""

    def __init__(self, net: Any):
        self.net = net

    def get_cost(self, info_dict: dict[str, Tensor], action_candidates: Tensor) -> Tensor:
        obs, actions = info_dict["observation"].flatten(0, 1), action_candidates.flatten(0, 1).clamp(-1, 1)
        total: Any = 0
        for action in actions.unbind(1):
            obs, reward = self.net(obs, action)
            total = total + reward
        return -total.view(action_candidates.shape[:2])


class StableWorldModel(Contender):
    name = "stable-worldmodel, `CEMSolver`"

    def __init__(self, net: Any, budget: Budget):
        self.model = self.wrapped(net)
        self.solver = CEMSolver(
            self.model, num_samples=budget.candidates, var_scale=STD, n_steps=budget.iterations, topk=budget.elites
        )
        plans = PlanConfig(horizon=budget.horizon, receding_horizon=1)
        several = spaces.Box(-1.0, 1.0, (1, *net.actions.shape), np.float32)
        self.solver.configure(action_space=several, n_envs=1, config=plans)

    @staticmethod
    def wrapped(net: Any) -> Any:
        return Costs(net)

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        return -self.model.get_cost({"observation": obs.expand(1, len(actions), -1)}, actions[None])[0]

    def solve(self, obs: Tensor, rest: Tensor | None) -> Tensor:
        with redirect_stdout(io.StringIO()):  # it prints its time
            return self.solver.solve({"observation": obs[None]}, rest)["actions"]

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        self.solver.torch_gen.manual_seed(seed)
        return self.solve(obs, None)[0].clamp(-1, 1)

    def begin(self, seed: int) -> None:
        self.solver.torch_gen.manual_seed(seed)
        self.rest: Tensor | None = None

    def act(self, obs: Tensor) -> Tensor:
        plan = self.solve(obs, self.rest)
        self.rest = plan[:, 1:]  # as its WorldModelPolicy does
        return plan[0, 0].clamp(-1, 1)


class ThroughCostable(StableWorldModel):
    name = "the same, through `planners.Costable`"

    @staticmethod
    def wrapped(net: Any) -> Any:
        return Costable(NetDynamics(net))


class Recurrent:
    """The network as Simulusion's planner asks for a recurrent one: its deterministic state is the observation."""

    latent_size = 0

    def __init__(self, net: Any):
        self.net = net
        (self.state_size,), (self.action_size,) = net.observations.shape, net.actions.shape

    def encoder(self, obs: Tensor) -> Tensor:
        return obs[0, 0]

    def get_init_state(self, embed: Tensor, h: Tensor, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return embed, s

    def deterministic_state_fwd(self, h: Tensor, s: Tensor, a: Tensor) -> Tensor:
        h, self.reward = self.net(h, a.clamp(-1, 1))
        return h

    def state_prior(self, h: Tensor, sample: bool) -> Tensor:
        return h[:, :0]

    def pred_reward(self, h: Tensor, s: Tensor) -> Tensor:
        return self.reward


class Simulusion(Contender):
    name = "Simulusion, `RSSMPolicy`"

    def __init__(self, net: Any, budget: Budget):
        self.policy = RSSMPolicy(
            Recurrent(net), budget.horizon, budget.candidates, budget.iterations, budget.elites, "cpu"
        )

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        h, total = obs.expand(len(actions), -1), torch.zeros(len(actions))
        for action in actions.unbind(1):
            h, _, reward = self.policy._rollout_step(h, h[:, :0], action)
            total += reward
        return total

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        self.policy.reset()
        self.policy.poll(obs[None, None])
        return self.policy.mu.clone().clamp(-1, 1)


CONTENDERS = (Bare, Again, Ours, Wide, TorchWorld, StableWorldModel, ThroughCostable, Simulusion, Mbrl, TorchRL)
PACKAGES = ("torch", "gymnasium", "torch-world", "stable-worldmodel", "simulusion", "mbrl", "torchrl")

# -- measuring ---------------------------------------------------------------------------------------------------------


def starts(net: Any, count: int) -> list[Tensor]:
    """Observations [O], uniform within +-1."""
    return list(2 * torch.rand(count, *net.observations.shape, generator=torch.Generator().manual_seed(7)) - 1)


def check(net: Any, contenders: Sequence[Contender]) -> None:
    """Raises AssertionError where a contender's rollout doesn't pay what the dynamics do, or a plan breaks a bound."""
    obs = starts(net, 1)[0]
    actions = 2 * torch.rand(50, 15, *net.actions.shape) - 1
    for contender in contenders:
        told, plan = contender.returns(obs, actions), contender.plan(obs, 0)
        torch.testing.assert_close(told, earned(net, obs, actions), rtol=1e-5, atol=1e-5, msg=contender.name)
        assert plan.shape in ((15, *net.actions.shape), (1, *net.actions.shape)) and plan.abs().max() <= 1


def seconds(contender: Contender, observations: Sequence[Tensor]) -> float:
    """CPU time of a plan."""
    begun = time.thread_time()
    for seed, obs in enumerate(observations):
        contender.plan(obs, seed)
    return (time.thread_time() - begun) / len(observations)


def overheads(net: Any, budgets: Sequence[Budget], rounds: int) -> dict[tuple[str, Budget], list[float]]:
    """(contender, budget) -> the seconds of a plan in each round."""
    took: dict[tuple[str, Budget], list[float]] = {}
    contenders = {budget: [kind(net, budget) for kind in CONTENDERS] for budget in budgets}
    gc.disable()  # as timeit does
    for r in range(-1, rounds):  # the first round warms up
        for budget, several in contenders.items():
            observations = starts(net, max(1, 2000 // budget.candidates))
            turn = r % len(several)
            for contender in several[turn:] + several[:turn]:
                spent = seconds(contender, observations)
                if r >= 0:
                    took.setdefault((contender.name, budget), []).append(spent)
            gc.collect()
    gc.enable()
    return took


def planned(net: Any, contender: Contender, obs: Tensor, seed: int) -> float | None:
    """What one plan earns from obs [O]."""
    plan = contender.plan(obs, seed)
    return None if len(plan) == 1 else float(earned(net, obs, plan[None]))


def controlled(net: Any, contender: Contender, obs: Tensor, seed: int, steps: int) -> float:
    """What so many decisions earn from obs [O], each planned anew."""
    contender.begin(seed)
    total = 0.0
    for _ in range(steps):
        action = contender.act(obs)
        assert action.abs().max() <= 1
        after, reward = net(obs[None], action[None])
        obs, total = after[0], total + float(reward)
    return total


def interval(values: Sequence[float]) -> str:
    """Mean and its 95% interval (Student's, for 20 values)."""
    half = 2.093 * stdev(values) / sqrt(len(values))
    return f"{mean(values):.4f} ± {half:.4f}"


def worth(net: Any, episodes: int, steps: int) -> dict[str, tuple[str, str]]:
    """name -> how far plans, and MPC of so many steps (0: none), stay below the best possible return.

    Where that isn't known, the bare loop's plan from the same start and seed stands in for it.
    """
    contenders = [kind(net, Budget()) for kind in CONTENDERS]
    check(net, contenders)
    found: dict[str, tuple[str, str]] = {}
    pairs = list(enumerate(starts(net, episodes)))
    best: Callable[[Tensor, int], float] | None = getattr(net, "best", None)
    if best is None:
        tops = [float(earned(net, obs, contenders[0].plan(obs, seed)[None])) for seed, obs in pairs]
    else:
        tops = [best(obs, Budget.horizon) for _, obs in pairs]
    for contender in contenders:
        plans = [planned(net, contender, obs, seed) for seed, obs in pairs]
        lost = [top - got for top, got in zip(tops, plans, strict=True) if got is not None]
        played = [best(obs, steps) - controlled(net, contender, obs, seed, steps) for seed, obs in pairs if best]
        found[contender.name] = (interval(lost) if lost else "-", interval(played) if played else "-")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30, help="decisions of an episode of MPC")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    budgets = (Budget(64, 8, 3), Budget(), Budget(2000, 200))
    with torch.no_grad():
        mlp = worth(net, given.episodes, 0)
        point, integrator = (worth(toy, given.episodes, given.steps) for toy in (PointMass(), Integrator()))
        took = overheads(net, budgets, given.rounds)

    print("| | " + " | ".join(f"{b.candidates} x {b.iterations} x {b.horizon}" for b in budgets), end=" | ")
    print("ms a plan | point mass: plan | MPC | integrator: plan | MPC | network: plan |")
    print("| --- |" + " --- |" * (len(budgets) + 6))
    for name in (kind.name for kind in CONTENDERS):
        cells = []
        for budget in budgets:
            ratios = sorted(a / b for a, b in zip(took[name, budget], took[Bare.name, budget], strict=True))
            quarter = len(ratios) // 4
            cells.append(f"{median(ratios):.3f} ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})")
        cells.append(f"{1000 * median(took[name, Budget()]):.1f}")
        print(f"| {name} | " + " | ".join((*cells, *point[name], *integrator[name], mlp[name][0])) + " |")
    print(
        "\nCPU time over the bare loop's with so many candidates x iterations x steps, median of "
        f"{given.rounds} rounds (quartiles); then how far below the best possible return, on the network the bare "
        f"loop's, {given.episodes} starts. {machine(PACKAGES)}."
    )


if __name__ == "__main__":
    main()
