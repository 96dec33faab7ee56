"""What a worker has loaded as releases come and go, with models of nothing: what is kept, dropped and tried again."""

import weakref
from types import SimpleNamespace

import pytest

from distill.student import FolderError, read_card
from tests.stack import RedisServer, wait_for
from tests.students import BUNDLED, make_student
from worker import jobs
from worker.contract import Heartbeat, ModelCard, Record, WorkerState, model_id
from worker.gpu_worker import Pulse
from worker.records import Records, connect, now
from worker.release import publish, student_of
from worker.releases import Releases
from worker.staging import Places, Stager
from worker.storage import Storage


class Nothing:
    """Stands where `VideoPipeline` stands."""

    choice = SimpleNamespace(name="none", reason=None, made="refit")

    def __init__(self, folder):
        self.card = read_card(folder)
        known = self.card.model_dump(include={"name", "sha256", "task", "prompt", "video"})
        self.model_card = ModelCard(**known, sha256=self.card.sha256, num_inference_steps=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three students, none of them the worker's own."""
    made = [tmp_path_factory.mktemp("students") / name for name in "bcd"]
    for factor, folder in enumerate(made):
        make_student(folder, folder.name, 1.1 + factor / 10)
    return made


class World:
    """A worker's stager, and who promotes."""

    def __init__(self, redis, folder, folders, **settings):
        self.releases, self.storage = Releases(redis), Storage(str(folder / "storage"))
        self.a, *self.others = (read_card(one) for one in (BUNDLED, *folders))
        for one in folders:
            self.releases.register(student_of(publish(self.storage, one), by="me"))
        self.loads, self.broken = [], set()
        places = Places(models=(BUNDLED,), storage=self.storage, students=folder / "cache")
        self.stager = Stager(self.releases, places, self.load, **{"keep_previous": True, **settings})
        beat = Heartbeat(
            name="w", state=WorkerState.READY, model="", model_sha256="", engine="", started_at=now(), seen_at=now()
        )
        self.pulse = Pulse(redis, beat, 60)
        self.runtime = jobs.Runtime("w", self.stager.begin(), Records(redis, Record), self.storage)
        self.redis = redis

    def load(self, folder):
        made = Nothing(folder)
        self.loads.append(made.card.name)
        if made.card.name in self.broken:
            raise FolderError("it is\nbroken")
        return made

    def follow(self, *, alone=True):
        if alone:
            self.stager.start = lambda: None
        self.stager.follow(self.runtime, self.pulse)

    def promote(self, card):
        self.releases.promote(card.sha256, by="me", force=True, serving=self.a.sha256)

    def look(self):
        """Names of what is loaded after the next look, the active one first."""
        self.stager._look()
        self.stager._look()
        return [one.card.name for one in self.runtime.loaded.pipelines]

    def said(self):
        return Heartbeat.model_validate_json(self.redis.get("flg:worker:w"))


@pytest.fixture
def world(redis, tmp_path, folders):
    made = World(redis, tmp_path, folders)
    made.follow()
    return made


def test_the_one_before_stays_and_older_ones_go(world):
    b, c, _ = world.others
    assert world.look() == ["shapes-4step"]
    assert world.said().release is None
    world.promote(b)
    assert world.look() == ["b", "shapes-4step"]
    said = world.said()
    assert (said.model, said.models) == ("b", (model_id("b", b.sha256), model_id("shapes-4step", world.a.sha256)))
    assert (said.release.state, said.release.how, said.release.wanted) == ("loaded", "refit", b.sha256)
    first = weakref.ref(world.runtime.loaded.previous)
    world.promote(c)
    assert world.look() == ["c", "b"]
    assert first() is None
    world.releases.roll_back(by="me")
    assert world.look() == ["b", "c"]
    assert world.said().release.how == "loaded"
    world.releases.roll_back(by="me")  # to what is loaded no longer: its folder is the worker's own
    assert world.look() == ["shapes-4step", "b"]
    assert world.loads == ["shapes-4step", "b", "c", "shapes-4step"]
    assert world.storage.exists(f"students/{world.a.sha256}.json")  # other workers can go back to it


def test_two_releases_in_a_row_leave_what_they_say(world):
    b, c, _ = world.others
    world.promote(b)
    world.promote(c)
    assert world.look() == ["c", "b"]


def test_what_fails_is_tried_again_later_and_at_once_after_a_release(world, caplog):
    b, c, _ = world.others
    world.broken.add("b")
    world.promote(b)
    assert world.look() == ["shapes-4step"]
    said = world.said()
    assert (said.release.state, said.release.message, said.model) == ("failed", "it is", "shapes-4step")
    assert (world.loads.count("b"), caplog.text.count("cannot be served")) == (1, 1)
    world.promote(c)
    assert world.look() == ["c"]  # the one before cannot be had
    assert world.loads.count("b") == 2
    world.broken.clear()
    world.releases.roll_back(by="me")
    assert world.look() == ["b", "c"]


def test_a_roll_back_of_what_could_not_be_loaded_ends_the_complaint(world):
    world.broken.add("b")
    world.promote(world.others[0])
    world.look()
    world.releases.roll_back(by="me")
    assert world.look() == ["shapes-4step"]
    assert (world.said().release.state, world.said().release.message) == ("loaded", None)


def test_without_keep_previous_one_is_loaded(redis, tmp_path, folders):
    world = World(redis, tmp_path, folders, keep_previous=False)
    world.follow()
    world.promote(world.others[0])
    assert world.look() == ["b"]


def test_a_worker_begins_with_what_is_released(redis, tmp_path, folders):
    first = World(redis, tmp_path, folders)
    first.promote(first.others[0])
    first.promote(first.others[1])
    later = World(redis, tmp_path, folders)
    later.follow()
    assert later.loads == ["c", "b"]
    assert later.said().release.state == "loaded"
    assert later.look() == ["c", "b"]


def test_while_redis_is_away_it_goes_on_and_then_it_catches_up(tmp_path, folders):
    server = RedisServer(tmp_path / "redis")
    server.start()
    redis = connect(server.url, patience=1)
    try:
        world = World(redis, tmp_path, folders)
        world.follow(alone=False)
        server.stop()
        wait_for(lambda: _is_away(redis), 10, "Redis to be away")
        server.start()
        world.promote(world.others[0])
        wait_for(lambda: world.runtime.loaded.active.card.name == "b", 10, "the stager to catch up")
        wait_for(lambda: world.said().model == "b", 10, "the heartbeat")
    finally:
        redis.close()
        server.stop()


def _is_away(redis):
    try:
        return not redis.ping()
    except Exception:
        return True
