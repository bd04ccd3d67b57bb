"""A wheel holds all that the package needs: installed far from the repository, it dreams and runs the demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
DREAM = """
import gymnasium as gym, kairos_gym, kairos_gym.learning.recipes, envs, planners, world_model.training.fit
from world_model.ops.native import library
assert "site-packages" in kairos_gym.__file__ and kairos_gym.__file__.startswith({prefix!r}), kairos_gym.__file__
library("dream")
env = gym.make("kairos_gym/Dream-v0", model="pendulum", chunk=2)
env.reset(seed=0)
print("dreamed", env.step(env.action_space.sample())[1] < 0)
"""


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new environment with the wheel in it; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves folders behind
    shutil.copytree(
        HOUSE, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "reports", "site")
    )
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    (site,) = (folder / "venv").rglob("site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.mark.slow
def test_a_wheel_is_whole(installed: Path) -> None:
    (wheel,) = installed.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("kairos_gym-")}
    ours = ("kairos_gym", "planners", "envs", "world_model")
    kinds = {".py", ".cpp", ".h", ".json", ".safetensors", ".typed"}
    wanted = {
        str(path.relative_to(HOUSE))
        for package in ours
        for path in (HOUSE / package).rglob("*")
        if path.suffix in kinds
    }
    assert names == wanted


@pytest.mark.slow
def test_it_dreams_and_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    prefix = str(installed / "venv")
    assert "dreamed True" in run(installed / "venv/bin/python", "-c", DREAM.format(prefix=prefix), cwd=tmp_path)
    page = tmp_path / "demo.html"
    run(installed / "venv/bin/kairos", "demo", "--episodes", "1", "--out", page, cwd=tmp_path)
    assert "Planning inside a dream of Reacher-v5" in page.read_text()
