"""The cost of an environment's step beside the network inside it: Kairos Gym, mbrl-lib and TorchRL around one MLP.

From the root of the repository:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install -r benchmarks/peers/requirements.txt
    /tmp/peers/bin/pip install --no-deps mbrl==0.2.0
    OMP_NUM_THREADS=1 PYTHONPATH=. /tmp/peers/bin/python benchmarks/peers/peers.py

All play the same actions from the same start with the same weights, in float32 on one thread, and must give the same
observations and rewards before anything is timed. No episode ends, and there is no time limit. Interfaces differ:
"numpy" takes and returns numpy arrays, "torch" tensors, TorchRL TensorDicts. Time is the CPU time of the thread; the
contenders take turns, in another order each round.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas  # noqa: F401, TensorDict looks for it in every step: a search of sys.path where it isn't loaded
import torch
from mbrl.env.termination_fns import no_termination
from mbrl.models import ModelEnv
from network import ACT, ACTIONS, OBS, OBSERVATIONS, Net, NetDynamics, NetEnv, NetModel, machine
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.model_based import WorldModelEnv
from torchrl.modules import WorldModel

from kairos_gym import DreamEnv, DreamVectorEnv


class Contender:
    """One way to step the network."""

    name: str
    takes_numpy = False  # actions, else tensors
    only_one = False  # knows no batches

    def __init__(self, net: Net, batch: int):
        raise NotImplementedError

    def reset(self, start: NDArray[np.float32]) -> None:
        """Begin at observations [B,O]."""
        raise NotImplementedError

    def play(self, actions: Sequence[Any]) -> tuple[Any, Any]:
        """Step through T actions [B,A] -> the last observations [B,O] and rewards."""
        raise NotImplementedError


class Bare(Contender):
    name = "the bare network"

    def __init__(self, net: Net, batch: int):
        self.net = net

    def reset(self, start: NDArray[np.float32]) -> None:
        self.obs = torch.from_numpy(start)

    def play(self, actions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        net, obs = self.net, self.obs
        with torch.no_grad():
            for action in actions:
                obs, reward = net(obs, action)
        self.obs = obs
        return obs, reward


# -- Kairos Gym --------------------------------------------------------------------------------------------------------


class Imagine(Contender):
    name = "Kairos Gym, `imagine`"

    def __init__(self, net: Net, batch: int):
        self.model = NetDynamics(net)

    def reset(self, start: NDArray[np.float32]) -> None:
        batch = len(start)
        self.state = self.model.observe(self.model.initial(batch), torch.from_numpy(start)[:, None])

    def play(self, actions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        model, state = self.model, self.state
        with torch.no_grad():
            for action in actions:
                state, imagined = model.imagine(state, action.unsqueeze(1))
        self.state = state
        return imagined.obs[:, 0], imagined.reward


class Vector(Contender):
    name, takes_numpy = "Kairos Gym, `DreamVectorEnv.step` (numpy)", True

    def __init__(self, net: Net, batch: int):
        self.env = DreamVectorEnv(NetDynamics(net), num_envs=batch, autoreset_mode="Disabled")

    def reset(self, start: NDArray[np.float32]) -> None:
        self.env.reset(seed=0, options={"observation": start})

    def play(self, actions: Sequence[Any]) -> tuple[Any, Any]:
        env = self.env
        for action in actions:
            obs, reward, _, _, _ = env.step(action)
        return obs, reward


class VectorTorch(Vector):
    name, takes_numpy = "Kairos Gym, `DreamVectorEnv.step_torch` (torch)", False

    def play(self, actions: Sequence[Any]) -> tuple[Any, Any]:
        env = self.env
        for action in actions:
            obs, reward, _, _, _ = env.step_torch(action)
        return obs, reward


class Single(Contender):
    name, takes_numpy, only_one = "Kairos Gym, `DreamEnv.step` (numpy)", True, True

    def __init__(self, net: Net, batch: int):
        self.env = DreamEnv(NetDynamics(net))

    def reset(self, start: NDArray[np.float32]) -> None:
        self.env.reset(seed=0, options={"observation": start[0]})

    def play(self, actions: Sequence[Any]) -> tuple[Any, Any]:
        env = self.env
        for action in actions:
            obs, reward, _, _, _ = env.step(action)
        return obs[None], reward


# -- mbrl-lib ----------------------------------------------------------------------------------------------------------


class Mbrl(Contender):
    name, takes_numpy = "mbrl-lib, `ModelEnv.step` (numpy)", True

    def __init__(self, net: Net, batch: int):
        simulator: Any = SimpleNamespace(observation_space=OBSERVATIONS, action_space=ACTIONS)  # all that is read of it
        self.env = ModelEnv(simulator, NetModel(net), no_termination)

    def reset(self, start: NDArray[np.float32]) -> None:
        self.state = self.env.reset(start, return_as_np=self.takes_numpy)

    def play(self, actions: Sequence[Any]) -> tuple[Any, Any]:
        env, state = self.env, self.state
        for action in actions:
            obs, reward, _, state = env.step(action, state)
        self.state = state
        return obs, reward


class MbrlTorch(Mbrl):
    name, takes_numpy = "mbrl-lib, `ModelEnv.step` (torch)", False


# -- TorchRL -----------------------------------------------------------------------------------------------------------


class TorchRL(Contender):
    name = "TorchRL, `ModelBasedEnvBase.step_and_maybe_reset`"

    def __init__(self, net: Net, batch: int):
        self.env: EnvBase = NetEnv(net, [batch])

    def reset(self, start: NDArray[np.float32]) -> None:
        data = TensorDict({"observation": torch.from_numpy(start)}, batch_size=[len(start)], device="cpu")
        self.now = self.env.reset(data)

    def play(self, actions: Sequence[Any]) -> tuple[Any, Any]:
        env, now = self.env, self.now
        with torch.no_grad():
            for action in actions:
                now.set("action", action)
                result, now = env.step_and_maybe_reset(now)
        self.now = now
        return now["observation"], result["next", "reward"]


class TorchRLStep(TorchRL):
    name = "TorchRL, `ModelBasedEnvBase.step`, `step_mdp`"

    def play(self, actions: Sequence[Any]) -> tuple[Any, Any]:
        env, now = self.env, self.now
        with torch.no_grad():
            for action in actions:
                now.set("action", action)
                result = env.step(now)
                now = env.step_mdp(result)
        self.now = now
        return now["observation"], result["next", "reward"]


class TorchRLWorld(TorchRL):
    name = "TorchRL, `WorldModelEnv.step_and_maybe_reset`"

    def __init__(self, net: Net, batch: int):
        keys = ["observation", "action"], [("next", "observation"), ("next", "reward")]
        nothing = TensorDictSequential()  # no encoder, and the reward comes with the dynamics
        model = WorldModel(nothing, TensorDictModule(net, *keys), nothing)
        like = NetEnv(net)
        # All that is read of it. Its plain specs would do for actions [1] only: they can't be expanded to [B,A].
        specs: Any = SimpleNamespace(
            batch_size=like.batch_size,
            device=like.device,
            observation_spec=like.observation_spec,
            action_spec=like.full_action_spec,
            reward_spec=like.full_reward_spec,
            done_spec=like.full_done_spec,
        )
        self.env = WorldModelEnv(model, specs, batch_size=[batch], latent_key="observation")


# -- measuring ---------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "numpy", "gymnasium", "mbrl", "torchrl", "tensordict")
CONTENDERS = (Bare, Imagine, Vector, VectorTorch, Single, Mbrl, MbrlTorch, TorchRL, TorchRLStep, TorchRLWorld)


class Setting:
    """All contenders with B rows, and their start and actions."""

    def __init__(self, net: Net, batch: int, steps: int):
        rng = np.random.default_rng(batch)
        self.batch, self.steps = batch, steps
        self.start = rng.standard_normal((batch, OBS), dtype=np.float32)
        self.actions = [rng.uniform(-1, 1, (batch, ACT)).astype(np.float32) for _ in range(steps)]
        self.tensors = [torch.from_numpy(action) for action in self.actions]
        self.contenders = [kind(net, batch) for kind in CONTENDERS if batch == 1 or not kind.only_one]

    def actions_for(self, contender: Contender) -> list[Any]:
        if contender.only_one:
            return [action[0] for action in self.actions]
        return self.actions if contender.takes_numpy else self.tensors

    def check(self, steps: int = 5) -> None:
        """Raises AssertionError where two contenders don't dream the same."""
        expected: Any = None
        for contender in self.contenders:
            contender.reset(self.start.copy())
            obs, reward = contender.play(self.actions_for(contender)[:steps])
            obs, reward = np.array(obs), np.array(reward).reshape(self.batch)
            expected = expected or (obs, reward)
            assert obs.shape == (self.batch, OBS) and not np.allclose(obs, self.start, atol=1e-4)
            for actual, first in zip((obs, reward), expected, strict=True):
                np.testing.assert_allclose(actual, first, rtol=1e-5, atol=1e-6, err_msg=contender.name)

    def seconds(self, contender: Contender) -> float:
        """CPU time of a step of all rows."""
        actions = self.actions_for(contender)
        contender.reset(self.start.copy())
        contender.play(actions[:5])
        start = time.thread_time()
        contender.play(actions)
        return (time.thread_time() - start) / len(actions)


def measure(settings: Sequence[Setting], rounds: int) -> dict[tuple[str, int], list[float]]:
    """(contender, B) -> the seconds of a step in each round."""
    times: dict[tuple[str, int], list[float]] = {}
    gc.disable()  # as timeit does
    for r in range(rounds):
        for setting in settings:
            turn = r % len(setting.contenders)
            for contender in setting.contenders[turn:] + setting.contenders[:turn]:
                times.setdefault((contender.name, setting.batch), []).append(setting.seconds(contender))
            gc.collect()
    gc.enable()
    return times


def table(times: dict[tuple[str, int], list[float]], batches: Sequence[int]) -> str:
    """Medians over the rounds, as Markdown."""
    lines = [
        "| env steps per CPU-second (of the bare network's; µs a call beyond it) |"
        + "".join(f" B={b} |" for b in batches),
        "| --- |" + " --- |" * len(batches),
    ]
    for name in (kind.name for kind in CONTENDERS):
        cells = []
        for b in batches:
            if (name, b) not in times:
                cells.append("")
                continue
            pairs = list(zip(times[name, b], times[Bare.name, b], strict=True))
            rate = b / median(seconds for seconds, _ in pairs)
            ratio, more = median(bare / own for own, bare in pairs), 1e6 * median(own - bare for own, bare in pairs)
            cells.append(f"{rate:,.0f} ({ratio:.2f}; {more:.0f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net().eval()
    settings = [Setting(net, batch, steps) for batch, steps in ((1, 200), (64, 80), (1024, 10))]
    for setting in settings:
        setting.check()
    times = measure(settings, rounds)
    print(table(times, [setting.batch for setting in settings]))
    print(f"\n{rounds} rounds. {machine(PACKAGES)}.")


if __name__ == "__main__":
    main()
