"""The jobs that a worker has in flight, each in a thread of its own: one is decoded and saved, the next is denoised.

They begin in the order in which they are taken, and each is decoded when all before it are over, so they end in that
order too. No job holds a lock that it could leave shut: what it occupies is free once its thread is done, however that
ended. What a job has to stop for is a flag that it looks at between its steps; nothing is thrown into a thread, where
it could strike half-way through a call to Redis.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar

from rq.timeouts import BaseDeathPenalty, JobTimeoutException

_LOOK_S = 1.0
"""A job that waits looks this often whether it has to stop."""


class Cancelled(Exception):
    """The job was asked to stop."""


class Interrupted(Exception):
    """The worker was told to end at once: the job goes back to the queue."""


class Flight:
    """One job in flight. Its flags are plain attributes: a signal handler sets them, and may wait for no lock."""

    def __init__(self, flights: Flights, execution_id: str = "") -> None:
        self._flights = flights
        self.execution_id = execution_id
        """rq's id of this attempt."""
        self.is_stopped = False
        """rq's stop-job command has named it."""
        self.is_interrupted = False
        self.is_denoising = True
        self.is_waiting = False
        """Until it is alone."""
        self.deadline = self.limit = math.inf
        """When it has to end by itself, and when rq's limit is over; by `time.monotonic`."""

    def check(self) -> None:
        """To be called between steps.

        Raises:
            Interrupted, Cancelled, JobTimeoutException: what the job has to end with.
        """
        if self.is_interrupted:
            raise Interrupted
        if self.is_stopped:
            raise Cancelled
        if time.monotonic() > self.deadline:
            raise JobTimeoutException

    def leave_transformer(self) -> None:
        """The denoising is done: the next job may begin."""
        self.is_denoising = False
        self._flights.tell()

    def wait_alone(self, look: Callable[[], None]) -> None:
        """Return when nothing else computes, and let no other job begin until `leave_transformer`."""
        self.is_denoising = self.is_waiting = True
        try:
            while not self._flights.wait(lambda: self._flights.is_alone(self), _LOOK_S):
                look()
        finally:
            self.is_waiting = False

    def wait_for_later(self) -> None:
        """Return when all jobs after this one are over."""
        self._flights.wait(lambda: self._flights.is_last(self))

    def wait_for_decoder(self, look: Callable[[], None]) -> None:
        """Return when all jobs before this one are over. ``look`` is called once a second; what it raises goes on."""
        while not self._flights.wait(lambda: self._flights.is_first(self), _LOOK_S):
            look()


_CURRENT: ContextVar[Flight] = ContextVar("flight")  # rq calls a job with its id and nothing else


def current() -> Flight:
    """The flight of the thread that asks; one of its own where nobody began any."""
    return _CURRENT.get(None) or Flight(Flights())


class Flights:
    """All jobs in flight, oldest first."""

    def __init__(self, abreast: int = 1, *, overlap: bool = False) -> None:
        """
        Args:
            abreast: how many jobs are denoised at a time.
            overlap: whether as many again may be in their decoding, or wait for it, meanwhile.
        """
        self._abreast = abreast
        self._most = 2 * abreast if overlap else abreast
        self._flights: list[Flight] = []
        self._changed = threading.Condition()

    def begin(self, execution_id: str, work: Callable[[], None]) -> None:
        """Call ``work`` in a new thread."""
        flight = Flight(self, execution_id)
        with self._changed:
            self._flights.append(flight)
        try:
            threading.Thread(target=self._fly, args=(flight, work), name="job").start()
        except RuntimeError:  # the machine gives no more threads
            self._end(flight)
            raise

    def _fly(self, flight: Flight, work: Callable[[], None]) -> None:
        _CURRENT.set(flight)
        try:
            work()
        finally:
            self._end(flight)

    def _end(self, flight: Flight) -> None:
        with self._changed:
            self._flights.remove(flight)
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Return when another job would begin at once."""
        self.wait(self._has_room)

    def wait_for_all(self) -> None:
        """Return when no job is in flight."""
        self.wait(lambda: not self._flights)

    def _has_room(self) -> bool:
        return len(self._flights) < self._most and sum(one.is_denoising for one in self._flights) < self._abreast

    def wait(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Return when the ``condition`` holds, or false after so many seconds."""
        with self._changed:
            return self._changed.wait_for(condition, seconds)

    def tell(self) -> None:
        """Whoever waits looks again."""
        with self._changed:
            self._changed.notify_all()

    def is_first(self, flight: Flight) -> bool:
        """Whether all before this one are over."""
        return not self._flights or self._flights[0] is flight

    def is_last(self, flight: Flight) -> bool:
        """Whether all after this one are over."""
        return not self._flights or self._flights[-1] is flight

    def is_alone(self, flight: Flight) -> bool:
        """Whether all before this one are over, and those after it do nothing but wait for it."""
        others = [one for one in self._flights if one is not flight]
        return self.is_first(flight) and not any(one.is_denoising and not one.is_waiting for one in others)

    def is_overdue(self, seconds: float) -> bool:
        """Whether rq's time limit of a job was over so long ago, and it has not ended."""
        return any(time.monotonic() > flight.limit + seconds for flight in self._flights.copy())

    def stop(self, execution_id: str) -> bool:
        """Ask one job to end at its next step; whether there is such a job."""
        named = [flight for flight in self._flights.copy() if flight.execution_id == execution_id]
        for flight in named:
            flight.is_stopped = True
        return bool(named)

    def interrupt(self) -> bool:
        """Have every job end at its next step and go back to the queue; whether there are any."""
        flights = self._flights.copy()
        for flight in flights:
            flight.is_interrupted = True
        return bool(flights)


class Deadline(BaseDeathPenalty):
    """rq's time limit of a job, looked at between its steps.

    rq's own are a signal, which reaches the main thread only, and an exception thrown into a thread from outside.
    """

    def setup_death_penalty(self) -> None:
        """From now on."""
        if self._timeout > 0:  # -1 is no limit
            flight = current()
            flight.deadline = flight.limit = time.monotonic() + self._timeout

    def cancel_death_penalty(self) -> None:
        """No longer."""
        flight = current()
        flight.deadline = flight.limit = math.inf
