"""``Dynamics`` whose rewards are lowered where the model is uncertain, so that plans and policies avoid it there."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from world_model.contract import Dynamics, Imagined, Spec
from world_model.state import LatentState

_OWN = ("uncertainty", "uncertainty.seen", "uncertainty.obs")


class Pessimistic:
    """A calibrated model whose reward is lowered by ``penalty`` times its uncertainty (MOPO, arXiv 2005.13239).

        MPC(Pessimistic(model, penalty=2.0), CEM())
        DreamVecEnv(Pessimistic(model, penalty=1.0), 64)

    by: the measure of uncertainty. "distance": how far a step lies from the training data. "uncertainty": that of the
        error bound (``world_model.conformal``), which accumulates along the imagined path. Both are an RMS over
        dimensions in standard deviations.
    penalty: in standard deviations of the training data's reward, so that one number suits every task; in the reward's
        unit for dynamics without a ``scaling``. It also lowers an objective's own ``reward_fn`` (``Imagined.cost``).

    It helps models of narrow data, such as a few policies' episodes, whose imagined returns exceed the real ones. With
    data of random actions, which go everywhere, it mostly lowers the return (``kairos bench pessimism``).

    Raises ValueError where the model isn't calibrated, or isn't on the CPU, where the error bound is computed.
    """

    def __init__(self, dynamics: Dynamics, penalty: float, by: Literal["uncertainty", "distance"] = "distance"):
        self.trust: Any = getattr(dynamics, "trust", None)
        if self.trust is None:
            raise ValueError("these dynamics have no error bound: calibrate the model first (kairos calibrate)")
        if isinstance(dynamics, Pessimistic):
            raise ValueError("these dynamics are pessimistic already: give the model itself a larger penalty")
        if not penalty >= 0:
            raise ValueError(f"penalty must be at least 0, got {penalty}")
        if by not in ("uncertainty", "distance"):
            raise ValueError(f"by must be 'uncertainty' or 'distance', got {by!r}")
        self.dynamics, self.penalty, self.by = dynamics, penalty, by
        scaling: Any = getattr(dynamics, "scaling", None)
        self.unit = 1.0 if scaling is None else float(scaling.reward_std)

    @property
    def spec(self) -> Spec:
        return self.dynamics.spec

    # A dream env also uses these of its model.

    @property
    def starts(self) -> Any:
        return getattr(self.dynamics, "starts", None)

    @property
    def card(self) -> Any:
        return getattr(self.dynamics, "card", None)

    def fingerprint(self) -> str:
        """A digest of the weights, with the penalty and its measure."""
        dynamics: Any = self.dynamics
        return f"{dynamics.fingerprint()} pessimistic {self.penalty:g} {self.by}"

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        """See ``Dynamics.initial``."""
        state = self.dynamics.initial(batch, seeds)
        if (device := state.device).type != "cpu":
            raise ValueError(f"the error bound is computed on the CPU, and this model dreams on {device}")
        size = self.spec.observation_box.shape[0]
        seen = torch.zeros(batch, dtype=torch.int64)
        return self._with(state, torch.zeros(batch), seen, torch.zeros(batch, size))

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        """See ``Dynamics.observe``. Real frames are certain, so the uncertainty starts anew."""
        after = self.dynamics.observe(_without(state), obs, actions)
        seen = state["uncertainty.seen"] + obs.shape[1]  # real frames
        return self._with(after, self.trust.initial(seen), seen, obs[:, -1].float())

    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        """See ``Dynamics.imagine``; rewards are lowered by the penalty, which is also the ``cost``."""
        after, imagined = self.dynamics.imagine(_without(state), actions, decode=True)
        if imagined.obs is None:
            raise ValueError("these dynamics predict no observations, so their error can't be bounded")
        path = torch.cat([state["uncertainty.obs"][:, None], imagined.obs.float()], 1)
        before, actions = path[:, :-1], actions.float()
        if self.by == "distance":
            uncertainty = self.trust.distance(before, actions)
        else:
            uncertainty = self.trust.propagate(state["uncertainty"], before, actions)
        cost = self.penalty * self.unit * uncertainty
        lowered = imagined._replace(reward=imagined.reward - cost, cost=cost)
        after = self._with(after, uncertainty[:, -1], state["uncertainty.seen"], path[:, -1])
        return after, lowered if decode else lowered._replace(obs=None)

    @staticmethod
    def _with(state: LatentState, *own: Tensor) -> LatentState:
        return state.replace(**dict(zip(_OWN, own, strict=True)))


def _without(state: LatentState) -> LatentState:
    if missing := set(_OWN) - set(state.tensors):
        raise ValueError(
            f"this state carries no uncertainty ({', '.join(sorted(missing))}): begin with Pessimistic.initial"
        )
    return LatentState({name: t for name, t in state.tensors.items() if name not in _OWN})
