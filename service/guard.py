"""The only way from here to an address that a client has named: an HTTP client that reaches public addresses alone.

A name is looked up once, when a connection is made; every address it has must be public, and the connection goes to
one of those that were checked. So neither a redirect nor a name that resolves differently the next time leads inside.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import IPv6Address, ip_address, ip_network
from typing import cast

import httpcore
import httpx

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Looks a host up: all its addresses. Raises ``OSError`` where there is none."""

_PORTS = {"http": 80, "https": 443}
_GLOBAL_UNICAST = ip_network("2000::/3")
_NOT_PUBLIC = tuple(
    ip_network(text)
    for text in (
        "100.64.0.0/10",  # behind a carrier's NAT
        "192.0.0.0/24",  # protocol assignments, parts of which Python calls global
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments; Teredo, which can hold any IPv4 address
        "2001:db8::/32",
        "3fff::/20",
    )
)
_LOOKUPS = 64
"""At once. One whose name server is silent holds a thread for longer than the request that wanted it waits."""
_TRIES = 4
"""Addresses of one host that are tried."""


class Blocked(Exception):
    """An address that is not to be reached. The message is for whoever named it and tells nothing of what is inside."""


def is_public(text: str) -> bool:
    """Whether an IP address is one that anybody on the internet could reach as well.

    ``is_global`` is not enough: it holds for multicast, and for IPv6 addresses that lead to any IPv4 address.
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return is_public(str(inner))
        # Outside of it: NAT64, IPv4-compatible, unique local, link-local, site-local, multicast, loopback.
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not (
        address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or address.is_loopback
        or address.is_link_local
        or any(address in network for network in _NOT_PUBLIC)
    )


def is_allowed(host: str, port: int, allowed_hosts: frozenset[str]) -> bool:
    """Whether the allow list names this host, at its usual ports, or this host and port."""
    name = f"[{host}]" if ":" in host else host.lower()
    return (name in allowed_hosts and port in _PORTS.values()) or f"{name}:{port}" in allowed_hosts


def check_url(url: httpx.URL, allowed_hosts: frozenset[str], *, https_only: bool) -> None:
    """Whatever can be said of a URL without looking its host up.

    Args:
        url: what somebody wants reached.
        allowed_hosts: ``host`` or ``host:port`` of those that may be private, and plain HTTP.
        https_only: refuse plain HTTP, but for those.

    Raises:
        Blocked: it is not to be reached.
    """
    if url.scheme not in _PORTS:
        raise Blocked(f"wanted an address that begins https:// or http://, got {str(url)[:24]!r}")
    if not url.host:
        raise Blocked("the address names no host")
    if url.userinfo:
        raise Blocked("the address holds a user name or password; leave out what stands before the @")
    port = url.port or _PORTS[url.scheme]
    if is_allowed(url.host, port, allowed_hosts):
        return
    if https_only and url.scheme != "https":
        raise Blocked(f"{url.host} may be reached by https:// only")
    ports = [443] if https_only else sorted(_PORTS.values())
    if port not in ports:
        raise Blocked(f"port {port} may not be used; wanted {' or '.join(map(str, ports))}")
    if _is_address(url.host) and not is_public(url.host):
        raise Blocked(f"{url.host} is not a public address")


def guarded_client(
    allowed_hosts: frozenset[str],
    *,
    https_only: bool,
    timeout_s: float,
    resolve: Resolve | None = None,
    network: httpcore.AsyncNetworkBackend | None = None,
) -> httpx.AsyncClient:
    """A client that raises ``Blocked`` for whatever is not to be reached, instead of connecting to it.

    It knows no proxies, keeps no cookies and follows no redirects: ``httpx`` would read their bodies, however long.

    Args:
        allowed_hosts: ``host`` or ``host:port`` of those that may be private.
        https_only: refuse plain HTTP, but for those.
        timeout_s: for each step, not for the whole: a body that drips is for the caller to end.
        resolve: looks hosts up; the system does when None.
        network: makes the connections to what was checked.
    """
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    return httpx.AsyncClient(
        transport=_Transport(_Network(allowed_hosts, resolve, network), allowed_hosts, https_only),
        trust_env=False,
        timeout=timeout_s,
        cookies=no_cookies,
        headers={"User-Agent": "FastLightGen", "Accept-Encoding": "identity"},
    )


class _Network(httpcore.AsyncNetworkBackend):
    """Makes TCP connections to checked addresses. TLS still asks for the name, for it is made on top."""

    def __init__(
        self, allowed_hosts: frozenset[str], resolve: Resolve | None, network: httpcore.AsyncNetworkBackend | None
    ) -> None:
        self._allowed_hosts = allowed_hosts
        self._resolve = resolve or self._ask_system
        self._network = network or httpcore.AnyIOBackend()
        # Of its own: in the loop's few threads, three silent name servers would stop every other lookup.
        self._threads = ThreadPoolExecutor(_LOOKUPS, "lookup")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to one of the host's addresses, if all of them are public."""
        started = time.monotonic()
        addresses = await self._addresses(host, port, timeout)
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for tried, address in enumerate(addresses):
            left = None
            if timeout is not None:  # an address that swallows everything must leave time for those after it
                left = max(started + timeout - time.monotonic(), 0.0) / (len(addresses) - tried)
            try:
                return await self._network.connect_tcp(address, port, left, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,  # noqa: ARG002
        timeout: float | None = None,  # noqa: ARG002
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        """Never."""
        raise Blocked("unix sockets may not be reached")

    async def sleep(self, seconds: float) -> None:
        """For a pool that tries again; ours does not."""
        await asyncio.sleep(seconds)

    def close(self) -> None:
        """Take no more lookups."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _addresses(self, host: str, port: int, timeout: float | None) -> list[str]:
        try:
            async with asyncio.timeout(timeout):
                found = await self._resolve(host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"{host} could not be looked up in time") from None
        except (OSError, UnicodeError):  # a label of a name that is too long is the latter
            raise httpcore.ConnectError(f"{host} does not resolve") from None
        if not is_allowed(host, port, self._allowed_hosts) and not all(map(is_public, found)):
            raise Blocked(f"{host} resolves to an address that is not public")
        return found[:_TRIES]

    async def _ask_system(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _Transport(httpx.AsyncBaseTransport):
    """`httpx.AsyncHTTPTransport` over ``_Network``, which that has no place for. Checks each request's URL first."""

    def __init__(self, network: _Network, allowed_hosts: frozenset[str], https_only: bool) -> None:
        self._network = network
        self._allowed_hosts = allowed_hosts
        self._https_only = https_only
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False),
            max_connections=200,
            max_keepalive_connections=20,
            keepalive_expiry=5,
            network_backend=network,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """One request; ``Blocked`` before anything is sent."""
        url = request.url
        check_url(url, self._allowed_hosts, https_only=self._https_only)
        inner = httpcore.Request(
            method=request.method,
            url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=cast(AsyncIterable[bytes], request.stream),
            extensions=request.extensions,
        )
        with _errors_of_httpx():
            answer = await self._pool.handle_async_request(inner)
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Body(answer), extensions=dict(answer.extensions)
        )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._pool.aclose()
        self._network.close()


class _Body(httpx.AsyncByteStream):
    """A response's body as it comes in."""

    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _errors_of_httpx():
            async for part in self._answer.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._answer.aclose()


@contextmanager
def _errors_of_httpx() -> Iterator[None]:
    """The two libraries call the same errors by the same names."""
    try:
        yield
    except tuple(_HTTPX_ERRORS) as error:
        kind = next(_HTTPX_ERRORS[base] for base in type(error).__mro__ if base in _HTTPX_ERRORS)
        raise kind(str(error)) from error


_HTTPX_ERRORS: dict[type[BaseException], type[httpx.TransportError]] = {
    getattr(httpcore, name): getattr(httpx, name)
    for name in (
        *("TimeoutException", "ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout"),
        *("NetworkError", "ConnectError", "ReadError", "WriteError"),
        *("ProtocolError", "LocalProtocolError", "RemoteProtocolError", "UnsupportedProtocol"),
    )
}


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
