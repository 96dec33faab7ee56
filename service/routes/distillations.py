"""`/admin/recipes` and `/admin/distillations`: what can be distilled, asking for it, following it. Scope `admin`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from service import events
from service.deps import AdminDep, AfterDep, ContextDep, DistillationIdDep, LimitDep, OriginDep
from service.distillation_schema import (
    Checkpoints,
    DistillationFields,
    DistillationPage,
    DistillationView,
    Metric,
    Recipes,
    RunLog,
    RunMetrics,
    Samples,
    distillation,
    sample,
)
from service.routes import docs
from worker.contract import Distillation

router = APIRouter(prefix="/admin", tags=["admin"])

_OF_ONE = docs.refusals("admin", 404, 422)
_TYPES = {".png": "image/png", ".json": "application/json", ".md": "text/markdown; charset=utf-8"}
AfterLineDep = Annotated[
    str | None, Query(pattern=r"^[0-9]{1,18}-[0-9]{1,18}$", description="`last_id` of what was read before")
]


@router.get("/recipes", summary="What can be distilled", responses={200: docs.RECIPES, **docs.refusals("admin")})
def list_recipes(_principal: AdminDep, context: ContextDep) -> Recipes:
    """Every recipe with the fields that a request may change; the trainer's teachers, datasets, and when it trains."""
    return context.distillations.recipes()


@router.post(
    "/distillations",
    status_code=202,
    summary="Distil a student",
    responses={202: docs.distillations("queued"), **docs.refusals("admin", 413, 422)},
)
def create(
    fields: DistillationFields,
    principal: AdminDep,
    request: Request,
    context: ContextDep,
    origin: OriginDep,
    response: Response,
) -> DistillationView:
    """A recipe by name, how much of it, and what is to be other. Answers 202; a trainer takes it when it is free.

    Its student is held against the one that is served now (the gate), and kept whatever the verdict.
    """
    record = context.distillations.submit(fields, principal.id, request.scope["state"].get("request_id"))
    view = distillation(record, origin)
    response.headers["Location"] = view.links.self
    return view


@router.get(
    "/distillations",
    summary="All distillations",
    responses={200: docs.DISTILLATION_PAGE, **docs.refusals("admin", 422)},
)
def list_distillations(
    _principal: AdminDep, context: ContextDep, origin: OriginDep, limit: LimitDep = 20, after: AfterDep = None
) -> DistillationPage:
    """Newest first."""
    records, has_more = context.distillations.page(limit, after)
    data = [distillation(record, origin) for record in records]
    return DistillationPage(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get(
    "/distillations/{job_id}",
    summary="One distillation",
    responses={200: docs.distillations("running", "queued", "succeeded"), **_OF_ONE},
)
def read(job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, origin: OriginDep) -> DistillationView:
    """The distillation, with what it has reported last and, in the end, the gate's verdict."""
    return distillation(context.distillations.get(job_id), origin)


@router.post(
    "/distillations/{job_id}/cancel",
    summary="Cancel a distillation",
    responses={
        200: docs.distillations("cancelled"),
        202: {"model": DistillationView, **docs.distillations("cancelling", description="Asked to stop")},
        **docs.refusals("admin", 404, 409, 422),
    },
)
def cancel(
    job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, origin: OriginDep, response: Response
) -> DistillationView:
    """At once while queued; while running (202, `cancelling`) as soon as its checkpoint is written."""
    record = context.distillations.cancel(job_id)
    response.status_code = 200 if record.status.is_terminal else 202
    return distillation(record, origin)


@router.post(
    "/distillations/{job_id}/resume",
    status_code=202,
    summary="Have a distillation go on",
    responses={202: docs.distillations("queued"), **docs.refusals("admin", 404, 409, 422)},
)
def resume(job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, origin: OriginDep) -> DistillationView:
    """One that has failed or was cancelled: from its last checkpoint, with three attempts before it again."""
    return distillation(context.distillations.go_on(job_id), origin)


@router.get(
    "/distillations/{job_id}/events",
    summary="Follow a distillation",
    response_class=EventSourceResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}, "example": docs.DISTILLATION_EVENTS}}},
        **_OF_ONE,
    },
)
async def follow(
    job_id: DistillationIdDep,
    _principal: AdminDep,
    context: ContextDep,
    origin: OriginDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventSourceResponse:
    """Server-sent events named `distillation`: the whole distillation at each change, until it is over."""
    await run_in_threadpool(context.distillations.get, job_id)
    since = events.valid_id(last_event_id)

    async def stream() -> AsyncIterator[ServerSentEvent]:
        states = events.states(context.async_redis, context.hub, Distillation, job_id, since)
        async for event_id, record in states:
            view = distillation(record, origin).model_dump_json()
            yield ServerSentEvent(data=view, event="distillation", id=event_id)

    return events.sent(stream())


@router.get("/distillations/{job_id}/log", summary="A run's log", responses={200: docs.RUN_LOG, **_OF_ONE})
def log(job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, after: AfterLineDep = None) -> RunLog:
    """What run and gate say, a thousand lines at most; the earliest lines of a long one are not kept."""
    lines, last_id = context.distillations.log_lines(context.distillations.get(job_id).id, after)
    return RunLog(lines=lines, last_id=last_id)


@router.get(
    "/distillations/{job_id}/metrics", summary="What a run measures", responses={200: docs.RUN_METRICS, **_OF_ONE}
)
def metrics(
    job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, after: AfterLineDep = None
) -> RunMetrics:
    """Loss, rate (`steps_per_s`), `memory_mb`, the critic's error by noise level (`critic_gap_s0`, ...), and more."""
    data, last_id = context.distillations.metrics(context.distillations.get(job_id).id, after)
    return RunMetrics(data=[Metric.model_validate(one) for one in data], last_id=last_id)


@router.get(
    "/distillations/{job_id}/samples", summary="A run's pictures and reports", responses={200: docs.SAMPLES, **_OF_ONE}
)
def samples(job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, origin: OriginDep) -> Samples:
    """Contact sheets as they come, the importance of the blocks, the gate's report; the oldest first."""
    files = context.distillations.files(context.distillations.get(job_id).id)
    return Samples(data=[sample(name, file, origin, job_id) for name, file in files.items()])


@router.get(
    "/distillations/{job_id}/samples/{name}",
    summary="One picture or report",
    response_class=Response,
    responses={
        200: {
            "content": {
                "image/png": docs.FILE,
                "application/json": {"schema": {"type": "object"}, "example": docs.IMPORTANCE},
                "text/markdown": {"schema": {"type": "string"}, "example": docs.GATE_REPORT},
            }
        },
        **_OF_ONE,
    },
)
def file(job_id: DistillationIdDep, name: str, _principal: AdminDep, context: ContextDep) -> Response:
    """A PNG, JSON or Markdown file that `samples` lists."""
    data = context.distillations.file(context.distillations.get(job_id).id, name)
    headers = {"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(data, 200, headers, media_type=_TYPES[PurePath(name).suffix])


@router.get(
    "/distillations/{job_id}/checkpoints", summary="A run's checkpoints", responses={200: docs.CHECKPOINTS, **_OF_ONE}
)
def checkpoints(job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep) -> Checkpoints:
    """The latest of each stage: where it would go on from."""
    return Checkpoints(data=context.distillations.checkpoints(context.distillations.get(job_id).id))
