"""What the documentation says is true: its Python runs, its commands exist, and the API reference misses no file."""

import os
import re
import shlex
import subprocess
import sys
from functools import wraps
from pathlib import Path

import pytest
from test_house import FILES

from kairos_gym.bench import commands as benches
from kairos_gym.cli import COMMANDS, main

HOUSE = Path(__file__).parent.parent
PAGES = {str(p.relative_to(HOUSE)): p for p in (*HOUSE.glob("*.md"), *sorted((HOUSE / "docs").rglob("*.md")))}
FOLDERS = ("world_model", "planners", "envs", "kairos_gym", "docs", "tests")
OURS = [*HOUSE.glob("*"), *(path for folder in FOLDERS for path in (HOUSE / folder).rglob("*.*"))]
# A block of code: whether it is marked "no-run", its language, the file that it is to be saved as, its text.
BLOCK = re.compile(r'^(<!-- no-run -->\n+)?```(\w*)(?: title="(\S+)")?\n(.*?)^```$', re.M | re.S)
SLOW = ("docs/howto/many-dreams.md", "docs/howto/robosuite.md", "docs/tutorials/plan.md", "docs/tutorials/report.md")
NEEDS = {"docs/howto/robosuite.md": "robosuite"}


def python(page: str) -> list[re.Match[str]]:
    """The page's blocks of Python that run."""
    return [block for block in BLOCK.finditer(PAGES[page].read_text()) if block[2] == "python" and not block[1]]


def shell(page: str) -> list[list[str]]:
    """Every line ``kairos ...`` in the page's blocks of commands."""
    blocks = "".join(block[4] for block in BLOCK.finditer(PAGES[page].read_text()) if not block[2])
    lines = re.sub(r"\$\w+", "1", blocks.replace("\\\n", " ")).splitlines()  # a variable of a loop is some number
    return [shlex.split(line, comments=True) for line in map(str.strip, lines) if line.startswith("kairos ")]


def named(page: str) -> list[list[str]]:
    """Every ``kairos ...`` in the page's text, which may leave arguments out."""
    text = BLOCK.sub("", PAGES[page].read_text())
    return [code.split() for code in re.findall(r"(?<!`)`(kairos [^`]+)`(?!`)", text)]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES if python(page)],
)
def test_python_runs(page: str, tmp_path: Path) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], exc_type=ImportError)
    lines: list[str] = []  # of the page, with nothing but its code, so that errors name the page's own lines
    for block in python(page):
        if block[3]:
            (tmp_path / block[3]).write_text(block[4])
        else:
            lines += [""] * (PAGES[page].read_text().count("\n", 0, block.start(4)) - len(lines))
            lines += block[4].splitlines()
    script = tmp_path / f"{Path(page).stem.replace('-', '_')}_page.py"
    script.write_text("\n".join(lines))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(tmp_path / "data")}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [page for page in PAGES if shell(page)])
def test_commands_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for known in (COMMANDS, benches.COMMANDS):
        for name, function in list(known.items()):
            monkeypatch.setitem(known, name, wraps(function)(lambda *args, name=name, **kwargs: called.append(name)))
    for words in shell(page):
        main(words[1:])
        assert called.pop() in words


@pytest.mark.parametrize("page", [page for page in PAGES if named(page) and page != "CHANGELOG.md"])
def test_commands_in_the_text_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _, *words in named(page):
        known = benches.COMMANDS if words[0] == "bench" else COMMANDS
        name = [word for word in words[: 1 + (words[0] == "bench")] if not word.startswith("--")]
        if not name or name == ["bench"]:  # kairos bench, kairos --help
            continue
        assert name[-1] in known, f"{page} names kairos {' '.join(words)}"
        with pytest.raises(SystemExit):
            main([*name, "--help"])
        flags = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        unknown = {word for word in words if word.startswith("--")} - flags
        assert not unknown, f"{page} names kairos {' '.join(words)}, which doesn't know {unknown}"


def test_api_reference_is_whole() -> None:
    text = "".join(path.read_text() for page, path in PAGES.items() if page.startswith("docs/api/"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.M))
    left_out = ("kairos_gym.bench", "kairos_gym.cli", "kairos_gym.demo", "kairos_gym.plots", "kairos_gym.report")
    wanted = {name for name, path in FILES.items() if path.name != "__init__.py" and not name.startswith(left_out)}
    assert shown == wanted


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    if page in ("CHANGELOG.md", "docs/results.md", "docs/stable-worldmodel.md"):
        pytest.skip("it also names what was, or what others have")
    text = PAGES[page].read_text()
    sources = [text[block.start() : block.end()] for block in BLOCK.finditer(text)]
    sources += [path.read_text() for path in OURS if path.suffix in (".py", ".cpp", ".h")]
    words = {word for source in sources for word in re.findall(r"\w+", source)}
    words |= {part for path in OURS for part in (path.name, *path.name.split("."), path.parent.name)}
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", BLOCK.sub("", text)):
        if re.match(rf"({'|'.join(FOLDERS)})/[\w/.]*$", code):
            assert (HOUSE / code).exists(), f"{page} names {code}"
        elif re.fullmatch(r"[A-Za-z_][\w.]*", code) and code not in words:
            unknown = set(code.split(".")) - words
            assert not unknown, f"{page} names {code}, and there is no {unknown}"
