"""What the queue `train` calls: one distillation, from the recipe to a student that can be served.

    training     `python -m distill run`, a process of its own that is followed through its `events.jsonl`
    gate         `python -m distill gate` against the student that is served now, likewise
    publishing   the student into the storage and the registry, with the verdict; promoted at once if that was asked for

The run checkpoints on SIGTERM, and the same command in the same folder goes on from there; what comes after is not done
twice. So a distillation is stopped the same way whoever stops it, and whoever takes it over begins at the beginning. No
torch here.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Retry
from rq.job import Job

from distill import recipes
from distill.student import FolderError, card_path, parse_card
from worker import release
from worker.attempts import ACTIVE, attempt, fail, finish, hand_back, lost, ours
from worker.contract import Distillation, GateSummary, RunPhase, Status
from worker.gpu_lock import Turns
from worker.records import Records
from worker.releases import NotPromoted, Releases
from worker.run_reports import Reporter
from worker.storage import Storage

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "distill")
USER_ERROR, REFUSED, RESUMABLE = 2, 3, 75
"""Exit codes: the last line of the log says what was wrong; the gate refuses; a checkpoint is written."""

ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.5


@dataclass(frozen=True)
class Runtime:
    """What a trainer holds for as long as it lives."""

    name: str
    records: Records[Distillation]
    storage: Storage
    turns: Turns
    runs: Path
    """Absolute; each run has a folder of its own there, named by its id."""
    teachers: Mapping[str, Path]
    """Folders by the names that requests call them by."""
    models: Sequence[Path]
    """Model folders of this machine: what is served may be among them."""
    gate_against: Path
    """What a student is held against while no worker has ever served one."""
    students: Path
    """Where those are kept that are fetched from the storage."""
    command: Sequence[str]
    """What `run` or `gate` and their arguments come after."""
    processes: int
    """That share a run."""
    grace_s: float
    """How long a run that is asked to stop may take to write its checkpoint."""
    pid: int
    """The trainer's own: the job runs in a fork, which has to notice when the trainer is gone."""


RUNTIME: ContextVar[Runtime] = ContextVar("RUNTIME")
"""rq calls module functions by name, so what they work with has to be found here."""


class Stopped(Exception):
    """The distillation was asked to stop before it was over."""

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__()
        self.counts = counts
        """Whether this was one of the attempts that may be lost."""


class RunFailed(Exception):
    """The distillation cannot be finished."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def distill(job_id: str) -> Retry | None:
    """Run one distillation to its end, or to a checkpoint if it is stopped (called by rq)."""
    runtime = RUNTIME.get()
    return attempt(runtime.records, job_id, runtime.name, partial(_run, runtime))


def distill_failed(
    job: Job, _connection: Redis, kind: type[BaseException], value: BaseException | None, _trace: TracebackType | None
) -> None:
    """Called by rq when an attempt was lost."""
    lost(RUNTIME.get().records, job, kind, value)


def _run(runtime: Runtime, record: Distillation) -> Retry | None:
    try:
        with _stop_requests(runtime.pid) as stopping:
            run = Run(runtime, record, stopping)
            try:
                run.begin()
                run.train()
                run.gate()
                changes = run.publish()
            finally:
                runtime.turns.end()
        finish(runtime.records, record, Status.SUCCEEDED, **changes)
    except Stopped as stopped:
        return hand_back(runtime.records, record, counts=stopped.counts)
    except RunFailed as failed:
        fail(runtime.records, record, failed.code, str(failed))
    return None


class Run:
    """One attempt at a distillation, phase by phase.

    Every method raises ``Refused`` when the job is no longer this attempt's, ``Stopped`` and ``RunFailed``.
    """

    def __init__(self, runtime: Runtime, record: Distillation, stopping: Callable[[], bool]) -> None:
        self._runtime = runtime
        self._record = record
        self._asked_to_stop = stopping
        self._folder = runtime.runs / record.id
        self._folder.mkdir(parents=True, exist_ok=True)
        self._student = self._folder / "student"
        self._reporter = Reporter(runtime.records.redis, runtime.storage, record, self._folder)
        self._releases = Releases(runtime.records.redis)

    # --- the phases -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Return when the GPU is ours to train on."""
        self._go_on(RunPhase.TRAINING)
        while not self._runtime.turns.is_clear():
            time.sleep(_POLL_S)
            self._go_on()

    def train(self) -> None:
        """The run itself, unless it was finished before."""
        if not (self._folder / "report.md").exists():  # written last
            teacher = self._teacher()
            if teacher.is_relative_to(ROOT):
                teacher = teacher.relative_to(ROOT)  # what it writes down holds on another machine, too
            settings = {**self._settings(), "teacher": teacher}
            together = ["--processes", str(self._runtime.processes)] if self._runtime.processes > 1 else []
            self._execute(["run", self._record.recipe, self._folder, *together], settings)
        try:
            sha256 = parse_card(card_path(self._student)).sha256  # the files are checked when it is published
        except FolderError as error:
            raise RunFailed("student_broken", str(error)) from None
        self._record = self._change(student=f"{self._record.id}/student", student_sha256=sha256)

    def gate(self) -> None:
        """The verdict on the student, unless it was given before: against the student that is served now."""
        self._go_on(RunPhase.GATE)
        against, folder = self._rival()
        if self._verdict(against) is None:
            own = {name: value for name, value in self._settings().items() if name.startswith(("gate.", "preset"))}
            beside = ("--against", folder, "--teacher", self._teacher(), "--out", self._folder / "gate")
            command = ("gate", self._student, "--recipe", self._record.recipe, *beside)
            self._execute(command, own, accepted=(0, REFUSED))
        verdict = self._verdict(against)
        if verdict is None:
            raise RunFailed("gate_failed", "the gate ended without a verdict on this student")
        self._record = self._change(gate=verdict)

    def publish(self) -> dict[str, Any]:
        """Have the student where it can be served from, whatever the verdict; what to write into the record."""
        self._go_on(RunPhase.PUBLISHING)
        record, verdict = self._record, self._record.gate
        assert verdict is not None
        try:
            card = release.publish(self._runtime.storage, self._student)
        except FolderError as error:
            raise RunFailed("student_broken", str(error)) from None
        self._releases.register(release.student_of(card, by=record.owner, distillation=record.id, gate=verdict))
        if record.promote == "manual" or not verdict.passed:
            return {}
        before = next((one for one in self._releases.history() if one.by == record.id), None)
        if before is not None:  # by an attempt that died thereafter
            return {"release": before.number}
        try:
            reason, against = f"{record.id} has passed the gate", verdict.against
            return {"release": self._releases.promote(card.sha256, by=record.id, reason=reason, serving=against).number}
        except NotPromoted as refused:
            return {"note": f"it was not promoted: {refused}"}

    # --- what they work with --------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        limits = {f"gate.{name}": value for name, value in self._record.limits.items()}
        return {"preset": self._record.preset, **self._record.overrides, **limits}

    def _teacher(self) -> Path:
        name = self._record.teacher or recipes.teacher_of(recipes.load(self._record.recipe, []))
        if name not in self._runtime.teachers:
            known = ", ".join(self._runtime.teachers) or "none"
            raise RunFailed("invalid_run", f"this trainer has no teacher {name!r}; it has {known}")
        return self._runtime.teachers[name]

    def _rival(self) -> tuple[str, Path]:
        """The student that is served now, by its identity, and where it lies."""
        runtime, active = self._runtime, self._releases.serving().active
        try:
            if active is None:
                return parse_card(card_path(runtime.gate_against)).sha256, runtime.gate_against
            return active, release.locate(active, runtime.models, runtime.storage, runtime.students)
        except FolderError as error:
            raise RunFailed("no_rival", f"there is nothing to hold the student against: {error}") from None

    def _verdict(self, against: str) -> GateSummary | None:
        """What the gate has said of this student, beside the one that is served now (or was, if it is this one)."""
        path = self._folder / "gate" / "gate.json"
        if not path.exists():
            return None
        told, own = json.loads(path.read_text()), self._record.student_sha256
        if told["new"]["sha256"] != own or against not in (told["active"]["sha256"], own):
            return None
        return GateSummary(
            passed=told["passed"],
            refusals=told["refusals"],
            against=told["active"]["sha256"],
            recipe=self._record.recipe,
            at=round(path.stat().st_mtime, 3),
        )

    # --- one process ----------------------------------------------------------------------------------------------

    def _execute(
        self, command: Sequence[str | Path], settings: Mapping[str, Any], accepted: Sequence[int] = (0,)
    ) -> None:
        """Run a command of `distill` to its end, and follow what it writes into the folder."""
        assignments = [part for name, value in settings.items() for part in ("--set", f"{name}={_as_text(value)}")]
        with (self._folder / "log.txt").open("a+b") as log:
            log_start = log.seek(0, os.SEEK_END)
            process = subprocess.Popen(  # noqa: S603 (names and values that the service has checked)
                [*self._runtime.command, *map(str, command), *assignments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
            try:
                interrupted = self._follow(process)
            finally:
                _end(process, self._runtime.grace_s)
            while self._report():
                pass
            if process.returncode in accepted:
                return
            # Killed: by the kernel for its memory, by a person. It is lost, and what it has checkpointed is not.
            if interrupted or process.returncode == RESUMABLE or process.returncode < 0:
                raise Stopped(counts=not interrupted)
            log.seek(log_start)
            raise RunFailed(*_reason(process.returncode, log.read().decode(errors="replace")))

    def _follow(self, process: subprocess.Popen[bytes]) -> bool:
        """Write what a process reports into the record until it ends (False) or has to be ended (True)."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            ended = process.returncode is not None
            try:
                self._report()
                if ended:
                    return False
                self._go_on()
            except Stopped:
                return True
            except RedisError as error:  # the run needs none: it goes on, for however long Redis is away
                if ended or self._asked_to_stop():
                    raise
                log.warning("%s: not reported, and not asked whether it is to go on: %s", self._record.id, error)

    def _go_on(self, phase: RunPhase | None = None) -> None:
        """Raise if this attempt is to stop here; else it is in this phase, where one is given."""
        if self._held().status is Status.CANCELLING or self._asked_to_stop() or not self._runtime.turns.may_go_on():
            raise Stopped
        if phase is not None:
            self._change(phase=phase)

    def _report(self) -> bool:
        """What is new goes into the record, and to where it is seen; whether there may be more."""
        found = self._held()
        changes: dict[str, Any] = {}
        progress = self._reporter.read(found.progress)
        if progress != found.progress:
            changes["progress"] = progress
        if found.importance is None and (importance := self._reporter.importance()):
            changes["importance"] = importance
        if changes:
            self._change(**changes)
        return self._reporter.send()

    def _held(self) -> Distillation:
        """The record as it is now, if it is still this attempt's."""
        return ours(self._runtime.records, self._record)

    def _change(self, **changes: Any) -> Distillation:
        return self._runtime.records.change(self._held(), ACTIVE, fence=True, **changes)


def _as_text(value: Any) -> str:
    """As `--set` reads it."""
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value)


def _reason(code: int, log: str) -> tuple[str, str]:
    """Error code and message for a run that ended with this exit code and these last words."""
    lines = [line[:500] for line in log.splitlines() if line.strip()] or ["it said nothing"]
    if code == USER_ERROR:
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        return "invalid_run", said.removeprefix("error: ")
    return "run_crashed", f"the run ended with exit code {code}: {lines[-1]}"


# --- the process -----------------------------------------------------------------------------------------------------


@contextmanager
def _stop_requests(trainer_pid: int) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether to stop: SIGTERM came (the trainer hands it on), or the trainer is gone."""
    signalled = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal signalled
        signalled = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: signalled or os.getppid() != trainer_pid
    finally:
        signal.signal(signal.SIGTERM, before)


def _die_with_parent() -> None:
    """In the new process: have the kernel kill it when we are killed, or the next attempt would run beside it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask the run to stop, if it has not ended; then kill what is left of it and of the processes that it started."""
    if process.poll() is None:
        process.terminate()  # itself only: its helpers have to live until its checkpoint is written
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
