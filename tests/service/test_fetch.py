"""Fetching an image by URL from a real server on this machine, which the allow list names; and from nowhere else."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from service.errors import ApiError
from service.fetch import MAX_URL, fetch_image
from service.guard import guarded_client

PICTURE = bytes(range(256)) * 40
SECRET = "what the server says is nobody's business"


class Site:
    """What each path answers, as raw HTTP."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.closed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1].decode()
            self.asked.append(path)
            await self._answer(path, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.closed.set()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        def say(status: str, body: bytes = b"", *headers: str) -> None:
            lines = [f"HTTP/1.1 {status}", "Connection: close", *headers, "", ""]
            writer.write("\r\n".join(lines).encode() + body)

        to = path.partition("?to=")[2]
        match path.partition("?")[0]:
            case "/picture.png":
                say("200 OK", PICTURE, f"Content-Length: {len(PICTURE)}")
            case "/chunked":
                say("200 OK", b"5\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked")
            case "/redirect":
                say("302 Found", SECRET.encode(), f"Location: {to}", f"Content-Length: {len(SECRET)}")
            case "/hops":
                left = int(to)
                say("302 Found", b"", f"Location: /hops?to={left - 1}" if left else "Location: /picture.png")
            case "/round":
                say("301 Moved Permanently", b"", "Location: /round")
            case "/announced":
                say("200 OK", b"x", "Content-Length: 99999999")
            case "/endless":
                say("200 OK")
                while True:
                    writer.write(b"x" * 4096)
                    await writer.drain()
            case "/liar":  # announces less than it sends: what comes after is not read
                say("200 OK", b"x" * 99999, "Content-Length: 3")
            case "/slow":
                say("200 OK")
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.02)
            case "/silent":
                await asyncio.sleep(60)
            case "/cut":
                say("200 OK", b"x", "Content-Length: 10")
            case "/gzip":
                say("200 OK", b"\x1f\x8b", "Content-Encoding: gzip", "Content-Length: 2")
            case "/not-http":
                writer.write(SECRET.encode() + b"\r\n\r\n")
            case _:
                say("403 Forbidden", SECRET.encode(), f"Content-Length: {len(SECRET)}")
        await writer.drain()


def with_site(test: Callable[[Site, Callable[..., Awaitable[bytes]]], Awaitable[None]]) -> None:
    """Run a test with the site on a free port of 127.0.0.1, and with what fetches a path of it, or a URL."""

    async def run() -> None:
        site = Site()
        server = await asyncio.start_server(site.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = guarded_client(frozenset({f"127.0.0.1:{port}"}), https_only=False, timeout_s=5)

        async def fetch(where: str, max_bytes: int = 100_000, deadline_s: float = 5) -> bytes:
            url = f"http://127.0.0.1:{port}{where}" if where.startswith("/") else where
            return await fetch_image(client, url, max_bytes, deadline_s)

        async with client:
            await test(site, fetch)
        server.close()

    asyncio.run(run())


def fails(where: str, **limits) -> ApiError:
    """The error that comes of fetching this; it is the client's, and repeats nothing of what was received."""

    async def test(_site: Site, fetch) -> None:
        with pytest.raises(ApiError) as caught:
            await fetch(where, **limits)
        errors.append(caught.value)

    errors: list[ApiError] = []
    with_site(test)
    assert (errors[0].status, errors[0].param) == (422, "image")
    assert SECRET not in errors[0].message
    return errors[0]


def test_an_image_is_fetched():
    async def test(_site: Site, fetch) -> None:
        assert await fetch("/picture.png") == PICTURE
        assert await fetch("/picture.png", max_bytes=len(PICTURE)) == PICTURE
        assert await fetch("/chunked") == b"hello"
        assert await fetch("/redirect?to=/picture.png") == PICTURE

    with_site(test)


def test_three_redirects_are_followed_and_no_more():
    async def test(site: Site, fetch) -> None:
        assert await fetch("/hops?to=2") == PICTURE
        assert site.asked == ["/hops?to=2", "/hops?to=1", "/hops?to=0", "/picture.png"]

    with_site(test)
    assert "3 times" in fails("/hops?to=3").message
    assert fails("/round").code == "image_url_failed"


@pytest.mark.parametrize(
    "inside",
    [
        "http://127.0.0.1/",
        "http://localhost/latest/meta-data/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://2130706433/",
        "//0x7f.1/",
        "http://[64:ff9b::7f00:1]/",
        "http://me@127.0.0.1/",
        "http://8.8.8.8:22/",
        "ftp://8.8.8.8/",
        "file:///etc/passwd",
    ],
)
def test_a_redirect_to_the_inside(inside):
    async def test(site: Site, fetch) -> None:
        with pytest.raises(ApiError) as caught:
            await fetch(f"/redirect?to={inside}")
        assert caught.value.code == "image_url_blocked"
        assert len(site.asked) == 1

    with_site(test)


def test_a_url_to_the_inside():
    assert fails("http://localhost/").code == "image_url_blocked"
    assert fails("http://127.0.0.1:6379/").code == "image_url_blocked"
    assert fails("gopher://8.8.8.8/").code == "image_url_blocked"


@pytest.mark.parametrize("path", ["/endless", "/announced", "/picture.png"])
def test_more_bytes_than_may_be(path):
    error = fails(path, max_bytes=10_000)
    assert error.code == "image_url_too_large"
    assert "10000 bytes" in error.message


def test_a_server_that_announces_less_than_it_sends():
    async def test(_site: Site, fetch) -> None:
        assert await fetch("/liar", max_bytes=10) == b"xxx"

    with_site(test)


@pytest.mark.parametrize("path", ["/slow", "/silent"])
def test_the_deadline_is_for_the_whole(path):
    """Each byte of the slow one comes well within the client's own timeouts."""

    async def test(site: Site, fetch) -> None:
        with pytest.raises(ApiError, match="in time"):
            await fetch(path, deadline_s=0.3)
        if path == "/slow":
            await site.closed.wait()  # nobody reads on

    with_site(test)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("/missing", "status 403"),
        ("/cut", "broke off"),
        ("/gzip", "compressed"),
        ("/not-http", "does not speak HTTP"),
        ("/redirect?to=http://x:port/", "broke off"),
        ("http://no-such-name.invalid/", "cannot be connected to"),
        ("http://name.test:port/", "no URL"),
        ("http://name.test/" + "x" * MAX_URL, "characters"),
    ],
)
def test_what_is_wrong_is_said(where, reason):
    error = fails(where)
    assert error.code == "image_url_failed"
    assert reason in error.message
