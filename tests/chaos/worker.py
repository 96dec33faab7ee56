"""A worker that a test can stop anywhere: `python -m tests.chaos.worker FOLDER --name worker-1 --seconds 0.2`.

All of a worker but the model, which sleeps and makes grey clips from seeds. Where the file FOLDER/hold-PLACE-SEED is, a
job of that seed waits at that place for as long as the file is there, and says so in FOLDER/at-PLACE-SEED. The places
in order: popped, claimed (nothing is read yet), encoding, denoising, decoding, saving (ffmpeg is done), half (the MP4
is written aside), manifest (MP4 and picture are in their places), half-manifest, record (all files are).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
from redis import Redis

from benchmarks.timed_worker import STEPS, TimedPipeline, serve
from worker.contract import Phase, record_key
from worker.gpu_worker import GpuWorker
from worker.records import connect
from worker.storage import Storage

_PLACES_OF = {".mp4": ("saving", "half"), ".json": ("manifest", "half-manifest")}
"""Before a file is written, and when it is written aside."""


class Gates:
    """Where jobs wait."""

    def __init__(self, folder: Path, redis: Redis | None = None) -> None:
        self._folder = folder
        self._redis = redis

    def hold(self, place: str, seed: object, look: Callable[[], None] = lambda: None) -> None:
        """Return when there is no such gate, or no longer."""
        gate = self._folder / f"hold-{place}-{seed}"
        if gate.exists():
            (self._folder / f"at-{place}-{seed}").touch()
        while gate.exists():
            look()
            time.sleep(0.02)

    def hold_job(self, place: str, job_id: str) -> None:
        assert self._redis is not None
        self.hold(place, self._redis.hget(record_key(job_id), "seed"))


class HeldPipeline(TimedPipeline):
    """Stands where `VideoPipeline` stands."""

    def __init__(self, gates: Gates, redis: Redis, seconds: float, shade: int) -> None:
        super().__init__(redis, seconds)
        self._gates = gates
        self._shade = shade

    def denoise(self, image: Any, prompt: str, *, seed: int, on_progress: Any) -> SimpleNamespace:
        self._gates.hold("encoding", seed)

        def progress(phase: Phase, share: float) -> None:
            on_progress(phase, share)
            if phase is Phase.DENOISING and share > 0.8 / STEPS:
                self._gates.hold("denoising", seed, lambda: on_progress(phase, share))

        return super().denoise(image, prompt, seed=seed, on_progress=progress)

    def decode(self, denoised: SimpleNamespace, *, on_progress: Any) -> Iterator[Any]:
        for piece, frames_THWC in enumerate(super().decode(denoised, on_progress=on_progress)):
            if piece == 1:
                self._gates.hold("decoding", denoised.seed, lambda: on_progress(Phase.DECODING, 0.9))
            yield np.full_like(frames_THWC, (denoised.seed + self._shade) % 256)


class HeldStorage(Storage):
    """The real one; it waits before and after what a worker does with it."""

    def __init__(self, url: str, gates: Gates) -> None:
        super().__init__(url)
        self._gates = gates

    def read(self, path: str) -> bytes:
        name = PurePosixPath(path)
        if name.suffix == ".json":  # what an earlier attempt may have left: the first thing that a job looks for
            self._gates.hold_job("claimed", name.stem)
        return super().read(path)

    def write(self, path: str, data: bytes, check: Callable[[], None] = lambda: None) -> None:
        name = PurePosixPath(path)
        before, within = _PLACES_OF.get(name.suffix, ("", ""))
        self._gates.hold_job(before, name.stem)

        def held_check() -> None:
            self._gates.hold_job(within, name.stem)
            check()

        super().write(path, data, held_check)
        if name.suffix == ".json":
            self._gates.hold_job("record", name.stem)


def main() -> None:
    """Work until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each job")
    parser.add_argument("--shade", type=int, default=0, help="makes its videos others than those of other workers")
    parser.add_argument("--patience", type=float, default=60, help="with a storage that fails, in seconds")
    options = parser.parse_args()
    redis = connect(os.environ["REDIS_URL"])
    gates = Gates(options.folder, redis)

    class HeldWorker(GpuWorker):
        def execute_job(self, job: Any, queue: Any) -> None:
            gates.hold_job("popped", job.id)
            super().execute_job(job, queue)

    pipeline = HeldPipeline(gates, redis, options.seconds, options.shade)
    storage = HeldStorage(os.environ["STORAGE_URL"], gates)
    serve(pipeline, redis, storage, name=options.name, kind=HeldWorker, patience_s=options.patience)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s worker  %(levelname)s %(message)s")
    main()
    os._exit(0)  # as the worker does: no thread is waited for
