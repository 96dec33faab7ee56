"""The service is killed while it takes a job; Redis is killed under service and workers."""

import socket
import threading

import httpx
import pytest

from tests.chaos.stack import PATIENCE_S, chaos_in
from tests.stack import wait_for
from worker.contract import Record, Status, record_key

pytestmark = pytest.mark.chaos

UPKEEP_S = 30 + 25 + 10
"""A service looks for lost jobs every 30 s, unless another has within 25 s; a job is lost when it is 10 s old."""
KEY = {"Idempotency-Key": "one"}


@pytest.fixture
def held(tmp_path, picture):
    """A service that can be stopped where it takes a job."""
    with chaos_in(tmp_path, picture) as made:
        made.start_service("tests.chaos.service", str(made.gates))
        yield made


def send(chaos, seed: int) -> threading.Thread:
    """Ask for a video, and do not wait for the answer, which will not come."""

    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            chaos.post(seed, KEY)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def ids(chaos) -> list[str]:
    return chaos.redis.zrange(Record.index_key, 0, -1)


def test_a_service_killed_half_way_through_an_upload_leaves_nothing(chaos):
    with socket.create_connection(("127.0.0.1", chaos.stack.port)) as connection:
        head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        part = '--x\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        connection.sendall(f"{head}Content-Length: 100000\r\n\r\n{part}".encode() + bytes(50_000))
        before = len(ids(chaos))
        chaos.kill_program("service")
        chaos.start_service()
    assert len(ids(chaos)) == before
    assert chaos.is_idle()
    assert not list((chaos.stack.storage / "inputs").glob("*"))


def killed_before_it_is_enqueued(held) -> str:
    """A job whose service has written its record and dies."""
    held.hold("recorded", "any")
    thread = send(held, 1)
    held.reach("recorded", "any")
    (job,) = ids(held)
    held.kill_program("tests.chaos.service")
    thread.join()
    return job


def test_a_request_sent_again_after_the_service_was_killed_is_the_same_job(held):
    job = killed_before_it_is_enqueued(held)
    held.release("recorded", "any")
    held.start_service()
    assert held.post(1, KEY).json()["id"] == job
    assert ids(held) == [job]
    assert held.record(job).status is Status.QUEUED


@pytest.mark.slow
def test_a_job_that_a_killed_service_has_not_enqueued_is_made(held):
    job = killed_before_it_is_enqueued(held)
    held.start_service()
    held.start_worker()
    (record,) = held.succeeded(job, seconds=2 * UPKEEP_S)
    assert record.attempt == 1
    held.wait_idle()


@pytest.mark.slow
def test_a_place_that_a_killed_service_has_reserved_is_free_again(held):
    """Nothing was promised, so the request may be sent again; at the latest when its reservation is over."""
    held.hold("written", "any")
    thread = send(held, 1)
    held.reach("written", "any")
    held.kill_program("tests.chaos.service")
    thread.join()
    assert not ids(held)
    held.start_service()
    held.start_worker()
    answers = []

    def taken() -> bool:
        answers.append(held.post(1, KEY))
        return answers[-1].status_code == 202

    wait_for(taken, 90 + PATIENCE_S, "the request to be taken")
    assert {answer.json()["error"]["code"] for answer in answers[:-1]} <= {"in_flight"}
    held.succeeded(answers[-1].json()["id"])
    held.wait_idle()


@pytest.mark.slow
def test_a_service_killed_at_any_moment_loses_and_doubles_no_request(tmp_path, picture):
    """Thirty times, whatever it was doing just then; each request is sent until it is answered."""
    with chaos_in(tmp_path, picture) as chaos:
        chaos.start_service()
        chaos.start_worker("--seconds", "0.05")
        taken: dict[str, str] = {}
        done = threading.Event()

        def ask(number: int) -> None:
            seed = 1000 * number
            while not done.is_set():
                seed += 1
                key = {"Idempotency-Key": str(seed)}
                while not done.is_set():
                    try:
                        response = chaos.post(seed, key)
                    except httpx.TransportError:
                        continue
                    if response.status_code == 202:
                        taken[str(seed)] = response.json()["id"]
                        break
                    assert response.status_code in (409, 503), response.text

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 4)]
        for thread in threads:
            thread.start()
        for number in range(30):
            threading.Event().wait(0.05 + 0.013 * number)
            chaos.kill_program("service")
            chaos.start_service()
        done.set()
        for thread in threads:
            thread.join()
        assert len(taken) > 30
        assert len(set(taken.values())) == len(taken)
        chaos.succeeded(*taken.values(), seconds=2 * UPKEEP_S)
        # Nothing else was made of any request: each seed has one job.
        seeds = [chaos.redis.hget(record_key(job), "seed") for job in ids(chaos)]
        assert len(seeds) == len(set(seeds))


def test_a_redis_that_is_killed_and_comes_back_loses_nothing(chaos):
    working = chaos.start_worker()
    chaos.hold("denoising", 1)
    jobs = [chaos.submit(seed) for seed in range(1, 6)]
    chaos.reach("denoising", 1)
    before = [chaos.record(job) for job in jobs]
    chaos.stack.redis.process.kill()
    chaos.stack.redis.process.wait()
    answer = chaos.post(9)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert chaos.http.get("/livez").status_code == 200
    chaos.stack.redis.start()
    assert [chaos.record(job) for job in jobs] == before
    chaos.release("denoising", 1)
    records = chaos.succeeded(*jobs)
    assert [(record.worker, record.attempt) for record in records] == [(working, 1)] * 5
    ends = [record.finished_at for record in records]
    assert ends == sorted(ends)
    chaos.wait_idle()
    chaos.succeeded(chaos.submit(9))
