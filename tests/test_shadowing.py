"""Whoever has an `envs` folder or a `world_model.py` of their own gets one clear error, and only then."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(script: Path) -> subprocess.CompletedProcess[str]:
    """Run a user's script from its own folder, which Python puts first on sys.path; our packages come after."""
    house = Path(__file__).parent.parent
    code = f"import sys; sys.path[:0] = [{str(script.parent)!r}]; sys.path.append({str(house)!r}); import kairos_gym"
    return subprocess.run([sys.executable, "-c", code], cwd=script.parent, capture_output=True, text=True)


@pytest.mark.parametrize("shadow", ["envs/__init__.py", "planners.py", "world_model.py"])
def test_a_shadow_is_named(tmp_path: Path, shadow: str) -> None:
    file = tmp_path / shadow
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise SystemExit('kairos_gym ran a file of the user')")
    done = run(tmp_path / "script.py")
    name = Path(shadow).parts[0].removesuffix(".py")
    *_, last = done.stderr.splitlines()
    assert last.startswith("ImportError: ") and f"package {name!r}" in last and "rename" in last
    assert str(tmp_path / Path(shadow).parts[0]) in last, "the error must name the file that is in the way"
    assert done.stderr.count("Traceback") == 1, "one error, without a chain of others"


def test_other_files_are_no_shadow(tmp_path: Path) -> None:
    (tmp_path / "environments.py").touch()
    done = run(tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
