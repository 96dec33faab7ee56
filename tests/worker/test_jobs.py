"""`generate` in this process, with a real Redis and a pipeline of a moment: late attempts, lost answers, odd errors."""

import hashlib
import io
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from redis.exceptions import TimeoutError as RedisTimeout
from rq.exceptions import AbandonedJobError
from rq.timeouts import JobTimeoutException

from distill.prompt import Prompt
from distill.student import Card, Video
from tests.footage import film
from tests.stack import new_record
from worker import jobs
from worker.attempts import claim, hand_back, lost
from worker.contract import MAX_ATTEMPTS, SECONDS_KEY, Phase, Record, Status, input_path, model_id, output_path
from worker.engine.errors import EngineLost, OutOfMemory
from worker.flights import Cancelled, Flight, Flights
from worker.pipeline import Denoised
from worker.records import Records, Refused, connect, now
from worker.storage import Storage


class MomentaryPipeline:
    """Stands where `VideoPipeline` stands and makes a grey clip at once. ``during`` is called in the middle of the
    denoising, ``amid`` in that of the decoding."""

    device, threads = "cpu", 1
    choice = SimpleNamespace(name="none", reason="there is no model", decoder=SimpleNamespace(name="grey"))
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

    model_card = SimpleNamespace(pace="m", id=model_id("m", card.sha256))

    def __init__(self) -> None:
        self.during = self.amid = lambda: None
        self.calls = self.freed = 0

    def free_memory(self) -> None:
        self.freed += 1

    def denoise(self, _image, _prompt, *, seed, on_progress):
        assert seed == 1
        self.calls += 1
        on_progress(Phase.DENOISING, 0.3)
        self.during()
        on_progress(Phase.DENOISING, 0.6)
        return Denoised(None, {Phase.DENOISING: 0.1})

    def decode(self, denoised, *, on_progress):
        for level in range(5):
            # Its share is less than what was said before: another job has moved the scale meanwhile.
            on_progress(Phase.DECODING, 0.5 + level / 20)
            if level == 3:
                self.amid()
            yield np.full((1, 16, 16, 3), 50 * level, np.uint8)
        denoised.timings_s[Phase.DECODING] = 0.2


@pytest.fixture
def runtime(redis_server, tmp_path):
    client = connect(redis_server.url)
    client.flushdb()
    made = jobs.Runtime("worker-a", jobs.Loaded(MomentaryPipeline()), Records(client, Record), Storage(str(tmp_path)))
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
    assert runtime.loaded.active.calls == 1


def test_an_attempt_that_died_after_publishing_is_completed_without_the_model(runtime, job):
    jobs.generate(job.id)
    runtime.records.redis.hset(f"flg:job:{job.id}", mapping={"status": "running", "progress": "0.9"})
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.attempt, runtime.loaded.active.calls) == (Status.SUCCEEDED, 2, 1)


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

    runtime.loaded.active.during = overtaken
    jobs.generate(job.id)  # returns: an error here would take the job away from worker-b
    after = runtime.records.get(job.id)
    assert (after.status, after.attempt, after.worker) == (Status.RUNNING, 2, "worker-b")


def test_a_current_attempt_that_meets_the_same_is_tried_again(runtime, job):
    def broken() -> None:
        raise OSError("storage down")

    runtime.loaded.active.during = broken
    with pytest.raises(OSError, match="storage down"):
        jobs.generate(job.id)


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("nan"), "generation_failed"), (JobTimeoutException(), "timed_out")]
)
def test_a_failure_of_the_job_ends_in_its_record(runtime, job, error, code):
    def broken() -> None:
        raise error

    runtime.loaded.active.during = broken
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.error_code) == (Status.FAILED, code)
    assert "nan" not in after.error_message  # what the inside says stays inside


def test_a_job_for_a_model_that_is_gone_says_so(runtime, job):
    runtime.records.redis.hset(f"flg:job:{job.id}", "model", "old")
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert after.error_code == "model_gone"
    there = runtime.loaded.active.model_card.id
    told = f"old was replaced while this job waited; served now are {there}; send it again with one of them"
    assert after.error_message == told
    assert runtime.loaded.active.calls == 0


def test_a_job_that_is_deleted_while_it_is_made_leaves_nothing(runtime, job, tmp_path):
    runtime.loaded.active.during = lambda: runtime.records.delete(job.id)
    jobs.generate(job.id)
    assert runtime.records.get(job.id) is None
    assert not list(tmp_path.glob("videos/*"))


@pytest.mark.parametrize("when", ["during", "amid"])
def test_a_cancelled_job_stops_between_steps(runtime, job, tmp_path, when):
    def cancel() -> None:
        current = runtime.records.get(job.id)
        runtime.records.change(current, (Status.RUNNING,), status=Status.CANCELLING)

    setattr(runtime.loaded.active, when, cancel)
    jobs.generate(job.id)
    assert runtime.records.get(job.id).status is Status.CANCELLED
    assert not list(tmp_path.glob("videos/*"))


@pytest.fixture
def flight(monkeypatch):
    """That of every job here."""
    made = Flight(Flights())
    monkeypatch.setattr(jobs, "current", lambda: made)
    return made


@pytest.mark.parametrize("when", ["during", "amid"])
def test_a_job_that_rq_stops_is_cancelled_and_rq_hears_of_it(runtime, job, flight, when):
    setattr(runtime.loaded.active, when, lambda: setattr(flight, "is_stopped", True))
    with pytest.raises(Cancelled):
        jobs.generate(job.id)
    assert runtime.records.get(job.id).status is Status.CANCELLED


@pytest.mark.parametrize("when", ["during", "amid"])
def test_a_job_whose_worker_has_to_end_is_handed_back_and_no_attempt_is_lost(runtime, job, flight, when, tmp_path):
    setattr(runtime.loaded.active, when, lambda: setattr(flight, "is_interrupted", True))
    again = jobs.generate(job.id)
    assert (again.enqueue_at_front, runtime.records.get(job.id).attempt) == (True, 0)
    assert runtime.records.get(job.id).status is Status.QUEUED
    assert not list(tmp_path.glob("videos/*"))


def test_progress_only_grows_and_ends_with_the_job(runtime, job):
    jobs.generate(job.id)
    events = [json.loads(data["data"]) for _, data in runtime.records.redis.xrange(f"flg:job:{job.id}:events")]
    seen = [(event.get("phase"), event["progress"]) for event in events if "progress" in event]
    assert [progress for _, progress in seen] == sorted(progress for _, progress in seen)
    assert [phase for phase, _ in seen] == ["encoding", *["denoising"] * 2, *["decoding"] * 5, "saving", None]
    assert seen[-1] == (None, 1.0)


def test_the_manifest_says_what_made_it_and_the_thumbnail_is_the_middle_frame(runtime, job):
    jobs.generate(job.id)
    manifest = json.loads(runtime.storage.read(output_path(job.id, "json")))
    assert (manifest["engine"], manifest["engine_reason"], manifest["decoder"]) == ("none", "there is no model", "grey")
    assert list(manifest["timings_s"]) == ["denoising", "decoding", "saving"]
    thumbnail = Image.open(io.BytesIO(runtime.storage.read(output_path(job.id, "jpg"))))
    assert abs(np.asarray(thumbnail).mean() - 2 * 50) < 2


@pytest.mark.parametrize(("last_end", "seconds"), [(5.0, 10), (12.0, 8), (19.0, 1)])
def test_seconds_beside_an_earlier_job_are_not_counted_twice(runtime, last_end, seconds):
    runtime.last_end = last_end
    jobs._learn_duration(runtime, "m", started=10.0, ended=20.0)
    assert float(runtime.records.redis.hget(SECONDS_KEY, "m")) == seconds
    assert runtime.last_end == 20.0


def test_a_job_that_comes_too_late_is_not_begun(runtime, job):
    runtime.records.change(job, (Status.QUEUED,), start_by=now() - 1)
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.error_code, runtime.loaded.active.calls) == (Status.FAILED, "deadline_start", 0)


def test_a_job_that_takes_too_long_ends_between_its_steps(runtime, job):
    runtime.records.change(job, (Status.QUEUED,), finish_by=now() + 0.05)
    runtime.loaded.active.during = lambda: time.sleep(0.1)
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.error_code) == (Status.FAILED, "deadline")
    assert "X-Deadline" in after.error_message


def test_the_end_of_a_job_that_has_a_webhook_puts_it_into_the_outbox(runtime, job):
    runtime.records.change(job, (Status.QUEUED,), webhook_url="https://example.org/hook")
    jobs.generate(job.id)
    assert runtime.records.redis.zrange("flg:webhooks:due", 0, -1) == [job.id]
    assert runtime.records.redis.hget("flg:metrics", "jobs_total|model=m|status=succeeded") == "1"


@pytest.mark.parametrize("stage", ["during", "amid"])
def test_a_lack_of_memory_is_met_once_more_with_all_that_can_be_freed(runtime, job, stage):
    pipeline, tries = runtime.loaded.active, []

    def not_enough() -> None:
        tries.append(pipeline.freed)
        if len(tries) == 1:
            raise OutOfMemory("CUDA out of memory")

    setattr(pipeline, stage, not_enough)
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.attempt, tries) == (Status.SUCCEEDED, 1, [0, 1])


def test_a_lack_of_memory_twice_fails_the_job_and_says_so(runtime, job):
    def not_enough() -> None:
        raise OutOfMemory("CUDA out of memory")

    runtime.loaded.active.amid = not_enough
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.error_code, after.attempt) == (Status.FAILED, "out_of_memory", 1)
    assert "CUDA" not in after.error_message
    assert not runtime.storage.names("videos")
    assert not runtime.is_lost


@pytest.mark.parametrize("suffix", ["mp4", "jpg", "json"])
def test_a_late_attempt_writes_none_of_the_files(runtime, job, monkeypatch, suffix):
    """It is stopped right before one of them takes its place, and another attempt publishes the video meanwhile."""
    write, late = Storage.write, []

    def held_up(storage, path, data, check):
        if path == output_path(job.id, suffix) and not late:
            late.append(path)
            other = claim(runtime.records, runtime.records.get(job.id), "worker-b")
            for other_suffix in ("mp4", "jpg", "json"):
                write(storage, output_path(job.id, other_suffix), b"the winner's")
            runtime.records.change(other, (Status.RUNNING,), fence=True, status=Status.SUCCEEDED)
        write(storage, path, data, check)

    monkeypatch.setattr(Storage, "write", held_up)
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (late, after.status, after.worker) == ([output_path(job.id, suffix)], Status.SUCCEEDED, "worker-b")
    assert {runtime.storage.read(output_path(job.id, one)) for one in ("mp4", "jpg", "json")} == {b"the winner's"}


def test_what_an_attempt_has_left_in_part_is_made_anew(runtime, job):
    jobs.generate(job.id)
    runtime.storage.write(output_path(job.id, "mp4"), b"of another attempt")
    runtime.records.redis.hset(f"flg:job:{job.id}", mapping={"status": "running", "progress": "0.9"})
    jobs.generate(job.id)
    assert runtime.loaded.active.calls == 2
    manifest = json.loads(runtime.storage.read(output_path(job.id, "json")))
    mp4 = runtime.storage.read(output_path(job.id, "mp4"))
    assert manifest["video_sha256"] == hashlib.sha256(mp4).hexdigest()


class Away:
    """A storage that does not answer for its first calls."""

    def __init__(self, monkeypatch, method: str, times: int) -> None:
        self.calls, self._times, self._real = 0, times, getattr(Storage, method)
        monkeypatch.setattr(Storage, method, lambda *arguments: self._call(*arguments))
        monkeypatch.setattr(jobs, "_PAUSES_S", (0.01, 0.02))

    def _call(self, *arguments):
        self.calls += 1
        if self.calls <= self._times:
            raise OSError("the object store did not answer")
        return self._real(*arguments)


@pytest.mark.parametrize("method", ["read", "write"])
def test_a_job_waits_for_the_storage(runtime, job, monkeypatch, method):
    away = Away(monkeypatch, method, 5)
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.attempt, runtime.loaded.active.calls) == (Status.SUCCEEDED, 1, 1)
    assert away.calls > 5


def test_it_waits_no_longer_than_is_patient_and_can_be_cancelled_meanwhile(runtime, job, monkeypatch):
    Away(monkeypatch, "write", 10**6)
    runtime.patience_s = 0.1
    with pytest.raises(OSError, match="did not answer"):
        jobs.generate(job.id)  # rq tries again
    runtime.patience_s = 60
    runtime.loaded.active.amid = lambda: threading.Timer(
        0.3, lambda: runtime.records.change(runtime.records.get(job.id), (Status.RUNNING,), status=Status.CANCELLING)
    ).start()
    jobs.generate(job.id)
    assert runtime.records.get(job.id).status is Status.CANCELLED


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        ([AbandonedJobError] * 3, "worker_crashed"),
        ([OSError, AbandonedJobError, EngineLost, AbandonedJobError], "worker_crashed"),
        ([OSError] * 6, "storage_failed"),
        ([RedisTimeout] * 6, "store_failed"),
        ([AbandonedJobError] * 2 + [OSError] * 3 + [JobTimeoutException], "attempts_lost"),
    ],
)
def test_what_a_job_is_given_up_for(runtime, job, kinds, code):
    """Three workers that died, or as many attempts as there may be, whatever they were lost to."""
    for number, kind in enumerate(kinds, 1):
        claim(runtime.records, runtime.records.get(job.id), "worker-a")
        in_queue = SimpleNamespace(args=(job.id,), retries_left=MAX_ATTEMPTS - number)
        before = runtime.records.get(job.id)
        assert (before.status, before.attempt) == (Status.RUNNING, number)
        lost(runtime.records, in_queue, kind, kind("x"))
    after = runtime.records.get(job.id)
    assert (after.status, after.error_code, after.attempt) == (Status.FAILED, code, len(kinds))
    assert after.finished_at and after.error_message


def test_a_deadline_for_its_start_is_over_once_it_has_begun(runtime, job):
    """It was handed back, or its worker died: it had not to wait."""
    runtime.records.change(job, (Status.QUEUED,), start_by=now() + 60)
    first = claim(runtime.records, runtime.records.get(job.id), "worker-b")
    hand_back(runtime.records, first)
    runtime.records.change(runtime.records.get(job.id), (Status.QUEUED,), start_by=now() - 1)
    jobs.generate(job.id)
    assert runtime.records.get(job.id).status is Status.SUCCEEDED


def test_a_late_attempt_whose_engine_is_lost_takes_nothing_from_the_winner(runtime, job, monkeypatch):
    monkeypatch.setattr(jobs.os, "kill", lambda _pid, _signal: None)

    def late() -> None:
        claim(runtime.records, runtime.records.get(job.id), "worker-b")
        raise EngineLost("the GPU cannot be used any more")

    runtime.loaded.active.amid = late
    assert jobs.generate(job.id) is None  # raised, rq would put the job back into the queue
    after = runtime.records.get(job.id)
    assert (after.status, after.worker, after.attempt) == (Status.RUNNING, "worker-b", 2)
    assert runtime.is_lost


# --- models that take no image ----------------------------------------------------------------------------------------


@pytest.fixture
def from_text(runtime, monkeypatch):
    """The pipeline's model makes videos from text."""
    pipeline = runtime.loaded.active
    monkeypatch.setattr(pipeline, "card", pipeline.card.model_copy(update={"task": "t2v", "sigmas": (1.0, 0.5)}))
    return pipeline


def submitted(runtime, source: str, **fields) -> Record:
    made = new_record(model="m").model_copy(update={"source": source, **fields})
    runtime.records.create(made, max_queued=10)
    return runtime.records.get(made.id)


@pytest.mark.usefixtures("from_text")
def test_a_job_of_a_sentence_alone_needs_no_input(runtime):
    job = submitted(runtime, "none")
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.first_step) == (Status.SUCCEEDED, None)
    assert "input_sha256" not in json.loads(runtime.storage.read(output_path(job.id, "json")))


def test_a_job_of_a_video_hands_it_over_at_the_models_size_and_says_where_it_began(runtime, from_text, monkeypatch):
    job = submitted(runtime, "video", strength=0.6)
    runtime.storage.write(input_path(job.id, "video"), film(width=64, height=32, seconds=2, fps=4))
    given = {}

    def denoise(image, _prompt, **rest):
        given.update(rest, image=image)
        return Denoised(None, {Phase.DENOISING: 0.1}, first_step=1)

    monkeypatch.setattr(from_text, "denoise", denoise)
    jobs.generate(job.id)
    assert (given["image"], given["strength"], given["video_THWC"].shape) == (None, 0.6, (5, 16, 16, 3))
    assert runtime.records.get(job.id).first_step == 1
    manifest = json.loads(runtime.storage.read(output_path(job.id, "json")))
    assert (manifest["strength"], manifest["first_step"], manifest["first_sigma"]) == (0.6, 1, 0.5)
    # An attempt that died after it had published is completed from the manifest.
    runtime.records.redis.hset(f"flg:job:{job.id}", "status", "running")
    runtime.records.redis.hdel(f"flg:job:{job.id}", "first_step")
    jobs.generate(job.id)
    assert runtime.records.get(job.id).first_step == 1


@pytest.mark.usefixtures("from_text")
def test_an_input_video_that_is_gone_is_said_to_be(runtime):
    job = submitted(runtime, "video", strength=0.6)
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.error_code, after.error_message) == ("input_missing", "the input video is no longer in the storage")


def test_a_job_whose_model_gave_way_to_one_of_another_task_says_so(runtime, job, from_text):
    jobs.generate(job.id)
    after = runtime.records.get(job.id)
    assert (after.status, after.error_code) == (Status.FAILED, "model_gone")
    assert "(task t2v) took the place of the model that this job was for, and makes nothing from an image" in (
        after.error_message
    )
    assert from_text.calls == 0
