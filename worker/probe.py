"""Is the worker of this machine well? `python -m worker.probe started | ready`, for whoever runs it in a container.

What the worker itself writes to Redis is what is looked at, so this needs the worker's `REDIS_URL` and `LEASE_S` and no
torch. A container has a name of its own, by which its worker is told from the others. One that was killed and started
again is meant by its latest heartbeat; the one before is there for a lease yet.
"""

from __future__ import annotations

import argparse
import socket
import sys

from redis.exceptions import RedisError

from worker.contract import Heartbeat, WorkerState
from worker.records import connect, workers
from worker.settings import QueueSettings, read

_WANTED = {
    "started": frozenset(WorkerState) - {WorkerState.LOADING},
    "ready": frozenset({WorkerState.READY, WorkerState.BUSY}),
}


def problem(beats: list[Heartbeat], host: str, wanted: str) -> str | None:
    """Why the worker of a host is not ``wanted`` ("started": its model is loaded; "ready": it takes jobs)."""
    mine = [beat for beat in beats if beat.host == host]
    if not mine:
        return f"no worker of {host} is known"
    state = max(mine, key=lambda beat: beat.started_at).state
    return None if state in _WANTED[wanted] else f"the worker of {host} is {state}"


def main() -> int:
    """Exit code 0: it is; 1: it is not, or Redis does not answer."""
    parser = argparse.ArgumentParser(prog="python -m worker.probe", description=__doc__)
    parser.add_argument("wanted", choices=sorted(_WANTED))
    wanted = parser.parse_args().wanted
    settings = read(QueueSettings)
    try:
        found = problem(workers(connect(settings.redis_url, patience=1)), socket.gethostname(), wanted)
    except RedisError as error:
        found = f"Redis does not answer ({error})"
    if found:
        sys.stderr.write(f"{found}\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
