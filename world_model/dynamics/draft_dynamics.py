"""A world model's draft as ``Dynamics``: without memory, and with gradients in an eighth of the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from world_model.contract import Imagined, Spec
from world_model.episodes import StartStates
from world_model.model.world_model import WorldModel
from world_model.state import LatentState


class DraftDynamics:
    """The draft and the reward head of ``model``, without its memory; dreams are always the mean ones.

    The state is the last two observations. It suits tasks whose observation determines the state, where the memory adds
    little. Evaluate what was trained in it in ``model`` itself, or in the real environment.

    Raises ValueError where the model has no draft.
    """

    def __init__(self, model: WorldModel):
        if model.draft is None:
            raise ValueError("this model has no draft (config.draft is False): dream with the model itself")
        self.model = model

    @property
    def spec(self) -> Spec:
        return self.model.spec

    # A dream env also uses these of its model. There is no ``trust``: that was measured with the memory.

    @property
    def starts(self) -> StartStates | None:
        return self.model.starts

    @property
    def card(self) -> dict[str, Any]:
        return self.model.card

    def fingerprint(self) -> str:
        """A digest of the weights, which also says that only the draft is used."""
        return f"{self.model.fingerprint()} drafted"

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        """See ``Dynamics.initial``; nothing is random, so seeds change nothing."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        unknown = self.model.draft_error.new_full((batch, self.model.config.obs_dim), torch.nan)
        return LatentState({"obs": unknown, "before": unknown})

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        """See ``Dynamics.observe``; actions are ignored."""
        if (
            obs.ndim != 3
            or obs.shape[0] != state.batch
            or obs.shape[2] != self.model.config.obs_dim
            or not obs.shape[1]
        ):
            raise ValueError(f"obs must be [{state.batch},T,{self.model.config.obs_dim}], got {list(obs.shape)}")
        obs = obs.to(self.model.draft_error)
        earlier = state["obs"] if obs.shape[1] == 1 else obs[:, -2]
        # A first frame is its own predecessor.
        return LatentState({"obs": obs[:, -1], "before": torch.where(earlier.isnan(), obs[:, -1], earlier)})

    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        """See ``Dynamics.imagine``."""
        model, scaling = self.model, self.model.scaling
        if actions.ndim != 3 or not 1 <= actions.shape[1] <= model.config.chunk:
            raise ValueError(
                f"actions must be [B,K,A] with K from 1 to {model.config.chunk}, got {list(actions.shape)}"
            )
        assert model.draft is not None
        start, act = scaling.obs(state["obs"]), scaling.action(actions.to(model.draft_error))
        obs_scaled, _ = model.draft.unroll(start, act, scaling.obs(state["before"]), scaling)
        before_steps = torch.cat([start[:, None], obs_scaled[:, :-1]], 1)
        predicted = model.predict_reward(before_steps, act, obs_scaled, None)
        obs = scaling.raw_obs(obs_scaled)
        reward = predicted[..., 0] * scaling.reward_std + scaling.reward_mean
        terminated = (predicted[..., 1] > 0) & model.terminates
        before = state["obs"] if obs.shape[1] == 1 else obs[:, -2]
        return LatentState({"obs": obs[:, -1], "before": before}), Imagined(obs if decode else None, reward, terminated)
