"""What a client asks and sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from worker.contract import STRENGTH, Heartbeat, JobRecord, ModelCard, Phase, Record, Seed, Source, Status

Sign = Callable[[str, Record], str]
"""A file's path and its job -> the query that opens it, or "" where none is needed."""


def _is_short(metadata: dict[str, str]) -> dict[str, str]:
    if (length := len(json.dumps(metadata))) > MAX_METADATA:
        raise ValueError(f"takes {length} characters as JSON; {MAX_METADATA} may be")
    return metadata


MAX_METADATA = 1024
# A limit also has pydantic refuse lone surrogates, which JSON can say and nothing can write.
Text = Annotated[str, Field(max_length=4096)]
Metadata = Annotated[dict[Text, Text], AfterValidator(_is_short)]


class GenerateFields(BaseModel):
    """The fields of `POST /generate` beside image and video. What is not listed here is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, Field(max_length=2000, description="What should happen; see the model's prompt help")]
    seed: Seed | None = Field(default=None, description="Of the starting noise; drawn at random when absent")
    model: Text | None = Field(
        default=None, description="One of `/models` by name, or exactly by id; the first when absent"
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description=f"Of a `video`, how much is changed: the nearest of the model's noise levels; else {STRENGTH}",
    )
    steps: int | None = Field(default=None, description="Only the model's own number of steps is possible")
    webhook_url: Text | None = Field(default=None, description="Is sent a signed message when the job is over")
    metadata: Metadata | None = Field(default=None, description="Texts of your own, at most 1 KiB; handed back as sent")

    @field_validator("metadata", mode="before")
    @classmethod
    def _from_form(cls, value: object) -> object:
        try:
            return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
        except RecursionError:
            raise ValueError("is nested too deeply; wanted an object of texts") from None


class ErrorBody(BaseModel):
    """The inside of the error envelope."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorEnvelope(BaseModel):
    """Every 4xx and 5xx."""

    error: ErrorBody


class Links(BaseModel):
    """Where to go from here."""

    self: str
    cancel: str


class FollowedLinks(Links):
    """The same for what can be followed."""

    events: str


class WebhookState(BaseModel):
    """How far the message about a job's end is."""

    status: Literal["pending", "delivered", "dead"]
    attempts: int = 0
    last_status: int | None = Field(default=None, description="What the receiver answered last")
    last_error: str | None = None


class Generation(BaseModel):
    """One job as its owner sees it."""

    id: str
    object: str = "generation"
    status: Status
    phase: Phase | None = None
    progress: float = Field(description="Share of the work done, 0 to 1")
    queue_position: int | None = Field(default=None, description="1 is next; only while queued")
    eta_seconds: float | None = Field(default=None, description="Until it is done; None when nothing is known yet")
    prompt: str
    video_url: str | None = None
    thumbnail_url: str | None = None
    manifest_url: str | None = None
    error: ErrorBody | None = None
    model: str = Field(description="By name: that it is for, and once it is done, that it was made by")
    model_sha256: str | None = Field(default=None, description="Identity of the model that made it")
    engine: str | None = Field(default=None, description="What ran that model, and where", examples=["ort-cpu"])
    seed: int
    source: Source = Field(description="What it is made from, beside the sentence")
    strength: float | None = Field(default=None, description="Where that is a video: how much of it is changed")
    first_step: int | None = Field(
        default=None, description="The model's step that it was begun at then (0 is the first), once it is done"
    )
    metadata: dict[str, str] = {}
    webhook_url: str | None = None
    webhook: WebhookState | None = Field(default=None, description="Once the job is over, where it has a webhook_url")
    remixed_from: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime = Field(description="When the files are removed; the record then says `expired` for a week")
    links: FollowedLinks


class GenerationPage(BaseModel):
    """One page of a listing, newest first; pass ``last_id`` as ``after`` for the next."""

    data: list[Generation]
    has_more: bool
    last_id: str | None


class Workers(BaseModel):
    """Workers that are alive."""

    data: list[Heartbeat]


class QueueState(BaseModel):
    """The queue as a whole."""

    waiting: int
    paused: bool


class DeadWebhook(BaseModel):
    """A message that was given up."""

    id: str = Field(description="Of the job that it was about")
    attempts: int
    last_status: int | None = None
    last_error: str | None = None
    dead_at: float = Field(description="Seconds since the epoch")


class DeadWebhooks(BaseModel):
    """Messages that were given up."""

    data: list[DeadWebhook]


class Models(BaseModel):
    """The models that can be asked for."""

    data: list[ModelCard]


class Example(BaseModel):
    """A picture with a sentence that fits it."""

    name: str
    image_url: str
    prompt: str


class Examples(BaseModel):
    """What the playground offers to start from."""

    data: list[Example]


class Health(BaseModel):
    """Whether all is well; if not, every cause."""

    status: str
    causes: list[str] = []


class ReadyWorker(BaseModel):
    """A worker that takes jobs."""

    name: str
    model: str
    engine: str = Field(description="What runs the transformer, and where", examples=["ort-cpu"])
    engine_reason: str | None = Field(description="Why it is not the engine that comes first, where that is so")


class Readiness(Health):
    """Whether jobs can be taken, and by whom."""

    workers: list[ReadyWorker] = []


def generation(
    record: Record,
    origin: str,
    position: int | None = None,
    eta_seconds: float | None = None,
    sign: Sign = lambda _path, _record: "",
    webhook: WebhookState | None = None,
) -> Generation:
    """The client's view of a record.

    Args:
        record: the job.
        origin: begins every link, without a slash at its end.
        position: in the queue.
        eta_seconds: until it is over.
        sign: makes the query that lets whoever has the link have the file, for a while.
        webhook: how far its delivery is.
    """
    done = record.status is Status.SUCCEEDED
    working = record.status in (Status.RUNNING, Status.CANCELLING)
    this = f"{origin}/generate/{record.id}"
    return Generation(
        id=record.id,
        status=record.status,
        phase=record.phase if working else None,
        progress=record.progress,
        queue_position=position,
        eta_seconds=eta_seconds,
        prompt=record.prompt,
        **{f"{name}_url": _file(record, origin, suffix, sign) if done else None for name, suffix in _FILES.items()},
        model=record.model,
        model_sha256=record.model_sha256,
        engine=record.engine,
        seed=record.seed,
        source=record.source,
        strength=record.strength,
        first_step=record.first_step,
        metadata=record.metadata,
        webhook_url=record.webhook_url,
        webhook=webhook,
        remixed_from=record.remixed_from,
        expires_at=moment(record.expires_at),
        links=FollowedLinks(self=this, events=f"{this}/events", cancel=f"{this}/cancel"),
        **end_and_times(record),
    )


_FILES = {"video": "mp4", "thumbnail": "jpg", "manifest": "json"}


def _file(record: Record, origin: str, suffix: str, sign: Sign) -> str:
    path = f"/videos/{record.id}.{suffix}"
    query = sign(path, record)
    return f"{origin}{path}?{query}" if query else f"{origin}{path}"


def end_and_times(record: JobRecord) -> dict[str, Any]:
    """What a view of any job says of how it ended and when."""
    error = None
    if record.error_code is not None and record.status is Status.FAILED:
        kind = f"{record.noun}_error"
        error = ErrorBody(message=record.error_message or "", type=kind, code=record.error_code)
    return {
        "error": error,
        "created_at": moment(record.created_at),
        "started_at": moment(record.started_at) if record.started_at else None,
        # One that goes on after it was over keeps the moment.
        "finished_at": moment(record.finished_at) if record.finished_at and record.status.is_terminal else None,
    }


def moment(seconds: float) -> datetime:
    """A time of a record as answers have it."""
    return datetime.fromtimestamp(seconds, UTC)
