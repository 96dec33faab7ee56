"""Which students there are, which one is served, and which were: the registry and the releases, in Redis. No torch.

Releases change by one Lua call, which writes everything or, where another release came in between, nothing.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict
from redis import Redis

from worker.contract import (
    RELEASE_KEY,
    RELEASES_KEY,
    STACK_KEY,
    STUDENTS_KEY,
    DistillationId,
    GateSummary,
    model_id,
)
from worker.records import ready_workers, served_models

_MAX_STACK = 100

# KEYS: release, stack, history. ARGV: number that must still be the latest, new active one, its predecessor or "", the
# release as JSON, then the stack as it will be, the active one first.
_RELEASE = """
if (redis.call('HGET', KEYS[1], 'number') or '0') ~= ARGV[1] then return 'changed' end
redis.call('HSET', KEYS[1], 'number', ARGV[1] + 1, 'active', ARGV[2], 'previous', ARGV[3])
redis.call('DEL', KEYS[2])
redis.call('RPUSH', KEYS[2], unpack(ARGV, 5))
redis.call('LPUSH', KEYS[3], ARGV[4])
return 'ok'
"""


class Student(BaseModel):
    """One that can be served: its files are in the storage, or in a model folder of the workers."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    """Identity of the whole folder (``distill.student.Card.sha256``)."""
    name: str
    kind: str
    backbone: str
    task: str
    num_inference_steps: int
    blocks: dict[str, Any] | None = None
    parameters: dict[str, int]
    teacher_name: str | None = None
    teacher_sha256: str | None = None
    created_at: str
    """As its card has it."""
    added_at: float
    added_by: str
    distillation: DistillationId | None = None
    gate: GateSummary | None = None

    @property
    def id(self) -> str:
        """What requests call it."""
        return model_id(self.name, self.sha256)


class Release(BaseModel):
    """One change of the student that is served."""

    model_config = ConfigDict(frozen=True)

    number: int
    at: float
    action: Literal["promote", "rollback"]
    sha256: str
    name: str
    previous: str | None = None
    """What it has replaced."""
    by: str
    """Id of an API key, or of a distillation."""
    reason: str
    forced: bool
    """Whether it went past what the gate said."""
    gate: GateSummary | None = None


class State(BaseModel):
    """What is served."""

    model_config = ConfigDict(frozen=True)

    number: int = 0
    """Of the latest release; 0: nothing was ever promoted, and workers serve the first of MODEL."""
    active: str | None = None
    previous: str | None = None
    """The one that was active before; workers keep it loaded."""
    rolls_back_to: str | None = None
    """The one that the active one was promoted over."""


class NotPromoted(Exception):
    """Nothing was changed. The message is one sentence."""

    Code = Literal[
        "unknown_student", "already_active", "gate_missing", "gate_refused", "gate_stale", "no_previous", "changed"
    ]

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: NotPromoted.Code = code


class Releases:
    """The registry and the releases of one Redis. May be shared by threads."""

    def __init__(self, redis: Redis) -> None:
        """``redis`` decodes responses."""
        self._redis = redis
        self._release = redis.register_script(_RELEASE)

    # --- students -------------------------------------------------------------------------------------------------

    def register(self, student: Student) -> Student:
        """Enter a student, or what is new about one that is known: its verdict and its distillation. Returns it."""

        def merge(pipeline: Any) -> Student:
            text = pipeline.hget(STUDENTS_KEY, student.sha256)
            entry = student.model_dump(mode="json")
            if text is not None:  # what a later release has written of it stays
                news = {name: entry[name] for name in ("distillation", "gate") if entry[name]}
                entry = {**json.loads(text), **news}
            pipeline.multi()
            pipeline.hset(STUDENTS_KEY, student.sha256, json.dumps(entry))
            return Student.model_validate(entry)

        transaction: Any = self._redis.transaction  # its types know of no value
        return cast(Student, transaction(merge, STUDENTS_KEY, value_from_callable=True))

    def students(self) -> list[Student]:
        """All of them, the newest first."""
        texts = cast(list[str], self._redis.hvals(STUDENTS_KEY))
        return sorted(map(Student.model_validate_json, texts), key=lambda one: one.added_at, reverse=True)

    def find(self, text: str) -> Student | None:
        """The student of this sha256, of a beginning of one that only it has (8 digits or more), or `name@sha12`."""
        name, _, digits = text.rpartition("@")
        if not re.fullmatch("[0-9a-f]{8,64}", digits):
            return None
        found = [one for one in self.students() if one.sha256.startswith(digits) and name in ("", one.name)]
        return found[0] if len(found) == 1 else None

    # --- releases -------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """What is to be served now."""
        with self._redis.pipeline() as pipeline:
            pipeline.hgetall(RELEASE_KEY)
            pipeline.lindex(STACK_KEY, 1)
            values, below = cast(tuple[dict[str, Any], str | None], pipeline.execute())
        return State(**{name: value or None for name, value in values.items()}, rolls_back_to=below)

    def serving(self) -> State:
        """The same; before any release, with what the workers have begun with as active."""
        state = self.state()
        if state.active is None and (served := served_models(self._redis, ready_workers(self._redis))):
            return state.model_copy(update={"active": served[0].sha256})
        return state

    def history(self, limit: int = 50) -> list[Release]:
        """The releases, the newest first."""
        texts = cast(list[str], self._redis.lrange(RELEASES_KEY, 0, limit - 1))
        return [Release.model_validate_json(text) for text in texts]

    def promote(
        self, sha256: str, *, by: str, reason: str = "", force: bool = False, serving: str | None = None
    ) -> Release:
        """Have workers serve a student.

        Args:
            sha256: of the student.
            by: id of the API key or the distillation that wants it.
            reason: for the history.
            force: also without a verdict of the gate that holds for it now. What is recorded is whether it was needed.
            serving: sha256 of what workers serve now; the very first release can be rolled back to it.

        Raises:
            NotPromoted: nothing was changed.
        """
        state = self.state()
        text = cast(str | None, self._redis.hget(STUDENTS_KEY, sha256))
        if text is None:
            raise NotPromoted("unknown_student", f"there is no student {sha256[:12]}; add it first")
        student = Student.model_validate_json(text)
        active = state.active or serving
        if sha256 == active:
            raise NotPromoted("already_active", f"{student.id} is the active student already")
        refusal = _refusal(student, active)
        if refusal and not force:
            raise refusal
        stack = cast(list[str], self._redis.lrange(STACK_KEY, 0, -1)) or ([active] if active else [])
        release = Release(
            number=state.number + 1,
            at=round(time.time(), 3),
            action="promote",
            sha256=sha256,
            name=student.name,
            previous=active,
            by=by,
            reason=reason,
            forced=refusal is not None,
            gate=student.gate,
        )
        return self._write(release, [sha256, *stack][:_MAX_STACK])

    def roll_back(self, *, by: str, reason: str = "", number: int | None = None) -> Release:
        """Have workers serve what the active student was promoted over.

        Args:
            by: see ``promote``.
            reason: likewise.
            number: of the release that is to be the latest; without it, whichever is.

        Raises:
            NotPromoted: nothing was changed.
        """
        state = self.state()
        if number not in (None, state.number):
            raise NotPromoted("changed", f"release {number} is not the latest; that is {state.number}")
        stack = cast(list[str], self._redis.lrange(STACK_KEY, 1, -1))
        if not stack:
            raise NotPromoted("no_previous", "there is nothing to roll back to: no student was promoted over another")
        text = cast(str | None, self._redis.hget(STUDENTS_KEY, stack[0]))
        student = Student.model_validate_json(text) if text else None
        release = Release(
            number=state.number + 1,
            at=round(time.time(), 3),
            action="rollback",
            sha256=stack[0],
            name=student.name if student else "",
            previous=state.active,
            by=by,
            reason=reason,
            forced=False,
            gate=student.gate if student else None,
        )
        return self._write(release, stack)

    def _write(self, release: Release, stack: list[str]) -> Release:
        answer = self._release(
            keys=[RELEASE_KEY, STACK_KEY, RELEASES_KEY],
            args=[release.number - 1, release.sha256, release.previous or "", release.model_dump_json(), *stack],
        )
        if answer != "ok":
            raise NotPromoted("changed", "another release came in between; look at it, and ask again if it still holds")
        return release


def _refusal(student: Student, active: str | None) -> NotPromoted | None:
    """Why the gate keeps a student from being promoted over the active one; None if it does not."""
    gate = student.gate
    if gate is None:
        return NotPromoted("gate_missing", f"the gate has not judged {student.id}; run it, or force the promotion")
    if not gate.passed:
        wrong = "; ".join(gate.refusals)
        return NotPromoted("gate_refused", f"the gate refuses {student.id}: {wrong}; force the promotion to go past it")
    if active is not None and gate.against != active:
        message = f"the gate held {student.id} against {gate.against[:12]}, and {active[:12]} is active now"
        return NotPromoted("gate_stale", f"{message}; run it again, or force the promotion")
    return None
