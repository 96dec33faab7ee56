"""`/livez`, `/readyz`: is the process alive, and can a job be taken."""

from __future__ import annotations

from fastapi import APIRouter, Response
from redis.exceptions import RedisError

from service.deps import Context, ContextDep
from service.schema import Readiness
from worker.records import ready_workers, workers

router = APIRouter(tags=["health"])


@router.get("/livez")
async def live() -> Readiness:
    """200 while the process answers."""
    return Readiness(status="alive")


@router.get("/readyz", responses={503: {"model": Readiness}})
def ready(context: ContextDep, response: Response) -> Readiness:
    """200 when a job that is sent now will be worked on, else 503 with every cause."""
    causes = _causes(context)
    response.status_code = 503 if causes else 200
    return Readiness(status="not ready" if causes else "ready", causes=causes)


def _causes(context: Context) -> list[str]:
    causes = []
    try:
        if not ready_workers(context.redis):
            loading = len(workers(context.redis))
            causes.append(f"no worker is ready ({loading} loading its model)" if loading else "no worker is running")
    except RedisError:
        causes.append("Redis does not answer")
    free = context.storage.free_bytes()
    if free is not None and free < context.settings.min_free_bytes:
        causes.append(f"only {free // 2**20} MiB of disk are free")
    return causes
