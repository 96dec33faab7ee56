"""What a job looks like to whoever asked for it: links that work from there, signed where a key is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Response
from pydantic import BaseModel

from service import webhooks
from service.deps import Context, origin_of
from service.reading import Seen
from service.schema import Generation, WebhookState, generation


@dataclass(frozen=True)
class Viewer:
    """Makes views for one request."""

    context: Context
    origin: str

    def plain(self, seen: Seen, webhook: WebhookState | None = None) -> Generation:
        """The job, from what is at hand."""
        return generation(seen.record, self.origin, seen.position, seen.eta_s, self.context.sign, webhook)

    async def view(self, seen: Seen) -> Generation:
        """The job, and how far its webhook is."""
        record = seen.record
        webhook = None
        if record.webhook_url and record.status.is_terminal:
            webhook = WebhookState.model_validate(await webhooks.state(self.context.async_redis, record.id))
        return self.plain(seen, webhook)


async def viewer_of(request: Request) -> Viewer:
    """For whoever sent this request."""
    return Viewer(request.app.state.context, origin_of(request))


ViewerDep = Annotated[Viewer, Depends(viewer_of)]


def answer(view: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A view as it goes out: it is ours, so it is not checked again on its way."""
    return Response(view.model_dump_json(), status, headers, media_type="application/json")
