"""Hashes 100 dreamed steps of each shipped model: two versions of the code dream the same if they print the same lines.

Run as ``python benchmarks/dream_hash.py``, and with ``KAIROS_KERNELS=torch`` to see the plain form.
"""

import hashlib
from typing import Any

import numpy as np
import torch

import kairos_gym

SETTINGS: tuple[dict[str, Any], ...] = (
    {"chunk": 1},
    {"chunk": 4},
    {"chunk": 4, "sampled": True, "flow_steps": 4},
    {"chunk": 1, "confidence": 0.9},
)


def main() -> None:
    torch.set_num_threads(1)
    for name in kairos_gym.shipped():
        for settings in SETTINGS:
            env = kairos_gym.DreamVectorEnv(name, 5, max_episode_steps=40, **settings)
            digest = hashlib.sha256(np.asarray(env.reset(seed=0)[0]).tobytes())
            env.action_space.seed(0)
            for _ in range(100 // settings["chunk"]):
                obs, reward, terminated, truncated, infos = env.step(env.action_space.sample())
                for array in (obs, reward, terminated, truncated, infos.get("trust", {}).get("error_bound", reward)):
                    digest.update(np.ascontiguousarray(array).tobytes())
            print(name, settings, digest.hexdigest()[:16])


if __name__ == "__main__":
    main()
