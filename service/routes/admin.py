"""`/admin/...`: workers, the queue, webhooks that were given up. Scope `admin`."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service import webhooks
from service.deps import AdminDep, ContextDep, JobIdDep, LimitDep
from service.errors import ApiError
from service.routes import docs
from service.schema import (
    DeadWebhooks,
    QueueState,
    Workers,
)
from worker.records import workers

router = APIRouter(prefix="/admin", tags=["admin"])

_ALWAYS = docs.refusals("admin")
_OF_ONE = docs.refusals("admin", 404, 422)
_OF_LIST = docs.refusals("admin", 422)


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
