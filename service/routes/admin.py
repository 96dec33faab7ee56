"""`/admin/...`: distillations, workers, the queue, webhooks that were given up. Scope `admin`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service import webhooks
from service.deps import AdminDep, AfterDep, ContextDep, DistillationIdDep, JobIdDep, LimitDep, OriginDep
from service.errors import ApiError
from service.schema import (
    DeadWebhooks,
    DistillationFields,
    DistillationPage,
    DistillationView,
    ErrorEnvelope,
    QueueState,
    Workers,
    distillation,
)
from worker.records import workers

_ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorEnvelope} for code in (401, 403, 404, 422, 503)}

router = APIRouter(prefix="/admin", tags=["admin"], responses=_ERRORS)


@router.post("/distillations", status_code=202)
def create(
    fields: DistillationFields,
    principal: AdminDep,
    request: Request,
    context: ContextDep,
    origin: OriginDep,
    response: Response,
) -> DistillationView:
    """Distil a student: a recipe by name. Answers 202; a trainer takes it when it is free."""
    record = context.distillations.submit(fields, principal.id, request.scope["state"].get("request_id"))
    view = distillation(record, origin)
    response.headers["Location"] = view.links.self
    return view


@router.get("/distillations")
def list_distillations(
    _principal: AdminDep, context: ContextDep, origin: OriginDep, limit: LimitDep = 20, after: AfterDep = None
) -> DistillationPage:
    """Newest first."""
    records, has_more = context.distillations.page(limit, after)
    data = [distillation(record, origin) for record in records]
    return DistillationPage(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/distillations/{job_id}")
def read(job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, origin: OriginDep) -> DistillationView:
    """One distillation, with what it has reported last."""
    return distillation(context.distillations.get(job_id), origin)


@router.post("/distillations/{job_id}/cancel", responses={409: {"model": ErrorEnvelope}})
def cancel(
    job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, origin: OriginDep, response: Response
) -> DistillationView:
    """Cancel: at once while queued; while running (202, `cancelling`) as soon as its checkpoint is written."""
    record = context.distillations.cancel(job_id)
    response.status_code = 200 if record.status.is_terminal else 202
    return distillation(record, origin)


@router.get("/workers")
def list_workers(_principal: AdminDep, context: ContextDep) -> Workers:
    """Every worker that is alive, as its last heartbeat says."""
    return Workers(data=workers(context.redis))


@router.get("/queue")
def queue(_principal: AdminDep, context: ContextDep) -> QueueState:
    """How many jobs wait, and whether workers take any."""
    return QueueState(waiting=context.store.records.num_queued(), paused=context.store.is_paused())


@router.post("/queue/pause")
def pause(_principal: AdminDep, context: ContextDep) -> QueueState:
    """Have workers take no job, until `resume`; jobs go on being accepted, and those at hand are finished."""
    context.store.pause()
    return queue(_principal, context)


@router.post("/queue/resume")
def resume(_principal: AdminDep, context: ContextDep) -> QueueState:
    """Have workers take jobs again."""
    context.store.resume()
    return queue(_principal, context)


@router.get("/webhooks")
async def dead_webhooks(_principal: AdminDep, context: ContextDep, limit: LimitDep = 100) -> DeadWebhooks:
    """Messages that were given up: the jobs they were about, the latest first."""
    return DeadWebhooks(data=await webhooks.dead(context.async_redis, limit))


@router.post("/webhooks/{job_id}/replay", status_code=202)
async def replay_webhook(job_id: JobIdDep, _principal: AdminDep, context: ContextDep) -> Response:
    """Have the message about a job's end sent again."""
    if not await webhooks.replay(context.async_redis, job_id):
        raise ApiError(404, "not_found", f"there is no webhook of {job_id}")
    return Response(status_code=202)
