"""`/videos/{id}.mp4|.jpg|.json`: the results, with Range and HEAD."""

from __future__ import annotations

from pathlib import PurePath

from fastapi import APIRouter
from fastapi.responses import FileResponse, RedirectResponse, Response

from service.deps import ContextDep, JobIdDep
from service.errors import ApiError
from worker.contract import Status, output_path

router = APIRouter(tags=["videos"])

_TYPES = {"mp4": "video/mp4", "jpg": "image/jpeg", "json": "application/json"}
_LINK_S = 3600


@router.api_route("/videos/{job_id}.{suffix}", methods=["GET", "HEAD"], response_class=FileResponse)
def result(job_id: JobIdDep, suffix: str, context: ContextDep) -> Response:
    """A finished generation's video, thumbnail or manifest. 410 once it has expired."""
    if suffix not in _TYPES:
        raise ApiError(404, "not_found", f"there is no .{suffix[:16]} of a generation; there are {', '.join(_TYPES)}")
    record = context.store.get(job_id)
    if record.status is Status.EXPIRED:
        raise ApiError(410, "expired", f"the files of {job_id} were removed when their time of keeping was over")
    if record.status is not Status.SUCCEEDED:
        raise ApiError(404, "not_ready", f"{job_id} is {record.status}; its files are there once it has succeeded")
    path = output_path(job_id, suffix)
    local = context.storage.local_path(path)
    if local is None:
        return RedirectResponse(context.storage.signed_url(path, _LINK_S), 307)
    if not local.is_file():
        raise ApiError(404, "not_found", f"the file of {job_id} is gone from the storage")
    headers = {
        "Cache-Control": "private, max-age=3600",
        "Content-Disposition": f'inline; filename="{PurePath(path).name}"',
    }
    return FileResponse(local, media_type=_TYPES[suffix], headers=headers)
