"""A film of a comparison: some windows as simulated and as dreamed, one above the other."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kairos_gym.evaluation.comparison import MODEL, Comparison
from world_model.spaces import unflatten

SIZE = 200  # pixels of a frame's longer side
FASTEST = 0.04  # seconds that a frame is shown at least


def choose_windows(comparison: Comparison) -> list[int]:
    """Three windows: of the worst, the middle and the best policy, the one whose error is its median."""
    order = comparison.rollouts.result.returns.mean(1).argsort()
    chosen = []
    for p in (order[0], order[len(order) // 2], order[-1]):
        rows = comparison.of_policy(int(p))
        error = comparison.errors[MODEL].obs_error[rows].square().mean((1, 2)).nan_to_num(torch.inf)
        chosen.append(int(rows[error.argsort()[len(rows) // 2]]))
    return chosen


def draw_film(comparison: Comparison, windows: list[int]) -> bytes:
    """The film of ``windows``, side by side: above as simulated, below as dreamed -> a WebP file.

    Raises whatever the simulator raises where it can't draw here.
    """
    from envs import make_real

    env = make_real(comparison.rollouts.env_id, render_mode="rgb_array")
    try:
        env.reset(seed=0)
        first, *rest = _draw_frames(env, comparison, windows)
    finally:
        env.close()
    file = BytesIO()
    milliseconds = round(1000 * max(comparison.dt, FASTEST))
    first.save(file, "webp", save_all=True, append_images=rest, duration=milliseconds, loop=0, quality=70)
    return file.getvalue()


def _draw_frames(env: gym.Env, comparison: Comparison, windows: list[int]) -> list[Image.Image]:
    real, dreamed = comparison.windows.recorded, comparison.dreamed.obs
    assert dreamed is not None
    lasts = real.valid.sum(1).tolist()
    frames = []
    for t in range(max(lasts[w] for w in windows)):
        columns = []
        for w in windows:
            at = min(t, lasts[w] - 1)  # a shorter window's last frame stays
            above, below = (_draw(env, obs[w, at].double().numpy()) for obs in (real.obs, dreamed))
            columns.append(np.concatenate([above, np.full_like(above[:3], 255), below]))
        gap = np.full_like(columns[0][:, :3], 255)
        row = [part for column in columns for part in (column, gap)][:-1]
        frames.append(Image.fromarray(np.concatenate(row, 1)))
    return frames


def _draw(env: gym.Env, obs: NDArray[Any]) -> NDArray[np.uint8]:
    """An observation [O], clipped to the bounds of its space, as a picture."""
    from envs import render_observation

    space: Any = env.observation_space
    image = Image.fromarray(
        render_observation(env, unflatten(space, np.clip(obs, space.low.ravel(), space.high.ravel())))
    )
    image.thumbnail((SIZE, SIZE))
    return np.asarray(image)
