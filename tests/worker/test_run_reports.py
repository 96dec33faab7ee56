"""What a run writes into its folder, as it comes to Redis and the storage: each line once, whoever was killed when."""

import json
import os

import pytest

from service.ids import new_id
from worker.contract import (
    Checkpoint,
    Distillation,
    Progress,
    RunFile,
    Status,
    run_checkpoints_key,
    run_files_key,
    run_log_key,
    run_metrics_key,
    sample_path,
)
from worker.records import now
from worker.run_reports import KEPT_LINES, MAX_FILE_BYTES, MAX_LINE, Reporter, Tail, advance
from worker.storage import Storage


@pytest.fixture
def run(redis, tmp_path):
    """A run's folder, and reporters that follow it one after the other."""
    return Followed(redis, Storage(str(tmp_path / "storage")), tmp_path / "run")


class Followed:
    def __init__(self, redis, storage, folder) -> None:
        self.redis, self.storage, self.folder = redis, storage, folder
        folder.mkdir()
        made = {"status": Status.RUNNING, "recipe": "shapes", "preset": "smoke", "created_at": now()}
        self.record = Distillation(id=new_id("dist"), **made)

    def reporter(self) -> Reporter:
        return Reporter(self.redis, self.storage, self.record, self.folder)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(text)

    def log(self) -> list[str]:
        return [fields["line"] for _, fields in self.redis.xrange(run_log_key(self.record.id))]

    def metrics(self) -> list[dict]:
        return [json.loads(fields["data"]) for _, fields in self.redis.xrange(run_metrics_key(self.record.id))]

    def files(self) -> dict[str, RunFile]:
        found = self.redis.hgetall(run_files_key(self.record.id))
        return {name: RunFile.model_validate_json(text) for name, text in found.items()}


def look(reporter: Reporter, progress: Progress | None = None) -> Progress | None:
    progress = reporter.read(progress)
    reporter.send()
    return progress


def line(stage: str, step: int, **values) -> bytes:
    return json.dumps({"time": 1.5, "stage": stage, "step": step, **values}).encode()


def test_lines_come_as_they_are_written_and_long_ones_are_cut(run):
    reporter = run.reporter()
    run.write("log.txt", "one\ntw")
    look(reporter)
    assert run.log() == ["one"]
    run.write("log.txt", f"o\n{'x' * 2 * MAX_LINE}\n")
    look(reporter)
    assert run.log() == ["one", "two", "x" * MAX_LINE]


def test_who_takes_over_goes_on_where_the_one_before_ended(run):
    run.write("log.txt", "one\ntwo\n")
    run.write("events.jsonl", line("pruning", 1, loss=0.5).decode() + "\n")
    look(run.reporter())
    run.write("log.txt", "three\n")
    run.write("events.jsonl", line("pruning", 2, loss=0.4).decode() + "\n")
    late = run.reporter()
    look(run.reporter())
    look(late)  # read the same lines before it was known that they are sent
    assert run.log() == ["one", "two", "three"]
    assert [(event["step"], event["values"]) for event in run.metrics()] == [(1, {"loss": 0.5}), (2, {"loss": 0.4})]


def test_progress_that_was_read_and_not_sent_is_read_again(run):
    run.write("events.jsonl", line("pruning", 1, loss=0.5).decode() + "\n")
    run.reporter().read(None)  # and then it was killed
    assert look(run.reporter()) == Progress(stage="pruning", step=1, values={"loss": 0.5})
    assert len(run.metrics()) == 1


def test_of_events_the_numbers_are_kept_and_the_latest_checkpoint_of_each_stage(run):
    lines = [
        line("pruning", 2, steps=4, loss=0.5, alarm="drifts", ok=True, none=None, far=float("inf")),
        line("pruning", 2, checkpoint="pruning.checkpoint"),
        b'{"time": 1.5, "stage": "mat',
        line("pruning", 4, checkpoint="pruning.checkpoint"),
    ]
    run.write("events.jsonl", b"\n".join(lines).decode() + "\n")
    look(run.reporter())
    assert [event["step"] for event in run.metrics()] == [2, 2, 4]
    assert run.metrics()[0] == {"time": 1.5, "stage": "pruning", "step": 2, "steps": 4, "values": {"loss": 0.5}}
    found = run.redis.hgetall(run_checkpoints_key(run.record.id))
    assert {k: Checkpoint.model_validate_json(v).step for k, v in found.items()} == {"pruning": 4}


def test_a_folder_that_was_removed_begins_anew(run):
    run.write("log.txt", "one\ntwo\n")
    look(run.reporter())
    (run.folder / "log.txt").unlink()
    run.write("log.txt", "1\n")
    look(run.reporter())
    assert run.log() == ["1"]


def test_a_long_log_is_taken_in_parts_and_its_beginning_is_not_kept(run):
    run.write("log.txt", "".join(f"{number} {'x' * 90}\n" for number in range(2 * KEPT_LINES)))
    reporter, looks = run.reporter(), 0
    while reporter.send():
        looks += 1
    assert looks > 5
    kept = run.log()
    assert KEPT_LINES <= len(kept) < 1.2 * KEPT_LINES
    assert kept[-1].startswith(f"{2 * KEPT_LINES - 1} ")


def test_pictures_go_to_the_storage_once_and_again_when_they_change(run, monkeypatch):
    written = []
    write = run.storage.write
    monkeypatch.setattr(run.storage, "write", lambda path, data: (written.append(path), write(path, data)))
    run.write("samples/pruning-000004.png", "picture")
    run.write("samples/pruning-000008.tmp.png", "half a pic")
    run.write("gate/gate.json", "{}")
    run.write("config.json", "{}")
    reporter = run.reporter()
    look(reporter)
    look(reporter)
    look(run.reporter())
    paths = [sample_path(run.record.id, name) for name in ("pruning-000004.png", "gate.json")]
    assert written == paths
    assert {name: file.kind for name, file in run.files().items()} == {
        "pruning-000004.png": "sheet",
        "gate.json": "report",
    }
    (run.folder / "gate" / "gate.json").write_text('{"passed": true}')
    look(reporter)
    assert run.storage.read(paths[1]) == b'{"passed": true}'


def test_what_is_too_large_is_left_out_and_the_log_says_so_once(run):
    run.write("samples/big.png", "x")
    os.truncate(run.folder / "samples" / "big.png", MAX_FILE_BYTES + 1)
    reporter = run.reporter()
    for _ in range(3):
        look(reporter)
    assert run.files() == {}
    [said] = run.log()
    assert said == f"big.png is not shown: it has {MAX_FILE_BYTES + 1} bytes, and {MAX_FILE_BYTES} may be"


def test_a_storage_that_fails_does_not_end_the_run(run, monkeypatch):
    run.write("importance.png", "picture")
    run.write("log.txt", "one\n")
    reporter = run.reporter()
    write = run.storage.write
    monkeypatch.setattr(run.storage, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
    look(reporter)
    assert (run.log(), run.files()) == (["one"], {})
    monkeypatch.setattr(run.storage, "write", write)
    monkeypatch.setattr("worker.run_reports.time.monotonic", lambda: 1e9)
    look(reporter)
    assert set(run.files()) == {"importance.png"}


# --- reading ---------------------------------------------------------------------------------------------------------


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
    for text, seen in [
        ("one\ntw", [(4, b"one")]),
        ("", []),
        ("o\nthree\n", [(8, b"two"), (14, b"three")]),
        ("", []),
    ]:
        with path.open("a") as file:
            file.write(text)
        assert tail.lines() == seen


def test_a_line_without_end_is_taken_in_pieces(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"x" * 600_000)
    tail = Tail(tmp_path / "log.txt")
    assert [len(line) for _, line in tail.lines()] == [256 * 1024]
    assert tail.offset == 256 * 1024
