"""Students and releases: what an administrator asks and sees."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from worker.contract import Staging
from worker.releases import Release, State, Student

Reason = Annotated[str, Field(max_length=500, description="For the history")]


class Promotion(BaseModel):
    """The body of `POST /admin/students/{student}/promote`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"reason": "sharper, and as fast"}]}
    )

    force: bool = Field(default=False, description="Whatever the gate says; the history shows that it was needed")
    reason: Reason = ""


class Rollback(BaseModel):
    """The body of `POST /admin/students/rollback`."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"reason": "motion stalls", "number": 7}]}
    )

    reason: Reason = ""
    number: int | None = Field(
        default=None, ge=1, le=2**53, description="Of the release to undo: a 409 if another came since"
    )


class StudentView(Student):
    """A student, and whether it is served."""

    model: str = Field(description="What a request calls exactly this one")
    status: Literal["active", "previous", "available"]
    workers: int = Field(description="That have it loaded")


class Students(BaseModel):
    """The students there are, the newest first."""

    data: list[StudentView]
    active: str | None = Field(default=None, description="sha256 of the one that is served, or is to be")
    previous: str | None = Field(default=None, description="Of the one before it, which workers keep loaded")


class WorkerRelease(BaseModel):
    """How far one worker is with the latest release."""

    name: str
    loaded: str = Field(description="sha256 of the student that it serves; empty while it loads its first")
    state: Literal["loaded", "staging", "failed"]
    message: str | None = Field(default=None, description="Why it failed; it serves what it had, and tries again")
    seconds: float | None = Field(default=None, description="That it took to have it ready")
    how: Literal["refit", "build", "loaded"] | None = Field(
        default=None, description="Whether its engine got other weights, was built, or was there"
    )


class ReleaseState(State):
    """What is served, by which workers, and since when."""

    workers: list[WorkerRelease]
    history: list[Release] = Field(description="The latest first")


def worker_release(name: str, loaded: str, staging: Staging | None) -> WorkerRelease:
    """How far a worker is, from its heartbeat; without a release what it has is what it should have."""
    if staging is None:
        return WorkerRelease(name=name, loaded=loaded, state="loaded" if loaded else "staging")
    return WorkerRelease(name=name, loaded=loaded, **staging.model_dump(exclude={"wanted"}))
