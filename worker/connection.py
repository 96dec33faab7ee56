"""How every program of ours reaches Redis: REDIS_URL, how long it is tried, and what to make of a Redis that refuses.

    redis://user:password@host:6379/0
    rediss://...                          the same over TLS; `?ssl_ca_certs=/path` names the authority
    unix:///path/to/socket?db=0
    redis+sentinel://user:password@host1:26379,host2:26379,host3:26379/mymaster/0
    rediss+sentinel://...                 Sentinels and Redis over TLS

With Sentinels, `?sentinel_username=...&sentinel_password=...` is what they want to be told; they are asked where the
master is at each new connection. No torch, no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.backoff import ExponentialBackoff
from redis.connection import parse_url
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

log = logging.getLogger(__name__)

_BACKOFF = ExponentialBackoff(cap=1.0, base=0.05)
# A restart loads its file for a while; a master that is one no more answers READONLY until everybody knows the new one.
_RETRY_ON = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError)
_IN_A_SECOND: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
_QUIET: dict[str, Any] = {"driver_info": None, "maint_notifications_config": MaintNotificationsConfig(enabled=False)}
"""Or redis-py says at each new connection what it is, and asks for news that a Redis of our own does not have: three
calls more, and older servers count them as offences against what the user may."""
_SENTINEL_PORT = 26379
_CONFIRM_KEY = "flg:confirmed"
_CONFIRM_MS = 200


class _Patience(Retry):
    """Tries again until so many seconds after the first try.

    redis-py counts tries instead, and connecting within a command has tries of its own: of a Redis that hangs, each of
    which takes a timeout, that makes minutes.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(_BACKOFF, -1, _RETRY_ON)
        self._seconds = seconds

    def call_with_retry(self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False) -> Any:
        deadline, failures = time.monotonic() + self._seconds, 0
        while True:
            try:
                return do()
            except self._supported_errors as error:
                failures += 1
                if is_retryable and not is_retryable(error):
                    raise
                fail(error, failures) if with_failure_count else fail(error)
                pause = self._backoff.compute(failures)
                if time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)


class _AsyncPatience(AsyncRetry):
    """The same for asyncio."""

    def __init__(self, seconds: float) -> None:
        super().__init__(_BACKOFF, -1, _RETRY_ON)
        self._seconds = seconds

    async def call_with_retry(
        self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False
    ) -> Any:
        deadline, failures = time.monotonic() + self._seconds, 0
        while True:
            try:
                return await do()
            except self._supported_errors as error:
                failures += 1
                if is_retryable and not is_retryable(error):
                    raise
                await (fail(error, failures) if with_failure_count else fail(error))
                pause = self._backoff.compute(failures)
                if time.monotonic() + pause > deadline:
                    raise
                await asyncio.sleep(pause)


# --- where it is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Address:
    """What a REDIS_URL says."""

    options: dict[str, Any]
    """For the connections to Redis, as redis-py calls them."""
    sentinels: tuple[tuple[str, int], ...] = ()
    master: str = ""
    sentinel_options: dict[str, Any] = field(default_factory=dict)


def parse(url: str) -> _Address:
    """Raises ``ValueError``: what came, without its secrets, and what was wanted."""
    scheme, found, rest = url.partition("://")
    try:
        if found and scheme in ("redis", "rediss", "unix"):
            return _Address(_plain(url))
        if found and scheme in ("redis+sentinel", "rediss+sentinel"):
            return _sentinel(scheme.partition("+")[0], rest)
        raise ValueError("it begins with none of redis://, rediss://, unix://, redis+sentinel://, rediss+sentinel://")
    except ValueError as error:
        raise ValueError(f"no address of a Redis: {error}") from None


def redacted(url: str) -> str:
    """A URL as it may be shown: without user and passwords."""
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"//.*@", "//***@", url))


def _plain(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    _port(parts, 0)
    if parts.scheme == "unix":
        if not parts.path:
            raise ValueError("it names no socket; wanted unix:///path/to/socket")
    elif not parts.hostname:
        raise ValueError(f"it names no host; wanted {parts.scheme}://host:6379/0")
    elif not re.fullmatch(r"/?[0-9]*", parts.path):
        raise ValueError("what comes after the host is no number of a database; wanted, for example, /0")
    return cast(dict[str, Any], parse_url(url))  # type: ignore[no-untyped-call]


def _port(parts: SplitResult, default: int) -> int:
    try:
        return parts.port or default
    except ValueError:  # its own words may hold a part of a password
        raise ValueError(
            "its port is no number up to 65535; in a password / @ : ? # % are written %2F %40 ..."
        ) from None


def _sentinel(scheme: str, rest: str) -> _Address:
    wanted = "wanted redis+sentinel://user:password@host1:26379,host2:26379/mymaster/0"
    place, _, query = rest.partition("?")
    before, at, after = place.rpartition("@")
    hosts, _, path = after.partition("/")
    master, _, database = path.partition("/")
    if not master:
        raise ValueError(f"it names no master; {wanted}")
    sentinels = []
    for host in hosts.split(","):
        parts = urlsplit(f"//{host.strip()}")
        if not parts.hostname:
            raise ValueError(f"got {hosts!r} for the Sentinels, of which one has no host; {wanted}")
        sentinels.append((parts.hostname, _port(parts, _SENTINEL_PORT)))
    asked = dict(parse_qsl(query))
    credentials = {name: asked.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    options = _plain(f"{scheme}://{before}{at}master/{database}?{urlencode(asked)}")
    for name in ("host", "port", "connection_class"):
        options.pop(name, None)
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    if scheme == "rediss":
        options["ssl"] = tls["ssl"] = True
    sentinel_options = {**tls, **{name: value for name, value in credentials.items() if value}}
    return _Address(options, tuple(sentinels), master, sentinel_options)


# --- connections -----------------------------------------------------------------------------------------------------


def connect(url: str, *, text: bool = True, patience: float = 20) -> Redis:
    """A client that outlives a restart of Redis, and a change of master.

    Args:
        url: REDIS_URL, see above.
        text: whether it decodes responses. rq needs one that does not.
        patience: seconds for which a command is tried again; what hangs takes one timeout of 5 s more. By default long
            enough for a change of master.

    Raises:
        ValueError: it is no such URL.
    """
    own = {"decode_responses": text, "health_check_interval": 15}
    return cast(Redis, _client(url, Redis, Sentinel, _Patience, patience, own))


def connect_async(url: str, *, patience: float = 3) -> AsyncRedis:
    """The same for asyncio."""
    # One for each request that is being answered; the default of 100 would turn the 101st away.
    own = {"decode_responses": True, "max_connections": 10_000}
    return cast(AsyncRedis, _client(url, AsyncRedis, AsyncSentinel, _AsyncPatience, patience, own))


def _client(url: str, client: Any, sentinel: Any, retry: Any, patience: float, own: dict[str, Any]) -> Any:
    """A client of redis-py; which one, the classes say: blocking ones, or asyncio's."""
    address = parse(url)
    options = {"retry": retry(patience), **own, **_QUIET}
    if not address.sentinels:
        return client.from_url(url, **options)
    once = {"retry": retry(0), **_QUIET, **_IN_A_SECOND}
    manager = sentinel(address.sentinels, sentinel_kwargs={**once, **address.sentinel_options})
    return manager.master_for(address.master, **{**options, **address.options})


def confirm(redis: Redis, key: str) -> None:
    """Return once a replica has ``key`` as well, where there are Sentinels: a change of master loses what none has.

    One that does not answer is not waited for: how many have to, Redis is told (``min-replicas-to-write``).

    Raises:
        ConnectionError: the master has changed since it was written, and the key is lost.
    """
    if not isinstance(redis.connection_pool, SentinelConnectionPool):
        return
    with redis.pipeline(transaction=False) as pipeline:
        pipeline.exists(key)
        pipeline.set(_CONFIRM_KEY, "", ex=60)  # replicas are waited for up to this connection's last write
        pipeline.wait(1, _CONFIRM_MS)
        found, _, _ = pipeline.execute()
    if not found:
        raise ConnectionError("the master has changed, and what was written before is lost")


# --- a Redis that refuses --------------------------------------------------------------------------------------------


def is_full(error: RedisError) -> bool:
    """Whether Redis has refused to write because it has reached its maxmemory."""
    # Redis 6 wraps what a script meets in an error of its own.
    return isinstance(error, OutOfMemoryError) or "-OOM " in str(error)


def warn_if_it_loses(redis: Redis) -> None:
    """Say in the log what about this Redis' configuration may lose jobs."""
    try:
        found = risks(redis)
    except RedisError as error:
        found = [f"whether it may lose jobs is not known ({error})"]
    for risk in found:
        log.warning("REDIS_URL: %s", risk)


def risks(redis: Redis) -> list[str]:
    """What about this Redis' configuration may lose jobs, a sentence for each; nothing when it is as it should be.

    From INFO, as CONFIG is not for everybody. What only CONFIG tells (``appendfsync``) is not looked at.
    """
    said = redis.info()
    found = []
    if (policy := said.get("maxmemory_policy", "noeviction")) != "noeviction":
        found.append(f"its maxmemory-policy is {policy}: when it is full it drops jobs; wanted noeviction")
    if not int(said.get("aof_enabled", 0)):
        found.append("its appendonly is off: a restart loses what came after the last snapshot; wanted appendonly yes")
    elif said.get("aof_last_write_status", "ok") != "ok":
        found.append("it cannot write its append-only file: the disk is full, or broken")
    return found
