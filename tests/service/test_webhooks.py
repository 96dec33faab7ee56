"""The courier against a real Redis and real receivers on this machine."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from openai import OpenAI
from standardwebhooks import Webhook

from service import webhooks
from service.auth import SCOPES, Keys, new_key
from service.errors import ApiError
from service.guard import guarded_client
from service.schema import generation
from service.webhooks import Courier, check_webhook_url
from tests.stack import ROOT, RedisServer, free_port, new_record
from worker.contract import METRICS_KEY, WEBHOOKS_DEAD_KEY, WEBHOOKS_DUE_KEY, Record, Status, webhook_key
from worker.records import Records, connect, connect_async, now

SOON = (0.01, 0.01, 0.01)


@dataclass
class Delivery:
    """One request that a receiver had."""

    path: str
    headers: dict[str, str]
    content: bytes


@dataclass
class Receiver:
    """A server on a free port of 127.0.0.1. ``answers`` is what it says to one request after the other."""

    answers: list[bytes] = field(default_factory=list)
    holds: bool = False
    """Never answers, up to its ``release``."""
    held: set[asyncio.StreamWriter] = field(default_factory=set)
    had: list[Delivery] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    port: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str = "/hook") -> str:
        return f"http://{self.host}{path}"

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def release(self) -> None:
        for writer in self.held:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            content = await reader.readexactly(int(headers["content-length"]))
            self.had.append(Delivery(first.split()[1], headers, content))
            if self.holds:
                self.held.add(writer)
                await reader.read()  # until the other side gives up, or this one
            else:
                writer.write(self.answers.pop(0) if self.answers else reply(200))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.at_once -= 1
            writer.close()


def reply(status: int, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def ended(records, url: str, owner: str = "local", status: Status = Status.SUCCEEDED) -> Record:
    """A job that is over; its end put it into the outbox."""
    record = new_record().model_copy(update={"webhook_url": url, "owner": owner, "metadata": {"order": "7"}})
    records.create(record)
    record = records.change(record, (Status.QUEUED,), status=Status.RUNNING, attempt=1, started_at=now())
    return records.change(record, (Status.RUNNING,), status=status, finished_at=now())


def view(record: Record) -> dict:
    return generation(record, "https://videos.example").model_dump(mode="json")


class Desk:
    """A courier at work, and what it looks at."""

    def __init__(self, redis, courier: Courier) -> None:
        self.redis = redis
        self.courier = courier

    async def until(self, condition: Callable[[], Awaitable[object] | object], what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while True:
            result = condition()
            if await result if isinstance(result, Awaitable) else result:
                return
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            await asyncio.sleep(0.01)

    async def until_is(self, status: str, job_id: str) -> dict:
        async def reached() -> bool:
            return (await webhooks.state(self.redis, job_id)).status == status

        await self.until(reached, f"{job_id} to be {status}")
        return await self.redis.hgetall(webhook_key(job_id))


def work(redis_url: str, test, *receivers: Receiver, allowed: frozenset[str] | None = None, **options) -> None:
    """Run ``test(desk)`` while a courier is at work and these receivers listen."""

    async def run() -> None:
        servers = [await receiver.start() for receiver in receivers]
        hosts = frozenset(receiver.host for receiver in receivers) if allowed is None else allowed
        redis = connect_async(redis_url)
        client = guarded_client(hosts, https_only=True, timeout_s=60)
        courier = Courier(redis, client, view, **{"backoff_s": SOON, "poll_s": 0.02, **options})
        running = asyncio.create_task(courier.run())
        try:
            await test(Desk(redis, courier))
        finally:
            courier.stop()
            for server, receiver in zip(servers, receivers, strict=True):
                server.close()
                receiver.release()
            await running
            await client.aclose()
            await redis.aclose()

    asyncio.run(run())


def signed_with(secret: str, delivery: Delivery) -> bool:
    """Whether two libraries, neither ours, accept the signature."""
    Webhook(secret).verify(delivery.content, delivery.headers)
    with OpenAI(api_key="x") as client:
        client.webhooks.verify_signature(delivery.content, delivery.headers, secret=secret)
    return True


# --- the message -----------------------------------------------------------------------------------------------------


def test_a_webhook_is_signed_and_says_what_the_owner_would_see(records, redis_server):
    receiver = Receiver()

    async def test(desk: Desk) -> None:
        record = ended(records, receiver.url("/hook?a=b"))
        state = await desk.until_is("delivered", record.id)
        assert (state["attempts"], state["last_status"], state["last_error"]) == ("1", "200", "")
        (delivery,) = receiver.had
        assert signed_with(await webhooks.local_secret(desk.redis), delivery)
        assert delivery.path == "/hook?a=b"
        assert delivery.headers["webhook-id"] == "msg_" + record.id.removeprefix("vid_")
        assert delivery.headers["content-type"] == "application/json"
        message = json.loads(delivery.content)
        assert message["type"] == "generation.succeeded"
        assert datetime.fromisoformat(message["timestamp"]).timestamp() == record.finished_at
        assert message["data"] == view(record)
        assert message["data"]["video_url"] == f"https://videos.example/videos/{record.id}.mp4"
        assert await desk.redis.zcard(WEBHOOKS_DUE_KEY) == 0
        assert await desk.redis.hget(METRICS_KEY, "webhook_deliveries_total|result=delivered") == "1"
        kept_s = await desk.redis.ttl(f"flg:job:{record.id}") - await desk.redis.ttl(webhook_key(record.id))
        assert abs(kept_s) <= 1

    work(redis_server.url, test, receiver)


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
def test_every_end_is_told(records, redis_server, status):
    receiver = Receiver()

    async def test(desk: Desk) -> None:
        await desk.until_is("delivered", ended(records, receiver.url(), status=status).id)
        assert json.loads(receiver.had[0].content)["type"] == f"generation.{status}"

    work(redis_server.url, test, receiver)


def test_the_secret_is_that_of_the_key_that_asked(records, redis_server):
    receiver = Receiver()
    keys = Keys(records.redis)
    key = keys.add(new_key(), "mine", SCOPES)

    async def test(desk: Desk) -> None:
        await desk.until_is("delivered", ended(records, receiver.url(), owner=key.id).id)
        assert signed_with(key.webhook_secret, receiver.had[0])
        keys.revoke(key.id)  # its jobs are told of nevertheless
        await desk.until_is("delivered", ended(records, receiver.url(), owner=key.id).id)
        assert signed_with(await webhooks.local_secret(desk.redis), receiver.had[1])

    work(redis_server.url, test, receiver)


# --- trying again ----------------------------------------------------------------------------------------------------


def test_the_same_message_until_it_arrives(records, redis_server):
    receiver = Receiver([reply(500), reply(503, body=b"x" * 99999), reply(204)])

    async def test(desk: Desk) -> None:
        state = await desk.until_is("delivered", ended(records, receiver.url()).id)
        assert (state["attempts"], state["last_status"]) == ("3", "204")
        assert len({delivery.headers["webhook-id"] for delivery in receiver.had}) == 1
        assert len({delivery.content for delivery in receiver.had}) == 1
        assert await desk.redis.hget(METRICS_KEY, "webhook_deliveries_total|result=failed") == "2"

    work(redis_server.url, test, receiver)
    assert len(receiver.had) == 3


def test_the_next_try_is_later_each_time_and_as_late_as_the_receiver_asks(records, redis_server):
    receiver = Receiver([reply(500)])
    at = format_datetime(datetime.now(UTC) + timedelta(minutes=30), usegmt=True)
    asking = Receiver([reply(429, "Retry-After: 1200"), reply(503, f"Retry-After: {at}"), reply(503, "Retry-After: 1")])
    greedy = Receiver([reply(503, "Retry-After: 99999999")])

    async def due_in_s(desk: Desk, url: str) -> float:
        record = ended(records, url)
        await desk.until(lambda: desk.redis.exists(webhook_key(record.id)), "a first try")
        return float(await desk.redis.zscore(WEBHOOKS_DUE_KEY, record.id)) - now()

    async def test(desk: Desk) -> None:
        assert 75 < await due_in_s(desk, receiver.url()) <= 120
        assert 1190 < await due_in_s(desk, asking.url()) <= 1200
        assert 1700 < await due_in_s(desk, asking.url()) <= 1800
        assert 75 < await due_in_s(desk, asking.url()) <= 120
        assert 3590 < await due_in_s(desk, greedy.url()) <= 3600

    work(redis_server.url, test, receiver, asking, greedy, backoff_s=(100,))
    assert webhooks.BACKOFF_S == (5, 30, 120, 600, 1800, 7200, 21600)


def test_what_never_arrives_is_given_up_and_can_be_sent_again(records, redis_server):
    receiver = Receiver([reply(500)] * 4)

    async def test(desk: Desk) -> None:
        record = ended(records, receiver.url())
        await desk.until_is("dead", record.id)
        assert len(receiver.had) == 1 + len(SOON)
        (given_up,) = await webhooks.dead(desk.redis, 10)
        assert (given_up.id, given_up.attempts, given_up.last_status) == (record.id, 4, 500)
        assert given_up.last_error == "answered 500"
        assert await desk.redis.zscore(WEBHOOKS_DUE_KEY, record.id) is None
        assert await desk.redis.hget(METRICS_KEY, "webhook_deliveries_total|result=dead") == "1"

        assert await webhooks.replay(desk.redis, record.id)
        state = await desk.until_is("delivered", record.id)
        assert state["attempts"] == "1"
        assert await webhooks.dead(desk.redis, 10) == []

        assert await webhooks.replay(desk.redis, record.id)  # one that has arrived
        await desk.until(lambda: len(receiver.had) == 6, "another delivery")
        await desk.until_is("delivered", record.id)
        assert len({delivery.headers["webhook-id"] for delivery in receiver.had}) == 1

    work(redis_server.url, test, receiver)


def test_a_receiver_that_is_gone_for_good(records, redis_server):
    receiver = Receiver([reply(410)])

    async def test(desk: Desk) -> None:
        state = await desk.until_is("dead", ended(records, receiver.url()).id)
        assert (state["attempts"], state["last_status"]) == ("1", "410")

    work(redis_server.url, test, receiver)


def test_there_is_nothing_to_send_again(record, redis_server):
    async def test(desk: Desk) -> None:
        assert not await webhooks.replay(desk.redis, "vid_" + "0" * 26)
        assert not await webhooks.replay(desk.redis, record.id)  # not over, no webhook
        assert await desk.redis.zcard(WEBHOOKS_DUE_KEY) == 0

    work(redis_server.url, test)


def test_a_job_that_is_deleted_is_not_told_of(records, redis_server):
    receiver = Receiver(holds=True)

    async def test(desk: Desk) -> None:
        under_way = ended(records, receiver.url())
        await desk.until(lambda: receiver.had, "a delivery to be under way")
        records.delete(under_way.id)
        await desk.until(lambda: receiver.at_once == 0, "the delivery to end")
        expired = ended(records, f"http://127.0.0.1:{receiver.port}/")
        records.redis.delete(f"flg:job:{expired.id}")  # as when its time is over
        await desk.until(lambda: _empty(desk), "the outbox to be empty")
        assert not await desk.redis.exists(webhook_key(under_way.id), webhook_key(expired.id))

    async def _empty(desk: Desk) -> bool:
        return await desk.redis.zcard(WEBHOOKS_DUE_KEY) == 0

    work(redis_server.url, test, receiver, timeout_s=0.3)


@pytest.mark.usefixtures("records")
def test_given_up_ones_go_with_their_jobs(redis_server):
    async def test(desk: Desk) -> None:
        await desk.redis.zadd(WEBHOOKS_DEAD_KEY, {"vid_" + "0" * 26: now()})
        assert await webhooks.dead(desk.redis, 10) == []
        assert await desk.redis.zcard(WEBHOOKS_DEAD_KEY) == 0

    work(redis_server.url, test)


# --- receivers that are dead, slow or hostile ------------------------------------------------------------------------


def test_a_dead_receiver_delays_nobody_else(records, redis_server):
    """More for the dead one than all that may be under way at once, and all of it is due first."""
    dead, good = Receiver(holds=True), Receiver()

    async def test(desk: Desk) -> None:
        for _ in range(40):
            ended(records, dead.url())
        await desk.until(lambda: len(dead.had) == webhooks.PER_HOST, "the dead one to be busy")
        told = [ended(records, good.url()) for _ in range(20)]
        for record in told:
            await desk.until_is("delivered", record.id)
        assert len(good.had) == 20
        assert dead.at_once == len(dead.had) == webhooks.PER_HOST  # still those of the beginning
        assert good.most_at_once <= webhooks.PER_HOST

    work(redis_server.url, test, dead, good, timeout_s=60)


def test_thousands_for_one_receiver_do_not_hide_the_rest(records, redis_server):
    dead, good = Receiver(holds=True), Receiver()

    async def test(desk: Desk) -> None:
        first = ended(records, dead.url())
        values = records.redis.hgetall(f"flg:job:{first.id}")
        with records.redis.pipeline() as pipeline:
            for number in range(2500):
                job_id = f"vid_{number:026}"
                pipeline.hset(f"flg:job:{job_id}", mapping={**values, "id": job_id})
                pipeline.zadd(WEBHOOKS_DUE_KEY, {job_id: 1})
            pipeline.execute()
        await desk.until_is("delivered", ended(records, good.url()).id)
        assert len(dead.had) == webhooks.PER_HOST

    work(redis_server.url, test, dead, good, timeout_s=60)


def test_an_endless_answer_is_not_read(records, redis_server):
    receiver = Receiver([b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n" + b"x" * 4_000_000])

    async def test(desk: Desk) -> None:
        await desk.until_is("delivered", ended(records, receiver.url()).id)

    work(redis_server.url, test, receiver)


def test_a_redirect_is_not_followed(records, redis_server):
    receiver, other = Receiver(), Receiver()

    async def test(desk: Desk) -> None:
        receiver.answers = [reply(307, f"Location: {other.url()}")]
        record = ended(records, receiver.url())
        await desk.until(lambda: desk.redis.exists(webhook_key(record.id)), "a first try")
        state = await webhooks.state(desk.redis, record.id)
        assert state.last_error == "answered 307; redirects are not followed"
        assert other.had == []

    work(redis_server.url, test, receiver, other, backoff_s=(100,))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_private_receiver_that_is_not_on_the_list(records, redis_server, scheme):
    receiver = Receiver()

    async def test(desk: Desk) -> None:
        url = receiver.url() if scheme == "http" else "https://localhost/"
        await desk.until_is("dead", ended(records, url).id)
        (given_up,) = await webhooks.dead(desk.redis, 1)
        assert given_up.last_status is None
        assert given_up.last_error == (
            "127.0.0.1 may be reached by https:// only"
            if scheme == "http"
            else "localhost resolves to an address that is not public"
        )
        assert receiver.had == []

    work(redis_server.url, test, receiver, allowed=frozenset())


def test_a_receiver_that_is_not_there(records, redis_server):
    port = free_port()

    async def test(desk: Desk) -> None:
        state = await desk.until_is("dead", ended(records, f"http://127.0.0.1:{port}/").id)
        assert state["last_error"] == "cannot be connected to"

    work(redis_server.url, test, allowed=frozenset({f"127.0.0.1:{port}"}))


def test_a_record_that_cannot_be_read_ends_nothing_else(records, redis_server, caplog):
    receiver = Receiver()

    async def test(desk: Desk) -> None:
        broken = ended(records, receiver.url())
        records.redis.hset(f"flg:job:{broken.id}", "created_at", "yesterday")
        records.redis.zadd(WEBHOOKS_DUE_KEY, {broken.id: 0})
        await desk.until_is("dead", broken.id)
        await desk.until_is("delivered", ended(records, receiver.url()).id)

    work(redis_server.url, test, receiver)
    assert "created_at" in caplog.text


# --- several couriers, and their ends --------------------------------------------------------------------------------

COURIER = """
import asyncio, sys
from service.guard import guarded_client
from service.webhooks import Courier
from worker.records import connect_async

async def run(url, host):
    client = guarded_client(frozenset({host}), https_only=True, timeout_s=60)
    await Courier(connect_async(url), client, lambda record: {"id": record.id}, lease_s=1.0, timeout_s=60).run()

asyncio.run(run(*sys.argv[1:]))
"""


def test_a_courier_that_is_killed_under_way_is_replaced(records, redis_server):
    receiver = Receiver(holds=True)

    async def test() -> None:
        server = await receiver.start()
        record = ended(records, receiver.url())
        command = [sys.executable, "-c", COURIER, redis_server.url, receiver.host]
        first = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        redis = connect_async(redis_server.url)
        client = guarded_client(frozenset({receiver.host}), https_only=True, timeout_s=5)
        desk = Desk(redis, Courier(redis, client, view))
        await desk.until(lambda: receiver.had, "the first courier to be under way")
        first.kill()
        await first.wait()
        before = len(receiver.had)
        assert (await webhooks.state(redis, record.id)).attempts == 0
        receiver.holds = False
        running = asyncio.create_task(desk.courier.run())
        await desk.until_is("delivered", record.id)
        desk.courier.stop()
        await running
        assert len(receiver.had) > before
        assert {delivery.headers["webhook-id"] for delivery in receiver.had} == {f"msg_{record.id[4:]}"}
        await client.aclose()
        await redis.aclose()
        server.close()

    asyncio.run(test())


def test_couriers_share_the_work(records, redis_server):
    receivers = [Receiver() for _ in range(5)]

    async def test(desk: Desk) -> None:
        client = guarded_client(frozenset(receiver.host for receiver in receivers), https_only=True, timeout_s=5)
        other = Courier(desk.redis, client, view, poll_s=0.02)
        running = asyncio.create_task(other.run())
        told = [ended(records, receiver.url()) for receiver in receivers for _ in range(8)]
        for record in told:
            await desk.until_is("delivered", record.id)
        assert sorted(d.headers["webhook-id"] for r in receivers for d in r.had) == sorted(
            f"msg_{record.id[4:]}" for record in told
        )
        other.stop()
        await running
        await client.aclose()

    work(redis_server.url, test, *receivers)


def test_the_program_finishes_what_is_under_way_when_it_is_stopped(records, redis_server):
    """`python -m service.webhooks`, SIGTERM: exit code 0, and the delivery is written down."""
    receiver = Receiver(holds=True)
    released = asyncio.Event()

    async def answer_late(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        receiver.at_once += 1
        await released.wait()
        writer.write(reply(200))
        await writer.drain()
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(answer_late, "127.0.0.1", 0)
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        record = ended(records, f"http://{host}/")
        environment = {"REDIS_URL": redis_server.url, "PRIVATE_HOSTS": host, "PUBLIC_URL": "https://videos.example"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.webhooks"), cwd=ROOT, env=environment, stderr=subprocess.PIPE
        )
        redis = connect_async(redis_server.url)
        desk = Desk(redis, None)
        await desk.until(lambda: receiver.at_once, "the delivery to be under way")
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert process.returncode is None
        released.set()
        _, said = await process.communicate()
        assert process.returncode == 0, said.decode()
        assert (await webhooks.state(redis, record.id)).status == "delivered"
        assert host not in said.decode()
        await redis.aclose()
        server.close()

    asyncio.run(test())


def test_a_redis_that_is_away_for_a_while(tmp_path, caplog):
    """The courier outlives it, and sends what fell due meanwhile."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    receiver = Receiver()
    client = connect(server.url)

    async def test(desk: Desk) -> None:
        records = Records(client, Record)
        await desk.until_is("delivered", ended(records, receiver.url()).id)
        record = ended(records, "http://nowhere.test/")
        await asyncio.to_thread(server.stop)
        await desk.until(lambda: "trying again" in caplog.text, "the client to give up")
        await asyncio.to_thread(server.start)
        records.redis.hset(f"flg:job:{record.id}", "webhook_url", receiver.url())
        await desk.until_is("delivered", record.id)

    try:
        work(server.url, test, receiver, backoff_s=(0.01,) * 100)
    finally:
        client.close()
        server.stop()


# --- what may be given -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["https://app.example/hooks?token=1", "http://receiver.internal:8080/hook", "https://[2606:4700:4700::1111]/"],
)
def test_a_url_that_may_be_given(url):
    assert check_webhook_url(url, frozenset({"receiver.internal:8080"})) == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://app.example/", "https:// only"),
        ("https://app.example:8443/", "port 8443"),
        ("https:///path", "no host"),
        ("app.example", "https://"),
        ("", "https://"),
        ("ftp://app.example/", "https://"),
        ("https://me:secret@app.example/", "user name"),
        ("https://127.0.0.1/", "not a public address"),
        ("https://[::ffff:10.0.0.1]/", "not a public address"),
        ("https://app.example:port/", "port"),
        ("https://app.example/\n", "webhook_url"),
        ("https://app.example/" + "x" * 2000, "at most 2000"),
    ],
)
def test_a_url_that_may_not_be_given(url, reason):
    with pytest.raises(ApiError) as caught:
        check_webhook_url(url, frozenset({"receiver.internal:8080"}))
    assert (caught.value.status, caught.value.param) == (422, "webhook_url")
    assert reason in caught.value.message
    assert "secret" not in caught.value.message
