"""The notebooks run from top to bottom in a fresh namespace, are saved without outputs, and leave nothing behind."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ["imagined_against_simulated", "plan_in_the_dream", "train_in_the_dream"]


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]


def trained(found: dict[str, Any]) -> None:
    for policy in ("played", "looped"):  # random actions earn about -1200
        assert found[policy].returns.mean() > -600
    assert found["rows"][-1]["steps"] <= 400


def planned(found: dict[str, Any]) -> None:
    dream, truth = (found["played"][f"CEM, {where}"].returns for where in ("in the dream", "on the simulator"))
    assert abs(dream - truth).max() < 1 and dream.mean() > found["chance"].mean() + 20
    reached = [np.linalg.norm(found[path][-1, 8:10]) for path in ("free", "kept")]
    assert max(reached) < 0.05
    inside = [
        np.linalg.norm(found["tip"](found[path]) - found["middle"], axis=1).min() < found["radius"]
        for path in ("free", "kept")
    ]
    assert inside == [True, False]


def compared(found: dict[str, Any]) -> None:
    held = {name: (errors <= bounds).mean() for name, (errors, bounds) in found["measured"].items()}
    assert min(held["uniform"], held["held"]) > 0.7
    assert np.median(found["measured"]["sine"][0][0]) > 1  # as the notebook says: lost from the first step on
    for _, numbers in found["compared"].values():
        told = numbers["agreement"]["the model"]
        assert told["chosen"] == told["best"]


SHOWN: dict[str, Callable[[dict[str, Any]], None]] = dict(zip(NAMES, (compared, planned, trained), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    for folder in (work, temporary):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = sorted(FOLDER.iterdir())
    found: dict[str, Any] = {}
    try:
        for n, cell in enumerate(cells(name)):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}, cell {n}", "exec"), found)
        assert plt.get_fignums()
    finally:
        plt.close("all")
    SHOWN[name](found)
    assert list(work.iterdir()) == []
    assert list(temporary.glob("tmp*")) == []  # but torch and Stable-Baselines3 keep caches and logs there
    assert sorted(FOLDER.iterdir()) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_saved_without_outputs(name: str) -> None:
    for cell in cells(name):
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_these_are_all_notebooks() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
