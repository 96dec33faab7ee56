"""`generate` in this process, with a real Redis and a pipeline of a moment: late attempts, lost answers, odd errors."""

import numpy as np
import pytest
from rq.timeouts import JobTimeoutException

from distill.prompt import Prompt
from distill.student import Card, Video
from tests.stack import new_record
from worker import jobs
from worker.attempts import claim
from worker.contract import Phase, Record, Status, input_path, output_path
from worker.pipeline import Result
from worker.records import Records, Refused, connect
from worker.storage import Storage


class MomentaryPipeline:
    """Stands where `VideoPipeline` stands and makes a grey clip at once; ``during`` is called in the middle."""

    device, threads, engine = "cpu", 1, "none"
    card = Card(
        kind="student",
        name="m",
        created_at="",
        backbone="none",
        task="ti2v",
        parameters={},
        call={},
        sigmas=(),
        prompt=Prompt(kind="free", help="", examples=("x",)),
        video=Video(width=16, height=16, num_frames=5, fps=8),
        stages=(),
        metrics={},
        files={},
    )

    def __init__(self) -> None:
        self.during = lambda: None
        self.calls = 0

    def __call__(self, _image, _prompt, *, seed, on_progress):
        assert seed == 1
        self.calls += 1
        on_progress(Phase.DENOISING, 0.3)
        self.during()
        on_progress(Phase.DENOISING, 0.6)
        return Result(np.full((5, 16, 16, 3), 128, np.uint8), {Phase.DENOISING: 0.1})


@pytest.fixture
def runtime(redis_server, tmp_path):
    client = connect(redis_server.url)
    client.flushdb()
    made = jobs.Runtime("worker-a", MomentaryPipeline(), Records(client, Record), Storage(str(tmp_path)))
    jobs.install(made)
    yield made
    jobs._runtime = None
    client.close()


@pytest.fixture
def job(runtime, example_image):
    made = new_record(model="m")
    runtime.storage.write(input_path(made.id), example_image.read_bytes())
    runtime.records.create(made, max_queued=10)
    return made


def test_a_job_ends_with_its_files_and_is_not_made_twice(runtime, job):
    jobs.generate(job.id)
    assert runtime.records.get(job.id).status is Status.SUCCEEDED
    assert all(runtime.storage.exists(output_path(job.id, suffix)) for suffix in ("mp4", "jpg", "json"))
    jobs.generate(job.id)  # the queue delivers it once more
    assert runtime.pipeline.calls == 1


def test_an_attempt_that_died_after_publishing_is_completed_without_the_model(runtime, job):
    jobs.generate(job.id)
    runtime.records.redis.hset(f"flg:job:{job.id}", mapping={"status": "running", "progress": "0.9"})
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.attempt, runtime.pipeline.calls) == (Status.SUCCEEDED, 2, 1)


def test_a_claim_whose_answer_was_lost_is_still_ours(runtime, job, monkeypatch):
    """Redis did it, the connection dropped, and the client's second try met the first."""
    change = runtime.records.change

    def twice(given, *args, **changes):
        change(given, *args, **changes)
        return change(given, *args, **changes)  # refused: the attempt is already another

    with monkeypatch.context() as patch:
        patch.setattr(runtime.records, "change", twice)
        claimed = claim(runtime.records, job, "worker-a")
    assert (claimed.attempt, claimed.worker) == (1, "worker-a")


def test_a_claim_that_another_worker_won_is_not_ours(runtime, job):
    runtime.records.change(job, (Status.QUEUED,), status=Status.RUNNING, attempt=1, worker="worker-b")
    with pytest.raises(Refused):
        claim(runtime.records, job, "worker-a")


@pytest.mark.parametrize("trouble", [None, OSError("storage down")])
def test_a_late_attempt_gives_way_whatever_it_meets(runtime, job, trouble):
    """Its lease ran out while it was stuck, another worker has the job: nothing of the late one may show."""

    def overtaken() -> None:
        current = runtime.records.get(job.id)
        runtime.records.change(current, (Status.RUNNING,), attempt=2, worker="worker-b")
        if trouble:
            raise trouble

    runtime.pipeline.during = overtaken
    jobs.generate(job.id)  # returns: an error here would take the job away from worker-b
    after = runtime.records.get(job.id)
    assert (after.status, after.attempt, after.worker) == (Status.RUNNING, 2, "worker-b")


def test_a_current_attempt_that_meets_the_same_is_tried_again(runtime, job):
    def broken() -> None:
        raise OSError("storage down")

    runtime.pipeline.during = broken
    with pytest.raises(OSError, match="storage down"):
        jobs.generate(job.id)


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("nan"), "generation_failed"), (JobTimeoutException(), "timed_out")]
)
def test_a_failure_of_the_job_ends_in_its_record(runtime, job, error, code):
    def broken() -> None:
        raise error

    runtime.pipeline.during = broken
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.error_code) == (Status.FAILED, code)
    assert "nan" not in after.error_message  # what the inside says stays inside


def test_a_job_for_a_model_that_is_gone_says_so(runtime, job):
    runtime.records.redis.hset(f"flg:job:{job.id}", "model", "old")
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert after.error_code == "model_gone"
    assert after.error_message == "old was replaced by m while this job waited; send it again"
    assert runtime.pipeline.calls == 0


def test_a_job_that_is_deleted_while_it_is_made_leaves_nothing(runtime, job, tmp_path):
    runtime.pipeline.during = lambda: runtime.records.delete(job.id)
    jobs.generate(job.id)
    assert runtime.records.get(job.id) is None
    assert not list(tmp_path.glob("videos/*"))


def test_a_cancelled_job_stops_between_steps(runtime, job, tmp_path):
    def cancel() -> None:
        current = runtime.records.get(job.id)
        runtime.records.change(current, (Status.RUNNING,), status=Status.CANCELLING)

    runtime.pipeline.during = cancel
    jobs.generate(job.id)
    assert runtime.records.get(job.id).status is Status.CANCELLED
    assert not list(tmp_path.glob("videos/*"))
