"""A worker whose model can hold Python's global lock: `python -m tests.worker.gil_worker FOLDER with|without`.

It holds the lock while it is at seed 1 for as many seconds as FOLDER/hold says, once; FOLDER/stick has it stand still
without the lock. Its lease is LEASE_S, and it may hang for HANG_S.
"""

import ctypes
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.timed_worker import TimedPipeline, serve
from worker.contract import Phase
from worker.gpu_worker import GpuWorker
from worker.records import connect
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
    redis, hang_s = connect(os.environ["REDIS_URL"]), int(os.environ.get("HANG_S", "0"))
    kind = partial(GpuWorker, hang_s=hang_s)
    storage = Storage(os.environ["STORAGE_URL"])
    serve(HoldingPipeline(redis, folder), redis, storage, kind=kind, hang_s=hang_s if has_pacemaker else None)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr)
    main(Path(sys.argv[1]), has_pacemaker=sys.argv[2] == "with")
    os._exit(0)
