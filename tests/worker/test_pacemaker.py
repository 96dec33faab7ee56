"""Leases while a worker cannot renew them: its global lock is held, it is stopped, it hangs, it is dead."""

import os
import signal
import time
from pathlib import Path

import pytest

from service.auth import Principal
from service.jobs import Ask, JobStore
from service.schema import GenerateFields
from service.settings import Settings
from tests.stack import Stack, stop, wait_for
from worker.contract import LOCAL, Status
from worker.gpu_worker import LOST
from worker.records import connect, ready_workers, workers
from worker.storage import Storage

LEASE_S = 2


class Two:
    """Redis and two workers, one of which will hold its lock."""

    def __init__(self, folder: Path) -> None:
        self.stack = Stack(folder, LEASE_S=str(LEASE_S))
        self.stack.redis.start()
        self.redis = connect(self.stack.redis.url)
        settings = Settings(redis_url=self.stack.redis.url, min_free_bytes=0, job_timeout_s=10)
        storage = Storage(str(self.stack.storage))
        self.store = JobStore(settings, self.redis, connect(self.stack.redis.url, text=False), storage)
        self.folder = folder
        self.processes = {}

    def start(self, pacemaker: str, hang_s: int = 0) -> None:
        self.stack.environment["HANG_S"] = str(hang_s)
        for number in (1, 2):
            process = self.stack.spawn("tests.worker.gil_worker", str(self.folder), pacemaker)
            self.processes[process.pid] = process
            wait_for(lambda number=number: len(ready_workers(self.redis)) == number, 20, self.log())

    def hold(self, seconds: int, image: Path, order: str = "hold"):
        """Have a job hold the lock of its worker; the record as it has begun, and its worker's process."""
        (self.folder / order).write_text(str(seconds))
        ask = Ask(GenerateFields(prompt="x", seed=1), source_sha256="")
        record, _ = self.store.submit(Principal(LOCAL, frozenset()), ask, image.read_bytes())
        wait_for((self.folder / "held-by").exists, 20, self.log())
        wait_for(lambda: (self.folder / "held-by").read_text(), 1, "its number")
        return self.store.get(record.id), self.processes[int((self.folder / "held-by").read_text())]

    def ended(self, record, seconds: float = 20):
        wait_for(lambda: self.store.get(record.id).status is Status.SUCCEEDED, seconds, f"the video:\n{self.log()}")
        return self.store.get(record.id)

    def log(self) -> str:
        return self.stack.log("tests.worker.gil_worker")

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            stop(process, 10)
        self.stack.redis.stop()


@pytest.fixture
def two(tmp_path):
    made = Two(tmp_path)
    yield made
    made.stop()


def children(pid: int) -> list[int]:
    """Of any of its threads."""
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def test_without_it_a_held_lock_loses_the_job(two, example_image):
    """What the pacemaker is for, so that the tests below cannot pass for another reason."""
    two.start("without")
    record, _ = two.hold(4 * LEASE_S, example_image)
    after = two.ended(record)
    assert (after.attempt, after.worker == record.worker) == (2, False)


def test_with_it_the_job_stays_where_it_is(two, example_image):
    two.start("with")
    record, _ = two.hold(4 * LEASE_S, example_image)
    deadline = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < deadline:
        assert record.worker in [beat.name for beat in workers(two.redis)]
        assert two.store.get(record.id).attempt == 1
        time.sleep(0.1)
    after = two.ended(record)
    assert (after.attempt, after.worker) == (1, record.worker)
    assert "its leases are renewed here" in two.log()


def test_a_stopped_worker_is_not_kept_alive_and_gives_way(two, example_image):
    two.start("with")
    record, process = two.hold(1, example_image)
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: two.store.get(record.id).attempt == 2, 10 * LEASE_S, "the other worker to take it")
    after = two.ended(record)
    assert after.worker != record.worker
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: len(ready_workers(two.redis)) == 2, 10, "the first worker to be back")
    wait_for(lambda: "gave way" in two.log(), 10, f"the late one to give way:\n{two.log()}")
    assert two.store.get(record.id) == after


def test_a_worker_that_hangs_is_killed(two, example_image):
    two.start("with", hang_s=4)
    record, process = two.hold(60, example_image)
    assert process.wait(20) == -signal.SIGKILL
    after = two.ended(record)
    assert (after.attempt, after.worker == record.worker) == (2, False)


def test_a_job_that_never_comes_back_ends_its_worker(two, example_image):
    """Its thread stands in C code, and the rest of the worker is well: all but that job could go on for ever."""
    two.start("with", hang_s=4)
    record, process = two.hold(120, example_image, "stick")
    assert process.wait(40) == LOST
    after = two.ended(record)
    assert (after.attempt, after.worker == record.worker) == (2, False)


def test_it_is_started_anew_when_it_dies_and_ends_with_its_worker(two):
    two.start("with")
    process = next(iter(two.processes.values()))
    (first,) = children(process.pid)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: children(process.pid) not in ([], [first]), 10, "another one")
    (second,) = children(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: not Path(f"/proc/{second}").exists(), 10, "the pacemaker to end")
