"""Reading bodies: forms and JSON, whole or not at all, within bounds that nobody who means well comes near."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from service.errors import ApiError
from service.schema import GenerateFields

_MAX_FILES = 2
_MAX_NAME = 200
_MAX_VALUES = 10_000
"""Three bytes of JSON, `[],`, are a hundred once they are read, and each costs time."""
_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^";\s]*)', re.IGNORECASE)


FORM, JSON = "multipart/form-data", "application/json"
FORMS = (FORM, "application/x-www-form-urlencoded")


def kind_of(request: Request, *kinds: str) -> str:
    """The media type of a body, if it is one of these. Raises ``ApiError`` 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        message = f"Content-Type: got {kind[:64] or 'none'!r}; send {FORM} or {JSON}"
        raise ApiError(415, "content_type", message)
    return kind


@asynccontextmanager
async def form_of(request: Request, *, max_fields: int, max_bytes: int) -> AsyncIterator[FormData]:
    """A form, multipart or urlencoded; its files are closed when this is left.

    Args:
        request: whose Content-Type has been looked at.
        max_fields: texts in it.
        max_bytes: of one text: the image may come in one, as a data URL.

    Raises:
        ApiError: 400 it cannot be read, 415 it is not in UTF-8, 422 a name is too long, or a text has too many values.
    """
    content_type = request.headers["content-type"].lstrip()
    charset = _CHARSET.search(content_type)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "content_type", f"Content-Type: got charset={charset[1][:32]!r}; send the form in UTF-8")
    is_multipart = content_type.lower().startswith("multipart/")
    parser = (_Multipart if is_multipart else _Urlencoded)(request, max_fields, max_bytes)
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        raise _unreadable(getattr(error, "message", str(error))) from None
    try:
        if not parser.is_whole:
            raise _unreadable("it breaks off before its last boundary")
        for name, value in form.multi_items():
            if len(name) > _MAX_NAME:
                message = f"a field's name has {len(name)} characters; at most {_MAX_NAME} are taken"
                raise ApiError(422, "invalid_field", message, param=name[:64])
            if isinstance(value, str):
                check_values(value, name[:64])
        yield form
    finally:
        await form.close()


class _Multipart(MultiPartParser):
    """Starlette's takes a form that breaks off for a whole one, and leaves its last field out."""

    is_whole = False

    def __init__(self, request: Request, max_fields: int, max_bytes: int) -> None:
        super().__init__(
            request.headers, request.stream(), max_files=_MAX_FILES, max_fields=max_fields, max_part_size=max_bytes
        )

    def on_end(self) -> None:
        self.is_whole = True


class _Urlencoded(FormParser):
    is_whole = True
    """Nothing marks its end."""

    def __init__(self, request: Request, max_fields: int, max_bytes: int) -> None:
        super().__init__(request.headers, request.stream(), max_fields=max_fields, max_part_size=max_bytes)


def check_values(text: str | bytes, what: str | None = None) -> None:
    """Whether what may be JSON can be read at a bearable cost. Raises ``ApiError`` 422, which names ``what``."""
    marks: tuple[Any, ...] = ("[", "{", '"', ",") if isinstance(text, str) else (b"[", b"{", b'"', b",")
    if sum(map(text.count, marks)) > _MAX_VALUES:
        message = f"{what or 'the body'}: it holds more than {_MAX_VALUES} brackets, quotes and commas"
        raise ApiError(422, "bad_json", message, param=what)


def object_of(body: bytes) -> dict[str, Any]:
    """The members of a JSON object, none of which comes twice. Raises ``ApiError`` 422."""
    check_values(body)
    try:
        values = json.loads(body, object_pairs_hook=_once)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _bad_json(f"the body is not JSON: {error}") from None
    except ValueError:
        raise _bad_json("the body has a number of thousands of digits") from None
    except RecursionError:
        raise _bad_json("the body is nested too deeply; wanted an object of texts and numbers") from None
    if not isinstance(values, dict):
        raise _bad_json(f"the body is a JSON {type(values).__name__}; wanted an object")
    return values


def fields_of(values: dict[str, Any]) -> GenerateFields:
    """What a video is asked for with, but for what it is made from. Raises ``ApiError`` 422."""
    try:
        return GenerateFields.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])[:64]  # of metadata it has the client's own key
        known = ", ".join(["image", "video", *GenerateFields.model_fields])
        hint = f"there is no such field; there are {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise ApiError(422, "invalid_field", f"{name or 'the body'}: {hint}", param=name or None) from None


def filled_in(values: dict[str, Any]) -> dict[str, Any]:
    """A form's fields without the empty ones, which are those that nobody has filled in; an empty prompt is refused."""
    return {name: value for name, value in values.items() if value != "" or name == "prompt"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:  # which of the two was meant?
            raise ApiError(422, "invalid_field", f"{name[:64]}: sent more than once", param=name[:64])
        values[name] = value
    return values


def _bad_json(message: str) -> ApiError:
    return ApiError(422, "bad_json", message)


def _unreadable(why: str) -> ApiError:
    return ApiError(400, "form_unreadable", f"the form cannot be read: {why}")
