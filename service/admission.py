"""Whether a job is let in: idempotency, limits of the key, limits of all, in one Lua call.

A place is reserved before anything costly is done for a request, and given back when that fails. Reservations run out
by themselves, so a service that dies in between leaks none. `worker.records` makes a place the job's own and frees it
at its end.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import cast

from redis import Redis

from service.auth import Principal
from service.errors import ApiError
from worker.contract import METRICS_KEY, SLOTS_KEY, SLOTS_MS_KEY, SLOTS_TOTAL_KEY, Record, active_key
from worker.records import FREE, now

_RESERVED_S = 90
"""Within which a request has to become a job."""
_IDEMPOTENT_S = 24 * 3600
_RETRY_S = 60
"""Within which a retry without an Idempotency-Key is taken for the same request."""
_RETRY_AFTER_S = (1, 120)
"""Common clients give up when they are told to wait longer."""

# KEYS: 1 slots, 2 their ms, 3 their total, 4 the owner's slots, 5 the owner's rate, 6 same request, 7 queued ids,
# 8 idempotency key, if any. ARGV: 1 id, 2 owner, 3 fingerprint, 4 now (s), 5 until when the place is reserved (s),
# 6 expected ms, 7 most jobs of the owner, 8 most requests a minute, 9 most queued, 10 most ms to wait, 11 workers,
# 12 seconds to keep the idempotency key, 13 seconds to know a retry, 14 "1" for a retry.
_ADMIT = (
    FREE
    + """
if redis.call('ZSCORE', KEYS[1], ARGV[1]) then -- the connection broke before we heard, and the client sent it again
    return {'new', tostring((redis.call('GET', KEYS[3]) - ARGV[6]) / ARGV[11] / 1000)}
end
local now = tonumber(ARGV[4])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do free(id, ARGV[2]) end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now)

local function under_way(id)
    return redis.call('EXISTS', 'flg:job:' .. id) == 1 or redis.call('ZSCORE', KEYS[1], id)
end
if KEYS[8] then
    local before, id = unpack(redis.call('HMGET', KEYS[8], 'fingerprint', 'id'))
    if id and under_way(id) then return {before == ARGV[3] and 'again' or 'conflict', id} end
elseif ARGV[14] == '1' then
    local id = redis.call('GET', KEYS[6])
    if id and under_way(id) then return {'again', id} end
end

local per_minute, due = tonumber(ARGV[8]), 0
if per_minute > 0 then
    due = math.max(tonumber(redis.call('GET', KEYS[5]) or now), now) + 60 / per_minute
    if due - now > 60.001 then return {'rate', tostring(due - now - 60)} end
end
local most = tonumber(ARGV[7])
if most > 0 and redis.call('ZCARD', KEYS[4]) >= most then return {'jobs', tostring(most)} end
local reserved = redis.call('ZCOUNT', KEYS[1], '-inf', '(+inf')
if redis.call('SCARD', KEYS[7]) + reserved >= tonumber(ARGV[9]) then return {'full', ARGV[9]} end
local ms = tonumber(redis.call('GET', KEYS[3]) or 0) / tonumber(ARGV[11])
if ms > tonumber(ARGV[10]) then return {'wait', tostring(ms / 1000)} end

if per_minute > 0 then redis.call('SET', KEYS[5], tostring(due), 'EX', 120) end
redis.call('ZADD', KEYS[1], ARGV[5], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[5], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[6])
redis.call('INCRBY', KEYS[3], ARGV[6])
redis.call('SET', KEYS[6], ARGV[1], 'EX', ARGV[13])
if KEYS[8] then
    redis.call('HSET', KEYS[8], 'fingerprint', ARGV[3], 'id', ARGV[1])
    redis.call('EXPIRE', KEYS[8], ARGV[12])
end
return {'new', tostring(ms / 1000)}
"""
)

# KEYS: same request, idempotency key, if any. ARGV: id, owner.
_RELEASE = (
    FREE
    + """
free(ARGV[1], ARGV[2])
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
if KEYS[2] and redis.call('HGET', KEYS[2], 'id') == ARGV[1] then redis.call('DEL', KEYS[2]) end
"""
)


@dataclass(frozen=True)
class Terms:
    """What a client says of a request beside what it asks for."""

    idempotency_key: str | None = None
    is_retry: bool = False
    """It has sent this before."""
    start_within_s: float = math.inf
    finish_within_s: float = math.inf


@dataclass(frozen=True)
class Request:
    """What admission has to know of a request for a video."""

    id: str
    """Of the job that it will be."""
    principal: Principal
    fingerprint: str
    """The same for the same body."""
    expected_s: float
    """How long a worker will be at it."""
    terms: Terms = Terms()


@dataclass(frozen=True)
class Admitted:
    """A place that is reserved; or the job that the same request has become before."""

    job_id: str
    is_new: bool
    wait_s: float = 0.0
    """For how long the workers have work already."""


class Admission:
    """The gate in front of the queue."""

    def __init__(self, redis: Redis, max_queued: int, max_wait_s: float) -> None:
        """``redis`` decodes responses."""
        self._redis = redis
        self._max_queued = max_queued
        self._max_wait_s = max_wait_s
        self._admit = redis.register_script(_ADMIT)
        self._release = redis.register_script(_RELEASE)

    def admit(self, request: Request, num_workers: int) -> Admitted:
        """Reserve a place, or say which job this request is already.

        Raises:
            ApiError: 422 the Idempotency-Key belongs to another body, 429 the key's limits, 503 everybody's.
        """
        owner, terms, moment = request.principal.id, request.terms, now()
        max_wait_s = min(self._max_wait_s, terms.start_within_s, max(0.0, terms.finish_within_s - request.expected_s))
        same, *idempotency = _request_keys(request)
        keys = [
            SLOTS_KEY,
            SLOTS_MS_KEY,
            SLOTS_TOTAL_KEY,
            active_key(owner),
            f"flg:rate:{owner}",
            same,
            Record.queued_key,
            *idempotency,
        ]
        args: list[str | int | float] = [
            request.id,
            owner,
            request.fingerprint,
            moment,
            moment + _RESERVED_S,
            max(1, round(1000 * request.expected_s)),
            request.principal.max_jobs,
            request.principal.per_minute,
            self._max_queued,
            round(1000 * max_wait_s),
            max(1, num_workers),
            _IDEMPOTENT_S,
            _RETRY_S,
            int(terms.is_retry),
        ]
        verdict, value = cast(list[str], self._admit(keys=keys, args=args))
        if verdict == "new":
            return Admitted(request.id, True, float(value))
        if verdict == "again":
            return Admitted(value, False)
        self.count_refusal(verdict)
        raise self._refusal(verdict, value, request, num_workers)

    def release(self, request: Request) -> None:
        """Give a reserved place back: the request has failed, and may be sent again as if it had never been."""
        self._release(keys=_request_keys(request), args=[request.id, request.principal.id])

    def count_refusal(self, reason: str) -> None:
        """For the metrics."""
        self._redis.hincrby(METRICS_KEY, f"admission_rejected_total|reason={reason}", 1)

    def _refusal(self, verdict: str, value: str, request: Request, num_workers: int) -> ApiError:
        if verdict == "conflict":
            message = f"Idempotency-Key: it came with another body before (for {value}); a new request needs a new one"
            return ApiError(422, "idempotency_key_reused", message, param="Idempotency-Key")
        if verdict == "rate":
            wait_s = _retry_after(float(value))
            message = f"this key may ask for {request.principal.per_minute} videos a minute; try again in {wait_s} s"
            return ApiError(429, "rate_limited", message, retry_after_s=wait_s)
        if verdict == "jobs":
            wait_s = _retry_after(request.expected_s)
            message = f"this key may have {value} jobs under way, and has; try again in {wait_s} s, or cancel one"
            return ApiError(429, "too_many_jobs", message, retry_after_s=wait_s)
        if verdict == "full":
            # A tenth of the queue gone is a fair chance.
            wait_s = _retry_after(request.expected_s * self._max_queued / 10 / max(1, num_workers))
            message = f"{value} jobs are waiting, and no more may; try again in {wait_s} s"
            return ApiError(503, "queue_full", message, retry_after_s=wait_s)
        work_s = float(value)
        if work_s <= self._max_wait_s:
            terms = request.terms
            wait_s = _retry_after(work_s - min(terms.start_within_s, terms.finish_within_s - request.expected_s))
            message = f"a job that is sent now begins in about {work_s:.0f} s, which is after its deadline"
            return ApiError(503, "deadline_out_of_reach", message, retry_after_s=wait_s)
        wait_s = _retry_after(work_s - self._max_wait_s)
        message = f"the workers have work for {work_s:.0f} s, and no more is taken; try again in {wait_s} s"
        return ApiError(503, "queue_full", message, retry_after_s=wait_s)


def _request_keys(request: Request) -> list[str]:
    """The request itself, then its Idempotency-Key, if it has one: no user of Redis may name a key ""."""
    owner, key = request.principal.id, request.terms.idempotency_key
    same = f"flg:same:{owner}:{request.fingerprint}"
    # A hash: what the client sent may be of any length, and hold a colon.
    return [same, f"flg:idempotent:{owner}:{hashlib.sha256(key.encode()).hexdigest()}"] if key else [same]


def _retry_after(seconds: float) -> int:
    low, high = _RETRY_AFTER_S
    return max(low, min(high, math.ceil(seconds) if math.isfinite(seconds) else high))
