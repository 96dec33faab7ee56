"""`python -m worker`: load the model, warm up, then take jobs. Nothing is taken before the model has made a clip."""

from __future__ import annotations

import logging
import os
import sys

from distill.student import FolderError
from worker import jobs
from worker.contract import ACTIVE_MODEL_KEY, Heartbeat, Record, WorkerState
from worker.engine.errors import EngineError
from worker.flights import Flights
from worker.gpu_worker import GpuWorker, Pulse
from worker.pipeline import Options, VideoPipeline
from worker.queues import unique_name
from worker.records import Records, connect, now
from worker.settings import Settings, read
from worker.storage import Storage

log = logging.getLogger("worker")


def main() -> int:
    """Run until SIGTERM; jobs in flight are finished first. Exit code 2: a setting or the model folder is wrong."""
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s worker  %(levelname)s %(message)s")
    settings = read(Settings)

    name = unique_name("worker")
    redis = connect(settings.redis_url)
    started = now()
    heartbeat = Heartbeat(
        name=name,
        state=WorkerState.LOADING,
        model=settings.model.name,
        model_sha256="",
        engine="",
        started_at=started,
        seen_at=started,
    )
    pulse = Pulse(redis, heartbeat, settings.lease_s)
    pulse.show()
    pulse.start()
    try:
        pipeline = VideoPipeline(settings.model, Options.of(settings))
        timings = pipeline.warm_up().timings_s
    except (FolderError, EngineError) as error:
        sys.stderr.write(f"error: {error}\n")
        pulse.end()
        return 2
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in timings.items())
    log.info("%s ready in %.1f s: %s", settings.model.name, now() - started, phases)

    runtime = jobs.Runtime(name, pipeline, Records(redis, Record), Storage(settings.storage_url))
    jobs.install(runtime)
    card = pipeline.model_card
    redis.set(ACTIVE_MODEL_KEY, card.model_dump_json())
    choice = pipeline.choice
    pulse.show(model=card.name, model_sha256=card.sha256, engine=choice.name, engine_reason=choice.reason)
    # Offloading moves the autoencoder's weights to and fro, and both stages use it.
    flights = Flights(settings.max_batch, overlap=settings.overlap and settings.offload == "none")
    worker = GpuWorker(connect(settings.redis_url, text=False), name, pulse, settings.lease_s, flights)
    try:
        worker.work(logging_level="WARNING")
    finally:
        pulse.end()
    return 0


def run() -> None:
    """Leave without Python's slow tear-down of torch once everything is said."""
    code = main()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)
