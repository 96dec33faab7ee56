"""`/generate`: submit, read, list, follow, cancel, delete."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from pydantic import ValidationError
from redis.exceptions import RedisError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from service import events, webhooks
from service.deps import AfterDep, Context, ContextDep, GeneratorDep, JobIdDep, LimitDep, ReaderDep, generation_id
from service.errors import ApiError
from service.reading import Seen
from service.schema import ErrorEnvelope, GenerateFields, Generation, GenerationPage
from service.submitting import Image, SubmitHeadersDep, image_of, remove, submit
from service.viewing import ViewerDep, answer, viewer_of

router = APIRouter(tags=["generate"])

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorEnvelope} for code in (401, 403, 404, 413, 415, 422, 429, 503)
}
_MAX_WAIT_S = 60
_PING_S = 15
_SEND_S = 30
_RECONNECT_MS = 2000

_FIELDS: dict[str, Any] = {
    "prompt": {"type": "string", "example": "a red circle moves right quickly, static camera"},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    "model": {"type": "string"},
    "steps": {"type": "integer"},
    "webhook_url": {"type": "string", "format": "uri"},
    "metadata": {"type": "object", "additionalProperties": {"type": "string"}, "example": {"order": "17"}},
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
    principal: GeneratorDep,
    context: ContextDep,
    viewer: ViewerDep,
    headers: SubmitHeadersDep,
    prefer: Annotated[str | None, Header(description="wait=N: hold the answer up to N <= 60 seconds")] = None,
) -> Response:
    """Animate an image: multipart form or JSON. Answers 202 with the job, or 200 with the video's address."""
    fields, image = await _read(request, context)
    record, is_new = await submit(context, principal, headers, fields, image)
    said = {"Location": f"{viewer.origin}/generate/{record.id}"}
    if not is_new:
        said["Idempotent-Replayed"] = "true"
    status = 202
    try:
        if (seconds := _wait_s(prefer)) is not None:
            record = await events.wait(context.async_redis, context.hub, context.reader, record.id, seconds) or record
            said["Preference-Applied"] = f"wait={seconds}"
            status = 200 if record.status.is_terminal else 202
        [seen] = await context.reader.outlook([record])
        view = await viewer.view(seen)
    except RedisError:
        # The job is accepted: an error now would make the client send it again.
        status, view = 202, viewer.plain(Seen(record))
    return answer(view, status, said)


@router.get("/generate/{job_id}", response_model=Generation, responses=_ERRORS)
async def read(job_id: str, request: Request, principal: ReaderDep) -> Response:
    """One generation. A failed or an expired one is an answer too: 200 with `status: failed`."""
    # By hand what elsewhere are dependencies: this is what clients ask most, and each is a tenth of its cost.
    viewer = await viewer_of(request)
    return answer(await viewer.view(await viewer.context.reader.get(await generation_id(job_id), principal.id)))


@router.get("/generate", response_model=GenerationPage, responses=_ERRORS)
async def list_generations(
    principal: ReaderDep, context: ContextDep, viewer: ViewerDep, limit: LimitDep = 20, after: AfterDep = None
) -> Response:
    """The key's own, newest first."""
    records, has_more = await run_in_threadpool(context.store.page, limit, after, principal.id)
    data = [viewer.plain(seen) for seen in await context.reader.outlook(records)]
    return answer(GenerationPage(data=data, has_more=has_more, last_id=data[-1].id if data else None))


@router.get("/generate/{job_id}/events", response_class=EventSourceResponse, responses=_ERRORS)
async def follow(
    job_id: JobIdDep,
    principal: ReaderDep,
    context: ContextDep,
    viewer: ViewerDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventSourceResponse:
    """Server-sent events named `generation`: the whole generation at each change, until it is over."""
    await context.reader.get(job_id, principal.id)
    if last_event_id is not None and not re.fullmatch(r"\d{1,20}-\d{1,20}", last_event_id):
        last_event_id = None  # not one of ours: begin with the present state

    async def stream() -> AsyncIterator[ServerSentEvent]:
        said = ""
        yield ServerSentEvent(retry=_RECONNECT_MS, comment="FastLightGen")
        async for event_id, seen in events.follow(
            context.async_redis, context.hub, context.reader, job_id, last_event_id
        ):
            view = viewer.plain(seen).model_dump_json()
            if view != said:  # the follower repeats itself while nothing changes
                said = view
                yield ServerSentEvent(data=view, event="generation", id=event_id)

    # A reader that takes nothing for so long is let go; it comes again with the last id that it has had.
    headers = {"X-Accel-Buffering": "no"}
    return EventSourceResponse(stream(), ping=_PING_S, send_timeout=_SEND_S, headers=headers)


@router.post(
    "/generate/{job_id}/cancel", response_model=Generation, responses={409: {"model": ErrorEnvelope}, **_ERRORS}
)
async def cancel(job_id: JobIdDep, principal: GeneratorDep, context: ContextDep, viewer: ViewerDep) -> Response:
    """Cancel: at once while queued; while running at the next step (202, `cancelling`)."""
    record = await run_in_threadpool(context.store.cancel, job_id, principal.id)
    return answer(viewer.plain(Seen(record)), 200 if record.status.is_terminal else 202)


@router.post(
    "/generate/{job_id}/webhook",
    status_code=202,
    response_model=Generation,
    responses={409: {"model": ErrorEnvelope}, **_ERRORS},
)
async def send_webhook_again(
    job_id: JobIdDep, principal: GeneratorDep, context: ContextDep, viewer: ViewerDep
) -> Response:
    """Have the message about a job's end sent once more, whether it has arrived, failed or was given up."""
    seen = await context.reader.get(job_id, principal.id)
    if not (seen.record.webhook_url and seen.record.status.is_terminal):
        raise ApiError(409, "no_webhook", f"{job_id} has no webhook_url, or is not over yet")
    await webhooks.replay(context.async_redis, job_id)
    return answer(await viewer.view(seen), 202)


@router.delete("/generate/{job_id}", status_code=204, responses={409: {"model": ErrorEnvelope}, **_ERRORS})
async def delete(job_id: JobIdDep, principal: GeneratorDep, context: ContextDep) -> None:
    """Remove a generation and its files; one that runs is cancelled first."""
    await remove(context, job_id, principal.id)


def _wait_s(prefer: str | None) -> int | None:
    """Seconds asked for by `Prefer: wait=N` (RFC 7240), at most 60; None when the header says nothing of it."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*(\d{1,6})\b", prefer or "")
    return min(int(found[1]), _MAX_WAIT_S) if found else None


async def _read(request: Request, context: Context) -> tuple[GenerateFields, Image]:
    """Fields and image of either kind of body. Raises ``ApiError`` 415, 422."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, context)
    if kind == "application/json":
        return _read_json(await request.body(), context)
    message = f"Content-Type: got {kind or 'none'!r}; send multipart/form-data or application/json"
    raise ApiError(415, "content_type", message)


async def _read_form(request: Request, context: Context) -> tuple[GenerateFields, Image]:
    # The image may come as a data URL in a text part, so a part may be as long as a body.
    limit = context.settings.max_body_bytes
    async with request.form(max_files=2, max_fields=20, max_part_size=limit) as form:
        names = [name for name, _ in form.multi_items()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ApiError(422, "invalid_field", f"{twice[0]}: sent more than once", param=twice[0])
        image = form.get("image")
        data: Image
        if isinstance(image, UploadFile):
            data = await image.read()
        elif isinstance(image, str):
            data = image_of(image, context)
        else:
            raise _no_image()
        texts = {name: value for name, value in form.items() if name != "image"}
    if files := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise ApiError(422, "invalid_field", f"{files[0]}: got a file; wanted text", param=files[0])
    # An empty field of an HTML form is one that was not filled in.
    return _fields({name: value for name, value in texts.items() if value != "" or name == "prompt"}), data


def _read_json(body: bytes, context: Context) -> tuple[GenerateFields, Image]:
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
    return _fields(values), image_of(image, context)


def _no_image() -> ApiError:
    return ApiError(422, "image_missing", "image: missing; send a PNG, JPEG or WEBP file", param="image")


def _fields(values: dict[str, Any]) -> GenerateFields:
    try:
        return GenerateFields.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])[:64]
        known = ", ".join(["image", *GenerateFields.model_fields])
        hint = f"there is no such field; there are {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise ApiError(422, "invalid_field", f"{name}: {hint}", param=name) from None
