"""`python -m service backup FOLDER`, while everything runs; `python -m service restore FOLDER`, into an empty stack.

    FOLDER/redis.jsonl.gz   every key of ours at one moment, each a line: its name, when it runs out, `DUMP`
    FOLDER/storage/         the files, copied after that moment: whatever a record speaks of is there

What is not kept makes itself anew. The queue: records are the truth, so once restored every job that is not over is
lost in the queue, and `Store.reconcile` enqueues it. What workers and couriers say of themselves. The last changes of
each job, which are for clients that follow it. A file that came between the moment and its copy belongs to no record,
and is swept as an orphan.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from redis import Redis
from redis.exceptions import NoPermissionError

from worker.records import now
from worker.storage import Storage

FORMAT = 1
FOLDERS = ("inputs", "videos", "samples", "students", "blobs")
"""Of the storage."""
_CHANGING = ("samples", "students")
"""Those whose files may be replaced; in the others one of a name is always the same."""
_RESTORING = "flg:restoring"
"""String that is there while a restore is not finished."""
_NOT_KEPT = (
    "^flg:worker",
    "^flg:courier$",
    "^flg:gpu:",
    "^flg:rate:",
    "^flg:job:.*:events$",
    "^flg:swept$",
    "^flg:keys:first$",
    "upkeep",
    f"^{_RESTORING}$",
)
"""Lua patterns of keys."""
_AT_ONCE = 1000

# ARGV: patterns of keys that are left out. Returns the time, then of each key its name, the ms that it has left (-1: no
# end), and what it holds. One call, so all of it is of one moment.
_SNAPSHOT = """
local time = redis.call('TIME')
local found, seen, cursor = {time[1] * 1000 + math.floor(time[2] / 1000)}, {}, '0'
local function is_kept(key)
    for _, pattern in ipairs(ARGV) do
        if string.find(key, pattern) then return false end
    end
    return true
end
repeat
    local page = redis.call('SCAN', cursor, 'MATCH', 'flg:*', 'COUNT', 1000)
    cursor = page[1]
    for _, key in ipairs(page[2]) do
        if not seen[key] and is_kept(key) then
            seen[key] = true
            table.insert(found, key)
            table.insert(found, redis.call('PTTL', key))
            table.insert(found, redis.call('DUMP', key))
        end
    end
until cursor == '0'
return found
"""


class BackupError(Exception):
    """What cannot be done, in one line, with what to do instead."""


@dataclass(frozen=True)
class Kept:
    """One key."""

    name: str
    until_ms: int | None
    """Epoch; None: for ever."""
    dump: bytes


def backup(redis: Redis, storage: Storage | None, folder: Path) -> str:
    """Write everything into ``folder``. What an earlier back-up has left there is brought up to date.

    Args:
        redis: does not decode responses; its user may SCAN.
        storage: None: the files are backed up by other means, after this.
        folder: of this machine.

    Returns:
        What was written, in words.

    Raises:
        BackupError, RedisError, OSError: an earlier back-up is as it was, but for files that it has not had.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = _snapshot(redis)
    if not keys and (folder / "redis.jsonl.gz").exists():
        raise BackupError(
            f"this Redis holds nothing of ours, and {folder} holds a back-up of one that did; restore that one first, "
            "or name another folder"
        )
    files = _copy_out(storage, folder / "storage") if storage else 0
    aside = folder / "redis.jsonl.gz.tmp"
    aside.unlink(missing_ok=True)
    aside.touch(mode=0o600)  # webhook secrets stand in it
    with gzip.open(aside, "wt") as lines:
        lines.write(json.dumps({"format": FORMAT, "at": now(), "files": storage is not None}) + "\n")
        for key in keys:
            line = {"key": key.name, "until_ms": key.until_ms, "dump": base64.b64encode(key.dump).decode()}
            lines.write(json.dumps(line) + "\n")
    os.replace(aside, folder / "redis.jsonl.gz")
    if storage:
        _forget_what_is_gone(storage, folder / "storage")
    return f"{len(keys)} keys, {files} new files"


def restore(redis: Redis, storage: Storage, folder: Path) -> str:
    """Bring back what ``backup`` wrote, into a Redis that holds nothing of ours. After a crash it can be run again.

    Args:
        redis: does not decode responses; its user may SCAN and RESTORE.
        storage: where the files go; those that are there already stay.
        folder: of this machine.

    Returns:
        What was brought back, in words.

    Raises:
        BackupError, RedisError, OSError: nothing should be started on it before this has been run again.
    """
    about, keys = _read(folder)
    _check_empty(redis)
    files = _copy_in(folder / "storage", storage) if about["files"] else 0
    redis.set(_RESTORING, "1")
    alive = [key for key in keys if key.until_ms is None or key.until_ms > 1000 * now()]
    for start in range(0, len(alive), _AT_ONCE):
        with redis.pipeline(transaction=False) as pipeline:
            for key in alive[start : start + _AT_ONCE]:
                pipeline.restore(key.name, key.until_ms or 0, key.dump, replace=True, absttl=True)
            pipeline.execute()
    redis.delete(_RESTORING)
    return f"{len(alive)} keys, {files} files; {len(keys) - len(alive)} keys have run out since"


def _snapshot(redis: Redis) -> list[Kept]:
    try:
        redis.scan(count=1)  # within a script it would be refused in words of another kind
    except NoPermissionError:
        message = "REDIS_URL: this user may not SCAN; name the one that administers Redis"
        raise BackupError(message) from None
    moment, *found = cast(list[Any], redis.eval(_SNAPSHOT, 0, *_NOT_KEPT))
    return [
        Kept(name.decode(), moment + left_ms if left_ms >= 0 else None, dump)
        for name, left_ms, dump in zip(found[::3], found[1::3], found[2::3], strict=True)
    ]


def _read(folder: Path) -> tuple[dict[str, Any], list[Kept]]:
    """What a back-up says of itself, and its keys."""
    try:
        with gzip.open(folder / "redis.jsonl.gz", "rt") as lines:
            about, *keys = map(json.loads, lines)
    except (OSError, EOFError, ValueError) as error:
        raise BackupError(f"{folder} holds no whole back-up ({error})") from None
    if about["format"] != FORMAT:
        raise BackupError(
            f"{folder} has format {about['format']}, this release reads {FORMAT}: restore it with its own"
        )
    return about, [Kept(key["key"], key["until_ms"], base64.b64decode(key["dump"])) for key in keys]


def _check_empty(redis: Redis) -> None:
    try:
        found = next(redis.scan_iter("flg:*", _AT_ONCE), None)
    except NoPermissionError:
        message = "REDIS_URL: this user may not SCAN and RESTORE; name the one that administers Redis"
        raise BackupError(message) from None
    if found is not None and not redis.exists(_RESTORING):
        message = "stop services, workers, trainers and couriers, and empty it"
        raise BackupError(f"REDIS_URL: this Redis is in use (it holds {found.decode()}): {message}")


# --- files -----------------------------------------------------------------------------------------------------------


def _names(storage: Storage) -> Iterator[tuple[str, str]]:
    """Folder and name of every file that is whole."""
    for folder in FOLDERS:
        yield from ((folder, name) for name in storage.names(folder) if not name.endswith(".tmp"))


def _copy_out(storage: Storage, root: Path) -> int:
    copied = 0
    for folder, name in _names(storage):
        target = root / folder / name
        if target.exists() and folder not in _CHANGING:
            continue
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = target.with_name(f"{name}.tmp")
        try:
            storage.get_file(f"{folder}/{name}", aside)
        except FileNotFoundError:  # it has expired meanwhile
            continue
        os.replace(aside, target)
        copied += 1
    return copied


def _copy_in(root: Path, storage: Storage) -> int:
    copied = 0
    there = set(_names(storage))
    for path in sorted(root.glob("*/*")):
        folder, name = path.parent.name, path.name
        if folder in FOLDERS and not name.endswith(".tmp") and (folder, name) not in there:
            storage.put_file(f"{folder}/{name}", path)
            copied += 1
    return copied


def _forget_what_is_gone(storage: Storage, root: Path) -> None:
    there = set(_names(storage))
    if not there:  # a place that is not mounted looks like that
        return
    for path in root.glob("*/*"):
        if (path.parent.name, path.name) not in there:
            path.unlink()


def run(action: str, redis: Redis, storage: Storage, folder: Path, *, files: bool) -> int:
    """The command. Exit code 1: the one line on stderr says why."""
    try:
        if action == "backup":
            sys.stdout.write(f"{folder}: {backup(redis, storage if files else None, folder)}\n")
        else:
            sys.stdout.write(f"restored: {restore(redis, storage, folder)}\n")
    except (BackupError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
