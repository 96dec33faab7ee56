"""The processes of one machine that share a run: `python -m distill run RECIPE FOLDER --processes 8`.

As torchrun starts them (for several machines it is torchrun that does), but they end as one process would: with its
exit code, and with all the time that a checkpoint takes. No torch here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from types import FrameType

LAUNCHED = ("LOCAL_RANK", "WORLD_SIZE")
"""In the environment of a process that was started by this or by torchrun."""
RESUMABLE = 75
"""Exit code of one that was interrupted: so are the others, and each ends when it is ready."""
_POLL_S = 0.2
_OTHERS_S = 15.0
"""That the others get when one of them has ended with an error: to say what they have to say."""
_STOPS = (signal.SIGTERM, signal.SIGINT)


def together(command: Sequence[str], processes: int) -> int:
    """Run a command in so many processes, and return the exit code of the first that ended with another than 0.

    SIGTERM and SIGINT are handed on. When one ends with an error the others, which would wait for it, are ended. Where
    one was killed by a signal, this process is too.
    """
    started: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {stop: signal.signal(stop, hand_on) for stop in _STOPS}
    try:
        beside = {
            "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(),
        }  # fmt: skip
        # As torchrun has it: processes that share the cores do not each take all of them.
        usual = {"OMP_NUM_THREADS": max((os.cpu_count() or 1) // processes, 1)}
        for rank in range(processes):
            own = {**beside, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**{k: str(v) for k, v in usual.items()}, **os.environ, **{k: str(v) for k, v in own.items()}}
            started.append(
                subprocess.Popen(  # noqa: S603 (this command, as the user gave it)
                    command, env=environment, preexec_fn=_end_with_parent if sys.platform == "linux" else None
                )
            )
        code = _first_error(started)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for stop, handler in before.items():
            signal.signal(stop, handler)
    if code < 0:
        os.kill(os.getpid(), -code)
        return 128 - code  # a signal that this process is deaf to
    return code


def _first_error(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended, or one with an error and the others a while later; its code, or 0."""
    code, until = 0, float("inf")
    while True:
        codes = [process.poll() for process in started]
        failed = next((one for one in codes if one), 0)
        if failed and not code:
            code, until = failed, float("inf") if failed == RESUMABLE else time.monotonic() + _OTHERS_S
            for process, ended in zip(started, codes, strict=True):
                if ended is None:
                    process.terminate()
        if None not in codes or time.monotonic() > until:
            return code
        time.sleep(_POLL_S)


def _free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def _end_with_parent() -> None:
    """In the new process: have the kernel kill it when the one that started it is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
