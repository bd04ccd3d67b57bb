"""Builds and loads the C++ kernels of ``cpp/``: compiled on first use and cached."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
FOLDER = Path(__file__).with_name("cpp")


class KernelUnavailable(RuntimeError):
    """The C++ kernels can't be built or loaded on this machine; the message says why."""


@cache
def library(name: str) -> ctypes.CDLL:
    """The compiled ``cpp/<name>.cpp``. Raises KernelUnavailable where it can't be compiled or loaded."""
    source = FOLDER / f"{name}.cpp"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None and not os.environ.get("CXX"):
        raise KernelUnavailable("there is no C++ compiler (Debian and Ubuntu: apt-get install g++)")
    texts = [path.read_text() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cpp", ".h")]
    key = hashlib.sha256("\0".join([*texts, source.name, *compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    try:
        built = _cache() / f"{name}-{key}.so"
        if built.exists():
            with suppress(OSError):  # a damaged file is compiled again
                return ctypes.CDLL(str(built))
    except (OSError, RuntimeError) as error:
        raise KernelUnavailable(f"there is no folder to keep it in ({error}): set XDG_CACHE_HOME to one") from error
    _compile(compiler, source, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise KernelUnavailable(f"{built} can't be loaded ({error})") from error


def _compile(compiler: list[str], source: Path, built: Path) -> None:
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:  # several processes may build at once
            part = Path(folder) / built.name
            done = subprocess.run([*compiler, *FLAGS, str(source), "-o", str(part)], capture_output=True, text=True)
            if done.returncode:
                raise KernelUnavailable(
                    f"{' '.join(compiler)} can't compile {source.name}: {done.stderr.strip()[-500:]}"
                )
            with part.open("rb") as file:
                os.fsync(file)  # the whole file, before it gets its name
            os.replace(part, built)
    except OSError as error:
        raise KernelUnavailable(f"{source.name} can't be compiled ({error})") from error


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "kairos_gym"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()
