"""`/livez`, `/readyz`: is the process alive, and can a job be taken."""

from __future__ import annotations

from fastapi import APIRouter, Response
from redis.exceptions import RedisError

from service.deps import Context, ContextDep
from service.routes import docs
from service.schema import Health, Readiness, ReadyWorker
from worker.contract import WorkerState
from worker.records import ready_workers, workers

router = APIRouter(tags=["health"])


@router.get("/livez", summary="Whether the process is alive", responses={200: docs.ALIVE})
async def live() -> Health:
    """200 while the process answers."""
    return Health(status="alive")


@router.get(
    "/readyz",
    summary="Whether videos can be made",
    responses={200: docs.READY, 503: {"model": Readiness, **docs.NOT_READY}},
)
def ready(context: ContextDep, response: Response) -> Readiness:
    """200 when a job that is sent now will be worked on, else 503 with every cause."""
    causes = []
    serving: list[ReadyWorker] = []
    try:
        serving = [ReadyWorker.model_validate(beat, from_attributes=True) for beat in ready_workers(context.redis)]
        if not serving:
            alive = workers(context.redis)
            waiting = sum(worker.state is WorkerState.WAITING for worker in alive)
            if waiting:
                causes.append(f"training has the GPU for itself ({waiting} waiting for it)")
            elif alive:
                causes.append(f"no worker is ready ({len(alive)} loading its model)")
            else:
                causes.append("no worker is running")
    except RedisError:
        causes.append("Redis does not answer")
    causes += _disk(context)
    response.status_code = 503 if causes else 200
    if causes:
        response.headers["Retry-After"] = "2"
    return Readiness(status="not ready" if causes else "ready", causes=causes, workers=serving)


def _disk(context: Context) -> list[str]:
    free = context.storage.free_bytes()
    if free is not None and free < context.settings.min_free_bytes:
        return [f"only {free // 2**20} MiB of disk are free"]
    return []
