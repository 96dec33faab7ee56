"""What service and workers agree on: the job records, their states, the names of queues, functions, keys and files.

The record (a Redis hash) is the truth about a job and is written before the job is enqueued; rq only carries the id.
Nothing here opens a connection or a file. pydantic only.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from distill.prompt import Prompt

# One queue for each kind of worker: from a single one rq moves a job to a worker atomically (BLMOVE); with two it can
# lose it.
QUEUE = "gpu"
TRAIN_QUEUE = "train"
GENERATE = "worker.jobs.generate"
GENERATE_FAILED = "worker.jobs.generate_failed"
DISTILL = "worker.training.distill"
DISTILL_FAILED = "worker.training.distill_failed"
ALLOWED_FUNCTIONS = frozenset({GENERATE, DISTILL})
"""What a worker runs when the queue asks for it; anything else is refused."""
ALLOWED_CALLBACKS = frozenset({GENERATE_FAILED, DISTILL_FAILED})
"""What it calls when an attempt was lost."""

MAX_ATTEMPTS = 3
"""Starts of one job before it fails: a job that kills its worker must not kill every worker in turn."""

JobId = Annotated[str, StringConstraints(pattern=r"^vid_[0-9a-z]{26}$")]
DistillationId = Annotated[str, StringConstraints(pattern=r"^dist_[0-9a-z]{26}$")]
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


class JobRecord(BaseModel):
    """What is known of any job, as the hash at ``record_key(id)`` holds it. Times are seconds since the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    noun: ClassVar[str]
    """What messages call such a job."""
    queue: ClassVar[str]
    function: ClassVar[str]
    on_lost: ClassVar[str]
    """The function that rq calls when an attempt was lost."""
    index_key: ClassVar[str]
    """Sorted set of the ids of all such jobs by time of creation."""
    queued_key: ClassVar[str]
    """Set of the ids of those whose status is queued: what admission counts."""
    anew: ClassVar[dict[str, Any]] = {}
    """Fields that each attempt begins with; the others go on from where the one before ended."""

    id: str
    status: Status
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempt: int = 0
    """Number of starts; also the fence: only the writer with the current one may change the record."""
    worker: str | None = None
    error_code: str | None = None
    error_message: str | None = None

    @property
    def forget_at(self) -> int:
        """When Redis may drop the record."""
        raise NotImplementedError

    def to_hash(self) -> dict[str, str]:
        """Fields for HSET; what is None is left out, what is no text is JSON."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    @classmethod
    def from_hash(cls, values: dict[str, str]) -> Self:
        """Read what HGETALL returned."""
        return cls.model_validate(values)


class Record(JobRecord):
    """One video."""

    noun = "generation"
    queue = QUEUE
    function = GENERATE
    on_lost = GENERATE_FAILED
    index_key = "flg:jobs"
    queued_key = "flg:queued"
    anew: ClassVar[dict[str, Any]] = {"progress": 0.0}

    id: JobId
    prompt: str
    """As the model reads it (the canonical sentence)."""
    seed: Seed
    model: str
    """Name of the model that it was accepted for."""
    expires_at: float
    phase: Phase | None = None
    progress: float = 0.0
    """Share of the work done, 0 to 1."""
    model_sha256: str | None = None

    @property
    def forget_at(self) -> int:
        """A week after its files are gone."""
        return int(self.expires_at) + 7 * 24 * 3600


class Progress(BaseModel):
    """How far a distillation has come: the end of its `events.jsonl`."""

    model_config = ConfigDict(frozen=True)

    stage: str
    step: int
    steps: int | None = None
    """Of the stage, where it counts them beforehand."""
    values: dict[str, float] = {}
    """Loss and whatever else the stage reports, each as last seen."""


class Distillation(JobRecord):
    """One distillation: a run of `python -m distill run`."""

    noun = "distillation"
    queue = TRAIN_QUEUE
    function = DISTILL
    on_lost = DISTILL_FAILED
    index_key = "flg:distillations"
    queued_key = "flg:distillations:queued"

    id: DistillationId
    recipe: str
    preset: str
    progress: Progress | None = None
    student: str | None = None
    """The finished student's folder, relative to that of all runs."""

    @field_validator("progress", mode="before")
    @classmethod
    def _from_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @property
    def forget_at(self) -> int:
        """A year after it was asked for; its run folder stays."""
        return int(self.created_at) + 365 * 24 * 3600


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
    engine_reason: str | None = None
    """Why it is not the one that comes first, where that is so."""
    started_at: float
    seen_at: float


# --- keys and files --------------------------------------------------------------------------------------------------

ACTIVE_MODEL_KEY = "flg:model:active"
SECONDS_KEY = "flg:seconds"
"""Hash: model name -> moving average of the seconds of a worker that a job takes, for the ETA."""
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
