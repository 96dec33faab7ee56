"""Reading jobs without a thread: what most requests do, so each is one call to Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis as AsyncRedis
from rq import Queue

from service.errors import ApiError
from service.fleet import Lookout
from worker.contract import QUEUE, Record, Status, record_key

_QUEUE_KEY = f"{Queue.redis_queue_namespace_prefix}{QUEUE}"


@dataclass(frozen=True)
class Seen:
    """A job as it is now."""

    record: Record
    position: int | None = None
    """In the queue, 1 is next; None when it does not wait."""
    eta_s: float | None = None
    """Seconds until it is over; None when nothing is known, or it is."""


class Reader:
    """The jobs in one Redis."""

    def __init__(self, redis: AsyncRedis, lookout: Lookout) -> None:
        """``redis`` decodes responses."""
        self._redis = redis
        self._lookout = lookout

    async def get(self, job_id: str, owner: str) -> Seen:
        """One job. Raises ``ApiError`` 404: there is none of this id, or it is another owner's."""
        seen = await self.find(job_id)
        if seen is None or seen.record.owner != owner:
            raise ApiError(404, "not_found", f"there is no generation {job_id!r}")
        return seen

    async def find(self, job_id: str) -> Seen | None:
        """One job, whoever's; None where there is none of this id."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hgetall(record_key(job_id))
        pipeline.lpos(_QUEUE_KEY, job_id)
        values, index = cast(tuple[dict[str, str], int | None], tuple(await pipeline.execute()))
        return await self._seen(Record.from_hash(values), index) if values else None

    async def record(self, job_id: str) -> Record | None:
        """The record alone."""
        values = cast(dict[str, str], await self._redis.hgetall(record_key(job_id)))
        return Record.from_hash(values) if values else None

    async def outlook(self, records: list[Record]) -> list[Seen]:
        """The same jobs, with their places in the queue."""
        waiting = [record.id for record in records if record.status is Status.QUEUED]
        indices: list[Any] = []
        if waiting:
            pipeline = self._redis.pipeline(transaction=False)
            for job_id in waiting:
                pipeline.lpos(_QUEUE_KEY, job_id)
            indices = await pipeline.execute()
        places = dict(zip(waiting, indices, strict=True))
        return [await self._seen(record, places.get(record.id)) for record in records]

    async def _seen(self, record: Record, index: int | None) -> Seen:
        if record.status.is_terminal:
            return Seen(record)
        position = None if index is None or record.status is not Status.QUEUED else index + 1
        fleet = await self._lookout.fleet_async()
        return Seen(record, position, fleet.eta_s(record, position))
