"""`/readyz` against a real Redis into which workers have written their heartbeats."""

from types import SimpleNamespace

import pytest
from fastapi import Response

from service.routes.health import ready
from service.settings import Settings
from worker.contract import WORKERS_KEY, Heartbeat, WorkerState, worker_key
from worker.records import connect, now
from worker.storage import Storage


@pytest.fixture
def redis(redis_server):
    client = connect(redis_server.url, patience=1)
    client.flushdb()
    yield client
    client.close()


@pytest.fixture
def beat(redis):
    """``beat(name, state)``: such a worker says that it is there."""

    def write(name: str, state: WorkerState, **known: str) -> None:
        heartbeat = Heartbeat(
            **{"name": name, "state": state, "model": "m", "model_sha256": "", "engine": "eager-cuda", **known},
            started_at=now(),
            seen_at=now(),
        )
        redis.set(worker_key(name), heartbeat.model_dump_json(exclude_unset=True))
        redis.sadd(WORKERS_KEY, name)

    return write


@pytest.fixture
def ask(redis, tmp_path):
    """``ask()``: the status code and the answer."""

    def call(**settings):
        context = SimpleNamespace(
            redis=redis, storage=Storage(str(tmp_path)), settings=Settings(**{"min_free_bytes": 0, **settings})
        )
        response = Response()
        answer = ready(context, response)
        return response.status_code, answer.model_dump()

    return call


def test_each_worker_that_takes_jobs_says_what_runs_its_model_and_why(beat, ask):
    beat("a", WorkerState.BUSY, engine_reason="trt: no TensorRT here")
    beat("b", WorkerState.READY)  # of a release that gave no reasons
    beat("c", WorkerState.STOPPING)
    code, answer = ask()
    worker = {"model": "m", "engine": "eager-cuda"}
    assert (code, answer["status"], answer["causes"]) == (200, "ready", [])
    assert answer["workers"] == [
        {"name": "a", **worker, "engine_reason": "trt: no TensorRT here"},
        {"name": "b", **worker, "engine_reason": None},
    ]


def test_without_a_worker_that_takes_jobs_it_says_how_many_load(beat, ask):
    assert ask() == (503, {"status": "not ready", "causes": ["no worker is running"], "workers": []})
    beat("a", WorkerState.LOADING)
    assert ask()[1]["causes"] == ["no worker is ready (1 loading its model)"]


def test_a_full_disk_is_a_cause_beside_a_ready_worker(beat, ask):
    beat("a", WorkerState.READY)
    code, answer = ask(min_free_bytes=2**60)
    assert code == 503
    [cause] = answer["causes"]
    assert cause.endswith("MiB of disk are free")
    assert [worker["name"] for worker in answer["workers"]] == ["a"]
