"""`/metrics` in Prometheus' format, and the layer that times each request for it and for the log.

Counters and histograms are the fleet's (`worker.metrics`); gauges are looked up when somebody asks. A request costs a
few additions in memory: they reach Redis every few seconds, at the end, and before `/metrics` is answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, cast
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.telemetry import TelemetryConfig
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from redis import Redis
from redis.exceptions import NoPermissionError
from rq import Queue
from rq.registry import (
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.suspension import WORKERS_SUSPENDED
from rq.worker import WorkerStatus
from rq.worker_registration import REDIS_WORKER_KEYS
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.deps import Context, ContextDep, MetricsDep
from service.ids import created_at
from service.routes import docs
from worker import tracing
from worker.contract import (
    COURIER_KEY,
    RELEASE_KEY,
    SLOTS_TOTAL_KEY,
    WEBHOOKS_DEAD_KEY,
    WEBHOOKS_DUE_KEY,
    Distillation,
    Record,
)
from worker.metrics import METRICS, Metrics, Series, complete, read
from worker.records import now, workers

log = logging.getLogger("service.access")

router = APIRouter(tags=["health"])

PROBES = frozenset({"/livez", "/readyz", "/metrics"})
"""What machines ask every few seconds: neither logged nor traced."""
_FLUSH_S = 5
_LOOK_S = 1
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})
_QUEUED = {Record.queue: Record.queued_key, Distillation.queue: Distillation.queued_key}
_REGISTRIES = {
    "started": StartedJobRegistry,
    "finished": FinishedJobRegistry,
    "failed": FailedJobRegistry,
    "deferred": DeferredJobRegistry,
    "scheduled": ScheduledJobRegistry,
}
"""Where rq keeps its jobs, by the status that rq-exporter gives them."""


def _metrics(request: Request) -> Metrics:
    return cast(Metrics, request.app.state.metrics)


@router.get(
    "/metrics",
    summary="Numbers for Prometheus",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}, "example": docs.METRICS}}},
        **docs.refusals("metrics", 422),
    },
)
def metrics(
    context: ContextDep,
    counted: Annotated[Metrics, Depends(_metrics)],
    _principal: MetricsDep,
    accept: Annotated[str, Header()] = "",
) -> Response:
    """Counters and gauges of the whole fleet: Prometheus' text, or OpenMetrics for who asks for it."""
    counted.flush(context.redis)
    found = complete({**read(context.redis), **_gauges(context, counted)})
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Found(found))
    return Response(encode(registry), headers={"Content-Type": content_type})


class _Found(Collector):
    """What was read, as prometheus_client wants it."""

    def __init__(self, found: Mapping[str, list[Series]]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        """Every metric of the table, also those that nothing is known of yet."""
        for metric in METRICS.values():
            series = self._found[metric.name]
            if metric.kind == "histogram":
                histogram = HistogramMetricFamily(metric.exposed, metric.help, labels=metric.labels)
                for one in series:
                    histogram.add_metric(one.labels, buckets=list(one.buckets), sum_value=one.value)
                yield histogram
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.exposed, metric.help, labels=metric.labels)
            for one in series:
                family.add_metric(one.labels, one.value)
            yield family


# --- gauges ----------------------------------------------------------------------------------------------------------


def _gauges(context: Context, counted: Metrics) -> dict[str, list[Series]]:
    found = {
        **_queues(context.redis),
        **_webhooks(context.redis),
        **_workers(context.redis),
        **_rq(context.redis),
        **_redis(context.redis),
        "sse_streams": [Series((), counted.gauges["sse_streams"])],
    }
    if (free := context.storage.free_bytes()) is not None:
        found["disk_free_bytes"] = [Series((), free)]
    return found


def _queues(redis: Redis) -> dict[str, list[Series]]:
    with redis.pipeline(transaction=False) as pipeline:
        for key in _QUEUED.values():
            pipeline.smembers(key)
        pipeline.get(SLOTS_TOTAL_KEY)
        pipeline.exists(WORKERS_SUSPENDED)
        *waiting, total_ms, is_paused = pipeline.execute()
    moment = now()
    # Ids sort by age.
    waits = [max(0.0, moment - created_at(min(ids))) if ids else 0.0 for ids in waiting]
    return {
        "queue_depth": [Series((queue,), len(ids)) for queue, ids in zip(_QUEUED, waiting, strict=True)],
        "oldest_queued_seconds": [Series((queue,), wait_s) for queue, wait_s in zip(_QUEUED, waits, strict=True)],
        "backlog_seconds": [Series((), float(total_ms or 0) / 1000)],
        "queue_paused": [Series((), is_paused)],
    }


def _webhooks(redis: Redis) -> dict[str, list[Series]]:
    with redis.pipeline(transaction=False) as pipeline:
        pipeline.zcard(WEBHOOKS_DUE_KEY)
        pipeline.zrange(WEBHOOKS_DUE_KEY, 0, 0, withscores=True)
        pipeline.zcard(WEBHOOKS_DEAD_KEY)
        pipeline.exists(COURIER_KEY)
        due, first, dead, couriers = pipeline.execute()
    late_s = max((now() - due_at for _, due_at in first), default=0.0)
    return {
        "webhooks_due": [Series((), due)],
        "webhooks_dead": [Series((), dead)],
        # One that is on its way is due again when the courier's lease of it is over.
        "webhooks_late_seconds": [Series((), max(0.0, late_s))],
        "courier_up": [Series((), couriers)],
    }


def _workers(redis: Redis) -> dict[str, list[Series]]:
    alive = workers(redis)
    memory: dict[str, float] = {}
    for worker in alive:
        if worker.gpu_mem_bytes:
            memory[worker.engine] = memory.get(worker.engine, 0) + worker.gpu_mem_bytes
    canaries = [worker.canary for worker in alive if worker.canary]
    slowdowns = [canary.seconds / canary.first_seconds for canary in canaries if canary.first_seconds]
    return {
        "worker_up": _numbers("worker_up", (worker.state for worker in alive)),
        "worker_model": _numbers("worker_model", (worker.models[0] for worker in alive if worker.models)),
        "worker_release": _numbers("worker_release", (one.release.state for one in alive if one.release)),
        "canary_slowdown_ratio": [Series((), max(slowdowns))] if slowdowns else [],
        "gpu_mem_bytes": [Series((engine,), held) for engine, held in sorted(memory.items())],
        "release_number": [Series((), float(cast(str | None, redis.hget(RELEASE_KEY, "number")) or 0))],
    }


def _numbers(name: str, said: Iterable[str]) -> list[Series]:
    """How many say each of what the gauge's one label may say."""
    counted = Counter(said)
    [label] = METRICS[name].labels
    return [Series((value,), counted[value]) for value in METRICS[name].values.get(label, sorted(counted))]


def _redis(redis: Redis) -> dict[str, list[Series]]:
    """What Redis says of itself; nothing where our user may not ask."""
    asked = time.perf_counter()
    redis.ping()
    call_s = time.perf_counter() - asked
    try:
        said: dict[str, Any] = redis.info()
    except NoPermissionError:
        log.debug("the user of REDIS_URL may not call INFO")
        said = {}
    checks = {
        "aof_enabled": ("aof_enabled", 1),
        "aof_rewrite": ("aof_last_bgrewrite_status", "ok"),
        "aof_write": ("aof_last_write_status", "ok"),
        "noeviction": ("maxmemory_policy", "noeviction"),
    }
    values = {
        "redis_memory_bytes": said.get("used_memory"),
        "redis_memory_limit_bytes": said.get("maxmemory") or said.get("total_system_memory"),
        "redis_clients": said.get("connected_clients"),
        "redis_ops_per_second": said.get("instantaneous_ops_per_sec"),
        "redis_uptime_seconds": said.get("uptime_in_seconds"),
        "redis_call_seconds": call_s,
    }
    return {
        **{name: [Series((), float(value))] for name, value in values.items() if value is not None},
        "redis_ok": [Series((name,), said[key] == good) for name, (key, good) in checks.items() if key in said],
    }


def _rq(redis: Redis) -> dict[str, list[Series]]:
    """What rq-exporter shows, read from rq's own keys: its classes would ask Redis for each worker in turn."""
    with redis.pipeline(transaction=False) as pipeline:
        for queue in _QUEUED:
            pipeline.llen(f"{Queue.redis_queue_namespace_prefix}{queue}")
            for registry in _REGISTRIES.values():
                pipeline.zcard(registry.key_template.format(queue))
        pipeline.smembers(REDIS_WORKER_KEYS)
        *counts, keys = pipeline.execute()
    with redis.pipeline(transaction=False) as pipeline:
        for key in sorted(keys):
            pipeline.hmget(key, "queues", "state")
        known = Counter((queues, state) for queues, state in pipeline.execute() if queues and state)
    labels = [(queue, status) for queue in _QUEUED for status in ("queued", *_REGISTRIES)]
    for queue in _QUEUED:
        for status in WorkerStatus:
            known.setdefault((queue, str(status)), 0)
    return {
        "rq_jobs": [Series(one, count) for one, count in zip(labels, counts, strict=True)],
        "rq_workers": [Series(one, count) for one, count in sorted(known.items())],
    }


# --- each request ----------------------------------------------------------------------------------------------------


class HttpMetrics:
    """Counts and times each request, and gives it a line in the log. Outside of all other layers.

    Neither has the query: signatures of links are in there. The line has the path, the metrics have its pattern only,
    since each value of a label is kept for ever.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500
        is_stream = False

        async def noting_send(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
                if is_stream:
                    self._metrics.shift("sse_streams", 1)
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            if is_stream:
                self._metrics.shift("sse_streams", -1)
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route, method = _route(scope), scope["method"]
        known = method if method in _METHODS else "other"
        self._metrics.count("http_requests_total", method=known, route=route, status=str(status))
        self._metrics.observe("http_request_seconds", seconds, route=route)
        if scope["path"] in PROBES:
            return
        path = quote(scope["path"])
        request_id = scope.get("state", {}).get("request_id")
        fields = {"method": method, "path": path, "status": status, "ms": round(1000 * seconds, 1)}
        log.info(
            "%s %s %d %.1f ms %s",
            *fields.values(),
            request_id or "-",
            extra={**fields, **({"request_id": request_id} if request_id else {})},
        )


def _route(scope: Scope) -> str:
    """The pattern that a path has matched."""
    if route := scope.get("route"):
        return str(route.path)
    if "app_root_path" in scope:  # below a mount, whose children have no patterns
        return f"{scope['root_path'].removeprefix(scope['app_root_path'])}/{{path}}"
    return "unmatched"


def telemetry() -> TelemetryConfig:
    """What FastAPI is to tell OpenTelemetry: a span for each request. Numbers and log lines have their own ways out."""
    return {
        "tracer_provider": tracing.provider(),
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "exclude": lambda scope: scope["path"] in PROBES,
    }


async def keep_timing(metrics: Metrics) -> None:
    """Find out each second how late this process's event loop is, and how long a call waits for one of its threads."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        metrics.observe("event_loop_lag_seconds", max(0.0, loop.time() - due))
        asked = time.perf_counter()
        metrics.observe("thread_wait_seconds", await run_in_threadpool(time.perf_counter) - asked)


async def keep_flushing(metrics: Metrics, redis: Redis) -> None:
    """Bring what was counted to Redis every few seconds, and once more when this task is cancelled."""
    try:
        while True:
            await asyncio.sleep(_FLUSH_S)
            await run_in_threadpool(metrics.flush, redis)
    finally:
        metrics.flush(redis)
