"""Imagined against simulated: the truth is found perfect, the broken broken, and what would deceive is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from envs import SimulatorDynamics
from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.data.training_data import TrainingData, load_training_data
from kairos_gym.evaluation import page as comparison_page
from kairos_gym.evaluation.compare import compare, expect_unseen
from kairos_gym.evaluation.compare_config import CompareConfig
from kairos_gym.evaluation.comparison import MODEL, SHUFFLED, Comparison
from kairos_gym.evaluation.rollouts import play_real
from kairos_gym.learning.train import train
from kairos_gym.learning.train_config import TrainConfig
from kairos_gym.policies.ladder import Policy, scripted_policies
from world_model.contract import Imagined
from world_model.episodes import Episodes
from world_model.state import LatentState

QUICK: dict[str, Any] = dict(episodes=3, horizon=12, context=4, episode_steps=30, references=False)


def quick(model: Any, env_id: str | None = None, **options: Any) -> Comparison:
    """``compare`` without progress; ``options`` are its own and those of ``CompareConfig``, else those of QUICK."""
    config = {key: options.pop(key) for key in list(options) if key in CompareConfig.__annotations__}
    return compare(model, CompareConfig(**QUICK | config), env_id=env_id, progress=False, **options)


def policies(env_id: str) -> list[Policy]:
    space = gym.make(env_id).action_space
    assert isinstance(space, gym.spaces.Box)
    still, uniform, held, sine = scripted_policies(space)
    gentle = Policy("gentle", lambda obs, step, seeds: 0.3 * uniform.act(obs, step, seeds))
    return [still, uniform, held, sine, gentle]


class Shuffled(SimulatorDynamics):
    """The simulator, but each row plays what its neighbour should."""

    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        return super().imagine(state, actions.roll(1, 0), decode=decode)


@pytest.fixture(scope="module")
def truth() -> Comparison:
    return quick(SimulatorDynamics("Pendulum-v1"), "Pendulum-v1", policies=policies("Pendulum-v1"))


@pytest.fixture(scope="module")
def broken() -> Comparison:
    return quick(Shuffled("Pendulum-v1"), "Pendulum-v1", policies=policies("Pendulum-v1"))


def perfect(found: Comparison) -> None:
    numbers = found.numbers()
    assert all(row["rms"] < 1e-6 for row in numbers["error_by_horizon"][MODEL].values())
    assert max(max(row) for row in numbers["drift"].values()) < 1e-6
    told = numbers["agreement"][MODEL]
    assert told["pearson"][0] == pytest.approx(1) and told["spearman"][0] == pytest.approx(1)
    assert told["regret"][0] == 0 and told["chosen"] == told["best"]
    assert np.allclose(found.results[MODEL].returns, found.rollouts.result.returns, rtol=1e-5)
    assert numbers["steps_within"][MODEL] == {"0.1": 12, "0.3": 12}


def test_the_simulator_itself_is_perfect(truth: Comparison) -> None:
    perfect(truth)
    assert truth.numbers()["error_by_horizon"][SHUFFLED]["8"]["median"] > 0.05


def test_the_simulator_itself_is_perfect_where_its_state_is_hidden() -> None:
    """From Pusher's observation its state can't be told: the exact state must be used. Its ends are real."""
    perfect(quick(SimulatorDynamics("Pusher-v5"), "Pusher-v5", policies=policies("Pusher-v5")))


def test_ends_are_counted() -> None:
    found = quick(
        SimulatorDynamics("InvertedPendulum-v5"),
        "InvertedPendulum-v5",
        policies=policies("InvertedPendulum-v5"),
    )
    perfect(found)
    ends = found.ends
    assert ends.both > 0 and ends.only_simulated == ends.only_dreamed == 0 and ends.steps_apart == 0
    assert ends.both + ends.neither == len(found.windows.at) == 15
    assert (found.rollouts.result.steps < 30).any(), "and the pole fell in the closed loop too"


def test_a_broken_model_is_found_broken(broken: Comparison) -> None:
    numbers = broken.numbers()
    errors = numbers["error_by_horizon"]
    assert errors[MODEL]["8"]["median"] > 0.05
    assert 0.3 < errors[MODEL]["8"]["median"] / errors[SHUFFLED]["8"]["median"] < 3
    assert any("be warned" in sentence for sentence in comparison_page.summarise(numbers))
    assert numbers["agreement"][MODEL]["pearson"][0] < 0.9


def test_the_simulator_a_little_off_orders_itself(truth: Comparison, broken: Comparison) -> None:
    by_start = [truth.errors[f"simulator, {off:g} std off"].nrmse(4).median() for off in (1e-5, 1e-3, 1e-1)]
    assert 0 < by_start[0] < by_start[1] < by_start[2]
    near = replace(truth, errors={**truth.errors, MODEL: truth.errors["simulator, 0.001 std off"]})
    assert near.equivalent_perturbation(4) == pytest.approx(1e-3, rel=1e-6)
    assert np.isnan(truth.equivalent_perturbation(4) or 0), "the truth is nearer than any of these starts"


def test_the_report_holds_it_all(broken: Comparison, tmp_path: Path) -> None:
    path = comparison_page.write_report(broken, tmp_path / "report", "kairos compare --test")
    text = path.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text, "it needs no network"
    for heading in ("Error by horizon", "For which policies", "Where it lies", "Rewards and ends", "Speed and memory"):
        assert f"<h2>{heading}</h2>" in text
    assert "kairos compare --test" in text and "data:image/webp;base64" in text, "Pendulum can be drawn"
    numbers = json.loads((path.parent / "comparison.json").read_text())
    assert numbers == json.loads(json.dumps(broken.numbers()))
    assert numbers["policies"]["gentle"]["simulated"]["return"] == pytest.approx(
        broken.rollouts.result.returns[4].mean()
    )
    logs = EventAccumulator(str(path.parent / "logs"))
    logs.Reload()
    scalars = logs.Scalars(f"median error/{MODEL}")
    assert len(scalars) == 12 and scalars[3].value == pytest.approx(broken.errors[MODEL].nrmse(4).median().item())


class Lost(SimulatorDynamics):
    """Every dream is no number from the first step on, and every step pays the same."""

    def imagine(self, state: LatentState, actions: Tensor, *, decode: bool = True) -> tuple[LatentState, Imagined]:
        after, imagined = super().imagine(state, actions, decode=decode)
        assert imagined.obs is not None
        return after, imagined._replace(obs=imagined.obs * float("nan"))


def test_dreams_that_are_lost_are_reported_as_infinitely_wrong(tmp_path: Path) -> None:
    found = quick(Lost("Pendulum-v1"), "Pendulum-v1", policies=policies("Pendulum-v1"))
    assert found.errors[MODEL].nrmse(1).isinf().all() and found.results[MODEL].diverged.all()
    assert "dreams turned non-finite" in comparison_page.write_report(found, tmp_path, "x").read_text()


def test_episodes_shorter_than_the_horizon_still_make_a_page(tmp_path: Path) -> None:
    env_id = "InvertedPendulum-v5"
    found = quick(SimulatorDynamics(env_id), env_id, policies=policies(env_id), horizon=60)
    assert not len(found.errors[MODEL].nrmse(60))
    assert "Error by horizon" in comparison_page.write_report(found, tmp_path, "x").read_text()


def upright(obs: Any) -> Any:
    return obs[:, 0] > 0.5


def test_starts_that_are_solved_are_refused_and_success_is_timed() -> None:
    found = quick(
        SimulatorDynamics("Pendulum-v1"),
        "Pendulum-v1",
        policies=policies("Pendulum-v1"),
        success_fn=upright,
        episodes=12,
    )
    starts = found.rollouts.episodes.obs[found.rollouts.starts[0]]
    assert not upright(starts.numpy()).any() and found.rollouts.rejected > 0
    assert len(set(found.rollouts.seeds.tolist())) == 12
    real, dreamed = found.rollouts.result.success, found.results[MODEL].success
    assert real is not None and dreamed is not None and np.array_equal(real, dreamed)
    assert np.isfinite(real).any() and real.min() >= 1
    numbers = found.numbers()
    said = numbers["policies"]["uniform"]["simulated"]
    assert said["success"] == pytest.approx(np.isfinite(real[1]).mean())
    # Pendulum pays most where it is upright, and the truth foresees that exactly.
    h = max(numbers["success_auc"], key=int)
    predicted = numbers["success_auc"][h]
    windows = found.windows
    began = upright(windows.episodes.obs[windows.at].numpy())
    assert (
        predicted["solved"]
        == upright(windows.recorded.obs.numpy().reshape(-1, 3)).reshape(len(began), -1).any(1)[~began].sum()
    )
    assert predicted["solved"] + predicted["not"] == (~began).sum()
    assert predicted["auc"] > 0.9
    with pytest.raises(ValueError, match="begin already solved"):
        play_real("Pendulum-v1", policies("Pendulum-v1"), episodes=2, seed=0, success_fn=lambda obs: obs[:, 0] < 2)
    with pytest.raises(ValueError, match="success_fn must return bool"):
        play_real("Pendulum-v1", policies("Pendulum-v1"), episodes=2, seed=0, success_fn=lambda obs: obs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model trained for no time at all on experience that it may be compared on."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "data"))
        collect("Pendulum-v1", "pp/train-v0", CollectConfig(seed=0, episodes=6, episode_steps=40), progress=False)
        train("pp/train-v0", folder / "model", TrainConfig(held_out=2, draft_steps=20, steps=4), progress=False)
        yield folder / "model"


def test_references_know_the_same_data(trained: Path) -> None:
    found = quick(trained, policies=policies("Pendulum-v1"), references=True)
    for name in ("nothing moves", "linear", "PETS ensemble"):
        assert name in found.errors and name in found.results
    assert found.numbers()["settings"]["references_fitted_on"] == "pp/train-v0"
    assert found.memory and found.numbers()["memory"]["1"]["violations"] == 0
    assert found.trust is None and "was not calibrated" in "".join(
        comparison_page.build_report(found, found.numbers(), "x")._parts
    )


def test_evaluation_on_training_episodes_is_refused(trained: Path) -> None:
    """Episodes of the very seeds and dice that were recorded."""
    rng = np.random.default_rng([0, 0])
    seed = int(rng.integers(2**31))  # as collect draws it
    space = gym.make("Pendulum-v1").action_space
    data = load_training_data(json.loads((trained / "card.json").read_text())).episodes
    played = data.action[1:41].numpy()
    copy = Policy("copy", lambda obs, step, seeds: np.repeat(played[min(step, 39)][None], len(seeds), 0))
    assert isinstance(space, gym.spaces.Box)
    about: dict[str, Any] = {"seed": seed, "policies": [copy, *scripted_policies(space)]}
    with pytest.raises(ValueError, match=r"steps of the evaluation are in the training data pp/train-v0"):
        quick(trained, **about, references=True)
    with pytest.raises(ValueError, match=r"evaluation episodes \[0\] begin where training episodes did"):
        quick(trained, **about)


def test_a_cycle_that_training_saw_makes_no_episode_known() -> None:
    """One step in a hundred of an episode may be known, since a policy may end in a cycle; more may not."""
    rng = np.random.default_rng(0)

    def episode(obs: Any, action: Any) -> Episodes:
        return Episodes.stack([(obs, action, np.zeros(len(action)), np.zeros(len(action)))])

    obs, action = rng.normal(size=(401, 2)), rng.normal(size=(400, 1))
    rollouts: Any = SimpleNamespace(episodes=episode(obs, action))
    for known, refused in ((4, False), (5, True)):
        seen = TrainingData("some/train-v0", episode(obs[300 : 301 + known], action[300 : 300 + known]), True)
        if refused:
            with pytest.raises(ValueError, match=r"5 steps of the evaluation are in .* the first in episode 0"):
                expect_unseen(seen, object(), rollouts)
        else:
            expect_unseen(seen, object(), rollouts)


def test_lost_training_data_are_recorded_again_or_missed(trained: Path, tmp_path: Path) -> None:
    card = json.loads((trained / "card.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        again = load_training_data(card)
        assert again.same and again.episodes.fingerprint() == card["data"]["fingerprint"]
        card["data"]["fingerprint"] = "another"
        with pytest.raises(ValueError, match="holds other episodes"):
            load_training_data(card)
        patch.setattr("kairos_gym.data.actors.ladder", lambda env_id, **_: policies(env_id))
        card["data"] |= {"behaviour": "ladder", "policy_seed": 0, "dataset": "pp/ladder-v0"}
        assert not load_training_data(card).same, (
            "trained policies are others on another machine, the recipe is the same"
        )
        card["data"]["seed"] += 1
        with pytest.raises(ValueError, match="holds other episodes"):
            load_training_data(card)
        with pytest.raises(FileNotFoundError, match="no dataset theirs/x-v0"):
            load_training_data({"data": {"dataset": "theirs/x-v0", "held_out": 0}})
    with pytest.raises(ValueError, match="doesn't say what it was trained on"):
        load_training_data({})


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"horizon": 0}, "horizon and context must be"),
        ({"episodes": 1}, "episodes 2"),
        ({"chunk": 9}, "chunk must be 1 to 8"),
        ({"env_id": "Reacher-v5"}, "is it its simulator"),
        ({"env_id": None}, "names no simulator"),
        ({"episode_steps": 0}, "1 step or more"),
        ({"policies": policies("Pendulum-v1")[:2]}, "3 policies or more"),
        ({"policies": policies("Pendulum-v1")[:1] * 3}, "of different names"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], what: str) -> None:
    about = {"env_id": "Pendulum-v1", "policies": policies("Pendulum-v1"), **wrong}
    with pytest.raises(ValueError, match=what):
        quick(SimulatorDynamics("Pendulum-v1"), **about)
