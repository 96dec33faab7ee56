"""A local folder and a real S3 server behind one face; nothing half-written is ever seen, and nothing is remembered."""

import json
import os
import re
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.stack import free_port, run_with
from worker.storage import Storage, StorageError, main

pytest_plugins = ["tests.s3"]

DOCS = Path(__file__).resolve().parents[2] / "docs" / "storage.md"
BAD_PATHS = [
    "",
    "videos",
    "videos/",
    "/etc/passwd",
    "videos/..",
    "videos/.",
    "../x",
    "videos/../../x",
    "videos/a/b",
    "VIDEOS/a.mp4",
    "videos/a b",
    "videos/ä.mp4",
    "videos/a\n",
    "videos/a\0",
    "videos/a?versionId=1",
    "videos/" + 201 * "a",
    "videos//a",
    "videos\\a",
]


@pytest.fixture
def remote(bucket) -> Storage:
    return Storage(f"{bucket}/some/prefix")


@pytest.fixture(params=["folder", "s3"])
def storage(request, tmp_path) -> Storage:
    return Storage(str(tmp_path / "files")) if request.param == "folder" else request.getfixturevalue("remote")


# --- either -----------------------------------------------------------------------------------------------------------


def test_write_read_replace_delete(storage):
    assert not storage.exists("videos/a.mp4")
    storage.write("videos/a.mp4", b"one")
    storage.write("videos/a.mp4", b"two")
    assert storage.exists("videos/a.mp4")
    assert storage.read("videos/a.mp4") == b"two"
    storage.delete("videos/a.mp4")
    storage.delete("videos/a.mp4")  # that it is gone is no error
    assert not storage.exists("videos/a.mp4")
    with pytest.raises(FileNotFoundError):
        storage.read("videos/a.mp4")


def test_names_are_those_of_one_folder(storage):
    assert storage.names("videos") == []
    for path in ("videos/a.mp4", "videos/.a.mp4.0123abcd.tmp", "inputs/a.png"):
        storage.write(path, b"x")
    assert sorted(storage.names("videos")) == [".a.mp4.0123abcd.tmp", "a.mp4"]
    assert storage.names("inputs") == ["a.png"]


def test_many_are_deleted_at_once_those_that_are_not_there_among_them(storage):
    storage.write("videos/a.mp4", b"x")
    storage.write("videos/b.mp4", b"x")
    storage.delete_many([])
    storage.delete_many(["videos/a.mp4", "inputs/none.png"])
    assert storage.names("videos") == ["b.mp4"]


def test_paths_of_another_form_are_refused(storage):
    calls = [storage.read, storage.exists, storage.delete, storage.local_path, lambda path: storage.write(path, b"x")]
    calls += [lambda path: storage.delete_many([path]), lambda path: storage.signed_url(path, 1)]
    for path in BAD_PATHS:
        for call in calls:
            with pytest.raises(ValueError, match="is no path of the storage"):
                call(path)


def test_only_plain_folders_are_listed(storage):
    for folder in ("", ".", "..", "/", "videos/a", "../videos"):
        with pytest.raises(ValueError, match="is no folder"):
            storage.names(folder)


def test_a_place_that_works_passes_the_check_and_keeps_nothing_of_it(storage):
    storage.check()
    assert storage.names("inputs") == []


def test_threads_share_one_storage(storage):
    def work(number: int) -> bytes:
        storage.write(f"videos/{number}.mp4", bytes([number]) * 1000)
        assert f"{number}.mp4" in storage.names("videos")
        return storage.read(f"videos/{number}.mp4")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(16)))
    assert found == [bytes([number]) * 1000 for number in range(16)]


@pytest.mark.parametrize("url", ["gs://bucket", "s3://", "s3://b", "s3://Bucket", "s3://bucket/..", "s3://bucket/a//b"])
def test_what_is_no_place_is_refused_at_once(url):
    with pytest.raises(StorageError, match=f"^STORAGE_URL={url}: wanted"):
        Storage(url)


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_only_a_folder_has_paths_and_a_disk(tmp_path, remote):
    local = Storage(str(tmp_path))
    assert local.local_path("videos/a.mp4") == tmp_path / "videos/a.mp4"
    assert local.free_bytes() > 0
    assert local.lifecycle(14) == []
    assert local.links_origin() is None
    assert remote.local_path("videos/a.mp4") is None
    assert remote.free_bytes() is None


def test_a_folder_may_be_relative_or_a_file_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Storage("var/storage").write("videos/a.mp4", b"x")
    monkeypatch.chdir("/")
    assert Storage(f"file://{tmp_path}/var/storage").read("videos/a.mp4") == b"x"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.write("videos/a.mp4", b"old")

    def disk_full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worker.storage.os.fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        storage.write("videos/a.mp4", b"new")
    assert storage.read("videos/a.mp4") == b"old"
    assert [p.name for p in (tmp_path / "videos").iterdir()] == ["a.mp4"]


def test_nobody_else_reads_a_file(tmp_path):
    storage = Storage(str(tmp_path / "files"))
    storage.write("videos/a.mp4", b"x")
    modes = [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("files", "files/videos", "files/videos/a.mp4")]
    assert not any(mode & 0o027 for mode in modes), modes


def test_links_out_of_the_folder_are_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.mp4").write_bytes(b"secret")
    storage = Storage(str(tmp_path / "files"))
    storage.write("inputs/kept.png", b"x")
    (tmp_path / "files" / "inputs" / "a.png").symlink_to(outside / "a.mp4")
    (tmp_path / "files" / "videos").symlink_to(outside)
    for call in (storage.read, storage.exists, storage.delete, lambda path: storage.write(path, b"x")):
        for path in ("inputs/a.png", "videos/a.mp4"):
            with pytest.raises(ValueError, match="leads out of the storage"):
                call(path)
    with pytest.raises(ValueError, match="leads out of the storage"):
        storage.names("videos")
    assert storage.names("inputs") == ["kept.png"]
    assert (outside / "a.mp4").read_bytes() == b"secret"


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "files").symlink_to(tmp_path / "disk")
    Storage(str(tmp_path / "files")).write("videos/a.mp4", b"x")
    assert (tmp_path / "disk" / "videos" / "a.mp4").read_bytes() == b"x"


def test_a_folder_that_cannot_be_used_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^STORAGE_URL=.*/file: cannot make files there \(File exists\); name a"):
        Storage(str(tmp_path / "file"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "inputs").write_text("")
    with pytest.raises(StorageError, match=r"^STORAGE_URL=.*/files: cannot write files there \(File exists\); name a"):
        Storage(str(tmp_path / "files")).check()


# --- a bucket ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("videos/a.mp4", "video/mp4"),
        ("videos/a.jpg", "image/jpeg"),
        ("videos/a.json", "application/json"),
        ("inputs/a.png", "image/png"),
    ],
)
def test_a_presigned_link_needs_no_credentials_and_says_what_it_gives(remote, path, kind):
    remote.write(path, bytes(range(200)))
    answer = httpx.get(remote.signed_url(path, 60))
    assert (answer.status_code, answer.content) == (200, bytes(range(200)))
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"] == f'inline; filename="{Path(path).name}"'
    assert answer.headers["cache-control"] == "private"
    part = httpx.get(remote.signed_url(path, 60), headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    assert httpx.get(remote.signed_url(path, 60).partition("?")[0]).status_code == 403


def test_a_presigned_link_says_how_long_and_for_which_method_it_works(remote, s3_server):
    """What the server makes of that is not seen here: moto checks no link's signature."""
    link = urlsplit(remote.signed_url("videos/a.mp4", 7))
    query = {name: values[0] for name, values in parse_qs(link.query).items()}
    assert f"{link.scheme}://{link.netloc}" == s3_server.url == remote.links_origin()
    assert link.path.endswith("/some/prefix/videos/a.mp4")
    assert query["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert query["X-Amz-Expires"] == "7"
    assert query["X-Amz-SignedHeaders"] == "host"
    assert re.fullmatch("[0-9a-f]{64}", query["X-Amz-Signature"])
    for_head = parse_qs(urlsplit(remote.signed_url("videos/a.mp4", 7, method="HEAD")).query)
    assert for_head["X-Amz-Signature"] != [query["X-Amz-Signature"]]


def test_what_others_do_to_the_bucket_is_seen_at_once(remote, bucket, s3_server):
    name, client = bucket.removeprefix("s3://"), s3_server.client()
    assert remote.names("videos") == []
    client.put_object(Bucket=name, Key="some/prefix/videos/a.mp4", Body=b"x")
    assert (remote.names("videos"), remote.exists("videos/a.mp4")) == (["a.mp4"], True)
    client.delete_object(Bucket=name, Key="some/prefix/videos/a.mp4")
    assert (remote.names("videos"), remote.exists("videos/a.mp4")) == ([], False)


def test_more_than_one_call_can_hold_are_listed_and_deleted(remote, monkeypatch):
    monkeypatch.setattr("worker.storage._DELETE_AT_ONCE", 20)  # S3's own number is 1000
    names = [f"{number}.mp4" for number in range(41)]
    for name in names:
        remote.write(f"videos/{name}", b"")
    assert sorted(remote.names("videos")) == sorted(names)
    remote.delete_many([f"videos/{name}" for name in names])
    assert remote.names("videos") == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # from Python 3.12 on
def test_a_forked_process_has_connections_of_its_own(remote):
    remote.write("videos/a.mp4", b"from the parent")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # os._exit whatever happens: pytest must not go on twice
        try:
            remote.write("videos/b.mp4", b"from the child")
            os.write(writing, remote.read("videos/a.mp4"))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"from the parent"
    os.waitpid(child, 0)
    assert remote.read("videos/b.mp4") == b"from the child"


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_no_missing_file():
    storage = Storage("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match=r"^STORAGE_URL=s3://no-such-bucket/x: there is no bucket 'no-such-bucket'"):
        storage.check()
    for call in (lambda: storage.read("inputs/a.png"), lambda: storage.names("inputs")):
        with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket'"):
            call()


@pytest.mark.timeout(30)
@pytest.mark.usefixtures("bucket")
def test_a_store_that_is_down_is_an_error_within_seconds(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageError, match=r"^STORAGE_URL=s3://down: cannot write .* AWS_ENDPOINT_URL to its address$"):
        Storage("s3://down").check()


@pytest.mark.timeout(30)
@pytest.mark.usefixtures("bucket")
def test_a_store_that_does_not_answer_is_an_error_after_the_time_given(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match="did not answer within 1 s"):
            Storage("s3://silent", timeout_s=1).exists("videos/a.mp4")


def test_no_credentials_are_said_to_be_missing(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"needs other credentials \(there are none\); set AWS_ACCESS_KEY_ID"):
        Storage(bucket).check()


@pytest.fixture(scope="module")
def guarded(guarded_s3_server) -> dict[str, str]:
    """The environment of a user with the policy of the documentation, on a server that looks at who asks."""
    guarded_s3_server.make_bucket("videos-of-ours")
    policy = documented("the policy")
    # Of a call that removes many objects moto asks whether it is allowed on the bucket, where S3 looks at each object.
    on_bucket = {"Effect": "Allow", "Action": "s3:DeleteObject", "Resource": "arn:aws:s3:::videos-of-ours"}
    policy["Statement"].append(on_bucket)
    return {**guarded_s3_server.environment, **guarded_s3_server.add_user(policy)}


def documented(what: str):
    """The JSON below this heading of docs/storage.md."""
    text = DOCS.read_text()
    return json.loads(re.search(rf"^<!-- {what} -->\n+```json\n(.*?)```", text, re.S | re.M)[1])


def test_the_documented_permissions_are_enough_and_cover_nothing_else(guarded, monkeypatch):
    for name, value in guarded.items():
        monkeypatch.setenv(name, value)
    storage = Storage("s3://videos-of-ours/fastlightgen")
    storage.check()
    assert not storage.exists("videos/none.mp4")
    with pytest.raises(FileNotFoundError):
        storage.read("videos/none.mp4")
    elsewhere = Storage("s3://videos-of-ours/elsewhere")
    with pytest.raises(StorageError, match=r"these credentials may not write objects; .* docs/storage\.md"):
        elsewhere.check()
    with pytest.raises(PermissionError):
        elsewhere.write("videos/a.mp4", b"x")
    with pytest.raises(PermissionError):
        elsewhere.read("videos/a.mp4")


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_credentials_that_the_store_does_not_know_are_refused(guarded, monkeypatch, variable):
    for name, value in guarded.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(variable, "somebody-else")
    storage = Storage("s3://videos-of-ours/fastlightgen")
    with pytest.raises(StorageError, match=r"needs other credentials \((InvalidAccessKeyId|SignatureDoesNotMatch)\)"):
        storage.check()
    with pytest.raises(PermissionError):
        storage.exists("videos/a.mp4")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_lifecycle_command_adds_rules_and_leaves_those_of_others(bucket, s3_server, monkeypatch, capsys):
    name, client = bucket.removeprefix("s3://"), s3_server.client()
    other = {"ID": "logs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 1}}
    client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [other]})
    monkeypatch.setenv("STORAGE_URL", f"{bucket}/fastlightgen")
    for days in ("30", "14"):
        assert main(["lifecycle", "--days", days]) == 0
    assert "fastlightgen/videos/ and fastlightgen/inputs/ 14 days" in capsys.readouterr().out
    rules = client.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    assert rules == [other, *documented("the rules")["Rules"]]


def test_a_folder_has_no_lifecycle(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STORAGE_URL", str(tmp_path))
    assert main(["lifecycle", "--days", "14"]) == 0
    assert "is a folder, which has no lifecycle rules" in capsys.readouterr().out
    assert main(["lifecycle", "--days", "0"]) == 1
    assert capsys.readouterr().err == "error: --days 0: wanted 1 or more\n"


def test_the_check_command_says_whether_a_place_works(bucket, s3_server):
    for url, code, said in (
        (bucket, 0, f"{bucket}: files can be written, listed, read and removed\n"),
        ("s3://no-such-bucket", 1, "error: STORAGE_URL=s3://no-such-bucket: there is no bucket .*\n"),
    ):
        environment = {**s3_server.environment, "STORAGE_URL": url, "PYTHONWARNINGS": "error"}
        done = run_with("worker.storage", environment, "check")
        assert done.returncode == code
        assert re.fullmatch(said, done.stdout + done.stderr)  # and nothing of connections left open
