"""`JobStore`: the jobs of this service. The record comes first and is the truth; rq is transport."""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from typing import cast

from redis import Redis
from redis.exceptions import RedisError
from rq import Callback, Queue, Retry
from rq.exceptions import NoSuchJobError
from rq.executions import ExecutionRegistry
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from service import images
from service.errors import ApiError
from service.schema import GenerateFields
from service.settings import Settings
from worker.contract import (
    GENERATE,
    GENERATE_FAILED,
    JOBS_KEY,
    MAX_ATTEMPTS,
    OUTPUT_SUFFIXES,
    QUEUE,
    QUEUED_KEY,
    SECONDS_KEY,
    ModelCard,
    Record,
    Status,
    input_path,
    output_path,
    record_key,
)
from worker.records import QueueFull, Records, Refused, active_model, now, ready_workers
from worker.storage import Storage

log = logging.getLogger(__name__)

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, in lower case
_KEEP_RQ_S = 24 * 3600
"""How long rq remembers a job that is over. Our record says everything; this is for whoever debugs the queue."""


_KEEP_DROPPED_S = 600
_GRACE_S = 10
_ORPHAN_S = 3600


def new_id() -> str:
    """`vid_` and 26 characters: 48 bits of time in ms, so that ids sort by age, and 80 random bits (as in a ULID)."""
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return "vid_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def created_at(job_id: str) -> float:
    """Seconds since the epoch at which ``new_id`` made this id."""
    number = 0
    for character in job_id.removeprefix("vid_"):
        number = number << 5 | max(_ALPHABET.find(character), 0)
    return (number >> 80) / 1000


class JobStore:
    """Submit, read, cancel, delete; and put right what a crash left between record and queue."""

    def __init__(self, settings: Settings, redis: Redis, queue_redis: Redis, storage: Storage) -> None:
        """``redis`` decodes responses; ``queue_redis`` (for rq) does not."""
        self._settings = settings
        self._redis = redis
        self._storage = storage
        self.records = Records(redis)
        self._queue = Queue(QUEUE, connection=queue_redis, serializer=JSONSerializer)

    # --- submit ---------------------------------------------------------------------------------------------------

    def submit(self, fields: GenerateFields, image: bytes) -> Record:
        """Check a request, keep its image, write its record, enqueue it. A refused request leaves nothing behind.

        Raises:
            ApiError: what is wrong with the request, or why no job can be taken now.
        """
        card = self._model(fields)
        prompt = self._prompt(card, fields.prompt)
        self._check_room(card)
        picture = images.clean(image, card.video.width, card.video.height, self._settings.max_pixels)
        started = now()
        record = Record(
            id=new_id(),
            status=Status.QUEUED,
            prompt=prompt,
            seed=secrets.randbits(32) if fields.seed is None else fields.seed,
            model=card.name,
            created_at=started,
            expires_at=started + 3600 * self._settings.retention_hours,
        )
        try:
            self._storage.write(input_path(record.id), picture)
            self.records.create(record, self._settings.max_queued)
            self._enqueue(record.id)
        except QueueFull:
            self._storage.delete(input_path(record.id))
            raise self._queue_full(card) from None
        except BaseException:
            self._forget(record.id)
            raise
        return record

    def _model(self, fields: GenerateFields) -> ModelCard:
        card = active_model(self._redis)
        if card is None:
            message = "no worker has been ready yet, so no model is known; try again when /readyz answers 200"
            raise ApiError(503, "no_model", message, retry_after_s=5)
        if fields.model not in (None, card.name):
            message = f"model: got {fields.model!r}; the model that is active is {card.name!r}"
            raise ApiError(422, "unknown_model", message, param="model")
        if fields.steps not in (None, card.num_inference_steps):
            own = card.num_inference_steps
            message = f"steps: got {fields.steps}; {card.name} was made for {own} steps and no other"
            raise ApiError(422, "steps_not_supported", message, param="steps")
        return card

    @staticmethod
    def _prompt(card: ModelCard, text: str) -> str:
        try:
            return card.prompt.canonical(text)
        except ValueError as error:
            raise ApiError(422, "prompt_not_understood", f"prompt: {error}", param="prompt") from None

    def _check_room(self, card: ModelCard) -> None:
        if self.records.num_queued() >= self._settings.max_queued:
            raise self._queue_full(card)
        free = self._storage.free_bytes()
        if free is not None and free < self._settings.min_free_bytes:
            message = "the disk is nearly full, so no new video can be kept; an administrator has to make room"
            raise ApiError(507, "disk_full", message, retry_after_s=120)

    def _queue_full(self, card: ModelCard) -> ApiError:
        waiting = self._settings.max_queued
        seconds = self._seconds_per_job(card.name) or 5.0
        # A tenth of the queue gone is a fair chance; beyond 120 s common clients give up instead of waiting.
        retry_after_s = max(1, min(120, math.ceil(seconds * waiting / 10)))
        message = f"{waiting} jobs are waiting, and no more may; try again in {retry_after_s} s"
        return ApiError(503, "queue_full", message, retry_after_s=retry_after_s)

    def _enqueue(self, job_id: str) -> None:
        self._queue.enqueue(
            GENERATE,
            job_id,
            job_id=job_id,
            retry=Retry(max=MAX_ATTEMPTS - 1),
            on_failure=Callback(GENERATE_FAILED),
            job_timeout=self._settings.job_timeout_s,
            result_ttl=600,
            failure_ttl=_KEEP_RQ_S,
            description=job_id,
        )

    def _forget(self, job_id: str) -> None:
        """Take back a half-made job. If Redis does not let us, it stays whole: `reconcile` then sees to it."""
        try:
            self._drop_from_queue(job_id)
            self.records.delete(job_id)
        except RedisError:
            log.warning("%s: could not be taken back, Redis does not answer", job_id)
            return
        self._storage.delete(input_path(job_id))

    # --- read -----------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Record:
        """One record. Raises ``ApiError`` 404."""
        record = self.records.get(job_id)
        if record is None:
            raise ApiError(404, "not_found", f"there is no generation {job_id!r}")
        return record

    def page(self, limit: int, after: str | None) -> tuple[list[Record], bool]:
        """``limit`` records from the newest on, those after ``after``; and whether there are more."""
        start = 0
        if after is not None:
            rank = self._redis.zrevrank(JOBS_KEY, after)
            if rank is None:
                raise ApiError(422, "unknown_cursor", f"after: there is no generation {after!r}", param="after")
            start = cast(int, rank) + 1
        ids = cast(list[str], self._redis.zrevrange(JOBS_KEY, start, start + limit))
        found = [record for job_id in ids[:limit] if (record := self.records.get(job_id))]
        return found, len(ids) > limit

    def outlooks(self, records: list[Record]) -> list[tuple[int | None, float | None]]:
        """For each: place in the queue (1 is next) and seconds until done, None where not known or not due."""
        # Asked at each step of each job that somebody follows, so only what these records need is read.
        under_way = {record.model for record in records if not record.status.is_terminal}
        seconds = {model: self._seconds_per_job(model) for model in under_way}
        any_queued = any(record.status is Status.QUEUED for record in records)
        num_workers = max(1, len(ready_workers(self._redis))) if any_queued else 1
        return [self._outlook(record, seconds.get(record.model), num_workers) for record in records]

    def _outlook(self, record: Record, seconds: float | None, num_workers: int) -> tuple[int | None, float | None]:
        if record.status.is_terminal:
            return None, None
        if record.status is not Status.QUEUED:
            return None, None if seconds is None else round(seconds * (1 - record.progress), 2)
        index = self._queue.get_job_position(record.id)
        position = None if index is None else index + 1
        if seconds is None or position is None:
            return position, None
        rounds = math.ceil(position / num_workers)
        return position, round(seconds * (rounds + 0.5), 2)  # whoever is running now is half done on average

    def _seconds_per_job(self, model: str) -> float | None:
        text = cast(str | None, self._redis.hget(SECONDS_KEY, model))
        return float(text) if text else None

    # --- cancel and delete ----------------------------------------------------------------------------------------

    def cancel(self, job_id: str) -> Record:
        """Cancel at once while queued, at the next step while running; a job that is over is left as it is.

        Raises:
            ApiError: 404 no such job, 409 it is over and was not cancelled.
        """
        record = self.get(job_id)
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

    def delete(self, job_id: str) -> None:
        """Remove a job that is over, with its files.

        Raises:
            ApiError: 404 no such job, 409 it is not over: its worker has not let go of it.
        """
        record = self.get(job_id)
        if not record.status.is_terminal:
            message = f"{job_id} is {record.status}: its worker has not let go of it yet; delete it again in a moment"
            raise ApiError(409, "still_running", message)
        self._remove_files(job_id)
        self._drop_from_queue(job_id)
        self.records.delete(job_id)

    def _remove_files(self, job_id: str) -> None:
        for path in (input_path(job_id), *(output_path(job_id, suffix) for suffix in OUTPUT_SUFFIXES)):
            self._storage.delete(path)

    def _drop_from_queue(self, job_id: str) -> None:
        """Take a job off the queue, if it is still on it; rq's own record of it runs out by itself.

        Not `Job.delete()`: a worker may have the job in its hands, and would meet half of it, or we half of theirs.
        """
        self._queue.remove(job_id)
        self._queue.connection.expire(Job.key_for(job_id), _KEEP_DROPPED_S)

    # --- upkeep ---------------------------------------------------------------------------------------------------

    def reconcile(self) -> int:
        """Put right every job that the queue has lost. Returns how many.

        A service may die between record and queue; rq may drop a job whose worker was late, or fail it without telling
        us. Whatever is not over here and not alive there is enqueued again, or ended.
        """
        mended = 0
        for job_id, status in self._statuses():
            if status is None:  # its record has run out
                self._remove_files(job_id)
                self._redis.zrem(JOBS_KEY, job_id)
                self._redis.srem(QUEUED_KEY, job_id)
            elif not status.is_terminal and (record := self.records.get(job_id)) and self._is_lost(record):
                self._recover(record)
                mended += 1
        return mended

    def _statuses(self) -> list[tuple[str, Status | None]]:
        ids = cast(list[str], self._redis.zrange(JOBS_KEY, 0, -1))
        with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hget(record_key(job_id), "status")
            found = pipeline.execute()
        return [(job_id, Status(status) if status else None) for job_id, status in zip(ids, found, strict=True)]

    def _is_lost(self, record: Record) -> bool:
        # A moment's grace: the record of a request in flight comes before its place in the queue, and the end of a
        # job before rq's.
        if now() - (record.started_at or record.created_at) < _GRACE_S:
            return False
        try:
            job = Job.fetch(record.id, connection=self._queue.connection, serializer=JSONSerializer)
        except NoSuchJobError:
            return True
        return job.get_status() in (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)

    def _recover(self, record: Record) -> None:
        # Nothing of the lost one may show in the new one, which has the same id.
        self._queue.remove(record.id)
        connection = self._queue.connection
        connection.delete(Job.key_for(record.id), ExecutionRegistry(record.id, connection).key)
        alive = (Status.QUEUED, Status.RUNNING)
        try:
            if record.status is Status.CANCELLING:
                self.records.change(record, (Status.CANCELLING,), status=Status.CANCELLED, finished_at=now())
            elif record.attempt >= MAX_ATTEMPTS:
                why = {"error_code": "worker_crashed", "error_message": "every attempt at this video was lost"}
                self.records.change(record, alive, fence=True, status=Status.FAILED, finished_at=now(), **why)
            else:
                self.records.change(record, alive, fence=True, status=Status.QUEUED, progress=0.0)
                self._enqueue(record.id)
        except Refused:
            return  # it has moved on by itself
        log.warning("%s: %s here and lost in the queue; put right", record.id, record.status)

    def sweep(self) -> int:
        """Remove the files of what has expired; its record still answers for a while. Returns how many."""
        swept = 0
        over = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
        oldest_kept = now() - 3600 * self._settings.retention_hours
        for job_id in cast(list[str], self._redis.zrange(JOBS_KEY, "-inf", oldest_kept, byscore=True)):
            record = self.records.get(job_id)
            if record is None or record.status not in over or record.expires_at > now():
                continue
            self._remove_files(job_id)  # first: whoever dies in between is followed by one who does it again
            try:
                self.records.change(record, over, status=Status.EXPIRED)
            except Refused:
                continue
            swept += 1
        return swept

    def sweep_orphans(self) -> int:
        """Remove files that no job owns, and halves that nobody writes any more. Returns how many."""
        swept = 0
        for folder in ("inputs", "videos"):
            for name in self._storage.names(folder):
                found = re.search(r"vid_[0-9a-z]{26}", name)
                if found is None or now() - created_at(found[0]) < _ORPHAN_S:
                    continue
                record = self.records.get(found[0])
                if record is None or (name.endswith(".tmp") and record.status.is_terminal):
                    self._storage.delete(f"{folder}/{name}")
                    swept += 1
        return swept

    def upkeep(self) -> None:
        """`reconcile` and `sweep`, by one service at a time."""
        if self._redis.set("flg:upkeep", "1", nx=True, ex=25):
            self.reconcile()
            self.sweep()
            if self._redis.set("flg:upkeep:orphans", "1", nx=True, ex=_ORPHAN_S):
                self.sweep_orphans()
