"""`GpuWorker`: an rq worker that keeps the model in its process and has two jobs in flight.

rq's own `Worker` forks for every job, which CUDA does not survive; its `SimpleWorker` stays in one process but beats no
heart during a job, cannot stop one, and has one at a time. Added here: a thread for each job (`worker.flights`), a
lease for each that another thread renews, and another process where that thread cannot (`worker.pacemaker`), a
cooperative stop, a heartbeat of our own that says more than rq's, and something to do while there are no jobs.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.command import parse_payload
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.worker import WorkerStatus

from worker import logs
from worker.contract import QUEUE, WORKERS_KEY, Heartbeat, WorkerState, worker_key
from worker.flights import Deadline, Flights, current
from worker.pacemaker import Beat, Pacemaker
from worker.queues import Leased
from worker.records import now

log = logging.getLogger(__name__)

LOST = 70
"""Exit code: this process cannot go on, and one that is started anew can."""


class Pulse(threading.Thread):
    """Writes the worker's heartbeat and has leases renewed, for as long as it lives."""

    def __init__(self, redis: Redis, heartbeat: Heartbeat, lease_s: int, pacemaker: Pacemaker | None = None) -> None:
        """``pacemaker``: beats while this thread cannot."""
        super().__init__(name="pulse", daemon=True)
        self._redis = redis
        self._heartbeat = heartbeat
        self._lease_s = lease_s
        self._pacemaker = pacemaker
        self._due, self._ended = threading.Event(), threading.Event()
        self._beating = threading.Lock()  # several threads beat; what is written last has to be what is true by then
        self._worker: GpuWorker | None = None

    def attend(self, worker: GpuWorker) -> None:
        """From now on ask a worker for its state, and have it renew its leases, with each beat."""
        self._worker = worker
        self.beat()

    def show(self, **changes: Any) -> None:
        """Change what the heartbeat says, and say it now."""
        with self._beating:
            self._heartbeat = self._heartbeat.model_copy(update=changes)
        self.beat()

    def run(self) -> None:
        """Four beats in a lease: three may be lost."""
        while not self._ended.is_set():
            self._due.wait(self._lease_s / 4)
            self._due.clear()
            self.beat()

    def beat_soon(self) -> None:
        """For a signal handler, which may not wait for whoever is beating."""
        self._due.set()

    def end(self) -> None:
        """Stop beating and take the heartbeat away: the worker is gone."""
        with self._beating:
            self._ended.set()
            if self._pacemaker:
                self._pacemaker.end()
            try:
                self._redis.delete(worker_key(self._heartbeat.name))
                self._redis.srem(WORKERS_KEY, self._heartbeat.name)
            except RedisError as error:
                log.warning("the heartbeat was not taken away, and runs out: %s", error)

    def beat(self) -> None:
        """Say now what is true now."""
        with self._beating:
            if self._ended.is_set():
                return
            worker = self._worker
            if worker:
                worker.end_if_it_hangs()
            state = worker.heartbeat_state() if worker else self._heartbeat.state
            seen = {"state": state, "seen_at": now(), "gpu_mem_bytes": _gpu_mem_bytes()}
            said = self._heartbeat.model_copy(update=seen)
            try:
                if self._pacemaker:
                    self._pacemaker.tell(Beat(heartbeat=said, leases=worker.leases() if worker else ()))
                self._redis.set(worker_key(said.name), said.model_dump_json(), ex=self._lease_s)
                self._redis.sadd(WORKERS_KEY, said.name)
                if worker:
                    worker.renew_leases()
            except (RedisError, OSError) as error:  # the machine may give no more processes
                log.warning("no heartbeat written: %s", error)


def _gpu_mem_bytes() -> int | None:
    torch = sys.modules.get("torch")  # loaded by whoever has a model
    return torch.cuda.memory_reserved() if torch and torch.cuda.is_initialized() else None


class GpuWorker(Leased, SimpleWorker):
    """One process, one model; jobs in `Flights`."""

    death_penalty_class = Deadline

    def __init__(
        self,
        redis: Redis,
        name: str,
        pulse: Pulse,
        lease_s: int,
        flights: Flights,
        *,
        idle: Callable[[Callable[[], bool]], bool] = lambda _wanted: True,
        hang_s: int = 0,
        drain_s: int = 50,
    ) -> None:
        """
        Args:
            redis: must not decode responses.
            name: unlike that of any worker before.
            pulse: beats for it.
            lease_s: how long a job may be without a sign of life.
            flights: where jobs run.
            idle: called now and then while there is no job, with what says whether one has come; false: this worker is
                not fit to take another.
            hang_s: a job that has not ended so long after its time limit hangs, and ends the process; 0: never.
            drain_s: how long jobs in flight may take to finish when the worker is told to end.
        """
        super().__init__(redis, QUEUE, name, lease_s)
        self._flights = flights
        self._pulse = pulse
        self._idle = idle
        self._hang_s = hang_s
        self._drain_s = drain_s
        self._failing = threading.Lock()
        self._ending = False
        self._idle_since = math.inf
        """When what is done while there is no job last gave a sign of life; by `time.monotonic`."""
        pulse.attend(self)

    # --- one job after another ------------------------------------------------------------------------------------

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Start one job, and return when the next could begin: not sooner, or it would wait here and not elsewhere."""
        before = set(self.executions)
        try:
            execution: Execution = self.prepare_execution(job)
        except RedisError as error:
            # rq has noted it before it told Redis, which may have heard it all the same: its lease has to run out.
            for stray in set(self.executions) - before:
                self.executions.pop(stray, None)
            log.error("%s: not begun, and will be delivered again: %s", job.id, error)
            return
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

    def run_maintenance_tasks(self) -> None:
        """Called by rq between two jobs, and every few seconds while there are none."""
        if self._ending:  # what rq does here has an alarm of its own, which would end that of the draining
            raise StopRequested
        super().run_maintenance_tasks()
        if self.executions:
            return
        self._idle_since = time.monotonic()
        is_fit = self._idle(self._is_wanted)
        self._idle_since = math.inf
        # A signal may have come meanwhile, and rq's way to say so been lost in somebody's `except`.
        if self._ending or not is_fit:
            self._ending = True
            raise StopRequested

    def _is_wanted(self) -> bool:
        self._idle_since = time.monotonic()  # it moves
        try:
            return self._ending or self._stop_requested or any(queue.count for queue in self.queues)
        except RedisError:  # nothing is known
            return True

    # --- for the pulse --------------------------------------------------------------------------------------------

    def leases(self) -> tuple[tuple[str, str], ...]:
        """What `renew_leases` renews: the ids of each job and of its execution."""
        return tuple((execution.job_id, execution.id) for execution in self.executions.copy().values())

    def renew_leases(self) -> None:
        """Say that each job in flight is being worked on."""
        for execution in self.executions.copy().values():
            self.maintain_heartbeats(execution.job, execution)

    def end_if_it_hangs(self) -> None:
        """What does not come back is in C code, where no flag is looked at: no thread here can end it."""
        if not self._hang_s:
            return
        if self._flights.is_overdue(self._hang_s):
            log.error("a job has not ended %d s after its time limit; this worker ends", self._hang_s)
        elif time.monotonic() > self._idle_since + self._hang_s:
            log.error("a canary has not gone on for %d s; this worker ends", self._hang_s)
        else:
            return
        os._exit(LOST)

    def heartbeat_state(self) -> WorkerState:
        """What the worker is doing."""
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

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """The first SIGTERM: no other job is taken, and those in flight have ``drain_s`` to finish."""
        self._ending = True
        self._pulse.beat_soon()
        signal.signal(signal.SIGALRM, self._end_of_drain)
        signal.setitimer(signal.ITIMER_REAL, self._drain_s)
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]

    def _end_of_drain(self, _signum: int, _frame: FrameType | None) -> None:
        if self._flights.interrupt():
            log.warning("jobs in flight have not finished within %d s; they go back to the queue", self._drain_s)

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
