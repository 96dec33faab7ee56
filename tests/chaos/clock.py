"""A wall clock that a test sets: `clock.c`, built and loaded before the C library."""

from __future__ import annotations

import struct
from pathlib import Path


class Clock:
    """The wall clock of the programs that are started with its ``environment``."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._file = folder / "clock"
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self._file)}

    def set(self, offset_s: int) -> None:
        """From now on they see it so far off."""
        with self._file.open("r+b", buffering=0) as file:  # in its place: they have mapped it
            file.write(struct.pack("=q", offset_s))
