"""What is counted and timed, for Prometheus: one Redis hash for the whole fleet. No torch, no HTTP.

Workers and services come and go and there may be several of each, so none of them is asked for its own numbers: each
adds to the hash at ``METRICS_KEY``, and any service's `/metrics` shows the sums. A field is ``name|label=value|...``,
its labels in order of the alphabet; a histogram has a field ``name_bucket|le=bound|...`` for each of its buckets, which
counts what lies between the bound before it and its own, and ``name_sum|...``.

No prompt, id of a job, name of a worker or API key may be a label: each value of a label is a series that is kept for
ever. What a label may say is in the table wherever it is known beforehand. Such series are shown from the beginning,
with 0: Prometheus' `increase` does not see the first event of a counter that was not there before.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from redis import Redis
from redis.exceptions import RedisError

from worker.contract import METRICS_KEY, QUEUE, TRAIN_QUEUE, Phase, Record, Status, WorkerState, events_key

log = logging.getLogger(__name__)

_SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_QUEUES = (QUEUE, TRAIN_QUEUE)
_GIVEN_UP = ("attempts_lost", "storage_failed", "store_failed", "worker_crashed")
"""Codes of jobs whose every attempt was lost."""
_ENDS = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True)
class Metric:
    """One line of the table: what a name stands for."""

    name: str
    """Without the prefix that it has outside."""
    kind: Literal["counter", "histogram", "gauge"]
    help: str
    labels: tuple[str, ...] = ()
    """In order of the alphabet."""
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets; one without an end comes after them."""
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What a label may say, for those of which that is known beforehand."""

    @property
    def exposed(self) -> str:
        """Its name on `/metrics`."""
        return self.name if self.name.startswith("rq_") else f"flg_{self.name}"


_TABLE = (
    # --- jobs
    Metric(
        "jobs_total",
        "counter",
        "Videos that are over, by how they ended.",
        ("model", "status"),
        values={"status": (*_ENDS, Status.EXPIRED)},
    ),
    Metric(
        "generation_failures_total",
        "counter",
        "Videos that failed, by the code of their error.",
        ("code",),
        values={
            "code": (
                *_GIVEN_UP,
                "deadline",
                "deadline_start",
                "generation_failed",
                "input_missing",
                "model_gone",
                "out_of_memory",
                "timed_out",
            )
        },
    ),
    Metric(
        "distillations_total",
        "counter",
        "Distillations that are over, by how they ended.",
        ("status",),
        values={"status": _ENDS},
    ),
    Metric(
        "distillation_failures_total",
        "counter",
        "Distillations that failed, by the code of their error.",
        ("code",),
        values={
            "code": (*_GIVEN_UP, "gate_failed", "invalid_run", "no_rival", "run_crashed", "student_broken"),
        },
    ),
    Metric(
        "requeues_total",
        "counter",
        "Jobs that went back to the queue.",
        ("cause",),
        values={"cause": ("engine", "handed_back", "lease", "lost", "reconciled", "redis", "resumed", "storage")},
    ),
    Metric("queue_wait_seconds", "histogram", "From being accepted to the first start.", (), _LONG_S),
    Metric(
        "phase_seconds",
        "histogram",
        "Time of each phase of a video that succeeded.",
        ("phase",),
        _LONG_S,
        {"phase": tuple(Phase)},
    ),
    Metric("job_seconds", "histogram", "From the start of the attempt that succeeded to its end.", ("model",), _LONG_S),
    Metric(
        "eta_error_seconds",
        "histogram",
        "How far a video's end was from what was said when it was accepted.",
        ("side",),
        _LONG_S,
        {"side": ("early", "late")},
    ),
    Metric(
        "cancel_latency_seconds", "histogram", "From the cancel of a running job to its end.", (), (*_SHORT_S, 30.0)
    ),
    Metric(
        "admission_rejected_total",
        "counter",
        "Requests for a video that were not let in.",
        ("reason",),
        values={"reason": ("conflict", "disk", "full", "jobs", "rate", "wait")},
    ),
    Metric("queue_depth", "gauge", "Jobs that wait.", ("queue",), values={"queue": _QUEUES}),
    Metric(
        "oldest_queued_seconds",
        "gauge",
        "For how long the oldest of them has waited.",
        ("queue",),
        values={"queue": _QUEUES},
    ),
    Metric("backlog_seconds", "gauge", "What the videos at hand are expected to take one worker."),
    Metric("queue_paused", "gauge", "1 while an admin has workers take no jobs."),
    # --- workers
    Metric(
        "worker_up",
        "gauge",
        "Workers by what they say of themselves.",
        ("state",),
        values={"state": tuple(WorkerState)},
    ),
    Metric("worker_starts_total", "counter", "Starts of worker processes."),
    Metric("worker_model", "gauge", "Workers by the model that answers when a request names none.", ("model",)),
    Metric(
        "worker_release",
        "gauge",
        "Workers by how far they are with the student that was released last.",
        ("state",),
        values={"state": ("failed", "loaded", "staging")},
    ),
    Metric(
        "canaries_total",
        "counter",
        "Clips that idle workers have made to see whether they still can.",
        ("result",),
        values={"result": ("failed", "ok")},
    ),
    Metric("canary_slowdown_ratio", "gauge", "Time of a worker's latest canary over that of its first; the worst one."),
    Metric("gpu_mem_bytes", "gauge", "GPU memory that the workers hold.", ("engine",)),
    Metric("release_number", "gauge", "Number of the latest release; 0 before the first."),
    # --- webhooks
    Metric(
        "webhook_deliveries_total",
        "counter",
        "Tries to deliver a webhook.",
        ("result",),
        values={"result": ("dead", "delivered", "failed")},
    ),
    Metric("webhooks_due", "gauge", "Webhooks that have not arrived yet."),
    Metric("webhooks_dead", "gauge", "Webhooks that were given up."),
    Metric("webhooks_late_seconds", "gauge", "For how long the one that is due first has waited for a courier."),
    Metric("courier_up", "gauge", "1 while a process sends webhooks."),
    # --- the service
    Metric("http_requests_total", "counter", "HTTP requests.", ("method", "route", "status")),
    Metric("http_request_seconds", "histogram", "From a request to the end of its answer.", ("route",), _SHORT_S),
    Metric(
        "event_loop_lag_seconds",
        "histogram",
        "How late a service's event loop is, looked at each second.",
        (),
        _SHORT_S,
    ),
    Metric("thread_wait_seconds", "histogram", "How long a call waits for a thread there, likewise.", (), _SHORT_S),
    Metric("sse_streams", "gauge", "Event streams that clients of this one service follow."),
    Metric("disk_free_bytes", "gauge", "Room where videos are kept."),
    # --- Redis
    Metric("redis_memory_bytes", "gauge", "Memory that Redis uses."),
    Metric("redis_memory_limit_bytes", "gauge", "What it may use: maxmemory, or all that its machine has."),
    Metric("redis_clients", "gauge", "Connections to it."),
    Metric("redis_ops_per_second", "gauge", "Commands that it has just now been doing each second."),
    Metric("redis_uptime_seconds", "gauge", "Since it has started."),
    Metric("redis_call_seconds", "gauge", "What one call to it has just taken."),
    Metric(
        "redis_ok",
        "gauge",
        "1 for each thing that jobs rely on and that is so.",
        ("check",),
        values={"check": ("aof_enabled", "aof_rewrite", "aof_write", "noeviction")},
    ),
    # --- as rq-exporter has them, without the names of workers
    Metric(
        "rq_workers",
        "gauge",
        "RQ workers",
        ("queues", "state"),
        values={"queues": _QUEUES, "state": ("busy", "idle", "started", "suspended")},
    ),
    Metric(
        "rq_jobs",
        "gauge",
        "RQ jobs by state",
        ("queue", "status"),
        values={
            "queue": _QUEUES,
            "status": ("deferred", "failed", "finished", "queued", "scheduled", "started"),
        },
    ),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}
"""Everything that `/metrics` may show, by name."""

_STORED = {metric.name: metric for metric in _TABLE if metric.kind == "counter"} | {
    f"{metric.name}_{part}": metric for metric in _TABLE if metric.kind == "histogram" for part in ("bucket", "sum")
}


class Metrics:
    """Counts in memory until it is told to add what it has to the fleet's. For any thread."""

    def __init__(self) -> None:
        self._adding = threading.Lock()
        self._amounts: defaultdict[str, float] = defaultdict(float)
        self.gauges: defaultdict[str, float] = defaultdict(float)
        """What is true of this process alone, by name; shown by itself and never added to the fleet's."""

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        _check(name, "counter", labels)
        self._add({_field(name, labels): amount})

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put one value into a histogram."""
        _check(name, "histogram", labels)
        bounds = METRICS[name].bounds
        bound = (*bounds, math.inf)[bisect_left(bounds, value)]
        bucket = _field(f"{name}_bucket", {**labels, "le": _bound_text(bound)})
        self._add({bucket: 1, _field(f"{name}_sum", labels): value})

    def shift(self, name: str, by: float) -> None:
        """Move a gauge of this process."""
        with self._adding:
            self.gauges[name] += by

    def _add(self, amounts: Mapping[str, float]) -> None:
        with self._adding:
            for field, amount in amounts.items():
                self._amounts[field] += amount

    def flush(self, redis: Redis) -> None:
        """Add what has come together to the fleet's sums, in one call. Where Redis does not answer it is kept."""
        with self._adding:
            amounts, self._amounts = self._amounts, defaultdict(float)
        if not amounts:
            return
        try:
            with redis.pipeline() as pipeline:
                for field, amount in amounts.items():
                    pipeline.hincrbyfloat(METRICS_KEY, field, amount)
                pipeline.execute()
        except RedisError as error:
            log.warning("metrics not written, kept for the next time: %s", error)
            self._add(amounts)


def _check(name: str, kind: str, labels: Mapping[str, str]) -> None:
    metric = METRICS[name]
    assert (metric.kind, metric.labels) == (kind, tuple(sorted(labels))), f"{labels} for {metric}"


def _field(name: str, labels: Mapping[str, str]) -> str:
    return "|".join([name, *(f"{label}={value.replace('|', '_')}" for label, value in sorted(labels.items()))])


def _bound_text(bound: float) -> str:
    return "+Inf" if bound == math.inf else str(float(bound))


# --- what a job has to tell ------------------------------------------------------------------------------------------


def observe_start(metrics: Metrics, record: Record) -> None:
    """A job that was just claimed: how long it has waited, if this is its first start."""
    if record.attempt == 1 and record.started_at is not None:
        metrics.observe("queue_wait_seconds", max(0.0, record.started_at - record.created_at))


def observe_success(metrics: Metrics, record: Record, timings_s: Mapping[Any, float], finished_at: float) -> None:
    """A video that has succeeded: its phases, its whole, and how far its end was from what was expected.

    Args:
        metrics: where to put it.
        record: as claimed.
        timings_s: of each phase.
        finished_at: seconds since the epoch.
    """
    for phase, seconds in timings_s.items():
        metrics.observe("phase_seconds", seconds, phase=str(phase))
    if record.started_at is not None:
        metrics.observe("job_seconds", max(0.0, finished_at - record.started_at), model=record.model)
    if record.expected_at is not None:
        late_s = finished_at - record.expected_at
        metrics.observe("eta_error_seconds", abs(late_s), side="late" if late_s > 0 else "early")


def observe_cancel(metrics: Metrics, redis: Redis, job_id: str) -> None:
    """A running job that was just cancelled: how long it has gone on after it was asked to stop."""
    try:
        entries = cast(list[tuple[str, dict[str, str]]], redis.xrevrange(events_key(job_id), count=16))
    except RedisError as error:
        log.warning("%s: its cancel was not timed: %s", job_id, error)
        return
    asked = [entry_id for entry_id, values in entries if values["status"] == Status.CANCELLING]
    if asked and entries[0][1]["status"] == Status.CANCELLED:
        # Both are times of Redis, so no two clocks are compared. Whoever asks again changes nothing: the first counts.
        metrics.observe("cancel_latency_seconds", (_milliseconds(entries[0][0]) - _milliseconds(asked[-1])) / 1000)


def _milliseconds(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One metric for one set of values of its labels, as read."""

    labels: tuple[str, ...]
    """Values, in the order of the metric's labels."""
    value: float = 0.0
    """A counter's; a histogram's sum."""
    buckets: tuple[tuple[str, float], ...] = ()
    """Of a histogram: bound, and how many were not above it."""


def read(redis: Redis) -> dict[str, list[Series]]:
    """The fleet's counters and histograms by name. Raises ``RedisError``."""
    return parse(cast(dict[str, str], redis.hgetall(METRICS_KEY)))


def parse(values: Mapping[str, str]) -> dict[str, list[Series]]:
    """What the hash holds. Fields that are not in the table (another version wrote them) are left out."""
    sums: dict[tuple[str, tuple[str, ...]], float] = {}
    counts: defaultdict[tuple[str, tuple[str, ...]], dict[str, float]] = defaultdict(dict)
    for key, text in values.items():
        stored, *parts = key.split("|")
        labels = dict(part.partition("=")[::2] for part in parts)
        bound = labels.pop("le", None)
        metric = _STORED.get(stored)
        if metric is None or tuple(sorted(labels)) != metric.labels:
            continue
        series = metric.name, tuple(labels[label] for label in metric.labels)
        if bound is None:
            sums[series] = float(text)
        else:
            counts[series][bound] = float(text)
    found: defaultdict[str, list[Series]] = defaultdict(list)
    for (name, label_values), value in sorted(sums.items()):
        metric = METRICS[name]
        buckets = _cumulated(metric.bounds, counts[name, label_values]) if metric.kind == "histogram" else ()
        found[name].append(Series(label_values, value, buckets))
    return found


def _cumulated(bounds: Iterable[float], counts: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    total, buckets = 0.0, []
    for bound in (*bounds, math.inf):
        total += counts.get(_bound_text(bound), 0.0)
        buckets.append((_bound_text(bound), total))
    return tuple(buckets)


def complete(found: Mapping[str, list[Series]]) -> dict[str, list[Series]]:
    """What was found of every metric, and 0 for what may yet be counted. A gauge that was not looked up is not 0."""
    return {
        metric.name: found.get(metric.name, []) + ([] if metric.kind == "gauge" else _not_yet(metric, found))
        for metric in METRICS.values()
    }


def _not_yet(metric: Metric, found: Mapping[str, list[Series]]) -> list[Series]:
    """For each of what the free labels were seen to say, all that the others may say and have not said."""
    seen = {series.labels for series in found.get(metric.name, [])}
    free = [place for place, label in enumerate(metric.labels) if label not in metric.values]
    said = {tuple(labels[place] for place in free) for labels in seen} if free else {()}
    zero = _cumulated(metric.bounds, {}) if metric.kind == "histogram" else ()
    missing = []
    for told in sorted(said):
        choices = iter(told)
        each = [metric.values[label] if label in metric.values else (next(choices),) for label in metric.labels]
        missing += [Series(labels, 0.0, zero) for labels in itertools.product(*each) if labels not in seen]
    return missing
