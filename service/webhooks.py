"""Webhooks: the signed message to a job's `webhook_url` when the job is over. `python -m service.webhooks` sends them.

The Lua call that ends a job puts its id into the outbox (``WEBHOOKS_DUE_KEY``), so between the end and the outbox
nothing is lost. A courier claims what is due by moving it a lease ahead; if the courier dies, it is due again when the
lease is over. So each message arrives at least once, and the `webhook-id` tells a receiver that it has had it already.
The format is Standard Webhooks: https://www.standardwebhooks.com
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError
from standardwebhooks import Webhook

from service.auth import Key, new_webhook_secret
from service.errors import ApiError
from service.guard import Blocked, check_url, guarded_client
from service.links import Secrets, signer
from service.schema import DeadWebhook, WebhookState, generation
from service.settings import Settings, read
from worker import logs
from worker.contract import (
    COURIER_KEY,
    LOCAL,
    METRICS_KEY,
    WEBHOOK_SECRET_BEFORE_KEY,
    WEBHOOK_SECRET_KEY,
    WEBHOOKS_DEAD_KEY,
    WEBHOOKS_DUE_KEY,
    Record,
    api_key_key,
    record_key,
    webhook_key,
)
from worker.records import connect, connect_async, now

log = logging.getLogger("webhooks")

BACKOFF_S = (5, 30, 120, 600, 1800, 7200, 21600)
"""Between one try and the next; after the last the message is given up."""
TIMEOUT_S = 10
LEASE_S = 30
"""Longer than a delivery takes, with what is written after it."""
AT_ONCE = 32
PER_HOST = 2
"""Deliveries to one receiver at once, so that one that is dead or slow delays nobody else."""
MAX_URL = 2000
_MAX_RETRY_AFTER_S = 3600
_ALIVE_S = 30
_REFRESH_S = 30
_PAUSE_S = 1
"""After Redis has failed for longer than its client tries again."""

# Claims what can be sent now. It looks at many of those that are due, for the first may all be of receivers that have
# as many under way as they may. Of these only the first hundred of each receiver, and five hundred of all, stay where
# they are; others give way for some seconds, so that thousands that cannot be sent never hide one that can.
# KEYS: due. ARGV: now, end of the lease, most to claim, most of one receiver, then receiver, number under way, ...
# Returns whether more are due that were not looked at, then id, receiver, ...
_CLAIM = """
local busy, waiting, claimed, stay = {}, {}, {}, 0
for i = 5, #ARGV, 2 do busy[ARGV[i]] = tonumber(ARGV[i + 1]) end
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, 1000)
for _, id in ipairs(ids) do
    local url = redis.call('HGET', 'flg:job:' .. id, 'webhook_url')
    local host = url and string.lower(string.match(url, '^%a+://([^/?#]+)') or url)
    if not host then
        redis.call('ZREM', KEYS[1], id)
    elseif (busy[host] or 0) < tonumber(ARGV[4]) then
        busy[host] = (busy[host] or 0) + 1
        redis.call('ZADD', KEYS[1], ARGV[2], id)
        table.insert(claimed, id)
        table.insert(claimed, host)
        if #claimed / 2 >= tonumber(ARGV[3]) then break end
    else
        waiting[host] = (waiting[host] or 0) + 1
        stay = stay + 1
        if waiting[host] > 100 or stay > 500 then redis.call('ZADD', KEYS[1], ARGV[1] + 5, id) end
    end
end
table.insert(claimed, 1, #ids == 1000 and 1 or 0)
return claimed
"""

# Writes what became of a claimed delivery, unless the claim is over: the lease ran out, the job was deleted, or the
# message was asked for again meanwhile.
# KEYS: due, dead, delivery, record, metrics. ARGV: id, end of the lease, result (delivered, failed, dead), time of the
# next try or now, then field, value, ...
_SETTLE = """
if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or '') ~= tonumber(ARGV[2]) then return end
redis.call('HINCRBY', KEYS[5], 'webhook_deliveries_total|result=' .. ARGV[3], 1)
redis.call('HSET', KEYS[3], unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[3], redis.call('PTTL', KEYS[4]))
if ARGV[3] == 'failed' then
    redis.call('ZADD', KEYS[1], ARGV[4], ARGV[1])
else
    redis.call('ZREM', KEYS[1], ARGV[1])
end
if ARGV[3] == 'dead' then
    redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
    redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -10001)
end
"""

# KEYS: due, dead, delivery, record. ARGV: id.
_REPLAY = """
local url, finished = unpack(redis.call('HMGET', KEYS[4], 'webhook_url', 'finished_at'))
if not (url and finished) then return 0 end
redis.call('DEL', KEYS[3])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[1], redis.call('TIME')[1], ARGV[1])
return 1
"""


# --- for routes ------------------------------------------------------------------------------------------------------


def check_webhook_url(url: str, allowed_hosts: frozenset[str]) -> str:
    """The URL, if it can be one to send webhooks to. Its host is looked up when one is sent, not now.

    Args:
        url: what a client has given.
        allowed_hosts: ``host`` or ``host:port`` of receivers that may be private, and plain HTTP.

    Raises:
        ApiError: 422.
    """
    try:
        if len(url) > MAX_URL:
            raise Blocked(f"got {len(url)} characters; at most {MAX_URL} are taken")
        check_url(httpx.URL(url), allowed_hosts, https_only=True)
    except (Blocked, httpx.InvalidURL) as error:
        raise ApiError(422, "invalid_webhook_url", f"webhook_url: {error}", param="webhook_url") from None
    return url


async def state(redis: AsyncRedis, job_id: str) -> WebhookState:
    """How far the delivery of a job's webhook is; the job is over and has one."""
    values = await _hash(redis, webhook_key(job_id))
    status = "delivered" if "delivered_at" in values else "dead" if "dead_at" in values else "pending"
    return WebhookState.model_validate({"status": status, **_tries(values)})


async def dead(redis: AsyncRedis, limit: int) -> list[DeadWebhook]:
    """Those that were given up, the latest first."""
    ids = cast(list[str], await redis.zrevrange(WEBHOOKS_DEAD_KEY, 0, limit - 1))
    found = []
    for job_id in ids:
        values = await _hash(redis, webhook_key(job_id))
        if "dead_at" in values:
            found.append(DeadWebhook.model_validate({"id": job_id, "dead_at": values["dead_at"], **_tries(values)}))
        elif not values:  # it went with its job
            await redis.zrem(WEBHOOKS_DEAD_KEY, job_id)
    return found


async def replay(redis: AsyncRedis, job_id: str) -> bool:
    """Have a message sent now, as if for the first time: one that arrived, that was given up, or that is under way.

    False: there is no such job, it is not over, or it has no webhook.
    """
    keys = [WEBHOOKS_DUE_KEY, WEBHOOKS_DEAD_KEY, webhook_key(job_id), record_key(job_id)]
    return bool(await redis.register_script(_REPLAY)(keys=keys, args=[job_id]))


async def local_secret(redis: AsyncRedis) -> str:
    """What webhooks are signed with whose job belongs to no key. Made by whoever needs it first."""
    await redis.set(WEBHOOK_SECRET_KEY, new_webhook_secret(), nx=True)
    return cast(str, await redis.get(WEBHOOK_SECRET_KEY))


def rotate_local_secret(redis: Redis, keep_s: int) -> str:
    """Sign them with a new secret, which is returned; and for ``keep_s`` with the one before as well."""
    before, secret = cast(str | None, redis.get(WEBHOOK_SECRET_KEY)), new_webhook_secret()
    with redis.pipeline() as pipeline:
        pipeline.delete(WEBHOOK_SECRET_BEFORE_KEY)
        if keep_s and before:
            pipeline.set(WEBHOOK_SECRET_BEFORE_KEY, before, ex=keep_s)
        pipeline.set(WEBHOOK_SECRET_KEY, secret)
        pipeline.execute()
    return secret


def _tries(values: dict[str, str]) -> dict[str, str | None]:
    return {
        "attempts": values.get("attempts", "0"),
        "last_status": values.get("last_status") or None,
        "last_error": values.get("last_error") or None,
    }


async def _hash(redis: AsyncRedis, key: str) -> dict[str, str]:
    return await cast(Awaitable[dict[str, str]], redis.hgetall(key))


# --- delivery --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of one try."""

    status: int | None = None
    """What the receiver answered."""
    error: str = ""
    """Why it has not arrived; empty when it has."""
    retry_after_s: float = 0.0


class Courier:
    """Sends what is due. Any number of them share the work."""

    def __init__(
        self,
        redis: AsyncRedis,
        client: httpx.AsyncClient,
        view: Callable[[Record], dict[str, Any]],
        *,
        backoff_s: Sequence[float] = BACKOFF_S,
        lease_s: float = LEASE_S,
        timeout_s: float = TIMEOUT_S,
        poll_s: float = 0.5,
    ) -> None:
        """
        Args:
            redis: decodes responses.
            client: as ``guard.guarded_client`` makes it, with ``https_only``.
            view: what a job's owner sees of it, as JSON.
            backoff_s: from one try to the next.
            lease_s: longer than ``timeout_s``.
            timeout_s: of one try.
            poll_s: how long something may be due before it is seen.
        """
        self._redis = redis
        self._client = client
        self._view = view
        self._backoff_s = backoff_s
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._claim = redis.register_script(_CLAIM)
        self._settle = redis.register_script(_SETTLE)
        self._busy: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._stopping = False
        self._seen_at = 0.0

    def stop(self) -> None:
        """Claim nothing more; ``run`` returns when what is under way is done."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Send, until ``stop``."""
        while not self._stopping:
            self._wake.clear()
            wait_s = self._poll_s
            try:
                if await self._send_what_is_due():
                    continue
            except RedisError as error:
                log.warning("Redis: %s; trying again", error)
                wait_s = _PAUSE_S
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
        if self._tasks:
            _, unfinished = await asyncio.wait(self._tasks, timeout=self._timeout_s + 5)
            for task in unfinished:  # Redis is gone; another courier sends it again
                task.cancel()

    async def _moment(self) -> float:
        """Now, by Redis's clock: what is due was said by another machine, whose clock may differ."""
        seconds, microseconds = await self._redis.time()
        return round(seconds + microseconds / 1e6, 3)

    async def _send_what_is_due(self) -> bool:
        """Whether more may be due than was looked at."""
        free = AT_ONCE - self._busy.total()
        if free <= 0:
            return False
        moment = await self._moment()
        lease_end = moment + self._lease_s
        if moment > self._seen_at + _ALIVE_S / 3:
            await self._redis.set(COURIER_KEY, "1", ex=_ALIVE_S)
            self._seen_at = moment
        under_way = [part for pair in self._busy.items() for part in pair]
        answer = await self._claim(keys=[WEBHOOKS_DUE_KEY], args=[moment, lease_end, free, PER_HOST, *under_way])
        more, *claimed = cast(list[Any], answer)
        for job_id, receiver in zip(claimed[::2], claimed[1::2], strict=True):
            self._busy[receiver] += 1
            task = asyncio.create_task(self._carry(job_id, receiver, lease_end))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return bool(more) and self._busy.total() < AT_ONCE

    async def _carry(self, job_id: str, receiver: str, lease_end: float) -> None:
        """One claimed delivery, up to what is written of it."""
        try:
            outcome = await self._try(job_id)
            await self._write_down(job_id, outcome, lease_end)
        except RedisError as error:
            log.warning("%s: Redis: %s; it is sent again when the lease is over", job_id, error)
        finally:
            self._busy -= Counter((receiver,))
            self._wake.set()

    async def _try(self, job_id: str) -> Outcome:
        try:
            values = await _hash(self._redis, record_key(job_id))
            return await self._deliver(Record.from_hash(values)) if values else Outcome(error="the job is gone")
        except RedisError:
            raise
        except Exception:  # whatever is wrong with one, it must have its end, and must end no other
            log.exception("%s", job_id)
            return Outcome(error="the service could not make or send the message")

    async def _deliver(self, record: Record) -> Outcome:
        content = self._message(record)
        headers = self._headers(record.id, content, await self._secrets(record.owner))
        assert record.webhook_url is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                request = self._client.build_request("POST", record.webhook_url, content=content, headers=headers)
                response = await self._client.send(request, stream=True)
                await response.aclose()  # what it says beside the status is of no interest, and may be endless
        except (TimeoutError, httpx.TimeoutException):
            return Outcome(error=f"no answer within {self._timeout_s:g} s")
        except (Blocked, httpx.InvalidURL) as error:
            return Outcome(error=str(error))
        except httpx.TransportError as error:
            return Outcome(error=_said_for_clients(error))
        status = response.status_code
        if response.is_success:
            return Outcome(status)
        hint = "; redirects are not followed" if response.has_redirect_location else ""
        return Outcome(status, f"answered {status}{hint}", _retry_after_s(response.headers.get("Retry-After", "")))

    async def _write_down(self, job_id: str, outcome: Outcome, lease_end: float) -> None:
        moment = await self._moment()
        attempts = int(cast(str | None, await self._redis.hget(webhook_key(job_id), "attempts")) or 0) + 1
        fields: dict[str, Any] = {
            "attempts": attempts,
            "last_status": outcome.status or "",
            "last_error": outcome.error,
        }
        result, due_at = "failed", moment
        if not outcome.error:
            result = "delivered"
            fields["delivered_at"] = moment
        elif outcome.status == httpx.codes.GONE or attempts > len(self._backoff_s):
            result = "dead"
            fields["dead_at"] = moment
        else:
            pause_s = self._backoff_s[attempts - 1] * random.uniform(0.8, 1.2)
            due_at += max(pause_s, outcome.retry_after_s)
        log.info("%s: webhook %s, try %d%s", job_id, result, attempts, outcome.error and f": {outcome.error}")
        keys = [WEBHOOKS_DUE_KEY, WEBHOOKS_DEAD_KEY, webhook_key(job_id), record_key(job_id), METRICS_KEY]
        parts = [part for pair in fields.items() for part in pair]
        await self._settle(keys=keys, args=[job_id, lease_end, result, due_at, *parts])

    def _message(self, record: Record) -> str:
        ended = datetime.fromtimestamp(record.finished_at or record.created_at, UTC)
        message = {
            "type": f"generation.{record.status}",
            "timestamp": ended.isoformat().replace("+00:00", "Z"),
            "data": self._view(record),
        }
        return json.dumps(message, ensure_ascii=False, separators=(",", ":"))

    def _headers(self, job_id: str, content: str, secrets: list[str]) -> dict[str, str]:
        message_id = f"msg_{job_id.removeprefix('vid_')}"
        moment = datetime.now(UTC)
        # One for each secret: a receiver is content with any that it can check.
        signatures = [Webhook(secret).sign(message_id, moment, content) for secret in secrets]
        return {
            "Content-Type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(moment.timestamp())),
            "webhook-signature": " ".join(signatures),
        }

    async def _secrets(self, owner: str) -> list[str]:
        """What a receiver may know the owner's messages by, the present one first."""
        if owner != LOCAL and (values := await _hash(self._redis, api_key_key(owner))):
            return Key.from_hash(owner, values).webhook_secrets(now())
        before = cast(str | None, await self._redis.get(WEBHOOK_SECRET_BEFORE_KEY))
        return [await local_secret(self._redis), *([before] if before else [])]


def _said_for_clients(error: httpx.TransportError) -> str:
    """What went wrong, without the addresses that the error's own words may hold."""
    if "certificate" in str(error).lower():
        return "its certificate cannot be verified"
    if isinstance(error, httpx.ConnectError):
        return "cannot be connected to"
    return f"broke off, or does not speak HTTP ({type(error).__name__})"


def _retry_after_s(text: str) -> float:
    """What a `Retry-After` asks for, as far as it is heeded."""
    if text.isdecimal():
        seconds = float(text[:9])
    else:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now()
        except ValueError:  # none, or no date
            return 0.0
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> int:
    """Send until SIGTERM; deliveries under way are finished first. Exit code 2: a setting is wrong; 1: no Redis."""
    settings = read()
    logs.configure("webhooks", settings.log_level, settings.log_format)
    try:
        link_secrets = Secrets(connect(settings.redis_url))
    except RedisError as error:
        sys.stderr.write(f"error: REDIS_URL: Redis does not answer ({error})\n")
        return 1
    asyncio.run(_run(settings, link_secrets))
    return 0


def _view(settings: Settings, link_secrets: Secrets) -> Callable[[Record], dict[str, Any]]:
    """What a job's owner sees of it, with links that begin as no request can tell: PUBLIC_URL."""
    sign = signer(link_secrets, settings)
    if settings.public_url is None and not settings.is_local:
        log.warning("PUBLIC_URL is not set: links in webhooks begin with http://%s:%d", settings.host, settings.port)
    origin = str(settings.public_url or f"http://{settings.host}:{settings.port}").rstrip("/")
    return lambda record: generation(record, origin, sign=sign).model_dump(mode="json")


async def _run(settings: Settings, link_secrets: Secrets) -> None:
    redis = connect_async(settings.redis_url)
    client = guarded_client(settings.private_hosts, https_only=True, timeout_s=TIMEOUT_S)
    courier = Courier(redis, client, _view(settings, link_secrets))
    refreshing = asyncio.create_task(_keep_fresh(link_secrets))
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, courier.stop)
    log.info("ready")
    try:
        await courier.run()
    finally:
        refreshing.cancel()
        await client.aclose()
        await redis.aclose()


async def _keep_fresh(link_secrets: Secrets) -> None:
    while True:
        await asyncio.sleep(_REFRESH_S)
        try:
            await asyncio.to_thread(link_secrets.refresh)
        except RedisError as error:
            log.warning("Redis: %s; links are signed as before", error)


if __name__ == "__main__":
    raise SystemExit(main())
