"""What the workers are doing, as far as requests need it: looked at once a second, however many ask."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import cast

from redis import Redis
from redis.exceptions import ConnectionError, RedisError
from starlette.concurrency import run_in_threadpool

from worker.contract import (
    RELEASE_KEY,
    SECONDS_KEY,
    SLOTS_KEY,
    SLOTS_TOTAL_KEY,
    Heartbeat,
    ModelCard,
    Record,
    Status,
    WorkerState,
)
from worker.records import served_models, workers

_FRESH_S = 1.0
_GUESS_S = 5.0
"""Seconds of a job of which nothing is known yet."""


@dataclass(frozen=True)
class Fleet:
    """One look at it."""

    models: tuple[ModelCard, ...]
    """The first answers when a request names none; of several with one name the first answers to it."""
    ready: tuple[Heartbeat, ...]
    seconds: dict[str, float]
    """Of a job, by ``ModelCard.pace``."""
    num_slots: int
    """Jobs that are under way, or are being asked for."""
    backlog_s: float
    """What they will take one worker."""
    previous: str | None = None
    """sha256 of the student that was active before the latest release."""

    @property
    def num_workers(self) -> int:
        """Workers that take jobs; at least one, as nobody would wait for none."""
        return max(1, len(self.ready))

    @property
    def pins(self) -> list[str]:
        """Of the models that every worker has loaded, so that each takes a job for exactly this one: their ids."""
        return [card.id for card in self.models if all(card.id in worker.models for worker in self.ready)]

    @property
    def listed(self) -> dict[str, ModelCard]:
        """Each model under the name that a list gives it: the previous student is wanted as exactly that."""
        listed: dict[str, ModelCard] = {}
        for card in self.models:
            listed.setdefault(card.id if card.sha256 == self.previous else card.name, card)
        return listed

    @property
    def names(self) -> list[str]:
        """What can be asked for: by name, and exactly."""
        return list(dict.fromkeys([*(card.name for card in self.models), *self.pins]))

    def model(self, name: str | None) -> ModelCard | None:
        """The one that a request means with ``name``: a name, an id, or nothing."""
        for card in self.models:
            if name in (None, card.name) or (name == card.id and name in self.pins):
                return card
        return None

    def model_of(self, record: Record) -> ModelCard | None:
        """The one that makes or has made a video, as far as it is known here."""
        sha256 = record.model_sha256 or record.pin
        if sha256 is not None:
            return next((card for card in self.models if card.sha256 == sha256), None)
        return self.model(None if record.follows else record.model)

    def seconds_of(self, card: ModelCard | None) -> float | None:
        """How long a worker is at a job of it; None when none has been done yet."""
        return self.seconds.get(card.pace) if card else None

    def expected_s(self, card: ModelCard) -> float:
        """The same, with a guess where nothing is known."""
        return self.seconds_of(card) or _GUESS_S

    def eta_s(self, record: Record, position: int | None) -> float | None:
        """Seconds until a job is over, from its place in the queue (1 is next); None when nothing is known."""
        seconds = self.seconds_of(self.model_of(record))
        if record.status.is_terminal or seconds is None:
            return None
        if record.status is not Status.QUEUED:
            return round(seconds * (1 - record.progress), 2)
        if position is None:
            return None
        # Those before it may be of other models: their mean, over the workers; who runs now is half done on average.
        mean = self.backlog_s / self.num_slots if self.num_slots and self.backlog_s else seconds
        return round(mean * (math.ceil(position / self.num_workers) - 0.5) + seconds, 2)


class Lookout:
    """Keeps the last look for a second."""

    def __init__(self, redis: Redis) -> None:
        """``redis`` decodes responses."""
        self._redis = redis
        self._looking = threading.Lock()
        self._seen: tuple[float, Fleet] | None = None
        self._failed: tuple[float, str] | None = None

    def fleet(self) -> Fleet:
        """What is there now, or was a second ago. Raises ``RedisError``."""
        if fleet := self._fresh():
            return fleet
        with self._looking:  # one looks, the others take what it has seen
            if fleet := self._fresh():
                return fleet
            if self._failed and time.monotonic() < self._failed[0] + _FRESH_S:
                # Or each would wait for as long as it takes, one after the other, and hold up a thread.
                raise ConnectionError(self._failed[1])
            try:
                return self._look()
            except RedisError as error:
                self._failed = (time.monotonic(), str(error))
                raise

    async def fleet_async(self) -> Fleet:
        """The same, without holding the event loop up."""
        fleet = self._fresh()
        return await run_in_threadpool(self.fleet) if fleet is None else fleet

    def _fresh(self) -> Fleet | None:
        if self._seen and time.monotonic() < self._seen[0] + _FRESH_S:
            return self._seen[1]
        return None

    def _look(self) -> Fleet:
        alive = workers(self._redis)
        ready = tuple(worker for worker in alive if worker.state in (WorkerState.READY, WorkerState.BUSY))
        models = served_models(self._redis, ready or alive)
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.hgetall(SECONDS_KEY)
            pipeline.zcard(SLOTS_KEY)
            pipeline.get(SLOTS_TOTAL_KEY)
            pipeline.hget(RELEASE_KEY, "previous")
            found = cast(tuple[dict[str, str], int, str | None, str | None], pipeline.execute())
        seconds, num_slots, total_ms, previous = found
        fleet = Fleet(
            models=tuple(models),
            ready=ready,
            seconds={pace: float(text) for pace, text in seconds.items()},
            num_slots=num_slots,
            backlog_s=float(total_ms or 0) / 1000,
            previous=previous,
        )
        self._seen = (time.monotonic(), fleet)
        return fleet
