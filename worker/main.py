"""`python -m worker`: load the models, warm up, then take jobs. Nothing is taken before each has made a clip."""

from __future__ import annotations

import logging
import os
import socket
import sys
from functools import partial
from pathlib import Path

from distill.student import FolderError
from worker import gpu_lock, jobs, logs, tracing
from worker.canary import CanaryWatch
from worker.connection import warn_if_it_loses
from worker.contract import METRICS_KEY, Heartbeat, Record, WorkerState
from worker.engine.errors import EngineError
from worker.flights import Flights
from worker.gpu_worker import LOST, GpuWorker, Pulse
from worker.pacemaker import Pacemaker
from worker.pipeline import Options, VideoPipeline
from worker.queues import unique_name
from worker.records import Records, connect, now
from worker.releases import Releases
from worker.settings import Settings, read
from worker.staging import Places, Stager
from worker.storage import Storage, StorageError

log = logging.getLogger("worker")


def main() -> int:
    """Run until SIGTERM; jobs in flight are finished first.

    Exit code 2: a setting or the model folder is wrong. `gpu_worker.LOST`: this process cannot go on, a new one may.
    """
    settings = read(Settings)
    logs.configure("worker", settings.log_level, settings.log_format)
    tracing.configure("worker")

    storage = Storage(settings.storage_url)
    try:
        storage.check()
    except StorageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    name = unique_name("worker")
    redis = connect(settings.redis_url)
    warn_if_it_loses(redis)
    started = now()
    heartbeat = Heartbeat(
        name=name,
        state=WorkerState.LOADING,
        model=settings.model[0].name,
        model_sha256="",
        engine="",
        host=socket.gethostname(),
        gpu=gpu_lock.name_of_gpu(settings.gpu_name) if settings.gpu_lock else None,
        started_at=started,
        seen_at=started,
    )
    pacemaker = Pacemaker(settings.redis_url, settings.lease_s, settings.hang_s, settings.log_format)
    pulse = Pulse(redis, heartbeat, settings.lease_s, pacemaker)
    pulse.show()
    pulse.start()
    redis.hincrby(METRICS_KEY, "worker_starts_total", 1)  # at once: one that does not come to be ready counts, too
    if heartbeat.gpu:
        gpu_lock.give_way(redis, heartbeat.gpu, pulse.show)
    records = Records(redis, Record)
    places = Places(models=settings.model, storage=storage, students=settings.students)
    # Models that share GPUs cannot be loaded beside each other.
    keep_previous = settings.keep_previous and settings.devices == 1
    stager = Stager(Releases(redis), places, partial(_load, settings), keep_previous=keep_previous)
    try:
        runtime = jobs.Runtime(name, stager.begin(), records, storage)
    except (FolderError, EngineError) as error:
        sys.stderr.write(f"error: {error}\n")
        pulse.end()
        return 2

    jobs.install(runtime)
    stager.follow(runtime, pulse)
    # Offloading moves the autoencoder's weights to and fro, and both stages use it.
    flights = Flights(settings.max_batch, overlap=settings.overlap and settings.offload == "none")
    worker = GpuWorker(
        connect(settings.redis_url, text=False),
        name,
        pulse,
        settings.lease_s,
        flights,
        idle=CanaryWatch(runtime, pulse, settings.canary_s),
        hang_s=settings.hang_s,
        drain_s=settings.drain_s,
    )
    try:
        worker.work(logging_level="WARNING")
    finally:
        pulse.end()
    return LOST if runtime.is_lost or not worker.was_asked_to_stop else 0


def _load(settings: Settings, folder: Path) -> VideoPipeline:
    """A model, warm. Raises ``FolderError``, ``EngineError``."""
    started = now()
    pipeline = VideoPipeline(folder, Options.of(settings))
    timings = pipeline.warm_up().timings_s
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in timings.items())
    engine = f"{pipeline.choice.name} {pipeline.choice.made} in {pipeline.choice.seconds:.2f} s"
    log.info("%s ready in %.1f s: %s; %s", pipeline.card.name, now() - started, engine, phases)
    return pipeline


def run() -> None:
    """Leave without Python's slow tear-down of torch once everything is said."""
    code = main()
    tracing.flush()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)
