"""The `kairos` command: what it prints, what it writes, and one line for a user's mistake."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from kairos_gym import load
from kairos_gym.bench.planners import Setting
from kairos_gym.cli import main
from kairos_gym.data.collect import collect
from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.demo import show
from kairos_gym.evaluation.control import evaluate_planner, play_episodes, play_random
from kairos_gym.evaluation.open_loop import score
from kairos_gym.learning.train_config import TrainConfig
from kairos_gym.policies.ladder import scripted_policies, trained_policies
from kairos_gym.report import Cell, Report, as_text
from planners import CEM
from world_model.model.world_model import WorldModel

envs = pytest.importorskip("envs")


def mistake(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("kairos: ") and said.count("\n") == 1, said
    return said


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kairos_gym.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("collect", "train", "score", "calibrate", "compare", "plan", "demo", "info"):
        assert command in done.stdout


def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert "ship with kairos_gym" in mistake(capsys, "plan", "no such model")
    assert "ship with kairos_gym" in mistake(capsys, "demo", "--model", "no such model")
    assert "kairos collect SIMULATOR none/such-v0" in mistake(capsys, "train", "none/such-v0", str(tmp_path / "model"))
    assert "NoSuchEnv" in mistake(capsys, "collect", "NoSuchEnv-v0", "kairos/x-v0", "--steps", "5")
    assert "either steps or episodes" in mistake(capsys, "collect", "Pendulum-v1", "kairos/x-v0")
    assert "at least 2 candidates" in mistake(capsys, "plan", "pendulum", "--candidates", "1")
    assert "episodes must be at least 1" in mistake(capsys, "plan", "pendulum", "--episodes", "0")
    assert "2**31" in mistake(capsys, "plan", "pendulum", "--seed", str(2**70))
    main(["collect", "Pendulum-v1", "kairos/x-v0", "--episodes", "2"])
    capsys.readouterr()
    train = ("train", "kairos/x-v0", str(tmp_path / "model"), "--held-out")
    assert "held_out=2" in mistake(capsys, *train, "2")
    assert "held_out=-1" in mistake(capsys, *train, "-1")
    assert "draft_steps must be" in mistake(capsys, *train, "1", "--draft-steps", "-1")
    assert "steps must be" in mistake(capsys, *train, "1", "--steps", "-1")
    assert "seed" in mistake(capsys, *train, "1", "--seed", str(2**40))
    (tmp_path / "file").touch()
    assert "is a file" in mistake(capsys, "train", "kairos/x-v0", str(tmp_path / "file"), "--held-out", "1")
    assert not (tmp_path / "model").exists()
    assert "horizon must be at least 1" in mistake(capsys, "score", "pendulum", "kairos/x-v0", "--horizon", "0")
    assert "trajectories must be" in mistake(capsys, "score", "pendulum", "kairos/x-v0", "--trajectories", "0")
    said = mistake(capsys, "score", "reacher", "kairos/x-v0")
    assert "model 'reacher' dreams Reacher-v5, but dataset kairos/x-v0 was recorded in Pendulum-v1" in said


def test_collecting_what_another_process_collects_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    part = tmp_path / ".busy-v0.part"
    part.mkdir()
    with open(part / "episodes.journal", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in mistake(capsys, "collect", "Pendulum-v1", "busy-v0", "--episodes", "1")


def test_record_train_score_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    model, data = str(tmp_path / "model"), "kairos/pendulum-v0"
    main(["collect", "Pendulum-v1", data, "--episodes", "6", "--episode-steps", "40"])
    main(["train", data, model, "--draft-steps", "20", "--steps", "4", "--held-out", "2"])
    hint = capsys.readouterr().out.splitlines()[-1].partition("kairos ")[2].split()
    assert hint == ["score", model, data, "--horizon", "8"]
    main(hint)
    *rows, _, scored = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["h1", "h2", "h4", "h8"] and scored.startswith("2 episodes of")
    assert "can't be scored" in mistake(capsys, *hint, "--trajectories", "3")
    assert all(np.isfinite([float(number) for number in row.split()[1:]]).all() for row in rows)
    main(["plan", model, "--episodes", "1", "--horizon", "1", "--chunk", "4", "--candidates", "2"])
    assert "Pendulum-v1" in capsys.readouterr().out.splitlines()[-1]
    card = load(model).card
    assert (card["env"], card["data"]["dataset"], card["data"]["held_out"]) == ("Pendulum-v1", data, 2)
    assert card["time_limit"] == 200, "the simulator's own, not that of the recording"
    measured = score(model, data, horizon=8).table()
    assert set(measured) == {"h1", "h8"} and card["errors"]["held_out"] == measured


SLIDE = """
import gymnasium as gym, numpy as np

class Slide(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    dt = 0.25

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1, 2)
        return self.x, {}

    def step(self, action):
        self.x = 0.9 * self.x + 0.1 * action
        return self.x, -abs(self.x[0]), False, False, {}

gym.register("Slide-v0", "myenv:Slide")
"""


def test_a_simulator_of_ones_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "myenv.py").write_text(SLIDE)
    record = ("collect", "myenv:Slide-v0", "own/col-v0", "--episodes", "3")
    assert "--episode-steps" in mistake(capsys, *record)
    main([*record, "--episode-steps", "20"])

    def trained(name: str) -> WorldModel:
        main(["train", "own/col-v0", str(tmp_path / name), "--draft-steps", "4", "--steps", "2", "--held-out", "1"])
        return load(tmp_path / name)

    # In a new process nothing is registered before the module is imported again.
    monkeypatch.delitem(sys.modules, "myenv")
    monkeypatch.delitem(gym.registry, "Slide-v0")
    model = trained("made")
    assert (model.spec.dt, model.card["env"], model.card["time_limit"]) == (0.25, "myenv:Slide-v0", None)
    capsys.readouterr()

    (tmp_path / "myenv.py").unlink()
    monkeypatch.delitem(sys.modules, "myenv")
    monkeypatch.delitem(gym.registry, "Slide-v0")
    model = trained("not made")
    assert model.spec.dt == 1.0 and model.spec.observation_box.high.tolist() == [9, 9]
    said = [line for line in capsys.readouterr().err.splitlines() if "can't be made" in line]
    assert len(said) == 1 and "own/col-v0" in said[0]


def test_a_finished_training_whose_errors_were_lost_measures_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kairos_gym.learning import train as training

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    collect("Pendulum-v1", "a-v0", CollectConfig(seed=0, episodes=3, episode_steps=30), progress=False)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def run() -> WorldModel:
        return training.train("a-v0", tmp_path / "m", TrainConfig(draft_steps=2, steps=2, held_out=1), progress=False)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "open_loop", killed)
        run()
    card = load(tmp_path / "m").card
    assert (card["env"], card["time_limit"], card["data"]["held_out"]) == ("Pendulum-v1", 200, 1)
    assert "errors" not in card
    assert set(run().card["errors"]["held_out"]) == {"h1", "h8"}
    assert load(tmp_path / "m").card["errors"]["held_out"]["h8"]["rms"] > 0


def test_planning_on_the_truth_beats_chance() -> None:
    planner = CEM(candidates=100, elites=10, iterations=3)
    best = evaluate_planner(
        "Pendulum-v1", envs.SimulatorDynamics("Pendulum-v1"), planner, episodes=3, seed=5, progress=False
    )
    chance = play_random("Pendulum-v1", episodes=3, seed=5)
    assert np.array_equal([o[0] for o in best.observations], [o[0] for o in chance.observations]), "same starts"
    assert best.returns.mean() > chance.returns.mean() + 300
    assert [len(a) + 1 for a in best.actions] == [len(o) for o in best.observations] == [201] * 3
    low, high = best.interval()
    assert low <= best.returns.mean() <= high


def test_planning_in_another_simulator_is_refused() -> None:
    with pytest.raises(ValueError, match="Pendulum-v1 has an observation_space"):
        evaluate_planner("Pendulum-v1", envs.SimulatorDynamics("Reacher-v5"), CEM(), progress=False)
    narrow = envs.SimulatorDynamics("Pendulum-v1")
    narrow.spec = replace(narrow.spec, action_space=spaces.Box(-1, 1, (1,), np.float32))
    with pytest.raises(ValueError, match="Pendulum-v1 has an action_space"):
        evaluate_planner("Pendulum-v1", narrow, CEM(), progress=False)


def test_play_gives_the_planner_every_inner_step() -> None:
    seen = []

    def act(obs: np.ndarray, inner: np.ndarray | None) -> np.ndarray:
        seen.append((obs.copy(), inner))
        return np.zeros((len(obs), 3, 1))

    run = play_episodes("Pendulum-v1", act, episodes=2, seed=0)
    assert seen[0][1] is None
    for (obs, inner), end in zip(seen[1:], range(3, 201, 3), strict=True):
        assert inner is not None and inner.shape == (2, 3, 3)
        for e in range(2):
            assert np.array_equal(inner[e], run.observations[e][end - 2 : end + 1])
            assert np.array_equal(obs[e], inner[e, -1])


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kairos_gym.bench.env.SIZES", {1: 2, 3: 2})
    main(["bench", "env"])
    said = capsys.readouterr().out
    assert "DreamVectorEnv.step" in said and (tmp_path / "reports" / "bench.jsonl").read_text().count("\n") == 1
    main(["bench", "endurance", "--model", "pendulum", "--dreams", "2", "--steps", "50"])
    row = json.loads(capsys.readouterr().out)
    assert row["state_bytes"][0] == row["state_bytes"][1] > 0 and row["finite"]
    (one,) = row["one_dream_after_frames"]
    assert one["frames"] == 100
    assert one["bytes"]["full attention"] == 2 * 2 * 100 * 2 * 64 * 4  # layers, keys and values, frames, tokens, floats


@pytest.mark.slow
def test_bench_planners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kairos_gym.bench.planners.SETTINGS", {"reacher": Setting(2, 4, candidates=16)})
    main(["bench", "planners", "--tasks", "reacher", "--episodes", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("reacher ") for line in lines) == 8
    rows = json.loads((tmp_path / "reports" / "bench.jsonl").read_text())["rows"]
    spent = {(row["planner"], row["dynamics"]): row["evaluations"] for row in rows}
    assert ("gradient", "truth") not in spent and spent["iCEM, half", "dream"] <= 24 and spent["iCEM", "dream"] <= 48
    assert spent["random shooting", "dream"] == spent["gradient", "dream"] == spent["CEM", "truth"] - 1 == 48
    returns = {(row["planner"], row["dynamics"]): row["returns"] for row in rows}
    np.testing.assert_allclose(returns["CEM", "dream"], returns["CEM", "truth"], rtol=0.3)
    assert "no task pong; there are reacher" in mistake(capsys, "bench", "planners", "--tasks", "pong")
    main(["bench", "together", "--batch", "3", "--sizes", "4", "--rounds", "1"])
    assert json.loads((tmp_path / "reports" / "bench.jsonl").read_text().splitlines()[1])["rows"][0]["share"] > 0


def test_bench_pessimism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr("kairos_gym.bench.pessimism.UPDATES", {"draft_steps": 20, "steps": 5})
    monkeypatch.setattr("kairos_gym.bench.pessimism.LASTS", {"pendulum": 6})
    collect("Pendulum-v1", "pendulum/train-v0", CollectConfig(seed=0, episodes=18, episode_steps=200))
    few = ["bench", "pessimism", "--task", "pendulum", "--episodes-of-data", "2", "--episodes", "2", "--penalties", "0"]
    main(few)
    plain, same, _ = json.loads(capsys.readouterr().out)["rows"]
    assert same["mean"] == plain["mean"] and same["difference"] == 0
    assert "18 episodes" in mistake(capsys, *few, "--seed", "1")


@pytest.mark.slow
def test_learn_loop_and_their_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["learn", "pendulum", "learned", "--steps", "1280"])
    said = capsys.readouterr().out
    assert "imagined return" in said and "learned/best.zip" in said
    quick = ["--round-steps", "50", "--draft-steps", "20", "--memory-steps", "2", "--updates", "1", "--dreams", "8"]
    loop = ["loop", "Pendulum-v1", "looped", "--samples", "150", *quick]
    main(loop)
    assert "looped/best.zip" in capsys.readouterr().out
    assert "dreams 8, not 16" in mistake(capsys, *loop[:-1], "16")
    for way in ("sb3", "dream"):
        # The target is reached at once: one round is enough to see that a row comes out of it.
        main(["bench", "learning", "--task", "Pendulum-v1", "--way", way, "--samples", "500", "--target", "-1e9"])
    capsys.readouterr()
    main(["bench", "learned", "--out", "learning.png"])
    lines = capsys.readouterr().out.splitlines()
    told = [line.split("  ") for line in lines[2:]]
    assert [[cell.strip() for cell in cells if cell][1:4] for cells in told] == [
        ["dream, until -1e+09", "500", "1"],
        ["sb3", "500", "1"],
        ["sb3", "5,000", "1"],
    ]
    assert (tmp_path / "learning.png").stat().st_size > 1000


def test_the_demo_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The true simulator stands for a perfect dream, so the page must say that both plan alike and dream without error.
    truth = envs.SimulatorDynamics("Pendulum-v1")
    path = show(truth, "Pendulum-v1", command="kairos demo <b>", episodes=2, seed=3, out=tmp_path / "new" / "page.html")
    page, said = path.read_text(), capsys.readouterr().out
    assert str(path) in said
    dream, real = (said.split(f"in the {where} ")[1].split()[:4] for where in ("dream", "simulator"))
    assert dream == real and f"<td>{dream[0]}</td>" in page
    assert page.count("<svg") == 3 and "kairos demo &lt;b&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page.replace('xlink:href="#', "")), "the page loads nothing"


def test_tables_escape_and_align(tmp_path: Path) -> None:
    columns: list[str] = ["name", "value"]
    rows: list[list[Cell]] = [["a<b", 0.123456], ["c", 12]]
    page = Report("x & y", "make it").text("1 < 2").table(columns, rows).write(tmp_path / "page.html").read_text()
    assert "x &amp; y" in page and "1 &lt; 2" in page and "<td>a&lt;b</td><td>0.1235</td>" in page
    assert as_text(columns, rows).splitlines() == ["name   value", "------------", "a<b   0.1235", "c         12"]


def test_calibrate_and_compare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    space = gym.make("Pendulum-v1").action_space
    few = scripted_policies(space) + trained_policies("Pendulum-v1", tmp_path / "policies", steps=64, progress=False)
    monkeypatch.setattr("kairos_gym.evaluation.compare.ladder", lambda env_id, **_: few)
    main(["collect", "Pendulum-v1", "kairos/train-v0", "--episodes", "6", "--episode-steps", "40"])
    main(["collect", "Pendulum-v1", "kairos/more-v0", "--episodes", "40", "--episode-steps", "30", "--seed", "1"])
    main(["train", "kairos/train-v0", "model", "--draft-steps", "20", "--steps", "4", "--held-out", "2"])
    capsys.readouterr()
    assert load("model").trust is None, "two episodes are too few"
    assert "too few to calibrate" in mistake(capsys, "calibrate", "model", "kairos/train-v0")
    main(["calibrate", "model", "kairos/more-v0"])
    assert "Calibrated on 20 dreams of 1 step, " in capsys.readouterr().out
    main(["collect", "Pendulum-v1", "kairos/third-v0", "--episodes", "40", "--episode-steps", "30", "--seed", "2"])
    capsys.readouterr()
    main(["calibrate", "model", "kairos/more-v0", "kairos/third-v0"])
    assert "Calibrated on 40 dreams of 1 step, " in capsys.readouterr().out
    assert load("model").card["trust"]["calibrated_on"] == ["kairos/more-v0", "kairos/third-v0"]
    main(["collect", "Pendulum-v1", "kairos/again-v0", "--episodes", "6", "--episode-steps", "40"])
    capsys.readouterr()
    said = mistake(capsys, "calibrate", "model", "kairos/more-v0", "kairos/again-v0")
    assert "4 episodes of kairos/again-v0 are in the model's training data" in said
    assert "not a folder" in mistake(capsys, "calibrate", "pendulum", "kairos/more-v0")
    assert "was recorded in Pendulum-v1" in mistake(
        capsys, "calibrate", "reacher", "kairos/more-v0", "--out", "elsewhere"
    )
    quick = ("--episodes", "2", "--horizon", "8", "--context", "2", "--episode-steps", "12", "--no-references")
    own = f"sac:{tmp_path / 'policies' / 'sac-0-16.zip'}"
    main(["compare", "--model", "model", *quick, "--policies", own])
    said = capsys.readouterr().out
    assert "over 11 policies" in said and "The report: " in said
    folder = tmp_path / "reports" / "model-Pendulum-v1"
    numbers = json.loads((folder / "comparison.json").read_text())
    assert numbers["settings"]["time_limit"] == 12 and "sac-0-16" in numbers["policies"]
    assert set(numbers["trust"]) == {"all", *numbers["policies"]}
    assert "no function" in mistake(capsys, "compare", "--model", "model", "--success", "os:nothing")
    assert "algorithm:path" in mistake(capsys, "compare", "--model", "model", "--policies", "x.zip")
    assert "is it its simulator" in mistake(capsys, "compare", "--model", "model", "--env", "Reacher-v5", *quick)
