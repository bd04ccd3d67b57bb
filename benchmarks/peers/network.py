"""The network that the libraries are compared around, as each of them takes it: used by peers.py and plans.py."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from mbrl.models import Model
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import ModelBasedEnvBase

from world_model.contract import Imagined, Spec
from world_model.state import LatentState

OBS, ACT, WIDTH = 17, 6, 256
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
ACTIONS = spaces.Box(-1.0, 1.0, (ACT,), np.float32)


class Net(nn.Module):
    """The network: obs [...,O], action [...,A] -> next obs [...,O], reward [...,1]."""

    observations, actions = OBSERVATIONS, ACTIONS

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(OBS + ACT, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, OBS + 1)
        )

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        out = self.layers(torch.cat([obs, action], -1))
        return obs + out[..., :OBS], out[..., OBS:]


class NetDynamics:
    """The network behind ``world_model.contract.Dynamics``."""

    def __init__(self, net: Net):
        self.net, self.spec = net, Spec(net.observations, net.actions, chunk=1, dt=0.05)
        self.never = torch.zeros(0, 1, dtype=torch.bool)

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        return LatentState({"obs": torch.zeros(batch, *self.net.observations.shape)})

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        return LatentState({"obs": obs[:, -1]})

    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        obs, reward = self.net(state["obs"], actions.squeeze(1))
        if self.never.shape != reward.shape:
            self.never = torch.zeros_like(reward, dtype=torch.bool)
        return LatentState({"obs": obs}), Imagined(obs.unsqueeze(1) if decode else None, reward, self.never)


class NetModel(Model):
    """The network as ``mbrl.models.ModelEnv`` takes it."""

    def __init__(self, net: Net):
        super().__init__("cpu")
        self.net = net

    def reset(self, obs: NDArray[np.float32], rng: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"obs": torch.from_numpy(obs)}

    def sample(
        self,
        act: Tensor,
        model_state: dict[str, Tensor],
        deterministic: bool = False,
        rng: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, None, dict[str, Tensor]]:
        obs, reward = self.net(model_state["obs"], act)
        return obs, reward, None, {"obs": obs}

    def loss(self, model_in: Any, target: Tensor | None = None) -> Any:
        raise NotImplementedError

    def eval_score(self, model_in: Any, target: Tensor | None = None) -> Any:
        raise NotImplementedError


class NetEnv(ModelBasedEnvBase):
    """The network as a subclass of TorchRL's base class, the shorter of its two ways."""

    def __init__(self, net: Net, batch_size: Sequence[int] = ()):
        keys = ["observation", "action"], ["observation", "reward"]
        super().__init__(TensorDictModule(net, *keys), batch_size=torch.Size(batch_size))
        self.observation_spec = Composite(
            observation=Unbounded((*batch_size, *net.observations.shape)), shape=batch_size
        )
        self.action_spec = Bounded(-1.0, 1.0, (*batch_size, *net.actions.shape))
        self.reward_spec = Unbounded((*batch_size, 1))

    def _reset(self, tensordict: TensorDictBase, **kwargs: Any) -> TensorDictBase:
        return tensordict.select("observation")


def machine(packages: Sequence[str]) -> str:
    """The processor, the date and the versions of Python and ``packages``, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    named = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    cpu = named[0].partition(":")[2].strip() if named else platform.processor()
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{cpu}, one thread; {date.today()}; Python {platform.python_version()}, {versions}"
