"""ASGI layers around the whole app: a request id, errors in one envelope, a cap on what a body may weigh."""

from __future__ import annotations

import logging
import re
import secrets
from functools import lru_cache
from http import HTTPStatus
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from pydantic import HttpUrl
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors
from worker import logs

log = logging.getLogger(__name__)


class RequestId:
    """Gives every answer an `X-Request-Id`: the client's own when it is a plain token, else a new one.

    The outermost layer of ours, so what nobody expected is answered and logged here, with that id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = _Envelope(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else f"req_{secrets.token_hex(8)}"
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
            except ClientDisconnect:
                if not started:  # nobody hears it: this is for the log and the metrics
                    said = errors.body(400, "client_disconnected", "the client went away before its request was whole")
                    await JSONResponse(said, 400)(scope, receive, send_with_id)
            except Exception:
                log.exception("%s: %s %s", request_id, scope["method"], scope["path"])
                if started:
                    raise
                message = f"something went wrong on our side; it has been logged as {request_id}"
                await JSONResponse(errors.body(500, "internal_error", message), 500)(scope, receive, send_with_id)


class _Envelope:
    """Puts into the envelope what a library answers in words of its own, such as a file's 416."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "HEAD":
            await self._app(scope, receive, send)
            return
        held: Message | None = None
        said = b""

        async def enveloping_send(message: Message) -> None:
            nonlocal held, said
            if message["type"] == "http.response.start" and _is_foreign(message):
                held = message
            elif held is None:
                await send(message)
            else:
                said += message.get("body", b"")
                if not message.get("more_body"):
                    await self._send(send, held, said.decode("utf-8", "replace"))

        await self._app(scope, receive, enveloping_send)

    @staticmethod
    async def _send(send: Send, start: Message, said: str) -> None:
        status = start["status"]
        envelope = errors.body(status, errors.code_of(status), said or HTTPStatus(status).phrase)
        data = bytes(JSONResponse(envelope).body)
        headers = MutableHeaders(scope=start)
        headers["Content-Type"] = "application/json"
        headers["Content-Length"] = str(len(data))
        await send(start)
        await send({"type": "http.response.body", "body": data})


def _is_foreign(start: Message) -> bool:
    is_json = Headers(raw=start["headers"]).get("content-type", "").startswith("application/json")
    return start["status"] >= 400 and not is_json


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
        site = _netloc(origin)
        if site != host and _name(site) not in self._names:
            return f"Origin: got {origin[:64]!r}; pages of other sites may not send this without an API key"
        return None


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # brackets that hold no address
        return ""


@lru_cache(1024)
def _name(netloc: str) -> str:
    return re.sub(r":\d*$", "", netloc).lower()


@lru_cache(1024)
def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


_IMAGES_COME_TO = ("/generate", "/v1/videos")
_FEW_WORDS = 64 * 1024
"""Bytes that a body may have elsewhere: FastAPI reads it before it finds out who asks."""


class _TooLarge(BaseException):
    """No `Exception`, as FastAPI answers 400 to each that comes up while it reads a body."""


class BodyLimit:
    """Answers 413 as soon as a body is longer than allowed, whether or not it said so beforehand."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        takes_image = scope["path"].startswith(_IMAGES_COME_TO)
        max_bytes = self._max_bytes if takes_image else min(_FEW_WORDS, self._max_bytes)
        what = "a smaller image" if takes_image else "less"
        message = f"the request body is larger than {max_bytes} bytes; send {what}"
        answer = JSONResponse(errors.body(413, "body_too_large", message), 413, {"Connection": "close"})
        declared = Headers(scope=scope).get("content-length", "0")
        if re.fullmatch(r"[0-9]+", declared) and int(declared[:20]) > max_bytes:
            await answer(scope, receive, send)
            return
        received = 0
        started = False

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
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
