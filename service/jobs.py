"""`JobStore`: videos that are asked for. Takes requests, keeps their files, and says how long they will take."""

from __future__ import annotations

import math
import re
import secrets
from typing import cast

from redis import Redis

from service import images
from service.errors import ApiError
from service.ids import created_at, new_id
from service.schema import GenerateFields
from service.settings import Settings
from service.store import Store
from worker.contract import OUTPUT_SUFFIXES, SECONDS_KEY, ModelCard, Record, Status, input_path, output_path
from worker.records import QueueFull, Refused, active_model, now, ready_workers
from worker.storage import Storage

_ORPHAN_S = 3600


class JobStore(Store[Record]):
    """Submit, look ahead, delete, remove what has had its time; the rest is `Store`."""

    def __init__(self, settings: Settings, redis: Redis, queue_redis: Redis, storage: Storage) -> None:
        """``redis`` decodes responses; ``queue_redis`` (for rq) does not."""
        super().__init__(redis, queue_redis, Record, settings.job_timeout_s)
        self._settings = settings
        self._storage = storage

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
            id=new_id("vid"),
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

    # --- look ahead -----------------------------------------------------------------------------------------------

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

    # --- delete ---------------------------------------------------------------------------------------------------

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

    # --- upkeep ---------------------------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Remove the files of what has expired; its record still answers for a while. Returns how many."""
        swept = 0
        over = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
        oldest_kept = now() - 3600 * self._settings.retention_hours
        for job_id in cast(list[str], self._redis.zrange(Record.index_key, "-inf", oldest_kept, byscore=True)):
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
        if self._alone():
            self.reconcile()
            self.sweep()
            if self._redis.set("flg:upkeep:orphans", "1", nx=True, ex=_ORPHAN_S):
                self.sweep_orphans()
