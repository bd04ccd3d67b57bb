"""Dynamics in which doubt costs: a plan that leads where the model knows little earns less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from world_model.contract import Dynamics, Imagined, Spec
from world_model.state import LatentState

_OWN = ("doubt", "doubt.seen", "doubt.from")


class Cautious:
    """A calibrated model whose rewards are lowered by its doubt, as MOPO's are (arXiv 2005.13239).

    The doubt is that of ``world_model.trust``: it grows along each imagined path, faster where the model was trained on
    nothing similar, and its unit is that of the model's error, the RMS over dimensions in standard deviations. Each
    step costs ``penalty`` times the doubt after it. All planners plan in it as in any ``Dynamics``:

        MPC(Cautious(model, penalty=2.0), CEM())

    Raises ValueError where the model isn't calibrated.
    """

    def __init__(self, dynamics: Dynamics, penalty: float):
        self.trust: Any = getattr(dynamics, "trust", None)
        if self.trust is None:
            raise ValueError("these dynamics know nothing of their error: kairos calibrate gives a model its trust")
        if not penalty >= 0:
            raise ValueError(f"penalty must be at least 0, got {penalty}")
        self.dynamics, self.penalty = dynamics, penalty

    @property
    def spec(self) -> Spec:
        return self.dynamics.spec

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        """See ``Dynamics.initial``."""
        state = self.dynamics.initial(batch, seeds)
        device = next(iter(state.tensors.values())).device
        size = self.spec.observation_box.shape[0]
        return self._with(
            state,
            torch.zeros(batch, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, size, device=device),
        )

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        """See ``Dynamics.observe``. What was seen is certain: the doubt begins anew."""
        after, seen = self.dynamics.observe(_without(state), obs, actions), state["doubt.seen"] + obs.shape[1]
        return self._with(after, self.trust.begin(seen), seen, obs[:, -1])

    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        """See ``Dynamics.imagine``; rewards are lowered by the doubt after each step."""
        after, imagined = self.dynamics.imagine(_without(state), actions, decode=True)
        if imagined.obs is None:
            raise ValueError("these dynamics predict no observations, so nothing can be told of their error")
        before = torch.cat([state["doubt.from"][:, None], imagined.obs[:, :-1]], 1)
        doubt = self.trust.follow(state["doubt"], before, actions)
        lowered = imagined._replace(reward=imagined.reward - self.penalty * doubt)
        after = self._with(after, doubt[:, -1], state["doubt.seen"], imagined.obs[:, -1])
        return after, lowered if decode else lowered._replace(obs=None)

    @staticmethod
    def _with(state: LatentState, *own: Tensor) -> LatentState:
        return state.replace(**dict(zip(_OWN, own, strict=True)))


def _without(state: LatentState) -> LatentState:
    return LatentState({name: t for name, t in state.tensors.items() if name not in _OWN})
