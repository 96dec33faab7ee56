"""`/admin/students` and `/admin/release`: which students there are, which one is served, and changing that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Path

from service.deps import AdminDep, ContextDep
from service.errors import ApiError
from service.release_schema import (
    Promotion,
    ReleaseState,
    Rollback,
    Students,
    StudentView,
    worker_release,
)
from service.routes import docs
from worker.contract import Heartbeat
from worker.records import workers
from worker.releases import NotPromoted, Release, Releases, State, Student

router = APIRouter(prefix="/admin", tags=["admin"])

StudentDep = Annotated[str, Path(description="sha256, its beginning (8 digits or more), or `name@` and 12 digits")]
_PLAIN, _BACK = Promotion(), Rollback()


@router.get("/students", summary="The students", responses={200: docs.STUDENTS, **docs.refusals("admin")})
def list_students(_principal: AdminDep, context: ContextDep) -> Students:
    """Every student that was added or has served, the newest first."""
    releases = Releases(context.redis)
    state, alive = releases.serving(), workers(context.redis)
    data = [_view(student, state, alive) for student in releases.students()]
    return Students(data=data, active=state.active, previous=state.previous)


@router.get(
    "/students/{student}",
    summary="One student",
    responses={200: docs.STUDENT, **docs.refusals("admin", 404, 422)},
)
def read_student(student: StudentDep, _principal: AdminDep, context: ContextDep) -> StudentView:
    """Where it comes from, what the gate said of it, and how many workers have it loaded."""
    releases = Releases(context.redis)
    return _view(_find(releases, student), releases.serving(), workers(context.redis))


@router.post(
    "/students/rollback",
    summary="Serve the student before",
    responses={200: docs.ROLLED_BACK, **docs.refusals("admin", 409, 413, 422)},
)
def roll_back(principal: AdminDep, context: ContextDep, fields: Rollback = _BACK) -> Release:
    """Go back to what the active student was promoted over; once more goes back further. 409: there is nothing."""
    with _refusing():
        return Releases(context.redis).roll_back(by=principal.id, reason=fields.reason, number=fields.number)


@router.post(
    "/students/{student}/promote",
    summary="Serve this student",
    responses={200: docs.PROMOTED, **docs.refusals("admin", 404, 409, 413, 422)},
)
def promote(student: StudentDep, principal: AdminDep, context: ContextDep, fields: Promotion = _PLAIN) -> Release:
    """Each worker loads it beside what it serves, and goes over between two jobs; see `GET /admin/release`.

    409 `gate_missing`, `gate_refused`, `gate_stale`: the gate has not passed it against the student that is active
    now, and it was not forced; `already_active`; `changed`: another release came in between.
    """
    releases = Releases(context.redis)
    wanted = _find(releases, student)
    serving = releases.serving().active
    with _refusing():
        return releases.promote(
            wanted.sha256, by=principal.id, reason=fields.reason, force=fields.force, serving=serving
        )


@router.get("/release", summary="What is served", responses={200: docs.RELEASE, **docs.refusals("admin")})
def read_release(_principal: AdminDep, context: ContextDep) -> ReleaseState:
    """The active student, how far each worker is with it, and the releases so far."""
    releases = Releases(context.redis)
    return ReleaseState(
        **releases.serving().model_dump(),
        workers=[worker_release(one.name, one.model_sha256, one.release) for one in workers(context.redis)],
        history=releases.history(),
    )


def _find(releases: Releases, text: str) -> Student:
    student = releases.find(text)
    if student is None:
        message = f"there is no student {text[:80]!r}, or its sha256 begins like another's; see GET /admin/students"
        raise ApiError(404, "unknown_student", message)
    return student


def _view(student: Student, state: State, alive: list[Heartbeat]) -> StudentView:
    return StudentView(
        **student.model_dump(),
        model=student.id,
        status={state.active: "active", state.previous: "previous"}.get(student.sha256, "available"),
        workers=sum(student.id in worker.models for worker in alive),
    )


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except NotPromoted as refused:
        raise ApiError(409, refused.code, f"{refused}") from None
