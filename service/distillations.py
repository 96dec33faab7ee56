"""`DistillationStore`: students that are asked for. What a recipe and a preset are, `distill.recipes` says."""

from __future__ import annotations

from collections.abc import Collection

from redis import Redis

from distill import recipes
from service.errors import ApiError
from service.ids import new_id
from service.schema import DistillationFields
from service.store import Store
from worker.contract import Distillation, Status
from worker.records import QueueFull, now

_MAX_QUEUED = 20
_NO_LIMIT = -1


class DistillationStore(Store[Distillation]):
    """Submit; the rest is `Store`."""

    def __init__(self, redis: Redis, queue_redis: Redis) -> None:
        """``redis`` decodes responses; ``queue_redis`` (for rq) does not."""
        super().__init__(redis, queue_redis, Distillation, _NO_LIMIT)

    def submit(self, fields: DistillationFields, owner: str, request_id: str | None = None) -> Distillation:
        """Check a request, write its record, enqueue it. A refused request leaves nothing behind.

        Raises:
            ApiError: what is wrong with the request, or that too many are waiting.
        """
        _check("recipe", fields.recipe, recipes.RECIPES)
        _check("preset", fields.preset, recipes.PRESETS)
        record = Distillation(
            id=new_id("dist"),
            status=Status.QUEUED,
            owner=owner,
            request_id=request_id,
            recipe=fields.recipe,
            preset=fields.preset,
            created_at=now(),
        )
        try:
            self.records.create(record, _MAX_QUEUED)
            self._enqueue(record.id)
        except QueueFull:
            message = f"{_MAX_QUEUED} distillations are waiting, and no more may; cancel one, or wait"
            raise ApiError(503, "queue_full", message, retry_after_s=120) from None
        except BaseException:
            self._forget(record.id)
            raise
        return record


def _check(param: str, got: str, known: Collection[str]) -> None:
    if got not in known:
        message = f"{param}: got {got[:64]!r}; there are {', '.join(known)}"
        raise ApiError(422, f"unknown_{param}", message, param=param)
