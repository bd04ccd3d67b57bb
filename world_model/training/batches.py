"""What one update learns from: batches drawn from recorded episodes, in the model's units."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from world_model.episodes import Episodes
from world_model.model.world_model import DraftPrediction, WorldModel
from world_model.ops.flow import shift, shift_factor
from world_model.ops.layout import Layout


class Transitions(NamedTuple):
    """N single steps. Observations are normalised, actions in [-1,1], changes in usual steps; rewards are raw."""

    obs: Tensor  # [N,O]
    action: Tensor  # [N,A]
    next_obs: Tensor  # [N,O]
    last_change: Tensor | None  # [N,O] that led to obs, zero where it is hidden; None where the draft sees one frame
    reward: Tensor  # [N]
    terminated: Tensor  # [N] bool


class Chunks(NamedTuple):
    """B windows of T+1 frames; those after the first are also cut into C chunks of K frames, to be denoised."""

    layout: Layout
    obs: Tensor  # [B,T+1,O] normalised
    actions: Tensor  # [B,T+1,A] in [-1,1]; the first is ignored
    reward: Tensor  # [B,C,K] raw
    terminated: Tensor  # [B,C,K] bool
    valid: Tensor  # [B,C,K] 1, or 0 beyond the end of an episode
    draft: DraftPrediction  # [B,C,K,O]
    level: Tensor  # [B,C,1,1] noise level s of each chunk
    noise: Tensor  # [B,C,K,O]; zero for chunks that practise the mean dream

    def in_chunks(self, x: Tensor) -> Tensor:
        """[B,T,...] of the frames after the first -> [B,C,K,...]."""
        return x.unflatten(1, (-1, self.layout.chunk))


class Batches:
    """Draws batches from ``episodes`` for the training of ``model``. All randomness comes from the caller's generator.

    frames: T, the length of a window.
    """

    def __init__(self, model: WorldModel, episodes: Episodes, frames: int):
        self.model, self.episodes, self.frames = model, episodes, frames
        scaling = model.scaling
        self.scaled = replace(episodes, obs=scaling.obs(episodes.obs), action=scaling.action(episodes.action))
        self.transition_rows = (episodes.index > 0).nonzero()[:, 0]
        # A window needs at least one step; one that would outlast its episode starts earlier where it can.
        room = episodes.left >= torch.minimum(torch.tensor(frames), episodes.index + episodes.left)
        self.window_rows = (room & (episodes.left > 0)).nonzero()[:, 0]
        self._draft_cache: dict[bool, tuple[Tensor, Tensor]] = {}

    def transitions(self, count: int, generator: torch.Generator) -> Transitions:
        """``count`` steps, each equally likely."""
        data = self.scaled
        rows = self.transition_rows[torch.randint(len(self.transition_rows), (count,), generator=generator)]
        obs, last_change = data.obs.index_select(0, rows - 1), None
        if self.model.draft is not None and self.model.draft.frames > 1:
            # Now and then the frame before is hidden, since a dream may begin anywhere.
            known = (data.index[rows] > 1) & (torch.rand(count, generator=generator) > 1 / 16)
            last_change = (obs - data.obs[rows - 1 - known.long()]) / self.model.scaling.step_std
        action, next_obs = data.action.index_select(0, rows), data.obs.index_select(0, rows)
        return Transitions(obs, action, next_obs, last_change, data.reward[rows], data.terminated[rows])

    @torch.no_grad()
    def chunks(self, count: int, chunk: int, generator: torch.Generator) -> Chunks:
        """``count`` windows in chunks of ``chunk`` frames; the draft must be frozen by now, for it is asked once."""
        at = self.window_rows[torch.randint(len(self.window_rows), (count,), generator=generator)]
        frames = self.frames // chunk * chunk
        obs, actions, *rest = self.scaled.windows(at, frames + 1)
        layout = Layout(frames + 1, tuple(range(1, frames + 1, chunk)), chunk)
        reward, terminated, valid = (x[:, 1:].unflatten(1, (-1, chunk)) for x in rest)
        draft = self._draft(at, *(x.unflatten(1, (-1, chunk)) for x in (obs[:, :-1], actions[:, 1:])))
        # Half of the chunks practise the mean dream: all noise, but from zero, the noise's mean.
        mean = torch.rand(*draft.mean.shape[:2], 1, 1, generator=generator) < 0.5
        level = shift(torch.rand(mean.shape, generator=generator), shift_factor(chunk, self.model.config.tokens))
        noise = torch.randn(draft.mean.shape, generator=generator).masked_fill(mean, 0.0)
        level = level.masked_fill(mean, 1.0)
        return Chunks(layout, obs, actions, reward, terminated, valid.float(), draft, level, noise)

    @torch.no_grad()
    def draft_error(self, count: int, generator: torch.Generator) -> Tensor:
        """The draft's RMS error at each step of a chunk -> [K,O], over ``count`` windows."""
        model, data, k = self.model, self.episodes, self.model.config.chunk
        at = self.window_rows[torch.randint(len(self.window_rows), (count,), generator=generator)]
        obs, actions, _, _, valid = data.windows(at, k + 1)
        obs = model.scaling.obs(obs)
        before = model.scaling.obs(data.obs[at - (data.index[at] > 0).long()])
        predicted = model.predict_draft(obs[:, 0], model.scaling.action(actions[:, 1:]), before).mean
        square, weight = (obs[:, 1:] - predicted).square(), valid[:, 1:, None].float()
        return ((square * weight).sum(0) / weight.sum(0)).sqrt()

    def _draft(self, at: Tensor, obs: Tensor, actions: Tensor) -> DraftPrediction:
        """For the chunks of the windows at rows ``at`` [B], where steps start at obs and play actions [B,C,K,...]."""
        model, chunk, start = self.model, actions.shape[2], obs[:, :, 0]
        if model.draft is None:
            return model.predict_draft(start, actions)
        first = torch.arange(actions.shape[1]) * chunk
        rows = torch.minimum(at[:, None] + first, (at + self.episodes.left[at])[:, None])
        mean, std = (x[rows, :chunk] for x in self._cached_draft(True))
        if model.config.draft_frames > 1:  # at a window's beginning a dream doesn't know the frame before
            mean[:, 0], std[:, 0] = (x[at, :chunk] for x in self._cached_draft(False))
        return model.draft_prediction(start, mean, std)

    def _cached_draft(self, previous: bool) -> tuple[Tensor, Tensor]:
        """What the frozen draft predicts from every frame on -> mean, std [F,K,O]: once, instead of in every update.

        previous: whether it sees the frame before.
        """
        if previous not in self._draft_cache:
            model, data = self.model, self.scaled
            assert model.draft is not None
            parts = []
            for at in torch.arange(len(data.obs)).split(4096):
                rows = torch.minimum(at[:, None] + 1 + torch.arange(model.config.chunk), (at + data.left[at])[:, None])
                start = data.obs[at]
                before = data.obs[at - (data.index[at] > 0).long()] if previous else start
                parts.append(model.draft.unroll(start, data.action[rows], before, model.scaling))
            means, variances = (torch.cat(x) for x in zip(*parts, strict=True))
            self._draft_cache[previous] = means, variances.sqrt_()
        return self._draft_cache[previous]
