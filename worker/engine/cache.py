"""What engines have built, on disk: found again by a hash of everything that the build read.

    FOLDER/registry.json                 {key: {made_at, about, files: {name: sha256}}}
    FOLDER/<key>/...                     what the build wrote

A built file is code that a GPU will run, so it is loaded only if its sha256 stands in the registry.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from worker.engine.errors import EngineError

log = logging.getLogger(__name__)

_REGISTRY = "registry.json"


def key_of(**read: Any) -> str:
    """Hash of everything that a build reads, as JSON: weights by their sha256, shapes, versions, source files."""
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:32]


def source_sha256(*paths: Path) -> str:
    """Hash of source files: a build by other code is another build."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(paths))).hexdigest()


class Cache:
    """The builds of one machine. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str) -> Path | None:
        """The folder of a finished build; None where there is none, or its files are not those of the registry."""
        entry = self._read().get(key)
        folder = self.folder / key
        if entry is None:
            return None
        found = _hashes(folder)
        if found != entry["files"]:
            changed = sorted(n for n in {*found, *entry["files"]} if found.get(n) != entry["files"].get(n))
            log.warning("%s: %s are not as they were built; building anew", folder, ", ".join(changed))
            return None
        return folder

    def get(self, key: str, build: Callable[[Path], None], about: Mapping[str, Any]) -> Path:
        """The folder of the build ``key``; made now by ``build(folder)`` if there is none.

        It is made aside, then renamed and entered. A process that wants the same build waits for the first.

        Args:
            key: see ``key_of``.
            build: writes into the empty folder that it is given. What it raises ends the build, and nothing is left.
            about: what a person may want to know of it; kept in the registry.

        Raises:
            EngineError: the folder cannot be written.
        """
        if found := self.find(key):
            return found
        try:
            return self._make(key, build, about)
        except OSError as error:
            reason = f"{self.folder} cannot be written ({error.strerror or error})"
            raise EngineError(f"{reason}; let ENGINES name a folder that can, with room for the weights") from error

    def _make(self, key: str, build: Callable[[Path], None], about: Mapping[str, Any]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(f"{key}.lock"):
            if found := self.find(key):
                return found
            aside, folder = self.folder / f"{key}.tmp", self.folder / key
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                build(aside)
                entry = {"made_at": datetime.now(UTC).isoformat(timespec="seconds"), "about": dict(about)}
                entry["files"] = _hashes(aside)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(aside, folder)
                self._enter(key, entry)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return folder

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads((self.folder / _REGISTRY).read_text())
            return {key: entry for key, entry in entries.items() if isinstance(entry["files"], dict)}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError, KeyError):
            log.warning("%s cannot be read; everything is built anew", self.folder / _REGISTRY)
            return {}

    def _enter(self, key: str, entry: dict[str, Any]) -> None:
        with self._locked("registry.lock"):
            entries = self._read() | {key: entry}
            aside = self.folder / "registry.tmp"
            aside.write_text(json.dumps(entries, indent=2) + "\n")
            os.replace(aside, self.folder / _REGISTRY)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however that ends
            yield


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
