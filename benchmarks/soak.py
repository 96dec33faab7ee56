"""A thousand jobs while processes are killed: `python -m benchmarks.soak`. Needs no model and no running stack.

Redis, the service, a courier and three workers whose model only takes time run as processes of their own. A client
keeps jobs under way, cancels some, and sends a request again until it is answered. Every 20 s on average something is
killed (kill -9) or stopped for longer than its lease, and a supervisor starts it again. At the end nothing may be lost,
doubled, torn or left behind; exit code 1 says that something was. The same ``--seed`` draws the same faults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
from redis import Redis
from redis.exceptions import RedisError
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

import service.jobs
from benchmarks.service import small_picture
from benchmarks.timed_worker import ENDS_KEY, POISON
from service.jobs import JobStore
from service.settings import Settings
from service.webhooks import LEASE_S as COURIER_LEASE_S
from tests.chaos.receiver import Receiver
from tests.stack import ROOT, Stack, wait_for
from worker.contract import (
    OUTPUT_SUFFIXES,
    QUEUE,
    SLOTS_KEY,
    SLOTS_TOTAL_KEY,
    WEBHOOK_SECRET_KEY,
    WEBHOOKS_DEAD_KEY,
    WEBHOOKS_DUE_KEY,
    Record,
    Status,
    active_key,
    events_key,
)
from worker.queues import make_queue, unique_name
from worker.records import Records, connect, ready_workers
from worker.storage import Storage

WORKER, SERVICE, COURIER = "benchmarks.timed_worker", "service", "service.webhooks"
LEASE_S = 4
RESERVED_S = 90
"""After which a place is free again that a service had reserved when it was killed."""
FAULTS = {"worker killed": 10, "service killed": 2, "Redis killed": 2, "courier killed": 2, "worker stopped": 2}
"""How often each, in parts of their sum."""
_MOST_SAID = 400


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    jobs: int = 1000
    poisons: int = 2
    workers: int = 3
    seconds: float = 1.5
    """Of the model, for each job; four fifths of it keep others from being begun."""
    under_way: int = 40
    cancel_share: float = 0.03
    every_s: float = 20.0
    """Between two faults, on average."""
    seed: int = 0


@dataclass
class Report:
    """What was done, and what came of it."""

    plan: Plan
    faults: Counter[str] = field(default_factory=Counter)
    figures: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    """What should not be so."""

    def check(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.wrong.append(what if len(what) < _MOST_SAID else f"{what[:_MOST_SAID]}...")


class Machine:
    """All processes, and what kills and restarts them."""

    def __init__(self, folder: Path, plan: Plan, receiver: Receiver, report: Report) -> None:
        self._plan, self._report = plan, report
        limits = {"MAX_QUEUED": "100000", "MAX_WAIT_S": "1e9", "KEY_MAX_JOBS": "0", "KEY_PER_MINUTE": "0"}
        trust = {"PRIVATE_HOSTS": f"127.0.0.1:{receiver.port}"}
        self.stack = Stack(folder, LEASE_S=str(LEASE_S), TMPDIR=str(folder), **limits, **trust)
        self.stack.redis.start()
        self.redis = connect(self.stack.redis.url)
        self.records = Records(self.redis, Record)
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.deaths: defaultdict[str, list[str]] = defaultdict(list)
        """Of each job, the workers that died while they had it."""
        self.anew: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._rng = random.Random(plan.seed)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._supervise, self._break)]

    def start(self) -> None:
        """Everything, ready."""
        for module in (SERVICE, COURIER):
            self.stack.spawn(module)
        for _ in range(self._plan.workers):
            self._start_worker()
        wait_for(lambda: len(ready_workers(self.redis)) == self._plan.workers, 60, "the workers")
        self.stack.wait_ready()

    def begin(self) -> None:
        """Supervise and break it from now on."""
        for thread in self._threads:
            thread.start()

    def leave_alone(self) -> None:
        """No more faults; all processes run."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        for name, process in [*self.workers.items(), *self.stack.processes.items()]:
            self._report.check(process.poll() is None, f"{name} has ended by itself: {process.poll()}")
        self.stack.wait_ready()

    def stop(self) -> None:
        """SIGTERM to all; workers have to end well."""
        for process in self.workers.values():
            process.send_signal(signal.SIGTERM)
        for name, process in self.workers.items():
            code = process.wait(60)
            self._report.check(code == 0, f"{name} ended with {code}")
        self.stack.stop()

    def _start_worker(self) -> None:
        name = unique_name("worker")
        command = [sys.executable, "-m", WORKER, "--seconds", str(self._plan.seconds), "--name", name]
        with (self.stack.folder / "workers.log").open("ab") as log:
            environment = self.stack.environment
            self.workers[name] = subprocess.Popen(  # noqa: S603
                command, cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def _supervise(self) -> None:
        """Start again what has died, as a container engine would."""
        while not self._ended.wait(0.05):
            with self._lock:
                for name, process in list(self.workers.items()):
                    if process.poll() is not None:
                        self._note_death(name)
                        del self.workers[name]
                        self._start_worker()
                        self.anew["worker"] += 1
                for module, process in list(self.stack.processes.items()):
                    if process.poll() is not None:
                        self.stack.spawn(module)
                        self.anew[module] += 1

    def _note_death(self, name: str) -> None:
        """Which jobs it had; they stay its own until its lease is over."""
        for record in self.records.get_many(cast(list[str], self.redis.zrange(SLOTS_KEY, 0, -1))):
            if record.worker == name and record.status in (Status.RUNNING, Status.CANCELLING):
                self.deaths[record.id].append(name)

    def _break(self) -> None:
        kinds, parts = list(FAULTS), list(FAULTS.values())
        while not self._ended.wait(self._rng.expovariate(1 / self._plan.every_s)):
            kind, choice = self._rng.choices(kinds, parts)[0], self._rng.random()
            with self._lock:
                name = sorted(self.workers)[int(choice * len(self.workers))]
                worker = self.workers[name]
            self._report.faults[kind] += 1
            if kind == "worker killed":
                worker.kill()
            elif kind == "worker stopped":
                self._stop_for_a_while(name, worker)
            elif kind == "Redis killed":
                self._restart_redis()
            else:
                self.stack.processes[SERVICE if kind == "service killed" else COURIER].kill()

    def _stop_for_a_while(self, name: str, worker: subprocess.Popen[bytes]) -> None:
        """Longer than its lease: for the others it is dead."""
        worker.send_signal(signal.SIGSTOP)
        with self._lock:
            self._note_death(name)
        time.sleep(2 * LEASE_S)
        worker.send_signal(signal.SIGCONT)

    def _restart_redis(self) -> None:
        with self._lock:  # who died at the same moment is written down when there is something to read
            server = cast(subprocess.Popen[bytes], self.stack.redis.process)
            server.kill()
            server.wait()
            time.sleep(self._rng.uniform(0.1, 2.0))
            self.stack.redis.start()


class Client:
    """Asks for videos as a program would that wants each of them once."""

    def __init__(self, plan: Plan, machine: Machine, hook: str) -> None:
        self._plan, self._machine, self._hook = plan, machine, hook
        self._http = httpx.Client(base_url=machine.stack.url, timeout=30)
        self._picture = small_picture()
        self._rng = random.Random(plan.seed + 1)
        self.jobs: dict[str, int] = {}
        """Id -> seed, of every request that was accepted."""
        self.asked_again = 0

    def run(self) -> None:
        """Until all jobs are over."""
        seeds = list(range(1000, 1000 + self._plan.jobs - self._plan.poisons))
        for _ in range(self._plan.poisons):
            seeds.insert(self._rng.randrange(len(seeds)), POISON)
        to_cancel: list[str] = []
        pending: set[str] = set()
        deadline = time.monotonic() + 10 * self._plan.jobs
        while seeds or pending:
            while seeds and len(pending) < self._plan.under_way:
                job_id = self._submit(seeds.pop())
                pending.add(job_id)
                if self._rng.random() < self._plan.cancel_share:
                    to_cancel.append(job_id)
            if to_cancel and self._rng.random() < 0.1:
                self._persist("POST", f"/generate/{to_cancel.pop(0)}/cancel", {200, 202, 409})
            time.sleep(0.1)
            try:
                found = self._machine.records.get_many(sorted(pending))
            except RedisError:
                continue
            pending -= {record.id for record in found if record.status.is_terminal}
            if time.monotonic() > deadline:
                raise SystemExit(f"error: these are not over: {sorted(pending)}")
            _say(f"{len(self.jobs) - len(pending)} over")

    def _submit(self, seed: int) -> str:
        body = {"prompt": "x", "seed": str(seed), "webhook_url": self._hook}
        headers = {"Idempotency-Key": secrets.token_hex(8)}
        answer = self._persist("POST", "/generate", {202}, data=body, files={"image": self._picture}, headers=headers)
        job_id = str(answer["id"])
        assert job_id not in self.jobs, f"{job_id} was two requests"
        self.jobs[job_id] = seed
        return job_id

    def _persist(self, method: str, path: str, wanted: set[int], **request: Any) -> dict[str, Any]:
        """Send it until it is answered. Ends the program for an answer that no client could know what to do about."""
        while True:
            try:
                response = self._http.request(method, path, **request)
            except httpx.TransportError:
                time.sleep(0.2)
            else:
                if response.status_code in wanted:
                    return cast(dict[str, Any], response.json())
                busy = response.status_code == 409 and response.headers.get("x-should-retry") == "true"
                if not busy and response.status_code != 503:
                    raise SystemExit(f"error: {method} {path}: {response.status_code} {response.text}")
                time.sleep(0.5)
            self.asked_again += 1

    def delete(self, job_id: str) -> None:
        """As a client that has what it wanted."""
        response = self._http.delete(f"/generate/{job_id}")
        assert response.status_code == 204, response.text

    def ask_for_one(self) -> str:
        """One more, poisonous to none."""
        return self._submit(1)


def run(plan: Plan) -> Report:
    """The whole of it."""
    report, receiver = Report(plan), Receiver()
    receiver.up()
    with tempfile.TemporaryDirectory(prefix="flg-soak-") as name:
        machine = Machine(Path(name), plan, receiver, report)
        try:
            machine.start()
            client = Client(plan, machine, receiver.url)
            _rehearse(client, machine, receiver)
            before = _memory(machine.redis)
            began = time.monotonic()
            machine.begin()
            client.run()
            seconds = time.monotonic() - began
            machine.leave_alone()
            report.figures["load held"] = (
                f"{plan.jobs} jobs in {seconds:.0f} s: {60 * plan.jobs / seconds:.0f} a minute, "
                f"{plan.under_way} under way at any time"
            )
            report.figures["processes started anew"] = ", ".join(f"{n} x {what}" for what, n in machine.anew.items())
            _check_jobs(report, client, machine)
            _check_files(report, client, machine)
            _check_webhooks(report, client, machine, receiver)
            _check_slots(report, client, machine)
            _check_memory(report, client, machine, before)
        except BaseException:
            sys.stderr.write((Path(name) / "workers.log").read_text()[-3000:])
            raise
        finally:
            machine.stop()
            receiver.down()
    return report


def _rehearse(client: Client, machine: Machine, receiver: Receiver) -> None:
    """One of everything, so that what is measured as the beginning holds what one job leaves behind as well."""
    job_id = client.ask_for_one()
    wait_for(lambda: _over(machine, job_id) and _settled(machine.redis), 60, "the first job")
    client.delete(job_id)
    client.jobs.clear()
    client.asked_again = 0
    receiver.messages.clear()
    receiver.secret = cast(str, machine.redis.get(WEBHOOK_SECRET_KEY))


def _over(machine: Machine, job_id: str) -> bool:
    record = machine.records.get(job_id)
    return record is not None and record.status.is_terminal


def _settled(redis: Redis) -> bool:
    return not redis.zcard(WEBHOOKS_DUE_KEY)


def _check_jobs(report: Report, client: Client, machine: Machine) -> None:
    """Each accepted job has ended, once; a worker is said to have crashed where three have died."""
    records = {record.id: record for record in machine.records.get_many(sorted(client.jobs))}
    ends: Counter[str] = Counter()
    doubled = 0
    report.check(len(client.jobs) == report.plan.jobs, f"{len(client.jobs)} requests were accepted")
    for job_id in client.jobs:
        record = records.get(job_id)
        if record is None:
            report.wrong.append(f"{job_id} is lost")
            continue
        kind = record.error_code or str(record.status)
        ends[kind] += 1
        said = [Status(entry["status"]) for _, entry in cast(Any, machine.redis.xrange(events_key(job_id)))]
        ended = [status for status in said if status.is_terminal]
        doubled += len(ended) > 1
        report.check(ended == [record.status], f"{job_id} is {record.status}, and ended as {ended}")
        deaths = len(machine.deaths[job_id])
        if kind == "worker_crashed":
            report.check(deaths == 3, f"{job_id} is {kind}, and {deaths} workers died of it")
        else:
            report.check(record.status in (Status.SUCCEEDED, Status.CANCELLED), f"{job_id}: {kind}")
    known = machine.redis.zrange(Record.index_key, 0, -1)
    report.check(sorted(known) == sorted(client.jobs), "there are jobs that nobody has asked for")
    doubled += len(set(known) - set(client.jobs))
    counted = {
        name.rpartition("=")[2]: int(number)
        for name, number in cast(dict[str, str], machine.redis.hgetall("flg:metrics")).items()
        if name.startswith("jobs_total")
    }
    statuses = Counter(str(record.status) for record in records.values())
    statuses["succeeded"] += 1  # the first
    report.check(counted == statuses, f"counted as ended: {counted}, which are {dict(statuses)}")
    taken = sum(len(names) for names in machine.deaths.values())
    report.figures["ends"] = ", ".join(f"{number} {kind}" for kind, number in ends.most_common())
    report.figures["jobs lost"] = str(len(client.jobs) - len(records))
    report.figures["jobs doubled"] = f"{doubled} (ended twice, or made of a request that was sent twice)"
    report.figures["attempts that died with their worker"] = str(taken)
    report.figures["jobs begun more than once"] = str(sum(record.attempt > 1 for record in records.values()))
    report.figures["requests sent again by the client"] = str(client.asked_again)


def _check_files(report: Report, client: Client, machine: Machine) -> None:
    """Each video is whole and the one that its manifest tells of; there is no file that no job owns."""
    storage, names = machine.stack.storage, dict[str, set[str]]()
    for folder in ("inputs", "videos"):
        names[folder] = {path.name for path in (storage / folder).iterdir()}
    wanted_inputs = {f"{job_id}.png" for job_id in client.jobs}
    report.check(wanted_inputs <= names["inputs"], "inputs are missing")
    wanted: set[str] = set()
    for record in machine.records.get_many(sorted(client.jobs)):
        if record.status is not Status.SUCCEEDED:
            continue
        files = {suffix: f"{record.id}.{suffix}" for suffix in OUTPUT_SUFFIXES}
        wanted |= set(files.values())
        if not set(files.values()) <= names["videos"]:
            report.wrong.append(f"{record.id}: files are missing")
            continue
        manifest = json.loads((storage / "videos" / files["json"]).read_bytes())
        video = (storage / "videos" / files["mp4"]).read_bytes()
        is_whole = hashlib.sha256(video).hexdigest() == manifest["video_sha256"]
        report.check(is_whole, f"{record.id}: the video is not the one of the manifest")
        is_its = (manifest["id"], manifest["seed"]) == (record.id, record.seed)
        report.check(is_its, f"{record.id}: the manifest is of another job")
    halves = sorted(name for name in names["videos"] - wanted if name.endswith(".tmp"))
    partial = sorted(names["videos"] - wanted - set(halves))
    nobodys = sorted(names["inputs"] - wanted_inputs)
    service.jobs._ORPHAN_S = 0  # they go when they are an hour old
    swept = _store(machine).sweep_orphans()
    report.figures["files that the hourly sweep found"] = (
        f"{swept}: {len(halves)} halves that a worker died over, {len(partial)} parts of videos of jobs that have "
        f"none, {len(nobodys)} inputs without a job"
    )
    left = {path.name for folder in names for path in (storage / folder).iterdir()}
    report.check(left == wanted | wanted_inputs, f"files that nobody owns: {sorted(left - wanted - wanted_inputs)}")


def _store(machine: Machine) -> JobStore:
    settings = Settings(redis_url=machine.stack.redis.url, min_free_bytes=0)
    raw = connect(machine.stack.redis.url, text=False)
    return JobStore(settings, machine.redis, raw, Storage(str(machine.stack.storage)))


def _check_webhooks(report: Report, client: Client, machine: Machine, receiver: Receiver) -> None:
    """Each job's message has come, at least once, signed, and says how the job has ended."""
    wait_for(lambda: _settled(machine.redis), 2 * COURIER_LEASE_S + 30, "the webhooks")
    report.check(not machine.redis.zcard(WEBHOOKS_DEAD_KEY), "webhooks were given up")
    report.check(len(receiver.said) == len(receiver.messages), "webhooks had a wrong signature")
    ends = defaultdict[str, list[Any]](list)
    for said in cast(list[dict[str, Any]], receiver.said):
        ends[said["data"]["id"]].append(said["type"])
    for record in machine.records.get_many(sorted(client.jobs)):
        types = set(ends[record.id])
        report.check(types == {f"generation.{record.status}"}, f"{record.id} {record.status}: webhooks {types}")
    again = len(receiver.said) - len(ends)
    report.figures["webhooks"] = f"{len(ends)} jobs, all signed; {again} came a second time"


def _check_slots(report: Report, client: Client, machine: Machine) -> None:
    """Nothing that counts jobs under way counts one that is over."""
    time.sleep(RESERVED_S)  # what a killed service has reserved runs out; the next request clears it away
    last = client.ask_for_one()
    wait_for(lambda: _over(machine, last) and _settled(machine.redis), 60, "the last job")
    raw = connect(machine.stack.redis.url, text=False)
    queue, redis = make_queue(raw, QUEUE), machine.redis
    started = StartedJobRegistry(QUEUE, connection=raw, serializer=JSONSerializer)
    wait_for(lambda: not started.get_job_ids(cleanup=False), 10, "rq to be done")
    left = {
        "slots": redis.zrange(SLOTS_KEY, 0, -1),
        "their sum": [] if int(cast(str, redis.get(SLOTS_TOTAL_KEY) or 0)) == 0 else ["not 0"],
        "slots of the owner": redis.zrange(active_key("local"), 0, -1),
        "queued": list(redis.smembers(Record.queued_key)),
        "rq's queue": queue.job_ids,
        "rq's intermediate queue": queue.intermediate_queue.get_job_ids(),
        "rq's started": started.get_job_ids(cleanup=False),
    }
    for name, ids in left.items():
        report.check(not ids, f"{name}: {ids}")


Keys = dict[str, tuple[int, int]]


def _memory(redis: Redis) -> tuple[int, Keys]:
    """Bytes in use; of each family of keys how many, and how many of them stay for ever."""
    families: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for key in cast(Any, redis.scan_iter(count=1000)):
        family = re.sub(r"vid_[0-9a-z]{26}|[0-9a-f]{8,}", "*", key)
        families[family][0] += 1
        families[family][1] += redis.ttl(key) == -1
    redis.memory_purge()
    return redis.info("memory")["used_memory"], {name: (a, b) for name, (a, b) in sorted(families.items())}


def _check_memory(report: Report, client: Client, machine: Machine, before: tuple[int, Keys]) -> None:
    """When all jobs are deleted, and what runs out by itself has, Redis holds what it held."""
    redis = machine.redis
    full, _ = _memory(redis)
    for job_id in client.jobs:
        client.delete(job_id)
    redis.delete(ENDS_KEY)  # the benchmark's own
    deleted, families = _memory(redis)
    for_ever = {name for name, (_, stay) in families.items() if stay} - {
        name for name, (_, b) in before[1].items() if b
    }
    report.check(not for_ever, f"keys that stay for ever: {for_ever}")
    runs_out = {name: number for name, (number, stay) in families.items() if number > stay}
    kept = ("rq:worker", "flg:worker", "rq:workers")
    for key in list(cast(Any, redis.scan_iter(count=1000))):
        if redis.ttl(key) != -1 and not key.startswith(kept):
            redis.delete(key)  # its time passes
    time.sleep(1)
    after, _ = _memory(redis)
    report.figures["Redis memory"] = (
        f"{before[0] / 1e6:.2f} MB before, {full / 1e6:.2f} MB with all jobs, {deleted / 1e6:.2f} MB when they were "
        f"deleted, {after / 1e6:.2f} MB when what runs out by itself was gone"
    )
    most = max(runs_out.items(), key=lambda item: item[1])
    report.figures["keys that run out by themselves"] = f"{sum(runs_out.values())}, of them {most[1]} {most[0]}"
    report.check(after - before[0] < 300_000, f"Redis holds {after - before[0]:,} bytes more than before: {families}")
    names = [path.name for folder in ("inputs", "videos") for path in (machine.stack.storage / folder).iterdir()]
    report.check(not names, f"files of jobs that were deleted: {names}")


def _say(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{line}   ")


def markdown(report: Report) -> str:
    """The report's section."""
    plan = report.plan
    faults = ", ".join(f"{number} x {kind}" for kind, number in report.faults.most_common())
    rows = "\n".join(f"| {name} | {value} |" for name, value in report.figures.items())
    wrong = "\n".join(f"- {line}" for line in report.wrong) or "Nothing was wrong."
    return f"""## Soak

{plan.jobs} jobs ({plan.poisons} of them kill every worker that begins them), {plan.workers} workers whose model takes \
{plan.seconds} s, a lease of {LEASE_S} s, a fault every {plan.every_s:.0f} s on average (seed {plan.seed}). What dies \
is started again at once. Afterwards every job, file, webhook, slot and key is looked at.

| | |
|---|---|
| faults | {sum(report.faults.values())}: {faults} |
{rows}

{wrong}
"""


def main() -> int:
    """Exit code 1: something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("jobs", int), ("seconds", float), ("every-s", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Plan, name.replace("-", "_")), help="%(default)s")
    options = parser.parse_args()
    report = run(Plan(**vars(options)))
    sys.stdout.write(markdown(report))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
