"""What the service itself costs and bears: `python -m benchmarks.service`. Needs no model and no running stack.

Each part starts Redis, a worker whose model only takes time (`benchmarks.timed_worker`) and the service, each a process
of its own as in production, and this process asks. All rounds of a part, and the bare FastAPI route that reads are
compared with, are measured in turn in one run on one machine. Writes Markdown to the given file.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import psutil
import uvicorn
from fastapi import FastAPI
from PIL import Image

from benchmarks.timed_worker import ENDS_KEY, VIDEO
from service.ids import new_id
from tests.stack import ROOT, Stack, free_port, wait_for
from worker.contract import record_key
from worker.records import connect

WORKER = "benchmarks.timed_worker"
# What is measured is not how soon the service refuses. 0 is no limit of a key.
LIMITS = {"MAX_QUEUED": "1000000", "MAX_WAIT_S": "1e9", "KEY_MAX_JOBS": "0", "KEY_PER_MINUTE": "0"}
FOR_EVER_S = 3600.0
CLIENTS = 32
POLL_S = 0.5


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rounds: int = 3
    submit_hz: float = 100.0
    submit_s: float = 10.0
    closed_s: float = 4.0
    read_connections: int = 32
    read_s: float = 3.0
    streams: int = 200
    window_s: float = 10.0
    """The CPU of the streams is taken in as many windows as there are rounds."""
    queued: int = 10_000
    deep_s: float = 3.0
    singles: int = 100
    single_s: float = 0.05
    jobs: int = 20_000
    profile: Path | None = None
    """A folder for flame graphs of the service."""


QUICK = Plan(rounds=1, submit_s=3.0, closed_s=1.0, read_s=1.0, window_s=3.0, deep_s=1.0, singles=20, jobs=200)


@dataclass(frozen=True)
class Figure:
    """One line of the report."""

    name: str
    unit: str
    rounds: list[float]
    goal: str = ""


@dataclass(frozen=True)
class Part:
    """What one part found."""

    title: str
    how: str
    figures: list[Figure]
    more: str = ""


# --- asking ----------------------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, kept open, one request at a time. Next to nothing: the service is to be the slow one."""

    def __init__(self) -> None:
        self._received = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect to this machine's ``port``."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    @property
    def is_open(self) -> bool:
        """The service closes connections that nobody has used for a while."""
        return not self._transport.is_closing()

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()

    async def ask(self, request: bytes) -> bytes:
        """The body of the answer. Ends the program if that is an error: then nothing here means anything."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        status, body = await self._answer
        if not 200 <= status < 300:
            raise SystemExit(f"error: {request.partition(b' HTTP')[0].decode()}: {status} {body.decode()}")
        return body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or self._answer is None:
            return
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if len(body) >= (int(length[1]) if length else 0):
            self._received = b""
            self._answer.set_result((int(head[9:12]), body))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the service has hung up"))


class Stream(asyncio.Protocol):
    """Follows one job, and counts what it is told."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self.events = 0
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(get(f"/generate/{self._job_id}/events"))

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"event: ")

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_open = False


def get(path: str, method: str = "GET") -> bytes:
    """A request without a body."""
    return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def post(image: bytes, *headers: str, **fields: object) -> bytes:
    """`POST /generate` as a form."""
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in {"prompt": "x", **fields}.items()]
    parts.append(b'name="image"; filename="x.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + image)
    body = b"".join(b"--benchmark\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
    body += b"--benchmark--\r\n"
    head = ["POST /generate HTTP/1.1", "Host: 127.0.0.1", "Content-Type: multipart/form-data; boundary=benchmark"]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def photo() -> bytes:
    """A JPEG of 640 x 480 and about 64 KB: a slope of colours with a camera's noise."""
    width, height = 640, 480
    noise = Image.effect_noise((width, height), 24)
    slope = Image.linear_gradient("L").resize((width, height))
    channels = [Image.blend(slope.rotate(turn), noise, 0.5) for turn in (0, 90, 180)]
    buffer = io.BytesIO()
    Image.merge("RGB", [channel.resize((width, height)) for channel in channels]).save(buffer, "JPEG", quality=68)
    return buffer.getvalue()


async def closed_loop(port: int, requests: Iterable[bytes], connections: int, seconds: float) -> list[float]:
    """Ask on so many connections, each again as soon as it is answered. Returns the seconds of each answer."""
    endless, taken = itertools.cycle(requests), list[float]()
    clock = time.perf_counter
    end = clock() + seconds

    async def ask_on() -> None:
        connection = await Connection.open(port)
        while (sent := clock()) < end:
            await connection.ask(next(endless))
            taken.append(clock() - sent)
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(ask_on())
    return taken


async def open_loop(port: int, request: bytes, hz: float, seconds: float, seed: int) -> list[float]:
    """Ask at random moments, ``hz`` a second on average, whether or not the earlier ones are answered.

    Returns the seconds of each answer, from when it was due.
    """
    loop, source, taken = asyncio.get_running_loop(), random.Random(seed), list[float]()
    idle: list[Connection] = []

    async def ask_at(due: float) -> None:
        await asyncio.sleep(due - loop.time())
        connection = None
        while idle and not (connection := idle.pop()).is_open:
            connection = None
        connection = connection or await Connection.open(port)
        await connection.ask(request)
        taken.append(loop.time() - due)
        idle.append(connection)

    due, end = loop.time(), loop.time() + seconds
    async with asyncio.TaskGroup() as group:
        while (due := due + source.expovariate(hz)) < end:
            group.create_task(ask_at(due))
    for connection in idle:
        connection.close()
    return taken


async def submitted(port: int, count: int) -> list[str]:
    """The ids of so many new jobs, oldest first."""
    connection, request = await Connection.open(port), post(photo())
    ids = [json.loads(await connection.ask(request))["id"] for _ in range(count)]
    connection.close()
    return ids


# --- what is asked ---------------------------------------------------------------------------------------------------


@contextmanager
def running(plan: Plan, part: str, job_s: float, *arguments: str) -> Iterator[Stack]:
    """Redis, worker and service, with nothing in them."""
    with tempfile.TemporaryDirectory(prefix="flg-") as folder:
        stack = Stack(Path(folder), **LIMITS)
        try:
            stack.redis.start()
            stack.spawn(WORKER, "--seconds", str(job_s), *arguments)
            stack.spawn("service")
            stack.wait_ready()
            with profiled(plan, part, stack):
                yield stack
        finally:
            if worker := stack.processes.get(WORKER):
                worker.kill()  # it may have work for an hour
            stack.stop()


@contextmanager
def profiled(plan: Plan, part: str, stack: Stack) -> Iterator[None]:
    """With a flame graph of the service, if the plan asks for it."""
    if plan.profile is None:
        yield
        return
    plan.profile.mkdir(parents=True, exist_ok=True)
    graph = plan.profile / f"{part}.svg"
    command = [
        "py-spy",
        "record",
        "--nonblocking",
        "--gil",
        "--pid",
        str(service_of(stack).pid),
        "--output",
        str(graph),
    ]
    spy = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603
    try:
        yield
    finally:
        spy.send_signal(signal.SIGINT)
        spy.wait(60)


@contextmanager
def bare(stack: Stack) -> Iterator[tuple[int, psutil.Process]]:
    """A FastAPI app of one small route, served as the service is; yields its port and its process."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.service", "--bare"]
    with (stack.folder / "bare.log").open("ab") as log:
        environment = {**stack.environment, "PORT": str(port)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)  # noqa: S603
    try:
        wait_for(lambda: _listens(port), 20, "the bare route")
        yield port, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def serve_bare() -> int:
    """The service's own main with another app, so that every setting of uvicorn and logging is the same."""
    from service import __main__ as service_main

    sys.argv = sys.argv[:1]
    app, run = FastAPI(), uvicorn.run

    @app.get("/generate/{job_id}")
    async def read(job_id: str) -> dict[str, str]:
        return {"id": job_id, "status": "queued"}

    uvicorn.run = lambda _app, **settings: run(app, **settings)
    return service_main.main()


def service_of(stack: Stack) -> psutil.Process:
    return psutil.Process(stack.processes["service"].pid)


def cpu_s(process: psutil.Process) -> float:
    """Seconds of CPU that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def status_of(stack: Stack, job_id: str) -> str:
    with connect(stack.redis.url) as redis:
        return cast(str, redis.hget(record_key(job_id), "status"))


def wait_until(stack: Stack, job_id: str, status: str) -> None:
    wait_for(lambda: status_of(stack, job_id) == status, 30, f"a job to be {status}")


def percentile(values: list[float], percent: int) -> float:
    """In milliseconds, of seconds."""
    return 1000 * statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


# --- submit ----------------------------------------------------------------------------------------------------------


def submit(plan: Plan) -> Part:
    """New jobs at a given rate, then as fast as they are taken."""
    image = photo()
    request = post(image)
    latencies, costs, rates = [], [], []
    for round_ in range(plan.rounds):
        with running(plan, "submit", 1.0) as stack:
            service = service_of(stack)
            asyncio.run(submitted(stack.port, 20))
            before = cpu_s(service)
            taken = asyncio.run(open_loop(stack.port, request, plan.submit_hz, plan.submit_s, round_))
            costs.append(1000 * (cpu_s(service) - before) / len(taken))
            latencies.append(taken)
            most = asyncio.run(closed_loop(stack.port, [request], 8, plan.closed_s))
            rates.append(len(most) / plan.closed_s)

    def of(percent: int) -> list[float]:
        return [percentile(taken, percent) for taken in latencies]

    return Part(
        "Submit",
        f"`POST /generate`, a form with a JPEG of {len(image) / 1024:.0f} KB, 640 x 480; cleaned to {VIDEO.width} x "
        f"{VIDEO.height}. {plan.submit_hz:.0f} a second at random moments for {plan.submit_s:.0f} s, counted from when "
        f"each was due; then 8 connections, each again as soon as it is answered. The worker has jobs of 1 s.",
        [
            Figure("p50", "ms", of(50), "<= 15"),
            Figure("p95", "ms", of(95)),
            Figure("p99", "ms", of(99)),
            Figure("CPU of the service for each", "ms", costs),
            Figure("most, closed loop", "/s", rates),
        ],
    )


# --- reads -----------------------------------------------------------------------------------------------------------


def reads(plan: Plan) -> Part:
    """`GET /generate/{id}`, beside a route that does nothing."""
    names = ("bare", "finished", "queued")
    rates: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
    ours = []
    with running(plan, "reads", 0.0) as stack, bare(stack) as (bare_port, bare_process):
        [finished] = asyncio.run(submitted(stack.port, 1))
        wait_until(stack, finished, "succeeded")
        stack.processes[WORKER].kill()
        stack.spawn(WORKER, "--seconds", str(FOR_EVER_S))
        first, queued = asyncio.run(submitted(stack.port, 2))
        wait_until(stack, first, "running")
        targets = {
            "bare": (bare_port, bare_process, finished),
            "finished": (stack.port, service_of(stack), finished),
            "queued": (stack.port, service_of(stack), queued),
        }
        for round_ in range(-1, plan.rounds):  # the first only warms everything up
            for name, (port, process, job_id) in targets.items():
                before, own = cpu_s(process), time.process_time()
                load = closed_loop(port, [get(f"/generate/{job_id}")], plan.read_connections, plan.read_s)
                number = len(asyncio.run(load))
                if round_ >= 0:
                    rates[name].append(number / plan.read_s)
                    costs[name].append(1000 * (cpu_s(process) - before) / number)
                    if name == "bare":
                        ours.append(100 * (time.process_time() - own) / plan.read_s)

    def over(ours: list[float], theirs: list[float]) -> list[float]:
        return [a / b for a, b in zip(ours, theirs, strict=True)]

    return Part(
        "Status reads",
        f"`GET /generate/{{id}}` on {plan.read_connections} connections, each again as soon as it is answered, for "
        f"{plan.read_s:.0f} s; in turn with a bare FastAPI route under the same settings of uvicorn.",
        [
            Figure("of a finished job", "/s", rates["finished"], ">= 1500"),
            Figure("of a queued job", "/s", rates["queued"], ">= 1500"),
            Figure("bare route", "/s", rates["bare"]),
            Figure("finished over bare", "", over(rates["finished"], rates["bare"]), ">= 0.5"),
            Figure("queued over bare", "", over(rates["queued"], rates["bare"]), ">= 0.5"),
            Figure("CPU of the service, finished", "ms", costs["finished"]),
            Figure("CPU of the service, queued", "ms", costs["queued"]),
            Figure("CPU of the bare route", "ms", costs["bare"]),
            Figure("CPU, bare over finished", "", over(costs["bare"], costs["finished"])),
            Figure("CPU, bare over queued", "", over(costs["bare"], costs["queued"])),
            Figure("who asks: CPU meanwhile, bare route", "% of a core", ours),
        ],
    )


# --- event streams ---------------------------------------------------------------------------------------------------


def streams(plan: Plan) -> Part:
    """What it costs to tell many clients how their jobs stand."""
    ahead = round(plan.rounds * plan.window_s) + 10  # are over before the last window is
    with running(plan, "streams-moving", 1.0) as stack:
        idle = _shares(service_of(stack), 1, plan.window_s)[0]
        moving = asyncio.run(_followed(plan, stack, plan.streams + ahead))
    with running(plan, "streams-still", FOR_EVER_S) as stack:
        still = asyncio.run(_followed(plan, stack, plan.streams))

    def above_idle(shares: list[float]) -> list[float]:
        return [share - idle for share in shares]

    return Part(
        "Event streams",
        f"`GET /generate/{{id}}/events`: CPU of the service in {plan.rounds} windows of {plan.window_s:.0f} s, less "
        f"what it uses when nobody asks. Moving: a worker with jobs of 1 s works through the queue, "
        f"{plan.streams + ahead} streams at first and {moving.open_at_end} at the end. Still: {plan.streams} streams, "
        f"the worker is at one job all the time.",
        [
            Figure("moving", "% of a core", above_idle(moving.shares), "< 5"),
            Figure("still", "% of a core", above_idle(still.shares)),
            Figure("nobody asks", "% of a core", [idle]),
            Figure("events sent, moving", "/s", moving.event_rates),
            Figure("events sent, still", "/s", still.event_rates),
        ],
    )


@dataclass(frozen=True)
class _Followed:
    shares: list[float]
    event_rates: list[float]
    open_at_end: int


async def _followed(plan: Plan, stack: Stack, number: int) -> _Followed:
    loop = asyncio.get_running_loop()
    _, *ids = await submitted(stack.port, number + 1)
    followers = [
        (await loop.create_connection(lambda job_id=job_id: Stream(job_id), "127.0.0.1", stack.port))[1]
        for job_id in ids
    ]
    await asyncio.sleep(min(3.0, plan.window_s))
    process = service_of(stack)
    shares, event_rates = [], []
    for _ in range(plan.rounds):
        before = sum(follower.events for follower in followers)
        shares += await asyncio.to_thread(_shares, process, 1, plan.window_s)
        event_rates.append((sum(follower.events for follower in followers) - before) / plan.window_s)
    open_at_end = sum(follower.is_open for follower in followers)
    if any(not follower.events for follower in followers) or open_at_end < plan.streams:
        raise SystemExit(f"error: {open_at_end} streams of {number} are open, and some may have been told nothing")
    for follower in followers:
        follower.transport.abort()
    return _Followed(shares, event_rates, open_at_end)


def _shares(process: psutil.Process, windows: int, seconds: float) -> list[float]:
    """CPU of a process in each window, in percent of a core."""
    shares = []
    for _ in range(windows):
        before, began = cpu_s(process), time.perf_counter()
        time.sleep(seconds)
        shares.append(100 * (cpu_s(process) - before) / (time.perf_counter() - began))
    return shares


# --- a long queue ----------------------------------------------------------------------------------------------------


def deep(plan: Plan) -> Part:
    """Reads while very many jobs wait."""
    figures = []
    with running(plan, "deep", FOR_EVER_S) as stack:
        first, queued = asyncio.run(submitted(stack.port, 2))
        wait_until(stack, first, "running")
        ids = copied(stack.redis.url, queued, plan.queued)
        asked = {
            "status with position": [get(f"/generate/{job_id}") for job_id in random.Random(0).sample(ids, 100)],
            "list of 20": [get("/generate?limit=20")],
        }
        position = json.loads(asyncio.run(_answer(stack.port, get(f"/generate/{ids[-1]}"))))["queue_position"]
        if position != plan.queued + 1:
            raise SystemExit(f"error: the last of {plan.queued + 1} queued jobs has position {position}")
        for name, connections in itertools.product(asked, (1, 4)):
            rounds = [
                asyncio.run(closed_loop(stack.port, asked[name], connections, plan.deep_s)) for _ in range(plan.rounds)
            ]
            what = f"{name}, {connections} at a time"
            figures.append(Figure(f"{what}, p50", "ms", [percentile(taken, 50) for taken in rounds]))
            figures.append(Figure(f"{what}, p99", "ms", [percentile(taken, 99) for taken in rounds], "<= 50"))
    return Part(
        "A long queue",
        f"{plan.queued} queued jobs, made by copying in Redis what the service wrote of one; 100 of them are asked "
        f"for, each again as soon as it is answered, for {plan.deep_s:.0f} s.",
        figures,
    )


async def _answer(port: int, request: bytes) -> bytes:
    connection = await Connection.open(port)
    body = await connection.ask(request)
    connection.close()
    return body


def copied(redis_url: str, job_id: str, number: int) -> list[str]:
    """Ids of so many new jobs that are to Redis what this one is, whatever keys that takes."""
    ids, old = [new_id("vid") for _ in range(number)], job_id.encode()
    with connect(redis_url, text=False) as redis, redis.pipeline(transaction=False) as pipeline:
        for key in list(redis.scan_iter(count=1000)):
            add = _adder(redis, pipeline, key, old)
            for new in ids if add else ():
                add(new.encode())
            pipeline.execute()
    return ids


def _adder(redis: Any, pipeline: Any, key: bytes, old: bytes) -> Callable[[bytes], None] | None:
    """What writes of a new job what ``key`` holds of the old one; None where that is nothing."""
    kind = redis.type(key)
    if kind == b"zset" and (score := redis.zscore(key, old)) is not None:
        return lambda new: pipeline.zadd(key, {new: score})
    if kind == b"set" and redis.sismember(key, old):
        return lambda new: pipeline.sadd(key, new)
    if kind == b"list" and redis.lpos(key, old) is not None:
        return lambda new: pipeline.rpush(key, new)
    if kind == b"hash" and old in key:
        values = redis.hgetall(key)
        return lambda new: pipeline.hset(
            key.replace(old, new), mapping={name: value.replace(old, new) for name, value in values.items()}
        )
    if kind == b"hash" and (value := redis.hget(key, old)) is not None:
        return lambda new: pipeline.hset(key, new, value)
    return None


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(plan: Plan) -> Part:
    """What many jobs leave behind."""
    marks = [mark for mark in (1_000, 5_000, 10_000, 20_000) if mark < plan.jobs]
    marks = [*(marks or [plan.jobs // 4]), plan.jobs]
    with running(plan, "memory", 0.0, "--no-mp4") as stack:
        began = time.perf_counter()
        samples, kept_id = asyncio.run(_lives(stack, plan.jobs, marks))
        rate = plan.jobs / (time.perf_counter() - began)
        with connect(stack.redis.url) as redis:
            kept = {key: redis.memory_usage(key) for key in redis.scan_iter(f"*{kept_id}*", count=1000)}
    base = next((mark for mark in marks if mark >= 5_000), marks[0])
    start, end = samples[base], samples[plan.jobs]

    def grown(name: str) -> list[float]:
        return [end[name] - start[name]]

    rows = "\n".join(
        f"| {mark:,} | " + " | ".join(f"{value:.1f}" for value in sample.values()) + " |"
        for mark, sample in samples.items()
    )
    sizes = ", ".join(f"`{key.replace(kept_id, '{id}')}` {size:,}" for key, size in sorted(kept.items()))
    return Part(
        "Memory",
        f"{plan.jobs:,} jobs whose model takes no time, {CLIENTS} at a time. Nine of ten bring a small picture and are "
        f"read every {1000 * POLL_S:.0f} ms until they are over, the tenth a photograph, with `Prefer: wait`. Every "
        f"second one is deleted, the others are left until they expire (in a week). No ffmpeg, which is a process of "
        f"its own. One round. Bytes in Redis of a job that is kept: {sizes}.",
        [
            Figure(f"service, from {base:,} to {plan.jobs:,}", "MB", grown("service"), "flat"),
            Figure(f"worker, from {base:,} to {plan.jobs:,}", "MB", grown("worker"), "flat"),
            Figure("Redis, data for each job", "bytes", [1e6 * grown("data")[0] / (plan.jobs - base)]),
            Figure("jobs, everything included", "/s", [rate]),
        ],
        f"\n| jobs | service, MB | worker, MB | Redis, MB | its data, MB |\n|---:|---:|---:|---:|---:|\n{rows}\n",
    )


async def _lives(stack: Stack, number: int, marks: list[int]) -> tuple[dict[int, dict[str, float]], str]:
    """Let so many jobs be asked for, made and read; megabytes at each mark, and a job that was kept."""
    waiting, polling = post(photo(), "Prefer: wait=60"), post(small_picture())
    numbers, over, kept = iter(range(number)), 0, ""
    samples: dict[int, dict[str, float]] = {}

    async def live() -> None:
        nonlocal over, kept
        connection = await Connection.open(stack.port)
        for i in numbers:
            job = json.loads(await connection.ask(polling if i % 10 else waiting))
            while job["status"] != "succeeded":
                if job["status"] not in ("queued", "running"):
                    raise SystemExit(f"error: {job['id']} is {job['status']}: {job['error']}")
                await asyncio.sleep(POLL_S)
                job = json.loads(await connection.ask(get(f"/generate/{job['id']}")))
            if i % 2:
                await connection.ask(get(f"/generate/{job['id']}", "DELETE"))
            else:
                kept = job["id"]
            over += 1
            if over in marks:
                samples[over] = _megabytes(stack)
                sys.stderr.write(f"  {over:,} jobs: {samples[over]}\n")
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(live())
    return samples, kept


def small_picture() -> bytes:
    """A PNG of a video's size."""
    buffer = io.BytesIO()
    Image.new("RGB", (VIDEO.width, VIDEO.height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def _megabytes(stack: Stack) -> dict[str, float]:
    pids = {name: stack.processes[module].pid for name, module in (("service", "service"), ("worker", WORKER))}
    resident = {
        name: psutil.Process(pid).memory_info().rss / 1e6
        for name, pid in {**pids, "redis": cast(subprocess.Popen[bytes], stack.redis.process).pid}.items()
    }
    with connect(stack.redis.url) as redis:
        return {**resident, "data": redis.info("memory")["used_memory"] / 1e6}


# --- one job at a time -----------------------------------------------------------------------------------------------


def latency(plan: Plan) -> Part:
    """What service and queue add to the time that the model takes."""
    found: dict[str, list[list[float]]] = {"started": [], "succeeded": [], "both": [], "waiting": []}
    for _ in range(plan.rounds):
        with running(plan, "latency", plan.single_s) as stack:
            asyncio.run(_one_by_one(stack, 3))
            for name, values in asyncio.run(_one_by_one(stack, plan.singles, plan.single_s)).items():
                found[name].append(values)

    def of(name: str, percent: int) -> list[float]:
        return [percentile(values, percent) for values in found[name]]

    return Part(
        "One job at a time",
        f"{plan.singles} jobs whose model takes {1000 * plan.single_s:.0f} ms, one after another with `Prefer: wait`. "
        f"The end includes what comes after the model: the MP4 and its files. What the client sees is all of its time "
        f"but the model's, the upload among it.",
        [
            Figure("accepted to started, p50", "ms", of("started", 50)),
            Figure("accepted to started, p95", "ms", of("started", 95)),
            Figure("end of the model's work to succeeded, p50", "ms", of("succeeded", 50)),
            Figure("end of the model's work to succeeded, p95", "ms", of("succeeded", 95)),
            Figure("both, p50", "ms", of("both", 50), "<= 40"),
            Figure("both, p95", "ms", of("both", 95)),
            Figure("request less the model's time, as the client sees it, p50", "ms", of("waiting", 50)),
        ],
    )


async def _one_by_one(stack: Stack, number: int, single_s: float = 0.0) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"started": [], "succeeded": [], "both": [], "waiting": []}
    connection, image = await Connection.open(stack.port), photo()
    with connect(stack.redis.url) as redis:
        for seed in range(number):
            sent = time.perf_counter()
            job = json.loads(await connection.ask(post(image, "Prefer: wait=60", seed=seed)))
            found["waiting"].append(time.perf_counter() - sent - single_s)
            record = cast(dict[str, str], redis.hgetall(record_key(job["id"])))
            started = float(record["started_at"]) - float(record["created_at"])
            ended = float(record["finished_at"]) - float(cast(str, redis.hget(ENDS_KEY, str(seed))))
            found["started"].append(started)
            found["succeeded"].append(ended)
            found["both"].append(started + ended)
    connection.close()
    return found


# --- the report ------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Plan], Part]] = {
    "submit": submit,
    "reads": reads,
    "streams": streams,
    "deep": deep,
    "latency": latency,
    "memory": memory,
}


def main() -> int:
    """Measure and write the report. Exit code 1: a request was not answered as it should have been."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts between commas: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a rehearsal of a minute; its numbers mean little")
    parser.add_argument("--jobs", type=int, help="how many the memory is watched over")
    parser.add_argument("--profile", type=Path, help="a folder for a flame graph of the service for each part (py-spy)")
    parser.add_argument("--out", type=Path, help="beside this program where nothing was left out, else nowhere")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        return serve_bare()
    names = options.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.profile and not shutil.which("py-spy"):
        parser.error("--profile: there is no py-spy; pip install py-spy")
    plan = replace(QUICK if options.quick else Plan(), profile=options.profile)
    plan = replace(plan, jobs=options.jobs or plan.jobs)
    load, began, parts = os.getloadavg()[0], time.monotonic(), []
    for name in names:
        sys.stderr.write(f"{name} ...\n")
        parts.append(PARTS[name](plan))
    report = _report(parts, load, time.monotonic() - began)
    sys.stdout.write(report)
    whole = replace(Plan(), profile=None) == plan and names == list(PARTS)
    if out := options.out or (Path(__file__).with_suffix(".md") if whole else None):
        out.write_text(report)
    return 0


def _report(parts: list[Part], load: float, seconds: float) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "uvicorn", "pydantic", "redis", "rq"))
    faster = [name for name in ("uvloop", "httptools", "hiredis") if importlib.util.find_spec(name)]
    sections = "\n".join(section(part) for part in parts)
    return f"""# The service under load

`python -m benchmarks.service`: service, worker, Redis and who asks share {os.cpu_count()} cores \
({platform.machine()}, load {load:.2f} before). Python {platform.python_version()}, {libraries}; with \
{", ".join(faster) or "none of uvloop, httptools, hiredis"}. Took {seconds / 60:.1f} minutes. Lowest and highest \
are of the rounds.
{sections}"""


def section(part: Part) -> str:
    """One part as Markdown."""
    rows = "\n".join(
        f"| {figure.name} | **{_number(statistics.median(figure.rounds))}** {figure.unit} | "
        f"{_number(min(figure.rounds))} | {_number(max(figure.rounds))} | {len(figure.rounds)} | {figure.goal} |"
        for figure in part.figures
    )
    return f"""
## {part.title}

{part.how}

| | median | lowest | highest | rounds | goal |
|---|---:|---:|---:|---:|---:|
{rows}
{part.more}"""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
