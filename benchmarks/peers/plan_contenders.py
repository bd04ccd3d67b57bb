"""Each library's CEM on the same dynamics: used by plans.py."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from mbrl.env.termination_fns import no_termination
from mbrl.models import ModelEnv
from mbrl.planning import create_trajectory_optim_agent_for_model
from network import NetDynamics, NetEnv, NetModel
from omegaconf import OmegaConf
from plan_tasks import real_returns
from simulusion.controller.rssm_policy import RSSMPolicy
from tensordict import TensorDict
from torch import Tensor
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
        """The returns of its own rollout: obs [O], actions [N,H,A] -> returns [N]."""
        raise NotImplementedError

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        """obs [O] -> actions [H,A], or the first of them alone [1,A]."""
        raise NotImplementedError

    def start(self, seed: int) -> None:
        """Start an episode."""
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
        return real_returns(self.net, obs, actions)

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        mean, std = torch.zeros(self.shape[1:]), torch.full(self.shape[1:], STD)
        for _ in range(self.budget.iterations):
            samples = (mean + std * torch.randn(self.shape)).clamp(-1, 1)
            elites = samples[real_returns(self.net, obs, samples).topk(self.budget.elites).indices]
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

    def start(self, seed: int) -> None:
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
        self.start(seed)
        return torch.from_numpy(self.agent.plan(obs.numpy()))

    def start(self, seed: int) -> None:
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
        result = self.env.rollout(
            actions.shape[1],
            lambda _: next(steps),
            auto_reset=False,
            tensordict=TensorDict({"observation": obs.expand(len(actions), -1)}, [len(actions)], device="cpu"),
        )
        return result["next", "reward"].sum((1, 2))

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return self.planner(TensorDict({"observation": obs[None]}, [1], device="cpu"))["action"]


class TorchWorldModel(WorldModel):
    """The network as torch-world takes it: a latent [...,O+1] is an observation and the reward that came with it."""

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
    """The network as stable-worldmodel's solvers take it."""

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
        self.model = self.wrap(net)
        self.solver = CEMSolver(
            self.model, num_samples=budget.candidates, var_scale=STD, n_steps=budget.iterations, topk=budget.elites
        )
        plans = PlanConfig(horizon=budget.horizon, receding_horizon=1)
        several = spaces.Box(-1.0, 1.0, (1, *net.actions.shape), np.float32)
        self.solver.configure(action_space=several, n_envs=1, config=plans)

    @staticmethod
    def wrap(net: Any) -> Any:
        return Costs(net)

    def returns(self, obs: Tensor, actions: Tensor) -> Tensor:
        return -self.model.get_cost({"observation": obs.expand(1, len(actions), -1)}, actions[None])[0]

    def solve(self, obs: Tensor, rest: Tensor | None) -> Tensor:
        with redirect_stdout(io.StringIO()):  # it prints its time
            return self.solver.solve({"observation": obs[None]}, rest)["actions"]

    def plan(self, obs: Tensor, seed: int) -> Tensor:
        self.solver.torch_gen.manual_seed(seed)
        return self.solve(obs, None)[0].clamp(-1, 1)

    def start(self, seed: int) -> None:
        self.solver.torch_gen.manual_seed(seed)
        self.rest: Tensor | None = None

    def act(self, obs: Tensor) -> Tensor:
        plan = self.solve(obs, self.rest)
        self.rest = plan[:, 1:]  # as its WorldModelPolicy does
        return plan[0, 0].clamp(-1, 1)


class ThroughCostable(StableWorldModel):
    name = "the same, through `planners.Costable`"

    @staticmethod
    def wrap(net: Any) -> Any:
        return Costable(NetDynamics(net))


class Recurrent:
    """The network as Simulusion's planner takes a recurrent one: its deterministic state is the observation."""

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
