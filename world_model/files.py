"""Files that are written whole or not at all, and folders that belong to one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor


def replace_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file under a temporary name, then give it its own: a kill leaves the old file or the new.

    The temporary name keeps the suffix, since some writers choose their format by it.
    """
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """All of ``data`` or none of it."""
    replace_atomically(path, lambda part: part.write_bytes(data))


def save_atomically(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors as a safetensors file, all of them or none."""
    write_atomically(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def expect_same_recipe(found: Mapping[str, Any], wanted: Mapping[str, Any], made: str, otherwise: str) -> None:
    """Raises ValueError that names each setting in which what was made differs from what is asked for.

    made: the error's first words, such as "runs/a was made". otherwise: what the user can do instead, its last.
    """
    differences = [
        f"{key} {found.get(key)!r}, not {wanted.get(key)!r}"
        for key in {**wanted, **found}
        if found.get(key) != wanted.get(key)
    ]
    if differences:
        raise ValueError(f"{made} with {'; '.join(differences)}: {otherwise}")
