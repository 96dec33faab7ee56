"""The shapes of OpenAI's Videos API, and what turns them into ours and back. No connection, no file.

Its clients write one thing in many ways, as multipart forms have no objects: what is read here is tolerant, and what is
sent is exact. Fields beyond OpenAI's are our own; clients leave alone what they do not know.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, Field

from service import bodies
from service.errors import ApiError
from service.schema import GenerateFields, Generation
from worker.contract import ModelCard, Status, VideoSize

_POLL_MS = (50, 5000)
_POLLS = 10
"""Within the time that a job is expected to take: a client keeps to the first pause that it is told."""
_UNKNOWN_POLL_MS = 500


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str
    type: str | None = None
    param: str | None = None


class Video(BaseModel):
    """One job, as OpenAI's clients read it."""

    id: str
    object: Literal["video"] = "video"
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="0 to 100")
    model: str
    prompt: str
    size: str | None = Field(default=None, description="Width x height in pixels", examples=["64x64"])
    seconds: str | None = Field(default=None, examples=["2.125"])
    created_at: int
    completed_at: int | None = None
    expires_at: int
    remixed_from_video_id: str | None = None
    error: VideoError | None = None
    # Ours:
    seed: int
    metadata: dict[str, str] = {}
    queue_position: int | None = Field(default=None, description="1 is next; only while queued")
    eta_seconds: float | None = None
    url: str | None = Field(default=None, description="Of the MP4; needs no key for a while")


class VideoPage(BaseModel):
    """One page of a listing; pass ``last_id`` as ``after`` for the next."""

    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool
    first_id: str | None
    last_id: str | None


class VideoDeleted(BaseModel):
    """What is said of one that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Model(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Since when a worker has it, in seconds since the epoch")
    owned_by: str = "fastlightgen"
    # Ours:
    task: str
    steps: int
    size: str
    seconds: str


class ModelList(BaseModel):
    """The models that can be asked for; the first answers when none is named."""

    object: Literal["list"] = "list"
    data: list[Model]


# --- what is sent ----------------------------------------------------------------------------------------------------

_STATUSES: dict[Status, Literal["queued", "in_progress", "completed", "failed"]] = {
    Status.QUEUED: "queued",
    Status.RUNNING: "in_progress",
    Status.CANCELLING: "in_progress",
    Status.SUCCEEDED: "completed",
    Status.FAILED: "failed",
    Status.CANCELLED: "failed",
    Status.EXPIRED: "failed",
}

# OpenAI has no states for these.
_ENDS = {
    Status.CANCELLED: VideoError(code="cancelled", message="it was cancelled", type="generation_error"),
    Status.EXPIRED: VideoError(
        code="expired", message="its time of keeping is over and its files were removed", type="generation_error"
    ),
}


def video(view: Generation, size: VideoSize | None) -> Video:
    """A generation as OpenAI's clients read it.

    Args:
        view: as our own clients do.
        size: of its model's videos; None when nobody knows that any more.
    """
    return Video(
        id=view.id,
        status=_STATUSES[view.status],
        progress=math.floor(100 * view.progress),
        model=view.model,
        prompt=view.prompt,
        size=pixels(size) if size else None,
        seconds=duration(size) if size else None,
        created_at=int(view.created_at.timestamp()),
        completed_at=int(view.finished_at.timestamp()) if view.finished_at else None,
        expires_at=int(view.expires_at.timestamp()),
        remixed_from_video_id=view.remixed_from,
        error=VideoError(**view.error.model_dump()) if view.error else _ENDS.get(view.status),
        seed=view.seed,
        metadata=view.metadata,
        queue_position=view.queue_position,
        eta_seconds=view.eta_seconds,
        url=view.video_url,
    )


def model(name: str, card: ModelCard, since: float) -> Model:
    """A model as OpenAI's clients read it, under this name; ``since``, in epoch seconds, a worker has it."""
    return Model(
        id=name,
        created=int(since),
        task=card.task,
        steps=card.num_inference_steps,
        size=pixels(card.video),
        seconds=duration(card.video),
    )


def pixels(size: VideoSize) -> str:
    """Width x height."""
    return f"{size.width}x{size.height}"


def duration(size: VideoSize) -> str:
    """Seconds."""
    return f"{size.num_frames / size.fps:g}"


def poll_after_ms(eta_s: float | None) -> int:
    """How long a client should let pass before it asks again."""
    if eta_s is None:
        return _UNKNOWN_POLL_MS
    low, high = _POLL_MS
    return round(min(high, max(low, 1000 * eta_s / _POLLS)))


# --- what is read ----------------------------------------------------------------------------------------------------


def nested(items: Iterable[tuple[str, object]]) -> dict[str, Any]:
    """The fields of a form, of which ``a[b]`` is member ``b`` of ``a``, and ``a[]`` one of several ``a``.

    Raises:
        ApiError: 422 a field is a value and has members.
    """
    values: dict[str, Any] = {}
    for name, value in items:
        first, *rest = re.findall(r"[^\[\]]+", name) or [""]
        place, key = values, first
        for member in rest:
            place, key = place.setdefault(key, {}), member
            if not isinstance(place, dict):
                message = f"{first[:64]}: sent as a value and with members in brackets; send one of the two"
                raise ApiError(422, "invalid_field", message, param=first[:64])
        if key in place:
            before = place[key]
            value = [*before, value] if isinstance(before, list) else [before, value]
        place[key] = value
    return values


def reference_in(reference: object) -> str | bytes | None:
    """What an ``input_reference`` holds: a file's bytes, or the text of a URL; None where there is none.

    It may be that itself, an object of it as ``image_url``, ``video_url`` or ``url``, such an object in one of these
    again, any of these as JSON text, or alone in a list.

    Raises:
        ApiError: 422 it is nothing of the kind.
    """
    found = reference
    for _ in range(5):  # nothing that clients send is deeper
        if isinstance(found, str) and found.lstrip().startswith(("{", "[")):
            found = _parse(found)
        elif isinstance(found, list) and len(found) == 1:
            [found] = found
        elif isinstance(found, dict):
            member = next((name for name in _URLS if name in found), None)
            if "file_id" in found and member is None:
                message = "input_reference: got a file_id, and no files are kept here; send the file or a data URL"
                raise ApiError(422, "file_id_not_supported", message, param="input_reference")
            found = found[member] if member else None
        else:
            break
    if found is None or found == "":
        return None
    if isinstance(found, str):
        return found.strip()
    if not isinstance(found, bytes):
        message = f"input_reference: got {type(found).__name__}; wanted one image or video, as a file or a data URL"
        raise ApiError(422, "invalid_field", message, param="input_reference")
    return found


_URLS = ("image_url", "video_url", "url")


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"input_reference is not JSON: {error}"
        raise ApiError(422, "bad_json", message, param="input_reference") from None


def fields_of(values: dict[str, Any]) -> GenerateFields:
    """What of ``values`` a generation can be asked for with; the rest is left alone. Raises ``ApiError`` 422."""
    known = {name: values[name] for name in GenerateFields.model_fields if name in values}
    return bodies.fields_of(bodies.filled_in(known))


def check_format(values: dict[str, Any], card: ModelCard) -> None:
    """Whether the ``size`` and ``seconds`` that are asked for are what the model makes.

    Raises:
        ApiError: 400, as OpenAI's.
    """
    size, seconds = _text(values.get("size")), _text(values.get("seconds"))
    made, lasts = pixels(card.video), duration(card.video)
    if size and size.lower() != made:
        raise _unsupported("size", size, repr(made), card)
    if seconds and not _is_about(seconds, float(lasts)):
        up = str(math.ceil(float(lasts)))
        raise _unsupported("seconds", seconds, repr(lasts) if up == lasts else f"{lasts!r} (or {up!r})", card)


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(value).strip() if isinstance(value, str | int | float) else type(value).__name__


def _is_about(asked: str, seconds: float) -> bool:
    try:
        value = float(asked)
    except ValueError:
        return False
    # Some clients have whole seconds only.
    return abs(value - seconds) <= 0.05 or value == math.ceil(seconds)


def _unsupported(name: str, got: str, possible: str, card: ModelCard) -> ApiError:
    message = f"{name}: got {got[:32]!r}; {card.name} makes {possible} and nothing else"
    return ApiError(400, "invalid_value", message, param=name)
