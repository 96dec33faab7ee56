"""Counters that all processes share, and what `/metrics` makes of them. Real Redis."""

import asyncio
import logging
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer
from rq.suspension import suspend
from starlette.concurrency import run_in_threadpool

from service import errors
from service.auth import Authenticator, Keys, new_key
from service.ids import new_id
from service.middleware import RequestId
from service.routes.metrics import HttpMetrics, keep_flushing, keep_timing, router
from service.settings import Settings
from tests.stack import ROOT, free_port, new_record
from worker.contract import (
    COURIER_KEY,
    METRICS_KEY,
    QUEUE,
    RELEASE_KEY,
    SLOTS_TOTAL_KEY,
    WEBHOOKS_DEAD_KEY,
    WEBHOOKS_DUE_KEY,
    WORKERS_KEY,
    Canary,
    Distillation,
    Heartbeat,
    Phase,
    Record,
    Staging,
    Status,
    WorkerState,
    worker_key,
)
from worker.metrics import (
    METRICS,
    Metrics,
    Series,
    complete,
    observe_cancel,
    observe_start,
    observe_success,
    parse,
    read,
)
from worker.records import Records, connect, connect_async, now
from worker.storage import Storage

# --- the shared hash -------------------------------------------------------------------------------------------------


def test_what_two_processes_count_adds_up(records):
    for amount in (1, 2.5):
        process = Metrics()
        process.count("webhook_deliveries_total", amount, result="delivered")
        process.observe("phase_seconds", amount, phase="decoding")
        process.flush(records.redis)
        process.flush(records.redis)  # what has been said is not said again
    found = read(records.redis)
    assert found["webhook_deliveries_total"] == [Series(("delivered",), 3.5)]
    [phase] = found["phase_seconds"]
    assert (phase.labels, phase.value, phase.buckets[-1]) == (("decoding",), 3.5, ("+Inf", 2.0))


def test_a_job_that_ends_is_counted_where_its_record_changes(records, record):
    running = records.change(record, (Status.QUEUED,), status=Status.RUNNING, attempt=1)
    records.change(running, (Status.RUNNING,), status=Status.SUCCEEDED)
    assert read(records.redis)["jobs_total"] == [Series(("shapes-4step", "succeeded"), 1.0)]


def test_a_job_that_fails_is_counted_by_the_code_of_its_error(records, record):
    ended = {"status": Status.FAILED, "error_code": "timed_out", "error_message": "..."}
    records.change(record, (Status.QUEUED,), **ended)
    distillation = Distillation(
        id=new_id("dist"), status=Status.QUEUED, recipe="shapes", preset="quick", created_at=now()
    )
    distillations = Records(records.redis, Distillation)
    distillations.create(distillation)
    distillations.change(distillation, (Status.QUEUED,), **ended | {"error_code": "run_crashed"})
    found = read(records.redis)
    assert found["generation_failures_total"] == [Series(("timed_out",), 1.0)]
    assert found["distillation_failures_total"] == [Series(("run_crashed",), 1.0)]


def test_what_may_yet_happen_is_there_with_0():
    found = {"jobs_total": [Series(("m", "failed"), 2.0)], "redis_ok": [Series(("noeviction",), 1.0)]}
    whole = complete(found)
    assert set(whole) == set(METRICS)
    assert sorted((one.labels, one.value) for one in whole["jobs_total"]) == [
        (("m", "cancelled"), 0.0),
        (("m", "expired"), 0.0),
        (("m", "failed"), 2.0),
        (("m", "succeeded"), 0.0),
    ]
    assert whole["worker_starts_total"] == [Series((), 0.0)]
    assert [one.buckets[-1] for one in whole["queue_wait_seconds"]] == [("+Inf", 0.0)]
    assert {one.labels for one in whole["eta_error_seconds"]} == {("early",), ("late",)}
    # Nobody knows which models there are before they are named, and what was not looked up is not 0.
    assert whole["job_seconds"] == whole["http_requests_total"] == whole["queue_depth"] == []
    assert whole["redis_ok"] == [Series(("noeviction",), 1.0)]


def test_a_bucket_holds_what_is_not_above_its_bound(records):
    metrics = Metrics()
    for value in (0.25, 0.26, 1800.0, 4000.0):
        metrics.observe("queue_wait_seconds", value)
    metrics.flush(records.redis)
    [series] = read(records.redis)["queue_wait_seconds"]
    buckets = dict(series.buckets)
    assert (buckets["0.1"], buckets["0.25"], buckets["0.5"], buckets["1800.0"], buckets["+Inf"]) == (0, 1, 2, 3, 4)
    assert list(buckets.values()) == sorted(buckets.values())


def test_fields_of_other_versions_are_left_out():
    values = {
        "jobs_total|model=a=b|status=failed": "2",
        "jobs_total|model=a": "1",
        "jobs_total": "1",
        "queue_wait_seconds": "1",
        "forgotten_total|a=b": "1",
        "queue_depth|queue=gpu": "1",
    }
    assert parse(values) == {"jobs_total": [Series(("a=b", "failed"), 2.0)]}


def test_a_label_cannot_become_two():
    with pytest.raises(AssertionError):
        Metrics().count("webhook_deliveries_total", result="x", job="y")
    with pytest.raises(KeyError):
        Metrics().count("no_such_total")


def test_threads_lose_nothing(records):
    metrics = Metrics()

    def count(_number: int) -> None:
        for _ in range(500):
            metrics.count("requeues_total", cause="lost|again")
            metrics.flush(records.redis) if _ % 100 == 0 else None

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    metrics.flush(records.redis)
    assert read(records.redis)["requeues_total"] == [Series(("lost_again",), 2000.0)]


def test_where_redis_does_not_answer_counts_are_kept_and_nobody_is_bothered(records, caplog):
    metrics = Metrics()
    metrics.count("requeues_total", cause="lost")
    nowhere = connect(f"redis://127.0.0.1:{free_port()}/0", patience=0)
    metrics.flush(nowhere)
    nowhere.close()
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    metrics.count("requeues_total", cause="lost")
    metrics.flush(records.redis)
    assert read(records.redis)["requeues_total"] == [Series(("lost",), 2.0)]


def test_counts_reach_redis_when_the_service_ends(records):
    async def serve_and_end() -> None:
        metrics = Metrics()
        task = asyncio.create_task(keep_flushing(metrics, records.redis))
        await asyncio.sleep(0)
        metrics.count("requeues_total", cause="lost")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(serve_and_end())
    assert read(records.redis)["requeues_total"] == [Series(("lost",), 1.0)]


def test_a_service_finds_out_how_late_its_loop_is_and_how_long_calls_wait_for_a_thread(records, monkeypatch):
    monkeypatch.setattr("service.routes.metrics._LOOK_S", 0.05)
    metrics = Metrics()

    async def hold_up() -> None:
        current_default_thread_limiter().total_tokens = 1  # of this loop
        task = asyncio.create_task(keep_timing(metrics))
        holder = asyncio.create_task(run_in_threadpool(time.sleep, 0.6))
        await asyncio.sleep(0.01)
        time.sleep(0.3)  # the loop stands when it should look, and its only thread is taken
        await holder
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(hold_up())
    metrics.flush(records.redis)
    [lag], [wait] = (read(records.redis)[name] for name in ("event_loop_lag_seconds", "thread_wait_seconds"))
    assert lag.value >= 0.2
    assert wait.value >= 0.2


# --- what a job tells ------------------------------------------------------------------------------------------------


def test_a_success_tells_its_wait_its_phases_its_whole_and_how_wrong_we_were(records):
    started = now()
    record = new_record().model_copy(
        update={"created_at": started - 3, "started_at": started, "attempt": 1, "expected_at": started + 10}
    )
    metrics = Metrics()
    observe_start(metrics, record)
    observe_start(metrics, record.model_copy(update={"attempt": 2}))  # its wait is over already
    observe_success(metrics, record, {Phase.ENCODING: 0.5, Phase.DENOISING: 2.0}, started + 4)
    metrics.flush(records.redis)
    found = read(records.redis)
    sums = {name: {one.labels: round(one.value, 3) for one in series} for name, series in found.items()}
    assert sums == {
        "queue_wait_seconds": {(): 3.0},
        "phase_seconds": {("encoding",): 0.5, ("denoising",): 2.0},
        "job_seconds": {("shapes-4step",): 4.0},
        "eta_error_seconds": {("early",): 6.0},
    }
    assert all(one.buckets[-1] == ("+Inf", 1.0) for series in found.values() for one in series)


def test_a_cancel_is_timed_from_the_first_time_it_was_asked_for(records, record):
    running = records.change(record, (Status.QUEUED,), status=Status.RUNNING, attempt=1)
    for _ in range(2):
        records.change(running, (Status.RUNNING, Status.CANCELLING), status=Status.CANCELLING)
    records.change(running, (Status.CANCELLING,), status=Status.CANCELLED)
    metrics = Metrics()
    observe_cancel(metrics, records.redis, record.id)
    metrics.flush(records.redis)
    [series] = read(records.redis)["cancel_latency_seconds"]
    assert series.buckets[-1] == ("+Inf", 1.0)
    assert 0 <= series.value < 60


def test_a_cancel_that_nobody_asked_for_is_not_timed(records, record):
    records.change(record, (Status.QUEUED,), status=Status.CANCELLED)
    metrics = Metrics()
    observe_cancel(metrics, records.redis, record.id)
    metrics.flush(records.redis)
    assert "cancel_latency_seconds" not in read(records.redis)


# --- `/metrics` and the layer around requests ------------------------------------------------------------------------


@pytest.fixture
def call(records, redis_server, tmp_path):
    """``call(requests, **settings)``: an app with a few routes answers ``(method, path, headers)`` one by one."""

    def ask(*requests: tuple, **settings) -> list[httpx.Response]:
        return asyncio.run(_answers(records, redis_server.url, tmp_path, requests, Settings(**settings)))

    return ask


async def _answers(records, url, folder, requests, settings) -> list[httpx.Response]:
    redis = connect_async(url)
    app = FastAPI()
    errors.install(app)
    app.include_router(router)
    app.mount("/web", StaticFiles(directory=ROOT / "service" / "web"))

    @app.get("/generate/{job_id}")
    async def read_one(job_id: str) -> str:
        return job_id

    @app.get("/stream")
    async def stream(request: Request) -> StreamingResponse:
        async def events():
            yield f"data: {request.app.state.metrics.gauges['sse_streams']:.0f}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream; charset=utf-8")

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    app.state.metrics = Metrics()
    app.state.context = SimpleNamespace(
        redis=records.redis,
        storage=Storage(str(folder)),
        settings=settings,
        authenticator=Authenticator(settings, redis),
    )
    app.add_middleware(RequestId)
    app.add_middleware(HttpMetrics, metrics=app.state.metrics)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        answers = [await client.request(method, path, headers=headers) for method, path, headers in requests]
    await redis.aclose()
    return answers


def samples(text: str) -> dict[str, float]:
    """By name and labels, as the text has them."""
    return {
        f"{one.name}{{{','.join(f'{k}={v}' for k, v in sorted(one.labels.items()))}}}": one.value
        for family in parse_text(text)
        for one in family.samples
    }


def test_gauges_are_looked_up_when_asked_for(records, call):
    records.create(new_record())
    redis = records.redis
    redis.set(SLOTS_TOTAL_KEY, 2500)
    redis.zadd(WEBHOOKS_DUE_KEY, {"vid_a": 1, "vid_b": 2})
    redis.zadd(WEBHOOKS_DEAD_KEY, {"vid_c": 1})
    redis.set(COURIER_KEY, 1)
    redis.hset(RELEASE_KEY, "number", 7)
    for name, state in (("a", WorkerState.READY), ("b", WorkerState.READY), ("c", WorkerState.BUSY)):
        beat = Heartbeat(
            name=name,
            state=state,
            model="m",
            model_sha256="",
            models=("m@000000000000", "old@000000000001"),
            engine="trt",
            gpu_mem_bytes=2**30,
            release=Staging(wanted="0", state="failed" if name == "a" else "loaded"),
            canary=Canary(at=1, ok=True, seconds=3.0 if name == "a" else 1.0, first_seconds=2.0),
            started_at=1,
            seen_at=1,
        )
        redis.set(worker_key(name), beat.model_dump_json())
        redis.sadd(WORKERS_KEY, name)
    suspend(redis)
    [answer] = call(("GET", "/metrics", {}))
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    expected = {
        "flg_queue_depth{queue=gpu}": 1,
        "flg_queue_depth{queue=train}": 0,
        "flg_oldest_queued_seconds{queue=train}": 0,
        "flg_backlog_seconds{}": 2.5,
        "flg_webhooks_due{}": 2,
        "flg_webhooks_dead{}": 1,
        "flg_worker_up{state=ready}": 2,
        "flg_worker_up{state=busy}": 1,
        "flg_worker_up{state=loading}": 0,
        "flg_worker_model{model=m@000000000000}": 3,
        "flg_worker_release{state=failed}": 1,
        "flg_worker_release{state=loaded}": 2,
        "flg_worker_release{state=staging}": 0,
        "flg_canary_slowdown_ratio{}": 1.5,
        "flg_gpu_mem_bytes{engine=trt}": 3 * 2**30,
        "flg_release_number{}": 7,
        "flg_courier_up{}": 1,
        "flg_queue_paused{}": 1,
        "flg_sse_streams{}": 0,
    }
    assert {name: found[name] for name in expected} == expected
    assert 0 <= found["flg_oldest_queued_seconds{queue=gpu}"] < 60
    assert found["flg_disk_free_bytes{}"] > 0
    assert found["flg_webhooks_late_seconds{}"] > 10**9  # the first was due at second 1


def test_redis_says_how_it_is_where_our_user_may_ask(records, call):
    found = samples(call(("GET", "/metrics", {}))[0].text)
    checks = ("aof_enabled", "aof_rewrite", "aof_write", "noeviction")
    assert {name: found[f"flg_redis_ok{{check={name}}}"] for name in checks} == dict.fromkeys(checks, 1)
    assert 0 < found["flg_redis_memory_bytes{}"] < found["flg_redis_memory_limit_bytes{}"]
    assert found["flg_redis_clients{}"] >= 1 and found["flg_redis_call_seconds{}"] > 0
    records.redis.config_set("maxmemory-policy", "allkeys-lru")
    records.redis.config_set("maxmemory", 2**30)
    try:
        found = samples(call(("GET", "/metrics", {}))[0].text)
    finally:
        records.redis.config_set("maxmemory-policy", "noeviction")
        records.redis.config_set("maxmemory", 0)
    assert (found["flg_redis_ok{check=noeviction}"], found["flg_redis_memory_limit_bytes{}"]) == (0, 2**30)


def test_where_our_user_may_not_ask_redis_the_rest_is_there(records, redis_server, tmp_path):
    records.redis.execute_command("ACL", "SETUSER", "blind", "on", "nopass", "~*", "&*", "+@all", "-info")
    url = redis_server.url.replace(f":{redis_server.password}@", "blind:x@")
    blind = connect(url)
    try:
        [answer] = asyncio.run(_answers(Records(blind, Record), url, tmp_path, [("GET", "/metrics", {})], Settings()))
    finally:
        blind.close()
        records.redis.execute_command("ACL", "DELUSER", "blind")
    assert answer.status_code == 200
    found = samples(answer.text)
    assert found["flg_redis_call_seconds{}"] > 0 and "flg_queue_depth{queue=gpu}" in found
    assert not [name for name in found if name.startswith(("flg_redis_ok", "flg_redis_memory"))]


def test_whoever_had_rq_exporter_finds_its_names(records, redis_server, call):
    binary = connect(redis_server.url, text=False)
    queue = Queue(QUEUE, connection=binary, serializer=JSONSerializer)
    queue.enqueue("worker.jobs.generate", "vid_x")
    workers = [SimpleWorker([queue], connection=binary, name=name, serializer=JSONSerializer) for name in "ab"]
    for worker in workers:
        worker.register_birth()
    workers[0].set_state("busy")
    workers[1].set_state("idle")
    records.redis.sadd("rq:workers", "rq:worker:gone")
    found = samples(call(("GET", "/metrics", {}))[0].text)
    assert {name: value for name, value in found.items() if name.startswith("rq_") and value} == {
        "rq_jobs{queue=gpu,status=queued}": 1,
        "rq_workers{queues=gpu,state=busy}": 1,
        "rq_workers{queues=gpu,state=idle}": 1,
    }
    assert found["rq_jobs{queue=train,status=failed}"] == 0
    binary.close()


def test_counters_and_histograms_come_as_prometheus_wants_them(records, record, call):
    records.change(record, (Status.QUEUED,), status=Status.CANCELLED)
    metrics = Metrics()
    metrics.observe("phase_seconds", 0.3, phase="denoising")
    metrics.flush(records.redis)
    plain, open_metrics = call(
        ("GET", "/metrics", {}), ("GET", "/metrics", {"accept": "application/openmetrics-text; version=1.0.0"})
    )
    found = samples(plain.text)
    assert found["flg_jobs_total{model=shapes-4step,status=cancelled}"] == 1
    assert found["flg_phase_seconds_bucket{le=0.25,phase=denoising}"] == 0
    assert found["flg_phase_seconds_bucket{le=0.5,phase=denoising}"] == 1
    assert found["flg_phase_seconds_count{phase=denoising}"] == 1
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name for family in parse_openmetrics(open_metrics.text)}
    assert families == {metric.exposed.removesuffix("_total") for metric in METRICS.values()}
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "metrics"], input=plain.content, check=True, timeout=20)


def test_metrics_need_a_key_with_their_scope(records, call):
    keys, texts = Keys(records.redis), [new_key(), new_key()]
    keys.add(texts[0], "prometheus", ("metrics",))
    keys.add(texts[1], "app", ("generate", "read"))
    headers = [{}, *({"Authorization": f"Bearer {text}"} for text in texts)]
    answers = call(*(("GET", "/metrics", one) for one in headers), auth="on")
    assert [answer.status_code for answer in answers] == [401, 200, 403]


def test_requests_are_counted_by_pattern_never_by_path(call, records):
    call(
        ("GET", "/generate/vid_1?sig=secret", {}),
        ("GET", "/generate/vid_2", {}),
        ("POST", "/generate/vid_2", {}),
        ("GET", "/nowhere/at/all", {}),
        ("BREW", "/web/nothing.js", {}),
        ("GET", "/broken", {}),
        ("GET", "/metrics", {}),
    )
    counted = {series.labels: series.value for series in read(records.redis)["http_requests_total"]}
    assert counted == {
        ("GET", "/generate/{job_id}", "200"): 2,
        ("POST", "/generate/{job_id}", "405"): 1,
        ("GET", "unmatched", "404"): 1,
        ("other", "/web/{path}", "405"): 1,
        ("GET", "/broken", "500"): 1,
    }
    fields = " ".join(records.redis.hkeys(METRICS_KEY))
    assert not re.search(r"vid_|secret|nowhere|nothing", fields)


def test_each_request_has_a_line_without_its_query(call, caplog):
    caplog.set_level(logging.INFO, "service.access")
    call(
        ("GET", "/generate/a%0Ab?sig=secret", {"x-request-id": "mine"}),
        ("GET", "/metrics?sig=secret", {}),
        ("GET", "/broken", {"x-request-id": "other"}),
    )
    lines = [entry for entry in caplog.records if entry.name == "service.access"]
    assert [re.sub(r"[\d.]+ ms", "N ms", line.getMessage()) for line in lines] == [
        "GET /generate/a%0Ab 200 N ms mine",
        "GET /broken 500 N ms other",
    ]
    assert (lines[0].method, lines[0].status, lines[0].request_id) == ("GET", 200, "mine")
    assert lines[0].ms >= 0
    assert "secret" not in caplog.text


def test_an_event_stream_is_counted_while_it_lasts(call):
    during, after = call(("GET", "/stream", {}), ("GET", "/metrics", {}))
    assert during.text == "data: 1\n\n"
    assert samples(after.text)["flg_sse_streams{}"] == 0


def test_without_redis_metrics_are_unavailable(redis_server, tmp_path):
    nowhere = connect(f"redis://127.0.0.1:{free_port()}/0", patience=0)
    down = SimpleNamespace(redis=nowhere)
    [answer] = asyncio.run(_answers(down, redis_server.url, tmp_path, [("GET", "/metrics", {})], Settings()))
    nowhere.close()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
