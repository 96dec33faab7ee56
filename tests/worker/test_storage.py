"""Local folders and object stores behind one face; nothing half-written is ever seen."""

import secrets

import pytest

from worker.storage import Storage


@pytest.fixture(params=["folder", "memory"])
def storage(request, tmp_path):
    return Storage(str(tmp_path / "files") if request.param == "folder" else f"memory://{secrets.token_hex(4)}")


def test_write_read_replace_delete(storage):
    assert not storage.exists("videos/a.mp4")
    storage.write("videos/a.mp4", b"one")
    storage.write("videos/a.mp4", b"two")
    assert storage.read("videos/a.mp4") == b"two"
    storage.delete("videos/a.mp4")
    storage.delete("videos/a.mp4")  # that it is gone is no error
    assert not storage.exists("videos/a.mp4")
    with pytest.raises(FileNotFoundError):
        storage.read("videos/a.mp4")


def test_only_a_local_folder_has_paths_and_a_disk(tmp_path):
    local = Storage(str(tmp_path))
    assert local.local_path("videos/a.mp4") == tmp_path / "videos/a.mp4"
    assert local.free_bytes() > 0
    remote = Storage("memory://bucket")
    assert remote.local_path("videos/a.mp4") is None
    assert remote.free_bytes() is None


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
