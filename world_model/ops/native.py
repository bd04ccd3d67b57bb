"""C++ beside a slow truth: compiled on first use, kept in a cache, and done without where there is no compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
FOLDER = Path(__file__).with_name("cpp")
CHOICES = ("auto", "torch", "native", "eager")


class KernelUnavailable(RuntimeError):
    """Native code can't be had on this machine; says why."""


def kernel_choice() -> str:
    """What ``KAIROS_KERNELS`` asks for: "auto" (native code where it can be had), "torch", "native" (or an error), or
    "eager" (as "auto", but a GPU launches each kernel and replays no graph).

    Raises ValueError for another word.
    """
    choice = os.environ.get("KAIROS_KERNELS") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"KAIROS_KERNELS must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


@cache
def library(name: str) -> ctypes.CDLL:
    """The compiled ``world_model/cpp/<name>.cpp``. Raises NotHere where that can't be had."""
    source = FOLDER / f"{name}.cpp"
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None and not os.environ.get("CXX"):
        raise KernelUnavailable("there is no C++ compiler (Debian and Ubuntu: apt-get install g++)")
    texts = [path.read_text() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cpp", ".h")]
    key = hashlib.sha256("\0".join([*texts, source.name, *compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    try:
        built = _cache() / f"{name}-{key}.so"
        if built.exists():
            with suppress(OSError):  # damaged: it is built anew
                return ctypes.CDLL(str(built))
    except (OSError, RuntimeError) as error:
        raise KernelUnavailable(f"there is no folder to keep it in ({error}): set XDG_CACHE_HOME to one") from error
    _compile(compiler, source, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise KernelUnavailable(f"{built} can't be loaded ({error})") from error


_said: list[str] = []


@cache
def _available(name: str) -> ctypes.CDLL | None:
    try:
        return library(name)
    except KernelUnavailable as error:
        if not _said:  # once, whichever file it was
            print(f"kairos_gym works in plain torch, which is slower: {error}", file=sys.stderr)
        _said.append(name)
        return None


def available(name: str) -> ctypes.CDLL | None:
    """The compiled ``name``; None where torch was asked for, or, said once, where it can't be had.

    None too where torch does more than it is told: under autocast, forward-mode AD and torch.func's transforms.

    Raises NotHere where ``KAIROS_KERNELS=native`` asks for what can't be had.
    """
    choice = kernel_choice()
    if torch.is_autocast_enabled("cpu") or under_transform():
        return None
    match choice:
        case "torch":
            return None
        case "native":
            return library(name)
    return _available(name)


def compiled(name: str, *tensors: Tensor) -> ctypes.CDLL | None:
    """``available``, for a form that takes float32 on the CPU and works on one thread: else None.

    With more threads torch shares the work out, and these forms don't.
    """
    if torch.get_num_threads() > 1 or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    return available(name)


def use_triton(*tensors: Tensor) -> bool:
    """Whether Triton's kernels may have these: on the GPU in use, none a double, and nobody asked for torch."""
    here = all(t.is_cuda and t.dtype != torch.float64 for t in tensors)
    here = here and {t.get_device() for t in tensors} == {torch.cuda.current_device()}
    return here and kernel_choice() != "torch" and _triton() and not under_transform()


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def under_transform() -> bool:
    """Whether forward-mode AD or one of torch.func's transforms is at work, which kernels know nothing of."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def needs_grad(*tensors: Tensor) -> bool:
    """Whether somebody may want gradients of what is made of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Without autocast: where roundings would add up from step to step."""
    kind = like.device.type
    low = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if low else nullcontext()


def forbid_double_backward() -> None:
    """At the head of a backward pass that can't be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError("compiled layers have no second derivatives: set KAIROS_KERNELS=torch to have them")


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
                os.fsync(file)  # all of it, before it has its name
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
