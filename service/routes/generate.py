"""`/generate`: submit, read, list, follow, cancel, delete."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request, Response
from redis.exceptions import RedisError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from service import bodies, events, webhooks
from service.deps import AfterDep, Context, ContextDep, GeneratorDep, JobIdDep, LimitDep, ReaderDep, generation_id
from service.errors import ApiError
from service.reading import Seen
from service.routes import docs
from service.schema import GenerateFields, Generation, GenerationPage
from service.submitting import Given, SubmitHeadersDep, given, remove, submit
from service.viewing import ViewerDep, answer, viewer_of

router = APIRouter(tags=["generate"])

_MAX_WAIT_S = 60
_Source = Literal["image", "video"]
_SOURCES: tuple[_Source, ...] = ("image", "video")


def _body_of(image: dict[str, str], video: dict[str, str]) -> dict[str, Any]:
    properties = {"image": image, "video": video, **docs.FIELDS}
    return {"schema": {"type": "object", "required": ["prompt"], "properties": properties}}


_SHORT = {"image": docs.IMAGE, "prompt": docs.PROMPT}
_LONG = {**_SHORT, "seed": 7, "metadata": {"order": "17"}, "webhook_url": docs.HOOK}
_REQUEST_BODY = {
    "required": True,
    "content": {
        "application/json": {
            **_body_of(docs.IMAGE_URL, docs.VIDEO_URL),
            "examples": {"short": {"value": _SHORT}, "long": {"value": _LONG}},
        },
        "multipart/form-data": _body_of(docs.IMAGE_FILE, docs.VIDEO_FILE),
    },
}


@router.post(
    "/generate",
    status_code=202,
    summary="Ask for a video",
    response_model=Generation,
    responses={
        200: {"model": Generation, **docs.generations("succeeded", "failed", description="Over within `Prefer: wait`")},
        202: docs.generations("queued"),
        **docs.ASKING,
    },
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
    """A sentence, and an image or a video as the model's `task` wants it, as multipart form or JSON.

    Answers 202 with the job, or 200 with the video's address.

    With an `Idempotency-Key` it can be sent any number of times and is one job.
    """
    fields, start = await _read(request, context)
    record, is_new = await submit(context, principal, headers, fields, start)
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


@router.get(
    "/generate/{job_id}",
    summary="One video",
    response_model=Generation,
    responses={200: docs.generations("running", "succeeded", "delivered", "failed"), **docs.refusals("read", 404, 422)},
)
async def read(job_id: str, request: Request, principal: ReaderDep) -> Response:
    """How far it is, and where. A failed or an expired one is an answer too: 200 with `status: failed`."""
    # By hand what elsewhere are dependencies: this is what clients ask most, and each is a tenth of its cost.
    viewer = await viewer_of(request)
    return answer(await viewer.view(await viewer.context.reader.get(await generation_id(job_id), principal.id)))


@router.get(
    "/generate",
    summary="The key's videos",
    response_model=GenerationPage,
    responses={200: docs.GENERATION_PAGE, **docs.refusals("read", 422)},
)
async def list_generations(
    principal: ReaderDep, context: ContextDep, viewer: ViewerDep, limit: LimitDep = 20, after: AfterDep = None
) -> Response:
    """Newest first, at most `limit`; while `has_more`, go on with `after`, the page's `last_id`."""
    records, has_more = await run_in_threadpool(context.store.page, limit, after, principal.id)
    data = [viewer.plain(seen) for seen in await context.reader.outlook(records)]
    return answer(GenerationPage(data=data, has_more=has_more, last_id=data[-1].id if data else None))


@router.get(
    "/generate/{job_id}/events",
    summary="Follow a video",
    response_class=EventSourceResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}, "example": docs.EVENTS}}},
        **docs.refusals("read", 404, 422),
    },
)
async def follow(
    job_id: JobIdDep,
    principal: ReaderDep,
    context: ContextDep,
    viewer: ViewerDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventSourceResponse:
    """Server-sent events named `generation`: the whole generation at each change, until it is over."""
    await context.reader.get(job_id, principal.id)
    since = events.valid_id(last_event_id)

    async def stream() -> AsyncIterator[ServerSentEvent]:
        said = ""
        async for event_id, seen in events.follow(context.async_redis, context.hub, context.reader, job_id, since):
            view = viewer.plain(seen).model_dump_json()
            if view != said:  # the follower repeats itself while nothing changes
                said = view
                yield ServerSentEvent(data=view, event="generation", id=event_id)

    return events.sent(stream())


@router.post(
    "/generate/{job_id}/cancel",
    summary="Cancel a video",
    response_model=Generation,
    responses={
        200: docs.generations("cancelled"),
        202: {"model": Generation, **docs.generations("cancelling", description="Stops at its next step")},
        **docs.refusals("generate", 404, 409, 422),
    },
)
async def cancel(job_id: JobIdDep, principal: GeneratorDep, context: ContextDep, viewer: ViewerDep) -> Response:
    """At once while queued; while running at the next step (202, `cancelling`)."""
    record = await run_in_threadpool(context.store.cancel, job_id, principal.id)
    return answer(viewer.plain(Seen(record)), 200 if record.status.is_terminal else 202)


@router.post(
    "/generate/{job_id}/webhook",
    status_code=202,
    summary="Send a webhook again",
    response_model=Generation,
    responses={202: docs.generations("delivered"), **docs.refusals("generate", 404, 409, 422)},
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


@router.delete(
    "/generate/{job_id}",
    status_code=204,
    summary="Remove a video",
    responses=docs.refusals("generate", 404, 409, 422),
)
async def delete(job_id: JobIdDep, principal: GeneratorDep, context: ContextDep) -> None:
    """Remove record and files; one that runs is cancelled first."""
    await remove(context, job_id, principal.id)


def _wait_s(prefer: str | None) -> int | None:
    """Seconds asked for by `Prefer: wait=N` (RFC 7240), at most 60; None when the header says nothing of it."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*(\d{1,6})\b", prefer or "")
    return min(int(found[1]), _MAX_WAIT_S) if found else None


async def _read(request: Request, context: Context) -> tuple[GenerateFields, Given]:
    """Fields, and what the video is to be made from, of either kind of body. Raises ``ApiError`` 415, 422."""
    if bodies.kind_of(request, bodies.JSON, *bodies.FORMS) == bodies.JSON:
        return _read_json(await request.body(), context)
    return await _read_form(request, context)


async def _read_form(request: Request, context: Context) -> tuple[GenerateFields, Given]:
    async with bodies.form_of(request, max_fields=20, max_bytes=context.settings.max_body_bytes) as form:
        names = [name for name, _ in form.multi_items()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ApiError(422, "invalid_field", f"{twice[0]}: sent more than once", param=twice[0])
        sources: dict[_Source, str | bytes] = {}
        for name in _SOURCES:
            part = form.get(name)
            if isinstance(part, UploadFile) and (part.filename or part.size):  # a form's empty field is none
                sources[name] = await part.read()
            elif isinstance(part, str) and part:
                sources[name] = part
        texts = {name: value for name, value in form.items() if name not in _SOURCES}
    if files := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise ApiError(422, "invalid_field", f"{files[0]}: got a file; wanted text", param=files[0])
    return bodies.fields_of(bodies.filled_in(texts)), _given(sources, context)


def _read_json(body: bytes, context: Context) -> tuple[GenerateFields, Given]:
    values = bodies.object_of(body)
    sources: dict[_Source, str | bytes] = {}
    for name in _SOURCES:
        if (value := values.pop(name, None)) is None:
            continue
        if not isinstance(value, str):
            message = f"{name}: got {type(value).__name__}; wanted a data URL"
            raise ApiError(422, "invalid_field", message, param=name)
        sources[name] = value
    return bodies.fields_of(values), _given(sources, context)


def _given(sources: dict[_Source, str | bytes], context: Context) -> Given:
    if len(sources) > 1:
        message = "video: sent beside an image; send the one that the model's task wants"
        raise ApiError(422, "invalid_field", message, param="video")
    for source, data in sources.items():
        return given(source, data, context)
    return Given("none")
