"""Job records in Redis, as both service and worker read and change them. No torch, no HTTP.

A record changes only through ``change``: one Lua call that compares before it writes, so that a late loser (a worker
whose lease ran out, a cancel that came after the end) cannot overwrite a winner. Each change is also an entry of the
job's event stream, in the same call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, Generic, TypeVar, cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, TimeoutError
from redis.retry import Retry

from worker.contract import (
    ACTIVE_MODEL_KEY,
    WORKERS_KEY,
    Heartbeat,
    JobRecord,
    ModelCard,
    Status,
    WorkerState,
    events_key,
    record_key,
    worker_key,
)

KEEP_EVENTS_S = 24 * 3600

RecordT = TypeVar("RecordT", bound=JobRecord)

# KEYS: record, events, queued ids. ARGV: statuses it may change from (each between spaces), attempt that must still be
# current or "", changed fields as JSON for the event stream, seconds to keep the stream, id, then field, value, ...
_CHANGE = """
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'missing' end
if not string.find(ARGV[1], ' ' .. status .. ' ', 1, true) then return status end
if ARGV[2] ~= '' and redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[2] then return 'fenced' end
redis.call('HSET', KEYS[1], unpack(ARGV, 6))
local after = redis.call('HGET', KEYS[1], 'status')
redis.call(after == 'queued' and 'SADD' or 'SREM', KEYS[3], ARGV[5])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 256, '*', 'data', ARGV[3], 'status', after)
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 'ok'
"""


# KEYS: record, index, queued ids. ARGV: most that may be queued, id, time of creation, time to forget it, then field,
# value, ...
_CREATE = """
if redis.call('SCARD', KEYS[3]) >= tonumber(ARGV[1]) then return 'full' end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('EXPIREAT', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[2])
return 'ok'
"""


class QueueFull(Exception):
    """As many jobs are queued as may be; nothing was written."""


class Refused(Exception):
    """A change that came too late: the record is in another state, belongs to a later attempt, or is gone."""

    def __init__(self, job_id: str, found: str) -> None:
        super().__init__(f"{job_id} is {found}")
        self.found = found
        """The record's status, or "fenced", or "missing"."""


# `Redis.from_url` has no retry policy of its own: a blip of one second would lose a finished video.
_RETRY_ON = [ConnectionError, TimeoutError, BusyLoadingError]


def connect(url: str, *, text: bool = True, patience: int = 10) -> Redis:
    """A client that outlives a restart of Redis: ``patience`` tries, at most 1 s apart. ``text=False`` for rq."""
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), patience)
    return Redis.from_url(url, retry=retry, retry_on_error=_RETRY_ON, decode_responses=text, health_check_interval=15)


def connect_async(url: str) -> AsyncRedis:
    """The same for asyncio."""
    retry = AsyncRetry(ExponentialBackoff(cap=1.0, base=0.05), 5)
    # Each follower of a job holds a connection while it waits; the default of 100 would turn the 101st away.
    return AsyncRedis.from_url(
        url, retry=retry, retry_on_error=_RETRY_ON, decode_responses=True, max_connections=10_000
    )


class Records(Generic[RecordT]):
    """The records of one kind in one Redis."""

    def __init__(self, redis: Redis, kind: type[RecordT]) -> None:
        self.redis = redis
        self.kind = kind
        self._change = redis.register_script(_CHANGE)
        self._create = redis.register_script(_CREATE)

    def get(self, job_id: str) -> RecordT | None:
        """One record, or None where there is no such job."""
        values = cast(dict[str, str], self.redis.hgetall(record_key(job_id)))
        return self.kind.from_hash(values) if values else None

    def create(self, record: RecordT, max_queued: int) -> None:
        """Write a new record and count it as queued, in one call, so that no two requests share the last place.

        Raises:
            QueueFull: ``max_queued`` jobs are waiting.
        """
        fields = record.to_hash()
        answer = self._create(
            keys=[record_key(record.id), self.kind.index_key, self.kind.queued_key],
            args=[
                max_queued,
                record.id,
                record.created_at,
                record.forget_at,
                *(part for pair in fields.items() for part in pair),
            ],
        )
        if answer != "ok":
            raise QueueFull

    def num_queued(self) -> int:
        """Jobs that wait for a worker."""
        return self.redis.scard(self.kind.queued_key)

    def delete(self, job_id: str) -> None:
        """Forget a job."""
        with self.redis.pipeline() as pipeline:
            pipeline.delete(record_key(job_id), events_key(job_id))
            pipeline.zrem(self.kind.index_key, job_id)
            pipeline.srem(self.kind.queued_key, job_id)
            pipeline.execute()

    def change(self, record: RecordT, since: Iterable[Status], *, fence: bool = False, **changes: Any) -> RecordT:
        """Change fields of a record that is in one of the states ``since``; returns it as changed.

        Args:
            record: the job as last read.
            since: states that the change is right for.
            fence: also require that no later attempt has begun since ``record`` was read.
            changes: new values by field name.

        Raises:
            Refused: the record is no longer in such a state; nothing was written.
        """
        after = record.model_copy(update=changes)
        values = {name: value for name, value in after.to_hash().items() if name in changes}
        answer = self._change(
            keys=[record_key(record.id), events_key(record.id), self.kind.queued_key],
            args=[
                f" {' '.join(since)} ",
                str(record.attempt) if fence else "",
                json.dumps(after.model_dump(mode="json", include=set(changes))),
                KEEP_EVENTS_S,
                record.id,
                *(part for pair in values.items() for part in pair),
            ],
        )
        if answer != "ok":
            raise Refused(record.id, str(answer))
        return after


def active_model(redis: Redis) -> ModelCard | None:
    """The model that workers serve, or None before any worker has been ready."""
    text = cast(str | None, redis.get(ACTIVE_MODEL_KEY))
    return ModelCard.model_validate_json(text) if text else None


def workers(redis: Redis) -> list[Heartbeat]:
    """Every worker whose heartbeat has not run out."""
    names = sorted(cast(set[str], redis.smembers(WORKERS_KEY)))
    texts = cast(list[str | None], redis.mget([worker_key(name) for name in names])) if names else []
    if gone := [name for name, text in zip(names, texts, strict=True) if text is None]:
        redis.srem(WORKERS_KEY, *gone)  # one that was only slow adds itself again with its next beat
    return [Heartbeat.model_validate_json(text) for text in texts if text]


def ready_workers(redis: Redis) -> list[Heartbeat]:
    """The workers that take jobs."""
    return [w for w in workers(redis) if w.state in (WorkerState.READY, WorkerState.BUSY)]


def now() -> float:
    """Seconds since the epoch, to the millisecond."""
    return round(time.time(), 3)
