"""What may be reached: the whole table of ways inside, each refused before anything is connected."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpcore
import httpx
import pytest

from service import guard
from service.guard import Blocked, guarded_client, is_public

INSIDE = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "100::1",
    "2001:0:53aa:64c::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "3fff::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%lo",
    "fec0::1",
    "ff02::1",
]
OUTSIDE = ["8.8.8.8", "93.184.215.14", "2606:4700:4700::1111", "2001:4860:4860::8888", "::ffff:8.8.8.8"]


class Watched(httpcore.AnyIOBackend):
    """The network of this machine, and where it was connected to. What is public does not answer."""

    def __init__(self) -> None:
        self.connected: list[tuple[str, int]] = []

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        self.connected.append((host, port))
        if is_public(host):
            raise httpcore.ConnectError("the tests stay on this machine")
        return await super().connect_tcp(host, port, timeout, local_address, socket_options)


@contextmanager
def listening(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server on 127.0.0.1 that gives each connection this answer: its port, and what it was sent."""
    received: list[bytes] = []

    def serve(server: socket.socket) -> None:
        with suppress(OSError):  # the server was closed
            while True:
                connection, _ = server.accept()
                with connection:
                    received.append(connection.recv(65536))
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        try:
            yield server.getsockname()[1], received
        finally:
            server.shutdown(socket.SHUT_RDWR)  # wakes accept
            thread.join()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: a=b\r\nConnection: close\r\n\r\nhi"


def get(url: str, *, allowed=frozenset(), https_only=False, resolve=None, network=None) -> httpx.Response:
    async def ask() -> httpx.Response:
        client = guarded_client(allowed, https_only=https_only, timeout_s=5, resolve=resolve, network=network)
        async with client:
            return await client.get(url)

    return asyncio.run(ask())


def refused(url: str, **arguments) -> str:
    """Why it is refused; nothing was connected."""
    network = Watched()
    with pytest.raises(Blocked) as caught:
        get(url, network=network, **arguments)
    assert network.connected == []
    return str(caught.value)


def answers(*each: list[str]):
    """A name server that gives one list of addresses after the other."""
    left = iter(each)

    async def resolve(_host: str, _port: int) -> list[str]:
        return next(left)

    return resolve


@pytest.mark.parametrize("address", INSIDE)
def test_is_inside(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_is_outside(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST", "127.0.0.1", "127.1", "2130706433", "0x7f.1", "0x7f000001", "017700000001"),
        *("0", "0.0.0.0", "169.254.169.254", "100.64.0.1", "192.0.0.8", "224.0.0.1"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]"),
        *("[2002:7f00:1::]", "[ff02::1]", "[fe80::1]", "[fd00:ec2::254]"),
    ],
)
def test_a_host_that_is_inside(host):
    assert "public" in refused(f"http://{host}/")


def test_a_host_that_is_inside_by_https():
    assert "public" in refused("https://localhost/", https_only=True)


def test_a_name_that_resolves_to_the_inside():
    network = Watched()

    async def all_of_them() -> None:
        resolve = answers(*([address] for address in INSIDE))
        client = guarded_client(frozenset(), https_only=False, timeout_s=5, resolve=resolve, network=network)
        async with client:
            for _ in INSIDE:
                with pytest.raises(Blocked, match=r"^name\.test resolves to an address that is not public$"):
                    await client.get("http://name.test/")

    asyncio.run(all_of_them())
    assert network.connected == []


@pytest.mark.parametrize("addresses", [["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["8.8.8.8", "fe80::1"]])
def test_a_name_with_a_public_and_a_private_address(addresses):
    refused("http://name.test/", resolve=answers(addresses))


def test_a_name_that_changes_between_two_lookups():
    """What was checked is what is connected to, and the next connection is checked anew."""
    resolve, network = answers(["8.8.8.8"], ["127.0.0.1"]), Watched()

    async def twice() -> None:
        client = guarded_client(frozenset(), https_only=False, timeout_s=5, resolve=resolve, network=network)
        async with client:
            with pytest.raises(httpx.ConnectError):
                await client.get("http://name.test/")
            with pytest.raises(Blocked):
                await client.get("http://name.test/")

    asyncio.run(twice())
    assert network.connected == [("8.8.8.8", 80)]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "wanted an address that begins https"),
        ("ftp://name.test/", "wanted an address that begins https"),
        ("gopher://name.test/", "wanted an address that begins https"),
        ("unix:///run/docker.sock", "wanted an address that begins https"),
        ("name.test/picture.png", "wanted an address that begins https"),
        ("http://name.test:22/", "port 22"),
        ("http://name.test:6379/", "port 6379"),
        ("https://name.test:8443/", "port 8443"),
        ("http://good@127.0.0.1/", "user name"),
        ("http://good:pass@127.0.0.1/", "user name"),
        ("http://127.0.0.1@name.test/", "user name"),
        ("http://127.0.0.1:80\\@name.test/", "user name"),
    ],
)
def test_a_url_that_is_not_to_be_reached(url, reason):
    assert reason in refused(url, resolve=answers(["8.8.8.8"]))


def test_a_url_without_a_host():
    with pytest.raises(Blocked, match="names no host"):
        guard.check_url(httpx.URL("https:///picture.png"), frozenset(), https_only=False)


def test_plain_http_where_only_https_may_be():
    assert "https://" in refused("http://name.test/", https_only=True, resolve=answers(["8.8.8.8"]))
    assert "port 80" in refused("https://name.test:80/", https_only=True, resolve=answers(["8.8.8.8"]))


def test_a_unix_socket():
    network = guard._Network(frozenset(), None, Watched())
    with pytest.raises(Blocked):
        asyncio.run(network.connect_unix_socket("/run/docker.sock"))


def test_a_private_host_on_the_list_is_reached_by_its_name():
    network = Watched()
    with listening(OK) as (port, received):
        allowed = frozenset({f"receiver.test:{port}"})
        answer = get(
            f"http://Receiver.test:{port}/a?b=c",
            allowed=allowed,
            https_only=True,
            resolve=answers(["127.0.0.1"]),
            network=network,
        )
    assert (answer.status_code, answer.text) == (200, "hi")
    assert network.connected == [("127.0.0.1", port)]
    assert received[0].startswith(b"GET /a?b=c HTTP/1.1\r\n")
    assert f"Host: receiver.test:{port}\r\n".encode() in received[0]


def test_the_list_means_this_host_and_this_port():
    allowed = frozenset({"receiver.test:8000", "other.test", "[::1]:8000"})
    assert "port 8001" in refused("http://receiver.test:8001/", allowed=allowed)
    assert "port 8000" in refused("http://other.test:8000/", allowed=allowed)
    assert "not public" in refused("http://sub.other.test/", allowed=allowed, resolve=answers(["127.0.0.1"]))
    assert "not public" in refused("http://other.test./", allowed=allowed, resolve=answers(["127.0.0.1"]))
    assert "port 8000" in refused("http://127.0.0.1:8000/", allowed=allowed)
    assert guard.is_allowed("::1", 8000, allowed)
    assert guard.is_allowed("OTHER.test", 443, allowed)


def test_tls_asks_for_the_name_and_not_for_the_address():
    with listening(b"no TLS") as (port, received), pytest.raises(httpx.ConnectError):
        get(
            f"https://receiver.test:{port}/",
            allowed=frozenset({f"receiver.test:{port}"}),
            resolve=answers(["127.0.0.1"]),
        )
    assert b"receiver.test" in received[0]


def test_the_next_address_is_tried():
    network = Watched()
    with listening(OK) as (port, _):
        allowed = frozenset({f"receiver.test:{port}"})
        resolve = answers(["127.0.0.9", "127.0.0.1"])
        assert get(f"http://receiver.test:{port}/", allowed=allowed, resolve=resolve, network=network).is_success
    assert network.connected == [("127.0.0.9", port), ("127.0.0.1", port)]


@pytest.mark.parametrize("url", ["http://no-such-name.invalid/", f"http://{'a' * 64}.test/"])
def test_a_name_that_does_not_resolve(url):
    with pytest.raises(httpx.ConnectError, match="does not resolve"):
        get(url)


def test_a_name_server_that_is_silent():
    async def never(_host: str, _port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    async def ask() -> None:
        async with guarded_client(frozenset(), https_only=False, timeout_s=0.05, resolve=never) as client:
            await client.get("http://name.test/")

    with pytest.raises(httpx.ConnectTimeout):
        asyncio.run(ask())


def test_proxies_of_the_environment_are_not_used_and_cookies_not_kept(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def twice(port: int) -> None:
        allowed = frozenset({f"127.0.0.1:{port}"})
        async with guarded_client(allowed, https_only=False, timeout_s=5) as client:
            for _ in range(2):
                assert (await client.get(f"http://127.0.0.1:{port}/")).is_success

    with listening(OK) as (port, received):
        asyncio.run(twice(port))
    assert len(received) == 2
    assert b"cookie" not in received[1].lower()
