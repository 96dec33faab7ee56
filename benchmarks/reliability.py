"""How soon what was killed is made good: `python -m benchmarks.reliability`. Needs no model and no running stack.

Each round kills real processes as tests/chaos does, and takes the time; then `benchmarks.soak` runs. Writes Markdown to
the given file. Exit code 1: the soak has found something wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import cast

from benchmarks import soak
from benchmarks.service import Figure, Part, section, small_picture
from tests.chaos.stack import Chaos, chaos_in
from tests.stack import redis_binary, wait_for
from worker.contract import Status

LEASE_S = 8
PICK_UP_S = LEASE_S + 5
STEP_S = 1.0
CANCEL_S = STEP_S + 0.2
LONG_S = 5 * STEP_S
"""Of a job: four steps, and a fifth of its time to decode."""
_FOREVER_S = 600


@contextmanager
def broken(**settings: str) -> Iterator[Chaos]:
    """A stack of one service and no worker."""
    with (
        tempfile.TemporaryDirectory(prefix="flg-reliability-") as name,
        chaos_in(Path(name), small_picture(), LEASE_S=str(LEASE_S), **settings) as stack,
    ):
        stack.start_service()
        yield stack


def _until(condition: Callable[[], bool], what: str) -> float:
    """Seconds until it holds, to the hundredth."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + 120:
            raise SystemExit(f"error: waited 120 s in vain for {what}")
        time.sleep(0.01)
    return time.monotonic() - began


def pick_up(rounds: int, rng: random.Random) -> list[float]:
    """From `kill -9` of a worker to the next attempt of its job, by a worker that has nothing to do."""
    found = []
    with broken() as stack:
        names = [stack.start_worker("--seconds", str(_FOREVER_S)) for _ in range(2)]
        for seed in range(rounds):
            job = stack.submit(seed)
            wait_for(lambda job=job: stack.record(job).status is Status.RUNNING, 20, "the job to run")
            time.sleep(rng.uniform(0, LEASE_S / 2))
            victim = cast(str, stack.record(job).worker)
            stack.kill(victim)
            found.append(_until(lambda job=job: stack.record(job).attempt == 2, "the next attempt"))
            stack.kill(cast(str, stack.record(job).worker))
            stack.store().cancel(job)
            names = [stack.start_worker("--seconds", str(_FOREVER_S)) for _ in names]
            wait_for(lambda job=job: stack.record(job).status.is_terminal, 60, "the job to be over")
    return found


def cancel(rounds: int, rng: random.Random) -> list[float]:
    """From the request to the end of a running job, whose steps take a second."""
    found = []
    with broken() as stack:
        stack.start_worker("--seconds", str(LONG_S))
        for seed in range(rounds):
            job = stack.submit(seed)
            wait_for(lambda job=job: stack.record(job).status is Status.RUNNING, 20, "the job to run")
            time.sleep(rng.uniform(0.1, 2 * STEP_S))
            stack.http.post(f"/generate/{job}/cancel").raise_for_status()
            found.append(_until(lambda job=job: stack.record(job).status is Status.CANCELLED, "the cancel"))
    return found


def redis_restart(rounds: int, rng: random.Random) -> tuple[list[float], list[float], list[float]]:
    """From when a killed Redis answers again to the first request that is taken, and to the first video; and how long a
    request took to be refused meanwhile."""
    taken, made, refused = [], [], []
    with broken() as stack:
        stack.start_worker("--seconds", "0.05")
        stack.succeeded(stack.submit(0))
        for seed in range(1, rounds + 1):
            server = stack.stack.redis.process
            assert server is not None
            server.kill()
            server.wait()
            sent = time.monotonic()
            assert stack.post(seed).status_code == 503
            refused.append(time.monotonic() - sent)
            time.sleep(rng.uniform(0, 3))
            stack.stack.redis.start()
            jobs: list[str] = []

            def is_taken(seed: int = seed, jobs: list[str] = jobs) -> bool:
                response = stack.post(seed)
                if response.status_code == 202:
                    jobs.append(response.json()["id"])
                return bool(jobs)

            taken.append(_until(is_taken, "a request to be taken"))
            made.append(taken[-1] + _until(lambda jobs=jobs: stack.record(jobs[0]).status.is_terminal, "the video"))
            stack.succeeded(*jobs)
    return taken, made, refused


def service_restart(rounds: int) -> list[float]:
    """From `kill -9` of the service, started anew at once, to its first answer."""
    found = []
    with broken() as stack:
        for _ in range(rounds):
            stack.kill_program("service")
            stack.stack.spawn("service")
            found.append(_until(stack.answers, "the service"))
    return found


def figures(rounds: int) -> Part:
    """All of the above."""
    rng = random.Random(0)
    taken, made, refused = redis_restart(rounds, rng)
    return Part(
        "After a fault",
        f"Workers whose model only takes time, a lease of {LEASE_S} s (60 s where LEASE_S says nothing else), steps of "
        f"{STEP_S:.0f} s. The other worker is idle; a fault comes at a random moment of a beat or a step.",
        [
            Figure(
                "`kill -9` of a worker to the next attempt at its job", "s", pick_up(rounds, rng), f"<= {PICK_UP_S}"
            ),
            Figure("cancel of a running job to its end", "s", cancel(2 * rounds, rng), f"<= {CANCEL_S}"),
            Figure("Redis answers again to a request that is taken", "s", taken),
            Figure("Redis answers again to the next video", "s", made),
            Figure("a request to its 503 while Redis is away", "s", refused),
            Figure("`kill -9` of the service, started at once, to its first answer", "s", service_restart(rounds)),
        ],
    )


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each figure: %(default)s")
    parser.add_argument("--jobs", type=int, default=soak.Plan.jobs, help="of the soak; 0: none. %(default)s")
    parser.add_argument("--out", type=Path, help="where the report goes, beside stdout")
    options = parser.parse_args()
    load, began = os.getloadavg()[0], time.monotonic()
    parts = [section(figures(options.rounds))]
    report = soak.run(soak.Plan(jobs=options.jobs)) if options.jobs else None
    if report:
        parts.append(soak.markdown(report))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "uvicorn", "redis", "rq"))
    server = subprocess.run([redis_binary(), "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    libraries += f", redis-server {server.partition('v=')[2].split()[0]}"
    text = f"""# What is killed, and what becomes of it

`python -m benchmarks.reliability`: all processes share {os.cpu_count()} cores ({platform.machine()}, load {load:.2f} \
before). Python {platform.python_version()}, {libraries}. Took {(time.monotonic() - began) / 60:.0f} minutes. Lowest \
and highest are of the rounds. What has to hold, and not how soon, is tested in tests/chaos.
""" + "\n".join(parts)
    sys.stdout.write(text)
    if options.out:
        options.out.write_text(text)
    return 1 if report and report.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
