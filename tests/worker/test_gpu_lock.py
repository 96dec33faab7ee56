"""Whose turn it is on a GPU: hours, the lock and its lease, the policies, and a real worker that gives way."""

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest

from tests.stack import Stack, new_record, stop, wait_for
from worker.contract import WORKERS_KEY, Heartbeat, Record, WorkerState, gpu_key, worker_key
from worker.gpu_lock import GpuLock, InWindow, ServeFirst, Share, Window, holder, name_of_gpu
from worker.records import Records, connect, now, workers

GPU = "GPU-1"
NIGHT = Window.parse("22:00-06:00")


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-03-{text}").replace(tzinfo=timezone(timedelta(hours=2)))


def beat(redis, state: WorkerState, gpu: str | None = GPU) -> None:
    """As a worker's pulse does."""
    own = Heartbeat(
        name="w", state=state, model="m", model_sha256="", engine="", gpu=gpu, started_at=now(), seen_at=now()
    )
    redis.set(worker_key("w"), own.model_dump_json(), ex=30)
    redis.sadd(WORKERS_KEY, "w")


# --- hours ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "moment", "end"),
    [
        ("22:00-06:00", "10T21:59", None),
        ("22:00-06:00", "10T22:00", "11T06:00"),
        ("22:00-06:00", "11T05:59", "11T06:00"),
        ("22:00-06:00", "11T06:00", None),
        ("01:30-02:30", "11T02:00", "11T02:30"),
        ("01:30-02:30", "11T23:00", None),
    ],
)
def test_a_window_may_go_over_midnight(window, moment, end):
    assert Window.parse(window).ends_at(at(moment)) == (at(end) if end else None)
    assert str(Window.parse(window)) == window


@pytest.mark.parametrize("text", ["", "22:00", "22-6", "22:00-25:00", "22:00-06:00-07:00", "22:00-22:00"])
def test_what_is_no_window_is_refused(text):
    with pytest.raises(ValueError, match="got"):
        Window.parse(text)


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_one_has_it_and_renews_it_and_gives_back_its_own_only(redis):
    one, other = (GpuLock(redis, GPU, owner, 5) for owner in ("one", "other"))
    assert one.take(100.0)
    assert not other.take(200.0)
    other.release()
    assert one.take(300.0)
    assert (holder(redis, GPU).owner, holder(redis, GPU).until) == ("one", 300.0)
    assert (one.is_free(), other.is_free()) == (True, False)
    one.release()
    assert holder(redis, GPU) is None
    assert other.take(200.0)


def test_that_of_an_owner_who_died_runs_out(redis):
    one, other = (GpuLock(redis, GPU, owner, 1) for owner in ("one", "other"))
    assert one.take(100.0)
    wait_for(lambda: other.take(200.0), 3, "the lease to run out")


def test_a_gpu_is_called_as_configured_or_as_it_is_seen(monkeypatch):
    assert name_of_gpu("mine") == "mine"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5d0e,GPU-77")
    assert name_of_gpu() == "GPU-5d0e"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    assert name_of_gpu() == "here"


# --- the policies -----------------------------------------------------------------------------------------------------


def test_sharing_asks_nobody():
    turns = Share()
    assert turns.may_begin() and turns.may_go_on() and turns.is_clear()


def test_who_serves_first_trains_when_it_has_been_quiet(redis):
    turns, records = ServeFirst(redis, GPU, idle_s=1), Records(redis, Record)
    assert turns.may_begin()  # it was never anything else
    waiting = new_record()
    records.create(waiting)
    assert not turns.may_go_on()
    records.delete(waiting.id)
    assert not turns.may_begin()  # not yet
    wait_for(turns.may_begin, 3, "the quiet second")
    beat(redis, WorkerState.BUSY)
    assert not turns.may_go_on()
    beat(redis, WorkerState.READY)
    assert not turns.may_begin()
    wait_for(turns.may_begin, 3, "the quiet second")


def test_within_a_window_a_run_takes_the_gpu_and_gives_it_back(redis):
    moment = at("10T21:00")
    one, other = (InWindow(redis, GPU, NIGHT, GpuLock(redis, GPU, n, 5), lambda: moment) for n in ("one", "other"))
    assert not one.may_begin() and not one.may_go_on()
    moment = at("10T23:00")
    assert one.may_begin()
    assert holder(redis, GPU) is None  # until there is something to train, videos are made
    assert one.may_go_on()
    assert holder(redis, GPU).until == at("11T06:00").timestamp()
    assert not other.may_begin() and not other.may_go_on()
    for state, clear in ((WorkerState.BUSY, False), (WorkerState.STOPPING, False), (WorkerState.WAITING, True)):
        beat(redis, state)
        assert one.is_clear() == clear
    beat(redis, WorkerState.BUSY, gpu=None)  # one that does not take part
    assert one.is_clear()
    moment = at("11T06:00")
    assert not one.may_go_on()
    one.end()
    assert holder(redis, GPU) is None


# --- a real worker ----------------------------------------------------------------------------------------------------


def test_a_worker_waits_while_training_has_the_gpu_and_leaves_when_it_takes_it(tmp_path):
    own = Stack(tmp_path, GPU_LOCK="on", GPU_NAME=GPU, LEASE_S="4", OVERLAP="off", ENGINE="eager")
    own.redis.start()
    redis = connect(own.redis.url)
    lock, until = GpuLock(redis, GPU, "trainer-1", 60), time.time() + 3600
    try:
        assert lock.take(until)
        worker = own.spawn("worker")

        def state() -> WorkerState | None:
            assert worker.poll() is None, own.log("worker")
            return next((one.state for one in workers(redis)), None)

        wait_for(lambda: state() is WorkerState.WAITING, 60, "the worker to wait")
        [waiting] = workers(redis)
        assert (waiting.gpu, waiting.waiting_until) == (GPU, until)
        lock.release()
        wait_for(lambda: state() is WorkerState.READY, 60, "the worker to be ready")
        assert lock.take(until)
        assert worker.wait(20) == 0
        assert workers(redis) == []
        assert redis.exists(gpu_key(GPU))
    finally:
        stop(own.processes.get("worker"))
        redis.close()
        own.redis.stop()


def test_the_clock_on_the_wall_has_a_zone():
    from worker.gpu_lock import local_time

    assert abs(local_time() - datetime.now(UTC)) < timedelta(seconds=5)
