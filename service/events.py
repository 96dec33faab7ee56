"""Following one job: its event stream as an async iterator, for server-sent events and for `Prefer: wait`."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from redis.asyncio import Redis as AsyncRedis

from worker.contract import Record, Status, events_key, record_key

_BLOCK_MS = 1000


async def follow(redis: AsyncRedis, job_id: str, last_id: str | None = None) -> AsyncIterator[tuple[str, Record]]:
    """The job's record now, then after each change, up to its end; with the id of the change.

    Args:
        redis: decodes responses.
        job_id: a job that exists.
        last_id: begin after this change (`Last-Event-ID`) instead of with the present state.

    While nothing changes the present record comes again every second, so that who listens can show the queue moving.
    The iterator ends after a terminal state, or when the record is deleted.
    """
    cursor = last_id
    shown: Record | None = None
    if cursor is None:
        # The stream's end first, then the record: a change in between comes twice rather than never.
        newest = cast(list[tuple[str, Any]], await redis.xrevrange(events_key(job_id), count=1))
        cursor = newest[0][0] if newest else "0-0"
        record = await _read(redis, job_id)
        if record is None:
            return
        shown = record
        yield cursor, record
        if record.status.is_terminal:
            return
    while True:
        answer = cast(list[Any], await redis.xread({events_key(job_id): cursor}, count=64, block=_BLOCK_MS))
        record = await _read(redis, job_id)
        if record is None:
            return
        shown = shown or record.model_copy(update={"progress": 0.0, "phase": None})
        for cursor, values in answer[0][1] if answer else []:
            if Status(values["status"]).is_terminal:
                yield cursor, record
                return
            past = _after(shown, values)
            # A change between the two first reads is in both; what the second knew already is not said again.
            if past.status is shown.status and past.progress < shown.progress:
                continue
            shown = past
            yield cursor, past
        if not answer:
            yield cursor, record
            if record.status.is_terminal:
                return


async def wait(redis: AsyncRedis, job_id: str, seconds: float) -> Record | None:
    """The record once the job is over, or as it is after ``seconds``; None if it has been deleted."""
    deadline = time.monotonic() + seconds
    record = None
    async for _, record in follow(redis, job_id):
        if record.status.is_terminal or time.monotonic() >= deadline:
            break
    return record


async def _read(redis: AsyncRedis, job_id: str) -> Record | None:
    values = cast(dict[str, str], await redis.hgetall(record_key(job_id)))
    return Record.from_hash(values) if values else None


def _after(record: Record, entry: dict[str, str]) -> Record:
    """The record after one change that is not its end."""
    changed = {name: str(value) for name, value in json.loads(entry["data"]).items() if value is not None}
    after = Record.from_hash({**record.to_hash(), **changed, "status": entry["status"]})
    return after.model_copy(update={"finished_at": None, "error_code": None, "error_message": None})
