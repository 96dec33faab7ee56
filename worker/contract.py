"""What service and worker agree on: the job record, its states, the names of queue, functions, keys and files.

The record (a Redis hash) is the truth about a job and is written before the job is enqueued; rq only carries the id.
Nothing here opens a connection or a file. pydantic only.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from distill.prompt import Prompt

# One queue: with a single one rq moves a job to a worker atomically (BLMOVE); with two it can lose it.
QUEUE = "gpu"
GENERATE = "worker.jobs.generate"
GENERATE_FAILED = "worker.jobs.generate_failed"
ALLOWED_FUNCTIONS = frozenset({GENERATE})
"""What a worker runs when the queue asks for it; anything else is refused."""

MAX_ATTEMPTS = 3
"""Starts of one job before it fails: a job that kills its worker must not kill every worker in turn."""

JobId = Annotated[str, StringConstraints(pattern=r"^vid_[0-9a-z]{26}$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A JSON number that every client keeps exact."""


class Status(StrEnum):
    """States of a job. ``cancelling`` is a running job that has been asked to stop."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        """Whether the job will not change any more (but for expiring)."""
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.EXPIRED)


class Phase(StrEnum):
    """What a running job is doing."""

    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    SAVING = "saving"


class Record(BaseModel):
    """One job, as the hash at ``record_key(id)`` holds it. Times are seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: JobId
    status: Status
    prompt: str
    """As the model reads it (the canonical sentence)."""
    seed: Seed
    model: str
    """Name of the model that it was accepted for."""
    created_at: float
    expires_at: float
    phase: Phase | None = None
    progress: float = 0.0
    """Share of the work done, 0 to 1."""
    started_at: float | None = None
    finished_at: float | None = None
    attempt: int = 0
    """Number of starts; also the fence: only the writer with the current one may change the record."""
    worker: str | None = None
    model_sha256: str | None = None
    error_code: str | None = None
    error_message: str | None = None

    def to_hash(self) -> dict[str, str]:
        """Fields for HSET; what is None is left out."""
        return {name: str(value) for name, value in self.model_dump(mode="json", exclude_none=True).items()}

    @classmethod
    def from_hash(cls, values: dict[str, str]) -> Record:
        """Read what HGETALL returned."""
        return cls.model_validate(values)


class VideoSize(BaseModel):
    """What one call of the model makes."""

    model_config = ConfigDict(frozen=True)

    width: int
    height: int
    num_frames: int
    fps: int


class ModelCard(BaseModel):
    """What a worker that is ready publishes of the model it has loaded, at ``ACTIVE_MODEL_KEY``."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    task: str
    num_inference_steps: int
    video: VideoSize
    prompt: Prompt


class WorkerState(StrEnum):
    """What a worker says of itself in its heartbeat."""

    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    STOPPING = "stopping"


class Heartbeat(BaseModel):
    """What each worker writes at ``worker_key(name)`` every few seconds, with a short time to live."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: WorkerState
    model: str
    model_sha256: str
    engine: str
    started_at: float
    seen_at: float


# --- keys and files --------------------------------------------------------------------------------------------------

ACTIVE_MODEL_KEY = "flg:model:active"
JOBS_KEY = "flg:jobs"
"""Sorted set of all job ids by time of creation."""
SECONDS_KEY = "flg:seconds"
"""Hash: model name -> moving average of the seconds that a job takes, for the ETA."""
QUEUED_KEY = "flg:queued"
"""Set of the ids of all jobs whose status is queued: what admission counts."""
WORKERS_KEY = "flg:workers"
"""Set of the names of workers; whose heartbeat has run out is no longer one."""


def record_key(job_id: str) -> str:
    """Hash of one job's record."""
    return f"flg:job:{job_id}"


def events_key(job_id: str) -> str:
    """Stream of one job's changes: ``data``, the changed fields of the record as JSON, and the ``status`` after it."""
    return f"flg:job:{job_id}:events"


def worker_key(name: str) -> str:
    """String: one worker's ``Heartbeat`` as JSON."""
    return f"flg:worker:{name}"


def input_path(job_id: str) -> str:
    """The cleaned input image, relative to the storage root."""
    return f"inputs/{job_id}.png"


def output_path(job_id: str, suffix: str) -> str:
    """A result, relative to the storage root; suffix is mp4, jpg or json (the manifest, written last)."""
    return f"videos/{job_id}.{suffix}"


OUTPUT_SUFFIXES = ("mp4", "jpg", "json")
