"""Redis with the users of deploy/redis: our programs get along with what each may, and may little else."""

import re
import subprocess
import sys
from dataclasses import dataclass

import httpx
import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from tests.stack import ROOT, RedisServer, Stack, is_alive, run_with, stop, wait_for
from worker import contract
from worker.connection import connect

PROMPT = "a red circle moves right quickly, static camera"
SERVICE_ONLY = {
    contract.KEYS_KEY,
    contract.api_key_key("x"),
    contract.LINK_SECRET_KEY,
    contract.LINK_SECRET_BEFORE_KEY,
    contract.WEBHOOK_SECRET_KEY,
    contract.WEBHOOK_SECRET_BEFORE_KEY,
    contract.WEBHOOKS_DEAD_KEY,
    contract.COURIER_KEY,
    contract.webhook_key("x"),
    "flg:idempotent:local:x",
    "flg:same:local:x",
    "flg:rate:local",
    "flg:confirmed",
    "flg:swept",
}
"""What a worker has no business with: above all the secrets that keys, links and webhooks are made of."""


@dataclass
class RedisWithUsers(RedisServer):
    """Its users and their passwords are deploy/redis/users.py's."""

    @property
    def url(self) -> str:
        return self.url_of("admin")

    def url_of(self, user: str) -> str:
        return (self.folder / "users" / f"{user}.url").read_text().strip()

    @property
    def access(self) -> str:
        return f"aclfile {self.folder}/users/users.acl\nacllog-max-len 1000"

    def start(self, users: bool = True) -> None:
        if users:
            self.make_users()
        super().start()

    def make_users(self, *options: str) -> None:
        folder, address = str(self.folder / "users"), f"127.0.0.1:{self.port}"
        command = [
            sys.executable,
            "-I",
            str(ROOT / "deploy" / "redis" / "users.py"),
            folder,
            "--redis",
            address,
            *options,
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = RedisWithUsers(tmp_path_factory.mktemp("users"))
    running.start()
    yield running
    running.stop()


def client_of(server: RedisWithUsers, user: str) -> Redis:
    return connect(server.url_of(user), patience=0)


def may(client: Redis, *command: object) -> bool:
    try:
        client.execute_command(*command)
    except NoPermissionError:
        return False
    except ResponseError as error:  # of a script; or of something else: there is no such command, or it makes no sense
        return not re.search("can't access at least one of the keys|ACL failure in script", str(error))
    return True


REFUSED = """
FLUSHALL | FLUSHDB | SWAPDB 0 1 | CONFIG GET * | CONFIG SET maxmemory 1 | KEYS * | SCAN 0 | RANDOMKEY | SHUTDOWN NOSAVE
MODULE LIST | REPLICAOF NO ONE | SLAVEOF NO ONE | ACL LIST | ACL SETUSER x on nopass +@all ~* | SAVE | BGSAVE
BGREWRITEAOF | MONITOR | CLIENT LIST | CLIENT KILL TYPE normal | CLIENT PAUSE 1 | SCRIPT FLUSH | SCRIPT KILL
MIGRATE 127.0.0.1 1 rq:x 0 1 | RESTORE rq:x 0 x | MOVE rq:x 1 | COPY rq:x rq:y | SORT rq:x | LATENCY LATEST
SLOWLOG GET | MEMORY USAGE rq:x | SETBIT rq:x 1 1 | PFADD rq:x a | GEOADD rq:x 1 1 a | PUBLISH other x
GET foreign | SET foreign 1 | DEL foreign | GET flgx | EVALSHA_ foreign | SYNC | PSYNC ? -1 | REPLCONF ack 1
"""
"""Of both users. (DEBUG is off by default from Redis 7 on, for everybody.)"""


@pytest.mark.parametrize("user", ["service", "worker"])
def test_a_program_may_do_nothing_that_it_has_no_need_of(server, subtests, user):
    with client_of(server, user) as client:
        for text in re.split(r"[|\n]", REFUSED):
            command = text.split()
            if command[:1] == ["EVALSHA_"]:  # a script has no more rights than who runs it
                command = ["EVAL", f"return redis.call('GET', '{command[1]}')", "0"]
            if command:
                with subtests.test(text.strip()):
                    assert not may(client, *command)
        assert may(client, "INFO")
        assert may(client, "EVAL", "return redis.call('GET', 'rq:x')", "0")
    if user == "service":
        return
    with client_of(server, user) as client:
        for key in SERVICE_ONLY:
            with subtests.test(key):
                assert not may(client, "TYPE", key)
                assert not may(client, "EVAL", f"return redis.call('EXISTS', '{key}')", "0")


def test_there_is_nobody_without_a_name(server):
    address = server.url_of("admin").partition("@")[2]
    for url in (f"redis://{address}", f"redis://:x@{address}", f"redis://service:x@{address}"):
        with connect(url, patience=0) as client, pytest.raises(RedisError):
            client.ping()


def test_every_key_of_the_contract_is_the_workers_or_the_services_alone(server):
    """A new one has to be given to one of them."""
    names = [getattr(contract, name) for name in dir(contract) if name.endswith("_KEY")]
    names += [getattr(contract, name)("x") for name in dir(contract) if name.endswith("_key")]
    for kind in (contract.Record, contract.Distillation):
        names += [kind.index_key, kind.queued_key]
    assert len(names) > 25
    with client_of(server, "worker") as worker, client_of(server, "service") as service:
        assert {name for name in names if not may(service, "EXISTS", name)} == set()
        assert {name for name in names if not may(worker, "EXISTS", name)} == SERVICE_ONLY & set(names)


def test_new_passwords_are_made_once_and_nobody_else_reads_them(server):
    files = sorted((server.folder / "users").iterdir())
    before = [file.read_text() for file in files]
    assert [file.name for file in files] == ["admin.url", "service.url", "users.acl", "worker.url"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    files[0].chmod(0o644)
    server.make_users()
    assert [file.read_text() for file in files] == before
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    passwords = [text.split(":")[2].partition("@")[0] for text in before if text.startswith("redis://")]
    assert len(set(passwords)) == 3
    assert not any(password in before[2] for password in passwords)


def test_replicas_and_sentinels_have_users_of_their_own(tmp_path):
    """That these suffice, `tests/worker/test_redis.py` shows."""
    server = RedisWithUsers(tmp_path)
    server.make_users("--sentinel")
    server.start(users=False)
    try:
        with connect(server.url) as admin:
            assert sorted(admin.acl_users()) == ["admin", "default", "replica", "sentinel", "service", "worker"]
        for user in ("replica", "sentinel"):
            with client_of(server, user) as client:
                assert client.ping()
                assert not may(client, "GET", "flg:jobs")
                assert not may(client, "CONFIG", "GET", "*")
    finally:
        server.stop()


class Programs(Stack):
    """Each with its own user."""

    def __init__(self, folder) -> None:
        runs, students = str(folder / "runs"), str(folder / "students")
        super().__init__(folder, AUTH="on", PRIVATE_HOSTS="localhost:1", RUNS=runs, STUDENTS=students, LEASE_S="4")
        self.redis = RedisWithUsers(folder / "redis")
        self.redis.start()
        self.gates = folder / "gates"
        self.gates.mkdir()
        self.start_as("service", "service")
        self.start_as("service", "service.webhooks")
        self.start_as("worker", "tests.stand_in", "trainer", "works")

    def start_as(self, user: str, module: str, *arguments: str) -> None:
        self.environment["REDIS_URL"] = self.redis.url_of(user)
        self.spawn(module, *arguments)

    def run(self, user: str, module: str, *arguments: str) -> str:
        """What a program of the command line says."""
        done = run_with(module, {"REDIS_URL": self.redis.url_of(user)}, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def programs(tmp_path):
    running = Programs(tmp_path)
    yield running
    for process in running.processes.values():
        stop(process)
    running.stop()


def test_everything_that_our_programs_do_they_may(programs, example_image):
    """A job from the request to its video, one that is cancelled, a distillation up to its release, keys, metrics."""
    wait_for(lambda: is_alive(programs.url), 30, "the service")
    key = programs.run("service", "service", "keys", "add", "all", "--scopes", "generate,read,admin,metrics").strip()
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=programs.url, headers=headers, timeout=60) as http:

        def ask(seed: int, **more: str) -> str:
            form = {"prompt": PROMPT, "seed": str(seed), **more}
            idempotent = {"Idempotency-Key": f"seed-{seed}"}
            files = {"image": ("a.png", example_image.read_bytes(), "image/png")}
            answer = http.post("/generate", files=files, data=form, headers=idempotent)
            assert answer.status_code == 202, answer.text
            return answer.json()["id"]

        def status(job_id: str) -> str:
            return http.get(f"/generate/{job_id}").json()["status"]

        wait_for(lambda: http.get("/admin/recipes").json()["trainer"], 30, "the trainer")
        fields = {"recipe": "shapes", "preset": "smoke", "promote": "auto"}
        run = http.post("/admin/distillations", json=fields).json()["id"]
        folder = programs.folder / "runs" / run
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "go").touch()
        wait_for(
            lambda: http.get(f"/admin/distillations/{run}").json()["status"] == "succeeded",
            30,
            f"the distillation:\n{programs.log('tests.stand_in')}",
        )

        programs.start_as("worker", "tests.held_worker", str(programs.gates), "overlap")
        wait_for(lambda: http.get("/readyz").status_code == 200, 30, "the worker")
        done, cancelled = ask(1, webhook_url="https://localhost:1/here"), ask(2)
        assert ask(1, webhook_url="https://localhost:1/here") == done  # the same request
        for stage in ("denoise", "decode"):
            (programs.gates / f"{stage}-1").touch()
        wait_for(lambda: status(done) == "succeeded", 30, f"the video:\n{programs.log('tests.held_worker')}")
        assert http.get(f"/v1/videos/{done}/content").status_code == 200
        assert "succeeded" in http.get(f"/generate/{done}/events").text
        wait_for(lambda: status(cancelled) == "running", 30, "the second one")
        assert http.post(f"/generate/{cancelled}/cancel").status_code in (200, 202)
        wait_for(lambda: status(cancelled) == "cancelled", 30, "the cancel")
        wait_for(lambda: http.get(f"/generate/{done}").json()["webhook"]["attempts"], 30, "the courier")
        assert [job["id"] for job in http.get("/generate").json()["data"]] == [cancelled, done]
        assert http.delete(f"/generate/{cancelled}").status_code == 204

        for path in ("workers", "queue", "webhooks", "students", "release", "recipes", f"distillations/{run}/log"):
            assert http.get(f"/admin/{path}").status_code == 200, path
        for path in ("/metrics", "/models", "/v1/models", f"/admin/distillations/{run}/metrics"):
            assert http.get(path).status_code == 200, path
        for verb in ("pause", "resume"):
            assert http.post(f"/admin/queue/{verb}").is_success
    programs.run("service", "service", "keys", "revoke", key.split("_")[1])

    with connect(programs.redis.url) as admin:
        refused = admin.execute_command("ACL LOG")
    assert [(one["username"], one["reason"], one["object"], one["context"]) for one in refused] == []
