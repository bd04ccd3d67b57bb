"""fit learns a linear system, with the memory's help too, and a run that was killed ends where it would have ended."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file
from tiny import dreamt
from torch import Tensor
from toys import box_spec

from world_model.episodes import Episodes
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import WorldModel
from world_model.training.config import FitConfig
from world_model.training.fit import fit
from world_model.training.losses import transition_losses
from world_model.training.run import TrainingRun

SMALL: dict[str, Any] = dict(
    chunk=2, width=16, action_width=8, heads=1, head_dim=8, window=4, draft_width=24, draft_blocks=1
)


def spring(episodes: int, steps: int = 40, *, seed: int, hide: bool = False) -> Episodes:
    """A damped spring that is pushed: its position and, unless hidden, its velocity are seen; reward -|position|."""
    rng = np.random.default_rng(seed)
    data = []
    for _ in range(episodes):
        x, actions = rng.normal(size=2), rng.uniform(-1, 1, (steps, 1))
        frames = [x]
        for (u,) in actions:
            x = np.array([[1, 0.2], [-0.2, 0.95]]) @ x + [0, 0.2 * u]
            frames.append(x)
        obs = np.array(frames)
        data.append((obs[:, :1] if hide else obs, actions, -np.abs(obs[1:, 0]), np.zeros(steps, bool)))
    return Episodes.stack(data)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("draft", [True, False])
def test_learns_a_linear_system(tmp_path: Path, draft: bool) -> None:
    config = WorldModelConfig(2, 1, pattern="SG", draft=draft, **SMALL)
    train = FitConfig(draft_steps=250, steps=150, draft_batch=128, frames=8, lr=5e-3, draft_ema=0.98, ema=0.98)
    model = fit(config, box_spec(2, 1, chunk=2), spring(60, seed=0), train, out=tmp_path, progress=False)
    test = spring(20, seed=1)
    obs, act, reward, _, _ = test.windows(test.starts(), 25)
    for k in (1, 2):
        state = model.observe(model.initial(20), obs[:, :9], act[:, :9])
        parts, gained = [], []
        for t in range(9, 25, k):
            state, imagined = model.imagine(state, act[:, t : t + k])
            parts.append(dreamt(imagined))
            gained.append(imagined.reward)
        persistence = rms(obs[:, 8:9] - obs[:, 9:])
        dream, gain = torch.cat(parts, 1), torch.cat(gained, 1)
        assert rms(dream - obs[:, 9:]) < persistence * (0.05 if draft else 0.5), f"16 steps at K={k}"
        assert rms(gain + dream[..., 0].abs()) < 0.3 * reward.std(), "the reward isn't that of what was dreamt"
    loaded = WorldModel.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.starts is not None and loaded.starts.obs.shape == (60, 1, 2)
    assert json.loads((tmp_path / "card.json").read_text())["fit"]["train"]["steps"] == 150
    assert list((tmp_path / "logs").iterdir()) and not (tmp_path / "training.safetensors").exists()


def test_learns_what_only_the_memory_knows(tmp_path: Path) -> None:
    """With the velocity hidden no one-step model does much better than persistence; two frames tell it."""
    config = WorldModelConfig(1, 1, pattern="SG", **SMALL)
    train = FitConfig(draft_steps=50, steps=400, draft_batch=128, frames=8, lr=5e-3, draft_ema=0.9, ema=0.98)
    model = fit(config, box_spec(1, 1, chunk=2), spring(60, seed=0, hide=True), train, out=tmp_path, progress=False)
    test = spring(40, seed=1, hide=True)
    obs, act, _, _, _ = test.windows(test.starts(), 12)
    state = model.observe(model.initial(40), obs[:, :10], act[:, :10])
    _, imagined = model.imagine(state, act[:, 10:])
    persistence = rms(obs[:, 9:10] - obs[:, 10:])
    draft = model.predict_draft(model.scaling.obs(obs[:, 9]), model.scaling.action(act[:, 10:]))
    assert rms(model.scaling.raw_obs(draft.mean) - obs[:, 10:]) > 0.9 * persistence
    assert rms(dreamt(imagined) - obs[:, 10:]) < 0.75 * persistence


# -- resume ------------------------------------------------------------------------------------------------------------

# Checkpoints after 5, 10, 15, 20 updates; the draft is frozen before the eleventh.
TINY = WorldModelConfig(2, 1, pattern="SDG", dilation=2, taps=2, **SMALL)
SHORT = FitConfig(draft_steps=10, steps=12, draft_batch=16, batch=4, frames=4, save_every=5)


def train_short(out: Path, train: FitConfig = SHORT) -> WorldModel:
    return fit(TINY, box_spec(2, 1, chunk=2), spring(5, seed=0), train, out=out, progress=False)


def killed_at(out: Path, step: int) -> None:
    """A process that trains into ``out`` and is gone, without a word, before update ``step``."""
    code = f"""
import os, signal, sys, torch
from pathlib import Path
from typing import Any
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(1)
from test_fit import TrainingRun, train_short
update = TrainingRun.update
TrainingRun.update = lambda run, step: os.kill(os.getpid(), signal.SIGKILL) if step == {step} else update(run, step)
train_short(Path({str(out)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def interrupted_at(out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C before update ``step`` -> the updates that were made until then."""
    made: list[int] = []
    update = TrainingRun.update

    def stops(run: TrainingRun, now: int) -> dict[str, Tensor]:
        if now == step:
            raise KeyboardInterrupt
        made.append(now)
        return update(run, now)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "update", stops)
        if step < 0:
            train_short(out)
        else:
            with pytest.raises(KeyboardInterrupt):
                train_short(out)
    return made


def test_compiled_training_is_torch_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = train_short(tmp_path / "auto").state_dict()
    monkeypatch.setenv("KAIROS_KERNELS", "torch")
    for name, weight in train_short(tmp_path / "torch").state_dict().items():
        assert torch.allclose(ours[name], weight, rtol=1e-3, atol=1e-4), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = tmp_path_factory.mktemp("unbroken")
    train_short(out)
    return load_file(out / "model.safetensors")


def test_a_broken_run_ends_at_the_same_weights(
    tmp_path: Path, unbroken: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_at(tmp_path, 8)  # while the draft trains
    with pytest.raises(FileNotFoundError, match="incomplete"):
        WorldModel.from_pretrained(tmp_path)
    assert interrupted_at(tmp_path, 12, monkeypatch) == list(range(5, 12))
    assert str(tmp_path) in capsys.readouterr().err
    assert interrupted_at(tmp_path, 18, monkeypatch) == list(range(10, 18))  # from the last moment before the freeze
    assert interrupted_at(tmp_path, -1, monkeypatch) == list(range(15, 22))  # from amid the second phase, to the end
    resumed = load_file(tmp_path / "model.safetensors")
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(t, unbroken[name]) for name, t in resumed.items())


def test_same_seed_same_weights_other_seed_others(tmp_path: Path, unbroken: dict[str, Tensor]) -> None:
    torch.manual_seed(123)  # the caller's generator is none of fit's business
    again = train_short(tmp_path / "same").state_dict()
    assert all(torch.equal(t, unbroken[name]) for name, t in again.items())
    other = train_short(tmp_path / "other", replace(SHORT, seed=1)).state_dict()
    assert not torch.equal(other["tokens.out.weight"], unbroken["tokens.out.weight"])


@pytest.mark.parametrize(
    ("train", "weight"),
    [(replace(SHORT, draft_ema=0.0), "draft.out_proj.weight"), (replace(SHORT, ema=0.0), "tokens.out.weight")],
    ids=["draft", "memory"],
)
def test_what_is_saved_is_the_average(
    tmp_path: Path, unbroken: dict[str, Tensor], train: FitConfig, weight: str
) -> None:
    last = train_short(tmp_path, train).state_dict()
    assert not torch.equal(last[weight], unbroken[weight])


def test_another_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_at(tmp_path, 7, monkeypatch)
    with pytest.raises(ValueError, match=r"training\.safetensors belongs to another run.*delete it to start afresh"):
        train_short(tmp_path, replace(SHORT, lr=1e-3))
    bigger = spring(6, seed=0)
    with pytest.raises(ValueError, match="belongs to another run"):
        fit(TINY, box_spec(2, 1, chunk=2), bigger, SHORT, out=tmp_path, progress=False)


def test_other_data_of_the_same_size_are_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_at(tmp_path, 7, monkeypatch)
    with pytest.raises(ValueError, match="belongs to another run"):
        fit(TINY, box_spec(2, 1, chunk=2), spring(5, seed=99), SHORT, out=tmp_path, progress=False)


def test_training_goes_on_from_another_model_with_more_data(tmp_path: Path) -> None:
    """A few updates on top of a trained model are worth more than as few from scratch, also where units change."""
    config, spec = WorldModelConfig(2, 1, pattern="SG", **SMALL), box_spec(2, 1, chunk=2)
    whole = FitConfig(draft_steps=250, steps=20, draft_batch=128, frames=8, draft_ema=0.98, ema=0.98)
    few, more = replace(whole, draft_steps=30), Episodes.join([spring(30, seed=0), spring(30, seed=1)])
    first = fit(config, spec, spring(30, seed=0), whole, out=tmp_path / "first", progress=False)
    scratch = fit(config, spec, more, few, out=tmp_path / "scratch", progress=False)
    onward = fit(config, spec, more, few, out=tmp_path / "onward", begin=first, progress=False)
    assert not torch.equal(onward.scaling.obs_std, first.scaling.obs_std), "units are those of all the data"
    obs, act, *_ = spring(20, seed=2).windows(spring(20, seed=2).starts(), 3)
    wrong = []
    for model in (scratch, onward):
        _, imagined = model.imagine(model.observe(model.initial(20), obs[:, :1]), act[:, 1:])
        wrong.append(rms(dreamt(imagined) - obs[:, 1:]))
    assert wrong[1] < 0.5 * wrong[0]
    with pytest.raises(ValueError, match="made otherwise"):
        fit(config, spec, more, few, out=tmp_path / "scratch", begin=first, progress=False)
    with pytest.raises(ValueError, match="another config"):
        fit(replace(config, width=8), spec, more, few, out=tmp_path / "other", begin=first, progress=False)


def test_a_damaged_training_checkpoint_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_at(tmp_path, 7, monkeypatch)
    path = tmp_path / "training.safetensors"
    path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])
    with pytest.raises(ValueError, match=r"training\.safetensors"):
        train_short(tmp_path)


def test_windows_shorter_than_a_chunk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frames=1 must hold at least one chunk"):
        train_short(tmp_path, replace(SHORT, frames=1))


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(O, A\) = \(1, 1\), the config says \(2, 1\)"):
        fit(TINY, box_spec(2, 1, chunk=2), spring(5, seed=0, hide=True), SHORT, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="hold no step"):
        fit(TINY, box_spec(2, 1, chunk=2), spring(5, steps=0, seed=0), SHORT, out=tmp_path, progress=False)
    narrow = replace(box_spec(2, 1, chunk=2), observation_space=spaces.Box(-0.1, 0.1, (2,), np.float32))
    with pytest.raises(ValueError, match="room for all that it shows"):
        fit(TINY, narrow, spring(5, seed=0), SHORT, out=tmp_path, progress=False)


def test_a_bound_that_is_overshot_costs_nothing(tmp_path: Path) -> None:
    """What a dream would cut off teaches the draft nothing; short of the bound it is drawn there."""
    stuck = [(np.full((9, 1), 2.0), np.zeros((8, 1)), np.zeros(8), np.zeros(8, bool))]
    spec = replace(box_spec(1, 1), observation_space=spaces.Box(-2.0, 2.0, (1,), np.float32))
    for reach, learns in ((0.5, False), (-0.5, True)):
        model = WorldModel(WorldModelConfig(1, 1, **SMALL | {"chunk": 8}), spec)
        run = TrainingRun(model, Episodes.stack(stuck), SHORT, tmp_path, "")
        assert model.draft is not None
        model.draft.out_proj.bias.data[0] = reach
        batch = run.batches.transitions(SHORT.draft_batch, run.generator)
        run._backward({"draft": transition_losses(model, batch, run._forward)["draft"]})
        grad = model.draft.out_proj.bias.grad
        assert grad is not None and (grad[0] != 0) == learns
