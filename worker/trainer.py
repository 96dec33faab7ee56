"""`python -m worker.trainer`: takes distillations from the queue `train`, one at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from rq import Worker

from worker import logs, training
from worker.contract import TRAIN_QUEUE, Distillation
from worker.queues import Leased, unique_name
from worker.records import Records, connect
from worker.settings import TrainerSettings, read

_GRACE_S = 30


class Trainer(Leased, Worker):
    """rq's own worker, which forks for each job, renews its lease meanwhile, and would wait days for one to end."""

    def handle_warm_shutdown_request(self) -> None:
        """Hand SIGTERM on to the job, which stops at a checkpoint and goes back to the queue."""
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, signal.SIGTERM)


def main(command: Sequence[str] = training.COMMAND) -> int:
    """Run until SIGTERM. Exit code 2: a setting is wrong.

    Args:
        command: how a run begins; recipe, folder and settings come after it.
    """
    settings = read(TrainerSettings)
    logs.configure("trainer", settings.log_level, settings.log_format)
    runtime = training.Runtime(
        name=unique_name("trainer"),
        records=Records(connect(settings.redis_url), Distillation),
        runs=settings.runs.absolute(),
        command=command,
        # When the trainer is killed, the run has ended before its lease does and another trainer may have it.
        grace_s=min(_GRACE_S, settings.lease_s / 2),
        pid=os.getpid(),
    )
    training.RUNTIME.set(runtime)
    redis = connect(settings.redis_url, text=False)
    Trainer(redis, TRAIN_QUEUE, runtime.name, settings.lease_s).work(logging_level="WARNING")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
