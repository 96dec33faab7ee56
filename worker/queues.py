"""What every rq worker of ours is made to do: one queue, JSON, an allow-list of functions, a short lease.

And to outlive a Redis that is away, or refuses (full, read-only, its disk broken): rq waits for one that cannot be
reached while it waits for a job, and ends at any other time and of anything else.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from redis import Redis
from redis.client import Pipeline, PubSub, PubSubWorkerThread
from redis.exceptions import RedisError
from rq import Queue
from rq.executions import Execution
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker
from rq.worker_registration import clean_worker_registry

from worker.contract import ALLOWED_CALLBACKS, ALLOWED_FUNCTIONS

log = logging.getLogger(__name__)

_AGAIN_S = 1.0
"""Until a Redis that did not answer, or refused, is asked again; the client itself has been patient before."""
_SWEEP_LOCK_S = 5
_SWEEP_S = 4
"""How often lost jobs are looked for, at least: what this adds to the lease until one is taken up again."""
_POPPED_S = 10
"""A worker that has taken a job from the queue begins it within milliseconds, or has died."""
_FIRST_SEEN_S = 24 * 3600
"""For which rq remembers when it first saw such a job."""


ResultT = TypeVar("ResultT")


class ForbiddenFunction(Exception):
    """The queue named a function that is not ours to run."""


class Leases(StartedJobRegistry):
    """rq's list of the jobs in flight, each with when its lease runs out: by Redis's clock.

    rq goes by those of the workers. One that is fast would find all leases of the others run out, and take their jobs;
    and its own would last for as long as its clock is ahead, also when it has died.
    """

    def add_execution(self, execution: Execution, pipeline: Pipeline, ttl: int = 0, xx: bool = False) -> int:
        """Begin or renew the lease of one attempt."""
        until = self._moment() + ttl
        return pipeline.zadd(self.key, {execution.composite_key: until}, xx=xx)  # type: ignore[return-value]

    def cleanup(self, timestamp: float | None = None, exception_handlers: list[Any] | None = None) -> None:
        """Give the jobs whose lease has run out to others, or up."""
        super().cleanup(self._moment() if timestamp is None else timestamp, exception_handlers)

    def _moment(self) -> int:
        seconds, _microseconds = self.connection.time()
        return seconds


class ListedJob(Job):
    """A job that runs nothing but what the contract lists: with any serializer, the queue could name `os.system`."""

    @property
    def func(self) -> Callable[..., Any]:
        """The function to call. Raises ``ForbiddenFunction``."""
        if self.func_name not in ALLOWED_FUNCTIONS:
            raise ForbiddenFunction(f"{self.func_name!r} is not one of {sorted(ALLOWED_FUNCTIONS)}")
        function: Callable[..., Any] = super().func
        return function

    @property
    def started_job_registry(self) -> Leases:
        """Where its lease is."""
        return Leases(self.origin, self.connection, job_class=type(self), serializer=self.serializer)

    @property
    def failure_callback(self) -> Callable[..., Any] | None:
        """What rq calls when an attempt is lost: ours or nothing."""
        return super().failure_callback if self._failure_callback_name in ALLOWED_CALLBACKS else None

    @property
    def success_callback(self) -> None:
        """We use none, so whoever asks for one is not us."""

    @property
    def stopped_callback(self) -> None:
        """As above."""


class _SweptIntermediateQueue(IntermediateQueue):
    def should_be_cleaned_up(self, job_id: str) -> bool:
        """Whether a job that was taken and not begun is lost. rq waits a minute, by clocks that may differ."""
        seconds_left = self.connection.ttl(self.get_first_seen_key(job_id))
        return 0 <= seconds_left < _FIRST_SEEN_S - _POPPED_S


class SweptQueue(Queue):
    """A queue whose lost jobs are looked for soon, also when a worker was killed while it looked."""

    @property
    def intermediate_queue(self) -> IntermediateQueue:
        """Where a job is between being taken and being begun."""
        return _SweptIntermediateQueue(self.key, connection=self.connection)

    @property
    def started_job_registry(self) -> Leases:
        """The jobs in flight."""
        return Leases(self.name, self.connection, job_class=ListedJob, serializer=self.serializer)

    def acquire_maintenance_lock(self) -> bool:
        """Whether this worker is to look. rq's lock outlives its owner by 15 minutes, in which nobody may look.

        The sweep takes milliseconds. Should two overlap, a job is delivered twice, which attempts are made for.
        """
        return bool(self.connection.set(self.registry_cleaning_key, 1, nx=True, ex=_SWEEP_LOCK_S))


def make_queue(redis: Redis, name: str) -> Queue:
    """One of the contract's queues. ``redis`` must not decode responses."""
    return SweptQueue(name, connection=redis, serializer=JSONSerializer, job_class=ListedJob)


def unique_name(kind: str) -> str:
    """A name for a worker that no restart will meet again (rq refuses a name that a killed worker still holds)."""
    return f"{kind}-{secrets.token_hex(4)}"


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """What Redis refuses within is said and no more: nothing is lost by it."""
    try:
        yield
    except RedisError as error:
        log.warning("%s: %s", what, error)


class Leased(BaseWorker):
    """Comes before one of rq's worker classes: takes jobs from one queue, each for as long as its lease is renewed."""

    job_class = ListedJob
    max_connection_wait_time = 2 * _AGAIN_S  # after an outage; rq's is a minute

    def __init__(self, redis: Redis, queue: str, name: str, lease_s: int) -> None:
        pause_s = min(max(lease_s // 4, 1), _SWEEP_S)
        super().__init__(
            [make_queue(redis, queue)],
            name=name,
            connection=redis,
            serializer=JSONSerializer,
            job_class=ListedJob,
            maintenance_interval=pause_s,
            worker_ttl=pause_s + 15,  # rq waits worker_ttl - 15 s for a job, then sees to maintenance
            job_monitoring_interval=pause_s,
            log_job_description=False,
        )
        self._lease_s = lease_s

    def clean_registries(self) -> None:
        """What rq's own does for queues like ours, but with ``Leases``. One worker at a time."""
        for queue in self.queues:
            if queue.acquire_maintenance_lock():
                queue.started_job_registry.cleanup()
                queue.finished_job_registry.cleanup()
                queue.failed_job_registry.cleanup()
                clean_worker_registry(queue)
                queue.intermediate_queue.cleanup(self, queue)
                queue.release_maintenance_lock()  # type: ignore[no-untyped-call]
        self.last_cleaned_at = datetime.now(UTC)  # type: ignore[assignment]

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:  # noqa: ARG002
        """Seconds until a job is given up for lost if its lease is not renewed."""
        return self._lease_s

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether a signal has ended ``work``; else it was something that rq does not know what to do about."""
        return self._shutdown_requested_date is not None

    # --- while Redis is away --------------------------------------------------------------------------------------

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Wait for a job, however long Redis is away or refuses."""
        return self.patiently(lambda: super(Leased, self).dequeue_job_and_maintain_ttl(timeout, max_idle_time))

    def check_for_suspension(self, burst: bool) -> None:
        """Wait while the queue is paused; likewise."""
        self.patiently(lambda: super(Leased, self).check_for_suspension(burst))

    def patiently(self, work: Callable[[], ResultT]) -> ResultT:
        """What ``work`` returns, as soon as Redis lets it. A signal ends the wait."""
        while True:
            try:
                return work()
            except RedisError as error:
                log.error("no job can be taken: %s", error)
                time.sleep(_AGAIN_S)

    def run_maintenance_tasks(self) -> None:
        """Look for lost jobs; if that fails, the next look is soon."""
        with _warned("lost jobs could not be looked for"):
            super().run_maintenance_tasks()  # type: ignore[no-untyped-call]

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """rq's own, of which nothing depends; a job that was just taken must not be lost to it."""
        with _warned("rq was not told that this worker lives"):
            super().heartbeat(timeout, pipeline)

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """Likewise."""
        with _warned(f"rq was not told that this worker is {state}"):
            super().set_state(state, pipeline)

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """Renew a lease. Where that fails the job goes on: if somebody else takes it up, its attempt is fenced off."""
        with _warned(f"{job.id}: its lease was not renewed"):
            super().maintain_heartbeats(job, execution)

    def unsubscribe(self) -> None:
        """Hear no more commands; that Redis is away does not keep a worker from ending."""
        with _warned("commands were not unsubscribed from"):
            super().unsubscribe()  # type: ignore[no-untyped-call]

    def register_death(self) -> None:
        """Likewise; it would be noticed by its silence."""
        with _warned("rq was not told that this worker ends"):
            super().register_death()  # type: ignore[no-untyped-call]

    def _pubsub_exception_handler(self, exc: Exception, _pubsub: PubSub, _thread: PubSubWorkerThread) -> None:
        """rq would listen to no more commands after an error that is not the connection's, a timeout for example."""
        if not isinstance(exc, RedisError):
            raise exc
        log.warning("no commands can be heard: %s", exc)
        time.sleep(_AGAIN_S)
