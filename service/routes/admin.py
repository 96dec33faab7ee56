"""`/admin/...`: distillations, workers, the queue, webhooks that were given up. Scope `admin`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service import webhooks
from service.deps import AdminDep, AfterDep, ContextDep, DistillationIdDep, JobIdDep, LimitDep, OriginDep
from service.errors import ApiError
from service.routes import docs
from service.schema import (
    DeadWebhooks,
    DistillationFields,
    DistillationPage,
    DistillationView,
    QueueState,
    Workers,
    distillation,
)
from worker.records import workers

router = APIRouter(prefix="/admin", tags=["admin"])

_ALWAYS = docs.refusals("admin")
_OF_ONE = docs.refusals("admin", 404, 422)
_OF_LIST = docs.refusals("admin", 422)


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
    """A recipe by name, and how much of it. Answers 202; a trainer takes it when it is free."""
    record = context.distillations.submit(fields, principal.id, request.scope["state"].get("request_id"))
    view = distillation(record, origin)
    response.headers["Location"] = view.links.self
    return view


@router.get("/distillations", summary="All distillations", responses={200: docs.DISTILLATION_PAGE, **_OF_LIST})
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
    responses={200: docs.distillations("running", "queued"), **_OF_ONE},
)
def read(job_id: DistillationIdDep, _principal: AdminDep, context: ContextDep, origin: OriginDep) -> DistillationView:
    """The distillation, with what it has reported last."""
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


@router.get("/workers", summary="The workers", responses={200: docs.WORKERS, **_ALWAYS})
def list_workers(_principal: AdminDep, context: ContextDep) -> Workers:
    """Every worker that is alive, as its last heartbeat says."""
    return Workers(data=workers(context.redis))


@router.get("/queue", summary="The queue", responses={200: docs.QUEUE, **_ALWAYS})
def queue(_principal: AdminDep, context: ContextDep) -> QueueState:
    """How many jobs wait, and whether workers take any."""
    return QueueState(waiting=context.store.records.num_queued(), paused=context.store.is_paused())


@router.post("/queue/pause", summary="Have workers pause", responses={200: docs.PAUSED, **_ALWAYS})
def pause(_principal: AdminDep, context: ContextDep) -> QueueState:
    """Have workers take no job, until `resume`; jobs go on being accepted, and those at hand are finished."""
    context.store.pause()
    return queue(_principal, context)


@router.post("/queue/resume", summary="Have workers go on", responses={200: docs.QUEUE, **_ALWAYS})
def resume(_principal: AdminDep, context: ContextDep) -> QueueState:
    """Have workers take jobs again."""
    context.store.resume()
    return queue(_principal, context)


@router.get("/webhooks", summary="Webhooks that were given up", responses={200: docs.DEAD_WEBHOOKS, **_OF_LIST})
async def dead_webhooks(_principal: AdminDep, context: ContextDep, limit: LimitDep = 100) -> DeadWebhooks:
    """Messages that were given up: the jobs they were about, the latest first."""
    return DeadWebhooks(data=await webhooks.dead(context.async_redis, limit))


@router.post(
    "/webhooks/{job_id}/replay",
    status_code=202,
    summary="Send anybody's webhook again",
    response_class=Response,
    responses={202: {"description": "It is sent; there is no body"}, **_OF_ONE},
)
async def replay_webhook(job_id: JobIdDep, _principal: AdminDep, context: ContextDep) -> Response:
    """Have the message about a job's end sent again."""
    if not await webhooks.replay(context.async_redis, job_id):
        raise ApiError(404, "not_found", f"there is no webhook of {job_id}")
    return Response(status_code=202)
