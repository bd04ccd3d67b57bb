"""The `kairos` command: what it prints, what it writes, and one line for a user's mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kairos_gym import load
from kairos_gym.cli import main
from kairos_gym.demo import show
from kairos_gym.plan import plan, play, play_random
from kairos_gym.report import Cell, Report, as_text
from planners import CEM

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
    for command in ("collect", "train", "plan", "compare", "demo", "info"):
        assert command in done.stdout


def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert "ship with kairos_gym" in mistake(capsys, "plan", "no such model")
    assert "ship with kairos_gym" in mistake(capsys, "demo", "--model", "no such model")
    assert "none/such-v0" in mistake(capsys, "train", "none/such-v0", "--out", str(tmp_path / "model"))
    assert "NoSuchEnv" in mistake(capsys, "collect", "NoSuchEnv-v0", "kairos/x-v0", "--steps", "5")
    assert "either steps or episodes" in mistake(capsys, "collect", "Pendulum-v1", "kairos/x-v0")


def test_record_train_compare_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    model, data = str(tmp_path / "model"), "kairos/pendulum-v0"
    main(["collect", "Pendulum-v1", data, "--episodes", "6", "--episode-steps", "40"])
    main(["train", data, "--out", model, "--draft-steps", "20", "--steps", "4", "--held-out", "2"])
    capsys.readouterr()
    main(["compare", model, data, "--horizon", "8", "--trajectories", "2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["h1", "h2", "h4", "h8"]
    assert all(np.isfinite([float(number) for number in row.split()[1:]]).all() for row in rows)
    main(["plan", model, "--episodes", "1", "--horizon", "1", "--chunk", "4", "--candidates", "2"])
    assert "Pendulum-v1" in capsys.readouterr().out.splitlines()[-1]
    card = load(model).card
    assert (card["env"], card["data"]["dataset"], card["data"]["held_out"]) == ("Pendulum-v1", data, 2)


def test_planning_on_the_truth_beats_chance() -> None:
    planner = CEM(candidates=100, elites=10, iterations=3)
    best = plan("Pendulum-v1", envs.SimulatorDynamics("Pendulum-v1"), planner, episodes=3, seed=5, progress=False)
    chance = play_random("Pendulum-v1", episodes=3, seed=5)
    assert np.array_equal([o[0] for o in best.observations], [o[0] for o in chance.observations]), "same starts"
    assert best.returns.mean() > chance.returns.mean() + 300
    assert [len(a) + 1 for a in best.actions] == [len(o) for o in best.observations] == [201] * 3
    low, high = best.interval()
    assert low <= best.returns.mean() <= high


def test_planning_in_another_simulator_is_refused() -> None:
    with pytest.raises(ValueError, match="Pendulum-v1 has an observation_space"):
        plan("Pendulum-v1", envs.SimulatorDynamics("Reacher-v5"), CEM(), progress=False)


def test_play_gives_the_planner_every_inner_step() -> None:
    seen = []

    def act(obs: np.ndarray, inner: np.ndarray | None) -> np.ndarray:
        seen.append((obs.copy(), inner))
        return np.zeros((len(obs), 3, 1))

    run = play("Pendulum-v1", act, episodes=2, seed=0)
    assert seen[0][1] is None
    for (obs, inner), end in zip(seen[1:], range(3, 201, 3), strict=True):
        assert inner is not None and inner.shape == (2, 3, 3)
        for e in range(2):
            assert np.array_equal(inner[e], run.observations[e][end - 2 : end + 1])
            assert np.array_equal(obs[e], inner[e, -1])


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
