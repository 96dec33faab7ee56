"""What the queue calls: one generation, from its record to the published files.

The record is the truth and the queue only carries the id, so a job that the queue delivers twice is harmless:
`worker.attempts` fences off whoever is late, and the outputs are the same bytes under the same names.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from itertools import chain, repeat
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from PIL import Image, ImageOps
from redis import Redis
from redis.exceptions import RedisError
from rq import Retry
from rq.job import Job
from rq.timeouts import JobTimeoutException

from worker import logs, tracing, video
from worker.attempts import attempt, fail, finish, hand_back, lost, ours
from worker.contract import (
    OUTPUT_SUFFIXES,
    SECONDS_KEY,
    TAKES,
    Phase,
    Record,
    Source,
    Status,
    input_path,
    model_id,
    output_path,
)
from worker.engine.errors import EngineLost, OutOfMemory
from worker.flights import Cancelled, Flight, Interrupted, current
from worker.metrics import Metrics, observe_cancel, observe_start, observe_success
from worker.records import Records, Refused, now
from worker.storage import Storage

if TYPE_CHECKING:
    from distill.student import Video
    from worker.pipeline import Denoised, VideoPipeline

log = logging.getLogger(__name__)

_MADE_BY = ("model", "model_sha256", "engine", "first_step")
"""What the record takes over from the manifest, where it has it."""
_NAMES: dict[Source, str] = {"image": "an image", "video": "a video", "none": "a sentence alone"}
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""From one try of the storage to the next; the last again and again."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Loaded:
    """The models of a worker at one moment. A job that has begun keeps its own, whatever comes next."""

    active: VideoPipeline
    """Answers when a request names none."""
    fixed: tuple[VideoPipeline, ...] = ()
    """The others of MODEL."""
    previous: VideoPipeline | None = None
    """The one that was active before."""

    @property
    def pipelines(self) -> list[VideoPipeline]:
        """Each once. Of several with one name the first answers to it."""
        every = (self.active, *self.fixed, *([self.previous] if self.previous else ()))
        return list({pipeline.card.sha256: pipeline for pipeline in every}.values())

    def find(self, sha256: str | None) -> VideoPipeline | None:
        """The one with this identity."""
        return next((pipeline for pipeline in self.pipelines if pipeline.card.sha256 == sha256), None)

    def of(self, record: Record) -> VideoPipeline | None:
        """The one that is to make this video; None if it is not here."""
        if record.pin is not None:
            return self.find(record.pin)
        if record.follows:
            return self.active
        return next((pipeline for pipeline in self.pipelines if pipeline.card.name == record.model), None)


@dataclass
class Runtime:
    """What a worker process holds for as long as it lives."""

    name: str
    loaded: Loaded
    """Replaced as a whole when another student is released."""
    records: Records[Record]
    storage: Storage
    metrics: Metrics = field(default_factory=Metrics)
    last_end: float = -math.inf
    """When a job was last over, by `time.monotonic`."""
    is_lost: bool = False
    """This process cannot make videos any more."""
    patience_s: float = 120.0
    """How long a job waits for a storage that does not answer, before its attempt is given up."""


_runtime: Runtime | None = None  # rq calls module functions by name, so what they work with has to be found here


def install(runtime: Runtime) -> None:
    """Say what the functions of this module work with; once, before the first job."""
    global _runtime
    _runtime = runtime


def _installed() -> Runtime:
    if _runtime is None:
        raise RuntimeError("worker.jobs.install has not been called: this process is no worker")
    return _runtime


def generate(job_id: str) -> Retry | None:
    """Run one job to its end, or hand it back where this worker has to end before (called by rq)."""
    runtime = _installed()
    return attempt(runtime.records, job_id, runtime.name, partial(_observed, runtime), phase=Phase.ENCODING)


def generate_failed(
    job: Job, _connection: Redis, kind: type[BaseException], value: BaseException | None, _trace: TracebackType | None
) -> None:
    """Called by rq when an attempt was lost."""
    lost(_installed().records, job, kind, value)  # rq's own connection answers in bytes


def _observed(runtime: Runtime, record: Record) -> Retry | None:
    """An attempt, with what the log, the trace and the metrics are to say of it."""
    about: dict[str, str | int] = {"job_id": record.id, "model": record.model, "attempt": record.attempt}
    observe_start(runtime.metrics, record)
    try:
        with logs.bind(request_id=record.request_id), tracing.consumer_span(record.trace, "generate", **about):
            return _attempt(runtime, record)
    finally:
        runtime.metrics.flush(runtime.records.redis)


def _attempt(runtime: Runtime, record: Record) -> Retry | None:
    """One attempt at a job that is ours. Raises ``Refused``, ``RedisError``, ``OSError``, and ``Cancelled`` for rq."""
    flight = current()
    loaded = runtime.loaded
    pipeline = loaded.of(record)
    if pipeline is None:
        served = ", ".join(one.model_card.id for one in loaded.pipelines)
        wanted = model_id(record.model, record.pin) if record.pin else record.model
        message = (
            f"{wanted} was replaced while this job waited; served now are {served}; send it again with one of them"
        )
        fail(runtime.records, record, "model_gone", message)
        return None
    if record.source not in TAKES[pipeline.card.task]:  # it was accepted for the one before
        message = (
            f"{pipeline.model_card.id} (task {pipeline.card.task}) took the place of the model that this job was for, "
            f"and makes nothing from {_NAMES[record.source]}; send it again as that one takes it"
        )
        fail(runtime.records, record, "model_gone", message)
        return None
    record = record.model_copy(update={"model": pipeline.card.name})
    if record.start_by is not None and now() > record.start_by:
        message = "the job had not begun by its deadline for that (X-Deadline-Start)"
        fail(runtime.records, record, "deadline_start", message)
        return None
    if record.finish_by is not None:
        flight.deadline = min(flight.deadline, time.monotonic() + record.finish_by - now())
    try:
        _run_within_memory(runtime, pipeline, record, flight)
    except Cancelled:
        finish(runtime.records, record, Status.CANCELLED)
        observe_cancel(runtime.metrics, runtime.records.redis, record.id)
        if flight.is_stopped:
            raise  # rq asked for it, and records STOPPED
    except Interrupted:
        flight.wait_for_later()  # each goes before the rest of the queue, so the oldest has to come last
        return hand_back(runtime.records, record)
    except (Refused, RedisError, OSError):
        raise
    except EngineLost as lost_for_good:
        # Every later job would fail as well: another worker, or this one started anew, tries again.
        log.error("%s: %s; this worker ends", record.id, lost_for_good)
        runtime.is_lost = True
        os.kill(os.getpid(), signal.SIGTERM)  # not to this thread: it has to wake the main one from its queue
        raise
    except JobTimeoutException:
        if record.finish_by is not None and now() > record.finish_by:
            fail(runtime.records, record, "deadline", "the video was not ready by its deadline (X-Deadline)")
        else:
            fail(runtime.records, record, "timed_out", "the video was not ready in the time that a job may take")
    except OutOfMemory as error:
        log.error("%s: not enough memory: %s", record.id, error)
        message = "the worker has not enough memory for this video, also while it makes no other one"
        fail(runtime.records, record, "out_of_memory", message)
    except Exception as error:
        log.exception("%s failed", record.id)
        message = f"the model could not make this video ({type(error).__name__})"
        fail(runtime.records, record, "generation_failed", message)
    return None


class _Progress:
    """Writes how far an attempt is. Called between its steps, it is also where an attempt ends that has to."""

    def __init__(self, records: Records[Record], record: Record, flight: Flight) -> None:
        self._records = records
        self._record = record
        self._flight = flight
        self._phase, self._share = Phase.ENCODING, 0.0

    def __call__(self, phase: Phase, share: float) -> None:
        # What another job measured meanwhile moves the scale; the bar must not go back.
        self._phase, self._share = phase, max(self._share, share)
        self.again()

    def again(self) -> None:
        """Nothing has changed; but has the job to end?

        Raises:
            Cancelled, Interrupted, JobTimeoutException: it was asked to, or is late.
            Refused: the job is no longer this attempt's.
        """
        self._flight.check()
        progress = round(0.98 * self._share, 4)
        try:
            self._records.change(self._record, (Status.RUNNING,), fence=True, phase=self._phase, progress=progress)
        except Refused as refused:
            raise (Cancelled if refused.found == Status.CANCELLING else refused) from None


def _run_within_memory(runtime: Runtime, pipeline: VideoPipeline, record: Record, flight: Flight) -> None:
    """`_run`; where the memory has not sufficed once more, alone. Raises ``OutOfMemory`` when that fails, too."""
    progress = _Progress(runtime.records, record, flight)
    try:
        _run(runtime, pipeline, record, flight, progress)
        return
    except OutOfMemory as error:
        log.warning("%s: not enough memory, once more when nothing else is in flight: %s", record.id, error)
    flight.wait_alone(progress.again)  # out of the handler: what the error holds on to is free by now
    pipeline.free_memory()
    _run(runtime, pipeline, record, flight, progress)


def _run(runtime: Runtime, pipeline: VideoPipeline, record: Record, flight: Flight, progress: _Progress) -> None:
    """Encode, denoise, decode, save, publish. Raises between steps what ``_Progress`` does, and ``OutOfMemory``."""
    started = time.monotonic()
    patiently = partial(_patiently, runtime, progress)
    if made := patiently(partial(_made_before, runtime, record)):
        finish(runtime.records, record, Status.SUCCEEDED, progress=1.0, **_made_by(made))
        return
    given: bytes | None = None
    try:
        if record.source != "none":
            given = patiently(partial(runtime.storage.read, input_path(record.id, record.source)))
    except FileNotFoundError:
        message = f"the input {record.source} is no longer in the storage"
        fail(runtime.records, record, "input_missing", message)
        return
    image, of_video = _input(pipeline.card.video, record, given)
    denoised = pipeline.denoise(image, record.prompt, seed=record.seed, on_progress=progress, **of_video)
    tracing.phase_spans(denoised.timings_s)
    flight.leave_transformer()
    flight.wait_for_decoder(progress.again)
    try:
        mp4 = _decode_and_save(runtime, pipeline, record, denoised, progress)
        tracing.phase_spans({phase: denoised.timings_s[phase] for phase in (Phase.DECODING, Phase.SAVING)})
        manifest = _manifest(pipeline, record, denoised, given, mp4)
        text = json.dumps(manifest, indent=2) + "\n"
        patiently(partial(_publish, runtime, record, "json", text.encode()))
        finish(runtime.records, record, Status.SUCCEEDED, progress=1.0, **_made_by(manifest))
    except Refused as refused:
        if refused.found != "missing":
            raise
        for suffix in OUTPUT_SUFFIXES:  # deleted while it was being saved: leave nothing behind
            runtime.storage.delete(output_path(record.id, suffix))
        return
    observe_success(runtime.metrics, record, denoised.timings_s, now())
    _learn_duration(runtime, pipeline.model_card.pace, started, time.monotonic())


def _input(size: Video, record: Record, given: bytes | None) -> tuple[Image.Image | None, dict[str, Any]]:
    """What `VideoPipeline.denoise` starts from: the image, and what goes with a video.

    They are as they were kept, unless another student with another size has been released since.
    """
    if given is None:
        return None, {}
    if record.source == "video":
        return None, {"video_THWC": video.read_input(given, size), "strength": record.strength}
    with Image.open(io.BytesIO(given)) as image:
        return ImageOps.fit(image.convert("RGB"), (size.width, size.height)), {}


def _made_by(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: manifest[name] for name in _MADE_BY if name in manifest}


def _decode_and_save(
    runtime: Runtime, pipeline: VideoPipeline, record: Record, denoised: Denoised, progress: _Progress
) -> bytes:
    """The MP4, saved beside its thumbnail. ffmpeg has each piece of the video while the next is decoded."""
    size = pipeline.card.video
    middle, done = size.num_frames // 2, 0
    with video.Mp4Writer(size.width, size.height, size.fps, progress.again) as writer:
        for frames_THWC in pipeline.decode(denoised, on_progress=progress):
            writer.write(frames_THWC)
            if done <= middle < done + len(frames_THWC):
                thumbnail = video.encode_thumbnail(frames_THWC[middle - done])
            done += len(frames_THWC)
        progress(Phase.SAVING, 1.0)
        saving = time.perf_counter()
        mp4 = writer.finish()
    for suffix, data in (("mp4", mp4), ("jpg", thumbnail)):
        _patiently(runtime, progress, partial(_publish, runtime, record, suffix, data))
    denoised.timings_s[Phase.SAVING] = time.perf_counter() - saving
    return mp4


def _patiently(runtime: Runtime, progress: _Progress, call: Callable[[], ResultT]) -> ResultT:
    """What ``call`` returns, as soon as the storage lets it.

    A job that is given up at once goes back to the queue and meets the same outage: a store that is away for a minute
    would cost every job that waits all its attempts. So the jobs at hand wait, and those behind them.

    Raises:
        OSError: it has not in ``Runtime.patience_s``; ``FileNotFoundError`` at once.
        Refused, ...: as ``_Progress`` does.
    """
    deadline = time.monotonic() + runtime.patience_s
    pauses_s = chain(_PAUSES_S, repeat(_PAUSES_S[-1]))
    while True:
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError as error:
            pause_s = next(pauses_s)
            if time.monotonic() + pause_s > deadline:
                raise
            log.warning("the storage: %s; once more in %g s", error, pause_s)
        until = time.monotonic() + pause_s
        while (left_s := until - time.monotonic()) > 0:
            progress.again()
            time.sleep(min(left_s, 0.5))


def _publish(runtime: Runtime, record: Record, suffix: str, data: bytes) -> None:
    """Put one file of a video in its place.

    A worker that was stopped or cut off for longer than its lease may come to this after another has published the
    video; what it has made must not be mixed with that.

    Raises:
        Refused: the job is no longer this attempt's; nothing was written.
    """
    runtime.storage.write(output_path(record.id, suffix), data, lambda: ours(runtime.records, record))


def _made_before(runtime: Runtime, record: Record) -> dict[str, Any] | None:
    """The manifest of an earlier attempt that published everything (it is last) and died before it could say so."""
    storage = runtime.storage
    try:
        manifest: dict[str, Any] = json.loads(storage.read(output_path(record.id, "json")))
        mp4 = storage.read(output_path(record.id, "mp4"))
    except FileNotFoundError:
        return None
    is_whole = hashlib.sha256(mp4).hexdigest() == manifest["video_sha256"]
    return manifest if is_whole and storage.exists(output_path(record.id, "jpg")) else None


def _learn_duration(runtime: Runtime, pace: str, started: float, ended: float) -> None:
    """Moving average of the seconds of the worker that a job takes, for the ETA: those beside an earlier job are its.

    Two workers at once may lose one sample; it does not matter.
    """
    seconds = ended - max(started, runtime.last_end)
    runtime.last_end = ended
    redis = runtime.records.redis
    before = cast(str | None, redis.hget(SECONDS_KEY, pace))
    redis.hset(SECONDS_KEY, pace, str(seconds if before is None else 0.8 * float(before) + 0.2 * seconds))


def _manifest(
    pipeline: VideoPipeline, record: Record, denoised: Denoised, given: bytes | None, mp4: bytes
) -> dict[str, Any]:
    """Everything that made this video what it is."""
    card, choice = pipeline.card, pipeline.choice
    source: dict[str, Any] = {} if given is None else {"input_sha256": hashlib.sha256(given).hexdigest()}
    if (first := denoised.first_step) is not None:
        source |= {"strength": record.strength, "first_step": first, "first_sigma": card.sigmas[first]}
    return {
        "id": record.id,
        "prompt": record.prompt,
        "seed": record.seed,
        "model": card.name,
        "model_sha256": card.sha256,
        "call": card.call,
        "engine": choice.name,
        "engine_reason": choice.reason,
        "decoder": choice.decoder.name,
        **source,
        "video_sha256": hashlib.sha256(mp4).hexdigest(),
        "video": card.video.model_dump(),
        "timings_s": {phase: round(seconds, 4) for phase, seconds in denoised.timings_s.items()},
        "attempt": record.attempt,
        "machine": {
            "processor": platform.machine(),
            "device": pipeline.device,
            "threads": pipeline.threads,
        },
        "versions": dict(_versions()),
    }


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Read once: each takes a millisecond."""
    return tuple((name, version(name)) for name in ("torch", "diffusers", "transformers"))
