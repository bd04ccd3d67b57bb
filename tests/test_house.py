"""The house rules: imports run down only, in no circle, and `import kairos_gym` is light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
ROOMS = ("world_model", "planners", "envs", "kairos_gym")
CONTRACT = ("world_model.contract", "world_model.state", "world_model.spaces")
ALLOWED = {"world_model": (), "planners": CONTRACT, "envs": CONTRACT, "kairos_gym": ROOMS}
FILES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in (HOUSE / room).rglob("*.py")
}


def imports(module: str, *, deferred: bool = True) -> set[str]:
    """Our modules that ``module`` imports; without ``deferred``, only those that its own import brings along."""
    found: set[str] = set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(FILES[module].read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (up, node.module)))
            named = {f"{source}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= named or {source}
        later = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if deferred or not later:
            pending += ast.iter_child_nodes(node)
    return {name for name in found if name.split(".")[0] in ROOMS}


@pytest.mark.parametrize("module", FILES)
def test_arrows_run_down_only(module: str) -> None:
    room = module.split(".")[0]
    known = (room, *ALLOWED[room])
    up = {name for name in imports(module) if not any(name == k or name.startswith(f"{k}.") for k in known)}
    assert not up, f"{module} may import {known}, but it imports {up}"


def test_no_import_cycles() -> None:
    # Importing a name from a package's __init__ needs only what stands there by then: not an arrow to itself.
    TopologicalSorter({module: imports(module, deferred=False) - {module} for module in FILES}).prepare()


def test_import_is_light() -> None:
    heavy = {
        "envs",
        "mujoco",
        "robosuite",
        "stable_baselines3",
        "pygame",
        "matplotlib",
        "minari",
        "tensorboard",
        "tyro",
    }
    code = f"import sys, kairos_gym; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
