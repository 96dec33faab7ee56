"""What the queue calls: one generation, from its record to the published files.

The record is the truth and the queue only carries the id, so a job that the queue delivers twice (after a crash, or a
lease that ran out) is harmless: the attempt number fences off whoever is late, and the outputs are the same bytes under
the same names.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import platform
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from types import TracebackType
from typing import Any, cast

from PIL import Image
from redis import Redis
from redis.exceptions import RedisError
from rq.job import Job
from rq.timeouts import JobTimeoutException

from worker import video
from worker.contract import (
    MAX_ATTEMPTS,
    OUTPUT_SUFFIXES,
    SECONDS_KEY,
    Phase,
    Record,
    Status,
    input_path,
    output_path,
)
from worker.pipeline import Result, VideoPipeline
from worker.records import Records, Refused, now
from worker.storage import Storage

log = logging.getLogger(__name__)

_ACTIVE = (Status.RUNNING, Status.CANCELLING)


class Cancelled(Exception):
    """The job was asked to stop; raised between steps."""


@dataclass
class Runtime:
    """What a worker process holds for as long as it lives."""

    name: str
    pipeline: VideoPipeline
    records: Records
    storage: Storage
    stop_job: threading.Event = field(default_factory=threading.Event)
    """Set by rq's stop-job command."""


_runtime: Runtime | None = None  # rq calls module functions by name, so what they work with has to be found here


def install(runtime: Runtime) -> None:
    """Say what the functions of this module work with; once, before the first job."""
    global _runtime
    _runtime = runtime


def _installed() -> Runtime:
    if _runtime is None:
        raise RuntimeError("worker.jobs.install has not been called: this process is no worker")
    return _runtime


def generate(job_id: str) -> None:
    """Run one job (called by rq).

    A failure of the job itself ends in its record and returns; only a failure of the plumbing (Redis, storage) is
    raised, so that rq tries again, and only by the attempt that is current: what a late one meets is not the job's.
    """
    runtime = _installed()
    record = runtime.records.get(job_id)
    if record is None:
        log.warning("%s: there is no such record; it was deleted while queued", job_id)
        return
    try:
        record = _claim(runtime, record)
    except Refused as refused:
        log.info("%s: not started, it is %s", job_id, refused.found)
        _acknowledge_cancel(runtime, record)
        return
    try:
        _attempt(runtime, record)
    except Refused as refused:
        log.warning("%s: attempt %d gave way, the job is %s", job_id, record.attempt, refused.found)
    except (RedisError, OSError) as error:
        if _held(runtime, job_id, record.attempt):
            raise
        log.warning("%s: attempt %d is no longer the current one (%s)", job_id, record.attempt, error)


def _attempt(runtime: Runtime, record: Record) -> None:
    """One attempt at a job that is ours. Raises ``Refused``, ``RedisError``, ``OSError``, or ``Cancelled`` for rq."""
    if record.attempt > MAX_ATTEMPTS:
        _fail(runtime, record, "worker_crashed", f"the worker died {MAX_ATTEMPTS} times while making this video")
        return
    if record.model != runtime.pipeline.card.name:
        message = f"{record.model} was replaced by {runtime.pipeline.card.name} while this job waited; send it again"
        _fail(runtime, record, "model_gone", message)
        return
    try:
        _run(runtime, record)
    except Cancelled:
        _finish(runtime, record, Status.CANCELLED)
        if runtime.stop_job.is_set():
            raise  # rq asked for it, and records STOPPED
    except (Refused, RedisError, OSError):
        raise
    except JobTimeoutException:
        _fail(runtime, record, "timed_out", "the video was not ready in the time that a job may take")
    except Exception as error:
        log.exception("%s failed", record.id)
        _fail(runtime, record, "generation_failed", f"the model could not make this video ({type(error).__name__})")


def generate_failed(
    job: Job, _connection: Redis, kind: type[BaseException], value: BaseException | None, _trace: TracebackType | None
) -> None:
    """Called by rq when an attempt was lost: Redis or the storage failed, or its worker died. Puts the record right."""
    records = _installed().records  # rq's own connection answers in bytes
    record = records.get(job.args[0])
    if record is None or record.status.is_terminal:
        return
    try:
        if record.status is Status.CANCELLING:
            records.change(record, _ACTIVE, status=Status.CANCELLED, finished_at=now())
        elif job.retries_left:
            records.change(record, _ACTIVE, status=Status.QUEUED, progress=0.0)
        else:
            message = f"every attempt at this video was lost; the last one to {kind.__name__}"
            _end_as_failed(records, record, (Status.QUEUED, *_ACTIVE), "worker_crashed", message)
    except Refused as refused:
        log.info("%s: left as it is, %s", record.id, refused.found)
    log.warning("%s: attempt %d lost (%s: %s)", record.id, record.attempt, kind.__name__, value)


def _claim(runtime: Runtime, record: Record) -> Record:
    """Make the job ours: the next attempt. A running job may be claimed: its worker's lease has run out."""
    try:
        return runtime.records.change(
            record,
            (Status.QUEUED, Status.RUNNING),
            fence=True,
            status=Status.RUNNING,
            attempt=record.attempt + 1,
            started_at=now(),
            worker=runtime.name,
            model_sha256=runtime.pipeline.card.sha256,
            phase=Phase.ENCODING,
            progress=0.0,
        )
    except Refused:
        # The connection may have dropped after the claim was written and before we were told; the client then sent
        # it again, and it met our own claim.
        if found := _held(runtime, record.id, record.attempt + 1):
            return found
        raise


def _held(runtime: Runtime, job_id: str, attempt: int) -> Record | None:
    """The record as it is now, if this worker holds the job and this attempt is the current one."""
    found = runtime.records.get(job_id)
    return found if found and (found.worker, found.attempt) == (runtime.name, attempt) else None


def _acknowledge_cancel(runtime: Runtime, record: Record) -> None:
    try:
        runtime.records.change(record, (Status.CANCELLING,), status=Status.CANCELLED, finished_at=now())
    except Refused:
        pass


def _run(runtime: Runtime, record: Record) -> None:
    """Encode, denoise, decode, save, publish. Raises ``Cancelled`` or ``Refused`` between steps."""
    started = time.perf_counter()
    runtime.stop_job.clear()
    if runtime.storage.exists(output_path(record.id, "json")):
        # An earlier attempt published everything (the manifest is last) and died before it could say so.
        _finish(runtime, record, Status.SUCCEEDED)
        return
    try:
        image_bytes = runtime.storage.read(input_path(record.id))
    except FileNotFoundError:
        _fail(runtime, record, "input_missing", "the input image is no longer in the storage")
        return

    def on_progress(phase: Phase, share: float) -> None:
        if runtime.stop_job.is_set():
            raise Cancelled
        try:
            runtime.records.change(record, (Status.RUNNING,), fence=True, phase=phase, progress=round(0.98 * share, 4))
        except Refused as refused:
            raise (Cancelled if refused.found == Status.CANCELLING else refused) from None

    with Image.open(io.BytesIO(image_bytes)) as image:
        result = runtime.pipeline(image.convert("RGB"), record.prompt, seed=record.seed, on_progress=on_progress)

    on_progress(Phase.SAVING, 1.0)
    saving = time.perf_counter()
    mp4 = video.encode_mp4(result.frames_THWC, runtime.pipeline.card.video.fps)
    runtime.storage.write(output_path(record.id, "mp4"), mp4)
    runtime.storage.write(output_path(record.id, "jpg"), video.encode_thumbnail(result.frames_THWC))
    result.timings_s[Phase.SAVING] = time.perf_counter() - saving
    manifest = _manifest(runtime, record, result, image_bytes, mp4)
    runtime.storage.write(output_path(record.id, "json"), (json.dumps(manifest, indent=2) + "\n").encode())
    try:
        _finish(runtime, record, Status.SUCCEEDED)
    except Refused as refused:
        if refused.found != "missing":
            raise
        for suffix in OUTPUT_SUFFIXES:  # deleted while it was being saved: leave nothing behind
            runtime.storage.delete(output_path(record.id, suffix))
        return
    _learn_duration(runtime, time.perf_counter() - started)


def _finish(runtime: Runtime, record: Record, status: Status) -> None:
    """End the job, unless somebody else has. A success that meets a late cancel stays a success."""
    changes: dict[str, Any] = {"progress": 1.0} if status is Status.SUCCEEDED else {}
    runtime.records.change(record, _ACTIVE, fence=True, status=status, finished_at=now(), **changes)
    log.info("%s %s, attempt %d", record.id, status, record.attempt)


def _fail(runtime: Runtime, record: Record, code: str, message: str) -> None:
    _end_as_failed(runtime.records, record, _ACTIVE, code, message)


def _end_as_failed(records: Records, record: Record, since: tuple[Status, ...], code: str, message: str) -> None:
    changes: dict[str, Any] = {"error_code": code, "error_message": message, "finished_at": now()}
    records.change(record, since, fence=True, status=Status.FAILED, **changes)


def _learn_duration(runtime: Runtime, seconds: float) -> None:
    """Moving average of a job's seconds, for the ETA. Two workers at once may lose one sample; it does not matter."""
    redis, name = runtime.records.redis, runtime.pipeline.card.name
    before = cast(str | None, redis.hget(SECONDS_KEY, name))
    redis.hset(SECONDS_KEY, name, str(seconds if before is None else 0.8 * float(before) + 0.2 * seconds))


def _manifest(runtime: Runtime, record: Record, result: Result, image: bytes, mp4: bytes) -> dict[str, Any]:
    """Everything that made this video what it is."""
    card = runtime.pipeline.card
    return {
        "id": record.id,
        "prompt": record.prompt,
        "seed": record.seed,
        "model": card.name,
        "model_sha256": card.sha256,
        "call": card.call,
        "engine": runtime.pipeline.engine,
        "input_sha256": hashlib.sha256(image).hexdigest(),
        "video_sha256": hashlib.sha256(mp4).hexdigest(),
        "video": card.video.model_dump(),
        "timings_s": {phase: round(seconds, 4) for phase, seconds in result.timings_s.items()},
        "attempt": record.attempt,
        "machine": {
            "processor": platform.machine(),
            "device": runtime.pipeline.device,
            "threads": runtime.pipeline.threads,
        },
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
