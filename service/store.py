"""`Store`: what jobs of every kind have in common. The record comes first and is the truth; rq is transport."""

from __future__ import annotations

import logging
from typing import Generic, cast

from redis import Redis
from redis.exceptions import RedisError
from rq import Callback, Queue, Retry, suspension
from rq.exceptions import NoSuchJobError
from rq.executions import ExecutionRegistry
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from service.errors import ApiError
from worker.connection import confirm
from worker.contract import MAX_ATTEMPTS, MAX_DEATHS, Status, record_key
from worker.records import Records, RecordT, Refused, now

log = logging.getLogger(__name__)

_KEEP_DONE_S, _KEEP_RQ_S = 60, 24 * 3600
"""How long rq remembers a job that is done, and one that failed. Our record says everything; this is for whoever debugs
the queue."""
_KEEP_DROPPED_S = 600
_GRACE_S = 10


class Store(Generic[RecordT]):
    """Read, list, cancel; and put right what a crash left between record and queue."""

    def __init__(self, redis: Redis, queue_redis: Redis, kind: type[RecordT], job_timeout_s: int) -> None:
        """``redis`` decodes responses; ``queue_redis`` (for rq) does not."""
        self._redis = redis
        self._kind = kind
        self._job_timeout_s = job_timeout_s
        self.records = Records(redis, kind)
        self._queue = Queue(kind.queue, connection=queue_redis, serializer=JSONSerializer)

    # --- submit ---------------------------------------------------------------------------------------------------

    def _enqueue(self, job_id: str) -> None:
        self._queue.enqueue(
            self._kind.function,
            job_id,
            job_id=job_id,
            retry=Retry(max=MAX_ATTEMPTS - 1),
            on_failure=Callback(self._kind.on_lost),
            job_timeout=self._job_timeout_s,
            result_ttl=_KEEP_DONE_S,
            failure_ttl=_KEEP_RQ_S,
            description=job_id,
        )
        confirm(self._redis, record_key(job_id))

    def _forget(self, job_id: str) -> None:
        """Take back a half-made job. If Redis does not let us, it stays whole: `reconcile` then sees to it."""
        try:
            self._drop_from_queue(job_id)
            self.records.delete(job_id)
        except RedisError:
            log.warning("%s: could not be taken back, Redis does not answer", job_id)
            return
        self._remove_files(job_id)

    def _remove_files(self, job_id: str) -> None:
        """Remove what is kept of a job beside its record."""

    # --- read -----------------------------------------------------------------------------------------------------

    def get(self, job_id: str, owner: str | None = None) -> RecordT:
        """One record; of this ``owner``, where one is given. Raises ``ApiError`` 404."""
        record = self.records.get(job_id)
        if record is None or owner not in (None, record.owner):  # that it is somebody else's is nobody's business
            raise ApiError(404, "not_found", f"there is no {self._kind.noun} {job_id!r}")
        return record

    def page(
        self, limit: int, after: str | None, owner: str | None = None, *, oldest_first: bool = False
    ) -> tuple[list[RecordT], bool]:
        """``limit`` records from the newest on, those after ``after``; and whether there are more.

        Raises:
            ApiError: 422 there is no ``after``.
        """
        index = self.records.owned_key(owner) if owner else self._kind.index_key
        rank_of, ids_of = (
            (self._redis.zrank, self._redis.zrange) if oldest_first else (self._redis.zrevrank, self._redis.zrevrange)
        )
        start = 0
        if after is not None:
            rank = rank_of(index, after)
            if rank is None:
                raise ApiError(422, "unknown_cursor", f"after: there is no {self._kind.noun} {after!r}", param="after")
            start = cast(int, rank) + 1
        ids = cast(list[str], ids_of(index, start, start + limit))
        return self.records.get_many(ids[:limit]), len(ids) > limit

    # --- cancel ---------------------------------------------------------------------------------------------------

    def cancel(self, job_id: str, owner: str | None = None) -> RecordT:
        """Cancel at once while queued, at the next step while running; a job that is over is left as it is.

        Raises:
            ApiError: 404 no such job, 409 it is over and was not cancelled.
        """
        record = self.get(job_id, owner)
        try:
            record = self.records.change(record, (Status.QUEUED,), status=Status.CANCELLED, finished_at=now())
            self._drop_from_queue(job_id)
            return record
        except Refused:
            pass
        try:
            return self.records.change(record, (Status.RUNNING, Status.CANCELLING), status=Status.CANCELLING)
        except Refused as refused:
            if refused.found == Status.CANCELLED:
                return self.get(job_id)
            raise ApiError(409, "already_over", f"{job_id} has {refused.found} and cannot be cancelled") from None

    def _drop_from_queue(self, job_id: str) -> None:
        """Take a job off the queue, if it is still on it; rq's own record of it runs out by itself.

        Not `Job.delete()`: a worker may have the job in its hands, and would meet half of it, or we half of theirs.
        """
        self._queue.remove(job_id)
        self._queue.connection.expire(Job.key_for(job_id), _KEEP_DROPPED_S)

    # --- pause ----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Have workers and trainers take no job; one that is waiting for a job may take that one yet."""
        suspension.suspend(self._queue.connection)

    def resume(self) -> None:
        """Have them take jobs again."""
        suspension.resume(self._queue.connection)

    def is_paused(self) -> bool:
        """Whether they take none."""
        return bool(suspension.is_suspended(self._queue.connection))

    # --- upkeep ---------------------------------------------------------------------------------------------------

    def reconcile(self, ids: list[str] | None = None) -> int:
        """Put right every job, or those of these, that the queue has lost. Returns how many.

        A service may die between record and queue; rq may drop a job whose worker was late, or fail it without telling
        us. Whatever is not over here and not alive there is enqueued again, or ended.
        """
        mended = 0
        for job_id, status in self._statuses(ids):
            if status is None:  # its record has run out
                self._remove_files(job_id)
                self.records.delete(job_id)
            elif not status.is_terminal and (record := self.records.get(job_id)) and self._is_lost(record):
                self._recover(record)
                mended += 1
        return mended

    def _statuses(self, ids: list[str] | None) -> list[tuple[str, Status | None]]:
        if ids is None:
            ids = cast(list[str], self._redis.zrange(self._kind.index_key, 0, -1))
        with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hget(record_key(job_id), "status")
            found = pipeline.execute()
        return [(job_id, Status(status) if status else None) for job_id, status in zip(ids, found, strict=True)]

    def _is_lost(self, record: RecordT) -> bool:
        # A moment's grace: the record of a request in flight comes before its place in the queue, and the end of a
        # job before rq's.
        if now() - (record.started_at or record.created_at) < _GRACE_S:
            return False
        # Of two attempts, the one that gave way has told the queue that the job is done; the other is at work still.
        if record.id in self._queue.started_job_registry:
            return False
        try:
            job = Job.fetch(record.id, connection=self._queue.connection, serializer=JSONSerializer)
        except NoSuchJobError:
            return True
        return job.get_status() in (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)

    def _recover(self, record: RecordT) -> None:
        self._clear(record.id)
        alive = (Status.QUEUED, Status.RUNNING)
        try:
            if record.status is Status.CANCELLING:
                self.records.change(record, (Status.CANCELLING,), status=Status.CANCELLED, finished_at=now())
            elif record.attempt >= MAX_ATTEMPTS or record.deaths >= MAX_DEATHS:
                code, message = record.given_up()
                failed = {"status": Status.FAILED, "error_code": code, "error_message": message}
                self.records.change(record, alive, fence=True, finished_at=now(), **failed)
            else:
                self.records.change(record, alive, fence=True, cause="reconciled", status=Status.QUEUED, **record.anew)
                self._enqueue(record.id)
        except Refused:
            return  # it has moved on by itself
        log.warning("%s: %s here and lost in the queue; put right", record.id, record.status)

    def _clear(self, job_id: str) -> None:
        """Nothing of a job that is over may show in the one that is enqueued next, which has the same id."""
        self._queue.remove(job_id)
        connection = self._queue.connection
        connection.delete(Job.key_for(job_id), ExecutionRegistry(job_id, connection).key)

    def upkeep(self) -> None:
        """`reconcile`, by one service at a time."""
        if self._alone():
            self.reconcile()

    def _alone(self) -> bool:
        return bool(self._redis.set(f"{self._kind.index_key}:upkeep", "1", nx=True, ex=25))
