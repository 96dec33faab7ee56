"""`create_app(settings)`: the FastAPI application. One lifespan, one error envelope, no state outside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from fastapi_swagger import patch_fastapi
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from service import errors
from service.deps import Context
from service.distillations import DistillationStore
from service.jobs import JobStore
from service.middleware import BodyLimit, RequestId
from service.routes import admin, generate, health, playground, videos
from service.settings import Settings
from worker.records import connect, connect_async
from worker.storage import Storage

log = logging.getLogger("service")

_UPKEEP_S = 30


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings; connections open with the lifespan, so many may exist in one process."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        redis = connect(settings.redis_url, patience=3)
        queue_redis = connect(settings.redis_url, text=False, patience=3)
        async_redis = connect_async(settings.redis_url)
        storage = Storage(settings.storage_url)
        store = JobStore(settings, redis, queue_redis, storage)
        distillations = DistillationStore(redis, queue_redis)
        app.state.context = Context(settings, redis, async_redis, storage, store, distillations)
        upkeep = asyncio.create_task(_keep_up(store, distillations))
        try:
            yield
        finally:
            upkeep.cancel()
            with suppress(asyncio.CancelledError):
                await upkeep
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
    )
    # FastAPI's own page loads Swagger UI from a CDN; this one serves it from here.
    patch_fastapi(app, docs_url="/docs", redirect_from_root_to_docs=False)
    errors.install(app)
    for router in (generate.router, videos.router, health.router, playground.router, admin.router):
        app.include_router(router)
    app.mount("/web", StaticFiles(directory=playground.WEB), name="web")
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestId)
    return app


async def _keep_up(*stores: JobStore | DistillationStore) -> None:
    """Put right what crashes left, at start and now and then; whatever goes wrong here must not end it."""
    while True:
        for store in stores:
            try:
                await run_in_threadpool(store.upkeep)
            except RedisError as error:
                log.warning("upkeep put off: %s", error)
            except Exception:
                log.exception("upkeep failed")
        await asyncio.sleep(_UPKEEP_S)
