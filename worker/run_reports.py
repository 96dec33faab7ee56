"""What a run reports, brought to where the service sees it: lines into Redis streams, pictures into the storage.

A line's id in its stream is its place in the file, so a trainer that takes a run over goes on where the one before
ended, and what it sends again is refused: nothing is doubled, and nothing has to be remembered. No torch here.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from redis import Redis
from redis.exceptions import ResponseError

from worker.contract import (
    BlockImportance,
    Checkpoint,
    Distillation,
    Progress,
    RunFile,
    run_checkpoints_key,
    run_files_key,
    run_log_key,
    run_metrics_key,
    sample_path,
)
from worker.storage import Storage

log = logging.getLogger(__name__)

FILES = {
    "samples/*.png": "sheet",
    "importance.png": "plot",
    "importance.json": "report",
    "gate/gate.png": "plot",
    "gate/sheet.png": "sheet",
    "gate/gate.md": "report",
    "gate/gate.json": "report",
    "report.md": "report",
}
"""Of a run's folder, by pattern, with their kinds."""
MAX_FILE_BYTES = 4 * 2**20
MAX_LINE = 500
"""Characters of a line of the log."""
KEPT_LINES = 10_000
"""Of each stream, about."""
_CHUNK_BYTES = 256 * 1024
_AGAIN_S = 10
"""The storage is let be for so long after it has failed."""


class Event(BaseModel):
    """One line of `events.jsonl`; what else it holds is in ``model_extra``."""

    model_config = ConfigDict(extra="allow")

    time: float
    stage: str
    step: int
    steps: int | None = None

    def numbers(self) -> dict[str, float]:
        """Whatever else it holds that is a number."""
        extra = (self.model_extra or {}).items()
        return {name: value for name, value in extra if type(value) in (int, float) and math.isfinite(value)}


class Tail:
    """The complete lines that a growing file has gained since the last look."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset
        """Where the first line that has not been read begins."""

    def lines(self) -> list[tuple[int, bytes]]:
        """Each with where it ends, a part of a large file at a time; empty while there is no file."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(_CHUNK_BYTES)
        whole, newline, _ = data.rpartition(b"\n")
        if not newline and len(data) == _CHUNK_BYTES:
            whole = data  # a line without end is taken in pieces
        found = []
        for line in (whole + newline).splitlines(keepends=True):
            self.offset += len(line)
            found.append((self.offset, line.rstrip(b"\r\n")))
        return found


class Reporter:
    """Follows one run's folder. What `read` finds goes into the record first, and then on with `send`."""

    def __init__(self, redis: Redis, storage: Storage, record: Distillation, folder: Path) -> None:
        """``redis`` decodes responses."""
        self._redis = redis
        self._storage = storage
        self._record = record
        self._folder = folder
        self._log = self._tail("log.txt", run_log_key(record.id))
        self._events = self._tail("events.jsonl", run_metrics_key(record.id))
        self._read: list[tuple[int, bytes]] = []
        known = cast(dict[str, str], redis.hgetall(run_files_key(record.id)))
        self._known = {name: _version(RunFile.model_validate_json(text)) for name, text in known.items()}
        self._files_from = 0.0

    def read(self, progress: Progress | None) -> Progress | None:
        """How far the run is by now, where it was at ``progress`` at the last look."""
        self._read = self._events.lines()
        return advance(progress, [line for _, line in self._read])

    def send(self) -> bool:
        """Bring what is new to where it is seen; whether there were lines, so that there may be more."""
        self._send_events(self._read)
        lines = [(end, {"line": line.decode(errors="replace")[:MAX_LINE]}) for end, line in self._log.lines()]
        self._append(run_log_key(self._record.id), lines)
        if time.monotonic() >= self._files_from:
            try:
                self._send_files()
            except OSError as error:  # a run goes on without
                log.warning("%s: no pictures sent: %s", self._record.id, error)
                self._files_from = time.monotonic() + _AGAIN_S
        return bool(self._read or lines)

    def importance(self) -> BlockImportance | None:
        """What stage I found, once it is there."""
        path = self._folder / "importance.json"
        return BlockImportance.model_validate_json(path.read_text()) if path.exists() else None

    def _tail(self, name: str, key: str) -> Tail:
        newest = cast(list[tuple[str, Any]], self._redis.xrevrange(key, count=1))
        offset = int(newest[0][0].partition("-")[0]) if newest else 0
        path = self._folder / name
        if offset > (path.stat().st_size if path.exists() else 0):
            self._redis.delete(key)  # somebody has removed the folder, and the run begins anew
            offset = 0
        return Tail(path, offset)

    def _send_events(self, lines: Sequence[tuple[int, bytes]]) -> None:
        entries = []
        for end, line in lines:
            if (event := _event(line)) is None:
                continue
            told = {**event.model_dump(include={"time", "stage", "step", "steps"}), "values": event.numbers()}
            entries.append((end, {"data": json.dumps(told)}))
            if "checkpoint" in (event.model_extra or {}):
                checkpoint = Checkpoint(stage=event.stage, step=event.step, at=event.time)
                key = run_checkpoints_key(self._record.id)
                self._redis.hset(key, event.stage, checkpoint.model_dump_json())
                self._redis.expireat(key, self._record.forget_at)
        self._append(run_metrics_key(self._record.id), entries)

    def _append(self, key: str, entries: Sequence[tuple[int, dict[str, str]]]) -> None:
        if not entries:
            return
        pipeline = self._redis.pipeline(transaction=False)
        for end, fields in entries:
            pipeline.xadd(key, cast(Any, fields), id=f"{end}-0", maxlen=KEPT_LINES)
        pipeline.expireat(key, self._record.forget_at)
        for answer in pipeline.execute(raise_on_error=False):
            # Its place is taken: this very line was sent before, by us or by a trainer that has died since.
            if isinstance(answer, Exception) and not (
                isinstance(answer, ResponseError) and "equal or smaller" in str(answer)
            ):
                raise answer

    def _send_files(self) -> None:
        for path, kind in self._files():
            found = path.stat()
            file = RunFile(kind=cast(Any, kind), at=round(found.st_mtime, 3), size_bytes=found.st_size)
            if self._known.get(path.name) == _version(file):
                continue
            if file.size_bytes > MAX_FILE_BYTES:
                self._say(f"{path.name} is not shown: it has {file.size_bytes} bytes, and {MAX_FILE_BYTES} may be")
            else:
                self._storage.write(sample_path(self._record.id, path.name), path.read_bytes())
                self._redis.hset(run_files_key(self._record.id), path.name, file.model_dump_json())
            self._known[path.name] = _version(file)

    def _files(self) -> Iterator[tuple[Path, str]]:
        for pattern, kind in FILES.items():
            for path in sorted(self._folder.glob(pattern)):
                if not path.name.endswith(".tmp.png"):  # still being written
                    yield path, kind

    def _say(self, line: str) -> None:
        """A line of ours in the run's log, from where it goes the way of all of them."""
        with (self._folder / "log.txt").open("a") as file:
            file.write(f"{line}\n")


def _version(file: RunFile) -> tuple[float, int]:
    return file.at, file.size_bytes


def advance(progress: Progress | None, lines: Sequence[bytes]) -> Progress | None:
    """``progress`` after these lines of `events.jsonl`. Values are kept from line to line within a stage."""
    for line in lines:
        if (event := _event(line)) is None:
            continue
        before = progress if progress and progress.stage == event.stage else None
        values = {**(before.values if before else {}), **event.numbers()}
        steps = event.steps or (before.steps if before else None)
        progress = Progress(stage=event.stage, step=event.step, steps=steps, values=values)
    return progress


def _event(line: bytes) -> Event | None:
    try:
        return Event.model_validate_json(line)
    except ValidationError:
        return None  # cut short when the run was killed
