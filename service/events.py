"""Following jobs: their event streams as async iterators, for server-sent events and for `Prefer: wait`.

One subscription wakes up whoever follows a job that has changed; what has changed, the job's own stream in Redis says.
So a follower costs nothing while nothing happens, a notice that is lost only delays it, and one that reads slowly is
caught up from the stream: nothing is kept for it here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError
from sse_starlette import EventSourceResponse, ServerSentEvent

from service.reading import Reader, Seen
from worker.contract import CHANGES_CHANNEL, Record, Status, events_key, record_key
from worker.records import RecordT

log = logging.getLogger(__name__)

_LOOK_S = 10.0
"""A follower that has heard nothing looks this often whether there was something."""
_QUEUE_S = 2.0
"""How often those whose jobs wait are told their places, while the queue moves."""
_PAUSE_S = 0.5
_PING_S = 30.0
"""A connection that has gone without a word is found out by then."""
_PING_CLIENT_S = 15
_SEND_S = 30
_END_S = 3.0
_RECONNECT_MS = 2000
_MOST = 64
"""Changes that are read at a time."""


class Watch:
    """One follower's bell."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._has_moved_only = False
        self.seen: Seen | None = None
        """The job while it waits, with its place in the queue."""

    def ring(self) -> None:
        """There is something to look at."""
        self._has_moved_only = False
        self._rung.set()

    def move(self, seen: Seen) -> None:
        """Its place in the queue is another; there is nothing else to look at, unless it has rung for that."""
        self._has_moved_only = self._has_moved_only or not self._rung.is_set()
        self.seen = seen
        self._rung.set()

    async def wait(self, seconds: float) -> Seen | None:
        """Return when it has rung since the last time, or after so long; the job where only its place is another."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._rung.wait(), seconds)
        self._rung.clear()
        moved, self._has_moved_only = self._has_moved_only, False
        return self.seen if moved else None


class Hub:
    """Everybody who follows a job in this process."""

    def __init__(self, redis: AsyncRedis, reader: Reader) -> None:
        """``redis`` decodes responses."""
        self._redis = redis
        self._reader = reader
        self._watches: dict[str, set[Watch]] = {}
        self._queue_has_moved = False
        """Since places in it were told."""
        self.is_ending = False
        """This process is about to: nobody is to wait for anything more."""

    def end(self) -> None:
        """Have whoever waits for a job be told how it is now."""
        self.is_ending = True
        for watches in self._watches.values():
            for watch in watches:
                watch.ring()

    @contextmanager
    def watching(self, job_id: str) -> Iterator[Watch]:
        """A bell that rings when the job changes."""
        watch = Watch()
        self._watches.setdefault(job_id, set()).add(watch)
        try:
            yield watch
        finally:
            self._watches[job_id].discard(watch)
            if not self._watches[job_id]:
                del self._watches[job_id]

    async def run(self) -> None:
        """Listen until cancelled; whatever goes wrong must not end it."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again_and_again(self._listen))
            group.create_task(self._again_and_again(self._tell_places))

    async def _again_and_again(self, work: Any) -> None:
        while True:
            try:
                await work()
            except (RedisError, OSError) as error:
                log.warning("following jobs: %s", error)
            except Exception:
                log.exception("following jobs")
            await asyncio.sleep(_PAUSE_S)

    async def _listen(self) -> None:
        async with self._redis.pubsub(ignore_subscribe_messages=True) as subscription:
            await subscription.subscribe(CHANGES_CHANNEL)
            for watches in self._watches.values():  # what was said meanwhile has been missed
                for watch in watches:
                    watch.ring()
            pinged = time.monotonic()
            while True:
                message = await subscription.get_message(timeout=_PING_S)
                if (task := asyncio.current_task()) and task.cancelling():
                    raise asyncio.CancelledError  # redis-py takes a cancel for the end of its timeout
                if message is None:  # nothing, or the answer to a ping
                    if time.monotonic() > pinged + _PING_S / 2:
                        pinged = time.monotonic()
                        await subscription.ping()
                    continue
                self._queue_has_moved = True
                for watch in self._watches.get(message["data"], ()):
                    watch.ring()

    async def _tell_places(self) -> None:
        while True:
            await asyncio.sleep(_QUEUE_S)
            if not self._queue_has_moved:
                continue
            self._queue_has_moved = False
            waiting = [
                (watch, watch.seen.record) for watches in self._watches.values() for watch in watches if watch.seen
            ]
            found = await self._reader.outlook([record for _, record in waiting])
            for (watch, record), seen in zip(waiting, found, strict=True):
                if watch.seen and watch.seen.record is record and watch.seen != seen:
                    watch.move(seen)


async def follow(
    redis: AsyncRedis, hub: Hub, reader: Reader, job_id: str, last_id: str | None = None, until: float = math.inf
) -> AsyncIterator[tuple[str, Seen]]:
    """The job now, then after each change, up to its end; with the id of the change.

    Args:
        redis: decodes responses.
        hub: whose `run` is running.
        reader: of the same Redis.
        job_id: a job that exists.
        last_id: begin after this change (`Last-Event-ID`) instead of with the present state.
        until: when to give up, by `time.monotonic`. A timeout around this would not do: redis-py may swallow its
            cancel.

    While it waits it also comes again as its place in the queue changes, and now and then as it is. The iterator ends
    after a terminal state, when the record is deleted, or when this process is about to end.
    """
    with hub.watching(job_id) as watch:
        cursor = last_id
        shown: Record | None = None
        if cursor is None:
            # The stream's end first, then the record: a change in between comes twice rather than never.
            cursor = await _newest(redis, job_id)
            seen = await reader.find(job_id)
            if seen is None:
                return
            shown = seen.record
            watch.seen = seen if shown.status is Status.QUEUED else None
            yield cursor, seen
            if shown.status.is_terminal:
                return
        else:
            watch.ring()
        while (left := until - time.monotonic()) > 0 and not hub.is_ending:
            if moved := await watch.wait(min(left, _LOOK_S)):
                yield cursor, moved
                continue
            entries = cast(list[tuple[str, Any]], await redis.xrange(events_key(job_id), f"({cursor}", count=_MOST))
            record = await reader.record(job_id)
            if record is None:
                return
            shown = shown or record.model_copy(update={"progress": 0.0, "phase": None})
            for cursor, values in entries:
                if Status(values["status"]).is_terminal:
                    [seen] = await reader.outlook([record])
                    yield cursor, seen
                    return
                past = _after(shown, values)
                # A change between the two first reads is in both; what the second knew already is not said again.
                if past.status is shown.status and past.progress < shown.progress:
                    continue
                shown = past
                [seen] = await reader.outlook([past])
                watch.seen = seen if past.status is Status.QUEUED else None
                yield cursor, seen
            if len(entries) == _MOST:
                watch.ring()
            if not entries:
                shown = record  # newer than the stream was a moment ago, perhaps
                [seen] = await reader.outlook([record])
                watch.seen = seen if record.status is Status.QUEUED else None
                yield cursor, seen
                if record.status.is_terminal:
                    return


async def wait(redis: AsyncRedis, hub: Hub, reader: Reader, job_id: str, seconds: float) -> Record | None:
    """The record once the job is over, or as it is after ``seconds``; None if it has been deleted."""
    record = None
    async for _, seen in follow(redis, hub, reader, job_id, until=time.monotonic() + seconds):
        record = seen.record
    return record


async def states(
    redis: AsyncRedis, hub: Hub, kind: type[RecordT], job_id: str, last_id: str | None = None
) -> AsyncIterator[tuple[str, RecordT]]:
    """A job of any kind as it is now, and again after changes, up to its end; with the id of the latest change.

    Changes that come close together are one. With ``last_id`` it begins with what has changed since.
    """
    with hub.watching(job_id) as watch:
        while not hub.is_ending:
            # The stream's end first, then the record: a change in between comes twice rather than never.
            cursor = await _newest(redis, job_id)
            values = cast(dict[str, str], await redis.hgetall(record_key(job_id)))
            if not values:
                return
            record = kind.from_hash(values)
            if cursor != last_id or record.status.is_terminal:
                last_id = cursor
                yield cursor, record
            if record.status.is_terminal:
                return
            await watch.wait(_LOOK_S)


async def _newest(redis: AsyncRedis, job_id: str) -> str:
    """Id of a job's latest change."""
    newest = cast(list[tuple[str, Any]], await redis.xrevrange(events_key(job_id), count=1))
    return newest[0][0] if newest else "0-0"


def valid_id(text: str | None) -> str | None:
    """A `Last-Event-ID`, if it is one of ours and no more than Redis can count to; else a follower begins with now."""
    return text if text is not None and re.fullmatch(r"[0-9]{1,18}-[0-9]{1,18}", text) else None


def sent(stream: AsyncIterator[ServerSentEvent]) -> EventSourceResponse:
    """An answer that lasts. Who loses it, or takes nothing for too long, comes again with the last id that it had."""

    async def whole() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent(retry=_RECONNECT_MS, comment="FastLightGen")
        async for event in stream:
            yield event

    headers = {"X-Accel-Buffering": "no"}
    # When the service ends, the stream does by itself (`Hub.end`), and is not cut off in the middle of it.
    return EventSourceResponse(
        whole(), ping=_PING_CLIENT_S, send_timeout=_SEND_S, headers=headers, shutdown_grace_period=_END_S
    )


def _after(record: Record, entry: dict[str, str]) -> Record:
    """The record after one change that is not its end."""
    changed = {name: str(value) for name, value in json.loads(entry["data"]).items() if value is not None}
    after = Record.from_hash({**record.to_hash(), **changed, "status": entry["status"]})
    return after.model_copy(update={"finished_at": None, "error_code": None, "error_message": None})
