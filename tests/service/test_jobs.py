"""`JobStore` against a real Redis without a worker: admission, what a crash leaves behind, and the end of keeping."""

import threading
import time

import pytest
from redis.exceptions import ConnectionError
from rq.job import Job
from rq.serializers import JSONSerializer

from distill.data import shapes
from distill.prompt import Prompt
from service.auth import Principal
from service.errors import ApiError
from service.ids import created_at, new_id
from service.jobs import Ask, JobStore
from service.schema import GenerateFields
from service.settings import Settings
from worker.contract import LOCAL, QUEUE, ModelCard, Record, Status, VideoSize, input_path, output_path
from worker.queues import make_queue
from worker.records import Records, connect, now, publish_models
from worker.storage import Storage

PROMPT = "a red circle moves right quickly, static camera"


@pytest.fixture
def redis(redis_server):
    client = connect(redis_server.url)
    client.flushdb()
    card = ModelCard(
        name="m",
        sha256="0" * 64,
        task="ti2v",
        num_inference_steps=4,
        video=VideoSize(width=64, height=64, num_frames=17, fps=8),
        prompt=Prompt(kind="grammar", help="", examples=(PROMPT,), grammar=shapes.GRAMMAR),
    )
    publish_models(client, [card])
    yield client
    client.close()


@pytest.fixture
def queue_redis(redis_server):
    client = connect(redis_server.url, text=False)
    yield client
    client.close()


@pytest.fixture
def make_store(redis, queue_redis, redis_server, tmp_path):
    def make(**settings) -> JobStore:
        chosen = Settings(redis_url=redis_server.url, storage_url=str(tmp_path), **{"min_free_bytes": 0, **settings})
        return JobStore(chosen, redis, queue_redis, Storage(str(tmp_path)))

    return make


@pytest.fixture
def store(make_store):
    return make_store()


@pytest.fixture
def submit(example_image):
    def one(store: JobStore) -> Record:
        ask = Ask(GenerateFields(prompt=PROMPT, seed=1), source_sha256="")
        record, is_new = store.submit(Principal(LOCAL, frozenset()), ask, example_image.read_bytes())
        assert is_new
        return record

    return one


@pytest.fixture
def an_hour_passes(monkeypatch):
    """Call it, and it is an hour later for the upkeep."""

    def pass_by() -> None:
        for module in ("jobs", "store"):
            monkeypatch.setattr(f"service.{module}.now", lambda: time.time() + 3700)
        monkeypatch.setattr(Records, "moment", lambda _records: time.time() + 3700)

    return pass_by


def rq_job(store, record) -> Job:
    return Job.fetch(record.id, connection=store._queue.connection, serializer=JSONSerializer)


def files(tmp_path) -> set[str]:
    return {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}


def test_an_id_tells_its_age():
    assert created_at(new_id("vid")) == pytest.approx(time.time(), abs=2)


# --- admission ------------------------------------------------------------------------------------------------------


def test_no_more_jobs_are_queued_than_may_be_however_many_come_at_once(make_store, submit, tmp_path):
    store = make_store(max_queued=5)
    answers: list[int] = []

    def one() -> None:
        try:
            submit(store)
            answers.append(202)
        except ApiError as error:
            assert (error.code, 1 <= int(error.headers["Retry-After"]) <= 120) == ("queue_full", True)
            answers.append(error.status)

    threads = [threading.Thread(target=one) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [202] * 5 + [503] * 19
    assert store.records.num_queued() == make_queue(store._queue.connection, QUEUE).count == 5
    assert len(files(tmp_path)) == 5
    first, _ = store.page(5, None)
    store.cancel(first[0].id)
    submit(store)  # its place is free again


def test_without_room_on_the_disk_no_job_is_taken(make_store, submit, tmp_path):
    with pytest.raises(ApiError) as caught:
        submit(make_store(min_free_bytes=2**60))
    assert (caught.value.status, caught.value.code) == (507, "disk_full")
    assert files(tmp_path) == set()


def test_when_the_queue_cannot_be_reached_the_job_is_taken_back(store, submit, monkeypatch, tmp_path):
    def gone(*_args, **_kwargs):
        raise ConnectionError("gone")

    monkeypatch.setattr(store._queue, "enqueue", gone)
    with pytest.raises(ConnectionError):
        submit(store)
    assert files(tmp_path) == set()
    assert store.page(10, None) == ([], False)
    assert store.records.num_queued() == 0


def test_when_it_cannot_even_be_taken_back_it_is_made_after_all(store, submit, monkeypatch, an_hour_passes, tmp_path):
    """Redis goes away between record and queue, and stays away: half a job would fail later, without its image."""

    def gone(*_args, **_kwargs):
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store._queue, "enqueue", gone)
        patch.setattr(store.records, "delete", gone)
        with pytest.raises(ConnectionError):
            submit(store)
    [record], _ = store.page(10, None)
    assert files(tmp_path) == {input_path(record.id)}
    an_hour_passes()
    assert store.reconcile() == 1
    assert rq_job(store, record).get_status() == "queued"


# --- what a crash leaves behind -------------------------------------------------------------------------------------


def test_a_healthy_queue_is_left_alone(store, submit, an_hour_passes):
    record = submit(store)
    an_hour_passes()
    assert store.reconcile() == 0
    assert make_queue(store._queue.connection, QUEUE).job_ids == [record.id]


@pytest.mark.parametrize("state", [Status.QUEUED, Status.RUNNING])
@pytest.mark.parametrize("loss", ["missing", "finished", "failed"])
def test_what_the_queue_has_lost_is_queued_again(store, submit, an_hour_passes, state, loss):
    record = submit(store)
    if state is Status.RUNNING:
        record = store.records.change(record, (Status.QUEUED,), status=state, attempt=1, started_at=now())
    queue = make_queue(store._queue.connection, QUEUE)
    queue.remove(record.id)
    if loss == "missing":
        rq_job(store, record).delete()
    else:
        rq_job(store, record).set_status(loss)
    an_hour_passes()
    assert store.reconcile() == 1
    assert store.get(record.id).status is Status.QUEUED
    assert queue.job_ids == [record.id]
    assert rq_job(store, record).get_status() == "queued"
    assert store.reconcile() == 0


@pytest.mark.parametrize(
    ("attempts", "deaths", "code"), [(4, 3, "worker_crashed"), (6, 2, "attempts_lost"), (5, 2, None)]
)
def test_a_lost_job_is_not_begun_for_ever(store, submit, an_hour_passes, attempts, deaths, code):
    record = submit(store)
    begun = {"attempt": attempts, "deaths": deaths, "started_at": now()}
    store.records.change(record, (Status.QUEUED,), status=Status.RUNNING, **begun)
    rq_job(store, record).delete()
    an_hour_passes()
    assert store.reconcile() == 1
    after = store.get(record.id)
    assert (after.status, after.error_code) == (Status.FAILED if code else Status.QUEUED, code)


def test_a_cancel_whose_worker_is_gone_is_completed(store, submit, an_hour_passes):
    record = submit(store)
    store.records.change(record, (Status.QUEUED,), status=Status.RUNNING, attempt=1, started_at=now())
    assert store.cancel(record.id).status is Status.CANCELLING
    rq_job(store, record).delete()
    an_hour_passes()
    assert store.reconcile() == 1
    assert store.get(record.id).status is Status.CANCELLED
    store.delete(record.id)


def test_a_request_in_flight_is_not_taken_for_lost(store, submit):
    record = submit(store)
    rq_job(store, record).delete()  # as if it were not yet enqueued
    assert store.reconcile() == 0


def test_files_that_no_job_owns_are_removed_when_they_are_old(store, submit, tmp_path, an_hour_passes):
    kept = submit(store)
    nobody = new_id("vid")
    for path in (input_path(nobody), output_path(nobody, "mp4")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    ended = submit(store)
    store.cancel(ended.id)
    half = tmp_path / "videos" / f".{ended.id}.mp4.0123abcd.tmp"
    half.write_bytes(b"x")
    (tmp_path / output_path(ended.id, "mp4")).write_bytes(b"x")  # its worker died before the manifest
    assert store.sweep_orphans() == 0  # all of them could still be somebody's
    an_hour_passes()
    assert store.sweep_orphans() == 4
    assert files(tmp_path) == {input_path(kept.id), input_path(ended.id)}


# --- the end of keeping ---------------------------------------------------------------------------------------------


def test_files_are_removed_when_their_time_is_over_and_the_record_says_so(make_store, submit, tmp_path, an_hour_passes):
    store = make_store(retention_hours=1)
    old, running = submit(store), submit(store)
    store.records.change(old, (Status.QUEUED,), status=Status.SUCCEEDED)
    store.records.change(running, (Status.QUEUED,), status=Status.RUNNING, started_at=now())
    for suffix in ("mp4", "jpg", "json"):
        store._storage.write(output_path(old.id, suffix), b"x")
    assert store.sweep() == 0
    an_hour_passes()
    assert store.sweep() == 1
    assert store.get(old.id).status is Status.EXPIRED
    assert files(tmp_path) == {input_path(running.id)}
    assert store.sweep() == 0


def test_when_a_record_has_run_out_its_files_go_with_it(store, submit, redis, tmp_path):
    record = submit(store)
    redis.delete(f"flg:job:{record.id}")
    store.reconcile()
    assert files(tmp_path) == set()
    assert redis.zcard("flg:jobs") == 0
    assert store.records.num_queued() == 0


def test_upkeep_is_done_by_one_service_at_a_time(store, monkeypatch):
    calls: list[str] = []
    for name in ("reconcile", "sweep", "sweep_orphans"):
        monkeypatch.setattr(store, name, lambda *_ids, name=name: calls.append(name))
    store.upkeep()
    store.upkeep()
    assert calls == ["reconcile", "sweep_orphans", "sweep"]


def test_upkeep_looks_at_what_is_under_way_and_once_an_hour_at_everything(store, submit, redis, an_hour_passes):
    lost, over = submit(store), submit(store)
    store.cancel(over.id)
    redis.delete(f"flg:job:{over.id}")  # its time is over
    rq_job(store, lost).delete()
    an_hour_passes()
    redis.set("flg:upkeep:orphans", "1")  # it has been done within the hour
    store.upkeep()
    assert rq_job(store, lost).get_status() == "queued"
    assert redis.zcard("flg:jobs") == 2
    redis.delete("flg:upkeep:orphans", "flg:jobs:upkeep")
    store.upkeep()
    assert redis.zcard("flg:jobs") == 1
