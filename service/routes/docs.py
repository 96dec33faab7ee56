"""What `/docs` shows beside the routes' own words: refusals, and examples of answers, made as real ones are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from distill.prompt import Grammar, Part, Prompt
from service import errors, openai_schema
from service.distillation_schema import (
    Checkpoints,
    DistillationPage,
    Metric,
    RecipeField,
    Recipes,
    RecipeView,
    RunLog,
    RunMetrics,
    Samples,
    distillation,
    sample,
)
from service.openai_schema import ModelList, VideoDeleted, VideoPage
from service.release_schema import ReleaseState, Students, StudentView, WorkerRelease
from service.schema import (
    DeadWebhook,
    DeadWebhooks,
    ErrorEnvelope,
    Example,
    Examples,
    GenerateFields,
    Generation,
    GenerationPage,
    Health,
    Models,
    QueueState,
    Readiness,
    ReadyWorker,
    WebhookState,
    Workers,
    generation,
)
from worker.contract import (
    BlockImportance,
    Checkpoint,
    Distillation,
    GateSummary,
    Heartbeat,
    ModelCard,
    Named,
    Offer,
    Phase,
    Progress,
    Record,
    RunFile,
    RunPhase,
    Status,
    VideoSize,
    WorkerState,
)
from worker.releases import Release

PROMPT = "a red circle moves right quickly, static camera"
HOOK = "https://shop.example.org/hook"
OTHER_PROMPT = "a red circle moves left slowly, camera pans left"
IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAgAQMAAABJtOi3AAAABlBMVEVJNCTcKCgaug5AAAAAN0lEQVR42pXNoQ0AIQAEw"
    "cmBQFIC/VdFCUgEIV/AK1aMXd4rU9QuWhO9ihHBn3nFOmJvcdbb6wMsEAj8qzG0hQAAAABJRU5ErkJggg=="
)
"""A red circle: what the page sends when nobody changes it is understood."""
FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
IMAGE_FILE = {"type": "string", "format": "binary", "description": "PNG, JPEG or WEBP; for models of task ti2v"}
IMAGE_URL = {"type": "string", "description": "The same as a data URL: `data:image/png;base64,...`"}
VIDEO_FILE = {
    "type": "string",
    "format": "binary",
    "description": "MP4, MOV, WEBM or MKV to start from; for models of task t2v",
}
VIDEO_URL = {"type": "string", "description": "The same as a data URL: `data:video/mp4;base64,...`"}
FIELDS: dict[str, Any] = {
    "prompt": {"type": "string", "examples": [PROMPT]},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "examples": [7]},
    "model": {"type": "string", "examples": ["shapes-4step"]},
    "strength": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "examples": [0.7]},
    "steps": {"type": "integer", "examples": [4]},
    "webhook_url": {"type": "string", "format": "uri", "examples": [HOOK]},
    "metadata": {"type": "object", "additionalProperties": {"type": "string"}, "examples": [{"order": "17"}]},
}
"""Of a request for a video, beside image and video: simpler than the model's own schema, which a form cannot show."""
for _name, _schema in FIELDS.items():
    _schema["description"] = GenerateFields.model_fields[_name].description
PARTS: dict[int | str, dict[str, Any]] = {
    206: {"description": "The part that `Range` asks for"},
    307: {"description": "The file lies in an object store: a link there, to be followed without the key"},
    416: {"description": "There is no such part"},
}
"""What else an answer with a file may be."""

_ORIGIN = "https://videos.example.org"
_MOMENT = 1767225600.0
_KEY_ID = "7m2kq0ax"
_CARD = ModelCard(
    name="shapes-4step",
    sha256="9f" * 32,
    task="ti2v",
    num_inference_steps=4,
    video=VideoSize(width=64, height=64, num_frames=17, fps=8),
    prompt=Prompt(
        kind="grammar",
        help="What the shape does, and the camera",
        examples=(PROMPT,),
        grammar=Grammar(
            parts=(
                Part(name="colour", choices=("red", "blue"), prefix="a "),
                Part(name="shape", choices=("circle", "star")),
                Part(name="motion", choices=("moves right", "grows")),
            )
        ),
    ),
)
_RECORD = Record(
    id="vid_01k8zq4h7n5v3c2x9d6e8f0g1h",
    status=Status.QUEUED,
    owner=_KEY_ID,
    prompt=PROMPT,
    seed=3141592653,
    model=_CARD.name,
    metadata={"order": "17"},
    created_at=_MOMENT,
    expires_at=_MOMENT + 7 * 24 * 3600,
)
_DISTILLATION = Distillation(
    id="dist_01k8zq4h7n5v3c2x9d6e8f0g1h",
    status=Status.QUEUED,
    recipe="shapes",
    preset="quick",
    overrides={"pruning.fit.steps": 80},
    teacher="shapes-teacher",
    dataset="shapes",
    promote="auto",
    created_at=_MOMENT,
)


def answers(views: Mapping[str, BaseModel], description: str | None = None) -> dict[str, Any]:
    """For `responses`: JSON answers, each under a name."""
    examples = {name: {"value": view.model_dump(mode="json")} for name, view in views.items()}
    said = {"description": description} if description else {}
    return {**said, "content": {"application/json": {"examples": examples}}}


def generations(*statuses: str, description: str | None = None) -> dict[str, Any]:
    """The same, of jobs in these states."""
    return answers({status: _GENERATIONS[status] for status in statuses}, description)


def videos(*statuses: str) -> dict[str, Any]:
    """The same, as OpenAI's clients see them."""
    return answers({status: _VIDEOS[status] for status in statuses})


def _one(view: BaseModel) -> dict[str, Any]:
    return answers({"example": view})


def refusals(scope: str | None, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses`: the errors that a route may answer with.

    Args:
        scope: that the route needs; it may answer 401, 403 and, as keys are in Redis, 503 then.
        statuses: the others.
    """
    own = {401, 403, 503} if scope else set()
    return {status: _refusal(status, scope, *_REFUSALS[status]) for status in sorted({*own, *statuses})}


def _refusal(
    status: int, scope: str | None, description: str, code: str, message: str, param: str | None
) -> dict[str, Any]:
    names = {"scope": scope or "read", "other": "read" if scope != "read" else "metrics"}
    example = errors.body(status, code, message.format(**names), param)
    said: dict[str, Any] = {
        "model": ErrorEnvelope,
        "description": description.format(**names),
        "content": {"application/json": {"example": example}},
    }
    if status in (429, 503, 507):
        said["headers"] = {"Retry-After": {"description": "Seconds, 1 to 120", "schema": {"type": "integer"}}}
    return said


_NO_SUCH_SIZE = "size: got '1280x720'; shapes-4step makes '64x64' and nothing else"
_NOT_UNDERSTOOD = "prompt: after 'a red' came 'dragon'; expected one of: circle | square | triangle"
_NOT_NOW = "100 jobs are waiting, and no more may; try again in 7 s"
_REFUSALS: dict[int, tuple[str, str, str, str | None]] = {
    400: ("What the model does not make, or a form that cannot be read", "invalid_value", _NO_SUCH_SIZE, "size"),
    401: (
        "No API key, or none that is known; or a link that has had its time",
        "missing_key",
        "this needs an API key: send it as `Authorization: Bearer fl_...`",
        None,
    ),
    403: (
        "The key has not the scope `{scope}`; without keys, the request came by another site's page",
        "scope_missing",
        "this needs a key with the scope '{scope}'; yours has {other}",
        None,
    ),
    404: (
        "There is no such thing, or it is another key's",
        "not_found",
        f"there is no generation '{_RECORD.id}'",
        None,
    ),
    409: ("The state of the job does not allow it", "already_over", f"{_RECORD.id} has succeeded", None),
    410: ("The files have expired", "expired", f"the files of {_RECORD.id} expired at 2026-01-08T00:00:00Z", None),
    413: ("The body is too large", "body_too_large", "the request body is larger than 20971520 bytes", None),
    415: (
        "The body or the image is of a wrong kind",
        "image_format",
        "the image is not a PNG, JPEG or WEBP file (it begins with 25 50 44 46); convert it and send it again",
        "image",
    ),
    422: ("A field or header is wrong", "prompt_not_understood", _NOT_UNDERSTOOD, "prompt"),
    429: (
        "The key's limits",
        "too_many_jobs",
        "this key may have 20 jobs under way, and has; try again in 4 s, or cancel one",
        None,
    ),
    503: ("The limits of all, no worker yet, or Redis does not answer", "queue_full", _NOT_NOW, None),
    507: ("The disk is nearly full", "disk_full", "the disk is nearly full, so no new video can be kept", None),
}
_IN_FLIGHT = (
    "The same request is being taken this moment, or the image of a video to remix is not kept any more",
    "in_flight",
    "the same request is still being taken; ask again in a moment",
    None,
)
ASKING = {**refusals("generate", 400, 413, 415, 422, 429, 507), 409: _refusal(409, "generate", *_IN_FLIGHT)}
"""Of whatever asks for a video."""


# --- examples (FastAPI leaves out what is null in them) --------------------------------------------------------------


def _generation(
    status: Status,
    position: int | None = None,
    eta_s: float | None = None,
    webhook: WebhookState | None = None,
    **changes: Any,
) -> Generation:
    started = {} if status is Status.QUEUED else {"started_at": _MOMENT + 0.5}
    ended = {"finished_at": _MOMENT + 2} if status.is_terminal else {}
    record = _RECORD.model_copy(update={"status": status, **started, **ended, **changes})
    return generation(record, _ORIGIN, position, eta_s, lambda *_: _QUERY, webhook)


_QUERY = f"exp={_MOMENT + 24 * 3600:.0f}&key={_KEY_ID}&sig=Yf3kq0V2b8mZx1cR9tLw5aQe"
_HALF_WAY: dict[str, Any] = {"phase": Phase.DENOISING, "progress": 0.49}
_TOO_LATE: dict[str, Any] = {
    "error_code": "deadline",
    "error_message": "the video was not ready by its deadline (X-Deadline)",
    "progress": 0.49,
}
_SENT = WebhookState(status="delivered", attempts=1, last_status=204)
_GENERATIONS = {
    "queued": _generation(Status.QUEUED, position=3, eta_s=7.5),
    "running": _generation(Status.RUNNING, eta_s=1.5, **_HALF_WAY),
    "cancelling": _generation(Status.CANCELLING, eta_s=1.5, **_HALF_WAY),
    "cancelled": _generation(Status.CANCELLED, progress=0.49),
    "succeeded": _generation(Status.SUCCEEDED, progress=1.0),
    "delivered": _generation(Status.SUCCEEDED, progress=1.0, webhook=_SENT, webhook_url=HOOK),
    "failed": _generation(Status.FAILED, **_TOO_LATE),
}
_VIDEOS = {status: openai_schema.video(view, _CARD.video) for status, view in _GENERATIONS.items()}
_STARTED: dict[str, Any] = {"started_at": _MOMENT + 1, "attempt": 1}
_LOSS = {"loss": 0.0213, "steps_per_s": 0.41, "memory_mb": 1410.2}
_IMPORTANCE = BlockImportance(drop=[9.1, 0.42, 0.17, 0.35], pruned=[2])
_JUDGED: dict[str, Any] = {
    **_STARTED,
    "finished_at": _MOMENT + 600,
    "progress": Progress(stage="student", step=1, values={"motion": 0.97}),
    "importance": _IMPORTANCE,
    "student": f"{_DISTILLATION.id}/student",
    "student_sha256": "4b" * 32,
    "gate": GateSummary(
        passed=False,
        refusals=["ground truth, prompt_following: the prompt is not followed"],
        against=_CARD.sha256,
        recipe="shapes",
        at=_MOMENT + 590,
    ),
}
_DISTILLATIONS = {
    status: distillation(_DISTILLATION.model_copy(update={"status": Status(status), **changes}), _ORIGIN)
    for status, changes in {
        "queued": {},
        "running": {
            **_STARTED,
            "phase": RunPhase.TRAINING,
            "progress": Progress(stage="pruning", step=25, steps=80, values=_LOSS),
            "importance": _IMPORTANCE,
        },
        "cancelling": {"attempt": 1},
        "cancelled": {},
        "succeeded": _JUDGED,
    }.items()
}


def distillations(*statuses: str, description: str | None = None) -> dict[str, Any]:
    """As `generations`, of distillations."""
    return answers({status: _DISTILLATIONS[status] for status in statuses}, description)


GENERATION_PAGE = _one(
    GenerationPage(data=[_GENERATIONS["queued"], _GENERATIONS["succeeded"]], has_more=False, last_id=_RECORD.id)
)
VIDEO_PAGE = _one(VideoPage(data=[_VIDEOS["succeeded"]], has_more=False, first_id=_RECORD.id, last_id=_RECORD.id))
VIDEO_DELETED = _one(VideoDeleted(id=_RECORD.id))
RECIPES = _one(
    Recipes(
        data=[
            RecipeView(
                name="shapes",
                presets=["full", "quick"],
                stages=["pruning", "matching"],
                fields=[
                    RecipeField(
                        path="pruning.fit.steps",
                        type="integer",
                        default=2400,
                        minimum=1,
                        maximum=1_000_000,
                        description="updates of the weights",
                        by_preset={"quick": 40},
                    )
                ],
                gate_fields=[
                    RecipeField(
                        path="far", type="number", default=2.0, minimum=1, description="margins off that refuse"
                    )
                ],
            )
        ],
        teachers=[Named(name="shapes-teacher", sha256="7d" * 32)],
        datasets=["shapes"],
        trainer=Offer(
            recipes=("shapes",),
            teachers=(Named(name="shapes-teacher", sha256="7d" * 32),),
            datasets=("shapes",),
            policy="serve-first",
            gpu="GPU-5d0e9f1c",
        ),
    )
)
RUN_LOG = _one(RunLog(lines=["pruning 25/80  loss 0.0213  0.41 steps/s  2.2 min left"], last_id="4711-0"))
RUN_METRICS = _one(
    RunMetrics(data=[Metric(time=_MOMENT + 60, stage="pruning", step=25, steps=80, values=_LOSS)], last_id="933-0")
)
_FILE = RunFile(kind="sheet", at=_MOMENT + 90, size_bytes=81_920)
SAMPLES = _one(Samples(data=[sample("pruning-000080.png", _FILE, _ORIGIN, _DISTILLATION.id)]))
CHECKPOINTS = _one(Checkpoints(data=[Checkpoint(stage="pruning", step=60, at=_MOMENT + 80)]))
IMPORTANCE: dict[str, Any] = _IMPORTANCE.model_dump()
"""Of `importance.json`, what matters most."""
GATE_REPORT = "# shapes-4step: refused\n\n- ground truth, prompt_following: the prompt is not followed\n"
DISTILLATION_EVENTS = "".join(
    f"id: {moment}\r\nevent: distillation\r\ndata: {_DISTILLATIONS[status].model_dump_json()}\r\n\r\n"
    for moment, status in (("1767225600500-0", "running"), ("1767226200000-0", "succeeded"))
)
DISTILLATION_PAGE = _one(DistillationPage(data=[_DISTILLATIONS["running"]], has_more=False, last_id=_DISTILLATION.id))
MODELS = _one(Models(data=[_CARD]))
_MODEL = openai_schema.model(_CARD.name, _CARD, _MOMENT)
MODEL = _one(_MODEL)
MODEL_LIST = _one(ModelList(data=[_MODEL]))
EXAMPLES = _one(
    Examples(data=[Example(name="red-circle", image_url=f"{_ORIGIN}/examples/red-circle.png", prompt=PROMPT)])
)
EVENTS = "".join(
    f"id: {moment}\r\nevent: generation\r\ndata: {_GENERATIONS[status].model_dump_json()}\r\n\r\n"
    for moment, status in (("1767225600500-0", "running"), ("1767225602000-0", "succeeded"))
)
MANIFEST: dict[str, Any] = {
    "id": _RECORD.id,
    "prompt": PROMPT,
    "seed": _RECORD.seed,
    "model": _CARD.name,
    "model_sha256": _CARD.sha256,
    "engine": "ort-cpu",
    "video_sha256": "3c" * 32,
    "video": _CARD.video.model_dump(),
    "timings_s": {"encoding": 0.0121, "denoising": 0.0463, "decoding": 0.0702, "saving": 0.0118},
}
"""The most of it."""
QUEUE = _one(QueueState(waiting=3, paused=False))
PAUSED = _one(QueueState(waiting=3, paused=True))
_WORKER = Heartbeat(
    name="worker-5f0c",
    state=WorkerState.BUSY,
    model=_CARD.name,
    models=(_CARD.id,),
    model_sha256=_CARD.sha256,
    engine="eager-cpu",
    engine_reason="ort: onnxruntime is not installed",
    started_at=_MOMENT - 3600,
    seen_at=_MOMENT,
)
_STUDENT = StudentView(
    sha256=_CARD.sha256,
    name=_CARD.name,
    kind="student",
    backbone="wan",
    task=_CARD.task,
    num_inference_steps=4,
    parameters={"transformer": 4741280},
    teacher_name="shapes-teacher",
    teacher_sha256="7d" * 32,
    created_at="2025-12-31T22:10:00Z",
    added_at=_MOMENT - 600,
    added_by=_KEY_ID,
    distillation=_DISTILLATION.id,
    gate=GateSummary(passed=True, refusals=[], against="4b" * 32, recipe="shapes", at=_MOMENT - 700),
    model=_CARD.id,
    status="active",
    workers=2,
)
_PROMOTED = Release(
    number=7,
    at=_MOMENT,
    action="promote",
    sha256=_CARD.sha256,
    name=_CARD.name,
    previous="4b" * 32,
    by=_KEY_ID,
    reason="sharper, and as fast",
    forced=False,
    gate=_STUDENT.gate,
)
_ROLLED_BACK = Release(
    number=8,
    at=_MOMENT + 900,
    action="rollback",
    sha256="4b" * 32,
    name=_CARD.name,
    previous=_CARD.sha256,
    by=_KEY_ID,
    reason="motion stalls",
    forced=False,
    gate=None,
)
STUDENT = _one(_STUDENT)
STUDENTS = _one(Students(data=[_STUDENT], active=_CARD.sha256, previous="4b" * 32))
PROMOTED = _one(_PROMOTED)
ROLLED_BACK = _one(_ROLLED_BACK)
RELEASE = _one(
    ReleaseState(
        number=7,
        active=_CARD.sha256,
        previous="4b" * 32,
        rolls_back_to="4b" * 32,
        workers=[
            WorkerRelease(name="worker-1f0c", loaded=_CARD.sha256, state="loaded", seconds=3.1, how="refit"),
            WorkerRelease(name="worker-88ab", loaded="4b" * 32, state="staging"),
        ],
        history=[_PROMOTED],
    )
)
WORKERS = _one(Workers(data=[_WORKER]))
_DEAD = DeadWebhook(id=_RECORD.id, attempts=8, last_status=500, last_error="answered 500", dead_at=_MOMENT + 30 * 3600)
DEAD_WEBHOOKS = _one(DeadWebhooks(data=[_DEAD]))
ALIVE = _one(Health(status="alive"))
READY = _one(Readiness(status="ready", workers=[ReadyWorker.model_validate(_WORKER, from_attributes=True)]))
NOT_READY = answers(
    {"example": Readiness(status="not ready", causes=["no worker is ready (1 loading its model)"])}, "Not now, and why"
)
METRICS = (
    "# HELP flg_jobs_total videos that are over\n"
    "# TYPE flg_jobs_total counter\n"
    'flg_jobs_total{model="shapes-4step",status="succeeded"} 1729.0\n'
)
