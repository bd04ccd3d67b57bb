"""Which form of an operation runs: torch, compiled C++ on a CPU, or Triton on a GPU; ``KAIROS_KERNELS`` has a say."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from world_model.ops.native import KernelUnavailable, library

CHOICES = ("auto", "torch", "native", "eager")


def kernel_choice() -> str:
    """The value of the environment variable ``KAIROS_KERNELS``.

    "auto": compiled kernels where they can be built, else torch; "native": compiled kernels or an error; "torch": torch
    alone; "eager": as "auto", but a GPU launches each kernel instead of replaying a graph. Raises ValueError for
    another value.
    """
    choice = os.environ.get("KAIROS_KERNELS") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"KAIROS_KERNELS must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


_warned: list[str] = []


@cache
def _library_or_none(name: str) -> ctypes.CDLL | None:
    try:
        return library(name)
    except KernelUnavailable as error:
        if not _warned:  # once, whichever library it was
            print(f"kairos_gym works in plain torch, which is slower: {error}", file=sys.stderr)
        _warned.append(name)
        return None


def native_library(name: str) -> ctypes.CDLL | None:
    """The compiled ``cpp/<name>.cpp``, or None where torch has to do the work.

    That is with ``KAIROS_KERNELS=torch``, where the library can't be built (which is printed once), and under autocast,
    forward-mode AD and torch.func's transforms, which compiled code would ignore. Raises KernelUnavailable where
    ``KAIROS_KERNELS=native`` asks for a library that can't be built.
    """
    choice = kernel_choice()
    if torch.is_autocast_enabled("cpu") or under_transform():
        return None
    match choice:
        case "torch":
            return None
        case "native":
            return library(name)
    return _library_or_none(name)


def single_thread_library(name: str, *tensors: Tensor) -> ctypes.CDLL | None:
    """``native_library`` for kernels that take float32 on the CPU and use one thread, else None.

    With more threads torch, which uses them all, is faster.
    """
    if torch.get_num_threads() > 1 or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    return native_library(name)


def use_triton(*tensors: Tensor) -> bool:
    """Whether Triton's kernels take these: all on the current GPU, none float64, and ``KAIROS_KERNELS`` not "torch"."""
    fits = all(t.is_cuda and t.dtype != torch.float64 for t in tensors)
    fits = fits and {t.get_device() for t in tensors} == {torch.cuda.current_device()}
    return fits and kernel_choice() != "torch" and _triton() and not under_transform()


@cache
def _triton() -> bool:
    return find_spec("triton") is not None


def under_transform() -> bool:
    """Whether forward-mode AD or a torch.func transform is active, which compiled kernels don't support."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast, for values that are fed back or summed up, where rounding would accumulate."""
    kind = like.device.type
    low = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if low else nullcontext()


def forbid_double_backward() -> None:
    """Raises RuntimeError in a backward pass that is itself to be differentiated; compiled backwards can't be."""
    if torch.is_grad_enabled():
        raise RuntimeError("compiled layers have no second derivatives: set KAIROS_KERNELS=torch to have them")
