"""The trainer as a process against a real Redis, its runs stand-ins: what ends a run, and what takes it over."""

import json
import signal
import time

import psutil
import pytest

from service.distillations import DistillationStore
from service.schema import DistillationFields
from tests.stack import Stack, run_with, stop, wait_for
from tests.stand_in import STEPS
from worker.contract import TRAIN_QUEUE, Progress, Status
from worker.queues import make_queue
from worker.records import connect
from worker.training import Tail, advance


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A Redis, and settings for trainers whose lease is short."""
    folder = tmp_path_factory.mktemp("own")
    running = Stack(folder, LEASE_S="4", RUNS=str(folder / "runs"))
    running.redis.start()
    yield running
    running.stop()


@pytest.fixture
def store(own):
    clients = connect(own.redis.url), connect(own.redis.url, text=False)
    yield DistillationStore(*clients)
    for client in clients:
        client.close()


@pytest.fixture
def run(own, store):
    """A distillation in the queue, and all that is needed to watch it; nothing of it is left running."""
    made = Run(own, store)
    yield made
    for process in made.trainers:
        process.kill()
        process.wait()
    for process in made.processes():
        process.kill()


class Run:
    """One distillation as a test sees it."""

    def __init__(self, stack: Stack, store: DistillationStore) -> None:
        self.stack, self.store = stack, store
        self.id = store.submit(DistillationFields(recipe="shapes", preset="smoke"), owner="local").id
        self.folder = stack.folder / "runs" / self.id
        self.trainers = []

    @property
    def record(self):
        return self.store.get(self.id)

    def start_trainer(self, behaviour: str):
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
        return [p for p in psutil.process_iter(["cmdline"]) if str(self.folder) in (p.info["cmdline"] or [])]

    def starts(self) -> list[int]:
        """The steps after which each start of the run began."""
        return [int(line.split()[1]) for line in (self.folder / "log.txt").read_text().splitlines()]


def test_a_run_is_followed_to_its_student(run):
    run.start_trainer("works")
    run.wait_until_it_works()
    assert (run.record.status, run.record.attempt, run.record.finished_at) == (Status.RUNNING, 1, None)
    (run.folder / "go").touch()
    run.wait(Status.SUCCEEDED)
    assert run.record.progress == Progress(stage="matching", step=STEPS, steps=STEPS, values={"loss": 1 / STEPS})
    assert (run.folder.parent / run.record.student).is_dir()
    assert run.record.created_at < run.record.started_at < run.record.finished_at


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


def test_a_run_that_is_lost_three_times_is_given_up(run, monkeypatch):
    trainer = run.start_trainer("is_deaf")
    for attempt in (1, 2, 3):
        wait_for(lambda n=attempt: run.record.attempt == n and run.processes(), 30, f"attempt {attempt}")
        [job] = psutil.Process(trainer.pid).children()
        job.kill()
    wait_for(lambda: not psutil.Process(trainer.pid).children(), 10, "the trainer to see it")
    monkeypatch.setattr("service.store.now", lambda: time.time() + 60)
    wait_for(run.store.reconcile, 10, "rq to give it up")
    assert (run.record.status, run.record.error_code) == (Status.FAILED, "worker_crashed")
    assert run.record.error_message == "every attempt at this distillation was lost"


def test_a_wrong_setting_ends_the_trainer_with_2_and_one_line():
    done = run_with("worker.trainer", {"LEASE_S": "none"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: LEASE_S=none: ")
    assert len(done.stderr.splitlines()) == 1


# --- what a run reports ----------------------------------------------------------------------------------------------


def line(stage: str, step: int, **values) -> bytes:
    return json.dumps({"time": 1.5, "stage": stage, "step": step, **values}).encode()


def test_values_are_kept_within_a_stage_and_begin_anew_with_the_next():
    first = advance(
        None, [line("pruning", 1, steps=4, loss=2.0, lr=1), line("pruning", 2, motion=0.5, alarm="too much")]
    )
    assert first == Progress(stage="pruning", step=2, steps=4, values={"loss": 2.0, "lr": 1.0, "motion": 0.5})
    assert advance(first, [line("student", 1)]) == Progress(stage="student", step=1, steps=None, values={})
    assert advance(first, []) == first


def test_what_cannot_be_read_is_passed_over():
    lines = [
        line("matching", 3, loss=0.5),
        b'{"time": 1.5, "stage": "mat',
        b"[]",
        line("matching", 4, loss=float("nan")),
    ]
    assert advance(None, lines) == Progress(stage="matching", step=4, steps=None, values={"loss": 0.5})


def test_only_complete_lines_are_read_and_each_once(tmp_path):
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.lines() == []
    for text, seen in [("one\ntw", [b"one"]), ("", []), ("o\nthree\n", [b"two", b"three"]), ("", [])]:
        with path.open("a") as file:
            file.write(text)
        assert tail.lines() == seen
