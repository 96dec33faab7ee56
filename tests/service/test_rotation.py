"""New keys, secrets and passwords while everything runs: what was there before works on for as long as was said."""

import asyncio
import subprocess
import sys
from contextlib import AsyncExitStack
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from service import links, webhooks
from service.__main__ import main
from service.app import create_app
from service.auth import SCOPES, Keys, new_key
from service.settings import Settings
from tests.service.test_webhooks import Desk, Receiver, ended, signed_with, work
from tests.stack import ROOT, Stack, free_port, is_alive, new_record, stop, wait_for
from worker.contract import (
    LINK_SECRET_BEFORE_KEY,
    LINK_SECRET_KEY,
    WEBHOOK_SECRET_BEFORE_KEY,
    WEBHOOK_SECRET_KEY,
    Status,
    output_path,
)
from worker.records import now
from worker.storage import Storage


@pytest.fixture
def run(monkeypatch, redis_server, capsys):
    """``run("keys", ...)``: `python -m service keys ...` in this process; its exit code and what it printed."""
    monkeypatch.setenv("REDIS_URL", redis_server.url)

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["service", *arguments])
        return main(), capsys.readouterr().out.strip()

    return command


@pytest.fixture
def owned(redis, records, tmp_path):
    """A key, its text, and a finished video of it."""
    text = new_key()
    key = Keys(redis).add(text, "the shop", ("read",))
    record = new_record().model_copy(update={"owner": key.id})
    records.create(record)
    Storage(str(tmp_path)).write(output_path(record.id, "mp4"), b"video")
    return key, text, records.change(record, (Status.QUEUED,), status=Status.SUCCEEDED)


class Services:
    """Two of one Redis, for as long as a test asks them."""

    def __init__(self, url: str, storage: str) -> None:
        chosen = Settings(auth="on", redis_url=url, storage_url=storage)
        self.apps = [create_app(chosen), create_app(chosen)]

    def ask(self, test) -> None:
        """Run ``test(first, second)``; each is an HTTP client."""

        async def run() -> None:
            async with AsyncExitStack() as stack:
                clients = []
                for app in self.apps:
                    await stack.enter_async_context(app.router.lifespan_context(app))
                    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
                    clients.append(await stack.enter_async_context(client))
                await test(*clients)

        asyncio.run(run())

    def refresh(self) -> None:
        """What each does every half a minute."""
        for app in self.apps:
            app.state.context.link_secrets.refresh()


@pytest.fixture
def services(redis_server, redis, tmp_path, monkeypatch):
    assert redis
    monkeypatch.setattr("service.auth._REMEMBERED_S", 0.0)
    monkeypatch.setattr("service.links._LOOK_S", 0.0)
    # What each does at its start and every half a minute, these do when a test says so (`refresh`).
    monkeypatch.setattr("service.app._keep_up", lambda *_works: asyncio.Event().wait())
    return Services(redis_server.url, str(tmp_path))


# --- API keys ---------------------------------------------------------------------------------------------------------


def test_a_key_gets_another_text_and_keeps_its_jobs(services, owned, run, redis):
    key, old, record = owned

    async def test(client, _other) -> None:
        async def opens(text: str) -> int:
            answer = await client.get(f"/generate/{record.id}", headers={"Authorization": f"Bearer {text}"})
            return answer.status_code

        code, new = run("keys", "rotate", key.id)
        assert (code, new.split("_")[1]) == (0, key.id)
        assert new != old
        assert [await opens(text) for text in (old, new)] == [200, 200]
        kept = Keys(redis).get(key.id)
        assert abs(kept.sha256_before_until - now() - 24 * 3600) < 60
        assert (kept.name, kept.scopes, kept.webhook_secret) == (key.name, key.scopes, key.webhook_secret)
        _, newer = run("keys", "rotate", key.id, "--hours", "0")
        assert [await opens(text) for text in (old, new, newer)] == [401, 401, 200]
        assert run("keys", "revoke", key.id)[0] == 0
        assert await opens(newer) == 401

    services.ask(test)


def test_a_key_s_successor_may_be_another_key(services, redis):
    async def test(client, _other) -> None:
        texts = {name: new_key() for name in ("old", "new")}
        ids = {name: Keys(redis).add(text, name, ("read",)).id for name, text in texts.items()}

        async def opens() -> list[int]:
            headers = [{"X-API-Key": text} for text in texts.values()]
            return [(await client.get("/generate", headers=one)).status_code for one in headers]

        assert await opens() == [200, 200]
        Keys(redis).revoke(ids["old"])
        assert await opens() == [401, 200]

    services.ask(test)


def test_the_text_of_admin_key_is_the_settings_to_change(run, redis, capsys):
    key = Keys(redis).add(new_key(), "ADMIN_KEY", SCOPES)
    assert run("keys", "rotate", key.id) == (2, "")
    assert run("keys", "rotate", "nobodys")[0] == 2
    with pytest.raises(SystemExit):
        run("keys", "rotate", key.id, "--hours", "-1")
    assert "--hours: got -1; wanted 0 to 8760" in capsys.readouterr().err


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_of_the_secret_before_open_files_and_new_ones_are_of_the_new(services, owned, run, redis):
    _, text, record = owned

    async def test(first, second) -> None:
        async def link(client) -> str:
            answer = await client.get(f"/generate/{record.id}", headers={"X-API-Key": text})
            return answer.json()["video_url"]

        async def opens(*urls: str) -> list[int]:
            return [(await client.get(url)).status_code for url in urls for client in (first, second)]

        old = await link(first)
        assert run("keys", "rotate-link-secret")[0] == 0
        assert 0 <= 26 * 3600 - redis.ttl(LINK_SECRET_BEFORE_KEY) < 60  # LINK_HOURS, and as long as it takes
        assert await link(second) == old  # it has not looked yet, and what it signs still opens
        assert await opens(old) == [200, 200]
        services.apps[0].state.context.link_secrets.refresh()
        new = await link(first)
        query = dict(parse_qsl(urlsplit(new).query))
        assert links.is_genuine(bytes.fromhex(redis.get(LINK_SECRET_KEY)), urlsplit(new).path, query)
        assert await opens(old, new) == [200, 200, 200, 200]  # also at the one that has not looked
        assert await link(second) == new  # that link made it look
        redis.delete(LINK_SECRET_BEFORE_KEY)  # its time is over
        services.refresh()
        assert await opens(old, new) == [401, 401, 200, 200]
        assert run("keys", "rotate-link-secret", "--now")[0] == 0
        services.refresh()
        assert await opens(new, await link(first)) == [401, 401, 200, 200]

    services.ask(test)


# --- webhooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["key", "nobody"])
def test_webhooks_are_signed_with_both_secrets_for_a_while(run, records, redis, redis_server, whose):
    receiver = Receiver()
    owner = Keys(redis).add(new_key(), "mine", SCOPES).id if whose == "key" else "local"

    async def test(desk: Desk) -> None:
        await webhooks.local_secret(desk.redis)
        _, old = await asyncio.to_thread(run, "keys", "webhook-secret", owner)
        _, new = run("keys", "rotate-webhook-secret", owner)
        assert len({old, new}) == 2
        await desk.until_is("delivered", ended(records, receiver.url(), owner).id)
        assert len(receiver.had[0].headers["webhook-signature"].split(" ")) == 2
        assert all(signed_with(secret, receiver.had[0]) for secret in (old, new))
        _, newest = run("keys", "rotate-webhook-secret", owner, "--hours", "0")
        await desk.until_is("delivered", ended(records, receiver.url(), owner).id)
        assert len(receiver.had[1].headers["webhook-signature"].split(" ")) == 1
        assert signed_with(newest, receiver.had[1])

    work(redis_server.url, test, receiver)


def test_the_secret_of_nobodys_webhooks_is_forgotten_by_itself(redis):
    first = webhooks.rotate_local_secret(redis, 3600)
    assert (redis.get(WEBHOOK_SECRET_KEY), redis.exists(WEBHOOK_SECRET_BEFORE_KEY)) == (first, 0)
    webhooks.rotate_local_secret(redis, 3600)
    assert redis.get(WEBHOOK_SECRET_BEFORE_KEY) == first
    assert 3590 < redis.ttl(WEBHOOK_SECRET_BEFORE_KEY) <= 3600


# --- Redis ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_redis_takes_the_old_and_the_new_password_while_programs_go_over(tmp_path):
    """As docs/operations.md says it: add a password, go over one by one, take the old one away."""
    stack = Stack(tmp_path)
    stack.redis.start()
    admin = Redis.from_url(stack.redis.url)
    admin.execute_command("ACL", "SETUSER", "service", "on", ">first", "~*", "&*", "+@all", "-@admin")
    services: list[subprocess.Popen[bytes]] = []

    def start(password: str) -> str:
        """A service that logs in with this; its address."""
        url = f"redis://service:{password}@127.0.0.1:{stack.redis.port}/0"
        port = str(free_port())
        with (tmp_path / "service.log").open("ab") as log:
            environment = {**stack.environment, "REDIS_URL": url, "PORT": port}
            command = [sys.executable, "-m", "service"]
            services.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        wait_for(lambda: is_alive(f"http://127.0.0.1:{port}"), 30, (tmp_path / "service.log").read_text())
        return f"http://127.0.0.1:{port}"

    try:
        old = start("first")
        admin.execute_command("ACL", "SETUSER", "service", ">second")
        new = start("second")
        assert [httpx.get(f"{url}/generate", timeout=30).status_code for url in (old, new)] == [200, 200]
        stop(services[0])
        admin.execute_command("ACL", "SETUSER", "service", "<first")
        with pytest.raises(AuthenticationError):
            Redis.from_url(f"redis://service:first@127.0.0.1:{stack.redis.port}/0").ping()
        assert httpx.get(f"{new}/generate", timeout=30).status_code == 200
    finally:
        for process in services:
            stop(process)
        stack.redis.stop()
