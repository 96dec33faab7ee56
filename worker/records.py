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

from worker.connection import connect as connect
from worker.connection import connect_async as connect_async
from worker.contract import (
    ACTIVE_MODEL_KEY,
    LOCAL,
    MODELS_KEY,
    RELEASE_KEY,
    WORKERS_KEY,
    Heartbeat,
    JobRecord,
    ModelCard,
    Status,
    WorkerState,
    events_key,
    record_key,
    webhook_key,
    worker_key,
)

KEEP_EVENTS_S = 24 * 3600

RecordT = TypeVar("RecordT", bound=JobRecord)

FREE = """
local function free(id, owner)
    local ms = redis.call('HGET', 'flg:slots:ms', id)
    if ms then redis.call('DECRBY', 'flg:slots:total', ms) end
    redis.call('HDEL', 'flg:slots:ms', id)
    redis.call('ZREM', 'flg:slots', id)
    redis.call('ZREM', 'flg:active:' .. owner, id)
end
"""
"""Lua: give back the place that a job has had in the limits (``SLOTS_KEY`` and its companions)."""

# KEYS: record, events, queued ids. ARGV: statuses it may change from (each between spaces), attempt that must still be
# current or "", changed fields as JSON for the event stream, seconds to keep the stream, id, name of the counter,
# cause of a return to the queue, name of the counter of failures, then field, value, ...
_CHANGE = (
    FREE
    + """
local before, owner, webhook = unpack(redis.call('HMGET', KEYS[1], 'status', 'owner', 'webhook_url'))
if not before then return 'missing' end
if not string.find(ARGV[1], ' ' .. before .. ' ', 1, true) then return before end
if ARGV[2] ~= '' and redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[2] then return 'fenced' end
redis.call('HSET', KEYS[1], unpack(ARGV, 9))
local after = redis.call('HGET', KEYS[1], 'status')
redis.call(after == 'queued' and 'SADD' or 'SREM', KEYS[3], ARGV[5])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 256, '*', 'data', ARGV[3], 'status', after)
redis.call('EXPIRE', KEYS[2], ARGV[4])
if after ~= before then
    if after == 'queued' then
        redis.call('HINCRBY', 'flg:metrics', 'requeues_total|cause=' .. ARGV[7], 1)
    elseif after ~= 'running' and after ~= 'cancelling' then
        redis.call('HINCRBY', 'flg:metrics', ARGV[6] .. after, 1)
        if after == 'failed' then
            local code = redis.call('HGET', KEYS[1], 'error_code') or 'none'
            redis.call('HINCRBY', 'flg:metrics', ARGV[8] .. code, 1)
        end
        free(ARGV[5], owner or 'local')
        if webhook and after ~= 'expired' then
            redis.call('ZADD', 'flg:webhooks:due', redis.call('TIME')[1], ARGV[5])
        end
    end
end
redis.call('PUBLISH', 'flg:changes', ARGV[5])
return 'ok'
"""
)

# KEYS: record, index, queued ids, index of the owner's. ARGV: most that may be queued, id, time of creation, time to
# forget it, owner, then field, value, ...
_CREATE = """
if tonumber(ARGV[1]) >= 0 and redis.call('SCARD', KEYS[3]) >= tonumber(ARGV[1]) then return 'full' end
redis.call('HSET', KEYS[1], unpack(ARGV, 6))
redis.call('EXPIREAT', KEYS[1], ARGV[4])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[2])
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', 2 * ARGV[3] - ARGV[4]) -- those that have run out by now
redis.call('SADD', KEYS[3], ARGV[2])
if redis.call('ZSCORE', 'flg:slots', ARGV[2]) then
    redis.call('ZADD', 'flg:slots', '+inf', ARGV[2])
    redis.call('ZADD', 'flg:active:' .. ARGV[5], '+inf', ARGV[2])
end
return 'ok'
"""

# KEYS: record, events, webhook, index, queued ids, index of the owner's. ARGV: id, owner.
_DELETE = (
    FREE
    + """
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('SREM', KEYS[5], ARGV[1])
redis.call('ZREM', KEYS[6], ARGV[1])
redis.call('ZREM', 'flg:webhooks:due', ARGV[1])
redis.call('ZREM', 'flg:webhooks:dead', ARGV[1])
free(ARGV[1], ARGV[2])
redis.call('PUBLISH', 'flg:changes', ARGV[1])
"""
)


class QueueFull(Exception):
    """As many jobs are queued as may be; nothing was written."""


class Refused(Exception):
    """A change that came too late: the record is in another state, belongs to a later attempt, or is gone."""

    def __init__(self, job_id: str, found: str) -> None:
        super().__init__(f"{job_id} is {found}")
        self.found = found
        """The record's status, or "fenced", or "missing"."""


class Records(Generic[RecordT]):
    """The records of one kind in one Redis."""

    def __init__(self, redis: Redis, kind: type[RecordT]) -> None:
        self.redis = redis
        self.kind = kind
        self._change = redis.register_script(_CHANGE)
        self._create = redis.register_script(_CREATE)
        self._delete = redis.register_script(_DELETE)

    def get(self, job_id: str) -> RecordT | None:
        """One record, or None where there is no such job."""
        values = cast(dict[str, str], self.redis.hgetall(record_key(job_id)))
        return self.kind.from_hash(values) if values else None

    def get_many(self, ids: list[str]) -> list[RecordT]:
        """Those of these that there are, in one call."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hgetall(record_key(job_id))
            found = cast(list[dict[str, str]], pipeline.execute()) if ids else []
        return [self.kind.from_hash(values) for values in found if values]

    def create(self, record: RecordT, max_queued: int = -1) -> None:
        """Write a new record and count it as queued, in one call, so that no two requests share the last place.

        A place that admission has reserved for it in the limits becomes its own until it is over.

        Raises:
            QueueFull: ``max_queued`` jobs are waiting; below 0 that is not asked.
        """
        fields = record.to_hash()
        answer = self._create(
            keys=[record_key(record.id), self.kind.index_key, self.kind.queued_key, self.owned_key(record.owner)],
            args=[
                max_queued,
                record.id,
                record.created_at,
                record.forget_at,
                record.owner,
                *(part for pair in fields.items() for part in pair),
            ],
        )
        if answer != "ok":
            raise QueueFull

    def owned_key(self, owner: str) -> str:
        """Sorted set: those of ``index_key`` that one API key has asked for."""
        return f"{self.kind.index_key}:of:{owner}"

    def moment(self) -> float:
        """Seconds since the epoch by Redis's clock, for what cannot be taken back: this machine's may be wrong."""
        seconds, microseconds = self.redis.time()
        return seconds + microseconds / 1e6

    def num_queued(self) -> int:
        """Jobs that wait for a worker."""
        return self.redis.scard(self.kind.queued_key)

    def delete(self, job_id: str, owner: str | None = None) -> None:
        """Forget a job. Its ``owner`` is needed where the record is gone already."""
        if owner is None:
            owner = cast(str | None, self.redis.hget(record_key(job_id), "owner")) or LOCAL
        kind = self.kind
        keys = [record_key(job_id), events_key(job_id), webhook_key(job_id), kind.index_key, kind.queued_key]
        self._delete(keys=[*keys, self.owned_key(owner)], args=[job_id, owner])

    def change(
        self, record: RecordT, since: Iterable[Status], *, fence: bool = False, cause: str = "lost", **changes: Any
    ) -> RecordT:
        """Change fields of a record that is in one of the states ``since``; returns it as changed.

        Args:
            record: the job as last read.
            since: states that the change is right for.
            fence: also require that no later attempt has begun since ``record`` was read.
            cause: what a return to the queue is counted as, for the metrics.
            changes: new values by field name.

        Raises:
            Refused: the record is no longer in such a state; nothing was written.
        """
        after = record.model_copy(update=changes)
        values = {name: value for name, value in after.to_hash().items() if name in changes}
        if record.deaths and not after.deaths:  # a zero is left out of a record; here it has something to replace
            values["deaths"] = "0"
        answer = self._change(
            keys=[record_key(record.id), events_key(record.id), self.kind.queued_key],
            args=[
                f" {' '.join(since)} ",
                str(record.attempt) if fence else "",
                json.dumps(after.model_dump(mode="json", include=set(changes))),
                KEEP_EVENTS_S,
                record.id,
                record.counter,
                cause,
                record.failure_counter,
                *(part for pair in values.items() for part in pair),
            ],
        )
        if answer != "ok":
            raise Refused(record.id, str(answer))
        return after


def served_models(redis: Redis, alive: Iterable[Heartbeat]) -> list[ModelCard]:
    """The models that can be asked for, the one that answers when none is named first.

    That is the released one as soon as one of the ``alive`` workers has it. The others are those that all of them have
    loaded, in their order. While there is no worker, the last that answered. Empty before any has been ready.
    """
    first = cast(str | None, redis.get(ACTIVE_MODEL_KEY))
    loaded = [worker for worker in alive if worker.models]
    if loaded:
        released = redis.hget(RELEASE_KEY, "active")
        answering = [worker.models[0] for worker in loaded]
        with_release = [worker.models[0] for worker in loaded if worker.model_sha256 == released]
        first = (with_release or [one for one in answering if one == first] or answering)[0]
    if first is None:
        return []
    others = [] if not loaded else [one for one in loaded[0].models if all(one in other.models for other in loaded)]
    texts = cast(list[str | None], redis.hmget(MODELS_KEY, list(dict.fromkeys([first, *others]))))
    return [ModelCard.model_validate_json(text) for text in texts if text]


def publish_models(redis: Redis, cards: list[ModelCard]) -> None:
    """Say what a worker that is ready has loaded; the first answers when a request names none."""
    released = redis.hget(RELEASE_KEY, "active")
    with redis.pipeline() as pipeline:
        pipeline.hset(MODELS_KEY, mapping={card.id: card.model_dump_json() for card in cards})
        pipeline.set(ACTIVE_MODEL_KEY, cards[0].id, nx=released not in (None, cards[0].sha256))
        pipeline.execute()


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
