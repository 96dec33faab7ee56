"""What the queue calls: one generation, from its record to the published files.

The record is the truth and the queue only carries the id, so a job that the queue delivers twice is harmless:
`worker.attempts` fences off whoever is late, and the outputs are the same bytes under the same names.
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
from functools import partial
from importlib.metadata import version
from types import TracebackType
from typing import Any, cast

from PIL import Image
from redis import Redis
from redis.exceptions import RedisError
from rq.job import Job
from rq.timeouts import JobTimeoutException

from worker import video
from worker.attempts import attempt, fail, finish, lost
from worker.contract import OUTPUT_SUFFIXES, SECONDS_KEY, Phase, Record, Status, input_path, output_path
from worker.pipeline import Result, VideoPipeline
from worker.records import Records, Refused
from worker.storage import Storage

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """The job was asked to stop; raised between steps."""


@dataclass
class Runtime:
    """What a worker process holds for as long as it lives."""

    name: str
    pipeline: VideoPipeline
    records: Records[Record]
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
    """Run one job (called by rq)."""
    runtime = _installed()
    attempt(
        runtime.records,
        job_id,
        runtime.name,
        partial(_attempt, runtime),
        model_sha256=runtime.pipeline.card.sha256,
        phase=Phase.ENCODING,
    )


def generate_failed(
    job: Job, _connection: Redis, kind: type[BaseException], value: BaseException | None, _trace: TracebackType | None
) -> None:
    """Called by rq when an attempt was lost."""
    lost(_installed().records, job, kind, value)  # rq's own connection answers in bytes


def _attempt(runtime: Runtime, record: Record) -> None:
    """One attempt at a job that is ours. Raises ``Refused``, ``RedisError``, ``OSError``, or ``Cancelled`` for rq."""
    if record.model != runtime.pipeline.card.name:
        message = f"{record.model} was replaced by {runtime.pipeline.card.name} while this job waited; send it again"
        fail(runtime.records, record, "model_gone", message)
        return
    try:
        _run(runtime, record)
    except Cancelled:
        finish(runtime.records, record, Status.CANCELLED)
        if runtime.stop_job.is_set():
            raise  # rq asked for it, and records STOPPED
    except (Refused, RedisError, OSError):
        raise
    except JobTimeoutException:
        message = "the video was not ready in the time that a job may take"
        fail(runtime.records, record, "timed_out", message)
    except Exception as error:
        log.exception("%s failed", record.id)
        message = f"the model could not make this video ({type(error).__name__})"
        fail(runtime.records, record, "generation_failed", message)


def _run(runtime: Runtime, record: Record) -> None:
    """Encode, denoise, decode, save, publish. Raises ``Cancelled`` or ``Refused`` between steps."""
    started = time.perf_counter()
    runtime.stop_job.clear()
    if runtime.storage.exists(output_path(record.id, "json")):
        # An earlier attempt published everything (the manifest is last) and died before it could say so.
        finish(runtime.records, record, Status.SUCCEEDED, progress=1.0)
        return
    try:
        image_bytes = runtime.storage.read(input_path(record.id))
    except FileNotFoundError:
        fail(runtime.records, record, "input_missing", "the input image is no longer in the storage")
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
        finish(runtime.records, record, Status.SUCCEEDED, progress=1.0)
    except Refused as refused:
        if refused.found != "missing":
            raise
        for suffix in OUTPUT_SUFFIXES:  # deleted while it was being saved: leave nothing behind
            runtime.storage.delete(output_path(record.id, suffix))
        return
    _learn_duration(runtime, time.perf_counter() - started)


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
