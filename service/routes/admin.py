"""`/admin/...`: distillations. For whoever is on this machine; scope `admin` comes with the keys."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Response

from service.deps import AfterDep, ContextDep, DistillationIdDep, LimitDep, OriginDep
from service.errors import ApiError
from service.schema import DistillationFields, DistillationPage, DistillationView, ErrorEnvelope, distillation


def _only_on_this_machine(context: ContextDep) -> None:
    host = context.settings.host
    if not context.settings.is_local:
        message = f"the service listens on HOST={host} and has no keys yet, so /admin is off; it is on with 127.0.0.1"
        raise ApiError(403, "admin_off", message)


_ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorEnvelope} for code in (403, 404, 422, 503)}

router = APIRouter(
    prefix="/admin/distillations", tags=["admin"], dependencies=[Depends(_only_on_this_machine)], responses=_ERRORS
)


@router.post("", status_code=202)
def create(fields: DistillationFields, context: ContextDep, origin: OriginDep, response: Response) -> DistillationView:
    """Distil a student: a recipe by name. Answers 202; a trainer takes it when it is free."""
    view = distillation(context.distillations.submit(fields), origin)
    response.headers["Location"] = view.links.self
    return view


@router.get("")
def list_distillations(
    context: ContextDep, origin: OriginDep, limit: LimitDep = 20, after: AfterDep = None
) -> DistillationPage:
    """Newest first."""
    records, has_more = context.distillations.page(limit, after)
    data = [distillation(record, origin) for record in records]
    return DistillationPage(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{job_id}")
def read(job_id: DistillationIdDep, context: ContextDep, origin: OriginDep) -> DistillationView:
    """One distillation, with what it has reported last."""
    return distillation(context.distillations.get(job_id), origin)


@router.post("/{job_id}/cancel", responses={409: {"model": ErrorEnvelope}})
def cancel(job_id: DistillationIdDep, context: ContextDep, origin: OriginDep, response: Response) -> DistillationView:
    """Cancel: at once while queued; while running (202, `cancelling`) as soon as its checkpoint is written."""
    record = context.distillations.cancel(job_id)
    response.status_code = 200 if record.status.is_terminal else 202
    return distillation(record, origin)
