"""`/generate`: submit, read, list, follow, cancel, delete."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from pydantic import ValidationError
from redis.exceptions import RedisError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from service import events, images
from service.deps import AfterDep, Context, ContextDep, JobIdDep, LimitDep, OriginDep
from service.errors import ApiError
from service.schema import ErrorEnvelope, GenerateFields, Generation, GenerationPage, generation
from worker.contract import Record

router = APIRouter(tags=["generate"])

_ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorEnvelope} for code in (404, 413, 415, 422, 503)}
_MAX_WAIT_S = 60
_STOP_S = 15
"""How long a DELETE waits for a running job's next step."""

_FIELDS = {
    "prompt": {"type": "string", "example": "a red circle moves right quickly, static camera"},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    "model": {"type": "string"},
    "steps": {"type": "integer"},
}


def _body_of(image: dict[str, str]) -> dict[str, Any]:
    schema = {"type": "object", "required": ["image", "prompt"], "properties": {"image": image, **_FIELDS}}
    return {"schema": schema}


_REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": _body_of({"type": "string", "format": "binary"}),
        "application/json": _body_of({"type": "string", "description": "data:image/png;base64,..."}),
    },
}


@router.post(
    "/generate",
    status_code=202,
    response_model=Generation,
    responses={200: {"model": Generation, "description": "Finished within `Prefer: wait`"}, **_ERRORS},
    openapi_extra={"requestBody": _REQUEST_BODY},
)
async def create(
    request: Request,
    response: Response,
    context: ContextDep,
    origin: OriginDep,
    prefer: Annotated[str | None, Header(description="wait=N: hold the answer up to N <= 60 seconds")] = None,
) -> Generation:
    """Animate an image: multipart form or JSON. Answers 202 with the job, or 200 with the video's address."""
    fields, image = await _read(request)
    record = await run_in_threadpool(context.store.submit, fields, image)
    response.headers["Location"] = f"{origin}/generate/{record.id}"
    try:
        if (seconds := _wait_s(prefer)) is not None:
            record = await events.wait(context.async_redis, record.id, seconds) or record
            response.headers["Preference-Applied"] = f"wait={seconds}"
            response.status_code = 200 if record.status.is_terminal else 202
        return await _view(context, record, origin)
    except RedisError:
        # The job is accepted: an error now would make the client send it again.
        response.status_code = 202
        return generation(record, origin)


@router.get("/generate/{job_id}", responses=_ERRORS)
def read(job_id: JobIdDep, context: ContextDep, origin: OriginDep) -> Generation:
    """One generation. A failed one is an answer too: 200 with `status: failed`."""
    record = context.store.get(job_id)
    [outlook] = context.store.outlooks([record])
    return generation(record, origin, *outlook)


@router.get("/generate", responses=_ERRORS)
def list_generations(
    context: ContextDep, origin: OriginDep, limit: LimitDep = 20, after: AfterDep = None
) -> GenerationPage:
    """Newest first."""
    records, has_more = context.store.page(limit, after)
    outlooks = context.store.outlooks(records)
    data = [generation(record, origin, *outlook) for record, outlook in zip(records, outlooks, strict=True)]
    return GenerationPage(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/generate/{job_id}/events", response_class=EventSourceResponse, responses=_ERRORS)
async def follow(
    job_id: JobIdDep, context: ContextDep, origin: OriginDep, last_event_id: Annotated[str | None, Header()] = None
) -> EventSourceResponse:
    """Server-sent events named `generation`: the whole generation at each change, until it is over."""
    await run_in_threadpool(context.store.get, job_id)
    if last_event_id is not None and not re.fullmatch(r"\d{1,20}-\d{1,20}", last_event_id):
        last_event_id = None  # not one of ours: begin with the present state

    async def stream() -> AsyncIterator[ServerSentEvent]:
        said = ""
        async for event_id, record in events.follow(context.async_redis, job_id, last_event_id):
            view = (await _view(context, record, origin)).model_dump_json()
            if view != said:  # the follower repeats itself while nothing changes
                said = view
                yield ServerSentEvent(data=view, event="generation", id=event_id)

    return EventSourceResponse(stream(), ping=15, headers={"X-Accel-Buffering": "no"})


@router.post("/generate/{job_id}/cancel", responses={409: {"model": ErrorEnvelope}, **_ERRORS})
def cancel(job_id: JobIdDep, context: ContextDep, origin: OriginDep, response: Response) -> Generation:
    """Cancel: at once while queued; while running at the next step (202, `cancelling`)."""
    record = context.store.cancel(job_id)
    response.status_code = 200 if record.status.is_terminal else 202
    return generation(record, origin)


@router.delete("/generate/{job_id}", status_code=204, responses={409: {"model": ErrorEnvelope}, **_ERRORS})
async def delete(job_id: JobIdDep, context: ContextDep) -> None:
    """Remove a generation and its files; one that runs is cancelled first."""
    record = await run_in_threadpool(context.store.get, job_id)
    if not record.status.is_terminal:
        with suppress(ApiError):  # it has ended by itself
            await run_in_threadpool(context.store.cancel, job_id)
        await events.wait(context.async_redis, job_id, _STOP_S)
    await run_in_threadpool(context.store.delete, job_id)


async def _view(context: Context, record: Record, origin: str) -> Generation:
    [outlook] = await run_in_threadpool(context.store.outlooks, [record])
    return generation(record, origin, *outlook)


def _wait_s(prefer: str | None) -> int | None:
    """Seconds asked for by `Prefer: wait=N` (RFC 7240), at most 60; None when the header says nothing of it."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*(\d{1,6})\b", prefer or "")
    return min(int(found[1]), _MAX_WAIT_S) if found else None


async def _read(request: Request) -> tuple[GenerateFields, bytes]:
    """Fields and image of either kind of body. Raises ``ApiError`` 415, 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request)
    if kind == "application/json":
        return _read_json(await request.body())
    message = f"Content-Type: got {kind or 'none'!r}; send multipart/form-data or application/json"
    raise ApiError(415, "content_type", message)


async def _read_form(request: Request) -> tuple[GenerateFields, bytes]:
    # The image may come as a data URL in a text part, so a part may be as long as a body.
    limit = request.app.state.context.settings.max_body_bytes
    async with request.form(max_files=2, max_fields=20, max_part_size=limit) as form:
        names = [name for name, _ in form.multi_items()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ApiError(422, "invalid_field", f"{twice[0]}: sent more than once", param=twice[0])
        image = form.get("image")
        if isinstance(image, UploadFile):
            data = await image.read()
        elif isinstance(image, str):
            data = images.from_data_url(image)
        else:
            raise _no_image()
        texts = {name: value for name, value in form.items() if name != "image"}
    if files := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise ApiError(422, "invalid_field", f"{files[0]}: got a file; wanted text", param=files[0])
    # An empty field of an HTML form is one that was not filled in.
    return _fields({name: value for name, value in texts.items() if value != "" or name == "prompt"}), data


def _read_json(body: bytes) -> tuple[GenerateFields, bytes]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(422, "bad_json", f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        message = f"the body is a JSON {type(values).__name__}; wanted an object with image and prompt"
        raise ApiError(422, "bad_json", message)
    image = values.pop("image", None)
    if image is None:
        raise _no_image()
    if not isinstance(image, str):
        raise ApiError(422, "invalid_field", f"image: got {type(image).__name__}; wanted a data URL", param="image")
    return _fields(values), images.from_data_url(image)


def _no_image() -> ApiError:
    return ApiError(422, "image_missing", "image: missing; send a PNG, JPEG or WEBP file", param="image")


def _fields(values: dict[str, Any]) -> GenerateFields:
    try:
        return GenerateFields.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        known = ", ".join(["image", *GenerateFields.model_fields])
        hint = f"there is no such field; there are {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise ApiError(422, "invalid_field", f"{name}: {hint}", param=name) from None
