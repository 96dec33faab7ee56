"""`/`: the playground page, and what it and other clients choose from: `/models`, `/examples`."""

from __future__ import annotations

import json
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from service.deps import ContextDep, OriginDep, ReaderDep
from service.errors import ApiError
from service.schema import Example, Examples, Models

WEB = Path(__file__).resolve().parent.parent / "web"

router = APIRouter(tags=["playground"])

_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'"
)


@router.get("/", include_in_schema=False)
def page() -> FileResponse:
    """The playground."""
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    return FileResponse(WEB / "index.html", media_type="text/html", headers=headers)


@router.get("/models")
async def models(_principal: ReaderDep, context: ContextDep) -> Models:
    """The models that can be asked for, with the prompts that they understand; the first answers when none is named.

    Empty before a worker has been ready.
    """
    return Models(data=list((await context.store.lookout.fleet_async()).models))


@router.get("/examples")
def examples(context: ContextDep, origin: OriginDep) -> Examples:
    """Pictures to begin with."""
    data = []
    for entry in _index(context.settings.examples_dir):
        url = f"{origin}/examples/{entry['name']}.png"
        data.append(Example(name=entry["name"], image_url=url, prompt=entry["prompt"]))
    return Examples(data=data)


@router.get("/examples/{name}.png", response_class=FileResponse)
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
