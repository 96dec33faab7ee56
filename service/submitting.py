"""What every way of asking for a video has in common, whatever its wire format: headers, its source, removal."""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Header, Request
from starlette.concurrency import run_in_threadpool

from service import clips, events, fetch, images
from service.admission import Terms
from service.auth import Principal
from service.deps import Context
from service.errors import ApiError
from service.jobs import Ask
from service.schema import GenerateFields
from worker import tracing
from worker.contract import Record, Source

_STOP_S = 15
"""How long a DELETE waits for a running job's next step."""
_FETCH_S = 15
_MAX_URL = 2000
_MOST_SECONDS = 7 * 24 * 3600
_NUMBER = re.compile(r"\d{1,9}(\.\d{1,6})?")


@dataclass(frozen=True)
class ImageUrl:
    """An image that has yet to be fetched."""

    url: str


@dataclass(frozen=True)
class Given:
    """What a video is to be made from."""

    source: Source
    data: bytes | ImageUrl = b""


def given(source: Literal["image", "video"], data: str | bytes, context: Context) -> Given:
    """From a file's bytes or from text: a data URL, or where to fetch an image. Raises ``ApiError`` 422."""
    if isinstance(data, bytes):
        return Given(source, data)
    if source == "video":
        return Given(source, clips.from_data_url(data))
    return Given(source, _image_of(data, context))


def _image_of(text: str, context: Context) -> bytes | ImageUrl:
    if not re.match(r"https?://", text, re.IGNORECASE):
        return images.from_data_url(text)
    if not context.settings.url_images:
        message = "image: got a URL, and this service fetches none (URL_IMAGES is off); send the file or a data URL"
        raise ApiError(422, "image_url_off", message, param="image")
    if not text.isascii() or len(text) > _MAX_URL:
        message = f"image: wanted a URL of at most {_MAX_URL} ASCII characters; encode the others (%C3%A9)"
        raise ApiError(422, "image_url_failed", message, param="image")
    return ImageUrl(text)


@dataclass(frozen=True)
class SubmitHeaders:
    """What the headers of a request for a video say."""

    terms: Terms
    request_id: str | None

    def ask(self, fields: GenerateFields, start: Given, remixed_from: str | None = None) -> Ask:
        """The request as the store takes it."""
        data = start.data.url.encode() if isinstance(start.data, ImageUrl) else start.data
        return Ask(
            fields=fields,
            source=start.source,
            source_sha256=hashlib.sha256(data).hexdigest(),
            terms=self.terms,
            request_id=self.request_id,
            trace=tracing.current_traceparent(),
            remixed_from=remixed_from,
        )


async def _submit_headers(
    request: Request,
    idempotency_key: Annotated[
        str | None, Header(description="Requests with the same key and body are one; kept for a day")
    ] = None,
    x_deadline_start: Annotated[str | None, Header(description="Seconds within which it has to begin")] = None,
    x_deadline: Annotated[str | None, Header(description="Seconds within which it has to be done")] = None,
    x_stainless_retry_count: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> SubmitHeaders:
    if idempotency_key is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", idempotency_key):
        message = "Idempotency-Key: wanted 1 to 255 printable ASCII characters without spaces"
        raise ApiError(422, "invalid_header", message, param="Idempotency-Key")
    count = x_stainless_retry_count or ""
    terms = Terms(
        idempotency_key=idempotency_key,
        is_retry=count.isdecimal() and int(count[:9]) > 0,
        start_within_s=_seconds("X-Deadline-Start", x_deadline_start),
        finish_within_s=_seconds("X-Deadline", x_deadline),
    )
    return SubmitHeaders(
        terms,
        request_id=request.scope.get("state", {}).get("request_id"),
    )


def _seconds(name: str, text: str | None) -> float:
    if text is None:
        return math.inf
    value = float(text) if _NUMBER.fullmatch(text) else 0.0
    if not 0 < value <= _MOST_SECONDS:
        message = f"{name}: got {text[:32]!r}; wanted seconds from now, above 0 and up to {_MOST_SECONDS}"
        raise ApiError(422, "invalid_header", message, param=name)
    return value


SubmitHeadersDep = Annotated[SubmitHeaders, Depends(_submit_headers)]


async def submit(
    context: Context,
    principal: Principal,
    headers: SubmitHeaders,
    fields: GenerateFields,
    start: Given,
    remixed_from: str | None = None,
) -> tuple[Record, bool]:
    """The job that a request becomes, and whether it is new. Raises ``ApiError``."""
    store, ask, data = context.store, headers.ask(fields, start, remixed_from), start.data
    if not isinstance(data, ImageUrl):
        return await run_in_threadpool(lambda: store.submit(principal, ask, data))
    reserved = await run_in_threadpool(store.reserve, principal, ask)
    if isinstance(reserved, Record):
        return reserved, False
    try:
        fetched = await fetch.fetch_image(context.outside, data.url, context.settings.max_body_bytes, _FETCH_S)
    except BaseException:
        await run_in_threadpool(store.release, reserved)
        raise
    return await run_in_threadpool(store.complete, reserved, fetched), True


async def remove(context: Context, job_id: str, owner: str) -> None:
    """Forget a job and its files; one that runs is cancelled first. Raises ``ApiError`` 404, 409."""
    seen = await context.reader.get(job_id, owner)
    if not seen.record.status.is_terminal:
        with suppress(ApiError):  # it has ended by itself
            await run_in_threadpool(context.store.cancel, job_id, owner)
        await events.wait(context.async_redis, context.hub, context.reader, job_id, _STOP_S)
    await run_in_threadpool(context.store.delete, job_id, owner)
