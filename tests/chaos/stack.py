"""A stack to be broken: Redis and a service, workers whose model only takes time, a courier, and a receiver."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from redis.exceptions import RedisError

from benchmarks.timed_worker import CARD
from service.jobs import JobStore
from service.settings import Settings
from tests.stack import ROOT, Stack, stop, wait_for
from worker.contract import SLOTS_KEY, Record, Status, output_path
from worker.queues import make_queue, unique_name
from worker.records import Records, connect, publish_models, ready_workers
from worker.storage import Storage

LEASE_S = 4
PATIENCE_S = 10 * LEASE_S
"""What is to happen happens within so many seconds; how soon, `benchmarks.reliability` says."""
# As soon as it is there, with no limit of a key in the way.
SETTINGS = {"LEASE_S": str(LEASE_S), "MAX_QUEUED": "10000", "KEY_MAX_JOBS": "0", "KEY_PER_MINUTE": "0"}


class Chaos:
    """What the tests of this folder do to a stack, and what they look at."""

    def __init__(self, folder: Path, image: bytes, **settings: str) -> None:
        """``settings``: environment variables of all processes."""
        self.folder = folder
        self.image = image
        # A killed worker leaves the temporary files of its ffmpeg.
        self.stack = Stack(folder, **{**SETTINGS, "TMPDIR": str(folder), **settings})
        self.gates = folder / "gates"
        self.gates.mkdir()
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.stack.redis.start()
        self.redis = connect(self.stack.redis.url)
        self.queue_redis = connect(self.stack.redis.url, text=False)
        self.records = Records(self.redis, Record)
        publish_models(self.redis, [CARD])  # jobs are taken before the first worker is there
        self.http = httpx.Client(base_url=self.stack.url, timeout=60)

    # --- processes ------------------------------------------------------------------------------------------------

    def start_service(self, module: str = "service", *arguments: str) -> None:
        self.stack.spawn(module, *arguments)
        self.wait_service()

    def wait_service(self) -> None:
        wait_for(self.answers, PATIENCE_S, "the service to answer")

    def kill_program(self, module: str) -> None:
        """`kill -9`."""
        process = self.stack.processes.pop(module)
        process.kill()
        process.wait()

    def answers(self) -> bool:
        """Whether the service does."""
        try:
            return self.http.get("/livez").status_code == 200
        except httpx.TransportError:
            return False

    def start_worker(self, *arguments: str, wait: bool = True, **environment: str) -> str:
        """Its name, once it takes jobs."""
        name = unique_name("worker")
        command = [sys.executable, "-m", "tests.chaos.worker", str(self.gates), "--name", name, *arguments]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.workers[name] = subprocess.Popen(
                command, cwd=ROOT, env={**self.stack.environment, **environment}, stdout=log, stderr=log
            )
        if wait:
            self.wait_ready(name)
        return name

    def wait_ready(self, *names: str) -> None:
        for name in names:
            wait_for(lambda name=name: self.is_ready(name), PATIENCE_S, f"{name}:\n{self.log(name)}")

    def is_ready(self, name: str) -> bool:
        assert self.workers[name].poll() is None, self.log(name)
        return name in [one.name for one in ready_workers(self.redis)]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-4000:]

    def signal(self, name: str, number: int) -> None:
        self.workers[name].send_signal(number)

    def kill(self, *names: str) -> None:
        """`kill -9`, all at once."""
        for name in names:
            self.workers[name].kill()
        for name in names:
            self.workers.pop(name).wait()

    def stop_workers(self) -> None:
        for name in list(self.workers):
            process = self.workers.pop(name)
            process.send_signal(signal.SIGCONT)
            stop(process, 10)

    def stop(self) -> None:
        for gate in self.gates.iterdir():
            gate.unlink()
        self.stop_workers()
        self.http.close()
        self.stack.stop()

    # --- jobs -----------------------------------------------------------------------------------------------------

    def hold(self, place: str, *seeds: int) -> None:
        """From now on jobs of these seeds wait there."""
        for seed in seeds:
            (self.gates / f"hold-{place}-{seed}").touch()

    def release(self, place: str, *seeds: int) -> None:
        for seed in seeds:
            (self.gates / f"hold-{place}-{seed}").unlink()
            (self.gates / f"at-{place}-{seed}").unlink(missing_ok=True)

    def reach(self, place: str, seed: int) -> None:
        """Wait until a job is there."""
        try:
            wait_for((self.gates / f"at-{place}-{seed}").exists, PATIENCE_S, f"{place} of {seed}")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n" + "\n".join(map(self.log, self.workers))) from None

    def submit(self, seed: int, **more: object) -> str:
        """The id of a new job."""
        response = self.post(seed, **more)
        assert response.status_code == 202, response.text
        return response.json()["id"]

    def post(self, seed: int, headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        data = {"prompt": "x", "seed": str(seed), **fields}
        return self.http.post("/generate", data=data, files={"image": self.image}, headers=headers)

    def record(self, job_id: str) -> Record:
        found = self.records.get(job_id)
        assert found is not None, f"{job_id} is gone"
        return found

    def wait_over(self, *job_ids: str, seconds: float = PATIENCE_S) -> list[Record]:
        """The records, once all are over."""

        def over() -> bool:
            try:
                return all(self.record(job_id).status.is_terminal for job_id in job_ids)
            except RedisError:
                return False

        try:
            wait_for(over, seconds, "all to be over")
        except AssertionError as error:
            records = [self.record(one) for one in job_ids]
            raise AssertionError(f"{error}: {records}\n" + "\n".join(map(self.log, self.workers))) from None
        return [self.record(job_id) for job_id in job_ids]

    def succeeded(self, *job_ids: str, seconds: float = PATIENCE_S) -> list[Record]:
        """The records, once each has its video, and just one: whole, and the one that its record tells of."""
        records = self.wait_over(*job_ids, seconds=seconds)
        for record in records:
            assert record.status is Status.SUCCEEDED, record
            self.check_video(record)
        return records

    def check_video(self, record: Record) -> None:
        manifest = json.loads((self.stack.storage / output_path(record.id, "json")).read_bytes())
        mp4 = (self.stack.storage / output_path(record.id, "mp4")).read_bytes()
        assert hashlib.sha256(mp4).hexdigest() == manifest["video_sha256"]
        assert (self.stack.storage / output_path(record.id, "jpg")).stat().st_size > 100
        assert manifest["seed"] == record.seed
        answer = self.http.get(f"/generate/{record.id}").json()
        assert answer["status"] == "succeeded"
        assert hashlib.sha256(self.http.get(answer["video_url"]).content).digest() == hashlib.sha256(mp4).digest()

    def manifest(self, job_id: str) -> dict[str, object]:
        return json.loads((self.stack.storage / output_path(job_id, "json")).read_bytes())

    def store(self) -> JobStore:
        """The service's, in this process."""
        settings = Settings(redis_url=self.stack.redis.url, min_free_bytes=0)
        return JobStore(settings, self.redis, self.queue_redis, Storage(self.stack.environment["STORAGE_URL"]))

    def is_idle(self) -> bool:
        """Whether nothing is left of any job in what counts jobs that are under way."""
        queue = make_queue(self.queue_redis, Record.queue)
        left = [
            *self.redis.zrange(SLOTS_KEY, 0, -1),
            *self.redis.smembers(Record.queued_key),
            *queue.job_ids,
            *queue.intermediate_queue.get_job_ids(),
            *queue.started_job_registry.get_job_ids(cleanup=False),
        ]
        return not left and not int(self.redis.get("flg:slots:total") or 0)

    def wait_idle(self) -> None:
        wait_for(self.is_idle, PATIENCE_S, "the queue to be empty")


@contextmanager
def chaos_in(folder: Path, image: bytes, **settings: str) -> Iterator[Chaos]:
    """Redis alone at first; all that was started is stopped."""
    made = Chaos(folder, image, **settings)
    try:
        yield made
    finally:
        made.stop()
