"""`GpuWorker`: an rq worker that keeps the model in its process.

rq's own `Worker` forks for every job, which CUDA does not survive; its `SimpleWorker` stays in one process but beats no
heart during a job and cannot stop one. Added here: a lease that a thread renews, a cooperative stop, and a heartbeat of
our own that says more than rq's.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.executions import Execution
from rq.job import Job
from rq.worker import WorkerStatus

from worker.contract import QUEUE, WORKERS_KEY, Heartbeat, WorkerState, worker_key
from worker.jobs import Runtime
from worker.queues import Leased
from worker.records import now

log = logging.getLogger(__name__)


class Pulse(threading.Thread):
    """Writes the worker's heartbeat and renews the lease of the job it is running, for as long as it lives."""

    def __init__(self, redis: Redis, heartbeat: Heartbeat, lease_s: int) -> None:
        super().__init__(name="pulse", daemon=True)
        self._redis = redis
        self._heartbeat = heartbeat
        self._lease_s = lease_s
        self._ended = threading.Event()
        self.renew: Callable[[], None] | None = None

    def show(self, **changes: Any) -> None:
        """Change what the heartbeat says, and say it now."""
        self._heartbeat = self._heartbeat.model_copy(update=changes)
        self._beat()

    def run(self) -> None:
        """Four beats in a lease: three may be lost."""
        while not self._ended.wait(self._lease_s / 4):
            self._beat()

    def end(self) -> None:
        """Stop beating and take the heartbeat away: the worker is gone."""
        self._ended.set()
        self._redis.delete(worker_key(self._heartbeat.name))
        self._redis.srem(WORKERS_KEY, self._heartbeat.name)

    def _beat(self) -> None:
        try:
            text = self._heartbeat.model_copy(update={"seen_at": now()}).model_dump_json()
            self._redis.set(worker_key(self._heartbeat.name), text, ex=self._lease_s)
            self._redis.sadd(WORKERS_KEY, self._heartbeat.name)
            if renew := self.renew:
                renew()
        except RedisError as error:
            log.warning("no heartbeat written: %s", error)


class GpuWorker(Leased, SimpleWorker):
    """One process, one model, one job at a time."""

    def __init__(self, redis: Redis, runtime: Runtime, pulse: Pulse, lease_s: int) -> None:
        super().__init__(redis, QUEUE, runtime.name, lease_s)
        self._runtime = runtime
        self._pulse = pulse

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run one job in this process, its lease renewed by the pulse."""
        execution: Execution = self.prepare_execution(job)
        self._pulse.renew = lambda: self.maintain_heartbeats(job, execution)
        self._pulse.show(state=WorkerState.BUSY)
        try:
            self.perform_job(job, queue, execution)
        finally:
            self._pulse.renew = None
            self._pulse.show(state=WorkerState.STOPPING if self._stop_requested else WorkerState.READY)
        self.set_state(WorkerStatus.IDLE)

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:  # noqa: ARG002
        """rq's stop-job command: there is no horse to kill, so ask the job to end at its next step."""
        self._runtime.stop_job.set()
