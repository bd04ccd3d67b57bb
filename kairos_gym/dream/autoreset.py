"""Gymnasium's autoreset modes: when dreams of a vector env that have ended begin their next episode."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from kairos_gym.dream.batch import DreamBatch
from kairos_gym.dream.steps import Step


class VectorStep(NamedTuple):
    step: Step  # of all dreams, before any began again
    stepped: NDArray[np.bool_]  # [B], False where a dream only began its next episode
    ended: NDArray[np.bool_] | None  # [B], ended and began again in this step; None where none did
    restarted: bool  # whether any dream began again


def step_and_autoreset(batch: DreamBatch, actions: Tensor, mode: AutoresetMode, *, decode: bool = True) -> VectorStep:
    """Step all dreams by actions [B,K,A] and begin the episodes that ``mode`` asks for; see ``DreamVectorEnv``."""
    if batch.any_ended and mode is AutoresetMode.NEXT_STEP:
        batch.expect_begun()
        ended = batch.progress.ended.copy()
        running = np.flatnonzero(~ended)
        if len(running):
            index = torch.from_numpy(running)
            step = batch.step(actions[index], running, decode=decode).scatter(index, batch.batch)
        else:
            obs_dim, bounded = batch.model.spec.observation_box.shape[0], batch.calibration is not None
            step = Step.zeros(actions, obs_dim, decode=decode, error_bound=bounded)
        batch.reset(np.flatnonzero(ended))
        return VectorStep(step, ~ended, None, True)
    if batch.any_ended and mode is AutoresetMode.SAME_STEP:  # ended in ``row`` or came from ``restore``
        batch.expect_begun()
        batch.reset(np.flatnonzero(batch.progress.ended))
    step = batch.step(actions, decode=decode)
    if mode is not AutoresetMode.SAME_STEP or not batch.any_ended:
        return VectorStep(step, batch.all_rows, None, False)
    ended = batch.progress.ended.copy()
    batch.reset(np.flatnonzero(ended))
    return VectorStep(step, batch.all_rows, ended, True)
