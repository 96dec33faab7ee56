"""What routes ask for, each as one annotated alias."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Query, Request
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service.distillations import DistillationStore
from service.errors import ApiError
from service.jobs import JobStore
from service.settings import Settings
from worker.storage import Storage


@dataclass(frozen=True)
class Context:
    """What the app holds while it runs."""

    settings: Settings
    redis: Redis
    async_redis: AsyncRedis
    storage: Storage
    store: JobStore
    distillations: DistillationStore


def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


def _origin(request: Request) -> str:
    """How links begin: the configured address, else where this request came in."""
    settings = _context(request).settings
    return str(settings.public_url or request.base_url).rstrip("/")


def _id_of(prefix: str, noun: str) -> Callable[[str], str]:
    """Checks for an id as we make them; anything else was never a job, and never reaches a key or a path."""

    def check(job_id: str) -> str:
        if not re.fullmatch(prefix + "_[0-9a-z]{26}", job_id):
            raise ApiError(404, "not_found", f"there is no {noun} {job_id[:64]!r}")
        return job_id

    return check


ContextDep = Annotated[Context, Depends(_context)]
OriginDep = Annotated[str, Depends(_origin)]
JobIdDep = Annotated[str, Depends(_id_of("vid", "generation"))]
DistillationIdDep = Annotated[str, Depends(_id_of("dist", "distillation"))]
LimitDep = Annotated[int, Query(ge=1, le=100)]
AfterDep = Annotated[str | None, Query(description="`last_id` of the page before")]
