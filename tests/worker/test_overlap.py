"""Two jobs in flight in a worker process, against a real Redis: order, cancelling, failing, and how the worker ends.

The worker's model is one that waits (`tests.held_worker`), so that what is in flight when something happens is no
matter of luck. The last test is with the bundled model.
"""

import hashlib
import json
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from rq.command import send_stop_job_command
from rq.job import Job
from rq.serializers import JSONSerializer

from service.auth import Principal
from service.jobs import Ask, JobStore
from service.schema import GenerateFields
from service.settings import Settings
from tests.stack import Stack, stop, wait_for
from worker.contract import LOCAL, Phase, Record, Status, WorkerState, output_path
from worker.pipeline import Options, VideoPipeline
from worker.queues import make_queue
from worker.records import connect, ready_workers, workers
from worker.settings import MODELS_DIR
from worker.settings import Settings as WorkerSettings
from worker.storage import Storage
from worker.video import encode_mp4


class Held:
    """Redis, and a worker that a test leads step by step."""

    def __init__(self, folder) -> None:
        self.stack = Stack(folder, LEASE_S="4", TMPDIR=str(folder))  # a killed worker leaves its temporary files
        self.stack.redis.start()
        self.redis = connect(self.stack.redis.url)
        self.queue_redis = connect(self.stack.redis.url, text=False)
        self.gates = folder / "gates"
        self.gates.mkdir()

    def start(self, mode: str = "overlap"):
        """A worker, once it takes jobs."""
        process = self.stack.spawn("tests.held_worker", str(self.gates), mode)
        wait_for(lambda: ready_workers(self.redis), 20, f"the worker:\n{self.stack.log('tests.held_worker')}")
        return process

    def store(self, **settings) -> JobStore:
        chosen = Settings(redis_url=self.stack.redis.url, min_free_bytes=0, **settings)
        return JobStore(chosen, self.redis, self.queue_redis, Storage(str(self.stack.storage)))

    def said(self, line: str) -> bool:
        log = self.gates / "log"
        return log.exists() and f"{line}\n" in log.read_text()

    def reach(self, line: str) -> None:
        wait_for(lambda: self.said(line), 20, f"{line!r}:\n{self.stack.log('tests.held_worker')}")

    def go(self, *stages: str) -> None:
        for stage in stages:
            (self.gates / stage).touch()

    def reset(self) -> None:
        for path in self.gates.iterdir():
            path.unlink()

    def in_queue(self, record) -> str:
        """What rq says of a job."""
        return Job.fetch(record.id, connection=self.queue_redis, serializer=JSONSerializer).get_status()


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    made = Held(tmp_path_factory.mktemp("held"))
    yield made
    made.stack.stop()


@pytest.fixture
def worker(held):
    """A running worker, empty-handed."""
    held.reset()
    running = held.stack.processes.get("tests.held_worker")
    return running if running and running.poll() is None else held.start()


def submit_to(store: JobStore, prompt: str, seed: int, image: Path) -> Record:
    ask = Ask(GenerateFields(prompt=prompt, seed=seed), source_sha256="")
    record, _ = store.submit(Principal(LOCAL, frozenset()), ask, image.read_bytes())
    return record


@pytest.fixture
def submit(held, worker, example_image):
    """``submit(seed)``: the seed is also the name of the job's gates."""
    assert worker.poll() is None
    return lambda seed, **settings: submit_to(held.store(**settings), "x", seed, example_image)


@pytest.fixture
def two(held, submit):
    """The first is half decoded, the second is being denoised."""
    first = submit(1)
    held.go("denoise-1")
    held.reach("decode 1 begins")
    second = submit(2)
    held.reach("denoise 2 begins")
    return first, second


def reached(held, record, status: Status) -> None:
    log = held.stack.log("tests.held_worker")
    wait_for(lambda: held.store().get(record.id).status is status, 20, f"{record.seed} to be {status}:\n{log}")


def succeeded(held, *records) -> None:
    held.go(*(f"{stage}-{record.seed}" for record in records for stage in ("denoise", "decode")))
    for record in records:
        reached(held, record, Status.SUCCEEDED)


def test_one_is_decoded_while_the_next_is_denoised_and_the_third_waits_in_the_queue(held, two, submit):
    first, second = two
    third = submit(3)
    store = held.store()
    assert store.get(first.id).phase is Phase.DECODING
    assert store.get(second.id).phase is Phase.DENOISING
    held.go("denoise-2")
    held.reach("denoise 2 ends")
    time.sleep(0.3)
    assert not held.said("decode 2 begins")
    assert store.get(third.id).status is Status.QUEUED  # and not in the hands of this worker, where it could not begin
    assert make_queue(held.queue_redis, "gpu").job_ids == [third.id]
    held.go("decode-1")
    held.reach("denoise 3 begins")
    held.reach("decode 2 begins")
    succeeded(held, second, third)
    ends = [store.get(record.id).finished_at for record in (first, second, third)]
    assert ends == sorted(ends)
    assert store.get(second.id).started_at < ends[0]


def test_an_empty_queue_does_not_keep_the_last_job(held, submit):
    job = submit(1)
    held.go("denoise-1")
    held.reach("decode 1 begins")
    time.sleep(1.2)  # the worker is back at the queue, and waits there for a second at a time
    began = time.monotonic()
    succeeded(held, job)
    assert time.monotonic() - began < 0.9


def test_both_leases_are_renewed(held, two):
    time.sleep(4.5)
    assert make_queue(held.queue_redis, "gpu").started_job_registry.get_expired_job_ids() == []
    assert sorted(map(held.in_queue, two)) == ["started", "started"]
    succeeded(held, *two)
    assert [held.store().get(record.id).attempt for record in two] == [1, 1]


@pytest.mark.parametrize("index", [0, 1])
def test_either_of_two_can_be_cancelled(held, two, index):
    gone, other = two[index], two[1 - index]
    held.store().cancel(gone.id)
    reached(held, gone, Status.CANCELLED)
    assert held.store().get(other.id).status is Status.RUNNING
    succeeded(held, other)
    assert not list((held.stack.storage / "videos").glob(f"*{gone.id}*"))


def test_a_job_that_waits_for_the_decoder_can_be_cancelled(held, two):
    first, second = two
    held.go("denoise-2")
    held.reach("denoise 2 ends")
    held.store().cancel(second.id)
    reached(held, second, Status.CANCELLED)
    assert not held.said("decode 1 ends")
    succeeded(held, first)


@pytest.mark.parametrize("index", [0, 1])
def test_rqs_stop_command_stops_the_job_that_it_names(held, two, index):
    gone, other = two[index], two[1 - index]
    send_stop_job_command(held.queue_redis, gone.id, serializer=JSONSerializer)
    reached(held, gone, Status.CANCELLED)
    wait_for(lambda: held.in_queue(gone) == "stopped", 5, "rq to say stopped")
    assert held.store().get(other.id).status is Status.RUNNING
    succeeded(held, other)


def test_both_can_be_stopped_at_once(held, two):
    for record in two:
        send_stop_job_command(held.queue_redis, record.id, serializer=JSONSerializer)
    for record in two:
        reached(held, record, Status.CANCELLED)
        wait_for(lambda record=record: held.in_queue(record) == "stopped", 5, "rq to say stopped")


def test_a_decoding_that_fails_is_that_jobs_alone(held, submit):
    first = submit(13)
    held.go("denoise-13")
    held.reach("decode 13 begins")
    second = submit(2)
    held.reach("denoise 2 begins")
    held.go("decode-13")
    reached(held, first, Status.FAILED)
    assert held.store().get(first.id).error_code == "generation_failed"
    assert held.store().get(second.id).status is Status.RUNNING
    succeeded(held, second)


def test_a_worker_whose_engine_is_lost_ends_and_the_next_makes_the_video(held, worker, submit):
    record = submit(14)
    held.go("denoise-14", "decode-14")
    assert worker.wait(20) == 0
    assert held.store().get(record.id).status is Status.QUEUED
    held.start()
    succeeded(held, record)
    assert held.store().get(record.id).attempt == 2


def test_a_job_has_its_own_time_limit(held, submit):
    first = submit(1)
    held.go("denoise-1")
    held.reach("decode 1 begins")
    second = submit(2, job_timeout_s=1)
    reached(held, second, Status.FAILED)
    assert held.store().get(second.id).error_code == "timed_out"
    succeeded(held, first)


def test_sigterm_lets_both_finish(held, worker, two, submit):
    third = submit(3)
    worker.send_signal(signal.SIGTERM)
    wait_for(lambda: not ready_workers(held.redis), 5, "it to say that it stops")
    assert [beat.state for beat in workers(held.redis)] == [WorkerState.STOPPING]
    succeeded(held, *two)
    assert worker.wait(10) == 0
    assert held.store().get(third.id).status is Status.QUEUED
    assert not workers(held.redis)
    held.start()
    succeeded(held, third)


def test_sigterm_lets_a_decoding_finish_beside_which_nothing_is_denoised(held, worker, submit):
    job = submit(1)
    held.go("denoise-1")
    held.reach("decode 1 begins")
    time.sleep(0.2)  # it waits for the queue
    worker.send_signal(signal.SIGTERM)
    wait_for(lambda: not ready_workers(held.redis), 5, "it to say that it stops")
    succeeded(held, job)
    assert worker.wait(10) == 0
    assert held.store().get(job.id).attempt == 1


def test_a_second_sigterm_gives_both_back(held, worker, two):
    worker.send_signal(signal.SIGTERM)
    time.sleep(1.1)  # rq takes two within a second for one
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert [held.store().get(record.id).status for record in two] == [Status.QUEUED] * 2
    held.start()
    succeeded(held, *two)
    assert [held.store().get(record.id).attempt for record in two] == [1, 1]  # what was handed back was not lost


def test_the_jobs_of_a_killed_worker_are_both_taken_over(held, worker, two):
    worker.kill()
    worker.wait()
    held.start()
    succeeded(held, *two)
    assert [held.store().get(record.id).attempt for record in two] == [2, 2]
    manifests = [json.loads((held.stack.storage / output_path(r.id, "json")).read_text()) for r in two]
    assert [(m["seed"], m["attempt"], m["engine_reason"]) for m in manifests] == [
        (1, 2, "there is no model"),
        (2, 2, "there is no model"),
    ]


def test_without_overlap_the_second_waits_in_the_queue(held, worker, submit):
    stop(worker)
    worker = held.start("one")
    first = submit(1)
    held.go("denoise-1")
    held.reach("decode 1 begins")
    second = submit(2)
    time.sleep(0.3)
    assert held.store().get(second.id).status is Status.QUEUED
    succeeded(held, first, second)
    stop(worker)


@pytest.fixture
def bundled(tmp_path):
    """A stack without a service, with the bundled model."""
    running = Stack(tmp_path, OVERLAP="on", ENGINE="eager")
    running.redis.start()
    running.spawn("worker")
    yield running
    running.stop()


def test_videos_made_beside_each_other_are_what_the_model_makes_alone(bundled, example_image):
    prompt = "a red circle moves right quickly, static camera"
    chosen = WorkerSettings(device="cpu", torch_threads=1, engine="eager")
    pipeline = VideoPipeline(MODELS_DIR / "shapes-4step", Options.of(chosen))
    with Image.open(example_image) as image:
        alone = [encode_mp4(pipeline(image, prompt, seed=seed).frames_THWC, 8) for seed in range(4)]
    redis = connect(bundled.redis.url)
    wait_for(lambda: ready_workers(redis), 60, f"the worker:\n{bundled.log('worker')}")
    settings = Settings(redis_url=bundled.redis.url, min_free_bytes=0)
    store = JobStore(settings, redis, connect(bundled.redis.url, text=False), Storage(str(bundled.storage)))
    ids = [submit_to(store, prompt, seed, example_image).id for seed in range(4)]
    wait_for(lambda: store.get(ids[-1]).status.is_terminal, 60, f"the last:\n{bundled.log('worker')}")
    manifests = [json.loads((bundled.storage / output_path(job_id, "json")).read_text()) for job_id in ids]
    assert [m["video_sha256"] for m in manifests] == [hashlib.sha256(video).hexdigest() for video in alone]
    assert {(m["engine"], m["engine_reason"], m["decoder"]) for m in manifests} == {("eager-cpu", None, "whole-eager")}
    for before, after in pairwise(map(store.get, ids)):
        assert before.finished_at <= after.finished_at
        assert after.started_at < before.finished_at
