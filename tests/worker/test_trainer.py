"""The trainer as a process against a real Redis, its runs stand-ins: what ends a run, and what takes it over."""

import signal
import time

import psutil
import pytest

from service.distillation_schema import DistillationFields
from service.distillations import DistillationStore
from service.errors import ApiError
from tests.stack import Stack, new_record, run_with, stop, wait_for
from tests.stand_in import MODELS, STEPS, sha256_of
from worker.contract import TRAIN_QUEUE, Progress, Record, RunPhase, Status, gpu_key
from worker.gpu_lock import local_time
from worker.queues import make_queue
from worker.records import Records, connect
from worker.releases import Releases
from worker.storage import Storage

BUNDLED = sha256_of(MODELS / "shapes-4step")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A Redis, and settings for trainers whose lease is short."""
    folder = tmp_path_factory.mktemp("own")
    running = Stack(folder, LEASE_S="4", RUNS=str(folder / "runs"), STUDENTS=str(folder / "students"))
    running.redis.start()
    yield running
    running.stop()


@pytest.fixture
def store(own):
    clients = connect(own.redis.url), connect(own.redis.url, text=False)
    clients[0].flushdb()
    yield DistillationStore(*clients, Storage(str(own.storage)))
    for client in clients:
        client.close()


@pytest.fixture
def run(own, store):
    """A distillation in the queue, and all that is needed to watch it; nothing of it is left running."""
    made = Run(own, store)
    yield made
    own.environment = made.environment
    for process in made.trainers:
        process.kill()
        process.wait()
    for process in made.processes():
        process.kill()


class Run:
    """One distillation as a test sees it."""

    def __init__(self, stack: Stack, store: DistillationStore) -> None:
        self.stack, self.store = stack, store
        self.releases = Releases(store._redis)
        self.environment = stack.environment
        self.trainers = []
        self.submit()

    def submit(self, **fields) -> None:
        """Another one; the one before is cancelled, if it is not over."""
        if hasattr(self, "id") and not self.record.status.is_terminal:
            self.store.cancel(self.id)
        self.id = self.store.submit(DistillationFields(recipe="shapes", preset="smoke", **fields), owner="local").id
        self.folder = self.stack.folder / "runs" / self.id

    @property
    def record(self):
        return self.store.get(self.id)

    def start_trainer(self, behaviour: str, **settings: str):
        self.stack.environment = {**self.environment, **settings}
        self.trainers.append(self.stack.spawn("tests.stand_in", "trainer", behaviour))
        return self.trainers[-1]

    def wait(self, status: Status) -> None:
        def there() -> bool:
            assert not self.record.status.is_terminal or self.record.status is status, self.record
            return self.record.status is status

        wait_for(there, 30, f"{status}:\n{self.stack.log('tests.stand_in')}")

    def wait_until_it_works(self) -> None:
        """Until it has come half-way, where it waits."""
        wait_for(lambda: self.record.progress, 30, f"progress:\n{self.stack.log('tests.stand_in')}")

    def processes(self) -> list[psutil.Process]:
        """The run's own."""
        return [p for p in psutil.process_iter(["cmdline"]) if str(self.folder) in " ".join(p.info["cmdline"] or [])]

    def starts(self) -> list[int]:
        """The steps after which each start of the run began."""
        lines = (self.folder / "log.txt").read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("from ")]

    def trials(self) -> list[str]:
        """What the student was held against, for each start of the gate."""
        lines = (self.folder / "log.txt").read_text().splitlines()
        return [line.removeprefix("gate against ") for line in lines if line.startswith("gate ")]

    def let_go(self) -> None:
        """Half-way it is not to wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "go").touch()

    def wait_for_the_gate(self) -> None:
        wait_for(lambda: self.record.phase is RunPhase.GATE and self.processes(), 30, "the gate")


def test_a_trainer_of_several_gpus_has_the_run_share_them(run):
    run.let_go()
    run.start_trainer("works", TRAIN_PROCESSES="2")
    run.wait(Status.SUCCEEDED)
    assert "run shares 2 processes" in (run.folder / "log.txt").read_text()


def test_a_run_is_followed_to_its_student(run):
    run.start_trainer("works")
    run.wait_until_it_works()
    assert (run.record.status, run.record.attempt, run.record.finished_at) == (Status.RUNNING, 1, None)
    (run.folder / "go").touch()
    run.wait(Status.SUCCEEDED)
    assert run.record.progress == Progress(stage="matching", step=STEPS, steps=STEPS, values={"loss": 1 / STEPS})
    assert (run.folder.parent / run.record.student).is_dir()
    assert run.record.created_at < run.record.started_at < run.record.finished_at
    lines, last_id = run.store.log_lines(run.id, None)
    assert lines == ["from 0", "gate against shapes-4step"]
    assert run.store.log_lines(run.id, last_id) == ([], last_id)
    data, _ = run.store.metrics(run.id, None)
    assert [event["values"]["loss"] for event in data if event["values"]] == [1 / step for step in range(1, STEPS + 1)]
    assert [(one.stage, one.step) for one in run.store.checkpoints(run.id)] == [("matching", STEPS)]
    assert set(run.store.files(run.id)) == {"gate.md", "gate.json", "report.md"}
    assert run.store.file(run.id, "gate.md") == b"# stand-in\n"


# --- the gate, and what comes of it -----------------------------------------------------------------------------------


def test_a_student_is_published_with_its_verdict_and_waits_to_be_promoted(run):
    run.start_trainer("works")
    run.let_go()
    run.wait(Status.SUCCEEDED)
    record = run.record
    assert record.student_sha256 == sha256_of(run.folder / "student")
    assert (record.gate.passed, record.gate.refusals, record.gate.against) == (True, [], BUNDLED)
    [student] = run.releases.students()
    assert (student.sha256, student.distillation) == (record.student_sha256, run.id)
    assert (student.gate.passed, student.gate.against) == (True, BUNDLED)
    assert Storage(str(run.stack.storage)).exists(f"students/{record.student_sha256}.json")
    assert (record.release, run.releases.state().active) == (None, None)


def test_a_student_that_passes_is_promoted_where_that_was_asked_for(run):
    run.submit(promote="auto")
    run.start_trainer("works")
    run.let_go()
    run.wait(Status.SUCCEEDED)
    assert (run.record.release, run.record.note) == (1, None)
    assert run.releases.state().active == run.record.student_sha256
    [release] = run.releases.history()
    assert (release.by, release.forced) == (run.id, False)


def test_a_refused_student_is_kept_and_not_promoted(run):
    run.submit(promote="auto")
    run.start_trainer("fails_the_gate")
    run.wait(Status.SUCCEEDED)
    refusals = ["reference, motion: the videos stand still"]
    assert (run.record.gate.passed, run.record.gate.refusals, run.record.release) == (False, refusals, None)
    [student] = run.releases.students()
    assert student.gate.refusals == refusals
    assert run.releases.state().active is None


def test_it_is_held_against_the_student_that_was_promoted_last(run):
    run.submit(promote="auto")
    run.start_trainer("waits_at_the_gate")
    run.wait_for_the_gate()
    (run.folder / "pass").touch()
    run.wait(Status.SUCCEEDED)
    first = run.record.student_sha256
    run.submit()
    wait_for(run.folder.exists, 20, "the second run")
    (run.folder / "pass").touch()
    run.wait(Status.SUCCEEDED)
    assert run.record.gate.against == first  # fetched from the storage: no folder of this machine is it


def test_a_trainer_that_is_killed_at_the_gate_does_not_train_again(run):
    trainer = run.start_trainer("waits_at_the_gate")
    run.wait_for_the_gate()
    trainer.kill()
    wait_for(lambda: not run.processes(), 10, "the gate to die with it")
    (run.folder / "pass").touch()
    run.start_trainer("waits_at_the_gate")
    run.wait(Status.SUCCEEDED)
    assert (run.starts(), run.trials()) == ([0], ["shapes-4step", "shapes-4step"])
    assert run.store.log_lines(run.id, None)[0] == ["from 0", "gate against shapes-4step", "gate against shapes-4step"]


def test_a_verdict_that_is_there_is_not_asked_for_again(run):
    run.start_trainer("waits_at_the_gate")
    run.wait_for_the_gate()
    (run.folder / "pass").touch()
    run.wait(Status.SUCCEEDED)
    # As if it had been lost on its way into the record.
    over = (Status.SUCCEEDED,)
    run.store.records.change(run.record, over, status=Status.FAILED, error_code="x", error_message="x")
    go_on(run)
    run.wait(Status.SUCCEEDED)
    assert (run.starts(), run.trials()) == ([0], ["shapes-4step"])


def test_cancelling_at_the_gate_ends_it(run):
    run.start_trainer("waits_at_the_gate")
    run.wait_for_the_gate()
    run.store.cancel(run.id)
    run.wait(Status.CANCELLED)
    assert not run.processes()
    assert run.releases.students() == []


# --- stopping, and going on -------------------------------------------------------------------------------------------


def go_on(run) -> None:
    """Once the trainer has told the queue that the last attempt is over."""

    def taken() -> bool:
        try:
            return run.store.go_on(run.id).status is Status.QUEUED
        except ApiError as error:
            assert error.code == "in_flight"
            return False

    wait_for(taken, 10, "the last attempt to end")


def test_one_that_failed_goes_on_in_its_folder_when_asked_to(run):
    run.start_trainer("crashes_once")
    run.wait(Status.FAILED)
    assert run.store.log_lines(run.id, None)[0][-1] == "RuntimeError: the loss is not finite"
    before = len(run.store.log_lines(run.id, None)[0])
    go_on(run)
    run.wait(Status.SUCCEEDED)
    assert (run.record.attempt, run.starts()) == (1, [STEPS // 2])
    assert run.store.log_lines(run.id, None)[0][before:] == [f"from {STEPS // 2}", "gate against shapes-4step"]


def test_one_that_was_cancelled_goes_on_in_its_folder_when_asked_to(run):
    run.start_trainer("works")
    run.wait_until_it_works()
    with pytest.raises(ApiError) as caught:
        run.store.go_on(run.id)
    assert (caught.value.status, caught.value.code) == (409, "not_resumable")
    run.store.cancel(run.id)
    run.wait(Status.CANCELLED)
    go_on(run)
    run.wait(Status.SUCCEEDED)
    assert run.starts() == [0, STEPS // 2]


def test_a_teacher_that_this_trainer_has_not_is_named_with_those_that_it_has(run):
    run.store.records.change(run.record, (Status.QUEUED,), teacher="nobody")
    run.start_trainer("works")
    run.wait(Status.FAILED)
    assert run.record.error_code == "invalid_run"
    assert run.record.error_message == "this trainer has no teacher 'nobody'; it has shapes-teacher"


def test_the_trainer_says_what_it_has(run):
    run.start_trainer("works", TRAIN_POLICY="window", TRAIN_WINDOW="22:00-06:00", GPU_NAME="GPU-1")
    wait_for(run.store.offer, 20, "the offer")
    offer = run.store.offer()
    [teacher] = offer.teachers
    assert (teacher.name, teacher.sha256) == ("shapes-teacher", sha256_of(MODELS / "shapes-teacher"))
    assert (offer.recipes, offer.datasets) == (("shapes",), ("shapes",))
    assert (offer.policy, offer.window, offer.gpu) == ("window", "22:00-06:00", "GPU-1")


def test_outside_its_window_a_trainer_takes_nothing_and_ends_when_it_is_told_to(run):
    hour = local_time().hour
    window = f"{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00"
    trainer = run.start_trainer("works", TRAIN_POLICY="window", TRAIN_WINDOW=window, GPU_NAME="GPU-1")
    wait_for(run.store.offer, 20, "the offer")
    time.sleep(1.5)
    stop(trainer)
    assert trainer.returncode == 0
    assert (run.record.status, run.record.attempt) == (Status.QUEUED, 0)


def test_who_serves_first_stops_training_for_a_video(run):
    run.start_trainer("works", TRAIN_POLICY="serve-first", IDLE_S="1", GPU_NAME="GPU-1")
    run.wait_until_it_works()
    videos, waiting = Records(run.store._redis, Record), new_record()
    videos.create(waiting)
    run.wait(Status.QUEUED)
    assert (run.record.attempt, (run.folder / "checkpoint").read_text()) == (0, str(STEPS // 2))
    assert not run.processes()
    time.sleep(1.5)
    assert run.record.status is Status.QUEUED  # the video waits still
    videos.delete(waiting.id)
    run.wait(Status.SUCCEEDED)
    assert (run.record.attempt, run.starts()) == (1, [0, STEPS // 2])


def test_within_its_window_a_run_holds_the_gpu_for_as_long_as_it_trains(run):
    hour = local_time().hour
    window = f"{(hour - 1) % 24:02}:00-{(hour + 2) % 24:02}:00"
    run.start_trainer("works", TRAIN_POLICY="window", TRAIN_WINDOW=window, GPU_NAME="GPU-1")
    run.wait_until_it_works()
    assert run.store.recipes().gpu.owner == run.record.worker
    (run.folder / "go").touch()
    run.wait(Status.SUCCEEDED)
    assert not run.store._redis.exists(gpu_key("GPU-1"))


def test_cancelling_stops_a_run_at_a_checkpoint(run):
    run.start_trainer("works")
    run.wait_until_it_works()
    assert run.store.cancel(run.id).status is Status.CANCELLING
    run.wait(Status.CANCELLED)
    assert (run.folder / "checkpoint").read_text() == str(STEPS // 2)
    assert not run.processes()
    assert run.store._queue.count == 0


def test_a_run_that_does_not_stop_is_killed(run):
    run.start_trainer("is_deaf")
    run.wait_until_it_works()
    run.store.cancel(run.id)
    run.wait(Status.CANCELLED)
    assert not run.processes()


@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [
        ("refuses", "invalid_run", "nowhere is no model folder"),
        ("crashes", "run_crashed", "the run ended with exit code 1: RuntimeError: the loss is not finite"),
    ],
)
def test_a_run_that_fails_says_why_and_is_not_tried_again(run, behaviour, code, message):
    run.start_trainer(behaviour)
    run.wait(Status.FAILED)
    assert (run.record.error_code, run.record.error_message) == (code, message)
    assert (run.record.attempt, run.store._queue.count) == (1, 0)


def test_sigterm_hands_the_run_to_the_next_trainer(run):
    trainer = run.start_trainer("works")
    run.wait_until_it_works()
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(20) == 0
    assert (run.record.status, run.record.attempt) == (Status.QUEUED, 0)  # it was not lost, so it does not count
    assert not run.processes()
    run.start_trainer("works")
    run.wait(Status.SUCCEEDED)
    assert run.starts() == [0, STEPS // 2]


def test_a_killed_trainers_run_is_resumed_by_another(run):
    trainer = run.start_trainer("works")
    run.wait_until_it_works()
    trainer.kill()
    run.start_trainer("works")
    run.wait(Status.SUCCEEDED)
    assert run.starts() == [0, STEPS // 2]


def test_with_a_trainer_its_job_and_run_killed_the_lease_runs_out(run):
    trainer = run.start_trainer("works")
    run.wait_until_it_works()
    [job] = psutil.Process(trainer.pid).children()
    job.suspend()  # so that it cannot hand the run back
    trainer.kill()
    queue = make_queue(run.store._queue.connection, TRAIN_QUEUE)
    assert queue.acquire_maintenance_lock()  # as if it was killed while it looked for lost jobs
    job.kill()
    wait_for(lambda: not run.processes(), 10, "the run to die with them")
    assert run.record.status is Status.RUNNING
    run.start_trainer("works")
    run.wait(Status.SUCCEEDED)
    assert run.record.attempt == 2
    assert run.starts() == [0, STEPS // 2]


def test_a_killed_job_does_not_leave_its_run_behind(run):
    trainer = run.start_trainer("works")
    run.wait_until_it_works()
    [job] = psutil.Process(trainer.pid).children()
    job.kill()
    run.wait(Status.SUCCEEDED)  # the same trainer takes it up again; two runs at once would have refused
    assert run.record.attempt == 2
    assert trainer.poll() is None
    stop(trainer)


def test_a_run_that_is_killed_itself_is_resumed(run):
    run.start_trainer("works")
    run.wait_until_it_works()
    [process] = run.processes()
    process.kill()
    run.wait(Status.SUCCEEDED)
    assert run.record.attempt == 2
    assert run.starts() == [0, STEPS // 2]


def test_a_run_that_is_killed_three_times_is_given_up(run):
    run.start_trainer("is_deaf")
    for attempt in (1, 2, 3):
        wait_for(lambda n=attempt: run.record.attempt == n and run.processes(), 30, f"attempt {attempt}")
        [process] = run.processes()
        process.kill()
    run.wait(Status.FAILED)
    assert run.record.error_code == "worker_crashed"


def test_a_run_that_is_lost_three_times_is_given_up(run):
    trainer = run.start_trainer("is_deaf")
    for attempt in (1, 2, 3):
        wait_for(lambda n=attempt: run.record.attempt == n and run.processes(), 30, f"attempt {attempt}")
        [job] = psutil.Process(trainer.pid).children()
        job.kill()
    run.wait(Status.FAILED)
    assert (run.record.error_code, run.record.deaths) == ("worker_crashed", 3)
    assert run.record.error_message == "3 workers have died while they were at this distillation"
    assert not run.processes()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"LEASE_S": "none"}, "LEASE_S=none: "),
        ({"TRAIN_POLICY": "window"}, "TRAIN_WINDOW=None: Value error, TRAIN_POLICY=window needs one, for example"),
        ({"TEACHERS": "shapes-4step"}, "TEACHERS: "),
        ({"TEACHERS": "nowhere"}, "TEACHERS: "),
        ({"STORAGE_URL": "ftp://x"}, "STORAGE_URL=ftp://x: wanted a folder"),
    ],
)
def test_a_wrong_setting_ends_the_trainer_with_2_and_one_line(tmp_path, settings, says):
    done = run_with("worker.trainer", {"STORAGE_URL": str(tmp_path), **settings})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")
    assert len(done.stderr.splitlines()) == 1
