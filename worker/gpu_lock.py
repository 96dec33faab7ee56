"""Whose turn it is where serving and training share a GPU: the trainer's policies, the lock, and the worker's part.

    share         nobody's: both run (on a CPU, or each on a GPU of its own)
    serve-first   training goes on while nobody has waited for a video for a while, and else stops at a checkpoint
    window        training has the GPU for itself within these hours, if there is something to train: it takes the lock,
                  workers finish their jobs, end, and wait until it is free

The lock is a Redis key with a lease: that of an owner who died runs out. No torch here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from datetime import time as TimeOfDay
from typing import Protocol, cast

from redis import Redis
from redis.exceptions import RedisError

from worker.contract import GpuHolder, Record, WorkerState, gpu_key
from worker.records import workers

_LOOK_S = 1.0

# KEYS: lock. ARGV: owner, what to write, lease (s).
_TAKE = """
local held = redis.call('GET', KEYS[1])
if held and cjson.decode(held).owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
"""
# KEYS: lock. ARGV: owner.
_RELEASE = """
local held = redis.call('GET', KEYS[1])
if held and cjson.decode(held).owner == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


def name_of_gpu(configured: str = "auto") -> str:
    """What worker and trainer of one GPU both call it: the UUID of the first that this process may use, or the host."""
    if configured != "auto":
        return configured
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if visible.startswith("GPU-"):
        return visible
    if visible.isdigit() and (program := shutil.which("nvidia-smi")):
        command = [program, f"--id={visible}", "--query-gpu=uuid", "--format=csv,noheader"]
        with suppress(subprocess.SubprocessError):
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
            if said.stdout.startswith("GPU-"):
                return said.stdout.strip()
    return socket.gethostname()


def holder(redis: Redis, gpu: str) -> GpuHolder | None:
    """Who has the GPU for itself now."""
    text = cast(str | None, redis.get(gpu_key(gpu)))
    return GpuHolder.model_validate_json(text) if text else None


class GpuLock:
    """One owner's hand on the lock of one GPU."""

    def __init__(self, redis: Redis, gpu: str, owner: str, lease_s: int) -> None:
        self._redis, self._gpu, self._owner, self._lease_s = redis, gpu, owner, lease_s

    def take(self, until: float) -> bool:
        """Take it, or renew it where it is ours; False while it is somebody else's."""
        text = GpuHolder(owner=self._owner, until=until).model_dump_json()
        return bool(self._redis.eval(_TAKE, 1, gpu_key(self._gpu), self._owner, text, self._lease_s))

    def is_free(self) -> bool:
        """Whether nobody else has it."""
        found = holder(self._redis, self._gpu)
        return found is None or found.owner == self._owner

    def release(self) -> None:
        """Give it back, if it is ours."""
        self._redis.eval(_RELEASE, 1, gpu_key(self._gpu), self._owner)


# --- the trainer's policies ------------------------------------------------------------------------------------------


class Turns(Protocol):
    """When training may run. `begin` and `end` enclose a run; both may be asked for at any time."""

    def may_begin(self) -> bool:
        """Whether a run may be taken from the queue now."""

    def may_go_on(self) -> bool:
        """Whether one that has begun may go on; asked every moment, so that a lease is renewed."""

    def is_clear(self) -> bool:
        """Whether everybody else has left the GPU, after `may_go_on` has said so once."""

    def end(self) -> None:
        """The run is over, or stopped."""


class Share:
    """Always."""

    def may_begin(self) -> bool:
        """Yes."""
        return True

    may_go_on = is_clear = may_begin

    def end(self) -> None:
        """There is nothing to give back."""


class ServeFirst:
    """While nobody has waited for a video, or been made one, for ``idle_s``."""

    def __init__(self, redis: Redis, gpu: str, idle_s: int) -> None:
        self._redis, self._idle_s = redis, idle_s
        # In Redis, as the processes that look take turns: the trainer, and the fork that follows a run.
        self._key = f"{gpu_key(gpu)}:served"

    def may_begin(self) -> bool:
        """Whether it has been quiet for long enough."""
        if self._is_serving():
            self._redis.set(self._key, "1", ex=self._idle_s)
            return False
        return not self._redis.exists(self._key)

    may_go_on = may_begin

    def is_clear(self) -> bool:
        """Workers keep their models; they are quiet."""
        return True

    def end(self) -> None:
        """There is nothing to give back."""

    def _is_serving(self) -> bool:
        if self._redis.scard(Record.queued_key):
            return True
        return any(worker.state is WorkerState.BUSY for worker in workers(self._redis))


@dataclass(frozen=True)
class Window:
    """Hours of the day, in this machine's time; they may go over midnight."""

    begin: TimeOfDay
    end: TimeOfDay

    @classmethod
    def parse(cls, text: str) -> Window:
        """`22:00-06:00`. Raises ``ValueError``."""
        try:
            begin, end = (datetime.strptime(part.strip(), "%H:%M").time() for part in text.split("-"))
        except ValueError:
            raise ValueError(f"got {text!r}; wanted two times of the day, for example 22:00-06:00") from None
        if begin == end:
            raise ValueError(
                f"got {text!r}, which is no time at all; for all day leave it out, with TRAIN_POLICY=share"
            )
        return cls(begin, end)

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"

    def ends_at(self, now: datetime) -> datetime | None:
        """When the window that ``now`` is in closes; None outside."""
        for days in (-1, 0):
            day = now.date() + timedelta(days)
            begin = datetime.combine(day, self.begin, now.tzinfo)
            end = datetime.combine(day + timedelta(self.end <= self.begin), self.end, now.tzinfo)
            if begin <= now < end:
                return end
        return None


def local_time() -> datetime:
    """Now, as the clock on the wall has it."""
    return datetime.now().astimezone()


class InWindow:
    """Within a window, and then alone."""

    def __init__(
        self, redis: Redis, gpu: str, window: Window, lock: GpuLock, clock: Callable[[], datetime] = local_time
    ) -> None:
        self._redis, self._gpu, self._window, self._lock, self._clock = redis, gpu, window, lock, clock

    def may_begin(self) -> bool:
        """Whether the window is open. The lock is taken once there is a run, not before: until then videos are made."""
        return self._window.ends_at(self._clock()) is not None and self._lock.is_free()

    def may_go_on(self) -> bool:
        """Takes the lock, or renews it."""
        end = self._window.ends_at(self._clock())
        return end is not None and self._lock.take(end.timestamp())

    def is_clear(self) -> bool:
        """Whether no worker of this GPU has its models loaded any more."""
        return not any(w.gpu == self._gpu and w.state is not WorkerState.WAITING for w in workers(self._redis))

    def end(self) -> None:
        """Give the lock back."""
        self._lock.release()


# --- the worker's part -----------------------------------------------------------------------------------------------


def give_way(redis: Redis, gpu: str, show: Callable[..., None]) -> None:
    """Return once no training has this GPU for itself; from then on this process ends when one takes it.

    Args:
        redis: decodes responses.
        gpu: see `name_of_gpu`. It stands in the heartbeat already, or training would not wait for what comes now.
        show: changes what the heartbeat says.
    """
    until = None
    while found := holder(redis, gpu):
        if found.until != until:
            until = found.until
            show(state=WorkerState.WAITING, waiting_until=until)
        time.sleep(_LOOK_S)
    if until is not None:
        show(state=WorkerState.LOADING, waiting_until=None)
    _Yielding(redis, gpu).start()


class _Yielding(threading.Thread):
    """Ends this process, as SIGTERM would, when training takes the GPU: jobs in flight are finished, no more taken.

    Whoever supervises it starts it anew, and it waits then.
    """

    def __init__(self, redis: Redis, gpu: str) -> None:
        super().__init__(name="gpu lock", daemon=True)
        self._redis, self._gpu = redis, gpu

    def run(self) -> None:
        """Look now and then. Of a Redis that does not answer nothing is known."""
        while True:
            time.sleep(_LOOK_S)
            try:
                if holder(self._redis, self._gpu):
                    break
            except RedisError:
                continue
        os.kill(os.getpid(), signal.SIGTERM)
