"""A worker with everything but a model: `python -m tests.held_worker FOLDER overlap|one`.

Its pipeline makes grey clips from seeds, and holds each stage of a job until a test lets it go on: the file
FOLDER/denoise-SEED or FOLDER/decode-SEED. What it has begun and ended is a line each in FOLDER/log. The decoding of
seed 13 fails; the first of seed 14 loses the engine.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from distill.prompt import Prompt
from worker import jobs
from worker.contract import Heartbeat, ModelCard, Phase, Record, VideoSize, WorkerState
from worker.engine.errors import EngineLost
from worker.flights import Flights
from worker.gpu_worker import GpuWorker, Pulse
from worker.queues import unique_name
from worker.records import Records, connect, now, publish_models
from worker.storage import Storage

VIDEO = VideoSize(width=64, height=64, num_frames=8, fps=8)
CARD = ModelCard(
    name="grey",
    sha256="0" * 64,
    task="ti2v",
    num_inference_steps=4,
    video=VIDEO,
    prompt=Prompt(kind="free", help="", examples=("x",)),
)


class HeldPipeline:
    """Stands where `VideoPipeline` stands."""

    card = SimpleNamespace(name="grey", sha256="0" * 64, task="ti2v", call={}, video=VIDEO)
    choice = SimpleNamespace(name="none", reason="there is no model", decoder=SimpleNamespace(name="grey"))
    model_card = CARD
    device, threads = "cpu", 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def denoise(self, _image, _prompt, *, seed, on_progress):
        self._hold("denoise", seed, lambda: on_progress(Phase.DENOISING, 0.4))
        return SimpleNamespace(seed=seed, timings_s={Phase.DENOISING: 0.1}, first_step=None)

    def decode(self, denoised, *, on_progress):
        for piece in range(4):
            if piece == 2:
                self._hold("decode", denoised.seed, lambda: on_progress(Phase.DECODING, 0.8))
                if denoised.seed == 13:
                    raise ValueError("nan")
                if denoised.seed == 14 and not (self._folder / "lost").exists():
                    (self._folder / "lost").touch()
                    raise EngineLost("the GPU cannot be used any more")
            yield np.full((2, 64, 64, 3), denoised.seed + 10 * piece, np.uint8)
        denoised.timings_s[Phase.DECODING] = 0.1

    def _hold(self, stage: str, seed: int, step) -> None:
        self._say(f"{stage} {seed} begins")
        try:
            while not (self._folder / f"{stage}-{seed}").exists():
                step()
                time.sleep(0.05)
        finally:
            self._say(f"{stage} {seed} ends")

    def _say(self, line: str) -> None:
        with (self._folder / "log").open("a") as log:
            log.write(f"{line}\n")


def main(folder: Path, overlap: bool) -> None:
    url, lease_s = os.environ["REDIS_URL"], int(os.environ["LEASE_S"])
    redis, name = connect(url), unique_name("worker")
    pipeline = HeldPipeline(folder)
    jobs.install(jobs.Runtime(name, jobs.Loaded(pipeline), Records(redis, Record), Storage(os.environ["STORAGE_URL"])))
    publish_models(redis, [CARD])
    state = {"state": WorkerState.LOADING, "started_at": now(), "seen_at": now()}
    pulse = Pulse(
        redis, Heartbeat(name=name, model="grey", models=(CARD.id,), model_sha256="", engine="none", **state), lease_s
    )
    pulse.start()
    try:
        flights, drain_s = Flights(overlap=overlap), int(os.environ.get("DRAIN_S", "50"))
        GpuWorker(connect(url, text=False), name, pulse, lease_s, flights, drain_s=drain_s).work(
            logging_level="WARNING"
        )
    finally:
        pulse.end()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr)
    main(Path(sys.argv[1]), sys.argv[2] == "overlap")
    os._exit(0)  # as the worker does: no thread is waited for
