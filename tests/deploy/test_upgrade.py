"""One release beside the next on one Redis: what either writes the other reads, and leaves as it is.

`tests/golden/contract.json` is what the first release with these rules beside it (`worker/contract.py`) found in Redis;
it is never renewed, only added to. The last tests run that release itself, from git.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from service.distillations import DistillationStore
from service.events import _after
from tests.stack import ROOT, Stack, free_port, is_alive, wait_for
from worker import contract, releases
from worker.contract import (
    STUDENTS_KEY,
    WORKERS_KEY,
    GateSummary,
    JobRecord,
    Record,
    Status,
    WorkerState,
    record_key,
    run_files_key,
    worker_key,
)
from worker.records import connect, ready_workers, workers
from worker.releases import Releases, Student
from worker.storage import Storage

FIRST: dict[str, dict] = json.loads((Path(__file__).parent.parent / "golden" / "contract.json").read_text())
LATER = {"later": "a field that a later release has added"}
EVERY = pytest.mark.parametrize("name", list(FIRST))


def kind_of(name: str) -> type[BaseModel]:
    return getattr(contract, name, None) or getattr(releases, name)


def read(name: str, values: dict) -> BaseModel:
    kind = kind_of(name)
    return kind.from_hash(values) if issubclass(kind, JobRecord) else kind.model_validate_json(json.dumps(values))


def written(value: BaseModel) -> dict:
    return value.to_hash() if isinstance(value, JobRecord) else value.model_dump(mode="json")


# --- the contract -----------------------------------------------------------------------------------------------------


@EVERY
def test_what_the_first_release_wrote_is_read_and_means_the_same(name):
    after = written(read(name, FIRST[name]))
    assert {field: after[field] for field in FIRST[name]} == FIRST[name]


@pytest.mark.parametrize("name", ["Record", "ModelCard"])
def test_what_is_new_is_not_written_where_it_says_nothing(name):
    """Programs of that release read neither with a field that they do not know."""
    assert set(written(read(name, FIRST[name]))) <= set(FIRST[name])


@EVERY
def test_no_field_was_taken_away(name):
    computed = kind_of(name).model_computed_fields
    assert set(FIRST[name]) <= {*kind_of(name).model_fields, *computed}


@EVERY
def test_what_a_later_release_adds_is_not_in_the_way(name):
    assert read(name, FIRST[name] | LATER) == read(name, FIRST[name])


@pytest.mark.parametrize(
    ("name", "field", "wanted"),
    [
        ("Record", "phase", None),
        ("Distillation", "phase", None),
        ("Heartbeat", "state", WorkerState.LOADING),
        ("RunFile", "kind", "report"),
        ("Offer", "policy", "share"),
    ],
)
def test_a_new_word_for_how_things_are_is_read_as_a_known_one(name, field, wanted):
    found = read(name, FIRST[name] | {field: "teleporting"})
    assert getattr(found, field) == wanted
    others = {other: value for other, value in written(found).items() if other != field}
    assert others == {other: value for other, value in written(read(name, FIRST[name])).items() if other != field}


def test_how_far_a_worker_is_may_be_said_in_new_words():
    release = FIRST["Heartbeat"]["release"] | {"state": "teleporting", "how": "beamed", **LATER}
    found = read("Heartbeat", FIRST["Heartbeat"] | {"release": release}).release
    assert (found.state, found.how, found.wanted) == ("staging", None, release["wanted"])


def test_a_status_that_is_not_known_is_no_status():
    with pytest.raises(ValidationError):
        read("Record", FIRST["Record"] | {"status": "paused"})


# --- in Redis ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(records) -> Record:
    """A job that a later release has accepted."""
    record = Record.from_hash(FIRST["Record"] | {"status": "queued"})
    records.create(record)
    records.redis.hset(record_key(record.id), mapping=LATER)
    return record


def test_a_change_leaves_what_it_does_not_know(records, job):
    after = records.change(job, (Status.QUEUED,), status=Status.RUNNING, attempt=2)
    assert records.get(job.id) == after
    assert records.redis.hget(record_key(job.id), "later") == LATER["later"]


def test_a_change_of_a_later_release_is_followed(job):
    entry = {"data": json.dumps({"progress": 0.5, "phase": "teleporting", **LATER}), "status": "running"}
    after = _after(job, entry)
    assert (after.progress, after.phase, after.status) == (0.5, None, Status.RUNNING)


def test_a_worker_in_a_state_that_is_not_known_is_there_and_takes_no_jobs(redis):
    name = FIRST["Heartbeat"]["name"]
    redis.sadd(WORKERS_KEY, name)
    redis.set(worker_key(name), json.dumps(FIRST["Heartbeat"] | LATER))
    assert [worker.name for worker in ready_workers(redis)] == [name]
    redis.set(worker_key(name), json.dumps(FIRST["Heartbeat"] | {"state": "teleporting"}))
    assert [worker.name for worker in workers(redis)] == [name]
    assert ready_workers(redis) == []


def test_a_verdict_leaves_what_is_not_known_of_its_student(redis):
    redis.hset(STUDENTS_KEY, FIRST["Student"]["sha256"], json.dumps(FIRST["Student"] | LATER))
    student = Student.model_validate(FIRST["Student"])
    verdict = GateSummary.model_validate(FIRST["Student"]["gate"] | {"passed": False})
    after = Releases(redis).register(student.model_copy(update={"gate": verdict, "name": "is not news"}))
    assert after == student.model_copy(update={"gate": verdict})
    kept = json.loads(redis.hget(STUDENTS_KEY, student.sha256))
    assert kept == FIRST["Student"] | LATER | {"gate": verdict.model_dump(mode="json")}


def test_a_file_of_a_kind_that_is_not_known_is_listed(redis, redis_server, tmp_path):
    store = DistillationStore(redis, connect(redis_server.url, text=False), Storage(str(tmp_path)))
    redis.hset(run_files_key("dist_x"), "loss.vrml", json.dumps(FIRST["RunFile"] | {"kind": "hologram", **LATER}))
    assert store.files("dist_x")["loss.vrml"].kind == "report"


# --- the release before, as it was ------------------------------------------------------------------------------------

PREVIOUS = "67bc40dd7b2e"


@pytest.fixture(scope="module")
def previous(tmp_path_factory) -> Path:
    """Its tree."""
    folder = tmp_path_factory.mktemp("previous")
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", PREVIOUS], capture_output=True)
    if packed.returncode:
        pytest.skip(f"needs commit {PREVIOUS} in the history of this checkout: git fetch --unshallow")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


class Both:
    """One Redis and one storage; services and workers of either release. Each job waits for its gate."""

    def __init__(self, folder: Path, trees: dict[str, Path], image: bytes) -> None:
        self.stack = Stack(folder, LEASE_S="8", TMPDIR=str(folder))
        self.stack.redis.start()
        self.redis = connect(self.stack.redis.url)
        self.trees, self.image = trees, image
        self.gates = folder / "gates"
        self.gates.mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ids: dict[int, str] = {}

    def _spawn(self, release: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        self.stack.root = self.trees[release]
        process = self.stack.spawn(module, *arguments)
        self.processes.append(process)
        return process

    def worker(self, release: str) -> subprocess.Popen[bytes]:
        """One more, once it takes jobs."""
        before = len(ready_workers(self.redis))
        process = self._spawn(release, "tests.held_worker", str(self.gates), "one")
        wait_for(lambda: len(ready_workers(self.redis)) > before, 30, self.stack.log("tests.held_worker"))
        return process

    def service(self, release: str) -> tuple[subprocess.Popen[bytes], str]:
        """One more, and its address."""
        self.stack.environment["PORT"] = str(free_port())
        url = f"http://127.0.0.1:{self.stack.environment['PORT']}"
        process = self._spawn(release, "service")
        wait_for(lambda: is_alive(url), 30, f"the service:\n{self.stack.log('service')}")
        return process, url

    def submit(self, url: str, *seeds: int) -> None:
        for seed in seeds:
            form = {"prompt": "x", "seed": str(seed)}
            answer = httpx.post(f"{url}/generate", data=form, files={"image": self.image}, timeout=30)
            assert answer.status_code == 202, answer.text
            self.ids[seed] = answer.json()["id"]

    def said(self, line: str) -> int:
        log = self.gates / "log"
        return log.read_text().splitlines().count(line) if log.exists() else 0

    def reach(self, line: str) -> None:
        wait_for(lambda: self.said(line), 30, f"{line!r}:\n{self.stack.log('tests.held_worker')}")

    def go(self, *seeds: int) -> None:
        for seed in seeds:
            (self.gates / f"denoise-{seed}").touch()
            (self.gates / f"decode-{seed}").touch()

    def end(self, process: subprocess.Popen[bytes], times: int = 1) -> None:
        """SIGTERM, so often; rq takes two within a second for one."""
        for left in range(times - 1, -1, -1):
            process.send_signal(signal.SIGTERM)
            time.sleep(1.1 if left else 0)
        assert process.wait(30) in (0, -signal.SIGTERM)  # uvicorn ends by the signal once it is done

    def all_succeeded(self, url: str) -> None:
        """Every job, once: as the service at ``url`` says it, and as the storage has it."""
        self.go(*self.ids)

        def states() -> dict[int, str]:
            return {
                seed: httpx.get(f"{url}/generate/{job_id}", timeout=30).json()["status"]
                for seed, job_id in self.ids.items()
            }

        wanted = dict.fromkeys(self.ids, "succeeded")
        wait_for(lambda: states() == wanted, 60, f"{states()}:\n{self.stack.log('tests.held_worker')}")
        listed = httpx.get(f"{url}/generate?limit=100", timeout=30).json()["data"]
        assert {one["id"]: one["status"] for one in listed} == dict.fromkeys(self.ids.values(), "succeeded")
        files = {path.name for path in (self.stack.storage / "videos").iterdir()}
        assert files == {f"{job_id}.{suffix}" for job_id in self.ids.values() for suffix in ("mp4", "jpg", "json")}
        assert {self.said(f"decode {seed} ends") for seed in self.ids} == {1}
        assert self.redis.zcard("flg:slots") == 0
        assert self.redis.scard("flg:queued") == 0


@pytest.fixture
def both(tmp_path, previous, example_image):
    made = Both(tmp_path, {"previous": previous, "this": ROOT}, example_image.read_bytes())
    yield made
    for process in made.processes:
        process.kill()
        process.wait()
    made.stack.redis.stop()


EITHER_WAY = pytest.mark.parametrize(("before", "after"), [("previous", "this"), ("this", "previous")])


@pytest.mark.slow
@EITHER_WAY
@pytest.mark.parametrize("hurried", [False, True])
def test_workers_are_replaced_while_they_work(both, before, after, hurried):
    """The jobs at hand are finished by the old worker, or handed over to the new one."""
    _, url = both.service(before)
    old = both.worker(before)
    both.submit(url, 1, 2, 3)
    both.reach("denoise 1 begins")
    both.worker(after)
    both.reach("denoise 2 begins")
    if not hurried:
        both.go(1)
    both.end(old, times=2 if hurried else 1)
    both.submit(url, 4)
    both.all_succeeded(url)


@pytest.mark.slow
@EITHER_WAY
def test_services_are_replaced_while_workers_work(both, before, after):
    """What one has accepted the other shows, follows and cancels."""
    old, old_url = both.service(before)
    both.worker(before)
    both.submit(old_url, 1, 2, 3)
    both.reach("denoise 1 begins")
    _, url = both.service(after)
    both.submit(url, 4)
    with httpx.stream("GET", f"{url}/generate/{both.ids[1]}/events", timeout=30) as following:
        lines = following.iter_lines()
        both.end(old)
        cancelled = httpx.post(f"{url}/generate/{both.ids.pop(3)}/cancel", timeout=30)
        assert cancelled.json()["status"] == "cancelled"
        httpx.delete(f"{url}/generate/{cancelled.json()['id']}", timeout=30)
        both.go(1)
        assert any('"status":"succeeded"' in line.replace(": ", ":") for line in lines)
    both.submit(url, 5)
    both.all_succeeded(url)


@pytest.mark.slow
@EITHER_WAY
def test_a_queue_that_one_release_has_filled_is_worked_off_by_the_other(both, before, after):
    old, url = both.service(before)
    first = both.worker(before)  # no model is known before one was there
    both.end(first)
    both.submit(url, 1, 2, 3)
    both.end(old)
    _, url = both.service(after)
    both.worker(after)
    both.all_succeeded(url)
    starts = [both.redis.hget(record_key(both.ids[seed]), "started_at") for seed in (1, 2, 3)]
    assert starts == sorted(starts)


@pytest.mark.slow
def test_the_previous_trainer_and_this_service_agree_on_distillations(both):
    """And the reverse: what a trainer offers, and a distillation that is asked for."""
    for release in ("previous", "this"):
        both.redis.flushdb()
        both._spawn("this" if release == "previous" else "previous", "tests.stand_in", "trainer", "crashes")
        wait_for(lambda: both.redis.exists("flg:train:offer"), 30, "the trainer's offer")
        _, url = both.service(release)
        asked = {"recipe": "shapes", "preset": "smoke"}
        answer = httpx.post(f"{url}/admin/distillations", json=asked, timeout=30)
        assert answer.status_code == 202, answer.text
        one = f"{url}/admin/distillations/{answer.json()['id']}"
        wait_for(lambda one=one: httpx.get(one, timeout=30).json()["status"] == "failed", 30, "it to be over")
        both.processes[-2].kill()
