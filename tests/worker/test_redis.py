"""Redis as it is when something is wrong with it: its address, hanging, away, full, read-only, loading, or another one.

Real servers and real processes: a service, and workers whose model only takes time.
"""

import asyncio
import logging
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from redis.exceptions import BusyLoadingError, ConnectionError, RedisError, TimeoutError
from starlette.routing import Route

from service.admission import Admission, Request
from service.app import create_app
from service.auth import Principal
from service.fleet import Lookout
from service.settings import Settings
from tests.service.test_auth import walk
from tests.stack import ROOT, RedisServer, Stack, free_port, is_alive, redis_binary, run_with, stop, wait_for
from tests.worker.sentinels import Sentinels
from worker.connection import confirm, connect, connect_async, is_full, parse, redacted, risks, warn_if_it_loses
from worker.contract import COURIER_KEY, LOCAL, SLOTS_KEY, SLOTS_TOTAL_KEY, Record, Status, output_path
from worker.records import Records, ready_workers

TIMED = "benchmarks.timed_worker"
IMPATIENT = (
    "from worker import connection; connection.connect.__kwdefaults__['patience'] = 0.3;"
    f"import sys; sys.argv[1:] = ['--seconds', '0.1', '--no-mp4']; from {TIMED} import main; main()"
)
"""A worker whose patience is over before any outage of these tests is."""


# --- its address ------------------------------------------------------------------------------------------------------


def test_sentinels_are_named_in_one_url():
    found = parse("redis+sentinel://me:p%40ss%2F@a:1,b,[::1]:3/mymaster/2?sentinel_password=x&socket_timeout=3")
    assert found.sentinels == (("a", 1), ("b", 26379), ("::1", 3))
    assert found.master == "mymaster"
    assert found.options == {"username": "me", "password": "p@ss/", "db": 2, "socket_timeout": 3.0}
    assert found.sentinel_options == {"password": "x"}
    over_tls = parse("rediss+sentinel://a/m?ssl_ca_certs=/ca.pem&sentinel_username=s")
    assert over_tls.options == {"ssl": True, "ssl_ca_certs": "/ca.pem"}
    assert over_tls.sentinel_options == {"ssl": True, "ssl_ca_certs": "/ca.pem", "username": "s"}


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("localhost:6379", "begins with none of redis://"),
        ("http://me:hush@h", "begins with none of redis://"),
        ("redis://", "names no host"),
        ("redis://me:hush@h:port/0", "its port is no number"),
        ("redis://me:hush@h:99999/0", "its port is no number"),
        ("redis://me:hush@h/one", "wanted, for example, /0"),
        ("redis://me:hush/@h:1/0", "in a password / @"),
        ("redis://h/0?socket_timeout=long", "Invalid value for 'socket_timeout'"),
        ("unix://", "names no socket"),
        ("redis+sentinel://me:hush@a:1,b:2", "names no master"),
        ("redis+sentinel://me:hush@a:1,,b:2/m", "of which one has no host"),
        ("redis+sentinel://me:hush@a:x/m/0?sentinel_password=hush", "its port is no number"),
        ("redis+sentinel://me:hush@a:1/m/db", "wanted, for example, /0"),
    ],
)
@pytest.mark.parametrize("module", ["service.settings", "worker.settings"])
def test_what_is_no_address_is_refused_at_start_and_shows_no_password(url, wanted, module, monkeypatch, capsys):
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(SystemExit) as ended:
        if module == "service.settings":
            from service.settings import read

            read()
        else:
            from worker.settings import TrainerSettings, read

            read(TrainerSettings)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: REDIS_URL=")
    assert wanted in said
    assert "hush" not in said


def test_a_url_is_shown_without_its_secrets():
    assert redacted("redis://a:hush@h:1/0") == "redis://***@h:1/0"
    assert redacted("redis+sentinel://h:1/m?sentinel_password=hush&x=1") == (
        "redis+sentinel://h:1/m?sentinel_password=***&x=1"
    )


# --- hanging ----------------------------------------------------------------------------------------------------------


def test_a_redis_that_hangs_takes_one_timeout_and_not_one_for_each_try(redis_server):
    """redis-py would connect several times within each try of a command: sixteen timeouts for three tries."""
    url = f"{redis_server.url}?socket_timeout=0.5"
    failed = []
    client = connect(url, patience=0.4)
    client.ping()
    # Each timeout disconnects.
    connection = client.connection_pool.get_connection()
    client.connection_pool.release(connection)
    before = type(connection).disconnect
    connection.disconnect = lambda *args, **more: (failed.append(more or args), before(connection, *args, **more))

    async def ask() -> None:
        other = connect_async(url, patience=0.4)
        try:
            await other.ping()
        finally:
            await other.aclose()

    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            client.get("x")
        with pytest.raises(TimeoutError):
            asyncio.run(ask())
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    assert len(failed) <= 3
    assert client.ping()
    client.close()


# --- how it is configured ---------------------------------------------------------------------------------------------


def test_a_redis_that_may_lose_jobs_is_warned_of(redis, caplog):
    assert risks(redis) == []
    try:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        redis.config_set("appendonly", "no")
        with caplog.at_level(logging.WARNING):
            warn_if_it_loses(redis)
        assert [record.message.split(":")[1].strip() for record in caplog.records] == [
            "its maxmemory-policy is allkeys-lru",
            "its appendonly is off",
        ]
    finally:
        redis.config_set("maxmemory-policy", "noeviction")
        redis.config_set("appendonly", "yes")
    wait_for(lambda: risks(redis) == [], 10, "the append-only file to be written")
    nobody = connect("redis://127.0.0.1:1/0", patience=0)
    caplog.clear()
    warn_if_it_loses(nobody)
    assert "is not known" in caplog.text


# --- sent twice -------------------------------------------------------------------------------------------------------


def test_a_place_that_is_asked_for_again_after_a_broken_connection_is_counted_once(redis):
    """A client that heard no answer sends the command again, and Redis may have done it before."""
    admission = Admission(redis, max_queued=2, max_wait_s=100)
    request = Request("vid_" + 26 * "1", Principal(LOCAL, frozenset()), "same", expected_s=5.0)
    first = admission.admit(request, num_workers=1)
    assert admission.admit(request, num_workers=1) == first
    assert redis.get(SLOTS_TOTAL_KEY) == "5000"
    assert redis.zcard(SLOTS_KEY) == 1
    admission.release(request)
    assert redis.get(SLOTS_TOTAL_KEY) == "0"


def test_of_many_who_want_to_know_the_fleet_one_waits_for_a_redis_that_is_away(redis_server):
    """Each looked for itself, one after the other: the last of forty threads waited forty times as long."""
    nobody = connect("redis://127.0.0.1:1/0", patience=0.3)
    lookout, looks = Lookout(nobody), []
    look = lookout._look
    lookout._look = lambda: (looks.append(1), look())[1]

    def ask(_number: int) -> bool:
        with pytest.raises(RedisError):
            lookout.fleet()
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert len(looks) == 1
    nobody.close()
    with connect(redis_server.url) as client:  # not for long
        lookout._redis = client
        wait_for(lambda: has_fleet(lookout), 10, "another look")


def has_fleet(lookout: Lookout) -> bool:
    try:
        return bool(lookout.fleet())
    except RedisError:
        return False


# --- away, full, read-only, loading -----------------------------------------------------------------------------------


class Site:
    """A service and workers on a Redis; whoever accepts a job here is held to it."""

    def __init__(self, folder, **settings: str) -> None:
        limits = {"MAX_QUEUED": "10000", "KEY_MAX_JOBS": "0", "KEY_PER_MINUTE": "0", "MAX_WAIT_S": "100000"}
        self.stack = Stack(folder, **{"LEASE_S": "4", "TMPDIR": str(folder), **limits, **settings})
        self.workers: list[subprocess.Popen[bytes]] = []
        self.image = (ROOT / "models" / "examples" / "red-circle.png").read_bytes()
        self.http = httpx.Client(base_url=self.stack.url, timeout=60)

    def start(self, *commands: list[str]) -> None:
        self.stack.spawn("service")
        for number, command in enumerate(commands):
            with (self.stack.folder / f"worker-{number}.log").open("ab") as log:
                self.workers.append(
                    subprocess.Popen(
                        [sys.executable, *command], cwd=ROOT, env=self.stack.environment, stdout=log, stderr=log
                    )
                )
        wait_for(lambda: is_alive(self.stack.url), 30, "the service")
        wait_for(self.is_ready, 60, "the workers")

    def is_ready(self) -> bool:
        answer = self.http.get("/readyz")
        return answer.status_code == 200 and len(answer.json()["workers"]) == len(self.workers)

    def ask(self) -> httpx.Response:
        form = {"prompt": "a red circle", "seed": str(secrets.randbits(31))}
        return self.http.post("/generate", files={"image": ("a.png", self.image, "image/png")}, data=form)

    def log(self, number: int = 0) -> str:
        return (self.stack.folder / f"worker-{number}.log").read_text()

    def settle(self, records: Records[Record], accepted: list[str], seconds: float) -> None:
        """Wait until each accepted job has succeeded, with its video."""
        left = set(accepted)

        def over() -> bool:
            left.difference_update(one.id for one in records.get_many(list(left)) if one.status.is_terminal)
            return not left

        try:
            wait_for(over, seconds, "every accepted job to end")
        except AssertionError as error:
            raise AssertionError(f"{error}, but for {records.get_many(list(left))}") from None
        found = records.get_many(accepted)
        assert len(found) == len(accepted)
        assert {one.status for one in found} <= {Status.SUCCEEDED}, [one for one in found if one.error_code]
        for job_id in accepted:
            assert (self.stack.storage / output_path(job_id, "mp4")).exists()

    def stop(self) -> None:
        self.http.close()
        for worker in self.workers:
            stop(worker)
        self.stack.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    running = Site(tmp_path_factory.mktemp("site"))
    try:
        running.stack.redis.start()
        running.start(["-c", IMPATIENT])
        yield running
    finally:
        running.stop()


@pytest.fixture
def records(site):
    client = connect(site.stack.redis.url)
    yield Records(client, Record)
    client.close()


class Load:
    """Asks for videos until it is ended. ``accepted`` are the ids of 202; ``refused`` what else was answered."""

    def __init__(self, site: Site, clients: int = 3) -> None:
        self.accepted: list[str] = []
        self.refused: list[httpx.Response] = []
        self._site = site
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def more(self, number: int, seconds: float) -> None:
        """Wait until so many more were accepted."""
        before = len(self.accepted)
        wait_for(lambda: len(self.accepted) >= before + number, seconds, f"{number} more jobs to be accepted")

    def _run(self) -> None:
        while not self._over.is_set():
            answer = self._site.ask()
            if answer.status_code == 202:
                self.accepted.append(answer.json()["id"])
            else:
                self.refused.append(answer)
            self._over.wait(0.02)


def is_refusal(answer: httpx.Response, status: int, code: str) -> bool:
    """Whether it says so in our words, and when to come again."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    return answer.json()["error"]["code"] == code and int(answer.headers["Retry-After"]) > 0


def answers_without_redis(site: Site) -> dict[str, httpx.Response]:
    """What each route answers, by its method and path."""
    bodies = {
        "/generate": {"files": {"image": ("a.png", site.image, "image/png")}, "data": {"prompt": "x"}},
        "/v1/videos": {"files": {"input_reference": ("a.png", site.image, "image/png")}, "data": {"prompt": "x"}},
        "/v1/videos/{job_id}/remix": {"json": {"prompt": "x"}},
        "/admin/distillations": {"json": {"recipe": "shapes"}},
        "/admin/students/{student}/promote": {"json": {"reason": "x"}},
    }

    def call(method_and_path: tuple[str, str]) -> tuple[str, httpx.Response]:
        method, template = method_and_path
        kind = "dist" if "distillations" in template else "vid"
        values = {"suffix": "mp4", "student": 64 * "0", "name": "x.png" if "samples" in template else "red-circle"}
        path = re.sub(r"\{(\w+)[^}]*\}", lambda found: values.get(found[1], f"{kind}_{26 * '0'}"), template)
        more = bodies.get(template, {}) if method == "POST" else {}
        return f"{method} {template}", httpx.request(method, site.stack.url + path, timeout=60, **more)

    routes = [route for route in walk(create_app(Settings()).routes) if isinstance(route, Route)]
    calls = [(method, route.path) for route in routes for method in route.methods if "/swagger/" not in route.path]
    with ThreadPoolExecutor(len(calls)) as pool:
        return dict(pool.map(call, calls))


NEED_NO_REDIS = {"/openapi.json", "/docs", "/livez", "/", "/examples", "/examples/{name}.png"}
NOT_OFFERED = {f"/v1/videos/{what}" for what in ("characters", "edits", "extensions")}


def test_while_redis_is_killed_every_route_says_so_and_no_job_is_lost(site, records, subtests):
    """What Redis has written is in the kernel's hands; that a machine dies is another matter (docs/operations.md)."""
    worker, redis = site.workers[0], site.stack.redis
    with Load(site) as load:
        load.more(10, 30)
        redis.process.kill()
        redis.process.wait()
        time.sleep(1.2)  # what the service has seen of its workers it may say for a second more
        answers = answers_without_redis(site)
        wait_for(lambda: len(load.refused) >= 3, 30, "the service to notice")
        wait_for(lambda: "no heartbeat written" in site.log(), 30, "the worker to run out of patience")
        redis.start()
        load.more(10, 30)
    assert all(is_refusal(answer, 503, "store_unavailable") for answer in load.refused)
    site.settle(records, load.accepted, 120)
    assert worker.poll() is None  # the same process goes on
    wait_for(lambda: not records.redis.zcard(SLOTS_KEY), 60, "every place to be given back")
    assert records.redis.get(SLOTS_TOTAL_KEY) == "0"
    assert len(answers) > 40
    for name, answer in answers.items():
        method, path = name.split()
        with subtests.test(name):
            expected = 200 if path in NEED_NO_REDIS else 404 if path in NOT_OFFERED else 503
            assert answer.status_code == expected, answer.text
            if expected != 503:
                continue
            assert int(answer.headers["Retry-After"]) > 0
            if path == "/readyz":
                assert answer.json()["causes"] == ["Redis does not answer"]
            elif method != "HEAD":
                assert answer.json()["error"]["code"] == "store_unavailable"


def test_a_full_redis_is_told_apart_and_the_worker_lives(site, records):
    worker, redis = site.workers[0], records.redis
    accepted = [site.ask().json()["id"] for _ in range(3)]
    redis.config_set("maxmemory", 1)
    try:
        assert is_refusal(site.ask(), 507, "store_full")
        with pytest.raises(RedisError) as refused:
            redis.set("flg:x", "1")
        assert is_full(refused.value)
        assert site.http.get("/generate").status_code == 200  # what is there can be read
        before = len(site.log())
        wait_for(lambda: "> 'maxmemory'" in site.log()[before:], 30, "the worker to meet it")
    finally:
        redis.config_set("maxmemory", 0)
    wait_for(site.is_ready, 30, "the worker")
    accepted.append(site.ask().json()["id"])
    site.settle(records, accepted, 60)
    assert worker.poll() is None


def test_a_redis_that_became_a_replica_is_an_outage_and_no_error_of_the_job(site, records):
    """As after a change of master that this address has not followed yet."""
    worker = site.workers[0]
    accepted = [site.ask().json()["id"] for _ in range(3)]
    with connect(site.stack.redis.url, patience=0) as admin:
        admin.replicaof("127.0.0.1", free_port())  # nobody there
        try:
            assert is_refusal(site.ask(), 503, "store_unavailable")
            before = len(site.log())
            wait_for(lambda: "read only replica" in site.log()[before:], 30, "the worker to meet it")
        finally:
            admin.replicaof("NO", "ONE")
    wait_for(site.is_ready, 30, "the worker")
    accepted.append(site.ask().json()["id"])
    site.settle(records, accepted, 60)
    assert worker.poll() is None


def test_a_redis_that_cannot_write_its_snapshots_takes_nothing(site, records):
    """MISCONF: only where snapshots are on, which is not how it is to run."""
    worker, redis = site.workers[0], records.redis
    blocked = site.stack.redis.folder / "dump.rdb"
    blocked.mkdir()
    redis.config_set("save", "3600 1000000")
    try:
        redis.bgsave()
        wait_for(lambda: redis.info("persistence")["rdb_last_bgsave_status"] == "err", 20, "the snapshot to fail")
        assert is_refusal(site.ask(), 503, "store_unavailable")
        before = len(site.log())
        wait_for(lambda: "MISCONF" in site.log()[before:], 30, "the worker to meet it")
    finally:
        redis.config_set("save", "")
        shutil.rmtree(blocked)
    wait_for(site.is_ready, 30, "the worker")
    site.settle(records, [site.ask().json()["id"]], 60)
    assert worker.poll() is None


@pytest.mark.slow
def test_a_redis_that_loads_its_file_is_waited_for(tmp_path):
    server = RedisServer(tmp_path)
    server.start()
    client, hasty = connect(server.url), connect(server.url, patience=0)
    try:
        with client.pipeline(transaction=False) as pipeline:
            for number in range(1000):
                pipeline.set(f"x{number}", 10_000 * "y")
            pipeline.execute()
        client.config_set("rdbcompression", "no")  # it answers others after each 2 MiB that it has read
        client.bgrewriteaof()
        wait_for(lambda: not client.info("persistence")["aof_rewrite_in_progress"], 20, "the file to be written anew")
        server.process.kill()
        server.process.wait()
        with (tmp_path / "redis.conf").open("a") as config:
            config.write("key-load-delay 2000\n")  # us
        with (tmp_path / "redis.log").open("ab") as log:
            server.process = subprocess.Popen([redis_binary(), str(tmp_path / "redis.conf")], stdout=log, stderr=log)
        wait_for(lambda: is_loading(hasty), 20, "Redis to say that it loads")
        assert len(client.get("x999")) == 10_000
    finally:
        client.close()
        hasty.close()
        server.stop()


def is_loading(client) -> bool:
    try:
        client.ping()
    except BusyLoadingError:
        return True
    except RedisError:
        pass
    return False


def test_a_worker_that_ends_unasked_says_so_to_whoever_supervises_it(redis_server, redis, tmp_path):
    """rq ends of what it does not know, and quietly: here of a job that it cannot read."""
    settings = {"REDIS_URL": redis_server.url, "STORAGE_URL": str(tmp_path / "storage"), "RUNS": str(tmp_path / "runs")}
    redis.hset("rq:job:x", mapping={"created_at": "yesterday", "data": "x"})
    redis.rpush("rq:queue:train", "x")
    done = run_with("worker.trainer", settings)
    assert done.returncode == 1, done.stderr
    assert "unhandled exception" in done.stderr


# --- another master ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kill_of_the_master_under_load_loses_no_accepted_job(tmp_path):
    """Twice, so that the one that was killed first is the master again."""
    sentinels, site = Sentinels(tmp_path / "sentinels"), Site(tmp_path)
    site.stack.environment["REDIS_URL"] = sentinels.url
    records = Records(connect(sentinels.url), Record)
    try:
        sentinels.start()
        site.start(*[["-m", TIMED, "--seconds", "0.1", "--no-mp4"] for _ in range(2)])
        site.stack.spawn("service.webhooks")
        accepted: list[str] = []
        for _ in range(2):
            with Load(site, clients=4) as load:
                load.more(20, 60)
                killed = sentinels.kill_master()
                wait_for(lambda: load.refused, 60, "the service to notice")
                wait_for(lambda killed=killed: sentinels.master() != killed, 60, "another master")
                load.more(20, 60)
            assert all(is_refusal(answer, 503, "store_unavailable") for answer in load.refused)
            accepted += load.accepted
            sentinels.start_redis(killed)
            wait_for(sentinels.has_replica, 60, "the old one to be a replica that has everything")
        site.settle(records, accepted, 180)
        wait_for(lambda: records.redis.exists(COURIER_KEY), 30, "the courier to have come back")
        for process in [*site.workers, *site.stack.processes.values()]:
            assert process.poll() is None
        # rq's ears, too: a job that hangs would be stopped by its command.
        names = [worker.name for worker in ready_workers(records.redis)]
        heard = records.redis.pubsub_numsub(*(f"rq:pubsub:{name}" for name in names))
        assert [count for _, count in heard] == [1, 1]
    finally:
        site.stop()
        records.redis.close()
        sentinels.stop()


@pytest.mark.slow
def test_what_a_change_of_master_would_lose_is_not_confirmed(tmp_path):
    """Without Redis' own say in it (`min-replicas-to-write`), a master without replicas goes on alone."""
    sentinels = Sentinels(tmp_path)
    sentinels.start()
    try:
        with connect(sentinels.url) as client:
            client.set("flg:job:x", "1")
            confirm(client, "flg:job:x")
            with pytest.raises(ConnectionError, match="is lost"):
                confirm(client, "flg:job:y")
            # The replica has it by the time that the master is killed.
            killed = sentinels.kill_master()
            wait_for(lambda: sentinels.master() != killed, 60, "another master")
            assert client.get("flg:job:x") == "1"
            confirm(client, "flg:job:x")  # nobody is left to wait for
    finally:
        sentinels.stop()
