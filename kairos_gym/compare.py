"""Imagined against simulated: the open-loop error of a dream, by horizon, on recorded episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from world_model.contract import Dynamics
from world_model.episodes import Episodes


@dataclass(frozen=True)
class OpenLoop:
    """What a dream got wrong in E trajectories."""

    obs_error: Tensor  # [E,h,O] dreamed less real, over each dimension's std in the training data
    reward_error: Tensor  # [E,h] in the reward's units

    def part(self, rows: slice) -> OpenLoop:
        """Some of the trajectories."""
        return OpenLoop(self.obs_error[rows], self.reward_error[rows])

    def nrmse(self, horizon: int) -> Tensor:
        """The RMS over dimensions at step ``horizon`` (1 is the first) of each trajectory -> [E]."""
        return self.obs_error[:, horizon - 1].square().mean(-1).sqrt()

    def table(self, horizons: Sequence[int] = (1, 8, 64)) -> dict[str, dict[str, float]]:
        """For each horizon the RMS over trajectories (``rms``) and the median trajectory (``median``)."""
        rows = {}
        for h in horizons:
            error = self.nrmse(h)
            rows[f"h{h}"] = {"rms": error.square().mean().sqrt().item(), "median": error.median().item()}
        return rows


@torch.inference_mode()
def open_loop(
    model: Dynamics,
    episodes: Episodes,
    std: Tensor,
    *,
    horizon: int = 64,
    context: int = 16,
    chunk: int = 1,
    trajectories: int = 64,
    begin: int | None = None,
    **imagine: Any,
) -> OpenLoop:
    """Show the model ``context`` real frames, then let it dream ``horizon`` steps with the actions really played.

    One trajectory from each of the first ``trajectories`` episodes, from frame ``begin`` (None: from its middle).
    std [O]: the training data's.
    Raises ValueError where there are too few episodes of at least context + horizon frames.
    """
    first = episodes.starts()
    first = first[episodes.left[first] >= context + horizon - 1 + (begin or 0)][:trajectories]
    if len(first) < trajectories:
        needed = f"{context + horizon + (begin or 0)} frames"
        raise ValueError(f"{len(first)} episodes have {needed}, {trajectories} are needed: collect more or longer ones")
    first = first + ((episodes.left[first] - (context + horizon - 1)) // 2 if begin is None else begin)
    obs, actions, reward, _, _ = episodes.windows(first, context + horizon)
    state = model.observe(model.initial(len(first)), obs[:, :context], actions[:, :context])
    dreamed, gained = [], []
    for t in range(context, context + horizon, chunk):
        state, imagined = model.imagine(state, actions[:, t : min(t + chunk, context + horizon)], **imagine)
        assert imagined.obs is not None
        dreamed.append(imagined.obs)
        gained.append(imagined.reward)
    return OpenLoop((torch.cat(dreamed, 1) - obs[:, context:]) / std, torch.cat(gained, 1) - reward[:, context:])
