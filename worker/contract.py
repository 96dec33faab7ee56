"""What service and workers agree on: the job records, their states, the names of queues, functions, keys and files.

The record (a Redis hash) is the truth about a job and is written before the job is enqueued; rq only carries the id.
Nothing here opens a connection or a file. pydantic only.

Programs of two releases work on one Redis while one replaces the other, so what is here grows by these rules:

- A reader leaves alone what it does not know: fields that are new to it are ignored when it reads, and stay when it
  writes, as a change writes the changed fields and nothing else.
- A field that is added has a default. None is ever renamed, or comes to mean something else.
- A new value of a field that only describes is read as `otherwise` says. One that decides what happens (``Status``, a
  function, a key's type) is first read by one release and written by the next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    computed_field,
    field_validator,
)

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

MAX_DEATHS = 3
"""Workers that may die at one job before it fails: one that kills its worker must not kill every worker in turn."""
MAX_ATTEMPTS = 6
"""Starts of one job before it fails, whatever its attempts were lost to."""

LOCAL = "local"
"""Whoever asks without a key where none is needed."""

JobId = Annotated[str, StringConstraints(pattern=r"^vid_[0-9a-z]{26}$")]
DistillationId = Annotated[str, StringConstraints(pattern=r"^dist_[0-9a-z]{26}$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A JSON number that every client keeps exact."""
Source = Literal["image", "video", "none"]
"""What a video is made from, beside the sentence."""
TAKES: dict[str, tuple[Source, ...]] = {"ti2v": ("image",), "t2v": ("none", "video"), "v2v": ("video",)}
"""What the models of each task make videos from."""
STRENGTH = 0.7
"""Of a video to start from, where the request does not say."""


def otherwise(value: object) -> WrapValidator:
    """What a later release says there, and is not known here, is read as ``value``."""

    def known(said: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(said)
        except ValidationError:
            return value

    return WrapValidator(known)


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


_LOST_TO = {
    "redis": ("store_failed", "the job store did not answer"),
    "storage": ("storage_failed", "the storage of videos could not be read or written"),
}


class JobRecord(BaseModel):
    """What is known of any job, as the hash at ``record_key(id)`` holds it. Times are seconds since the epoch."""

    # What cannot be read is logged, and a prompt must not be.
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

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
    once: ClassVar[dict[str, Any]] = {}
    """What holds until such a job has begun for the first time, and its value from then on."""
    anew: ClassVar[dict[str, Any]] = {}
    """Fields that each attempt begins with; the others go on from where the one before ended."""
    new: ClassVar[dict[str, Any]] = {"deaths": 0}
    """Fields that older programs do not know, and what they say nothing with."""

    id: str
    status: Status
    owner: str = LOCAL
    """Id of the API key that asked for it; nobody else sees it."""
    request_id: str | None = None
    """Of the HTTP request that asked for it."""
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    attempt: int = 0
    """Number of starts; also the fence: only the writer with the current one may change the record."""
    deaths: int = 0
    """Of them, those that were lost with their worker."""
    worker: str | None = None
    error_code: str | None = None
    error_message: str | None = None

    @field_validator("metadata", "progress", mode="before", check_fields=False)
    @classmethod
    def _from_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @property
    def forget_at(self) -> int:
        """When Redis may drop the record."""
        raise NotImplementedError

    @property
    def counter(self) -> str:
        """Beginning of the name, in ``METRICS_KEY``, of what counts how such jobs end; the status comes after it."""
        return f"{self.noun}s_total|status="

    @property
    def failure_counter(self) -> str:
        """Likewise, of what counts why they fail; the code of the error comes after it."""
        return f"{self.noun}_failures_total|code="

    def given_up(self, cause: str = "") -> tuple[str, str]:
        """Error code and message of such a job when all its attempts were lost.

        Args:
            cause: of the last one: "redis" or "storage" did not answer, or another.
        """
        if self.deaths >= MAX_DEATHS:
            return "worker_crashed", f"{self.deaths} workers have died while they were at this {self.noun}"
        code, ended = _LOST_TO.get(cause, ("attempts_lost", "its worker could not go on"))
        return code, f"every attempt at this {self.noun} was lost; in the last one {ended}"

    def to_hash(self) -> dict[str, str]:
        """Fields for HSET; what is None is left out, what is no text is JSON.

        So is a field that is new while it says nothing: programs of commit 67bc40d read no record that has one.
        """
        silent = {name for name, nothing in self.new.items() if getattr(self, name) == nothing}
        values = self.model_dump(mode="json", exclude_none=True, exclude=silent)
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
    once: ClassVar[dict[str, Any]] = {"start_by": None}
    anew: ClassVar[dict[str, Any]] = {"progress": 0.0}
    new: ClassVar[dict[str, Any]] = {**JobRecord.new, "source": "image"}

    id: JobId
    prompt: str
    """As the model reads it (the canonical sentence)."""
    seed: Seed
    model: str
    """Name of the model that it was accepted for; in the end, of the one that made it."""
    follows: bool = False
    """Whether that was the active one, and no other was meant: then it runs on whichever is active by then."""
    pin: str | None = None
    """sha256 of the one model that may make it, where the request named one exactly."""
    expires_at: float
    phase: Annotated[Phase | None, otherwise(None)] = None
    progress: float = 0.0
    """Share of the work done, 0 to 1."""
    model_sha256: str | None = None
    """Of the model that made it."""
    engine: str | None = None
    """What ran that model's transformer."""
    webhook_url: str | None = None
    """Who is told when the job is over."""
    metadata: dict[str, str] = {}
    """The client's own notes; nothing here reads them."""
    remixed_from: JobId | None = None
    source: Source = "image"
    strength: float | None = None
    """How much of a video to start from is noise when its denoising begins, above 0 to 1: as it was asked for."""
    first_step: int | None = None
    """The step that it began with then, 0 being the model's first: the one whose noise level is nearest to that."""
    start_by: float | None = None
    """A job that has not begun by then fails."""
    finish_by: float | None = None
    expected_at: float | None = None
    """When it would be done, as it was said when it was accepted."""
    trace: str | None = None
    """A W3C `traceparent`: the span that accepted it."""

    @property
    def counter(self) -> str:
        """As above, by model."""
        return f"jobs_total|model={self.model}|status="

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


class BlockImportance(BaseModel):
    """What stage I found: which blocks matter least."""

    model_config = ConfigDict(frozen=True)

    drop: list[float]
    """Of the ELBO without the block, for each."""
    pruned: list[int]
    """Those that go."""


class RunFile(BaseModel):
    """A picture or report that a run has made."""

    model_config = ConfigDict(frozen=True)

    kind: Annotated[Literal["sheet", "plot", "report"], otherwise("report")]
    at: float
    size_bytes: int


class Checkpoint(BaseModel):
    """What a run would go on from."""

    model_config = ConfigDict(frozen=True)

    stage: str
    step: int
    at: float


class GateSummary(BaseModel):
    """What the gate said of a student."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    refusals: list[str]
    """What is wrong, a line for each limit that is not kept."""
    against: str
    """sha256 of the student that was served then."""
    recipe: str
    """Whose limits they were."""
    at: float


class RunPhase(StrEnum):
    """What a distillation that runs is doing."""

    TRAINING = "training"
    GATE = "gate"
    PUBLISHING = "publishing"


class Distillation(JobRecord):
    """One distillation: a run of `python -m distill run`, the gate's verdict on its student, and that published."""

    noun = "distillation"
    queue = TRAIN_QUEUE
    function = DISTILL
    on_lost = DISTILL_FAILED
    index_key = "flg:distillations"
    queued_key = "flg:distillations:queued"

    id: DistillationId
    recipe: str
    preset: str
    overrides: dict[str, Any] = {}
    """Fields of the recipe that were asked to be other than they are: `pruning.fit.steps` -> 40."""
    limits: dict[str, Any] = {}
    """Of the gate, likewise: `ground_truth.score` -> .03."""
    teacher: str | None = None
    """A name in the trainer's ``Offer``; None: the recipe's own."""
    dataset: str | None = None
    """Likewise."""
    promote: Literal["auto", "manual"] = "manual"
    """auto: a student that passes the gate is served at once."""
    phase: Annotated[RunPhase | None, otherwise(None)] = None
    progress: Progress | None = None
    importance: BlockImportance | None = None
    student: str | None = None
    """The finished student's folder, relative to that of all runs."""
    student_sha256: str | None = None
    gate: GateSummary | None = None
    release: int | None = None
    """Number of the release that promoted it."""
    note: str | None = None
    """Why a student that was to be promoted was not."""

    @field_validator("overrides", "limits", "importance", "gate", mode="before")
    @classmethod
    def _also_from_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @property
    def forget_at(self) -> int:
        """A year after it was asked for; its run folder stays."""
        return int(self.created_at) + 365 * 24 * 3600


class Named(BaseModel):
    """A model by its name and identity."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str


class Offer(BaseModel):
    """What the trainer can do, at ``TRAIN_OFFER_KEY``: names, and never where a thing lies."""

    model_config = ConfigDict(frozen=True)

    recipes: tuple[str, ...]
    teachers: tuple[Named, ...]
    datasets: tuple[str, ...]
    policy: Annotated[Literal["share", "serve-first", "window"], otherwise("share")]
    """When it trains: always, while nobody waits for a video, or in ``window`` alone."""
    window: str | None = None
    """`22:00-06:00`, in the trainer's own time."""
    gpu: str
    """Which GPU (or machine) it trains on."""


class GpuHolder(BaseModel):
    """Who has a GPU for itself, at ``gpu_key(gpu)``, for as long as it renews that."""

    model_config = ConfigDict(frozen=True)

    owner: str
    """Name of the trainer."""
    until: float
    """When it will give it back at the latest."""


class VideoSize(BaseModel):
    """What one call of the model makes."""

    model_config = ConfigDict(frozen=True)

    width: int
    height: int
    num_frames: int
    fps: int


class ModelCard(BaseModel):
    """What a worker that is ready publishes of each model that it has loaded, at ``MODELS_KEY``."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    kind: Literal["teacher", "student"] = "student"
    task: str
    num_inference_steps: int
    video: VideoSize
    prompt: Prompt
    # Not written where there are none: programs of commit 67bc40d read no card that has this.
    sigmas: tuple[float, ...] = Field(default=(), exclude_if=lambda sigmas: not sigmas)
    """Of a model that takes videos: the noise levels of its steps, the first one first. What ``strength`` chooses from.
    """

    @computed_field  # type: ignore[prop-decorator]
    @property
    def id(self) -> str:
        """What a request calls exactly this model."""
        return model_id(self.name, self.sha256)

    @property
    def takes(self) -> tuple[Source, ...]:
        """What it makes videos from."""
        return TAKES.get(self.task, ("image",))

    @property
    def pace(self) -> str:
        """What the seconds of a job depend on: which student, and what size of video."""
        size = self.video
        return f"{self.id}:{size.width}x{size.height}x{size.num_frames}"


class WorkerState(StrEnum):
    """What a worker says of itself in its heartbeat."""

    WAITING = "waiting"
    """For its GPU, which training has for itself; it holds nothing of it."""
    LOADING = "loading"
    READY = "ready"
    BUSY = "busy"
    STOPPING = "stopping"


class Staging(BaseModel):
    """How far a worker is with the student that was released last."""

    model_config = ConfigDict(frozen=True)

    wanted: str
    """sha256 of that student."""
    state: Annotated[Literal["loaded", "staging", "failed"], otherwise("staging")]
    message: str | None = None
    """Why it failed; the worker serves what it had before, and tries again."""
    seconds: float | None = None
    """That the staging took."""
    how: Annotated[Literal["refit", "build", "loaded"] | None, otherwise(None)] = None
    """What became of its engine: other weights in one that was there, a new one, or it was there as it is."""


class Canary(BaseModel):
    """The last time that an idle worker made the clip of its warm-up again, to see whether it still can."""

    model_config = ConfigDict(frozen=True)

    at: float
    ok: bool
    seconds: float
    first_seconds: float
    """What the first one of this model took."""
    message: str | None = None
    """What was wrong."""


class Heartbeat(BaseModel):
    """What each worker writes at ``worker_key(name)`` every few seconds, with a short time to live."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: Annotated[WorkerState, otherwise(WorkerState.LOADING)]
    """One that is not known here takes no jobs, as far as anybody here can tell."""
    model: str
    """The one that answers when a request names none."""
    model_sha256: str
    models: tuple[str, ...] = ()
    """``ModelCard.id`` of all that it has loaded, that one first."""
    engine: str
    engine_reason: str | None = None
    """Why it is not the one that comes first, where that is so."""
    host: str | None = None
    """Its machine, container or pod, by that one's own name."""
    gpu: str | None = None
    """Its GPU, which it leaves to training that wants it for itself; None: it does not."""
    waiting_until: float | None = None
    """When that training ends at the latest."""
    gpu_mem_bytes: int | None = None
    """What PyTorch holds of its GPU's memory."""
    release: Staging | None = None
    """None: nothing was ever released."""
    canary: Canary | None = None
    """None: it has not been idle for so long."""
    started_at: float
    seen_at: float


# --- keys and files --------------------------------------------------------------------------------------------------

ACTIVE_MODEL_KEY = "flg:model:active"
"""String: ``ModelCard.id`` of the model that answered last when a request named none; for while no worker is there."""
MODELS_KEY = "flg:models"
"""Hash: ``ModelCard.id`` -> the card as JSON, of all that workers have ever loaded."""
STUDENTS_KEY = "flg:students"
"""Hash: sha256 -> `worker.releases.Student` as JSON."""
RELEASE_KEY = "flg:release"
"""Hash: `number` of the latest release, and the students that are `active` and `previous` since, by their sha256."""
STACK_KEY = "flg:release:stack"
"""List: the sha256 of what was promoted and not rolled back, the active one first."""
RELEASES_KEY = "flg:release:history"
"""List: `worker.releases.Release` as JSON, the newest first."""
SECONDS_KEY = "flg:seconds"
"""Hash: ``ModelCard.pace`` -> moving average of the seconds of a worker that a job takes, for the ETA."""
SLOTS_KEY = "flg:slots"
"""Sorted set: ids of the jobs that count against the limits, by when an unfinished request gives its place back."""
SLOTS_MS_KEY = "flg:slots:ms"
"""Hash: of each of them, the milliseconds of a worker that it was expected to take."""
SLOTS_TOTAL_KEY = "flg:slots:total"
"""String: their sum."""
WORKERS_KEY = "flg:workers"
"""Set of the names of workers; whose heartbeat has run out is no longer one."""


TRAIN_OFFER_KEY = "flg:train:offer"
"""String: the trainer's ``Offer`` as JSON; it stays while there is no trainer."""
KEYS_KEY = "flg:keys"
"""Set of the ids of all API keys."""
LINK_SECRET_KEY = "flg:secret:links"  # noqa: S105
"""String: what links to videos are signed with; made once, by whoever needs it first."""
LINK_SECRET_BEFORE_KEY = "flg:secret:links:before"  # noqa: S105
"""String: what they were signed with before, for as long as such links work."""
WEBHOOK_SECRET_KEY = "flg:secret:webhooks"  # noqa: S105
"""String: what webhooks of jobs that nobody's key asked for are signed with."""
WEBHOOK_SECRET_BEFORE_KEY = "flg:secret:webhooks:before"  # noqa: S105
"""String: what they are signed with as well, until receivers have the new one."""
WEBHOOKS_DUE_KEY = "flg:webhooks:due"
"""Sorted set: ids of the jobs that are over and whose webhook has not arrived, by the time of its next delivery."""
WEBHOOKS_DEAD_KEY = "flg:webhooks:dead"
"""Sorted set: ids of the jobs whose webhook was given up, by the time of that."""
COURIER_KEY = "flg:courier"
"""String that is there while a process sends webhooks."""
METRICS_KEY = "flg:metrics"
"""Hash of counters that all processes share: ``name|label=value|...``, labels in order -> number."""
CHANGES_CHANNEL = "flg:changes"
"""Where the id of each job that has changed is published. A wake-up only: what has changed, the job's stream says."""


def api_key_key(key_id: str) -> str:
    """Hash of one API key: its SHA-256 and what it may."""
    return f"flg:key:{key_id}"


def active_key(owner: str) -> str:
    """Sorted set: those of ``SLOTS_KEY`` that one API key has asked for."""
    return f"flg:active:{owner}"


def webhook_key(job_id: str) -> str:
    """Hash: how far the delivery of one job's webhook is."""
    return f"flg:webhook:{job_id}"


def model_id(name: str, sha256: str) -> str:
    """What a request calls exactly this model; by its name alone it may come to be another one."""
    return f"{name}@{sha256[:12]}"


def record_key(job_id: str) -> str:
    """Hash of one job's record."""
    return f"flg:job:{job_id}"


def events_key(job_id: str) -> str:
    """Stream of one job's changes: ``data``, the changed fields of the record as JSON, and the ``status`` after it."""
    return f"flg:job:{job_id}:events"


def worker_key(name: str) -> str:
    """String: one worker's ``Heartbeat`` as JSON."""
    return f"flg:worker:{name}"


def run_log_key(job_id: str) -> str:
    """Stream: the lines of one run's log, each under its place in the file (bytes), capped."""
    return f"flg:run:{job_id}:log"


def run_metrics_key(job_id: str) -> str:
    """Stream: the lines of its `events.jsonl` as JSON (time, stage, step, steps, values), likewise."""
    return f"flg:run:{job_id}:metrics"


def run_files_key(job_id: str) -> str:
    """Hash: name -> ``RunFile`` as JSON, of what lies at ``sample_path``."""
    return f"flg:run:{job_id}:files"


def run_checkpoints_key(job_id: str) -> str:
    """Hash: stage -> ``Checkpoint`` as JSON, its latest."""
    return f"flg:run:{job_id}:checkpoints"


def gpu_key(gpu: str) -> str:
    """String: the ``GpuHolder`` of one GPU as JSON, if it has one."""
    return f"flg:gpu:{gpu}"


def sample_path(job_id: str, name: str) -> str:
    """A picture or report of a run, relative to the storage root."""
    return f"samples/{job_id}.{name}"


def input_path(job_id: str, source: Source = "image") -> str:
    """The cleaned image or video that a job is made from, relative to the storage root."""
    return f"inputs/{job_id}.{_INPUT_SUFFIXES[source]}"


_INPUT_SUFFIXES: dict[Source, str] = {"image": "png", "video": "mp4"}


def input_paths(job_id: str) -> list[str]:
    """Wherever that may be."""
    return [input_path(job_id, source) for source in _INPUT_SUFFIXES]


def first_step(sigmas: Sequence[float], strength: float) -> int:
    """The step that a video is started at: the one whose noise level is nearest to ``strength``, of two that are
    equally near the noisier."""
    return min(range(len(sigmas)), key=lambda step: abs(sigmas[step] - strength))


def output_path(job_id: str, suffix: str) -> str:
    """A result, relative to the storage root; suffix is mp4, jpg or json (the manifest, written last)."""
    return f"videos/{job_id}.{suffix}"


OUTPUT_SUFFIXES = ("mp4", "jpg", "json")
