"""ASGI layers around the whole app: a request id, and a cap on what a body may weigh."""

from __future__ import annotations

import logging
import re
import secrets
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from pydantic import HttpUrl
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors
from worker import logs

log = logging.getLogger(__name__)


class RequestId:
    """Gives every answer an `X-Request-Id`: the client's own when it is a plain token, else a new one.

    The outermost layer of ours, so what nobody expected is answered and logged here, with that id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        with logs.bind(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                log.exception("%s: %s %s", request_id, scope["method"], scope["path"])
                if started:
                    raise
                message = f"something went wrong on our side; it has been logged as {request_id}"
                await JSONResponse(errors.body(500, "internal_error", message), 500)(scope, receive, send_with_id)


class SameSite:
    """Where no key is needed, keeps other web pages out: a browser on this machine must not be their way in.

    A name that somebody else's DNS points at this machine is refused, and so is what another site's page sends.
    """

    def __init__(self, app: ASGIApp, public_url: HttpUrl | None = None) -> None:
        self._app = app
        self._names = {"localhost", "127.0.0.1", "[::1]"}
        if public_url and public_url.host:
            self._names.add(public_url.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (why := self._objection(Headers(scope=scope), scope["method"])):
            await JSONResponse(errors.body(403, "other_site", why), 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _objection(self, headers: Headers, method: str) -> str | None:
        host = headers.get("host", "")
        if _name(host) not in self._names and not _is_loopback(_name(host)):
            return (
                f"Host: got {host[:64]!r}; without API keys the service answers to this machine's own names only. "
                "Set PUBLIC_URL, or AUTH=on and make a key"
            )
        origin = headers.get("origin")
        if method in ("GET", "HEAD", "OPTIONS") or origin is None:
            return None
        if urlsplit(origin).netloc != host and _name(urlsplit(origin).netloc) not in self._names:
            return f"Origin: got {origin[:64]!r}; pages of other sites may not send this without an API key"
        return None


@lru_cache(1024)
def _name(netloc: str) -> str:
    return re.sub(r":\d*$", "", netloc).lower()


@lru_cache(1024)
def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class _TooLarge(Exception):
    pass


class BodyLimit:
    """Answers 413 as soon as a body is longer than allowed, whether or not it said so beforehand."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the request body is larger than {self._max_bytes} bytes; send a smaller image"
        answer = JSONResponse(errors.body(413, "body_too_large", message), 413, {"Connection": "close"})
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await answer(scope, receive, send)
            return
        received = 0
        started = False

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _TooLarge
            return message

        async def noting_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counting_receive, noting_send)
        except _TooLarge:
            if started:
                raise
            await answer(scope, receive, send)
