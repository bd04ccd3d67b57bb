"""Windows: stretches of recorded episodes in which a dream is compared with what was recorded, open loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from world_model.contract import Dynamics, ExactDynamics, Imagined
from world_model.episodes import Episodes

CONTEXT = 16  # real frames that a model sees before its dream is scored


class Recorded(NamedTuple):
    """What the simulator did in the h steps of W windows."""

    obs: Tensor  # [W,h,O]
    action: Tensor  # [W,h,A] the actions that led to these observations
    reward: Tensor  # [W,h]
    terminated: Tensor  # bool [W,h]
    valid: Tensor  # bool [W,h], False beyond the end of the episode


@dataclass(frozen=True)
class OpenLoopErrors:
    """The errors of E dreams; NaN where an episode had ended."""

    obs_error: Tensor  # [E,h,O] dreamed less recorded, over each dimension's std in the training data
    reward_error: Tensor  # [E,h] in the reward's units

    def part(self, rows: slice | Tensor) -> OpenLoopErrors:
        """Some of the dreams."""
        return OpenLoopErrors(self.obs_error[rows], self.reward_error[rows])

    def nrmse(self, horizon: int) -> Tensor:
        """The RMS over dimensions at step ``horizon`` (1 is the first) of each dream that lasts so long -> [<=E].

        Raises ValueError for a step that wasn't dreamed.
        """
        if not 1 <= horizon <= self.obs_error.shape[1]:
            raise ValueError(f"{self.obs_error.shape[1]} steps were dreamed, so there is no error at step {horizon}")
        error = self.obs_error[:, horizon - 1].square().mean(-1).sqrt()
        return error[~error.isnan()]

    def table(self, horizons: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """For each horizon the RMS over dreams (``rms``) and the median dream (``median``).

        horizons: None takes those of 1, 8 and 64 that were dreamed.
        """
        rows = {}
        for h in [h for h in (1, 8, 64) if h <= self.obs_error.shape[1]] if horizons is None else horizons:
            error = self.nrmse(h)
            rows[f"h{h}"] = {"rms": error.square().mean().sqrt().item(), "median": error.median().item()}
        return rows


@dataclass(frozen=True)
class Windows:
    """W windows: in each a dream sees some frames, then goes on with the actions that were recorded."""

    episodes: Episodes
    at: Tensor  # int64 [W], the last frame seen
    seen: Tensor  # int64 [W], how many frames are seen, that one included
    horizon: int  # h, steps to dream; those beyond the episode's end are not valid
    states: Tensor | None = None  # [F,S] the simulator's exact state at each frame of the episodes, where it is known

    def part(self, rows: slice | Tensor) -> Windows:
        """Some of the windows."""
        return replace(self, at=self.at[rows], seen=self.seen[rows])

    @cached_property
    def recorded(self) -> Recorded:
        """What followed in the simulator."""
        return Recorded(*(x[:, 1:] for x in self.episodes.windows(self.at, self.horizon + 1)))

    def observe(self, dynamics: Dynamics) -> Any:
        """Show each row its own frames -> State with B=W; of a simulator itself, its exact states."""
        if self.states is not None and isinstance(dynamics, ExactDynamics):
            return dynamics.at(self.states[self.at])
        state = dynamics.initial(len(self.at))
        for frames in self.seen.unique().tolist():
            rows = (self.seen == frames).nonzero()[:, 0]
            obs, actions, *_ = self.episodes.windows(self.at[rows] - frames + 1, frames)
            state = state.put(rows, dynamics.observe(dynamics.initial(len(rows)), obs, actions))
        return state

    @torch.inference_mode()
    def dream(
        self, dynamics: Dynamics, *, state: Any = None, actions: Tensor | None = None, chunk: int = 1, **imagine: Any
    ) -> Imagined:
        """Dream all h steps with the recorded actions, without another look -> Imagined [W,h,...].

        A dream that has ended stays as it is, as in ``SimulatorDynamics``: its observation repeats, its rewards are 0.
        state: where to begin, instead of ``observe(dynamics)``. actions: [W,h,A] instead of the recorded ones.
        """
        state = self.observe(dynamics) if state is None else state
        parts = []
        for piece in (self.recorded.action if actions is None else actions).split(chunk, 1):
            state, imagined = dynamics.imagine(state, piece, **imagine)
            parts.append(imagined)
        obs, reward, terminated = (torch.cat(part, 1) for part in zip(*(p[:3] for p in parts), strict=True))
        over = terminated.cumsum(1).cumsum(1) > 1
        last = torch.where(over, terminated.int().argmax(1, keepdim=True), torch.arange(self.horizon))
        obs = obs.gather(1, last[..., None].expand_as(obs))
        return Imagined(obs, reward.masked_fill(over, 0.0), terminated | over)

    def errors(self, imagined: Imagined, std: Tensor) -> OpenLoopErrors:
        """The errors of a ``dream`` of these windows; std [O] is the unit of each dimension."""
        real = self.recorded
        assert imagined.obs is not None
        # A dream that turned non-finite is infinitely wrong: it must not be left out.
        obs = ((imagined.obs - real.obs) / std).nan_to_num(torch.inf)
        reward = (imagined.reward - real.reward).nan_to_num(torch.inf)
        return OpenLoopErrors(
            torch.where(real.valid[..., None], obs, torch.nan), torch.where(real.valid, reward, torch.nan)
        )
