"""`/v1/videos`, `/v1/models`: OpenAI's wire format over the same jobs, for clients and tools that speak it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from service import bodies, openai_schema
from service.deps import AfterDep, Context, ContextDep, GeneratorDep, JobIdDep, LimitDep, ReaderDep
from service.errors import ApiError
from service.fleet import Fleet
from service.openai_schema import Model, ModelList, Video, VideoDeleted, VideoPage
from service.reading import Seen
from service.routes import docs
from service.routes.videos import file_of
from service.submitting import Given, SubmitHeadersDep, given, remove, submit
from service.viewing import Viewer, ViewerDep, answer
from worker.contract import MODELS_KEY, ModelCard, Record, VideoSize, input_path, model_id

router = APIRouter(prefix="/v1", tags=["openai"])

_VARIANTS = {"video": "mp4", "thumbnail": "jpg"}

_FIELDS: dict[str, Any] = {
    **docs.FIELDS,
    "size": {"type": "string", "description": "The model's own, as `/v1/models` says", "examples": ["64x64"]},
    "seconds": {"type": "string", "description": "Likewise", "examples": ["2.125"]},
}
_URL = {"type": "string", "description": "A data URL: `data:image/png;base64,...`, of a video likewise"}
_URL_OBJECT = {"type": "object", "required": ["image_url"], "properties": {"image_url": _URL}}


def _body_of(reference: dict[str, Any]) -> dict[str, Any]:
    properties = {"input_reference": reference, **_FIELDS}
    return {"schema": {"type": "object", "required": ["prompt"], "properties": properties}}


_REFERENCE_FILE = {
    "type": "string",
    "format": "binary",
    "description": "An image for models of task ti2v; for those of task t2v a video to start from, or nothing",
}
_TEXT = {"input_reference": docs.IMAGE, "prompt": docs.PROMPT}
_OBJECT = {"input_reference": {"image_url": docs.IMAGE}, "prompt": docs.PROMPT, "seed": 7}
_CREATE_BODY = {
    "required": True,
    "content": {
        "application/json": {
            **_body_of({"anyOf": [_URL, _URL_OBJECT]}),
            "examples": {"text": {"value": _TEXT}, "object": {"value": _OBJECT}},
        },
        "multipart/form-data": _body_of(_REFERENCE_FILE),
    },
}
_REMIX_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["prompt"], "properties": _FIELDS},
            "example": {"prompt": docs.OTHER_PROMPT},
        }
    },
}


# --- ask for one -----------------------------------------------------------------------------------------------------


@router.post(
    "/videos",
    summary="Ask for a video, as OpenAI's clients do",
    response_model=Video,
    responses={200: docs.videos("queued"), **docs.refusals("generate", 404), **docs.ASKING},
    openapi_extra={"requestBody": _CREATE_BODY},
)
async def create(
    request: Request, principal: GeneratorDep, context: ContextDep, viewer: ViewerDep, headers: SubmitHeadersDep
) -> Response:
    """Animate `input_reference`: a file, a data URL, or an object or JSON text with one. Unknown fields are ignored.

    For a model of task t2v it is a video to start from, or left out.
    """
    values = await _read(request, context)
    fields = openai_schema.fields_of(values)
    card = await _check_format(context, fields.model, values)
    reference = openai_schema.reference_in(values.get("input_reference"))
    with _naming_the_reference():
        start = Given("none")
        if reference is not None:
            start = given("video" if card and "video" in card.takes else "image", reference, context)
        record, is_new = await submit(context, principal, headers, fields, start)
    return await _accepted(viewer, Seen(record), is_new)


@router.post(
    "/videos/{job_id}/remix",
    summary="Ask for another video of the same input",
    response_model=Video,
    responses={200: docs.videos("queued"), **docs.refusals("generate", 404), **docs.ASKING},
    openapi_extra={"requestBody": _REMIX_BODY},
)
async def remix(
    job_id: JobIdDep,
    request: Request,
    principal: GeneratorDep,
    context: ContextDep,
    viewer: ViewerDep,
    headers: SubmitHeadersDep,
) -> Response:
    """Make another video from what an earlier one was made from, with another prompt, and another seed unless one is
    given."""
    source = (await context.reader.get(job_id, principal.id)).record
    values = await _read(request, context)
    fields = openai_schema.fields_of(values)
    fleet = await context.store.lookout.fleet_async()
    own = model_id(source.model, source.pin) if source.pin else source.model
    if fields.model is None and not source.follows and fleet.model(own):
        fields = fields.model_copy(update={"model": own})
    await _check_format(context, fields.model, values)
    start = Given(source.source)
    if source.source != "none":
        try:
            data = await run_in_threadpool(context.storage.read, input_path(job_id, source.source))
        except FileNotFoundError:
            message = f"the {source.source} of {job_id} is not kept any more; send it again as a new video"
            raise ApiError(409, "input_gone", message, headers={"x-should-retry": "false"}) from None
        start = Given(source.source, data)
    if source.source == "video" and fields.strength is None:
        fields = fields.model_copy(update={"strength": source.strength})
    record, is_new = await submit(context, principal, headers, fields, start, remixed_from=job_id)
    return await _accepted(viewer, Seen(record), is_new)


@router.post("/videos/edits", include_in_schema=False)
@router.post("/videos/extensions", include_in_schema=False)
@router.post("/videos/characters", include_in_schema=False)
async def not_offered(request: Request, _principal: GeneratorDep) -> None:
    """What OpenAI's alone can do."""
    message = f"{request.url.path} is not offered; see /v1/videos and /v1/videos/{{id}}/remix"
    raise ApiError(404, "not_offered", message)


# --- look at them ----------------------------------------------------------------------------------------------------


@router.get(
    "/videos/{job_id}",
    summary="One video, as OpenAI's clients see it",
    response_model=Video,
    responses={200: docs.videos("running", "succeeded", "failed", "cancelled"), **docs.refusals("read", 404, 422)},
)
async def read(job_id: JobIdDep, principal: ReaderDep, context: ContextDep, viewer: ViewerDep) -> Response:
    """How far it is. One that has failed, was cancelled or has expired is an answer too: 200 with `status: failed`."""
    seen = await context.reader.get(job_id, principal.id)
    sizes = await _sizes(context, [seen.record])
    return answer(_view(viewer, seen, sizes), headers=_poll_header(seen))


@router.get(
    "/videos",
    summary="The key's videos, as OpenAI's clients see them",
    response_model=VideoPage,
    responses={200: docs.VIDEO_PAGE, **docs.refusals("read", 422)},
)
async def list_videos(
    principal: ReaderDep,
    context: ContextDep,
    viewer: ViewerDep,
    limit: LimitDep = 20,
    after: AfterDep = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation")] = "desc",
) -> Response:
    """By time of creation; while `has_more`, go on with `after`, the page's `last_id`."""
    oldest_first = order == "asc"
    records, has_more = await run_in_threadpool(
        lambda: context.store.page(limit, after, principal.id, oldest_first=oldest_first)
    )
    sizes = await _sizes(context, records)
    data = [_view(viewer, seen, sizes) for seen in await context.reader.outlook(records)]
    first_id, last_id = (data[0].id, data[-1].id) if data else (None, None)
    return answer(VideoPage(data=data, has_more=has_more, first_id=first_id, last_id=last_id))


@router.head("/videos/{job_id}/content", include_in_schema=False)
@router.get(
    "/videos/{job_id}/content",
    summary="The file of a video",
    response_class=FileResponse,
    responses={
        200: {"content": {"video/mp4": docs.FILE, "image/jpeg": docs.FILE}},
        **docs.PARTS,
        **docs.refusals("read", 400, 404, 410, 422),
    },
)
async def content(
    job_id: JobIdDep,
    request: Request,
    principal: ReaderDep,
    context: ContextDep,
    variant: Annotated[str, Query(description="video or thumbnail")] = "video",
) -> Response:
    """The file itself, or a redirect to where it is kept. 410 once it has expired."""
    suffix = _VARIANTS.get(variant)
    if suffix is None:
        message = f"variant: got {variant[:32]!r}; there are {' and '.join(map(repr, _VARIANTS))}"
        raise ApiError(400, "invalid_value", message, param="variant")
    record = (await context.reader.get(job_id, principal.id)).record
    return await run_in_threadpool(file_of, context, record, suffix, request.method)


@router.delete(
    "/videos/{job_id}",
    summary="Remove a video, as OpenAI's clients do",
    responses={200: docs.VIDEO_DELETED, **docs.refusals("generate", 404, 409, 422)},
)
async def delete(job_id: JobIdDep, principal: GeneratorDep, context: ContextDep) -> VideoDeleted:
    """Remove record and files; one that is being made is cancelled first."""
    await remove(context, job_id, principal.id)
    return VideoDeleted(id=job_id)


# --- models ----------------------------------------------------------------------------------------------------------


@router.get(
    "/models",
    summary="The models, as OpenAI's clients see them",
    responses={200: docs.MODEL_LIST, **docs.refusals("read")},
)
async def models(_principal: ReaderDep, context: ContextDep) -> ModelList:
    """The models that can be asked for; the first answers when none is named. Empty before a worker has been ready."""
    fleet = await context.store.lookout.fleet_async()
    return ModelList(data=[_model_view(fleet, name, card) for name, card in fleet.listed.items()])


@router.get(
    "/models/{name}",
    summary="One model, as OpenAI's clients see it",
    responses={200: docs.MODEL, **docs.refusals("read", 404, 422)},
)
async def model(name: str, _principal: ReaderDep, context: ContextDep) -> Model:
    """What it makes, and since when a worker has it."""
    card = await _model(context, name)
    if card is None:
        raise _unknown_model(name, [])
    return _model_view(await context.store.lookout.fleet_async(), name, card)


def _model_view(fleet: Fleet, name: str, card: ModelCard) -> Model:
    since = min((worker.started_at for worker in fleet.ready if card.id in worker.models), default=0.0)
    return openai_schema.model(name, card, since)


async def _model(context: Context, name: str | None) -> ModelCard | None:
    """The model of this name, or the first; None while there is none at all. Raises ``ApiError`` 404."""
    fleet = await context.store.lookout.fleet_async()
    card = fleet.model(name)
    if card is None and fleet.models:
        raise _unknown_model(str(name), fleet.names)
    return card


async def _check_format(context: Context, name: str | None, values: dict[str, Any]) -> ModelCard | None:
    """The model, if it makes what is asked for; None while there is none. Raises ``ApiError`` 400, 404."""
    if (card := await _model(context, name)) is not None:
        openai_schema.check_format(values, card)
    return card


def _unknown_model(name: str, there: list[str]) -> ApiError:
    message = (
        f"model: got {name[:64]!r}; the models that can be asked for are {', '.join(map(repr, there)) or 'none yet'}"
    )
    return ApiError(404, "model_not_found", message, param="model")


# --- what these share ------------------------------------------------------------------------------------------------


async def _read(request: Request, context: Context) -> dict[str, Any]:
    """The fields of either kind of body, files as bytes. Raises ``ApiError`` 415, 422."""
    if bodies.kind_of(request, bodies.JSON, *bodies.FORMS) == bodies.JSON:
        return bodies.object_of(await request.body())
    async with bodies.form_of(request, max_fields=40, max_bytes=context.settings.max_body_bytes) as form:
        parts = [
            (name, await part.read() if isinstance(part, UploadFile) else part) for name, part in form.multi_items()
        ]
    return openai_schema.nested(parts)


@contextmanager
def _naming_the_reference() -> Iterator[None]:
    """Errors about the image or video name the field that it came in."""
    try:
        yield
    except ApiError as error:
        if error.param in ("image", "video"):
            error.param = "input_reference"
        raise


async def _accepted(viewer: Viewer, seen: Seen, is_new: bool) -> Response:
    headers = {} if is_new else {"Idempotent-Replayed": "true"}
    sizes: dict[str, VideoSize] = {}
    try:
        sizes = await _sizes(viewer.context, [seen.record])
        [seen] = await viewer.context.reader.outlook([seen.record])
    except RedisError:
        pass  # The job is accepted: an error now would make the client send it again.
    return answer(_view(viewer, seen, sizes), headers={**headers, **_poll_header(seen)})


def _view(viewer: Viewer, seen: Seen, sizes: dict[str, VideoSize]) -> Video:
    return openai_schema.video(viewer.plain(seen), sizes.get(seen.record.id))


def _poll_header(seen: Seen) -> dict[str, str]:
    if seen.record.status.is_terminal:
        return {}
    return {"openai-poll-after-ms": str(openai_schema.poll_after_ms(seen.eta_s))}


async def _sizes(context: Context, records: Sequence[Record]) -> dict[str, VideoSize]:
    """By the jobs' ids, what their models make, those among them that no worker has any more."""
    fleet = await context.store.lookout.fleet_async()
    cards = {record.id: fleet.model_of(record) for record in records}
    if old := [record for record in records if cards[record.id] is None]:
        texts = await context.async_redis.hmget(MODELS_KEY, [_model_id(record) for record in old])
        cards |= {one.id: ModelCard.model_validate_json(text) for one, text in zip(old, texts, strict=True) if text}
    return {job_id: card.video for job_id, card in cards.items() if card}


def _model_id(record: Record) -> str:
    return model_id(record.model, record.model_sha256 or record.pin or "")
