"""What it costs to serve another student: `python -m benchmarks.release`.

Starts Redis, the service and two workers with the bundled student, as `tests.stack` does. While clients ask for one
video after another, students of other weights are promoted and rolled back: once with the graph built already (refit),
once with nothing built (build). Then the engines' own times, in this process. Writes Markdown to the given file.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import httpx

from benchmarks.service import Figure, Part, percentile, section
from tests.stack import ROOT, Stack, wait_for
from tests.students import BUNDLED, make_student
from worker.contract import LOCAL
from worker.pipeline import Options, VideoPipeline
from worker.records import connect, ready_workers
from worker.release import publish, student_of
from worker.releases import Releases
from worker.settings import Settings
from worker.storage import Storage

PROMPT = "a red circle moves right quickly, static camera"
WORKERS = 2


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rounds: int = 5
    clients: int = 4
    """Each asks again as soon as it has its video."""
    before_s: float = 10.0
    engine_rounds: int = 3


QUICK = Plan(rounds=1, before_s=4.0, engine_rounds=1)


@dataclass
class Swaps:
    """What one kind of promotion took, by rounds."""

    swap_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    before: list[list[float]] = field(default_factory=list)
    """Seconds of each request of a round."""
    during: list[list[float]] = field(default_factory=list)


class Clients:
    """Ask for videos until the end; remember when each was asked for and came."""

    def __init__(self, url: str, count: int) -> None:
        self._url = url
        self._image = (ROOT / "models/examples/red-circle.png").read_bytes()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]
        self.times: list[tuple[float, float]] = []
        self.errors: list[str] = []
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=90, headers={"Prefer": "wait=60"}) as http:
            while not self._ended.is_set():
                began = time.monotonic()
                files = {"image": ("in.png", self._image, "image/png")}
                answer = http.post("/generate", data={"prompt": PROMPT}, files=files).json()
                self.times.append((began, time.monotonic()))
                if answer.get("status") != "succeeded":
                    self.errors.append(str(answer.get("error")))

    def end(self) -> None:
        """Stop asking, and wait for what is under way."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def between(self, start: float, end: float) -> list[float]:
        """Seconds of the requests of which a part lay in this time."""
        return [came - asked for asked, came in self.times if asked < end and came > start]


@contextmanager
def running(folder: Path) -> Iterator[Stack]:
    """Service and workers."""
    stack = Stack(folder, STUDENTS=str(folder / "students"), ENGINES=str(folder / "engines"), KEY_PER_MINUTE="0")
    try:
        stack.start()
        for number in range(1, WORKERS):
            stack.processes[f"worker {number}"] = stack.processes.pop("worker")
            stack.spawn("worker")
        redis = connect(stack.redis.url)
        wait_for(lambda: len(ready_workers(redis)) == WORKERS, 120, "the workers")
        yield stack
        redis.close()
    finally:
        stack.stop()


def switch(http: httpx.Client, path: str, **body: object) -> tuple[float, float]:
    """Promote or roll back; when that was answered, and when all workers had done it."""
    answer = http.post(path, json=body)
    answer.raise_for_status()
    flipped, wanted = time.monotonic(), answer.json()["sha256"]

    def is_done() -> bool:
        workers = http.get("/admin/release").json()["workers"]
        if failed := [one["message"] for one in workers if one["state"] == "failed"]:
            raise RuntimeError(f"a worker could not load the student: {failed[0]}")
        return all((one["loaded"], one["state"]) == (wanted, "loaded") for one in workers)

    wait_for(is_done, 300, "the workers to have the student")
    return flipped, time.monotonic()


def swaps(plan: Plan, folder: Path) -> dict[str, Swaps]:
    """Promote and roll back, ``plan.rounds`` times each way."""
    found = {"refit": Swaps(), "build": Swaps()}
    with running(folder) as stack, httpx.Client(base_url=stack.url, timeout=90) as http:
        releases, storage = Releases(connect(stack.redis.url)), Storage(str(stack.storage))
        for number in range(2 * plan.rounds):
            how = ("refit", "build")[number % 2]
            out = folder / f"student-{number}"
            make_student(out, factor=1.01 + 0.01 * number)
            student = releases.register(student_of(publish(storage, out), by=LOCAL))
            if how == "build":
                shutil.rmtree(folder / "engines")
            clients = Clients(stack.url, plan.clients)
            try:
                time.sleep(plan.before_s)
                start, end = switch(http, f"/admin/students/{student.sha256}/promote", force=True)
                made = {worker["how"] for worker in http.get("/admin/release").json()["workers"]}
                back, done = switch(http, "/admin/students/rollback")
            finally:
                clients.end()
            # Of two workers of one machine that build at the same time, one waits and has the other's.
            assert how in made <= {how, "loaded"}, (how, made)
            if clients.errors:
                raise RuntimeError(f"{len(clients.errors)} requests failed: {clients.errors[0]}")
            one = found[how]
            one.swap_s.append(end - start)
            one.back_s.append(done - back)
            one.before.append(clients.between(start - plan.before_s, start))
            one.during.append(clients.between(start, end))
    return found


def engine_seconds(plan: Plan, folder: Path) -> dict[str, list[float]]:
    """Of the engine alone, comparison with PyTorch included: built, refitted, found as it is."""
    seconds: dict[str, list[float]] = {"build": [], "refit": [], "loaded": []}
    make_student(folder / "other")
    for number in range(plan.engine_rounds):
        options = Options.of(Settings(engines=folder / f"engines-{number}", torch_threads=1))
        for how, model in (("build", BUNDLED), ("refit", folder / "other"), ("loaded", folder / "other")):
            choice = VideoPipeline(model, options).choice
            assert choice.made == how, (choice.made, how)
            seconds[how].append(choice.seconds)
    return seconds


def part_of(title: str, how: str, one: Swaps) -> Part:
    """One section of the report."""
    p50, p95 = ([percentile(times, percent) for times in one.before] for percent in (50, 95))
    during50, during95 = ([percentile(times, percent) for times in one.during] for percent in (50, 95))
    ratios = [[a / b for a, b in zip(x, y, strict=True)] for x, y in ((during50, p50), (during95, p95))]
    requests = f"{sum(map(len, one.before))} requests before, {sum(map(len, one.during))} during; none failed."
    return Part(
        title,
        f"{how} {requests}",
        [
            Figure("promotion to all workers serving it", "s", one.swap_s),
            Figure("roll back to all workers serving it", "s", one.back_s),
            Figure("request before, p50", "ms", p50),
            Figure("request during, p50", "ms", during50),
            Figure("during over before, p50", "", ratios[0]),
            Figure("request before, p95", "ms", p95),
            Figure("request during, p95", "ms", during95),
            Figure("during over before, p95", "", ratios[1]),
        ],
    )


def main() -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a rehearsal; its numbers mean little")
    parser.add_argument("--out", type=Path, help="beside this program unless it is a rehearsal, else nowhere")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    load, began = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = swaps(plan, Path(folder))
        engines = engine_seconds(plan, Path(folder))
    ratio = statistics.median(engines["build"]) / statistics.median(engines["refit"])
    parts = [
        part_of("Other weights", "The graph has been built before; each worker puts other weights in.", found["refit"]),
        part_of("A new graph", "Nothing is built; each worker exports the graph beside its jobs.", found["build"]),
        Part(
            "The engine alone",
            "onnxruntime on one thread, idle machine: made and compared with PyTorch.",
            [
                Figure("built", "s", engines["build"]),
                Figure("other weights put in", "s", engines["refit"]),
                Figure("found as it is", "s", engines["loaded"]),
            ],
            f"\nA refit takes 1/{ratio:.1f} of a build.\n",
        ),
    ]
    report = _report(plan, parts, load, time.monotonic() - began)
    sys.stdout.write(report)
    if out := options.out or (None if options.quick else Path(__file__).with_suffix(".md")):
        out.write_text(report)
    return 0


def _report(plan: Plan, parts: list[Part], load: float, seconds: float) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "onnxruntime", "redis", "rq"))
    command = "python -m benchmarks.release" + (" --quick" if plan == QUICK else "")
    sections = "\n".join(map(section, parts))
    return f"""# Serving another student

`{command}`: {WORKERS} workers of one thread with the bundled student, service, Redis and {plan.clients} clients share \
{os.cpu_count()} cores ({platform.machine()}, load {load:.2f} before). Each client asks again as soon as it has its \
video. Python {platform.python_version()}, {libraries}. Took {seconds / 60:.1f} minutes. Lowest and highest are of the \
rounds.
{sections}"""


if __name__ == "__main__":
    raise SystemExit(main())
