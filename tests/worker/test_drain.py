"""How a worker ends that is told to: what it says at once, what it finishes, what it hands back, and to whom. Real
processes; the model is one that waits (`tests.held_worker`)."""

import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.auth import Principal
from service.jobs import Ask, JobStore
from service.schema import GenerateFields
from service.settings import Settings
from tests.stack import Stack, is_alive, wait_for
from worker.contract import LOCAL, METRICS_KEY, Record, Status, WorkerState
from worker.queues import make_queue
from worker.records import connect, ready_workers, workers
from worker.storage import Storage


class Drained:
    """Redis, and workers that a test leads step by step. Their lease is long, so that no beat comes by chance."""

    def __init__(self, folder, image: bytes) -> None:
        self.stack = Stack(folder, LEASE_S="120", DRAIN_S="60", TMPDIR=str(folder))
        self.stack.redis.start()
        self.redis = connect(self.stack.redis.url)
        queue_redis = connect(self.stack.redis.url, text=False)
        chosen = Settings(redis_url=self.stack.redis.url, min_free_bytes=0)
        self.store = JobStore(chosen, self.redis, queue_redis, Storage(str(self.stack.storage)))
        self.queue = make_queue(queue_redis, "gpu")
        self.gates, self.image = folder / "gates", image
        self.gates.mkdir()

    def start(self, **settings: str):
        """A worker, once it takes jobs."""
        self.stack.environment |= settings
        process = self.stack.spawn("tests.held_worker", str(self.gates), "overlap")
        wait_for(lambda: ready_workers(self.redis), 20, f"the worker:\n{self.said()}")
        return process

    def said(self) -> str:
        return self.stack.log("tests.held_worker")

    def submit(self, seed: int) -> Record:
        ask = Ask(GenerateFields(prompt="x", seed=seed), source_sha256="")
        record, _ = self.store.submit(Principal(LOCAL, frozenset()), ask, self.image)
        return record

    def reach(self, line: str, times: int = 1) -> None:
        log = self.gates / "log"
        wait_for(lambda: log.exists() and log.read_text().count(f"{line}\n") == times, 20, f"{line!r}:\n{self.said()}")

    def go(self, *stages: str) -> None:
        for stage in stages:
            (self.gates / stage).touch()

    def status(self, record: Record) -> Status:
        return self.store.get(record.id).status

    def succeeded(self, *records: Record) -> None:
        self.go(*(f"{stage}-{record.seed}" for record in records for stage in ("denoise", "decode")))
        for record in records:
            wait_for(lambda r=record: self.status(r) is Status.SUCCEEDED, 20, f"{record.seed}:\n{self.said()}")


@pytest.fixture
def drained(tmp_path, example_image):
    made = Drained(tmp_path, example_image.read_bytes())
    yield made
    made.stack.stop()


def test_a_worker_that_is_told_to_end_says_so_at_once_and_finishes_what_it_has(drained):
    worker = drained.start()
    job = drained.submit(1)
    drained.reach("denoise 1 begins")
    worker.send_signal(signal.SIGTERM)
    # Well before the next beat of a lease of two minutes.
    wait_for(lambda: not ready_workers(drained.redis), 5, "it to say that it stops")
    assert [beat.state for beat in workers(drained.redis)] == [WorkerState.STOPPING]
    waiting = drained.submit(2)
    drained.succeeded(job)
    assert worker.wait(20) == 0
    assert (drained.status(waiting), drained.store.get(job.id).attempt) == (Status.QUEUED, 1)
    assert workers(drained.redis) == []


def test_what_has_not_finished_when_the_time_is_over_goes_back_before_all_that_wait(drained):
    worker = drained.start(DRAIN_S="1")
    first = drained.submit(1)
    drained.go("denoise-1")
    drained.reach("decode 1 begins")
    second = drained.submit(2)
    drained.reach("denoise 2 begins")
    third = drained.submit(3)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    assert drained.queue.job_ids == [first.id, second.id, third.id]
    assert drained.queue.started_job_registry.get_job_ids() == []
    assert [drained.store.get(record.id).attempt for record in (first, second, third)] == [0, 0, 0]
    assert not list((drained.stack.storage / "videos").glob("*"))
    drained.start()
    drained.succeeded(first, second, third)
    assert drained.redis.hget(METRICS_KEY, "requeues_total|cause=handed_back") == "2"


def test_no_number_of_restarts_makes_a_job_fail(drained):
    worker = drained.start(DRAIN_S="1")
    job = drained.submit(1)
    for times in (1, 2, 3):
        drained.reach("denoise 1 begins", times)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        assert (drained.status(job), drained.store.get(job.id).attempt) == (Status.QUEUED, 0)
        worker = drained.start()
    drained.succeeded(job)
    assert drained.store.get(job.id).attempt == 1


def test_a_job_that_is_being_cancelled_is_not_handed_back(drained):
    worker = drained.start()
    job = drained.submit(1)
    drained.reach("denoise 1 begins")
    worker.send_signal(signal.SIGSTOP)  # so that it sees both at once
    drained.store.cancel(job.id)
    worker.send_signal(signal.SIGTERM)
    worker.send_signal(signal.SIGCONT)
    assert worker.wait(20) == 0
    assert (drained.status(job), drained.queue.job_ids) == (Status.CANCELLED, [])


# --- the service ------------------------------------------------------------------------------------------------------


def test_a_service_that_is_told_to_end_answers_what_it_has_and_has_clients_come_again(drained):
    drained.start()
    port = drained.stack.port
    service, url = drained.stack.spawn("service"), f"http://127.0.0.1:{port}"
    wait_for(lambda: is_alive(url), 30, f"the service:\n{drained.stack.log('service')}")
    form, waits = {"prompt": "x", "seed": "1"}, {"Prefer": "wait=60"}
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=url, timeout=90) as client:
        answer = pool.submit(client.post, "/generate", data=form, files={"image": drained.image}, headers=waits)
        drained.reach("denoise 1 begins")
        [job_id] = drained.redis.zrange(Record.index_key, 0, -1)
        with client.stream("GET", f"/generate/{job_id}/events") as following:
            lines = following.iter_lines()
            assert "retry: 2000" in [next(lines), next(lines)]
            service.send_signal(signal.SIGTERM)
            assert "event: generation" in list(lines)  # which ends, and is no error
        assert (answer.result().status_code, answer.result().json()["status"]) == (202, "running")
    service.wait(20)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez")
    service = drained.stack.spawn("service")
    wait_for(lambda: is_alive(url), 30, f"the service:\n{drained.stack.log('service')}")
    drained.succeeded(drained.store.get(job_id))
