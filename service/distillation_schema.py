"""Distillations: what an administrator asks and sees."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from distill.recipes import TunableField
from service.schema import ErrorBody, FollowedLinks, Text, end_and_times, moment
from worker.contract import (
    BlockImportance,
    Checkpoint,
    Distillation,
    GpuHolder,
    Named,
    Offer,
    Progress,
    RunFile,
    RunPhase,
    Status,
)

_MAX_TEXT = 64


def _is_plain(value: object) -> object:
    """What a field can be at all; whether it fits this one, `distill.recipes` says."""
    parts = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(isinstance(part, (bool, int, float, str)) for part in parts):
        raise ValueError("wanted a number, a text, true, false, or a list of two numbers")
    if any(isinstance(part, str) and len(part) > _MAX_TEXT for part in parts):
        raise ValueError(f"the text is longer than {_MAX_TEXT} characters")
    return value


_PAIR = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
Value = Annotated[
    Any,
    AfterValidator(_is_plain),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "boolean"}, {"type": "string", "maxLength": 64}, _PAIR]}),
]
Values = Annotated[dict[Text, Value], Field(max_length=100)]


class DistillationFields(BaseModel):
    """The body of `POST /admin/distillations`. What may be changed, `GET /admin/recipes` lists."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {"recipe": "shapes", "preset": "quick"},
                {
                    "recipe": "shapes",
                    "preset": "quick",
                    "overrides": {"pruning.fit.steps": 80, "matching.scores.beta_1": [0.5, 1.0]},
                    "teacher": "shapes-teacher",
                    "dataset": "shapes",
                    "gate": {"ground_truth.score": 0.05},
                    "promote": "auto",
                },
            ]
        },
    )

    recipe: str = Field(description="One of `distill.recipes`", examples=["shapes"])
    preset: str = Field(default="full", description="How much of it to run: full, quick, smoke")
    overrides: Values = Field(
        default={}, description="Fields of the recipe that are to be other than they are, by path"
    )
    teacher: Text | None = Field(default=None, description="By name; the recipe's own when absent")
    dataset: Text | None = Field(default=None, description="Likewise")
    gate: Values = Field(default={}, description="Limits of the gate that are to be other than they are, by path")
    promote: Literal["auto", "manual"] = Field(
        default="manual", description="auto: a student that passes the gate is served at once"
    )


class GateView(BaseModel):
    """What the gate has said of the student."""

    passed: bool
    refusals: list[str] = Field(description="What is wrong, a line for each limit that is not kept")
    against: str = Field(description="sha256 of the student that was served then")
    at: datetime
    report_url: str
    plot_url: str
    sheet_url: str


class DistillationLinks(FollowedLinks):
    """Where to go from here."""

    resume: str
    log: str
    metrics: str
    samples: str
    checkpoints: str


class DistillationView(BaseModel):
    """One distillation as an administrator sees it."""

    id: str
    object: str = "distillation"
    status: Status
    phase: RunPhase | None = Field(default=None, description="What it is doing, while it runs")
    recipe: str
    preset: str
    overrides: dict[str, Any] = {}
    limits: dict[str, Any] = Field(default={}, description="Of the gate, as they were asked for")
    teacher: str | None = None
    dataset: str | None = None
    promote: str
    progress: Progress | None = Field(default=None, description="What the run has reported last")
    importance: BlockImportance | None = Field(default=None, description="Once stage I is done")
    attempt: int = Field(description="Number of starts that count: those whose trainer was killed, and the present one")
    student: str | None = Field(default=None, description="The finished student's folder, under that of all runs")
    student_sha256: str | None = None
    gate: GateView | None = Field(default=None, description="Once the gate has judged")
    release: int | None = Field(
        default=None, description="Number of the release that it was promoted by, where so asked"
    )
    note: str | None = Field(default=None, description="Why it was not, although it was asked for and it passed")
    error: ErrorBody | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    links: DistillationLinks


class DistillationPage(BaseModel):
    """One page of a listing, newest first; pass ``last_id`` as ``after`` for the next."""

    data: list[DistillationView]
    has_more: bool
    last_id: str | None


class RunLog(BaseModel):
    """Lines of a run's log, the oldest first; pass ``last_id`` as ``after`` for those that come."""

    lines: list[str]
    last_id: str | None


class Metric(BaseModel):
    """One line of a run's `events.jsonl`: the numbers in it."""

    time: float = Field(description="Seconds since the epoch")
    stage: str
    step: int
    steps: int | None = Field(default=None, description="Of the stage, where it counts them beforehand")
    values: dict[str, float]


class RunMetrics(BaseModel):
    """What a run has measured, the oldest first; pass ``last_id`` as ``after`` for what comes."""

    data: list[Metric]
    last_id: str | None


class Sample(BaseModel):
    """A picture or report of a run."""

    name: str
    url: str
    created_at: datetime
    kind: Literal["sheet", "plot", "report"]


class Samples(BaseModel):
    """What a run has made so far, the oldest first."""

    data: list[Sample]


class Checkpoints(BaseModel):
    """The latest of each stage."""

    data: list[Checkpoint]


class RecipeField(TunableField):
    """A field that may be changed. `default` is the preset full's; `by_preset` says where another's differs."""

    by_preset: dict[str, Any] = Field(default_factory=dict)


class RecipeView(BaseModel):
    """A recipe, and what a request may change of it."""

    name: str
    presets: list[str]
    stages: list[str]
    fields: list[RecipeField]
    gate_fields: list[RecipeField]


class Recipes(BaseModel):
    """What can be distilled, and on what."""

    data: list[RecipeView]
    teachers: list[Named]
    datasets: list[str]
    trainer: Offer | None = Field(default=None, description="As the last one that has started says; none has yet: null")
    gpu: GpuHolder | None = Field(default=None, description="Who has the trainer's GPU for itself, if anybody has")


def distillation(record: Distillation, origin: str) -> DistillationView:
    """The administrator's view of a record."""
    this = f"{origin}/admin/distillations/{record.id}"
    working = record.status in (Status.RUNNING, Status.CANCELLING)
    own = set(DistillationView.model_fields) - {"phase", "gate", "links", "error"}
    same = {name: value for name, value in record if name in own}
    ways = ("events", "cancel", "resume", "log", "metrics", "samples", "checkpoints")
    gate = None
    if (verdict := record.gate) is not None:
        urls = {f"{name}_url": f"{this}/samples/{file}" for name, file in _GATE_FILES.items()}
        gate = GateView(
            passed=verdict.passed,
            refusals=verdict.refusals,
            against=verdict.against,
            at=moment(verdict.at),
            **urls,
        )
    return DistillationView(
        **same
        | end_and_times(record)
        | {
            "phase": record.phase if working else None,
            "gate": gate,
            "links": DistillationLinks(self=this, **{way: f"{this}/{way}" for way in ways}),
        }
    )


_GATE_FILES = {"report": "gate.md", "plot": "gate.png", "sheet": "sheet.png"}


def sample(name: str, file: RunFile, origin: str, job_id: str) -> Sample:
    """The administrator's view of a file."""
    url = f"{origin}/admin/distillations/{job_id}/samples/{name}"
    return Sample(name=name, url=url, created_at=moment(file.at), kind=file.kind)
