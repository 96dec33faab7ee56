"""A worker whose model can hold Python's global lock: `python -m tests.worker.gil_worker FOLDER with|without`.

It holds the lock while it is at seed 1 for as many seconds as FOLDER/hold says, once; FOLDER/stick has it stand still
without the lock. Its lease is LEASE_S, and with
its pacemaker it may hang for HANG_S.
"""

import ctypes
import logging
import os
import sys
import time
from pathlib import Path

from benchmarks.timed_worker import CARD, MODEL, TimedPipeline
from worker import jobs
from worker.contract import Heartbeat, Phase, Record, WorkerState
from worker.flights import Flights
from worker.gpu_worker import GpuWorker, Pulse
from worker.pacemaker import Pacemaker
from worker.queues import unique_name
from worker.records import Records, connect, now, publish_models
from worker.storage import Storage


class HoldingPipeline(TimedPipeline):
    def __init__(self, redis, folder: Path) -> None:
        super().__init__(redis, 0.2)
        self._folder = folder

    def denoise(self, image, prompt, *, seed, on_progress):
        on_progress(Phase.DENOISING, 0.1)
        for order, stand in (("hold", ctypes.PyDLL(None).sleep), ("stick", time.sleep)):  # a PyDLL keeps the lock
            path = self._folder / order
            if seed == 1 and path.exists():
                seconds = int(path.read_text())
                path.unlink()
                (self._folder / "held-by").write_text(str(os.getpid()))
                stand(seconds)
        return super().denoise(image, prompt, seed=seed, on_progress=on_progress)


def main(folder: Path, *, has_pacemaker: bool) -> None:
    url, lease_s = os.environ["REDIS_URL"], int(os.environ["LEASE_S"])
    redis, name = connect(url), unique_name("worker")
    pipeline = HoldingPipeline(redis, folder)
    jobs.install(jobs.Runtime(name, jobs.Loaded(pipeline), Records(redis, Record), Storage(os.environ["STORAGE_URL"])))
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
    hang_s = int(os.environ.get("HANG_S", "0"))
    pacemaker = Pacemaker(url, lease_s, hang_s) if has_pacemaker else None
    pulse = Pulse(redis, heartbeat, lease_s, pacemaker)
    pulse.start()
    try:
        worker = GpuWorker(connect(url, text=False), name, pulse, lease_s, Flights(), hang_s=hang_s)
        worker.work(logging_level="WARNING")
    finally:
        pulse.end()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr)
    main(Path(sys.argv[1]), has_pacemaker=sys.argv[2] == "with")
    os._exit(0)
