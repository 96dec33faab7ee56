"""Builds are found again by what they read, loaded only as they were written, and made once by several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from worker.engine.cache import Cache, key_of, source_sha256

READ = {"structure": "ab", "sizes": [{"x": (1, 2)}], "dtype": "bf16", "module": ["trt", "11.0"], "gpu": {"name": "A"}}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "engines")


def writes(content):
    def build(folder):
        (folder / "model.plan").write_bytes(content)
        (folder / "more").mkdir()
        (folder / "more" / "built.json").write_text("{}")

    return build


def refuses(_folder):
    raise AssertionError("built anew")


def plan(folder):
    return (folder / "model.plan").read_bytes()


# --- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"structure": "ac"},
        {"sizes": [{"x": (1, 3)}]},
        {"sizes": [{"x": (1, 2)}, {"x": (1, 2)}]},
        {"dtype": "fp16"},
        {"module": ["trt", "11.1"]},
        {"module": ["trt_rtx", "11.0"]},
        {"gpu": {"name": "B"}},
        {"options": {}},
    ],
    ids=str,
)
def test_the_key_changes_with_each_thing_that_is_read(change):
    assert key_of(**{**READ, **change}) != key_of(**READ)


def test_the_key_is_the_same_in_every_order_and_process():
    assert key_of(**dict(reversed(READ.items()))) == key_of(**READ) == "8baedd287b0341c6050623b6dd4c5662"


def test_sources_are_read_by_content_in_any_order(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a = 1\n")
    two.write_text("b = 2\n")
    before = source_sha256(one, two)
    assert source_sha256(two, one) == before
    two.write_text("b = 3\n")
    assert source_sha256(one, two) != before


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_a_build_is_made_once_and_found_by_another_process(cache):
    folder = cache.get("key", writes(b"plan"), {"model": "student"})
    assert plan(folder) == b"plan"
    again = Cache(cache.folder)
    assert again.get("key", refuses, {}) == again.find("key") == folder
    entry = json.loads((cache.folder / "registry.json").read_text())["key"]
    assert entry["about"] == {"model": "student"}
    assert entry["files"].keys() == {"model.plan", "more/built.json"}


def test_two_builds_stand_beside_each_other(cache):
    cache.get("one", writes(b"1"), {})
    cache.get("two", writes(b"2"), {})
    assert [plan(cache.find(key)) for key in ("one", "two")] == [b"1", b"2"]


def change_a_byte(folder):
    (folder / "model.plan").write_bytes(b"plaN")


def add_a_file(folder):
    (folder / "more" / "other").write_text("")


def take_a_file_away(folder):
    (folder / "more" / "built.json").unlink()


def point_elsewhere(folder):
    (folder.parent / "elsewhere").write_bytes(b"other")
    (folder / "model.plan").unlink()
    (folder / "model.plan").symlink_to(folder.parent / "elsewhere")


def take_it_all_away(folder):
    folder.rename(folder.with_name("gone"))


@pytest.mark.parametrize("harm", [change_a_byte, add_a_file, take_a_file_away, point_elsewhere, take_it_all_away])
def test_what_is_not_as_it_was_built_is_not_loaded_but_built_anew(cache, harm, caplog):
    folder = cache.get("key", writes(b"plan"), {})
    harm(folder)
    assert cache.find("key") is None
    assert "not as they were built" in caplog.text
    assert plan(cache.get("key", writes(b"new"), {})) == b"new"
    assert sorted(p.name for p in cache.find("key").rglob("*")) == ["built.json", "model.plan", "more"]


def test_a_folder_that_is_not_in_the_registry_is_not_loaded(cache):
    cache.get("key", writes(b"plan"), {})
    (cache.folder / "registry.json").write_text("{}")
    assert cache.find("key") is None
    assert plan(cache.get("key", writes(b"new"), {})) == b"new"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {}}', '{"key": {"files": null}}', '{"key": 1}'])
def test_a_registry_that_cannot_be_read_means_building_anew(cache, content):
    cache.get("key", writes(b"plan"), {})
    (cache.folder / "registry.json").write_text(content)
    assert cache.find("key") is None
    assert plan(cache.get("key", writes(b"new"), {})) == b"new"
    assert plan(Cache(cache.folder).find("key")) == b"new"


def test_a_build_that_fails_leaves_nothing(cache):
    def fails(folder):
        (folder / "model.plan").write_bytes(b"half")
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        cache.get("key", fails, {})
    assert cache.find("key") is None
    assert [path.name for path in cache.folder.iterdir() if path.is_dir()] == []
    assert plan(cache.get("key", writes(b"plan"), {})) == b"plan"  # and its lock is free


# --- several processes -----------------------------------------------------------------------------------------------

BUILDER = """
import sys, time
from pathlib import Path
from worker.engine.cache import Cache

folder, key, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def build(aside):
    (aside / "model.plan").write_bytes(b"half")
    with (folder / "log").open("a") as log:
        log.write(key + "\\n")
    time.sleep(seconds)
    (aside / "model.plan").write_bytes(b"plan")

folder.mkdir(exist_ok=True)
print(Cache(folder).get(key, build, {}), flush=True)
"""


def start(cache, key, seconds):
    command = [sys.executable, "-c", BUILDER, str(cache.folder), key, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_a_build(cache):
    deadline = time.monotonic() + 20
    while not (cache.folder / "log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_that_want_the_same_build_it_once(cache):
    processes = [start(cache, "key", 0.5) for _ in range(3)]
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert {output.strip() for output in outputs} == {str(cache.folder / "key")}
    assert (cache.folder / "log").read_text().split() == ["key"]
    assert plan(cache.find("key")) == b"plan"


def test_processes_that_build_different_things_lose_none(cache):
    processes = [start(cache, f"key-{i}", 0.0) for i in range(4)]
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    assert [output.strip() for output in outputs] == [str(cache.folder / f"key-{i}") for i in range(4)]
    assert all(cache.find(f"key-{i}") for i in range(4))


def test_a_process_killed_while_it_builds_stops_no_other(cache):
    process = start(cache, "key", 60)
    wait_for_a_build(cache)
    assert cache.find("key") is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert cache.find("key") is None
    assert plan(cache.get("key", writes(b"plan"), {})) == b"plan"
