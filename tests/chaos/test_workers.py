"""Workers are killed, stopped and told to end: each job is made once, and the queue forgets none."""

import signal
import time

import pytest

from benchmarks.timed_worker import POISON
from tests.chaos.stack import LEASE_S, PATIENCE_S
from tests.stack import wait_for
from worker.contract import Status, output_path

pytestmark = pytest.mark.chaos


def test_jobs_of_workers_killed_in_each_phase_are_taken_over_and_made_once(chaos, monkeypatch):
    """A worker has two jobs in flight: one from the first half of the places and one from the second."""
    pairs = [("record", "claimed"), ("manifest", "encoding"), ("half", "denoising"), ("decoding", "claimed")]
    jobs, killed = {}, []
    for number, pair in enumerate(pairs):
        killed.append(chaos.start_worker())
        for seed, place in enumerate(pair, start=10 * number + 1):
            chaos.hold(place, seed)
            jobs[seed] = chaos.submit(seed)
            chaos.reach(place, seed)
    before = {seed: chaos.record(job_id) for seed, job_id in jobs.items()}
    assert {record.worker for record in before.values()} == set(killed)
    made = {seed for seed in jobs if (chaos.stack.storage / output_path(jobs[seed], "json")).exists()}
    assert made == {1}
    chaos.kill(*killed)
    for number, pair in enumerate(pairs):
        for seed, place in enumerate(pair, start=10 * number + 1):
            chaos.release(place, seed)
    chaos.start_worker("--seconds", "0.05", "--shade", "7")
    after = dict(zip(jobs, chaos.succeeded(*jobs.values()), strict=True))
    for seed, record in after.items():
        assert record.attempt == 2
        assert record.worker not in killed
        # What was all there, the second attempt has left as it was.
        assert chaos.manifest(record.id)["attempt"] == (1 if seed == 1 else 2)
    chaos.wait_idle()
    # The half of a file that a worker died over is nobody's: the service removes it when it is an hour old.
    (half,) = chaos.stack.storage.rglob("*.tmp")
    assert jobs[21] in half.name
    monkeypatch.setattr("service.jobs._ORPHAN_S", 0)
    assert chaos.store().sweep_orphans() == 1
    assert not half.exists()
    chaos.succeeded(*jobs.values())


@pytest.mark.slow
def test_a_poisonous_job_kills_three_workers_and_no_other_job(chaos):
    poison = chaos.submit(POISON)
    others = [chaos.submit(seed) for seed in (101, 102)]
    deaths = []
    while not chaos.record(poison).status.is_terminal:
        name = chaos.start_worker("--seconds", "0.05", wait=False)
        process = chaos.workers[name]
        wait_for(
            lambda process=process: process.poll() is not None or chaos.record(poison).status.is_terminal,
            PATIENCE_S,
            chaos.log(name),
        )
        if process.poll() is not None:
            assert process.returncode == -signal.SIGKILL
            deaths.append(name)
    record = chaos.record(poison)
    assert (record.status, record.error_code) == (Status.FAILED, "worker_crashed")
    assert len(deaths) == 3
    chaos.succeeded(*others)
    chaos.wait_idle()


def test_sigterm_finishes_what_is_at_hand_and_takes_nothing_more(chaos):
    name = chaos.start_worker()
    chaos.hold("denoising", 1)
    first, second = chaos.submit(1), chaos.submit(2)
    chaos.reach("denoising", 1)
    chaos.signal(name, signal.SIGTERM)
    wait_for(lambda: not _ready(chaos), PATIENCE_S, "the heartbeat to say so")
    chaos.release("denoising", 1)
    assert chaos.workers[name].wait(PATIENCE_S) == 0
    chaos.succeeded(first)
    assert chaos.record(second).status is Status.QUEUED
    chaos.start_worker()
    chaos.succeeded(second)
    assert [chaos.record(one).attempt for one in (first, second)] == [1, 1]


def _ready(chaos) -> bool:
    return chaos.http.get("/readyz").status_code == 200


@pytest.mark.slow
def test_the_second_sigterm_hands_back(chaos):
    name = chaos.start_worker()
    chaos.hold("denoising", 1)
    job = chaos.submit(1)
    chaos.reach("denoising", 1)
    chaos.signal(name, signal.SIGTERM)
    wait_for(lambda: not _ready(chaos), PATIENCE_S, "the first to be heard")

    time.sleep(1.1)  # rq takes two within a second for one
    chaos.signal(name, signal.SIGTERM)
    chaos.workers[name].wait(PATIENCE_S)
    assert chaos.record(job).status is Status.QUEUED
    chaos.release("denoising", 1)
    chaos.start_worker()
    (record,) = chaos.succeeded(job)
    assert record.attempt == 1  # nothing was lost
    chaos.wait_idle()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["denoising", "decoding", "saving", "half", "manifest", "half-manifest"])
def test_a_worker_that_wakes_up_after_its_lease_overwrites_nothing(chaos, place):
    late = chaos.start_worker()
    chaos.hold(place, 1)
    job = chaos.submit(1)
    chaos.reach(place, 1)
    chaos.signal(late, signal.SIGSTOP)
    chaos.release(place, 1)
    winner = chaos.start_worker("--shade", "7")
    (record,) = chaos.succeeded(job)
    manifest = chaos.manifest(job)
    assert (record.worker, record.attempt, manifest["attempt"]) == (winner, 2, 2)
    chaos.signal(late, signal.SIGCONT)
    chaos.signal(late, signal.SIGTERM)
    assert chaos.workers[late].wait(PATIENCE_S) == 0
    chaos.succeeded(job)
    assert chaos.manifest(job) == manifest
    chaos.wait_idle()


@pytest.mark.slow
def test_a_job_popped_and_never_begun_is_found_again(chaos):
    name = chaos.start_worker()
    chaos.hold("popped", 1)
    job = chaos.submit(1)
    chaos.reach("popped", 1)
    chaos.kill(name)
    chaos.release("popped", 1)
    chaos.start_worker()
    (record,) = chaos.succeeded(job, seconds=PATIENCE_S + 120)
    assert record.attempt == 1


@pytest.mark.slow
def test_a_worker_that_gives_way_leaves_the_job_to_the_one_that_has_it(chaos, monkeypatch):
    """What the late one tells the queue is of its own attempt; the other one is at work still."""
    late = chaos.start_worker()
    chaos.hold("denoising", 1)
    job = chaos.submit(1)
    chaos.reach("denoising", 1)
    chaos.signal(late, signal.SIGSTOP)
    (chaos.gates / "at-denoising-1").unlink()
    winner = chaos.start_worker()
    chaos.reach("denoising", 1)
    chaos.signal(late, signal.SIGCONT)
    wait_for(lambda: "gave way" in chaos.log(late), PATIENCE_S, f"the late one to give way:\n{chaos.log(late)}")
    chaos.signal(late, signal.SIGTERM)
    assert chaos.workers[late].wait(PATIENCE_S) == 0
    monkeypatch.setattr("service.store._GRACE_S", 0)
    assert chaos.store().reconcile() == 0
    chaos.release("denoising", 1)
    (record,) = chaos.succeeded(job)
    assert (record.worker, record.attempt) == (winner, 2)
    chaos.wait_idle()


@pytest.mark.slow
def test_a_slow_worker_holds_up_no_job_but_its_own(chaos):
    """It is at one job for longer than a lease, while another one makes all others."""
    slow = chaos.start_worker()
    chaos.hold("denoising", 1)
    first = chaos.submit(1)
    chaos.reach("denoising", 1)
    fast = chaos.start_worker("--seconds", "0.05")
    jobs = [chaos.submit(seed) for seed in range(2, 12)]
    records = chaos.succeeded(*jobs)
    assert {record.worker for record in records} == {fast}
    ends = [record.finished_at for record in records]
    assert ends == sorted(ends)
    begun = chaos.record(first).started_at
    wait_for(lambda: time.time() > begun + 1.5 * LEASE_S, PATIENCE_S, "the lease to be over, had it not been renewed")
    # Both are busy: who waits is told a time of the order of a job's.
    chaos.hold("denoising", 12)
    last = [chaos.submit(12)]
    chaos.reach("denoising", 12)
    last += [chaos.submit(seed) for seed in (13, 14, 15)]
    etas = [chaos.http.get(f"/generate/{job}").json()["eta_seconds"] for job in last[1:]]
    assert 0 < etas[0] <= etas[1] <= etas[2] < PATIENCE_S
    chaos.release("denoising", 12)
    chaos.succeeded(*last)
    assert (chaos.record(first).status, chaos.record(first).attempt) == (Status.RUNNING, 1)
    chaos.release("denoising", 1)
    (record,) = chaos.succeeded(first)
    assert (record.worker, record.attempt) == (slow, 1)
    chaos.wait_idle()


@pytest.mark.slow
def test_a_cancelled_job_whose_worker_is_killed_before_it_stops_is_cancelled(chaos):
    name = chaos.start_worker()
    chaos.hold("half", 1)  # no step comes there
    job = chaos.submit(1)
    chaos.reach("half", 1)
    assert chaos.http.post(f"/generate/{job}/cancel").json()["status"] == "cancelling"
    chaos.kill(name)
    chaos.start_worker()
    (record,) = chaos.wait_over(job)
    assert (record.status, record.attempt) == (Status.CANCELLED, 1)
    assert not list((chaos.stack.storage / "videos").glob(f"{job}*"))
    chaos.wait_idle()
