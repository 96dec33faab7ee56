"""`JobStore`: videos that are asked for. Takes requests, keeps their files, removes what has had its time."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import cast

from redis import Redis
from redis.exceptions import RedisError

from service import admission, clips, images, webhooks
from service.admission import Admission, Terms
from service.auth import Principal
from service.errors import ApiError
from service.fleet import Fleet, Lookout
from service.ids import created_at, new_id
from service.schema import GenerateFields
from service.settings import Settings
from service.store import Store
from worker.contract import (
    OUTPUT_SUFFIXES,
    SLOTS_KEY,
    STRENGTH,
    ModelCard,
    Record,
    Source,
    Status,
    input_path,
    input_paths,
    output_path,
)
from worker.records import Refused, now
from worker.storage import Storage

log = logging.getLogger(__name__)

_ORPHAN_S = 3600
_SWEPT_KEY = "flg:swept"
"""String: time of creation of the last job up to which everything has expired; forgotten now and then."""
_IN_FLIGHT_S = 5.0
"""How long a repeated request waits for the one before it to become a job."""


@dataclass(frozen=True)
class Ask:
    """One request for a video, but for the bytes of the image or video that it is to be made from."""

    fields: GenerateFields
    source_sha256: str
    """Of that as it came, or of an image's URL."""
    source: Source = "image"
    terms: Terms = field(default_factory=Terms)
    request_id: str | None = None
    trace: str | None = None
    remixed_from: str | None = None

    @property
    def fingerprint(self) -> str:
        """The same for the same request, however it was written."""
        said = {**self.fields.model_dump(mode="json", exclude_none=True), "from": self.remixed_from}
        source = self.source_sha256 if self.source == "image" else f"{self.source} {self.source_sha256}"
        return hashlib.sha256(f"{json.dumps(said, sort_keys=True)} {source}".encode()).hexdigest()


@dataclass(frozen=True)
class Reserved:
    """A request that has its place, and no job yet."""

    record: Record
    card: ModelCard
    request: admission.Request = field(repr=False)


def _is_of_use(record: Record, folder: str, name: str) -> bool:
    """Whether a file of a job that is over is more than a half that a worker died over, or part of no video."""
    return not name.endswith(".tmp") and (folder == "inputs" or record.status is Status.SUCCEEDED)


def _check_source(card: ModelCard, ask: Ask) -> None:
    """Whether the model makes videos from what it is to be made from. Raises ``ApiError`` 422."""
    name = f"{card.name} (task {card.task})"
    if ask.source not in card.takes:
        if ask.source == "image":
            instead = "leave it out, or send a video" if "none" in card.takes else "send a video"
            raise ApiError(422, "image_not_taken", f"image: {name} takes none; {instead}", param="image")
        if ask.source == "video":
            message = f"video: {name} takes none; send an image"
            raise ApiError(422, "video_not_taken", message, param="video")
        if "image" in card.takes:
            message = f"image: missing, and {name} animates one; send a PNG, JPEG or WEBP file"
            raise ApiError(422, "image_missing", message, param="image")
        message = f"video: missing, and {name} changes one; send an MP4, MOV, WEBM or MKV file"
        raise ApiError(422, "video_missing", message, param="video")
    if ask.fields.strength is not None and ask.source != "video":
        message = "strength: it says how much of a video is changed, and there is no video; leave it out, or send one"
        raise ApiError(422, "strength_without_video", message, param="strength")


def _deadline(moment: float, within_s: float) -> float | None:
    return moment + within_s if math.isfinite(within_s) else None


class JobStore(Store[Record]):
    """Submit, delete, remove what has had its time; the rest is `Store`."""

    def __init__(self, settings: Settings, redis: Redis, queue_redis: Redis, storage: Storage) -> None:
        """``redis`` decodes responses; ``queue_redis`` (for rq) does not."""
        super().__init__(redis, queue_redis, Record, settings.job_timeout_s)
        self._settings = settings
        self._storage = storage
        self.lookout = Lookout(redis)
        self._admission = Admission(redis, settings.max_queued, settings.max_wait_s)

    # --- submit ---------------------------------------------------------------------------------------------------

    def submit(self, principal: Principal, ask: Ask, data: bytes) -> tuple[Record, bool]:
        """`reserve`, then `complete`. Returns the job, and whether this request has made it."""
        reserved = self.reserve(principal, ask)
        if isinstance(reserved, Record):
            return reserved, False
        return self.complete(reserved, data), True

    def reserve(self, principal: Principal, ask: Ask) -> Reserved | Record:
        """Check a request and give it a place; or return the job that the same request has become before.

        What is reserved has to be completed or released.

        Raises:
            ApiError: what is wrong with the request, or why no job can be taken now.
        """
        fleet = self.lookout.fleet()
        card = self._model(fleet, ask.fields)
        if ask.fields.webhook_url is not None:
            webhooks.check_webhook_url(ask.fields.webhook_url, self._settings.private_hosts)
        prompt = self._prompt(card, ask.fields.prompt)
        _check_source(card, ask)
        self._check_disk()
        request = admission.Request(
            id=new_id("vid"),
            principal=principal,
            fingerprint=ask.fingerprint,
            expected_s=fleet.expected_s(card),
            terms=ask.terms,
        )
        admitted = self._admission.admit(request, fleet.num_workers)
        if not admitted.is_new:
            return self._as_it_became(admitted.job_id)
        moment, seed = now(), ask.fields.seed
        pinned = ask.fields.model == card.id
        record = Record(
            id=request.id,
            status=Status.QUEUED,
            owner=principal.id,
            prompt=prompt,
            seed=secrets.randbits(32) if seed is None else seed,
            model=card.name,
            follows=card is fleet.models[0] and not pinned,
            pin=card.sha256 if pinned else None,
            created_at=moment,
            expires_at=moment + 3600 * self._settings.retention_hours,
            webhook_url=ask.fields.webhook_url,
            metadata=ask.fields.metadata or {},
            remixed_from=ask.remixed_from,
            source=ask.source,
            strength=(ask.fields.strength or STRENGTH) if ask.source == "video" else None,
            start_by=_deadline(moment, ask.terms.start_within_s),
            finish_by=_deadline(moment, ask.terms.finish_within_s),
            expected_at=moment + admitted.wait_s + request.expected_s if fleet.seconds_of(card) else None,
            request_id=ask.request_id,
            trace=ask.trace,
        )
        return Reserved(record, card, request)

    def complete(self, reserved: Reserved, data: bytes) -> Record:
        """Clean and keep what it is to be made from, write the record, enqueue it. What fails leaves nothing behind,
        its place neither.

        Raises:
            ApiError: what is wrong with the image or video.
        """
        record = reserved.record
        try:
            clean = self._clean(reserved, data)
            try:
                if record.source != "none":
                    self._storage.write(input_path(record.id, record.source), clean)
                self.records.create(record)
                self._enqueue(record.id)
            except BaseException:
                self._forget(record.id)
                raise
        except BaseException:
            self.release(reserved)
            raise
        return record

    def _clean(self, reserved: Reserved, data: bytes) -> bytes:
        size = reserved.card.video
        match reserved.record.source:
            case "image":
                return images.clean(data, size.width, size.height, self._settings.max_pixels)
            case "video":
                return clips.clean(data, size)
        return b""

    def release(self, reserved: Reserved) -> None:
        """Give a place back: what it was reserved for has failed."""
        try:
            self._admission.release(reserved.request)
        except RedisError:
            log.warning("%s: its place could not be given back; it runs out by itself", reserved.record.id)

    def _as_it_became(self, job_id: str) -> Record:
        deadline = time.monotonic() + _IN_FLIGHT_S
        while (record := self.records.get(job_id)) is None:
            if time.monotonic() > deadline:
                message = "the same request is still being taken; ask again in a moment"
                raise ApiError(409, "in_flight", message, retry_after_s=1, headers={"x-should-retry": "true"})
            time.sleep(0.05)
        return record

    @staticmethod
    def _model(fleet: Fleet, fields: GenerateFields) -> ModelCard:
        if not fleet.models:
            message = "no worker has been ready yet, so no model is known; try again when /readyz answers 200"
            raise ApiError(503, "no_model", message, retry_after_s=5)
        card = fleet.model(fields.model)
        if card is None:
            there = ", ".join(map(repr, fleet.names))
            message = f"model: got {fields.model!r}; the models that can be asked for are {there}"
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

    def _check_disk(self) -> None:
        free = self._storage.free_bytes()
        if free is not None and free < self._settings.min_free_bytes:
            self._admission.count_refusal("disk")
            message = "the disk is nearly full, so no new video can be kept; an administrator has to make room"
            raise ApiError(507, "disk_full", message, retry_after_s=120)

    # --- delete ---------------------------------------------------------------------------------------------------

    def delete(self, job_id: str, owner: str | None = None) -> None:
        """Remove a job that is over, with its files.

        Raises:
            ApiError: 404 no such job, 409 it is not over: its worker has not let go of it.
        """
        record = self.get(job_id, owner)
        if not record.status.is_terminal:
            message = f"{job_id} is {record.status}: its worker has not let go of it yet; delete it again in a moment"
            raise ApiError(409, "still_running", message, retry_after_s=1)
        self._remove_files(job_id)
        self._drop_from_queue(job_id)
        self.records.delete(job_id, record.owner)

    def _remove_files(self, job_id: str) -> None:
        self._storage.delete_many([*input_paths(job_id), *(output_path(job_id, suffix) for suffix in OUTPUT_SUFFIXES)])

    # --- upkeep ---------------------------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Remove the files of what has expired; its record still answers for a while. Returns how many."""
        swept, present = 0, self.records.moment()
        over = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
        oldest_kept = present - 3600 * self._settings.retention_hours
        begin = cast(str | None, self._redis.get(_SWEPT_KEY)) or "-inf"
        found = cast(
            list[tuple[str, float]],
            self._redis.zrange(Record.index_key, begin, oldest_kept, byscore=True, withscores=True),
        )
        is_whole = True
        for job_id, moment in found:
            record = self.records.get(job_id)
            if record is not None and record.status in over and record.expires_at <= present:
                self._remove_files(job_id)  # first: whoever dies in between is followed by one who does it again
                try:
                    self.records.change(record, over, status=Status.EXPIRED)
                    swept += 1
                except Refused:
                    is_whole = False
            elif record is not None and record.status is not Status.EXPIRED:
                is_whole = False  # not over, or kept for longer than is usual now: to be looked at again
            if is_whole:
                self._redis.set(_SWEPT_KEY, repr(moment), ex=_ORPHAN_S)
        return swept

    def sweep_orphans(self) -> int:
        """Remove files that no job owns, and what attempts that died have left of a video. Returns how many."""
        swept, moment = 0, self.records.moment()
        for folder in ("inputs", "videos"):
            for name in self._storage.names(folder):
                found = re.search(r"vid_[0-9a-z]{26}", name)
                if found is None or moment - created_at(found[0]) < _ORPHAN_S:
                    continue
                record = self.records.get(found[0])
                if record is None or (record.status.is_terminal and not _is_of_use(record, folder, name)):
                    self._storage.delete(f"{folder}/{name}")
                    swept += 1
        return swept

    def upkeep(self) -> None:
        """`reconcile` and `sweep`, by one service at a time: what is under way now, and once an hour everything."""
        if not self._alone():
            return
        if self._redis.set("flg:upkeep:orphans", "1", nx=True, ex=_ORPHAN_S):
            self.reconcile()
            self.sweep_orphans()
        else:
            self.reconcile(cast(list[str], self._redis.zrange(SLOTS_KEY, "+inf", "+inf", byscore=True)))
        self.sweep()
