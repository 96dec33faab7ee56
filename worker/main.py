"""`python -m worker`: load the models, warm up, then take jobs. Nothing is taken before each has made a clip."""

from __future__ import annotations

import logging
import os
import sys

from distill.student import FolderError
from worker import jobs, logs, tracing
from worker.contract import Heartbeat, Record, WorkerState
from worker.engine.errors import EngineError
from worker.flights import Flights
from worker.gpu_worker import GpuWorker, Pulse
from worker.pipeline import Options, VideoPipeline
from worker.queues import unique_name
from worker.records import Records, connect, now, publish_models
from worker.settings import Settings, read
from worker.storage import Storage, StorageError

log = logging.getLogger("worker")


def main() -> int:
    """Run until SIGTERM; jobs in flight are finished first. Exit code 2: a setting or the model folder is wrong."""
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
    started = now()
    heartbeat = Heartbeat(
        name=name,
        state=WorkerState.LOADING,
        model=settings.model[0].name,
        model_sha256="",
        engine="",
        started_at=started,
        seen_at=started,
    )
    pulse = Pulse(redis, heartbeat, settings.lease_s)
    pulse.show()
    pulse.start()
    try:
        pipelines = _load(settings)
    except (FolderError, EngineError) as error:
        sys.stderr.write(f"error: {error}\n")
        pulse.end()
        return 2

    jobs.install(jobs.Runtime(name, pipelines, Records(redis, Record), storage))
    publish_models(redis, [pipeline.model_card for pipeline in pipelines.values()])
    first = next(iter(pipelines.values()))
    pulse.show(
        model=first.card.name,
        model_sha256=first.card.sha256,
        models=tuple(pipelines),
        engine=first.choice.name,
        engine_reason=first.choice.reason,
    )
    # Offloading moves the autoencoder's weights to and fro, and both stages use it.
    flights = Flights(settings.max_batch, overlap=settings.overlap and settings.offload == "none")
    worker = GpuWorker(connect(settings.redis_url, text=False), name, pulse, settings.lease_s, flights)
    try:
        worker.work(logging_level="WARNING")
    finally:
        pulse.end()
    return 0


def _load(settings: Settings) -> dict[str, VideoPipeline]:
    """Every model, warm, by name. Raises ``FolderError``, ``EngineError``."""
    pipelines: dict[str, VideoPipeline] = {}
    for folder in settings.model:
        started = now()
        pipeline = VideoPipeline(folder, Options.of(settings))
        if pipeline.card.name in pipelines:
            raise FolderError(f"MODEL={folder}: another of these models is called {pipeline.card.name} too")
        timings = pipeline.warm_up().timings_s
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in timings.items())
        log.info("%s ready in %.1f s: %s", pipeline.card.name, now() - started, phases)
        pipelines[pipeline.card.name] = pipeline
    return pipelines


def run() -> None:
    """Leave without Python's slow tear-down of torch once everything is said."""
    code = main()
    tracing.flush()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)
