"""Reading jobs without a thread: what most requests do."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

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
    """The jobs in one Redis.

    Whatever is asked for in one turn of the event loop goes to Redis in one call: what a call costs this process is
    shared by all who wait for it, and the busier the service is, the more they are.
    """

    def __init__(self, redis: AsyncRedis, lookout: Lookout) -> None:
        """``redis`` decodes responses."""
        self._redis = redis
        self._lookout = lookout
        self._asked: list[tuple[str, asyncio.Future[tuple[dict[str, str], int | None]]]] = []
        self._asking: set[asyncio.Task[None]] = set()

    async def get(self, job_id: str, owner: str) -> Seen:
        """One job. Raises ``ApiError`` 404: there is none of this id, or it is another owner's."""
        seen = await self.find(job_id)
        if seen is None or seen.record.owner != owner:
            raise ApiError(404, "not_found", f"there is no generation {job_id!r}")
        return seen

    async def find(self, job_id: str) -> Seen | None:
        """One job, whoever's; None where there is none of this id."""
        values, index = await self._ask(job_id)
        return await self._seen(Record.from_hash(values), index) if values else None

    async def record(self, job_id: str) -> Record | None:
        """The record alone."""
        values, _ = await self._ask(job_id)
        return Record.from_hash(values) if values else None

    async def outlook(self, records: list[Record]) -> list[Seen]:
        """The same jobs, with their places in the queue."""
        waiting = [record.id for record in records if record.status is Status.QUEUED]
        indices: list[Any] = []
        if waiting:
            pipeline = self._redis.pipeline(transaction=False)
            for job_id in waiting:
                pipeline.lpos(_QUEUE_KEY, job_id, rank=-1)  # sought from the end: lists begin with the newest
            indices = await pipeline.execute()
        places = dict(zip(waiting, indices, strict=True))
        return [await self._seen(record, places.get(record.id)) for record in records]

    async def _seen(self, record: Record, index: int | None) -> Seen:
        if record.status.is_terminal:
            return Seen(record)
        position = None if index is None or record.status is not Status.QUEUED else index + 1
        fleet = await self._lookout.fleet_async()
        return Seen(record, position, fleet.eta_s(record, position))

    def _ask(self, job_id: str) -> asyncio.Future[tuple[dict[str, str], int | None]]:
        """The record's hash, and its index in the queue."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._send)  # after all who are asking now
        answer: asyncio.Future[tuple[dict[str, str], int | None]] = loop.create_future()
        self._asked.append((job_id, answer))
        return answer

    def _send(self) -> None:
        asked, self._asked = self._asked, []
        task = asyncio.create_task(self._answer(asked))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _answer(self, asked: list[tuple[str, asyncio.Future[tuple[dict[str, str], int | None]]]]) -> None:
        try:
            pipeline = self._redis.pipeline(transaction=False)
            for job_id, _ in asked:
                pipeline.hgetall(record_key(job_id))
                pipeline.lpos(_QUEUE_KEY, job_id)
            found = await pipeline.execute()
        except BaseException as error:
            for _, answer in asked:
                if not answer.done():
                    answer.set_exception(error)
            return
        for number, (_, answer) in enumerate(asked):
            if not answer.done():  # whoever asked has gone
                answer.set_result((found[2 * number], found[2 * number + 1]))
