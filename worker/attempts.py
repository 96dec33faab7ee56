"""Attempts at a job of any kind: claiming it, giving way to a later one, ending it, and what is left when one is lost.

The queue may deliver a job twice (after a crash, or a lease that ran out). The attempt number fences off whoever is
late, and an attempt that is no longer the current one returns quietly, whatever it meets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from redis.exceptions import RedisError
from rq import Retry
from rq.exceptions import AbandonedJobError
from rq.job import Job

from worker import tracing
from worker.contract import MAX_ATTEMPTS, MAX_DEATHS, Status
from worker.engine.errors import EngineLost
from worker.records import Records, RecordT, Refused, now

log = logging.getLogger(__name__)

ACTIVE = (Status.RUNNING, Status.CANCELLING)

_CAUSES: dict[type[BaseException], str] = {
    AbandonedJobError: "lease",
    EngineLost: "engine",
    RedisError: "redis",
    OSError: "storage",
}
"""Why an attempt was lost: its worker died, or could not go on; what it needs did not answer."""
_DEATHS = ("lease", "engine")

ResultT = TypeVar("ResultT")


def attempt(
    records: Records[RecordT], job_id: str, worker: str, work: Callable[[RecordT], ResultT], **claimed: Any
) -> ResultT | None:
    """Claim a job and do its ``work``; None where that is not ours to do, or no longer.

    A failure of the job itself ends in its record and returns; only a failure of the plumbing (Redis, storage) is
    raised, so that rq tries again, and only by the attempt that is current: what a late one meets is not the job's.

    Args:
        records: of the job's kind.
        job_id: what rq was told.
        worker: name of this process.
        work: is given the claimed record. May raise ``Refused``, ``RedisError``, ``OSError``.
        claimed: fields to write with the claim.
    """
    record = records.get(job_id)
    if record is None:
        log.warning("%s: there is no such record; it was deleted while queued", job_id)
        return None
    try:
        record = claim(records, record, worker, **claimed)
    except Refused as refused:
        log.info("%s: not started, it is %s", job_id, refused.found)
        _acknowledge_cancel(records, record)
        return None
    try:
        if record.deaths >= MAX_DEATHS or record.attempt > MAX_ATTEMPTS:
            fail(records, record, *record.given_up())
            return None
        return work(record)
    except Refused as refused:
        log.warning("%s: attempt %d gave way, the job is %s", job_id, record.attempt, refused.found)
    except (RedisError, OSError, EngineLost) as error:
        if held(records, record):
            raise
        log.warning("%s: attempt %d is no longer the current one (%s)", job_id, record.attempt, error)
    return None


def claim(records: Records[RecordT], record: RecordT, worker: str, **claimed: Any) -> RecordT:
    """Make the job ours: the next attempt.

    A running job may be claimed: its worker's lease has run out, or the process that rq ran it in was killed. Of the
    latter rq tells nobody, so it is counted here.
    """
    number = record.attempt + 1
    changes: dict[str, Any] = {**record.anew, "attempt": number, "worker": worker, "started_at": now(), **claimed}
    if record.status is Status.RUNNING:
        changes["deaths"] = record.deaths + 1
    try:
        ours = records.change(record, (Status.QUEUED, Status.RUNNING), fence=True, status=Status.RUNNING, **changes)
    except Refused:
        # The connection may have dropped after the claim was written and before we were told; the client then sent
        # it again, and it met our own claim.
        found = held(records, record.model_copy(update={"worker": worker, "attempt": number}))
        if found is None:
            raise
        ours = found
    return ours.model_copy(update=record.once) if record.started_at else ours


def held(records: Records[RecordT], record: RecordT) -> RecordT | None:
    """The record as it is now, if this attempt is still the current one."""
    found = records.get(record.id)
    return found if found and (found.worker, found.attempt) == (record.worker, record.attempt) else None


def ours(records: Records[RecordT], record: RecordT) -> RecordT:
    """The record as it is now, for an attempt that is current and not over.

    Raises:
        Refused: it is another's, over, back in the queue, or gone.
    """
    found = records.get(record.id)
    if found is None:
        raise Refused(record.id, "missing")
    if (found.worker, found.attempt) != (record.worker, record.attempt):
        raise Refused(record.id, "fenced")
    if found.status not in ACTIVE:
        raise Refused(record.id, found.status)
    return found


def _acknowledge_cancel(records: Records[RecordT], record: RecordT) -> None:
    try:
        records.change(record, (Status.CANCELLING,), status=Status.CANCELLED, finished_at=now())
    except Refused:
        pass


def finish(records: Records[RecordT], record: RecordT, status: Status, **changes: Any) -> None:
    """End the job, unless somebody else has. A success that meets a late cancel stays a success."""
    records.change(record, ACTIVE, fence=True, status=status, finished_at=now(), **changes)
    log.info("%s %s, attempt %d", record.id, status, record.attempt)


def fail(records: Records[RecordT], record: RecordT, code: str, message: str) -> None:
    """End the job as failed."""
    tracing.note_failure(code)
    finish(records, record, Status.FAILED, error_code=code, error_message=message)


_AGAIN = Retry(max=10**9, enqueue_at_front=True)
"""For rq: the job goes back to the queue, before those that have not begun. None of its own tries is used up."""


def hand_back(records: Records[RecordT], record: RecordT, *, counts: bool = False) -> Retry | None:
    """Leave a job that is ours to whoever is free next; what this returns, rq has to be given.

    The attempt was not lost, so it is as if it had never begun: however often workers are replaced, a job that is
    handed back each time does not fail for it. Nothing may be written by it afterwards, for the next has its number.

    Args:
        records: of the job's kind.
        record: as it was claimed.
        counts: it was lost all the same.

    Raises:
        Refused: it is no longer ours.
    """
    of_it = {"deaths": record.deaths + 1} if counts else {"attempt": record.attempt - 1}
    try:
        back: dict[str, Any] = {**record.anew, "status": Status.QUEUED, **of_it}
        records.change(record, (Status.RUNNING,), fence=True, cause="lost" if counts else "handed_back", **back)
    except Refused as refused:
        if refused.found == Status.CANCELLING:
            finish(records, record, Status.CANCELLED)
            return None
        # The connection may have dropped after this was written and before we were told; it is then sent again.
        if refused.found != Status.QUEUED:
            raise
    log.info("%s handed back, attempt %d", record.id, record.attempt)
    return _AGAIN


def lost(records: Records[RecordT], job: Job, kind: type[BaseException], value: BaseException | None) -> None:
    """Put the record right after rq lost an attempt: Redis or the storage failed, or its worker died."""
    record = records.get(job.args[0])
    if record is None or record.status.is_terminal:
        return
    cause = next((cause for kinds, cause in _CAUSES.items() if issubclass(kind, kinds)), "lost")
    deaths = record.deaths + (cause in _DEATHS)
    try:
        if record.status is Status.CANCELLING:
            records.change(record, ACTIVE, status=Status.CANCELLED, finished_at=now())
        elif job.retries_left and deaths < MAX_DEATHS:
            back: dict[str, Any] = {**record.anew, "status": Status.QUEUED, "deaths": deaths}
            records.change(record, (Status.RUNNING,), cause=cause, **back)
        else:
            code, message = record.model_copy(update={"deaths": deaths}).given_up(cause)
            failed: dict[str, Any] = {"status": Status.FAILED, "error_code": code, "error_message": message}
            records.change(record, (Status.QUEUED, *ACTIVE), fence=True, finished_at=now(), deaths=deaths, **failed)
    except Refused as refused:
        log.info("%s: left as it is, %s", record.id, refused.found)
    log.warning("%s: attempt %d lost (%s: %s)", record.id, record.attempt, kind.__name__, value)
