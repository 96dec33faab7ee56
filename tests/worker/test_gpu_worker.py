"""`GpuWorker` in this process, against a real Redis: what it does between jobs, and when Redis fails it."""

import time

import pytest
from pydantic import ValidationError
from redis.exceptions import ConnectionError
from rq.exceptions import StopRequested

from tests.stack import new_record
from worker import gpu_worker
from worker.contract import GENERATE, QUEUE, Heartbeat, WorkerState
from worker.flights import Flights
from worker.gpu_worker import LOST, GpuWorker, Pulse
from worker.queues import make_queue, unique_name
from worker.records import connect, now, workers
from worker.settings import Settings


class Made:
    """A worker that does not work by itself; ``idle`` is what it does while there is no job."""

    def __init__(self, url: str, redis) -> None:
        self.redis, self.raw = redis, connect(url, text=False)
        state = {"state": WorkerState.LOADING, "started_at": now(), "seen_at": now()}
        self.name = unique_name("worker")
        self.pulse = Pulse(redis, Heartbeat(name=self.name, model="m", model_sha256="", engine="", **state), 60)
        self.idle = lambda _wanted: True
        self.worker = GpuWorker(
            self.raw, self.name, self.pulse, 60, Flights(), idle=lambda wanted: self.idle(wanted), hang_s=60
        )

    def state(self) -> WorkerState:
        self.pulse.beat()
        return next(one.state for one in workers(self.redis) if one.name == self.name)


@pytest.fixture
def made(redis_server, redis):
    one = Made(redis_server.url, redis)
    yield one
    one.pulse.end()
    one.raw.close()


@pytest.mark.parametrize("committed", [True, False])
def test_a_job_that_could_not_be_begun_leaves_nothing_with_the_worker(made, monkeypatch, committed):
    """Also where Redis has done it and the answer was lost: the lease must run out, not be renewed for ever."""
    queue = make_queue(made.raw, QUEUE)
    job = queue.enqueue(GENERATE, new_record().id)
    prepare = made.worker.prepare_execution

    def broken(given):
        execution = prepare(given)
        if not committed:
            with made.raw.pipeline() as pipeline:
                execution.delete(given, pipeline)
                pipeline.execute()
        raise ConnectionError("the answer was lost")

    monkeypatch.setattr(made.worker, "prepare_execution", broken)
    made.worker.execute_job(job, queue)
    assert not made.worker.leases()
    assert made.state() is WorkerState.READY


def test_a_signal_between_two_jobs_is_not_lost(made):
    """rq says it with an exception, which whatever runs in the main thread may catch."""

    def swallows(_wanted) -> bool:
        made.worker._ending = True
        return True

    made.idle = swallows
    with pytest.raises(StopRequested):
        made.worker.run_maintenance_tasks()


def test_a_worker_that_is_not_fit_ends(made):
    made.idle = lambda _wanted: False
    with pytest.raises(StopRequested):
        made.worker.run_maintenance_tasks()
    assert made.state() is WorkerState.STOPPING


def test_while_it_ends_nothing_else_sets_an_alarm(made, monkeypatch):
    monkeypatch.setattr(made.worker, "clean_registries", lambda: pytest.fail("rq's clean-up has an alarm of its own"))
    made.worker._ending = True
    with pytest.raises(StopRequested):
        made.worker.run_maintenance_tasks()


class Exited(Exception):
    pass


def test_what_is_done_while_idle_may_not_hang(made, monkeypatch):
    ended = []

    def stands(wanted) -> bool:
        assert not wanted()
        made.pulse.beat()
        assert not ended
        moment = time.monotonic() + 61
        monkeypatch.setattr(gpu_worker.time, "monotonic", lambda: moment)
        made.pulse.beat()
        monkeypatch.undo()
        return True

    monkeypatch.setattr(gpu_worker.os, "_exit", ended.append)
    made.idle = stands
    made.worker.run_maintenance_tasks()
    assert ended == [LOST]
    made.pulse.beat()  # it has come back: nothing hangs
    assert ended == [LOST]


@pytest.mark.parametrize(
    ("variables", "is_taken"),
    [({"HANG_S": "0"}, True), ({"HANG_S": "60"}, True), ({"HANG_S": "59"}, False), ({"LEASE_S": "400"}, False)],
)
def test_a_worker_that_is_well_is_not_taken_for_one_that_hangs(monkeypatch, variables, is_taken):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if is_taken:
        assert Settings().hang_s == int(variables["HANG_S"])
    else:
        with pytest.raises(ValidationError, match="may be silent for that long"):
            Settings()
