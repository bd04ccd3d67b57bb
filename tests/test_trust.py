"""Trust: the bound holds as often as it says, is sharp where it can be, and ends dreams in every kind of env."""

from __future__ import annotations

import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny import dreamer

from kairos_gym.dream.envs import DreamEnv, DreamVectorEnv
from kairos_gym.dream.sb3_vec_env import DreamVecEnv
from kairos_gym.evaluation.calibrate import calibrate_model, coverage, draw_calibration_windows, dream_errors
from world_model.conformal import LEVELS, ConformalBound, DreamErrors, conformal, fit_bound
from world_model.episodes import Episodes
from world_model.model.world_model import WorldModel


def test_conformal_quantiles_hold_in_a_finite_sample() -> None:
    """With n scores the chance of a fresh one below the 90% quantile is k / (n + 1), k = ceil(0.9 (n + 1))."""
    g = torch.Generator().manual_seed(0)
    for n in (9, 19, 30):
        scores, fresh = torch.rand(4000, n, generator=g), torch.rand(4000, generator=g)
        quantiles = torch.stack([conformal(row[:, None])[0][80, 0] for row in scores])
        expected = np.ceil(0.9 * (n + 1) - 1e-6) / (n + 1)
        assert (fresh <= quantiles).float().mean().item() == pytest.approx(expected, abs=0.02)


def test_too_few_scores_give_no_bound() -> None:
    quantiles, counts = conformal(torch.tensor([[0.1, torch.nan], [0.2, 0.3], [0.3, torch.nan]]))
    assert counts.tolist() == [3, 1]
    assert quantiles[LEVELS == 0.75, 0] == pytest.approx(0.3) and quantiles[LEVELS == 0.8, 0].isinf()
    assert quantiles[:, 1].tolist() == [pytest.approx(0.3)] + [float("inf")] * 99


def toy(n: int, seed: int) -> DreamErrors:
    """Errors that grow by 20% a step where the observation is positive, and stay small where it is negative."""
    g = torch.Generator().manual_seed(seed)
    side = torch.where(torch.rand(n, 1, 1, generator=g) < 0.5, 1.0, -1.0)
    before = side + 0.1 * torch.randn(n, 20, 1, generator=g)
    steps = torch.arange(1, 21)
    scale = 0.001 * torch.where(side[:, :, 0] > 0, 1.2**steps, 1.0)
    error = scale * torch.randn(n, 20, generator=g).abs()
    return DreamErrors(before, torch.zeros(n, 20, 1), error, torch.ones(n, dtype=torch.int64))


REFERENCES = torch.cat([toy(200, 2)[0][:, 0], torch.zeros(200, 1)], 1)


@pytest.fixture(scope="module")
def taught() -> ConformalBound:
    return fit_bound("weights", REFERENCES, toy(450, 0), toy(450, 3), toy(450, 4), updates=300)


def test_trust_moves_to_a_model_that_knows_more(taught: ConformalBound) -> None:
    step = torch.full((1, 1, 1), 4.0), torch.zeros(1, 1, 1)
    more = torch.cat([REFERENCES, torch.tensor([[4.0, 0.0]]).expand(2000, 2)])
    moved = taught.transfer("others", more)
    assert bytes(moved.model.numpy()).decode() == "others"
    assert moved.distance(*step) < 0.1 < 1 < taught.distance(*step), "what it was trained on is near"
    assert torch.equal(moved.quantiles, taught.quantiles)
    before = torch.zeros(3, 1, 1), torch.zeros(3, 1, 1)
    same = taught.transfer("weights", REFERENCES, seed=1)
    torch.testing.assert_close(same.distance(*before), taught.distance(*before), atol=0.1, rtol=0)


def test_the_bound_is_wide_where_dreams_go_wrong_and_narrow_elsewhere(taught: ConformalBound) -> None:
    before, actions, error, _ = toy(2000, 1)
    bound = (
        taught.propagate(taught.initial(torch.ones(len(error), dtype=torch.int64)), before, actions)
        * taught.quantile(0.9)[:20]
    )
    held = (error <= bound).float().mean(0)
    assert held.min() > 0.86 and held.max() < 0.94
    bad = before[:, 0, 0] > 0
    assert bound[bad, -1].median() > 10 * bound[~bad, -1].median()
    plain = torch.quantile(error[:, -1], 0.9)
    assert bound[:, -1].mean() < 0.8 * plain, "sharper than a bound that knows the steps alone"


def test_doubt_is_larger_far_from_what_the_model_was_trained_on() -> None:
    """Two policies teach, near and far on one side; the rule has never seen the other side, where a third one goes."""
    g = torch.Generator().manual_seed(0)

    def played(place: float, n: int = 300) -> DreamErrors:
        before = place + 0.3 * torch.randn(n, 20, 2, generator=g)
        error = 0.001 * 3 ** max(0.0, abs(place)) * torch.randn(n, 20, generator=g).abs()
        return DreamErrors(before, torch.zeros(n, 20, 1), error, torch.ones(n, dtype=torch.int64))

    reference = torch.cat([0.3 * torch.randn(400, 2, generator=g), torch.zeros(400, 1)], 1)
    three = [DreamErrors(*map(torch.cat, zip(*map(played, (0.0, 1.0, 2.0)), strict=True))) for _ in range(3)]
    trust = fit_bound("weights", reference, *three)
    ends = {}
    for place in (0.0, -2.0):
        before, actions, _, seen = played(place)
        ends[place] = trust.propagate(trust.initial(seen), before, actions)[:, -1].median()
    assert ends[-2.0] > 2 * ends[0.0]


def test_distance_is_that_to_the_nearest_known_step(taught: ConformalBound) -> None:
    reference = (
        taught.reference / taught.unit.clamp_min(1) + taught.mean
    )  # back in their own units; the actions never moved
    begin = reference[:6, :1].reshape(2, 3, 1)
    torch.testing.assert_close(taught.distance(begin, torch.zeros(2, 3, 1)), torch.zeros(2, 3), atol=2e-3, rtol=0)
    beyond = reference[:, 0].max() + torch.tensor([[[1.0], [2.0]]])
    far = taught.distance(beyond, torch.zeros(1, 2, 1))
    torch.testing.assert_close(far, torch.tensor([[1.0, 2.0]]) * taught.unit[0] / 2**0.5)


def test_numpy_and_torch_follow_alike(taught: ConformalBound) -> None:
    before, actions, error, _ = toy(50, 1)
    uncertainty = taught.initial(torch.ones(len(error), dtype=torch.int64))
    quick = taught.propagate(uncertainty.numpy(), before.numpy(), actions.numpy())
    assert quick.dtype == np.float32
    torch.testing.assert_close(
        torch.from_numpy(quick), taught.propagate(uncertainty, before, actions), rtol=1e-4, atol=1e-7
    )


def test_dreams_that_are_no_numbers_count_as_infinitely_wrong() -> None:
    def lost(seed: int) -> DreamErrors:
        before, actions, error, seen = toy(300, seed)
        before, error = before.clone(), error.clone()
        before[:100, 5:], error[:100, 4:] = torch.nan, torch.inf
        return DreamErrors(before, actions, error, seen)

    trust = fit_bound("weights", REFERENCES, lost(0), lost(1), lost(2), updates=20)
    assert trust.counts.tolist() == [300] * 20
    assert trust.quantile(0.9).isinf().tolist() == [False] * 4 + [True] * 17
    assert trust.quantile(0.6)[:20].isfinite().all()


def test_longer_chunks_have_widths_of_their_own() -> None:
    worse = toy(400, 2)
    trust = fit_bound(
        "weights", REFERENCES, toy(400, 0), toy(400, 1), worse._replace(error=3 * worse.error), updates=50
    )
    ratio = trust.quantile(0.9, chunk=4)[:20] / trust.quantile(0.9)[:20]
    assert ratio.median() == pytest.approx(3, rel=0.2)


def test_beyond_what_was_calibrated_there_is_no_bound(taught: ConformalBound) -> None:
    assert taught.quantile(0.9).isinf().tolist() == [False] * 20 + [True]
    assert (taught.quantile(0.99)[:20] > taught.quantile(0.5)[:20]).all()
    taught.check_confidence(0.99)
    with pytest.raises(ValueError, match=r"0\.5 to 0\.995"):
        taught.check_confidence(0.4)
    few = fit_bound("weights", REFERENCES, *[toy(15, seed) for seed in range(3)], updates=2)
    few.check_confidence(0.9)
    with pytest.raises(ValueError, match="more than the 15 dreams"):
        few.check_confidence(0.99)


def walk(model: WorldModel, episodes: int = 40, steps: int = 90, seed: int = 0) -> Episodes:
    """Made-up experience: the model's own dreams with noise, so that it is wrong by a little."""
    g = torch.Generator().manual_seed(seed)
    assert model.starts is not None
    actions = torch.rand(episodes, steps, 2, generator=g) * 4 - 2
    begin = model.starts.obs[torch.arange(episodes) % 6][:, -1:]
    state, parts = model.observe(model.initial(episodes), begin), [begin]
    for t in range(steps):
        state, imagined = model.imagine(state, actions[:, t : t + 1])
        assert imagined.obs is not None
        parts.append(imagined.obs)
    obs = torch.cat(parts, 1)
    obs = obs + 0.05 * torch.randn(obs.shape, generator=g)
    return Episodes.stack(
        (o.numpy(), a.numpy(), np.zeros(steps), np.zeros(steps)) for o, a in zip(obs, actions, strict=True)
    )


@pytest.fixture(scope="module")
def calibrated() -> WorldModel:
    model = dreamer()
    calibrate_model(model, walk(model, seed=1), [walk(model)], ["made-up-v0"])
    return model


def test_a_calibration_is_kept_with_the_model(calibrated: WorldModel, tmp_path: Path) -> None:
    calibrated.save_pretrained(tmp_path)
    again = WorldModel.from_pretrained(tmp_path)
    assert again.trust is not None and again.card["trust"]["calibrated_on"] == ["made-up-v0"]
    assert calibrated.trust is not None
    for name, tensor in calibrated.trust.tensors().items():
        assert torch.equal(again.trust.tensors()[name], tensor)
    assert again.fingerprint() == calibrated.fingerprint(), "trust is no part of the weights"
    blob = (tmp_path / "trust.safetensors").read_bytes()
    (tmp_path / "trust.safetensors").write_bytes(blob[:-8])
    with pytest.raises(ValueError, match=r"trust.safetensors is damaged"):
        WorldModel.from_pretrained(tmp_path)
    other = dreamer("SG")
    other.trust = calibrated.trust
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        WorldModel.from_pretrained(tmp_path)
    other.trust = None
    other.save_pretrained(tmp_path)
    assert WorldModel.from_pretrained(tmp_path).trust is None


def test_episodes_of_any_length_are_cut_into_windows() -> None:
    lengths = [1, 5, 64, 79, 80, 200]
    episodes = Episodes.stack((np.zeros((n + 1, 3)), np.zeros((n, 2)), np.zeros(n), np.zeros(n)) for n in lengths)
    for seed in range(20):
        windows = draw_calibration_windows(episodes, seed)
        assert len(windows.at) == 1 + 1 + 1 + 1 + 1 + 2
        assert (windows.seen - 1 <= episodes.index[windows.at]).all() and (windows.seen <= 16).all()
        assert (episodes.left[windows.at] > 0).all(), "a dream has a step to be scored on"
        last = windows.at[-2:]
        assert last[1] - windows.seen[1] >= last[0] + 16


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_dream_ends_where_its_bound_passes(calibrated: WorldModel, chunk: int) -> None:
    quiet = DreamEnv(calibrated, chunk=chunk, confidence=0.9)
    quiet.reset(seed=3)
    quiet.action_space.seed(0)
    actions = [quiet.action_space.sample() for _ in range(64 // chunk)]
    told = [quiet.step(action)[-1]["trust"] for action in actions]
    bounds = [t["error_bound"] for t in told]
    assert [t["steps"] for t in told] == list(range(chunk, 65, chunk)) and told[0]["confidence"] == 0.9
    limit = float(np.sort(bounds)[len(bounds) // 2])
    env = DreamEnv(calibrated, chunk=chunk, max_error=limit)
    env.reset(seed=3)
    for action, before in zip(actions, bounds, strict=True):
        _, _, terminated, truncated, info = env.step(action)
        if truncated:
            break
        assert not terminated and info["trust"]["error_bound"] == before <= limit
    assert truncated and info["trust"]["error_bound"] > limit
    assert chunk > 1 or info["trust"]["error_bound"] == before
    with pytest.raises(gym.error.ResetNeeded):
        env.step(actions[0])


def test_after_the_calibrated_steps_a_limited_dream_ends(calibrated: WorldModel) -> None:
    env = DreamEnv(calibrated, max_error=1e9)
    env.reset(seed=0)
    for step in range(1, 66):
        _, _, _, truncated, info = env.step(np.zeros(2, np.float32))
        assert truncated == (step == 65)
    assert info["trust"] == {"error_bound": float("inf"), "confidence": 0.9, "steps": 65}


def test_snapshots_and_forks_carry_the_doubt(calibrated: WorldModel) -> None:
    env = DreamEnv(calibrated, confidence=0.8)
    env.reset(seed=1)
    action = np.ones(2, np.float32)
    for _ in range(5):
        env.step(action)
    blob, forks = env.snapshot(), env.fork(3)
    expected = env.step(action)[-1]["trust"]
    forked = forks.step(np.stack([action] * 3))[-1]["trust"]
    assert np.allclose(forked["error_bound"], expected["error_bound"]) and forked["_error_bound"].all()
    other = DreamEnv(calibrated, confidence=0.8)
    other.restore(blob)
    assert other.step(action)[-1]["trust"] == expected
    plain = DreamEnv(calibrated)
    plain.reset(seed=1)
    with pytest.raises(ValueError, match="nobody asked"):
        other.restore(plain.snapshot())
    plain.restore(blob)
    assert "trust" not in plain.step(action)[-1]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_a_vector_of_dreams_tells_what_each_tells(calibrated: WorldModel, mode: str) -> None:
    limit = 0.4
    envs = DreamVectorEnv(calibrated, 4, max_error=limit, max_episode_steps=30, autoreset_mode=mode)
    singles = gym.vector.SyncVectorEnv(
        [lambda: DreamEnv(calibrated, max_error=limit, max_episode_steps=30)] * 4,
        autoreset_mode=gym.vector.AutoresetMode(mode),
    )
    envs.reset(seed=5), singles.reset(seed=5)
    envs.action_space.seed(0)
    for _ in range(50):
        actions = envs.action_space.sample()
        ours, theirs = envs.step(actions), singles.step(actions)
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert np.allclose(a, b, atol=1e-4)
        mask = theirs[4]["trust"]["_error_bound"] if "trust" in theirs[4] else np.zeros(4, bool)
        assert np.array_equal(ours[4]["trust"]["_error_bound"], mask)
        for name in ("error_bound", "confidence", "steps"):
            if mask.any():
                a, b = ours[4]["trust"][name], theirs[4]["trust"][name]
                assert a.dtype == b.dtype and np.allclose(a, b, rtol=1e-3)
        if mode == "Disabled" and (done := ours[2] | ours[3]).any():
            envs.reset(options={"reset_mask": done}), singles.reset(options={"reset_mask": done})


def test_stable_baselines_hears_of_it_too(calibrated: WorldModel) -> None:
    about = dict(model=calibrated, max_error=0.4, max_episode_steps=30)
    ours, theirs = DreamVecEnv(num_envs=4, **about), DummyVecEnv([lambda: DreamEnv(**about)] * 4)  # type: ignore[arg-type]
    for env in (ours, theirs):
        env.seed(5)
        env.reset()
    ours.action_space.seed(0)
    ends = 0
    for _ in range(70):
        actions = np.stack([ours.action_space.sample() for _ in range(4)])
        got, want = ours.step(actions), theirs.step(actions)
        assert np.array_equal(got[2], want[2])
        ends += got[2].sum()
        for mine, other in zip(got[3], want[3], strict=True):
            assert mine["trust"] == pytest.approx(other["trust"], rel=1e-3)
            assert mine["TimeLimit.truncated"] == other["TimeLimit.truncated"]
    assert ends > 4


def test_it_is_a_valid_environment(calibrated: WorldModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(DreamEnv(calibrated, max_error=0.5), skip_render_check=True)


def test_what_cannot_be_had_is_refused(calibrated: WorldModel) -> None:
    with pytest.raises(ValueError, match=r"not calibrated.*kairos calibrate"):
        DreamEnv(dreamer(), max_error=0.3)
    for other in ({"sampled": True}, {"flow_steps": 4}):
        with pytest.raises(ValueError, match="one Euler step"):
            DreamEnv(calibrated, max_error=0.3, **other)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_error must be a number"):
        DreamEnv(calibrated, max_error="much")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_error must be above 0"):
        DreamEnv(calibrated, max_error=0.0)
    with pytest.raises(ValueError, match="confidence"):
        DreamVectorEnv(calibrated, 2, confidence=1.0)
    envs = DreamVectorEnv(calibrated, 2, confidence=0.9)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="decode=False"):
        envs.step_torch(torch.zeros(2, 2), decode=False)
    with pytest.raises(ValueError, match="too few to calibrate"):
        calibrate_model(dreamer(), walk(dreamer(), seed=1), [walk(dreamer(), episodes=3)], ["x-v0"])


def test_coverage_counts_what_it_says(calibrated: WorldModel) -> None:
    """On fresh noise of the same kind the bound holds about as often as it should."""
    model = calibrated
    assert model.trust is not None
    dreams = dream_errors(model, draw_calibration_windows(walk(model), seed=9), model.scaling.obs_std)
    told = coverage(dreams, model.trust, (1, 8))
    assert 0.7 < told["h8"]["coverage"] <= 1 and told["h8"]["dreams"] == 40
    bound = dreams.bound(model.trust, 0.9)[:, 7]
    assert told["h8"]["coverage"] == pytest.approx((dreams.error[:, 7] <= bound).float().mean().item())
    assert told["h8"]["median"] == pytest.approx(bound.median().item())
