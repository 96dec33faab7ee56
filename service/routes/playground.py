"""`/`: the playground page, and what it and other clients choose from: `/models`, `/examples`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response

from service.deps import ContextDep, OriginDep, ReaderDep
from service.errors import ApiError
from service.routes import docs
from service.schema import Example, Examples, Models

WEB = Path(__file__).resolve().parent.parent / "web"

router = APIRouter(tags=["playground"])


class Web(StaticFiles):
    """What the page is made of: asked for anew each time (304 where nothing has changed), or it would mix versions."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """See `StaticFiles`."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


@router.get("/", include_in_schema=False)
def page(context: ContextDep) -> FileResponse:
    """The playground. It loads from here alone, and from the object store that videos are redirected to."""
    store = f" {origin}" if (origin := context.storage.links_origin()) else ""
    policy = (
        f"default-src 'self'; img-src 'self' blob: data:{store}; media-src 'self' blob:{store}; "
        f"connect-src 'self'{store}; frame-ancestors 'none'; base-uri 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return FileResponse(WEB / "index.html", media_type="text/html", headers=headers)


@router.get(
    "/models",
    summary="The models, and what they understand",
    responses={200: docs.MODELS, **docs.refusals("read")},
)
async def models(_principal: ReaderDep, context: ContextDep) -> Models:
    """The models that can be asked for, with the prompts that they understand; the first answers when none is named.

    Empty before a worker has been ready.
    """
    return Models(data=list((await context.store.lookout.fleet_async()).models))


@router.get("/examples", summary="Example pictures with sentences", responses={200: docs.EXAMPLES})
def examples(context: ContextDep, origin: OriginDep) -> Examples:
    """Pictures to begin with."""
    data = []
    for entry in _index(context.settings.examples_dir):
        url = f"{origin}/examples/{entry['name']}.png"
        data.append(Example(name=entry["name"], image_url=url, prompt=entry["prompt"]))
    return Examples(data=data)


@router.get(
    "/examples/{name}.png",
    summary="One of the example pictures",
    response_class=FileResponse,
    responses={200: {"content": {"image/png": docs.FILE}}, **docs.refusals(None, 404, 422)},
)
def example_image(name: str, context: ContextDep) -> FileResponse:
    """One of the pictures that `/examples` lists."""
    folder = context.settings.examples_dir
    if name not in [entry["name"] for entry in _index(folder)]:
        raise ApiError(404, "not_found", f"there is no example {name[:64]!r}")
    return FileResponse(folder / f"{name}.png", media_type="image/png", headers={"Cache-Control": "max-age=3600"})


def _index(folder: Path) -> list[dict[str, str]]:
    path = folder / "index.json"
    if not path.is_file():
        return []
    entries: list[dict[str, str]] = json.loads(path.read_text())
    return entries
