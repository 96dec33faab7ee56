"""Students as files: from a folder into the storage, and from there to wherever they are served or judged. No torch.

blobs/<sha256>            each distinct file once: students share their teacher's autoencoder and text encoder
students/<sha256>.json    the card, written last; it lists the files by path and sha256

python -m worker.release list                          # the students there are, and which one is served
python -m worker.release add FOLDER                    # into the storage and the registry
python -m worker.release promote SHA [--force] [--reason ...]
python -m worker.release rollback [--reason ...]
python -m worker.release fetch SHA OUT                 # as a folder OUT/<sha256>
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pydantic import ValidationError
from redis.exceptions import RedisError

from distill.student import Card, FolderError, card_path, file_sha256, parse_card, read_card
from worker.contract import LOCAL, GateSummary
from worker.records import connect
from worker.releases import NotPromoted, Releases, Student
from worker.storage import Storage


class StudentError(FolderError):
    """A student that cannot be had from the storage. The message is one line: what is wrong, what to do."""


def publish(storage: Storage, folder: Path) -> Card:
    """Put a model folder into the storage; what is there already is left as it is.

    Raises:
        FolderError: the folder is broken.
    """
    card = read_card(folder)
    for name, sha256 in card.files.items():
        if not storage.exists(_blob(sha256)):
            storage.put_file(_blob(sha256), folder / name)
    storage.write(_card(card.sha256), card.model_dump_json(exclude_none=True).encode())
    return card


def fetch(storage: Storage, sha256: str, cache: Path) -> Path:
    """The folder ``cache/<sha256>`` of a student, whole and checked; fetched if it is not.

    It is made aside and renamed. A file that another student of ``cache`` has is linked to that one's. A process that
    wants a student while another one fetches waits for it.

    Raises:
        StudentError: the storage has no such student, or a file of it is missing there or is another one.
    """
    folder = cache / sha256
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        try:
            if read_card(folder).sha256 == sha256:
                return folder
        except FolderError:  # it is not there, or somebody has changed it
            shutil.rmtree(folder, ignore_errors=True)
        for left in cache.glob("*.tmp"):  # by a process that died
            shutil.rmtree(left)
        card = _read_card(storage, sha256)
        aside = cache / f"{sha256}.tmp"
        try:
            _fill(aside, card, storage, _files_of(cache))
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _read_card(storage: Storage, sha256: str) -> Card:
    try:
        card = Card.model_validate_json(storage.read(_card(sha256)))
    except FileNotFoundError:
        raise StudentError(f"the storage has no student {sha256[:12]}; {_ADD}") from None
    except ValidationError:
        card = None
    if card is None or card.sha256 != sha256:
        raise StudentError(f"{_card(sha256)} in the storage is not the card of that student; {_ADD}")
    return card


def _fill(folder: Path, card: Card, storage: Storage, known: dict[str, Path]) -> None:
    """Write the files of a student and its card."""
    for name, sha256 in card.files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise StudentError(f"student {card.sha256[:12]} has a file {name!r}, which is out of its folder")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if sha256 in known and file_sha256(known[sha256]) == sha256:
            os.link(known[sha256], target)
            continue
        try:
            storage.get_file(_blob(sha256), target)
        except FileNotFoundError:
            raise StudentError(f"{name} of {card.name} is not in the storage ({_blob(sha256)}); {_ADD}") from None
        if file_sha256(target) != sha256:
            raise StudentError(
                f"{name} of {card.name} has other bytes in the storage than when it was added; "
                f"remove {_blob(sha256)} there and {_ADD}"
            )
    (folder / f"{card.kind}.json").write_text(card.model_dump_json(indent=2, exclude_none=True) + "\n")


def _files_of(cache: Path) -> dict[str, Path]:
    """The files of all students in ``cache``, by the sha256 that their cards say."""
    found: dict[str, Path] = {}
    for folder in cache.iterdir():
        try:
            card = parse_card(card_path(folder))
        except FolderError:
            continue
        found |= {sha256: folder / name for name, sha256 in card.files.items() if (folder / name).is_file()}
    return found


def locate(sha256: str, local: Iterable[Path], storage: Storage, cache: Path) -> Path:
    """A model folder with this identity: one of ``local`` that is whole, else `fetch`. Raises ``StudentError``."""
    for folder in local:
        try:
            if parse_card(card_path(folder)).sha256 == sha256 and read_card(folder):
                return folder
        except FolderError:
            continue
    return fetch(storage, sha256, cache)


def student_of(card: Card, *, by: str, distillation: str | None = None, gate: GateSummary | None = None) -> Student:
    """A student as the registry has it.

    Args:
        card: the student's.
        by: id of whoever adds it.
        distillation: id of the run that made it.
        gate: what the gate said of it.
    """
    return Student(
        sha256=card.sha256,
        name=card.name,
        kind=card.kind,
        backbone=card.backbone,
        task=card.task,
        num_inference_steps=card.call["num_inference_steps"],
        blocks=card.blocks.model_dump(mode="json") if card.blocks else None,
        parameters=card.parameters,
        teacher_name=card.teacher.name if card.teacher else None,
        teacher_sha256=card.teacher.sha256 if card.teacher else None,
        created_at=card.created_at,
        added_at=round(time.time(), 3),
        added_by=by,
        distillation=distillation,
        gate=gate,
    )


_ADD = "add it again: python -m worker.release add FOLDER"


def _blob(sha256: str) -> str:
    return f"blobs/{sha256}"


def _card(sha256: str) -> str:
    return f"students/{sha256}.json"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however that ends
        yield


# --- the command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: Redis or the storage cannot be used; 2: it was asked for what there is not; 3: not promoted."""
    chosen = _parser().parse_args(arguments)
    releases = Releases(connect(os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379/0", patience=1))
    storage = Storage(os.environ.get("STORAGE_URL") or "var/storage")
    try:
        if chosen.command == "list":
            said = _list(releases)
        elif chosen.command == "add":
            student = releases.register(student_of(publish(storage, chosen.folder), by=LOCAL))
            said = f"{student.id} {student.sha256}\n"
        elif chosen.command == "fetch":
            said = f"{fetch(storage, _find(releases, chosen.student).sha256, chosen.out)}\n"
        elif chosen.command == "promote":
            student = _find(releases, chosen.student)
            serving = releases.serving().active
            release = releases.promote(
                student.sha256, by=LOCAL, reason=chosen.reason, force=chosen.force, serving=serving
            )
            said = f"release {release.number}: {student.id}\n"
        else:
            release = releases.roll_back(by=LOCAL, reason=chosen.reason)
            said = f"release {release.number}: back to {release.name} {release.sha256[:12]}\n"
    except (FolderError, NotPromoted, OSError, RedisError) as error:
        sys.stderr.write(f"error: {error}\n")
        return {FolderError: 2, StudentError: 2, NotPromoted: 3}.get(type(error), 1)
    sys.stdout.write(said)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m worker.release", description="Students in the storage at STORAGE_URL, served as Redis says."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the students there are, and which one is served")
    command = commands.add_parser("add", help="put a model folder into the storage and the registry")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("promote", help="have the workers serve a student")
    command.add_argument("student", help="sha256, its beginning, or name@sha12")
    command.add_argument("--force", action="store_true", help="whatever the gate said of it")
    command.add_argument("--reason", default="", help="for the history")
    command = commands.add_parser("rollback", help="have them serve what the active one was promoted over")
    command.add_argument("--reason", default="", help="for the history")
    command = commands.add_parser("fetch", help="bring a student here from the storage")
    command.add_argument("student", help="sha256, its beginning, or name@sha12")
    command.add_argument("out", type=Path, help="where its folder is made")
    return parser


def _find(releases: Releases, text: str) -> Student:
    student = releases.find(text)
    if student is None:
        raise StudentError(f"there is no student {text!r} in the registry, or several begin with that; see `list`")
    return student


def _list(releases: Releases) -> str:
    state = releases.state()
    lines = []
    for student in releases.students():
        place = {state.active: "active", state.previous: "previous"}.get(student.sha256, "")
        gate = student.gate
        verdict = "not judged" if gate is None else "passed" if gate.passed else "refused"
        lines.append(f"{student.id:40} {place:9} {verdict:11} {student.teacher_name or ''}\n")
    return "".join(lines) or "no student has been added yet\n"


if __name__ == "__main__":
    raise SystemExit(main())
