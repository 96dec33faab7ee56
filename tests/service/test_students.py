"""Another student is served while requests come: promoted, rolled back, pinned, and what happens when it is broken.

One stack in the order of a story, as each release stands on the one before.
"""

import os
import shutil
import threading
import time

import httpx
import pytest

from distill.student import read_card
from tests.stack import Stack, run_with, stop, wait_for
from tests.students import BUNDLED, make_student, passed
from worker.contract import model_id
from worker.records import connect
from worker.releases import Releases

PROMPT = "a red circle moves right quickly, static camera"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
A = read_card(BUNDLED)


class Admin:
    """A stack, its students and what an administrator and a client do with them."""

    def __init__(self, folder, engines):
        self.stack = Stack(folder, STUDENTS=str(folder / "students"), ENGINES=str(engines))
        self.http = httpx.Client(base_url=self.stack.url, timeout=90)
        self.image = (BUNDLED.parent / "examples" / "red-circle.png").read_bytes()
        self.b = make_student(folder / "b", "shapes-b", 1.05)
        self.c = make_student(folder / "c", factor=1.1)
        self.broken = make_student(folder / "broken", factor=1.15)

    def add(self, name):
        """A folder into the storage and the registry."""
        where = {"REDIS_URL": self.stack.redis.url, "STORAGE_URL": str(self.stack.storage)}
        assert run_with("worker.release", where, "add", str(self.stack.folder / name)).returncode == 0

    def promote(self, card, **body):
        return self.http.post(f"/admin/students/{card.sha256}/promote", json=body)

    def release(self):
        return self.http.get("/admin/release").json()

    def worker(self):
        """What the only worker says; nothing while there is none."""
        return next(iter(self.release()["workers"]), {"state": "gone"})

    def wait_for(self, card, state="loaded", seconds=60):
        def there():
            one = self.worker()
            return one["state"] == state and (state != "loaded" or one["loaded"] == card.sha256)

        wait_for(there, seconds, f"the worker to have {card.sha256[:12]} {state}: {self.stack.log('worker')}")
        time.sleep(1.1)  # the service looks once a second
        return self.worker()

    def submit(self, **fields):
        files = {"image": ("in.png", self.image, "image/png")}
        return self.http.post("/generate", data={"prompt": PROMPT, "seed": "5", **fields}, files=files)

    def finish(self, job_id):
        def over():
            return self.http.get(f"/generate/{job_id}").json()["status"] in ("succeeded", "failed")

        wait_for(over, 60, f"{job_id} to be over")
        return self.http.get(f"/generate/{job_id}").json()

    def make(self, **fields):
        """A video of seed 5: its record and its bytes."""
        answer = self.submit(**fields)
        assert answer.status_code == 202, answer.text
        record = self.finish(answer.json()["id"])
        assert record["status"] == "succeeded", record
        return record, self.http.get(record["video_url"]).content

    def pause(self):
        """Have no job begun; the one that the worker waits for already it may take yet."""
        self.http.post("/admin/queue/pause")
        self.submit()

    def models(self):
        return [one["id"] for one in self.http.get("/models").json()["data"]]


def id_of(card):
    return model_id(card.name, card.sha256)


@pytest.fixture(scope="module")
def admin(tmp_path_factory, engines):
    made = Admin(tmp_path_factory.mktemp("released"), engines)
    try:
        made.stack.start()
        yield made
    finally:
        made.http.close()
        made.stack.stop()


@pytest.fixture(scope="module")
def by_a(admin):
    """What A makes of seed 5."""
    record, video = admin.make()
    assert (record["model"], record["model_sha256"], record["engine"]) == ("shapes-4step", A.sha256, "ort-cpu")
    return video


def test_before_a_release_the_first_of_model_serves(admin):
    students = admin.http.get("/admin/students").json()
    [only] = students["data"]
    assert (only["sha256"], only["model"], only["status"], only["workers"]) == (A.sha256, id_of(A), "active", 1)
    assert (students["active"], students["previous"]) == (A.sha256, None)
    release = admin.release()
    assert (release["number"], release["history"]) == (0, [])
    assert release["workers"][0]["loaded"] == A.sha256
    refused = admin.http.post("/admin/students/rollback")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_previous")
    assert admin.models() == [id_of(A)]


def test_without_a_verdict_it_is_not_promoted(admin):
    admin.add("b")
    assert admin.http.get(f"/admin/students/{admin.b.sha256[:8]}").json()["status"] == "available"
    refused = admin.promote(admin.b)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "gate_missing")
    refused = admin.http.post("/admin/students/shapes-b@000000000000/promote", json={})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_student")
    assert admin.http.get("/admin/students/unknown").status_code == 404
    refused = admin.promote(admin.b, force="yes please")
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "force")
    assert admin.release()["number"] == 0


def promote_under_load(admin, card, **body):
    """Promote while two clients ask for one video after another; the release, the worker, and what they got."""
    made, ended = [], threading.Event()

    def keep_asking():
        while not ended.is_set():
            made.append(admin.make())

    asking = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        wait_for(lambda: len(made) >= 2, 60, "jobs before")
        answer = admin.promote(card, **body)
        assert answer.status_code == 200, answer.text
        worker = admin.wait_for(card)
        before = len(made)
        wait_for(lambda: len(made) >= before + 3, 60, "jobs after")
    finally:
        ended.set()
        for thread in asking:
            thread.join()
    return answer.json(), worker, made


def videos_by(made, *cards):
    """The different videos that each student has made."""
    videos = {card.sha256: set() for card in cards}
    names = {card.sha256: card.name for card in cards}
    for record, video in made:
        videos[record["model_sha256"]].add(video)
        assert record["model"] == names[record["model_sha256"]]
    return [videos[card.sha256] for card in cards]


def test_a_promotion_under_load_fails_no_job(admin, by_a):
    release, worker, made = promote_under_load(admin, admin.b, force=True, reason="to see")
    assert (worker["how"], worker["message"]) == ("refit", None)
    assert 0 < worker["seconds"] < 60
    assert (release["number"], release["forced"], release["reason"]) == (1, True, "to see")
    assert (release["previous"], release["by"], release["gate"]) == (A.sha256, "local", None)
    assert admin.release()["history"] == [release]
    of_a, of_b = videos_by(made, A, admin.b)
    assert of_a == {by_a}
    assert len(of_b) == 1
    assert by_a not in of_b
    for record, _ in made[-1:]:
        manifest = admin.http.get(record["manifest_url"]).json()
        assert (manifest["model_sha256"], manifest["engine"]) == (admin.b.sha256, record["engine"])


def test_the_one_before_can_be_asked_for_by_name_and_exactly(admin, by_a):
    assert admin.models() == [id_of(admin.b), id_of(A)]
    for name in (id_of(A), "shapes-4step"):
        record, video = admin.make(model=name)
        assert (record["model_sha256"], video) == (A.sha256, by_a)
    assert admin.make(model="shapes-b")[0]["model_sha256"] == admin.b.sha256
    assert [one["id"] for one in admin.http.get("/v1/models").json()["data"]] == ["shapes-b", id_of(A)]
    assert admin.http.get(f"/v1/models/{id_of(A)}").json()["id"] == id_of(A)
    refused = admin.submit(model="shapes-c").json()["error"]
    assert (refused["code"], refused["param"]) == ("unknown_model", "model")
    there = f"'shapes-b', 'shapes-4step', '{id_of(admin.b)}', '{id_of(A)}'"
    assert refused["message"] == f"model: got 'shapes-c'; the models that can be asked for are {there}"
    states = {
        one["sha256"]: (one["status"], one["workers"]) for one in admin.http.get("/admin/students").json()["data"]
    }
    assert states == {A.sha256: ("previous", 1), admin.b.sha256: ("active", 1)}


def test_a_roll_back_is_at_once_and_as_it_was(admin, by_a):
    began = time.monotonic()
    answer = admin.http.post("/admin/students/rollback", json={"reason": "seen", "number": 1})
    assert (answer.status_code, answer.json()["sha256"]) == (200, A.sha256)
    worker = admin.wait_for(A, seconds=5)
    assert time.monotonic() - began < 5
    assert (worker["how"], worker["seconds"] < 1) == ("loaded", True)
    assert admin.make()[1] == by_a
    again = admin.http.post("/admin/students/rollback", json={"number": 1})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "changed")


def test_what_waits_is_made_by_the_student_that_is_active_by_then(admin):
    """Accepted by the name of the active one. A pin holds until its student is dropped, and says so then."""
    redis = connect(admin.stack.redis.url)
    admin.pause()
    unpinned = admin.submit(model="shapes-4step").json()["id"]
    of_a, of_b = (admin.submit(model=id_of(card)).json()["id"] for card in (A, admin.b))
    releases = Releases(redis)
    assert releases.promote(admin.b.sha256, by="test", force=True)
    admin.wait_for(admin.b)
    admin.add("c")
    releases.register(releases.find(admin.c.sha256).model_copy(update={"gate": passed(admin.b.sha256)}))
    answer = admin.promote(admin.c)
    assert (answer.status_code, answer.json()["forced"]) == (200, False)
    admin.wait_for(admin.c)
    dropped = admin.submit(model=id_of(A))
    assert (dropped.status_code, dropped.json()["error"]["code"]) == (422, "unknown_model")
    admin.http.post("/admin/queue/resume")
    assert admin.finish(unpinned)["model_sha256"] == admin.c.sha256
    assert admin.finish(of_b)["model_sha256"] == admin.b.sha256
    error = admin.finish(of_a)["error"]
    assert error["code"] == "model_gone"
    served = f"{id_of(admin.c)}, {id_of(admin.b)}"
    told = f"{id_of(A)} was replaced while this job waited; served now are {served}; send it again with one of them"
    assert error["message"] == told
    redis.close()


def test_one_that_cannot_be_loaded_leaves_what_is_served(admin):
    admin.add("broken")
    blob = admin.stack.storage / "blobs" / admin.broken.files[WEIGHTS]
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert admin.promote(admin.broken, force=True).status_code == 200
    worker = admin.wait_for(admin.c, state="failed")
    assert worker["loaded"] == admin.c.sha256
    assert f"{WEIGHTS} of shapes-4step has other bytes in the storage" in worker["message"]
    record, _ = admin.make()
    assert record["model_sha256"] == admin.c.sha256
    assert not (admin.stack.folder / "students" / admin.broken.sha256).exists()
    assert admin.stack.log("worker").count("cannot be served") == 1


@pytest.mark.slow
def test_what_was_repaired_is_tried_again(admin):
    blob = admin.stack.storage / "blobs" / admin.broken.files[WEIGHTS]
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    admin.wait_for(admin.broken)
    assert admin.make()[0]["model_sha256"] == admin.broken.sha256


@pytest.mark.slow
def test_a_graph_that_is_new_is_built_while_jobs_go_on(admin):
    """The export takes longer than many jobs, and changes nothing of what they make."""
    shorter = make_student(admin.stack.folder / "shorter", "shorter", without_last=True)
    admin.add("shorter")
    _, worker, made = promote_under_load(admin, shorter, force=True)
    assert worker["how"] == "build"
    before, after = videos_by(made, admin.broken, shorter)
    assert (len(before), len(after)) == (1, 1)
    assert admin.http.post("/admin/students/rollback").status_code == 200
    admin.wait_for(admin.broken)


@pytest.mark.slow
def test_a_worker_that_starts_has_the_released_one_or_says_why_not(admin):
    stop(admin.stack.processes["worker"])
    admin.stack.spawn("worker")
    worker = admin.wait_for(admin.broken)
    assert worker["how"] == "loaded"
    assert admin.models() == [id_of(admin.broken), model_id("shorter", admin.release()["previous"])]

    stop(admin.stack.processes["worker"])
    shutil.rmtree(admin.stack.folder / "students")
    os.remove(admin.stack.storage / "blobs" / admin.broken.files[WEIGHTS])
    admin.stack.spawn("worker")
    worker = admin.wait_for(admin.broken, state="failed")
    wait_for(lambda: admin.worker()["loaded"], 60, "the first of MODEL to be loaded")
    assert admin.worker()["loaded"] == A.sha256
    assert "is not in the storage" in admin.worker()["message"]
    time.sleep(1.1)
    assert admin.make()[0]["model_sha256"] == A.sha256
