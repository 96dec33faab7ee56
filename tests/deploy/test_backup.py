"""Back-up and restore: what is kept and what makes itself anew; and a whole stack that is destroyed and comes back."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from redis import Redis

from deploy import stack as deployed
from service import backup
from service.auth import Keys, new_key
from service.backup import FOLDERS, BackupError
from service.ids import new_id
from tests.stack import free_port, new_record, wait_for
from tests.students import make_student
from worker.contract import KEYS_KEY, LINK_SECRET_KEY, Status, input_path, output_path, record_key
from worker.records import Records, connect, now
from worker.storage import Storage

NOT_KEPT = (
    "flg:workers",
    "flg:worker:one",
    "flg:courier",
    "flg:jobs:upkeep",
    "flg:rate:x",
    "flg:gpu:box",
    "rq:queue:gpu",
)


@pytest.fixture
def raw(redis_server, redis: Redis):
    """A client of the same empty Redis, which decodes nothing."""
    assert redis
    client = connect(redis_server.url, text=False)
    yield client
    client.close()


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def filled(records: Records, storage: Storage):
    """A Redis and a storage with something of everything; the finished job."""
    redis = records.redis
    Keys(redis).add(new_key(), "the shop", ("generate", "read"))
    waiting, done = new_record(), new_record()
    for record in (waiting, done):
        records.create(record)
        storage.write(input_path(record.id), b"picture")
    done = records.change(done, (Status.QUEUED,), status=Status.SUCCEEDED, finished_at=now())
    storage.write(output_path(done.id, "mp4"), b"video")
    storage.write("students/a.json", b"first")
    storage.write("blobs/0123", bytes(range(256)))
    redis.set(LINK_SECRET_KEY, "00" * 32)
    redis.set("flg:idempotent:x", "1", ex=3600)
    redis.set("flg:soon", "1", px=150)
    for key in NOT_KEPT:
        redis.set(key, "1")
    return done


def held(redis: Redis) -> dict[str, bytes]:
    return {key: redis.dump(key) for key in redis.keys("*")}


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_was_there_is_there_again(filled, redis, raw, storage, tmp_path):
    before, kept = held(raw), files(tmp_path / "storage")
    backup.backup(raw, storage, tmp_path / "kept")
    assert held(raw) == before
    redis.flushdb()
    time.sleep(0.15)
    other = Storage(str(tmp_path / "other"))
    said = backup.restore(raw, other, tmp_path / "kept")
    gone = {name.encode() for name in (*NOT_KEPT, "flg:soon", f"flg:job:{filled.id}:events")}
    assert {name: value for name, value in before.items() if name not in gone} == held(raw)
    assert said == f"restored: {len(held(raw))} keys, 5 files; 1 keys have run out since".removeprefix("restored: ")
    assert files(tmp_path / "other") == kept
    assert Records(redis, type(filled)).get(filled.id) == filled
    assert 3500 < redis.ttl("flg:idempotent:x") <= 3600
    assert redis.ttl(KEYS_KEY) == -1
    assert redis.ttl(record_key(filled.id)) > 7 * 24 * 3600


def test_nobody_else_reads_it(filled, raw, storage, tmp_path):
    backup.backup(raw, storage, tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "kept" / "redis.jsonl.gz").stat().st_mode & 0o777 == 0o600
    assert filled


def test_a_later_back_up_brings_the_folder_up_to_date(filled, raw, storage, tmp_path):
    backup.backup(raw, storage, tmp_path / "kept")
    storage.delete(input_path(filled.id))
    storage.write("students/a.json", b"second")
    storage.write("blobs/4567", b"new")
    (tmp_path / "storage" / "videos" / ".half.mp4.0123.tmp").write_bytes(b"half")
    said = backup.backup(raw, storage, tmp_path / "kept")
    assert said.endswith(", 2 new files")
    wanted = files(tmp_path / "storage")
    del wanted["videos/.half.mp4.0123.tmp"]
    assert files(tmp_path / "kept" / "storage") == wanted


def test_a_stack_that_has_lost_everything_does_not_replace_a_back_up(filled, redis, raw, storage, tmp_path):
    """The next one comes by the clock, after the disk was replaced and before anybody has restored it."""
    kept = tmp_path / "kept"
    backup.backup(raw, storage, kept)
    before = files(kept)
    empty = Storage(str(tmp_path / "not-mounted"))
    backup.backup(raw, empty, kept)  # Redis is there, and where the files were is another place
    assert {name: data for name, data in files(kept).items() if name.startswith("storage")} == {
        name: data for name, data in before.items() if name.startswith("storage")
    }
    before = files(kept)
    redis.flushdb()
    with pytest.raises(BackupError, match=r"holds nothing of ours, and .* holds a back-up"):
        backup.backup(raw, storage, kept)
    assert files(kept) == before
    assert filled


def test_a_restore_needs_an_empty_redis_and_may_be_run_again(filled, redis, raw, storage, tmp_path):
    backup.backup(raw, storage, tmp_path / "kept")
    with pytest.raises(BackupError, match="this Redis is in use"):
        backup.restore(raw, storage, tmp_path / "kept")
    redis.flushdb()
    redis.mset({"flg:restoring": "1", record_key(filled.id): "half"})  # one that was killed
    backup.restore(raw, storage, tmp_path / "kept")
    assert redis.hget(record_key(filled.id), "status") == "succeeded"
    assert not redis.exists("flg:restoring")


@pytest.mark.parametrize("damage", ["nothing", "cut", "format"])
def test_what_is_no_whole_back_up_is_refused(filled, redis, raw, storage, tmp_path, damage):
    assert filled
    backup.backup(raw, storage, tmp_path / "kept")
    redis.flushdb()
    file = tmp_path / "kept" / "redis.jsonl.gz"
    if damage == "nothing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.write_bytes(gzip.compress(json.dumps({"format": 2, "at": 0, "files": True}).encode()))
    with pytest.raises(BackupError, match="has format 2" if damage == "format" else "no whole back-up"):
        backup.restore(raw, storage, tmp_path / "kept")
    assert redis.dbsize() == 0


def test_files_may_be_left_to_others(filled, redis, raw, storage, tmp_path):
    assert filled
    backup.backup(raw, None, tmp_path / "kept")
    redis.flushdb()
    backup.restore(raw, storage, tmp_path / "kept")
    assert not (tmp_path / "kept" / "storage").exists()


def test_a_user_that_may_not_is_told_which_one_may(filled, redis, redis_server, storage, tmp_path):
    assert filled
    redis.execute_command("ACL", "SETUSER", "service", "on", ">x", "~*", "&*", "+@all", "-@dangerous", "-scan")
    client = connect(redis_server.url.replace(f":{redis_server.password}", "service:x", 1), text=False)
    for work in (backup.backup, backup.restore):
        backup.backup(connect(redis_server.url, text=False), storage, tmp_path / "kept")
        with pytest.raises(BackupError, match="name the one that administers Redis"):
            work(client, storage, tmp_path / "kept")


# --- a whole stack ----------------------------------------------------------------------------------------------------


class Machine:
    """What `make` does on one machine, in folders of its own."""

    def __init__(self, folder: Path, engines: Path) -> None:
        self.var, self.kept = folder / "var", folder / "kept"
        self.key = new_key()
        port = str(free_port())
        self.environment = {
            **os.environ,
            "VAR_DIR": str(self.var),
            "HOST": "127.0.0.1",
            "PORT": port,
            "AUTH": "on",
            "ADMIN_KEY": self.key,
            "MODEL": "shapes-4step",
            "ENGINES": str(engines),
            "MIN_FREE_BYTES": "0",
            "REDIS_URL": "",
            "TO": str(self.kept),
            "FROM": str(self.kept),
        }
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90, headers={"X-API-Key": self.key})

    def make(self, command: str) -> str:
        """One command of deploy/stack.py; what it said."""
        script = [sys.executable, deployed.__file__, command]
        done = subprocess.run(script, env=self.environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def processes(self):
        return deployed.Stack(self.var, "127.0.0.1", 8000, {}).processes()

    def run(self, module: str, *arguments: str) -> None:
        """A program with the settings of the running stack."""
        settings = next(one.environ() for one in self.processes() if "supervisord" in " ".join(one.cmdline()))
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, env=settings, cwd=deployed.ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def submit(self, image: bytes) -> str:
        form = {"prompt": "a red circle moves right quickly, static camera", "seed": "5"}
        answer = self.http.post("/generate", data=form, files={"image": ("in.png", image, "image/png")})
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def job(self, job_id: str) -> dict:
        return self.http.get(f"/generate/{job_id}").json()

    def finished(self, job_id: str) -> dict:
        wait_for(lambda: self.job(job_id)["status"] == "succeeded", 90, f"{job_id}: {self.job(job_id)}")
        return self.job(job_id)

    def serves(self, sha256: str) -> None:
        def served() -> bool:
            found = self.http.get("/admin/release").json()["workers"]
            return [one["loaded"] for one in found] == [sha256]

        wait_for(served, 90, f"the worker to have {sha256[:12]}")


@pytest.fixture
def machine(tmp_path, engines):
    made = Machine(tmp_path, engines)
    yield made
    made.http.close()
    for process in made.processes():
        with contextlib.suppress(Exception):
            process.kill()


@pytest.mark.slow
def test_a_stack_that_is_destroyed_comes_back(machine, example_image, tmp_path):
    image = example_image.read_bytes()
    student = make_student(tmp_path / "b", "shapes-b", 1.05)
    machine.make("up")
    machine.run("worker.release", "add", str(tmp_path / "b"))
    promoted = machine.http.post(f"/admin/students/{student.sha256}/promote", json={"force": True, "reason": "x"})
    assert promoted.is_success, promoted.text
    machine.serves(student.sha256)
    done = machine.finished(machine.submit(image))
    video = httpx.get(done["video_url"]).content
    machine.http.post("/admin/queue/pause")
    waiting = [machine.submit(image) for _ in range(3)]  # the worker may take one of them yet
    release = machine.http.get("/admin/release").json()["history"]

    assert str(machine.kept) in machine.make("backup")
    for process in machine.processes():
        process.kill()
    wait_for(lambda: not machine.processes(), 10, "all of it to be gone")
    assert {path.name for path in (machine.var / "storage").iterdir()} <= set(FOLDERS)
    shutil.rmtree(machine.var)
    orphan = new_id("vid")  # of a job that came after the moment of the back-up, and is long forgotten
    orphan = f"vid_{0:010d}{orphan[14:]}"
    (machine.kept / "storage" / "videos" / f"{orphan}.mp4").write_bytes(b"nobody's")

    assert "restored: " in machine.make("restore")
    machine.make("up")
    machine.serves(student.sha256)
    assert machine.http.get("/admin/release").json()["history"] == release
    assert machine.job(done["id"])["status"] == "succeeded"
    assert httpx.get(done["video_url"]).content == video  # the link of then, without a key
    for job_id in waiting:
        after = machine.finished(job_id)
        assert after["model"] == "shapes-b"
    wait_for(lambda: not (machine.var / "storage" / "videos" / f"{orphan}.mp4").exists(), 30, "the orphan to be swept")
    assert machine.http.get("/generate?limit=100").json()["data"][-1]["id"] == done["id"]
    machine.make("down")
