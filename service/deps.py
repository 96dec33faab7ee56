"""What routes ask for, each as one annotated alias."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, cast

import httpx
from fastapi import Depends, Query, Request
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service.auth import Authenticator, Principal
from service.distillations import DistillationStore
from service.errors import ApiError
from service.events import Hub
from service.jobs import JobStore
from service.links import Secrets
from service.reading import Reader
from service.schema import Sign
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
    authenticator: Authenticator
    reader: Reader
    hub: Hub
    link_secrets: Secrets
    sign: Sign
    outside: httpx.AsyncClient
    """For what clients name: reaches public addresses only."""


# Each is `async`, though it waits for nothing: FastAPI calls others in a thread of their own, for a tenth of a read.


async def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


def origin_of(request: Request) -> str:
    """How links begin: the configured address, else where this request came in."""
    settings = cast(Context, request.app.state.context).settings
    return str(settings.public_url or request.base_url).rstrip("/")


async def _origin(request: Request) -> str:
    return origin_of(request)


class Requires(SecurityBase):
    """Lets a request pass whose key has the scope. Tests find out by it what each route asks for, and `/docs` too."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.scheme_name = "API key"
        self.model = HTTPBearer(description="`fl_...`, where the service needs keys")

    async def __call__(self, request: Request) -> Principal:
        """Who asks. Raises ``ApiError`` 401, 403."""
        context = cast(Context, request.app.state.context)
        return await context.authenticator.require(request, self.scope)


async def _whoever(request: Request) -> Principal | None:
    return await cast(Context, request.app.state.context).authenticator.principal(request)


def _id_of(prefix: str, noun: str) -> Callable[[str], Awaitable[str]]:
    """Checks for an id as we make them; anything else was never a job, and never reaches a key or a path."""

    async def check(job_id: str) -> str:
        if not re.fullmatch(prefix + "_[0-9a-z]{26}", job_id):
            raise ApiError(404, "not_found", f"there is no {noun} {job_id[:64]!r}")
        return job_id

    return check


ContextDep = Annotated[Context, Depends(_context)]
OriginDep = Annotated[str, Depends(_origin)]
generation_id = _id_of("vid", "generation")
JobIdDep = Annotated[str, Depends(generation_id)]
DistillationIdDep = Annotated[str, Depends(_id_of("dist", "distillation"))]
LimitDep = Annotated[int, Query(ge=1, le=100)]
AfterDep = Annotated[str | None, Query(description="`last_id` of the page before")]

GeneratorDep = Annotated[Principal, Depends(Requires("generate"))]
ReaderDep = Annotated[Principal, Depends(Requires("read"))]
AdminDep = Annotated[Principal, Depends(Requires("admin"))]
MetricsDep = Annotated[Principal, Depends(Requires("metrics"))]
OptionalPrincipalDep = Annotated[Principal | None, Depends(_whoever)]
"""None for somebody without a key where one is needed: the route decides."""
