"""`GpuWorker`: an rq worker that keeps the model in its process and has two jobs in flight.

rq's own `Worker` forks for every job, which CUDA does not survive; its `SimpleWorker` stays in one process but beats no
heart during a job, cannot stop one, and has one at a time. Added here: a thread for each job (`worker.flights`), a
lease for each that another thread renews, a cooperative stop, and a heartbeat of our own that says more than rq's.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.command import parse_payload
from rq.executions import Execution
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.worker import WorkerStatus

from worker import logs
from worker.contract import QUEUE, WORKERS_KEY, Heartbeat, WorkerState, worker_key
from worker.flights import Deadline, Flights, current
from worker.queues import Leased
from worker.records import now

log = logging.getLogger(__name__)


class Pulse(threading.Thread):
    """Writes the worker's heartbeat and has leases renewed, for as long as it lives."""

    def __init__(self, redis: Redis, heartbeat: Heartbeat, lease_s: int) -> None:
        super().__init__(name="pulse", daemon=True)
        self._redis = redis
        self._heartbeat = heartbeat
        self._lease_s = lease_s
        self._ended = threading.Event()
        self._beating = threading.Lock()  # several threads beat; what is written last has to be what is true by then
        self._state: Callable[[], WorkerState] | None = None
        self._renew: Callable[[], None] = lambda: None

    def attend(self, state: Callable[[], WorkerState], renew: Callable[[], None]) -> None:
        """From now on ask a worker for its state, and have it renew its leases, with each beat."""
        self._state, self._renew = state, renew
        self.beat()

    def show(self, **changes: Any) -> None:
        """Change what the heartbeat says, and say it now."""
        with self._beating:
            self._heartbeat = self._heartbeat.model_copy(update=changes)
        self.beat()

    def run(self) -> None:
        """Four beats in a lease: three may be lost."""
        while not self._ended.wait(self._lease_s / 4):
            self.beat()

    def end(self) -> None:
        """Stop beating and take the heartbeat away: the worker is gone."""
        with self._beating:
            self._ended.set()
            self._redis.delete(worker_key(self._heartbeat.name))
            self._redis.srem(WORKERS_KEY, self._heartbeat.name)

    def beat(self) -> None:
        """Say now what is true now."""
        with self._beating:
            if self._ended.is_set():
                return
            try:
                self._write()
                self._renew()
            except RedisError as error:
                log.warning("no heartbeat written: %s", error)

    def _write(self) -> None:
        state = self._state() if self._state else self._heartbeat.state
        seen = {"state": state, "seen_at": now(), "gpu_mem_bytes": _gpu_mem_bytes()}
        text = self._heartbeat.model_copy(update=seen).model_dump_json()
        self._redis.set(worker_key(self._heartbeat.name), text, ex=self._lease_s)
        self._redis.sadd(WORKERS_KEY, self._heartbeat.name)


def _gpu_mem_bytes() -> int | None:
    torch = sys.modules.get("torch")  # loaded by whoever has a model
    return torch.cuda.memory_reserved() if torch and torch.cuda.is_initialized() else None


class GpuWorker(Leased, SimpleWorker):
    """One process, one model; jobs in `Flights`."""

    death_penalty_class = Deadline

    def __init__(self, redis: Redis, name: str, pulse: Pulse, lease_s: int, flights: Flights) -> None:
        super().__init__(redis, QUEUE, name, lease_s)
        self._flights = flights
        self._pulse = pulse
        self._failing = threading.Lock()
        self._ending = False
        pulse.attend(self._heartbeat_state, self._renew_leases)

    # --- one job after another ------------------------------------------------------------------------------------

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Start one job, and return when the next could begin: not sooner, or it would wait here and not elsewhere."""
        execution: Execution = self.prepare_execution(job)
        self._flights.begin(execution.id, partial(self._perform, job, queue, execution))
        self._pulse.beat()
        self._flights.wait_for_room()
        self.set_state(WorkerStatus.IDLE)

    def _perform(self, job: Job, queue: Queue, execution: Execution) -> None:
        try:
            with logs.bind(job_id=job.id):
                self.perform_job(job, queue, execution)
        except Exception:  # of what rq does after a job: Redis was away for too long
            log.exception("%s: the queue was not told how it ended, and will deliver it again", job.id)
        finally:
            self.executions.pop(execution.id, None)
            self._pulse.beat()

    def _renew_leases(self) -> None:
        for execution in self.executions.copy().values():
            self.maintain_heartbeats(execution.job, execution)

    def _heartbeat_state(self) -> WorkerState:
        if self._stop_requested or self._ending:
            return WorkerState.STOPPING
        return WorkerState.BUSY if self.executions else WorkerState.READY

    # --- the end --------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Take no more jobs, and finish those in flight."""
        self._ending = True
        self._pulse.beat()
        self._flights.wait_for_all()
        super().teardown()  # type: ignore[no-untyped-call]

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """The second SIGTERM: jobs in flight go back to the queue at their next step."""
        try:
            super().request_force_stop(signum, frame)
        except SystemExit:
            if not self._flights.interrupt():
                raise

    # --- stopping one ---------------------------------------------------------------------------------------------

    def handle_payload(self, message: dict[str, Any]) -> None:
        """rq's commands. It would stop the oldest job or none."""
        payload = parse_payload(message)
        if payload["command"] != "stop-job":
            super().handle_payload(message)  # type: ignore[no-untyped-call]
            return
        for execution in self.executions.copy().values():
            if execution.job_id == payload.get("job_id"):
                self.request_stop_execution(execution.id)

    def request_stop_execution(self, execution_id: str) -> None:
        """There is no horse to kill, so ask the job to end at its next step."""
        if not self._flights.stop(execution_id):
            log.warning("asked to stop %s, which is not in flight", execution_id)

    def handle_job_failure(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: StartedJobRegistry | None = None,
        exc_string: str = "",
        execution: Execution | None = None,
    ) -> None:
        """Called in the job's thread. A job that was stopped is not tried again."""
        with self._failing:  # rq remembers one stopped job; here two may fail at once
            self._stopped_job_id = job.id if current().is_stopped else None
            super().handle_job_failure(job, queue, started_job_registry, exc_string, execution)
