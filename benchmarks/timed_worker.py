"""A worker whose model takes a stated time: `python -m benchmarks.timed_worker --seconds 0.05`.

All of a worker but the model, which sleeps; for measuring what is around it. When its work on a job was over it writes
to the Redis hash ``ENDS_KEY``: seed -> seconds since the epoch. A job whose seed is ``POISON`` kills the worker.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from redis import Redis

from distill.prompt import Prompt
from worker import jobs, video
from worker.contract import Heartbeat, ModelCard, Phase, Record, VideoSize, WorkerState
from worker.flights import Flights
from worker.gpu_worker import GpuWorker, Pulse
from worker.pacemaker import Pacemaker
from worker.queues import unique_name
from worker.records import Records, connect, now, publish_models
from worker.storage import Storage

MODEL = "timed"
VIDEO = VideoSize(width=64, height=64, num_frames=16, fps=8)
"""Near enough to the bundled model's."""
STEPS = 4
PIECES = 2
POISON = 666
HANG_S = 120
"""A worker that is silent for so long is killed by its pacemaker."""
CARD = ModelCard(
    name=MODEL,
    sha256="0" * 64,
    task="ti2v",
    num_inference_steps=STEPS,
    video=VIDEO,
    prompt=Prompt(kind="free", help="", examples=("x",)),
)
ENDS_KEY = "benchmark:ends"

OnProgress = Callable[[Phase, float], None]


class TimedPipeline:
    """Stands where `VideoPipeline` stands; reports as often as that does."""

    card = SimpleNamespace(name=MODEL, sha256=CARD.sha256, task=CARD.task, call={}, video=VIDEO)
    model_card = CARD
    choice = SimpleNamespace(name="none", reason="there is no model", decoder=SimpleNamespace(name="none"))
    device, threads = "cpu", 1

    def __init__(self, redis: Redis, seconds: float) -> None:
        """``seconds``: of one job; four fifths of it are denoising."""
        self._redis = redis
        self._seconds = seconds

    def denoise(self, _image: Any, _prompt: str, *, seed: int, on_progress: OnProgress) -> SimpleNamespace:
        """Sleep between the steps."""
        on_progress(Phase.ENCODING, 0.0)
        on_progress(Phase.DENOISING, 0.0)
        for step in range(1, STEPS + 1):
            time.sleep(0.8 * self._seconds / STEPS)
            on_progress(Phase.DENOISING, 0.8 * step / STEPS)
            if seed == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
        on_progress(Phase.DECODING, 0.8)
        return SimpleNamespace(seed=seed, timings_s={Phase.DENOISING: 0.8 * self._seconds}, first_step=None)

    def decode(self, denoised: SimpleNamespace, *, on_progress: OnProgress) -> Iterator[NDArray[np.uint8]]:
        """Sleep before each piece; all frames are grey."""
        shape = (VIDEO.num_frames // PIECES, VIDEO.height, VIDEO.width, 3)
        for piece in range(1, PIECES + 1):
            time.sleep(0.2 * self._seconds / PIECES)
            on_progress(Phase.DECODING, 0.8 + 0.2 * piece / PIECES)
            if piece == PIECES:
                self._redis.hset(ENDS_KEY, str(denoised.seed), str(time.time()))
            yield np.full(shape, 128, np.uint8)
        denoised.timings_s[Phase.DECODING] = 0.2 * self._seconds


class NoWriter:
    """Stands where `Mp4Writer` stands, without its process for each job: for what needs tens of thousands of them."""

    def __init__(self, *_video: Any) -> None:
        pass

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def write(self, frames_THWC: NDArray[np.uint8]) -> None:
        """Nothing."""

    def finish(self) -> bytes:
        """As many bytes as such a video has."""
        return bytes(2048)


def main() -> None:
    """Work until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="of each job")
    parser.add_argument("--no-mp4", action="store_true", help="start no ffmpeg; keep some bytes instead")
    parser.add_argument("--name", help="a new one where none is given")
    options = parser.parse_args()
    if options.no_mp4:
        video.Mp4Writer = NoWriter
    redis = connect(os.environ["REDIS_URL"])
    serve(TimedPipeline(redis, options.seconds), redis, Storage(os.environ["STORAGE_URL"]), name=options.name)


def serve(
    pipeline: Any,
    redis: Redis,
    storage: Storage,
    *,
    name: str | None = None,
    kind: Callable[..., GpuWorker] = GpuWorker,
    hang_s: int | None = HANG_S,
    **runtime: Any,
) -> None:
    """Be a worker with this pipeline until SIGTERM.

    Args:
        pipeline: stands where `VideoPipeline` stands.
        redis: decodes responses.
        storage: of the service.
        name: a new one where none is given.
        kind: of worker.
        hang_s: of its pacemaker; None: it has none.
        runtime: more fields of `jobs.Runtime`.
    """
    assert "torch" not in sys.modules  # what is measured is not its size, nor how long its import takes
    url, lease_s, name = os.environ["REDIS_URL"], int(os.environ["LEASE_S"]), name or unique_name("worker")
    jobs.install(jobs.Runtime(name, jobs.Loaded(pipeline), Records(redis, Record), storage, **runtime))
    publish_models(redis, [CARD])
    heartbeat = Heartbeat(
        name=name,
        state=WorkerState.LOADING,
        model=MODEL,
        models=(CARD.id,),
        model_sha256=CARD.sha256,
        engine="none",
        started_at=now(),
        seen_at=now(),
    )
    pulse = Pulse(redis, heartbeat, lease_s, None if hang_s is None else Pacemaker(url, lease_s, hang_s))
    pulse.start()
    try:
        kind(connect(url, text=False), name, pulse, lease_s, Flights(overlap=True)).work(logging_level="WARNING")
    finally:
        pulse.end()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s worker  %(levelname)s %(message)s")
    main()
    os._exit(0)  # as the worker does: no thread is waited for
