"""The one error envelope: ``{"error": {"message", "type", "param", "code"}}`` for every 4xx and 5xx."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from worker.connection import is_full

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

_MAX_MESSAGE = 2000
_MAX_PARAM = 200

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error. ``message`` says what came, what was wanted and what to change."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_s:
            self.headers["Retry-After"] = str(retry_after_s)


def body(status: int, code: str, message: str, param: str | None = None) -> dict[str, dict[str, str | None]]:
    """The envelope as a dictionary."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = _TYPES.get(status, kind)
    param = None if param is None else _sayable(param, _MAX_PARAM)
    return {"error": {"message": _sayable(message, _MAX_MESSAGE), "type": kind, "param": param, "code": code}}


def code_of(status: int) -> str:
    """Of an error that we have no word of our own for."""
    return HTTPStatus(status).phrase.lower().replace(" ", "_")


def _sayable(text: str, most: int) -> str:
    """Text in which a client's own may be: JSON can say lone surrogates, and no answer can be written with them."""
    text = text if len(text) <= most else f"{text[:most]}..."
    return text.encode("utf-8", "replace").decode()


def install(app: FastAPI) -> None:
    """Answer every error, FastAPI's own among them, in the envelope."""

    @app.exception_handler(ApiError)
    async def _api_error(_request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(body(error.status, error.code, error.message, error.param), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and isinstance(error.__cause__, ValueError | RecursionError):
            # FastAPI, of JSON with numbers or brackets beyond what Python reads, or not in UTF-8.
            return JSONResponse(body(422, "bad_json", "the body is not JSON that can be read"), 422)
        headers = dict(error.headers) if error.headers else None
        said = body(error.status_code, code_of(error.status_code), str(error.detail))
        return JSONResponse(said, error.status_code, headers)

    @app.exception_handler(RequestValidationError)
    async def _validation(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]  # place and reason only: the input may be an image or a secret
        if first["type"] == "json_invalid":
            message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
            return JSONResponse(body(422, "bad_json", message), 422)
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return JSONResponse(body(422, "invalid_field", f"{param or 'body'}: {first['msg']}", param), 422)

    @app.exception_handler(OSError)
    async def _storage(request: Request, error: OSError) -> JSONResponse:
        # All that routes do with files is through the storage.
        log.error("%s %s: storage: %s", request.method, request.url.path, error)
        message = (
            "the storage of videos cannot be reached; nothing was changed that you were not told of. Try again shortly"
        )
        return JSONResponse(body(503, "storage_unavailable", message), 503, {"Retry-After": "5"})

    @app.exception_handler(RedisError)
    async def _redis(_request: Request, error: RedisError) -> JSONResponse:
        log.error("Redis: %s", error)
        if is_full(error):
            message = "the job store is full, so nothing new can be taken; an administrator has to give it more memory"
            return JSONResponse(body(507, "store_full", message), 507, {"Retry-After": "120"})
        message = "the job store cannot be reached; nothing was changed that you were not told of. Try again shortly"
        return JSONResponse(body(503, "store_unavailable", message), 503, {"Retry-After": "2"})
