"""The journal of a recording: every finished episode is on disk at once, and survives a kill."""

from __future__ import annotations

import fcntl
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors.numpy import load, save

from kairos_gym.data.actors import Episode

HEADER = struct.Struct("<QI")  # a record's length in bytes and its checksum


class Journal:
    """Episodes in one file, one behind the other; see ``open_journal``."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def append(self, episode: Episode) -> None:
        """Write an episode; from then on ``read`` gives it too."""
        blob = save(episode)
        self._file.write(HEADER.pack(len(blob), zlib.crc32(blob)) + blob)
        self._file.flush()

    def read(self) -> Iterator[Episode]:
        """All episodes, in order. At their end, a last record that was cut short by a kill is removed."""
        end = 0
        self._file.seek(0)
        while len(header := self._file.read(HEADER.size)) == HEADER.size:
            length, checksum = HEADER.unpack(header)
            blob = self._file.read(length)
            if len(blob) < length or zlib.crc32(blob) != checksum:
                break
            end += HEADER.size + length
            yield load(blob)
        self._file.seek(end)
        self._file.truncate()


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """The journal at ``path``, made where there is none. Raises RuntimeError where another process has it open."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is collecting into {path.parent} now: wait for it or stop it"
            ) from error
        yield Journal(file)
