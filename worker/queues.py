"""What every rq worker of ours is made to do: one queue, JSON, an allow-list of functions, a short lease."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker

from worker.contract import ALLOWED_CALLBACKS, ALLOWED_FUNCTIONS

_SWEEP_LOCK_S = 5


class ForbiddenFunction(Exception):
    """The queue named a function that is not ours to run."""


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
    def failure_callback(self) -> Callable[..., Any] | None:
        """What rq calls when an attempt is lost: ours or nothing."""
        return super().failure_callback if self._failure_callback_name in ALLOWED_CALLBACKS else None

    @property
    def success_callback(self) -> None:
        """We use none, so whoever asks for one is not us."""

    @property
    def stopped_callback(self) -> None:
        """As above."""


class SweptQueue(Queue):
    """A queue whose lost jobs are looked for soon, also when a worker was killed while it looked."""

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


class Leased(BaseWorker):
    """Comes before one of rq's worker classes: takes jobs from one queue, each for as long as its lease is renewed."""

    job_class = ListedJob

    def __init__(self, redis: Redis, queue: str, name: str, lease_s: int) -> None:
        pause_s = max(lease_s // 4, 1)
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

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:  # noqa: ARG002
        """Seconds until a job is given up for lost if its lease is not renewed."""
        return self._lease_s
