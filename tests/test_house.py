"""The house rules: imports run down the layers, in no circle; files and functions are short; importing is light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
PACKAGES = ("world_model", "planners", "envs", "kairos_gym")
# Lowest first. A file may import files of its own layer and of the layers before it; a layer is a folder or a file.
LAYERS = (
    "world_model",  # the files that stand in the folder itself
    "world_model.ops",
    "world_model.runtime",
    "world_model.model",
    "world_model.dynamics",
    "world_model.training",
    "planners",
    "envs.robosuite",
    "envs",
    "kairos_gym.models",
    "kairos_gym.plots",
    "kairos_gym.report",
    "kairos_gym.dream",
    "kairos_gym",  # what `import kairos_gym` offers
    "kairos_gym.policies",
    "kairos_gym.data",
    "kairos_gym.evaluation",
    "kairos_gym.learning",
    "kairos_gym.bench",
    "kairos_gym.demo",
    "kairos_gym.cli",
)
# Planners and simulators know no model, only what every Dynamics offers.
CONTRACT = ("world_model.contract", "world_model.state", "world_model.spaces")
# Which layers may import a package that not everybody has, or that is slow to import.
CONFINED = {
    "mujoco": ("envs", "envs.robosuite", "kairos_gym.bench"),
    "robosuite": ("envs.robosuite",),
    "stable_baselines3": ("kairos_gym.dream", "kairos_gym.policies", "kairos_gym.learning", "kairos_gym.bench"),
    "matplotlib": (
        "kairos_gym.plots",
        "kairos_gym.report",
        "kairos_gym.evaluation",
        "kairos_gym.bench",
        "kairos_gym.demo",
    ),
    "minari": ("kairos_gym.data", "kairos_gym.learning"),
    "triton": ("world_model.ops", "envs"),
    "tyro": ("kairos_gym.cli",),
}
FILES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (HOUSE / package).rglob("*.py")
}


def imports(module: str) -> set[str]:
    """The modules that ``module`` imports anywhere, also inside functions: ours as they are, of others the package."""
    found: set[str] = set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (up, node.module)))
            found |= ({f"{source}.{alias.name}" for alias in node.names} & FILES.keys()) or {source}
    return {name if name.split(".")[0] in PACKAGES else name.split(".")[0] for name in found}


def layer(module: str) -> int:
    """The number of the layer that a module of ours belongs to: that of the longest name that fits."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in LAYERS:
            return LAYERS.index(name)
    raise AssertionError(f"{module} belongs to no layer: add it to LAYERS")


@pytest.mark.parametrize("module", FILES)
def test_imports_run_down_only(module: str) -> None:
    ours = {name for name in imports(module) if name.split(".")[0] in PACKAGES}
    up = {name for name in ours if layer(name) > layer(module)}
    assert not up, f"{module} is below {up}"
    package = module.split(".")[0]
    if package in ("planners", "envs"):
        others = {name for name in ours if name.split(".")[0] != package and name not in CONTRACT}
        assert not others, f"{package} may import {CONTRACT} of our other packages, but {module} imports {others}"


def test_no_import_cycles() -> None:
    # A package's __init__ and its own files need each other by design: Python loads the package first.
    graph = {module: {name for name in imports(module) if name in FILES and name != module} for module in FILES}
    for module, path in FILES.items():
        if path.name == "__init__.py":
            for name in FILES:
                if name.startswith(f"{module}."):
                    graph[name].discard(module)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("package", CONFINED)
def test_other_packages_stay_where_they_are_needed(package: str) -> None:
    users = {module for module in FILES if package in imports(module)}
    outside = {module for module in users if LAYERS[layer(module)] not in CONFINED[package]}
    assert users and not outside, f"{package} is imported by {outside}"


def test_files_and_functions_are_short() -> None:
    long = {module for module, path in FILES.items() if len(path.read_text().splitlines()) > 400}
    assert not long, f"over 400 lines: {long}"
    kernels = {path.name for path in (HOUSE / "world_model/ops/cpp").iterdir()}
    assert not {name for name in kernels if len((HOUSE / "world_model/ops/cpp" / name).read_text().splitlines()) > 520}
    functions = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: lines for name, lines in functions.items() if lines > 60}


def test_import_is_light() -> None:
    heavy = {"envs", "pygame", "tensorboard", *CONFINED} - {"triton"}
    code = f"import sys, kairos_gym; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
