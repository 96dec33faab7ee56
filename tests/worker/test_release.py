"""Students as files, in a folder and in S3, and the releases in Redis: what is refused, and who wins."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill.student import FolderError, read_card
from tests.stack import run_with
from tests.students import BUNDLED, TEACHER, make_student, passed
from worker import release
from worker.contract import GateSummary, Heartbeat, ModelCard, WorkerState, model_id
from worker.records import connect, now, publish_models, served_models
from worker.release import StudentError, fetch, locate, publish, student_of
from worker.releases import NotPromoted, Releases, State
from worker.storage import Storage

pytest_plugins = ["tests.s3"]

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "s3"])
def storage(request, tmp_path):
    if request.param == "folder":
        return Storage(str(tmp_path / "storage"))
    return Storage(request.getfixturevalue("bucket"))


@pytest.fixture
def student(tmp_path):
    make_student(tmp_path / "student")
    return tmp_path / "student"


def test_a_student_comes_back_as_it_was_and_shares_what_is_the_same(storage, student, tmp_path):
    bundled, card = publish(storage, BUNDLED), publish(storage, student)
    assert len(storage.names("blobs")) == len({*bundled.files.values(), *card.files.values()})
    assert publish(storage, student) == card  # again is no matter
    cache = tmp_path / "cache"
    folders = [fetch(storage, one.sha256, cache) for one in (bundled, card)]
    assert [read_card(folder) for folder in folders] == [bundled, card]
    assert [folder.name for folder in folders] == [bundled.sha256, card.sha256]
    for name, is_same in (("vae/config.json", True), ("transformer/diffusion_pytorch_model.safetensors", False)):
        assert os.path.samefile(*(folder / name for folder in folders)) == is_same
    shutil.rmtree(folders[0])
    assert read_card(folders[1]) == card


def test_what_is_there_is_not_fetched_again_unless_it_was_changed(storage, student, tmp_path):
    card = publish(storage, student)
    folder = fetch(storage, card.sha256, tmp_path / "cache")
    inode = (folder / "model_index.json").stat().st_ino
    assert fetch(storage, card.sha256, tmp_path / "cache") == folder
    assert (folder / "model_index.json").stat().st_ino == inode
    (folder / "model_index.json").write_text("{}")
    assert read_card(fetch(storage, card.sha256, tmp_path / "cache")) == card


def test_a_large_file_goes_in_pieces_and_comes_back(storage, tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(110 * 2**20)  # s3fs sends two parts from 100 MiB on
        file.write(b"the end")
    storage.put_file("blobs/large", large)
    storage.get_file("blobs/large", tmp_path / "again")
    assert release.file_sha256(tmp_path / "again") == release.file_sha256(large)
    with pytest.raises(FileNotFoundError):
        storage.get_file("blobs/other", tmp_path / "other")


@pytest.mark.parametrize("broken", ["missing", "tampered", "card missing", "card of another"])
def test_what_is_not_whole_in_the_storage_is_refused_and_nothing_is_left(storage, student, tmp_path, broken):
    card, cache = publish(storage, student), tmp_path / "cache"
    weights = f"blobs/{card.files['transformer/diffusion_pytorch_model.safetensors']}"
    card_path = f"students/{card.sha256}.json"
    if broken == "missing":
        storage.delete(weights)
        says = f"is not in the storage .{weights}"
    elif broken == "tampered":
        data = bytearray(storage.read(weights))
        data[-1] ^= 1
        storage.write(weights, bytes(data))
        says = f"has other bytes in the storage than when it was added; remove {weights}"
    elif broken == "card missing":
        storage.delete(card_path)
        says = f"the storage has no student {card.sha256[:12]}"
    else:
        storage.write(card_path, storage.read(f"students/{publish(storage, BUNDLED).sha256}.json"))
        says = "is not the card of that student"
    with pytest.raises(StudentError, match=says) as caught:
        fetch(storage, card.sha256, cache)
    assert "\n" not in str(caught.value)
    assert os.listdir(cache) == ["lock"]


def test_a_model_folder_is_preferred_to_the_storage_while_it_is_whole(student, tmp_path):
    storage, cache = Storage(str(tmp_path / "storage")), tmp_path / "cache"
    card = read_card(student)
    assert locate(card.sha256, [TEACHER, student], storage, cache) == student
    publish(storage, student)
    (student / "model_index.json").write_text("{}")
    assert locate(card.sha256, [tmp_path / "nowhere", student], storage, cache) == cache / card.sha256
    with pytest.raises(FolderError, match="was changed after the folder was written"):
        publish(storage, student)


def test_what_a_dead_process_left_is_removed_and_two_at_once_fetch_once(student, tmp_path):
    storage, cache = Storage(str(tmp_path / "storage")), tmp_path / "cache"
    card = publish(storage, student)
    left = cache / f"{A}.tmp"
    left.mkdir(parents=True)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch(storage, card.sha256, cache), range(4)))
    assert set(folders) == {cache / card.sha256}
    assert not left.exists()


# --- releases --------------------------------------------------------------------------------------------------------


@pytest.fixture
def releases(redis):
    """Three students: A serves, B and C were held against it and passed."""
    made = Releases(redis)
    card = read_card(BUNDLED)
    for at, (sha256, gate) in enumerate(((A, None), (B, passed(A)), (C, passed(A)))):
        own = {"sha256": sha256, "name": sha256[0], "added_at": at}
        made.register(student_of(card, by="me", gate=gate).model_copy(update=own))
    return made


def verdict(releases, sha256, gate):
    releases.register(releases.find(sha256).model_copy(update={"gate": gate}))


def test_a_release_names_who_why_and_what_was_before(releases):
    assert releases.state() == State()
    one = releases.promote(B, by="key1", reason="better", serving=A)
    assert (one.number, one.action, one.sha256, one.name, one.previous) == (1, "promote", B, "b", A)
    assert (one.by, one.reason, one.forced, one.gate) == ("key1", "better", False, passed(A))
    assert releases.state() == State(number=1, active=B, previous=A, rolls_back_to=A)
    verdict(releases, C, passed(B))
    two = releases.promote(C, by="dist")
    assert releases.state() == State(number=2, active=C, previous=B, rolls_back_to=B)
    back = releases.roll_back(by="key2", reason="worse")
    assert (back.action, back.sha256, back.previous, back.name) == ("rollback", B, C, "b")
    assert releases.state() == State(number=3, active=B, previous=C, rolls_back_to=A)
    further = releases.roll_back(by="key2")
    assert releases.state() == State(number=4, active=A, previous=B)
    with pytest.raises(NotPromoted) as caught:
        releases.roll_back(by="key2")
    assert caught.value.code == "no_previous"
    assert releases.history() == [further, back, two, one]
    assert releases.history(1) == [further]


@pytest.mark.parametrize(
    ("sha256", "gate", "code", "says"),
    [
        ("d" * 64, None, "unknown_student", "there is no student dddddddddddd"),
        (A, None, "already_active", "a@aaaaaaaaaaaa is the active student already"),
        (B, None, "gate_missing", "the gate has not judged b@bbbbbbbbbbbb"),
        (
            B,
            GateSummary(passed=False, refusals=["too slow", "too dim"], against=A, recipe="shapes", at=0),
            "gate_refused",
            "the gate refuses b@bbbbbbbbbbbb: too slow; too dim",
        ),
        (B, passed(C), "gate_stale", "held b@bbbbbbbbbbbb against cccccccccccc, and aaaaaaaaaaaa is active now"),
    ],
)
def test_what_is_not_promoted_and_what_force_does_about_it(redis, releases, sha256, gate, code, says):
    if sha256 == B:
        redis.hset("flg:students", B, releases.find(B).model_copy(update={"gate": gate}).model_dump_json())
    with pytest.raises(NotPromoted, match=says) as caught:
        releases.promote(sha256, by="me", serving=A)
    assert caught.value.code == code
    assert releases.state() == State()
    assert releases.history() == []
    if code.startswith("gate"):
        assert releases.promote(sha256, by="me", force=True, serving=A).forced
        assert releases.history()[0].forced
    else:
        with pytest.raises(NotPromoted):
            releases.promote(sha256, by="me", force=True, serving=A)


def test_force_that_was_not_needed_is_not_recorded(releases):
    assert not releases.promote(B, by="me", force=True, serving=A).forced


def test_of_promotions_at_the_same_moment_one_wins(releases, redis_server):
    def promote(sha256):
        client = connect(redis_server.url)
        try:
            return Releases(client).promote(sha256, by=sha256, serving=A).sha256
        except NotPromoted as refused:
            return refused.code
        finally:
            client.close()

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(promote, [B, C] * 4))
    winner = releases.state().active
    assert said.count(winner) == 1
    assert set(said) - {winner} <= {"changed", "gate_stale", "already_active"}
    assert releases.state() == State(number=1, active=winner, previous=A, rolls_back_to=A)
    assert len(releases.history()) == 1


def test_a_roll_back_that_names_its_release_undoes_no_other(releases):
    releases.promote(B, by="me", serving=A)
    releases.promote(C, by="me", force=True)
    with pytest.raises(NotPromoted, match="release 1 is not the latest") as caught:
        releases.roll_back(by="me", number=1)
    assert caught.value.code == "changed"
    assert releases.roll_back(by="me", number=2).sha256 == B


def test_a_student_keeps_what_is_known_of_it_and_is_found_by_its_names(releases):
    before = releases.find(B)
    again = before.model_copy(update={"added_at": 1e12, "added_by": "else", "gate": None})
    assert releases.register(again) == before
    verdict(releases, B, passed(C))
    assert releases.find("b@bbbbbbbbbbbb").gate == passed(C)
    assert [one.sha256 for one in releases.students()] == [C, B, A]
    assert releases.find("bbbbbbbb").sha256 == B
    for text in ("bbbbbbb", "a@bbbbbbbbbbbb", "b", "", "dddddddd", "*"):
        assert releases.find(text) is None
    twin = before.model_copy(update={"sha256": "b" * 63 + "0"})
    releases.register(twin)
    assert releases.find("b" * 20) is None
    assert releases.find(B) == releases.find("b" * 64)


# --- which models can be asked for -----------------------------------------------------------------------------------


def card(sha256: str) -> ModelCard:
    known = read_card(BUNDLED)
    return ModelCard(
        name=sha256[0],
        sha256=sha256,
        task="ti2v",
        num_inference_steps=4,
        video=known.video.model_dump(),
        prompt=known.prompt,
    )


def worker(*sha256s: str) -> Heartbeat:
    ids = tuple(model_id(sha256[0], sha256) for sha256 in sha256s)
    said = {"model": ids[0][0], "model_sha256": sha256s[0], "models": ids, "engine": "none"}
    return Heartbeat(name="w", state=WorkerState.READY, started_at=now(), seen_at=now(), **said)


def test_the_release_says_which_model_answers_and_not_whoever_wrote_last(redis, releases):
    publish_models(redis, [card(A)])
    assert [one.name for one in served_models(redis, [])] == ["a"]
    releases.promote(B, by="me", serving=A)
    old, new = worker(A), worker(B, A)
    assert [one.name for one in served_models(redis, [old])] == ["a"]  # nobody has it yet
    publish_models(redis, [card(B), card(A)])
    publish_models(redis, [card(A)])  # a worker that could not load it starts
    for alive in ([old, new], [new, old]):  # under way: what all have, and the new one
        assert [one.name for one in served_models(redis, alive)] == ["b", "a"]
    assert [one.name for one in served_models(redis, [])] == ["b"]
    assert [one.name for one in served_models(redis, [new, worker(B)])] == ["b"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_adds_promotes_and_brings_back(redis, redis_server, student, tmp_path):
    where = {"REDIS_URL": redis_server.url, "STORAGE_URL": str(tmp_path / "storage")}

    def run(*arguments: object) -> tuple[int, str]:
        done = run_with("worker.release", where, *map(str, arguments))
        assert len(done.stderr.splitlines()) == (1 if done.returncode else 0)
        return done.returncode, done.stdout or done.stderr

    sha256 = read_card(student).sha256
    name = model_id("shapes-4step", sha256)
    assert run("list") == (0, "no student has been added yet\n")
    assert run("add", student) == (0, f"{name} {sha256}\n")
    assert run("add", tmp_path / "nowhere")[0] == 2
    code, said = run("promote", sha256[:8])
    assert (code, "has not judged" in said) == (3, True)
    assert run("promote", name, "--force", "--reason", "try it") == (0, f"release 1: {name}\n")
    assert " active " in run("list")[1]
    assert run("rollback")[0] == 3
    assert run("fetch", name, tmp_path / "out") == (0, f"{tmp_path / 'out' / sha256}\n")
    assert read_card(Path(tmp_path / "out" / sha256)).sha256 == sha256
    assert Releases(redis).history()[0].reason == "try it"
