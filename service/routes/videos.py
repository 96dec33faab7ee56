"""`/videos/{id}.mp4|.jpg|.json`: the results, with Range and HEAD, for whoever has a signed link or made them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import PurePath

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from service.auth import CHALLENGE, Principal
from service.deps import Context, ContextDep, JobIdDep, OptionalPrincipalDep
from service.errors import ApiError
from service.routes import docs
from worker.contract import Record, Status, output_path
from worker.records import now

router = APIRouter(tags=["videos"])

_TYPES = {"mp4": "video/mp4", "jpg": "image/jpeg", "json": "application/json"}
_AT_MOST_S = 3600


@router.head("/videos/{job_id}.{suffix}", include_in_schema=False)
@router.get(
    "/videos/{job_id}.{suffix}",
    summary="A video, its thumbnail, its manifest",
    response_class=FileResponse,
    responses={
        200: {
            "content": {
                "video/mp4": docs.FILE,
                "image/jpeg": docs.FILE,
                "application/json": {"schema": {"type": "object"}, "example": docs.MANIFEST},
            }
        },
        **docs.PARTS,
        **docs.refusals("read", 404, 410, 422),
    },
)
def result(
    job_id: JobIdDep, suffix: str, request: Request, context: ContextDep, principal: OptionalPrincipalDep
) -> Response:
    """A finished generation's `mp4`, `jpg` or `json`. Needs a signed link, as answers have them, or the job's key."""
    if suffix not in _TYPES:
        raise ApiError(404, "not_found", f"there is no .{suffix[:16]} of a generation; there are {', '.join(_TYPES)}")
    return file_of(context, _readable(request, context, job_id, suffix, principal), suffix, request.method)


def file_of(context: Context, record: Record, suffix: str, method: str) -> Response:
    """One of a generation's files: itself, or where it can be had.

    Args:
        context: of the app.
        record: whose file it is; that it may be read has been seen to.
        suffix: mp4, jpg or json.
        method: GET or HEAD.

    Raises:
        ApiError: 410 it has expired, 404 it is not there yet, or no more.
    """
    left_s = int(record.expires_at - now())
    if record.status is Status.EXPIRED or (record.status is Status.SUCCEEDED and left_s < 1):
        raise _expired(context, record)
    if record.status is not Status.SUCCEEDED:
        message = f"{record.id} is {record.status}; its files are there once it has succeeded"
        raise ApiError(404, "not_ready", message)
    path = output_path(record.id, suffix)
    seconds = min(_AT_MOST_S, left_s)
    local = context.storage.local_path(path)
    if local is None:
        there = context.storage.signed_url(path, seconds, method=method)
        return RedirectResponse(there, 307, {"Cache-Control": "private, no-store"})
    if not local.is_file():
        raise ApiError(404, "not_found", f"the file of {record.id} is gone from the storage")
    headers = {
        "Cache-Control": f"private, max-age={seconds}",
        "Content-Disposition": f'inline; filename="{PurePath(path).name}"',
    }
    return FileResponse(local, media_type=_TYPES[suffix], headers=headers)


def _readable(request: Request, context: Context, job_id: str, suffix: str, principal: Principal | None) -> Record:
    """The record, if who asks has a signed link of the file, or the key that the job was made with.

    Who has neither is told the same of a job that is there and of one that is not.

    Raises:
        ApiError: 401, 403, 404, and 410 for a link that has had its time along with the file.
    """
    record = context.store.records.get(job_id)
    path, query = f"/videos/{job_id}.{suffix}", request.query_params
    if record is not None and context.link_secrets.verify(path, query, now(), record.expires_at):
        return record
    if principal is not None:
        if record is None or record.owner != principal.id:
            raise ApiError(404, "not_found", f"there is no generation {job_id!r}")
        if "read" not in principal.scopes:
            raise ApiError(403, "scope_missing", "this needs a key with the scope 'read', or a signed link")
        return record
    if record is not None and context.link_secrets.is_genuine(path, query):
        if record.status is Status.EXPIRED or record.expires_at <= now():
            raise _expired(context, record)
        message = "this link no longer works; ask for the generation again, its answer has a new one"
        raise ApiError(401, "link_expired", message, headers=CHALLENGE)
    message = "this needs the whole link as it stands in an answer, or an API key: `Authorization: Bearer fl_...`"
    raise ApiError(401, "missing_key", message, headers=CHALLENGE)


def _expired(context: Context, record: Record) -> ApiError:
    day = datetime.fromtimestamp(record.expires_at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    message = f"the files of {record.id} expired at {day}: they are kept for {context.settings.retention_hours:g} hours"
    return ApiError(410, "expired", message)
