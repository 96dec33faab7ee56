"""The worker as a process against a real Redis: what it refuses, what stops it, and what it takes over."""

import os
import signal

import pytest
from rq import Callback
from rq.command import send_stop_job_command
from rq.job import Job
from rq.serializers import JSONSerializer

from service.auth import Principal
from service.jobs import Ask, JobStore
from service.schema import GenerateFields
from service.settings import Settings
from tests.stack import ROOT, Stack, run_with, wait_for
from worker.contract import LOCAL, QUEUE, Status, output_path
from worker.queues import make_queue
from worker.records import connect, ready_workers
from worker.storage import Storage

PROMPT = "a red circle moves right quickly, static camera"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A stack without a service: Redis and one worker whose lease is short."""
    running = Stack(tmp_path_factory.mktemp("own"), LEASE_S="4")
    running.redis.start()
    running.spawn("worker")
    redis = connect(running.redis.url)
    wait_for(lambda: ready_workers(redis), 120, f"the worker:\n{running.log('worker')}")
    yield running
    running.stop()


@pytest.fixture
def queue_redis(own):
    client = connect(own.redis.url, text=False)
    yield client
    client.close()


@pytest.fixture
def store(own, queue_redis):
    settings = Settings(redis_url=own.redis.url, storage_url=str(own.storage), min_free_bytes=0)
    return JobStore(settings, connect(own.redis.url), queue_redis, Storage(str(own.storage)))


@pytest.fixture
def submit(store, example_image):
    ask = Ask(GenerateFields(prompt=PROMPT, seed=3), source_sha256="")
    return lambda: store.submit(Principal(LOCAL, frozenset()), ask, example_image.read_bytes())[0]


def status(store, record) -> Status:
    return store.get(record.id).status


def test_a_function_that_is_not_listed_is_not_run(own, queue_redis, tmp_path):
    victim = tmp_path / "touched"
    queue = make_queue(queue_redis, QUEUE)
    for function in ("os.system", "worker.jobs.install"):
        job = queue.enqueue(function, f"touch {victim}")
        wait_for(lambda job=job: job.get_status(refresh=True) == "failed", 30, f"{function} to be refused")
        assert "ForbiddenFunction" in job.latest_result().exc_string
    # A function of ours with somebody else's callback: it runs, the callback does not.
    for when in ("on_success", "on_failure", "on_stopped"):
        queue.enqueue(
            "worker.jobs.generate", "vid_" + "0" * 26, job_id=f"callback-{when}", **{when: Callback("os.abort")}
        )
        job = Job.fetch(f"callback-{when}", connection=queue_redis, serializer=JSONSerializer)
        wait_for(lambda job=job: job.get_status(refresh=True) == "finished", 30, "the job to be done")
    assert not victim.exists()
    assert own.processes["worker"].poll() is None


def test_rqs_own_stop_command_ends_a_running_job(store, submit, queue_redis):
    record = submit()
    wait_for(lambda: store.get(record.id).progress > 0, 30, "the job to run")
    send_stop_job_command(queue_redis, record.id, serializer=JSONSerializer)
    wait_for(lambda: status(store, record) is Status.CANCELLED, 20, "the job to stop")
    job = Job.fetch(record.id, connection=queue_redis, serializer=JSONSerializer)
    wait_for(lambda: job.get_status(refresh=True) == "stopped", 10, "rq to say stopped")
    assert not store.get(record.id).error_code
    again = submit()  # the stop was for that job alone
    wait_for(lambda: status(store, again) is Status.SUCCEEDED, 60, "the next job to succeed")


def test_a_missing_input_fails_the_job_and_not_the_worker(own, store, submit):
    own.processes["worker"].send_signal(signal.SIGSTOP)
    record = submit()
    os.remove(own.storage / "inputs" / f"{record.id}.png")
    own.processes["worker"].send_signal(signal.SIGCONT)
    wait_for(lambda: status(store, record) is Status.FAILED, 60, "the job to fail")
    assert store.get(record.id).error_code == "input_missing"


def test_a_killed_workers_job_is_taken_over_and_made_once(own, store, submit):
    record = submit()
    wait_for(lambda: store.get(record.id).progress > 0.1, 30, "the job to run")
    own.processes["worker"].kill()
    own.processes["worker"].wait()
    assert status(store, record) is Status.RUNNING
    own.spawn("worker")
    # Lease 4 s, maintenance every second, and the time to load a model.
    wait_for(lambda: status(store, record) is Status.SUCCEEDED, 120, f"the take-over:\n{own.log('worker')}")
    after = store.get(record.id)
    assert after.attempt == 2
    assert (own.storage / output_path(record.id, "mp4")).stat().st_size > 1000
    assert not list((own.storage / "videos").glob("*.tmp"))


def test_sigterm_lets_the_job_at_hand_finish(own, store, submit):
    redis = connect(own.redis.url)
    wait_for(lambda: ready_workers(redis), 120, "a worker")
    record = submit()
    wait_for(lambda: store.get(record.id).progress > 0, 30, "the job to run")
    own.processes["worker"].send_signal(signal.SIGTERM)
    assert own.processes["worker"].wait(60) == 0
    assert status(store, record) is Status.SUCCEEDED
    assert not ready_workers(redis)  # it took its heartbeat with it
    assert store.get(record.id).attempt == 1


def test_a_job_whose_every_attempt_is_lost_fails(own, store, submit, queue_redis):
    """Three workers in turn take the job and die of it; here the dying is done by hand."""
    record = submit()
    redis = connect(own.redis.url)
    assert not ready_workers(redis)
    for attempt in (1, 2, 3):
        own.spawn("worker")
        wait_for(lambda n=attempt: store.get(record.id).attempt == n, 120, f"attempt {attempt}")
        own.processes["worker"].kill()
        own.processes["worker"].wait()
    own.spawn("worker")
    wait_for(lambda: status(store, record) is Status.FAILED, 120, "the job to be given up")
    after = store.get(record.id)
    assert after.error_code == "worker_crashed"
    assert make_queue(queue_redis, QUEUE).count == 0


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"MODEL": "no-such-model"}, "error: MODEL=no-such-model"),
        ({"TORCH_THREADS": "none"}, "error: TORCH_THREADS=none"),
        ({"MODEL": str(ROOT / "models" / "examples")}, "is no model folder"),
    ],
)
def test_a_wrong_setting_ends_the_worker_with_2_and_one_line(environment, says):
    done = run_with("worker", environment)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
