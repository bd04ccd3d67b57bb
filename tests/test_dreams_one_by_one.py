"""Whatever is done to many dreams at once is what would be done to each of them alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import dreamer
from walks import Walk

from kairos_gym import DreamEnv, DreamVectorEnv
from world_model.noise import bits


class Plain:
    """One dream, the plainest way: a loop over inner steps, nothing batched, nothing clever."""

    seed = episode = 0

    def __init__(self, model: Any, chunk: int, limit: int, sampled: bool):
        self.model, self.chunk, self.limit, self.flow = model, chunk, limit, {"sampled": True} if sampled else {}
        self.low, self.high = model.spec.observation_space.low, model.spec.observation_space.high

    def reset(self, seed: int | None) -> None:
        self.seed, self.episode = (self.seed, self.episode + 1) if seed is None else (seed, 0)
        key = torch.tensor([self.seed])
        start = int(bits(key, torch.tensor([2 * self.episode]))) % len(self.model.starts.obs)
        noise = bits(key, torch.tensor([2 * self.episode + 1]))
        obs, actions = self.model.starts.obs[start], self.model.starts.actions[start]
        with torch.no_grad():
            self.state = self.model.observe(self.model.initial(1, seeds=noise), obs[None], actions[None])
        self.obs, self.age, self.ended = obs[-1].numpy(), 0, False

    def step(self, actions: np.ndarray) -> tuple[float, bool, bool]:
        """actions [K,A] -> reward, terminated, truncated."""
        with torch.no_grad():
            self.state, imagined = self.model.imagine(self.state, torch.from_numpy(actions)[None], **self.flow)
        total, terminated, truncated = 0.0, False, False
        for obs, reward, ends in zip(imagined.obs[0], imagined.reward[0], imagined.terminated[0], strict=True):
            if not (obs.isfinite().all() and reward.isfinite()):
                truncated = True
                break
            self.obs, total, self.age = obs.numpy(), total + float(reward), self.age + 1
            terminated, truncated = bool(ends), self.age == self.limit
            if terminated or truncated:
                break
        self.ended = terminated or truncated
        return total, terminated, truncated

    def copy(self) -> Plain:
        other = Plain.__new__(Plain)
        other.__dict__ = dict(self.__dict__)  # a state is immutable
        return other

    @property
    def shown(self) -> np.ndarray:
        return np.clip(self.obs, self.low, self.high)


def agree(env: DreamVectorEnv, plain: list[Plain], tolerance: float) -> None:
    np.testing.assert_allclose(env.observations, [one.shown for one in plain], atol=tolerance)
    for name, t in env.state.tensors.items():
        for b, one in enumerate(plain):
            if not one.ended:  # what a dream remembers after its end means nothing
                torch.testing.assert_close(t[b], one.state[name][0], atol=tolerance, rtol=tolerance, equal_nan=True)


def play(data: st.DataObject, model: Any, tolerance: float, most: int) -> None:
    """Do anything to a DreamVectorEnv and its rows, and the same to as many ``Plain`` dreams, one at a time."""
    draw, chunk, sampled = data.draw, data.draw(st.integers(1, 3)), data.draw(st.booleans())
    limit = draw(st.integers(1, 9))
    settings_: dict[str, Any] = dict(chunk=chunk, sampled=sampled, max_episode_steps=limit, autoreset_mode="Disabled")

    def fresh(b: int) -> DreamVectorEnv:
        return DreamVectorEnv(model, b, **settings_)

    batch = draw(st.integers(1, 4))
    env, plain = fresh(batch), [Plain(model, chunk, limit, sampled) for _ in range(batch)]
    seed = draw(st.integers(0, 99))
    env.reset(seed=seed)
    for b, one in enumerate(plain):
        one.reset(seed + b)
    kept: list[tuple[bytes, list[Plain]]] = []
    for _ in range(draw(st.integers(1, most))):
        live = [b for b, one in enumerate(plain) if not one.ended]
        verbs = ["reset", "snapshot", "fork"] + ["step"] * 4 * (len(live) == len(plain)) + ["row"] * bool(live)
        verb = draw(st.sampled_from(verbs + ["restore"] * bool(kept)))
        rng = np.random.default_rng(draw(st.integers(0, 2**20)))
        played = rng.uniform(-1, 1, (len(plain), chunk, 2)).astype(np.float32)
        shape = (2,) if chunk == 1 else (chunk, 2)
        if verb == "step":
            _, reward, terminated, truncated, _ = env.step(played.reshape(-1, *shape))
            want = [one.step(actions) for one, actions in zip(plain, played, strict=True)]
            np.testing.assert_allclose(reward, [w[0] for w in want], atol=10 * tolerance)
            assert [(t, c) for t, c in zip(terminated, truncated, strict=True)] == [w[1:] for w in want]
        elif verb == "row":
            b = draw(st.sampled_from(live))
            obs, one_reward, *ended, _ = env.row(b).step(played[b].reshape(shape))
            want_reward, *want_ended = plain[b].step(played[b])
            np.testing.assert_allclose(obs, plain[b].shown, atol=tolerance)
            np.testing.assert_allclose(one_reward, want_reward, atol=10 * tolerance)
            assert ended == want_ended
        elif verb == "reset":
            mask = np.array(draw(st.lists(st.booleans(), min_size=len(plain), max_size=len(plain))))
            mask[draw(st.integers(0, len(plain) - 1))] = True
            new = draw(st.none() | st.integers(0, 99))
            env.reset(seed=new, options={} if mask.all() else {"reset_mask": mask})
            for b in np.flatnonzero(mask):
                plain[b].reset(None if new is None else new + int(b))
        elif verb == "fork":
            rows = draw(st.lists(st.integers(0, len(plain) - 1), min_size=1, max_size=2, unique=True))
            n = draw(st.integers(1, 2))
            env, plain = env.fork(n, rows), [plain[b].copy() for b in rows for _ in range(n)]
            kept = [(blob, dreams) for blob, dreams in kept if len(dreams) <= len(plain)]
        elif verb == "snapshot":
            rows = draw(st.lists(st.integers(0, len(plain) - 1), min_size=1, unique=True))
            kept.append((env.snapshot(rows), [plain[b].copy() for b in rows]))
        else:
            blob, dreams = draw(st.sampled_from(kept))
            rows = draw(st.permutations(range(len(plain))))[: len(dreams)]
            if len(dreams) == len(plain) and draw(st.booleans()):
                env, rows = fresh(len(plain)), list(range(len(plain)))
                env.restore(blob)
            else:
                env.restore(blob, rows)
            for b, one in zip(rows, dreams, strict=True):
                plain[b] = one.copy()
        agree(env, plain, tolerance)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_interleavings(data: st.DataObject) -> None:
    play(data, Walk(), 1e-6, most=8)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), pattern=st.sampled_from(["G", "S", "SDG"]))
def test_interleavings_of_a_world_model(data: st.DataObject, pattern: str) -> None:
    play(data, dreamer(pattern), 1e-5, most=5)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_dream_is_the_same_in_any_batch(sampled: bool) -> None:
    model, rng = dreamer(), np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (20, 2)).astype(np.float32)
    batch_of_one = DreamEnv(model, sampled=sampled)
    batch_of_one.reset(seed=107)
    want = [batch_of_one.step(action)[0] for action in actions]
    for batch in (8, 100, 1024):
        env = DreamVectorEnv(model, batch, sampled=sampled)
        env.reset(seed=[*range(200, 199 + batch), 107])
        for action, frame in zip(actions, want, strict=True):
            played = rng.uniform(-1, 1, (batch, 2)).astype(np.float32)
            played[-1] = action
            np.testing.assert_allclose(env.step(played)[0][-1], frame, rtol=1e-5, atol=1e-5)


def test_a_dream_goes_on_in_another_process(tmp_path: Path) -> None:
    model = dreamer()
    model.save_pretrained(tmp_path / "model")
    env = DreamVectorEnv(model, 3, sampled=True, chunk=2)
    env.reset(seed=5)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 3, 2, 2)).astype(np.float32)
    env.step(actions[0])
    (tmp_path / "dream").write_bytes(env.snapshot())
    np.save(tmp_path / "actions.npy", actions)
    code = (
        "import sys, numpy as np; from pathlib import Path; from kairos_gym import DreamVectorEnv\n"
        "here = Path(sys.argv[1]); env = DreamVectorEnv(here / 'model', 3, sampled=True, chunk=2)\n"
        "env.restore((here / 'dream').read_bytes())\n"
        "np.save(here / 'seen.npy', [env.step(a)[0] for a in np.load(here / 'actions.npy')[1:]] + [env.reset()[0]])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parent.parent)
    here = [env.step(a)[0] for a in actions[1:]] + [env.reset()[0]]
    np.testing.assert_allclose(np.load(tmp_path / "seen.npy"), here, rtol=1e-5, atol=1e-5)
