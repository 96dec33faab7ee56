"""What the queue `train` calls: one distillation, as a process of its own that is followed through its `events.jsonl`.

The process checkpoints on SIGTERM, and the same command in the same folder goes on from there. So a run is stopped the
same way whoever stops it, and whoever takes it over starts the command again. No torch here.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType

from pydantic import BaseModel, ConfigDict, ValidationError
from redis import Redis
from rq import Retry
from rq.job import Job

from worker.attempts import ACTIVE, attempt, fail, finish, held, lost
from worker.contract import Distillation, Progress, Status
from worker.records import Records, Refused

COMMAND = (sys.executable, "-m", "distill", "run")
USER_ERROR, RESUMABLE = 2, 75
"""Exit codes of the command: the last line of its log says what was wrong; a checkpoint is written."""

_ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.5
_AGAIN = Retry(max=10**9)
"""Returned to rq: the job goes back to the queue. This does not count as one of the attempts that may be lost."""


@dataclass(frozen=True)
class Runtime:
    """What a trainer holds for as long as it lives."""

    name: str
    records: Records[Distillation]
    runs: Path
    """Absolute; each run has a folder of its own there, named by its id."""
    command: Sequence[str]
    grace_s: float
    """How long a run that is asked to stop may take to write its checkpoint."""
    pid: int
    """The trainer's own: the job runs in a fork, which has to notice when the trainer is gone."""


RUNTIME: ContextVar[Runtime] = ContextVar("RUNTIME")
"""rq calls module functions by name, so what they work with has to be found here."""


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
    folder = runtime.runs / record.id
    folder.mkdir(parents=True, exist_ok=True)
    command = [*runtime.command, record.recipe, str(folder), "--set", f"preset={record.preset}"]
    with _stop_requests(runtime.pid) as stopping, (folder / "log.txt").open("a+b") as log:
        log_start = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(  # noqa: S603 (recipe and preset are names that the service has checked)
            command,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            interrupted = _follow(runtime.records, record, process, folder / "events.jsonl", stopping)
        finally:
            _end(process, runtime.grace_s)
        if process.returncode == 0:
            finish(runtime.records, record, Status.SUCCEEDED, student=f"{record.id}/student")
        elif interrupted or process.returncode == RESUMABLE:
            return _hand_back(runtime.records, record, counts=not interrupted)
        else:
            log.seek(log_start)
            fail(runtime.records, record, *_reason(process.returncode, log.read().decode(errors="replace")))
        return None


def _follow(
    records: Records[Distillation],
    record: Distillation,
    process: subprocess.Popen[bytes],
    events: Path,
    stopping: Callable[[], bool],
) -> bool:
    """Write what the run reports into its record until it ends (False) or has to be ended (True).

    Raises:
        Refused: the job is no longer this attempt's.
    """
    tail = Tail(events)
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
        ended = process.returncode is not None
        found = held(records, record)
        if found is None or found.status not in ACTIVE:
            raise Refused(record.id, found.status if found else "fenced")
        progress = advance(found.progress, tail.lines())
        if progress != found.progress:
            records.change(found, ACTIVE, fence=True, progress=progress)
        if ended or found.status is Status.CANCELLING or stopping():
            return not ended


def _hand_back(records: Records[Distillation], record: Distillation, *, counts: bool) -> Retry | None:
    """Let another attempt go on from the checkpoint, unless the run was stopped because it is cancelled."""
    number = record.attempt if counts else record.attempt - 1
    try:
        records.change(record, (Status.RUNNING,), fence=True, status=Status.QUEUED, attempt=number)
    except Refused as refused:
        if refused.found != Status.CANCELLING:
            raise
        finish(records, record, Status.CANCELLED)
        return None
    return _AGAIN


def _reason(code: int, log: str) -> tuple[str, str]:
    """Error code and message for a run that ended with this exit code and these last words."""
    lines = [line[:500] for line in log.splitlines() if line.strip()] or ["it said nothing"]
    if code == USER_ERROR:
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        return "invalid_run", said.removeprefix("error: ")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return "run_crashed", f"the run {how}: {lines[-1]}"


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


# --- what it reports -------------------------------------------------------------------------------------------------


class Event(BaseModel):
    """One line of `events.jsonl`; what else it holds is in ``model_extra``."""

    model_config = ConfigDict(extra="allow")

    time: float
    stage: str
    step: int
    steps: int | None = None


class Tail:
    """The complete lines that a growing file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> list[bytes]:
        """Empty while there is no file."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.splitlines()


def advance(progress: Progress | None, lines: Sequence[bytes]) -> Progress | None:
    """``progress`` after these lines of `events.jsonl`. Values are kept from line to line within a stage."""
    for line in lines:
        try:
            event = Event.model_validate_json(line)
        except ValidationError:
            continue  # cut short when the run was killed
        before = progress if progress and progress.stage == event.stage else None
        values = dict(before.values) if before else {}
        for name, value in (event.model_extra or {}).items():
            if type(value) in (int, float) and math.isfinite(value):
                values[name] = value
        steps = event.steps or (before.steps if before else None)
        progress = Progress(stage=event.stage, step=event.step, steps=steps, values=values)
    return progress
