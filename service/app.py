"""`create_app(settings)`: the FastAPI application. One lifespan, one error envelope, no state outside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_swagger import patch_fastapi
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from service import errors, links
from service.auth import Authenticator
from service.deps import Context
from service.distillations import DistillationStore
from service.events import Hub
from service.guard import guarded_client
from service.jobs import JobStore
from service.middleware import BodyLimit, RequestId, SameSite
from service.reading import Reader
from service.routes import (
    admin,
    generate,
    health,
    metrics,
    openai_videos,
    playground,
    students,
    videos,
)
from service.routes import (
    distillations as distillation_routes,
)
from service.settings import Settings
from worker import tracing
from worker.connection import warn_if_it_loses
from worker.metrics import Metrics
from worker.records import connect, connect_async
from worker.storage import Storage

log = logging.getLogger("service")

_UPKEEP_S = 30
_OUTSIDE_S = 10


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings; connections open with the lifespan, so many may exist in one process."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        redis = connect(settings.redis_url, patience=3)
        queue_redis = connect(settings.redis_url, text=False, patience=3)
        async_redis = connect_async(settings.redis_url)
        storage = Storage(settings.storage_url)
        store = JobStore(settings, redis, queue_redis, storage)
        distillations = DistillationStore(redis, queue_redis, storage)
        reader = Reader(async_redis, store.lookout)
        hub = Hub(async_redis, reader)
        await run_in_threadpool(warn_if_it_loses, redis)
        link_secrets = await run_in_threadpool(links.Secrets, redis)
        outside = guarded_client(settings.private_hosts, https_only=False, timeout_s=_OUTSIDE_S)
        app.state.context = Context(
            settings=settings,
            redis=redis,
            async_redis=async_redis,
            storage=storage,
            store=store,
            distillations=distillations,
            authenticator=Authenticator(settings, async_redis),
            reader=reader,
            hub=hub,
            link_secrets=link_secrets,
            sign=links.signer(link_secrets, settings),
            outside=outside,
        )
        tasks = [
            asyncio.create_task(_keep_up(store.upkeep, distillations.upkeep, link_secrets.refresh)),
            asyncio.create_task(hub.run()),
        ]
        tasks.append(asyncio.create_task(metrics.keep_flushing(app.state.metrics, redis)))
        tasks.append(asyncio.create_task(metrics.keep_timing(app.state.metrics)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await outside.aclose()
            await run_in_threadpool(tracing.flush)
            await async_redis.aclose()
            redis.close()
            queue_redis.close()

    app = FastAPI(
        title="FastLightGen",
        summary="An image and a sentence in, the URL of an MP4 out.",
        version="0.1.0",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        telemetry=metrics.telemetry(),
    )
    app.state.metrics = Metrics()
    # FastAPI's own page loads Swagger UI from a CDN; this one serves it from here.
    patch_fastapi(app, docs_url="/docs", redirect_from_root_to_docs=False)
    errors.install(app)
    for module in (generate, openai_videos, videos, health, metrics, playground, admin, students, distillation_routes):
        app.include_router(module.router)
    app.mount("/web", playground.Web(directory=playground.WEB), name="web")
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if not settings.needs_key:
        app.add_middleware(SameSite, public_url=settings.public_url)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer"],
            expose_headers=["Location", "Retry-After", "X-Request-Id", "openai-poll-after-ms"],
        )
    app.add_middleware(RequestId)
    app.add_middleware(metrics.HttpMetrics, metrics=app.state.metrics)
    return app


async def _keep_up(*upkeep: Callable[[], None]) -> None:
    """Put right what crashes left, at start and now and then; whatever goes wrong here must not end it."""
    while True:
        for work in upkeep:
            try:
                await run_in_threadpool(work)
            except RedisError as error:
                log.warning("upkeep put off: %s", error)
            except Exception:
                log.exception("upkeep failed")
        await asyncio.sleep(_UPKEEP_S)
