"""A small process that renews a worker's leases while the worker itself cannot: `Pacemaker` starts it.

A thread that beats stands still while C code holds Python's global lock (a plan of many GB that is read, a kernel that
is compiled). The lease would run out, and two workers would be at one job. So whatever a worker's next beats would say
goes to this process as well, which has no model and no torch. Once the worker has been silent for half a lease it beats
in the worker's place.

It keeps nobody's leases who cannot come back: not while the worker is stopped (SIGSTOP), not when it is gone, and one
that stays silent for ``HANG_S`` it kills, so that whoever supervises the worker starts it anew.

    python -m worker.pacemaker LEASE_S HANG_S    beats on stdin, one JSON object a line; ends with its end
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from redis import Redis
from redis.exceptions import RedisError
from rq.executions import Execution
from rq.serializers import JSONSerializer

from worker import logs
from worker.contract import QUEUE, WORKERS_KEY, Heartbeat, worker_key
from worker.queues import Leases
from worker.records import connect

log = logging.getLogger(__name__)

_END_S = 5
_STOPPED = "Tt"
"""States of a process, as Linux calls them: by a signal, by a debugger."""


class Beat(BaseModel):
    """All that is to be renewed."""

    model_config = ConfigDict(frozen=True)

    heartbeat: Heartbeat
    leases: tuple[tuple[str, str], ...] = ()
    """Of each attempt in flight: the job's id, and rq's id of the execution."""


class Pacemaker:
    """The worker's end of it."""

    def __init__(self, redis_url: str, lease_s: int, hang_s: int, log_format: str = "text") -> None:
        """Start the process.

        Args:
            redis_url: where leases are kept.
            lease_s: how long each lasts.
            hang_s: a worker that is silent for so long is killed; 0: never.
            log_format: of what it says.
        """
        self._command = [sys.executable, "-m", "worker.pacemaker", str(lease_s), str(hang_s)]
        self._environment = {**os.environ, "REDIS_URL": redis_url, "LOG_FORMAT": log_format}
        self._process = self._start()

    def tell(self, beat: Beat) -> None:
        """What is true now. Waits for nothing."""
        if self._process.poll() is not None:
            log.warning("the pacemaker has ended (%s) and is started anew", self._process.returncode)
            self._process = self._start()
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), beat.model_dump_json().encode() + b"\n")
        except (BlockingIOError, BrokenPipeError):  # it is busy with Redis, or has just ended: the next beat
            pass

    def end(self) -> None:
        """Renew nothing more; what this worker has written last stays as it is."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:  # Redis does not answer it
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(  # noqa: S603
            self._command, stdin=subprocess.PIPE, bufsize=0, env=self._environment
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process


class _Stand:
    """The process's end."""

    def __init__(self, redis: Redis, lease_s: float, hang_s: float) -> None:
        self._redis = redis
        self._lease_s = lease_s
        self._hang_s = hang_s
        self._worker = os.getppid()
        self._beat: Beat | None = None
        self._heard_at = self._renewed_at = time.monotonic()

    def run(self) -> None:
        """Until the worker has gone."""
        text = b""
        while os.getppid() == self._worker:
            since = time.monotonic()
            has_heard = bool(select.select([0], [], [], self._lease_s / 16)[0])
            if time.monotonic() > since + self._lease_s / 2:  # both were frozen, and this has thawed first
                self._heard_at = time.monotonic()
            if has_heard:
                piece = os.read(0, 2**16)
                if not piece:
                    return
                *lines, text = (text + piece).split(b"\n")
                if lines:
                    self._hear(lines[-1])
            elif _is_stopped(self._worker):
                self._heard_at = time.monotonic()
            else:
                self._look()

    def _hear(self, line: bytes) -> None:
        self._heard_at = time.monotonic()
        try:
            self._beat = Beat.model_validate_json(line)
        except ValidationError:  # half a line; the next one comes soon
            log.warning("a beat could not be read")

    def _look(self) -> None:
        moment = time.monotonic()
        silent_s = moment - self._heard_at
        if self._hang_s and silent_s > self._hang_s:
            log.error("the worker has hung for %.0f s and is killed", silent_s)
            os.kill(self._worker, signal.SIGKILL)
            self._heard_at, self._beat = moment, None  # process 1 of a container cannot be killed from inside it
        elif silent_s > self._lease_s / 2 and moment - self._renewed_at > self._lease_s / 4:
            if self._renewed_at < self._heard_at:
                log.warning("the worker has been silent for %.1f s; its leases are renewed here", silent_s)
            self._renewed_at = moment
            self._renew()

    def _renew(self) -> None:
        if self._beat is None:
            return
        heartbeat, lease_s = self._beat.heartbeat, int(self._lease_s)
        registry = Leases(QUEUE, connection=self._redis, serializer=JSONSerializer)
        try:
            with self._redis.pipeline() as pipeline:
                pipeline.set(worker_key(heartbeat.name), heartbeat.model_dump_json(), ex=lease_s)
                pipeline.sadd(WORKERS_KEY, heartbeat.name)
                for job_id, execution_id in self._beat.leases:
                    execution = Execution(execution_id, job_id, self._redis, heartbeat.name)
                    execution.heartbeat(registry, lease_s, pipeline)
                pipeline.execute()
        except RedisError as error:
            log.warning("no lease renewed: %s", error)


def _is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process; False where there is no /proc to ask."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(") ")[2][:1] in _STOPPED


def main() -> None:
    """See above."""
    lease_s, hang_s = map(float, sys.argv[1:])
    for name in (signal.SIGINT, signal.SIGTERM):  # those are for the worker, which still needs this
        signal.signal(name, signal.SIG_IGN)
    logs.configure("pacemaker", "INFO", "json" if os.environ.get("LOG_FORMAT") == "json" else "text")
    _Stand(connect(os.environ["REDIS_URL"], text=False, patience=1), lease_s, hang_s).run()


if __name__ == "__main__":
    main()
