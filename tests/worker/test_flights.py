"""`Flights`: who may begin, who may be decoded, and what ends a job; no queue, no model."""

import threading
import time

import pytest
from rq.timeouts import JobTimeoutException

from tests.stack import wait_for
from worker.flights import Cancelled, Deadline, Flights, Interrupted, current


class Job:
    """Goes through its two stages as a test lets it."""

    def __init__(self) -> None:
        self.denoise, self.decode = threading.Event(), threading.Event()
        self.stage = "waits"
        self.raised: BaseException | None = None

    def __call__(self) -> None:
        try:
            flight = current()
            self.stage = "denoising"
            self._hold(self.denoise)
            flight.leave_transformer()
            self.stage = "denoised"
            flight.wait_for_decoder(flight.check)
            self.stage = "decoding"
            self._hold(self.decode)
        except Exception as error:
            self.raised = error
        self.stage = "over"

    def _hold(self, gate: threading.Event) -> None:
        while not gate.wait(0.01):
            current().check()


def reach(job: Job, stage: str) -> None:
    wait_for(lambda: job.stage == stage, 5, f"{stage}, it is {job.stage}")


def has_room(flights: Flights) -> bool:
    return flights.wait(flights._has_room, 0.05)


def begun(flights: Flights, count: int) -> list[Job]:
    jobs = [Job() for _ in range(count)]
    for number, job in enumerate(jobs):
        flights.begin(str(number), job)
        reach(job, "denoising")
    return jobs


def test_the_next_begins_when_the_transformer_is_free_and_is_decoded_when_the_one_before_is_over():
    flights = Flights(overlap=True)
    [first] = begun(flights, 1)
    assert not has_room(flights)
    first.denoise.set()
    reach(first, "decoding")
    assert has_room(flights)
    [second] = begun(flights, 1)
    second.denoise.set()
    reach(second, "denoised")
    assert not has_room(flights)  # two are in flight, though nobody is in the transformer
    first.decode.set()
    reach(second, "decoding")
    assert has_room(flights)
    second.decode.set()
    flights.wait_for_all()
    assert (first.stage, second.stage) == ("over", "over")


def test_without_overlap_one_job_is_over_before_the_next_begins():
    flights = Flights()
    [job] = begun(flights, 1)
    job.denoise.set()
    reach(job, "decoding")
    assert not has_room(flights)
    job.decode.set()
    flights.wait_for_room()
    assert job.stage == "over"


def test_a_batch_is_denoised_abreast_and_decoded_one_by_one():
    flights = Flights(2, overlap=True)
    first, second = begun(flights, 2)
    assert not has_room(flights)
    second.denoise.set()
    reach(second, "denoised")
    assert has_room(flights)
    first.denoise.set()
    reach(first, "decoding")
    assert second.stage == "denoised"
    first.decode.set(), second.decode.set()
    flights.wait_for_all()


def test_each_ends_by_what_it_was_told():
    flights = Flights(2, overlap=True)
    first, second = begun(flights, 2)
    assert flights.stop("1")
    reach(second, "over")
    assert isinstance(second.raised, Cancelled)
    assert not flights.stop("1")
    assert flights.interrupt()
    flights.wait_for_all()
    assert isinstance(first.raised, Interrupted)
    assert not flights.interrupt()


def test_a_job_that_waits_for_the_decoder_hears_of_it_too():
    flights = Flights(2, overlap=True)
    first, second = begun(flights, 2)
    second.denoise.set()
    reach(second, "denoised")
    flights.stop("1")
    reach(second, "over")
    assert isinstance(second.raised, Cancelled)
    assert first.stage == "denoising"
    flights.interrupt()
    flights.wait_for_all()


def test_a_job_that_breaks_leaves_its_place(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    flights = Flights(overlap=True)

    def broken() -> None:
        raise SystemExit

    flights.begin("0", broken)
    flights.wait_for_all()
    monkeypatch.setattr(threading.Thread, "start", lambda _: (_ for _ in ()).throw(RuntimeError("no more threads")))
    with pytest.raises(RuntimeError):
        flights.begin("1", broken)
    flights.wait_for_room()


def test_a_deadline_is_that_of_its_own_job():
    flights = Flights(2)
    late, other = Job(), Job()

    def limited() -> None:
        with Deadline(0.2, JobTimeoutException):
            late()

    began = time.monotonic()
    flights.begin("0", limited)
    flights.begin("1", other)
    reach(late, "over")
    assert isinstance(late.raised, JobTimeoutException)
    assert time.monotonic() - began < 2
    assert other.stage == "denoising"
    other.denoise.set(), other.decode.set()
    flights.wait_for_all()
    assert other.raised is None


def test_minus_one_is_no_deadline():
    with Deadline(-1, JobTimeoutException):
        current().check()


def test_a_job_is_alone_when_those_before_it_are_over_and_those_after_it_wait():
    flights = Flights(2, overlap=True)
    first, second = begun(flights, 2)
    first.denoise.set()
    reach(first, "decoding")
    third = begun(flights, 1)[0]
    one, two, three = flights._flights
    assert not flights.is_alone(two)  # the first is not over
    one.wait_alone(lambda: setattr(three, "is_denoising", False) or setattr(two, "is_waiting", True))
    assert one.is_denoising and not one.is_waiting
    assert not has_room(flights)  # nobody begins beside it
    for job in (first, second, third):
        job.denoise.set(), job.decode.set()
    flights.wait_for_all()


def test_two_that_want_to_be_alone_do_not_wait_for_each_other():
    flights = Flights(2)
    alone: list[str] = []

    def wait_alone(name: str) -> None:
        both.wait()
        current().wait_alone(lambda: None)
        alone.append(name)

    both = threading.Barrier(2)
    for name in "ab":
        flights.begin(name, lambda name=name: wait_alone(name))
    flights.wait_for_all()
    assert alone == ["a", "b"]


def test_a_job_is_overdue_long_after_its_limit_and_not_after_the_clients():
    flights = Flights()
    [job] = begun(flights, 1)
    flight = flights._flights[0]
    flight.deadline = time.monotonic() - 100  # X-Deadline: it ends at its next step, however long that takes
    assert not flights.is_overdue(50)
    flight.limit = time.monotonic() - 100
    assert flights.is_overdue(50)
    assert not flights.is_overdue(150)
    flight.limit = flight.deadline = time.monotonic() + 100
    job.denoise.set(), job.decode.set()
    flights.wait_for_all()
