"""`DistillationStore`: students that are asked for. What may be changed of a recipe, `distill.recipes` says.

What a run reports, the trainer has put into Redis and the storage (`worker.run_reports`); here it is read.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, cast

from redis import Redis
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from distill import recipes
from distill.config import SHAPES, ConfigError, DistillConfig
from service.distillation_schema import DistillationFields, RecipeField, Recipes, RecipeView
from service.errors import ApiError
from service.ids import new_id
from service.store import Store
from worker.contract import (
    TRAIN_OFFER_KEY,
    Checkpoint,
    Distillation,
    GpuHolder,
    Offer,
    RunFile,
    Status,
    gpu_key,
    run_checkpoints_key,
    run_files_key,
    run_log_key,
    run_metrics_key,
    sample_path,
)
from worker.records import QueueFull, Refused, now
from worker.storage import Storage

_MAX_QUEUED = 20
_NO_LIMIT = -1
_LINES = 1000
"""Of a run's log or metrics, that are read at a time."""


class DistillationStore(Store[Distillation]):
    """Submit, go on, and what a run reports; the rest is `Store`."""

    def __init__(self, redis: Redis, queue_redis: Redis, storage: Storage) -> None:
        """``redis`` decodes responses; ``queue_redis`` (for rq) does not."""
        super().__init__(redis, queue_redis, Distillation, _NO_LIMIT)
        self._storage = storage

    # --- submit, go on --------------------------------------------------------------------------------------------

    def submit(self, fields: DistillationFields, owner: str, request_id: str | None = None) -> Distillation:
        """Check a request, write its record, enqueue it. A refused request leaves nothing behind.

        Raises:
            ApiError: what is wrong with the request, or that too many are waiting.
        """
        offer = self.offer()
        _check("recipe", fields.recipe, offer.recipes if offer else recipes.RECIPES)
        _check("preset", fields.preset, recipes.PRESETS)
        config = _configuration(fields)
        own_teacher, own_dataset = recipes.teacher_of(config), recipes.dataset_of(config)
        # While no trainer has ever said what it has, the recipe's own may wait for one.
        teachers = [teacher.name for teacher in offer.teachers] if offer else [own_teacher]
        teacher, dataset = fields.teacher or own_teacher, fields.dataset or own_dataset
        _check("teacher", teacher, teachers)
        _check("dataset", dataset, [own_dataset])
        record = Distillation(
            id=new_id("dist"),
            status=Status.QUEUED,
            owner=owner,
            request_id=request_id,
            recipe=fields.recipe,
            preset=fields.preset,
            overrides=fields.overrides,
            limits=fields.gate,
            teacher=teacher,
            dataset=dataset,
            promote=fields.promote,
            created_at=now(),
        )
        try:
            self.records.create(record, _MAX_QUEUED)
            self._enqueue(record.id)
        except QueueFull:
            message = f"{_MAX_QUEUED} distillations are waiting, and no more may; cancel one, or wait"
            raise ApiError(503, "queue_full", message, retry_after_s=120) from None
        except BaseException:
            self._forget(record.id)
            raise
        return record

    def go_on(self, job_id: str) -> Distillation:
        """Have one that has failed or was cancelled go on in its folder, with all its attempts before it.

        Raises:
            ApiError: 404 no such job, 409 it is in another state, or its last attempt is still ending.
        """
        record = self.get(job_id)
        over = (Status.FAILED, Status.CANCELLED)
        if record.status in over and self._is_in_hand(job_id):
            raise ApiError(409, "in_flight", f"the last attempt at {job_id} is just ending; try again in a moment")
        try:
            record = self.records.change(record, over, cause="resumed", status=Status.QUEUED, attempt=0, deaths=0)
        except Refused as refused:
            message = f"{job_id} is {refused.found}; one that has failed or was cancelled can go on"
            raise ApiError(409, "not_resumable", message) from None
        self._clear(job_id)
        self._enqueue(job_id)
        return record

    def _is_in_hand(self, job_id: str) -> bool:
        """Whether a trainer still has to tell the queue how it ended."""
        try:
            job = Job.fetch(job_id, connection=self._queue.connection, serializer=JSONSerializer)
        except NoSuchJobError:
            return False
        return job.get_status() is JobStatus.STARTED

    def _remove_files(self, job_id: str) -> None:
        self._storage.delete_many([sample_path(job_id, name) for name in self.files(job_id)])
        self._redis.delete(
            run_files_key(job_id), run_log_key(job_id), run_metrics_key(job_id), run_checkpoints_key(job_id)
        )

    # --- what can be distilled ------------------------------------------------------------------------------------

    def offer(self) -> Offer | None:
        """What the trainer has said that it can do."""
        text = cast(str | None, self._redis.get(TRAIN_OFFER_KEY))
        return Offer.model_validate_json(text) if text else None

    def recipes(self) -> Recipes:
        """Every recipe with what may be changed of it, and what the trainer has."""
        offer = self.offer()
        held = cast(str | None, self._redis.get(gpu_key(offer.gpu))) if offer else None
        return Recipes(
            data=[_recipe(name) for name in (offer.recipes if offer else recipes.RECIPES)],
            teachers=list(offer.teachers) if offer else [],
            datasets=list(offer.datasets if offer else (SHAPES,)),
            trainer=offer,
            gpu=GpuHolder.model_validate_json(held) if held else None,
        )

    # --- what a run reports ---------------------------------------------------------------------------------------

    def log_lines(self, job_id: str, after: str | None) -> tuple[list[str], str | None]:
        """Lines of the log after that id, and the id of the last of them."""
        entries, last_id = self._lines(run_log_key(job_id), after)
        return [fields["line"] for fields in entries], last_id

    def metrics(self, job_id: str, after: str | None) -> tuple[list[Any], str | None]:
        """What was measured, likewise."""
        entries, last_id = self._lines(run_metrics_key(job_id), after)
        return [json.loads(fields["data"]) for fields in entries], last_id

    def _lines(self, key: str, after: str | None) -> tuple[list[dict[str, str]], str | None]:
        least = f"({after}" if after else "-"
        found = cast(list[tuple[str, dict[str, str]]], self._redis.xrange(key, least, count=_LINES))
        return [fields for _, fields in found], found[-1][0] if found else after

    def files(self, job_id: str) -> dict[str, RunFile]:
        """Pictures and reports by name, the oldest first."""
        found = cast(dict[str, str], self._redis.hgetall(run_files_key(job_id)))
        files = {name: RunFile.model_validate_json(text) for name, text in found.items()}
        return dict(sorted(files.items(), key=lambda item: (item[1].at, item[0])))

    def file(self, job_id: str, name: str) -> bytes:
        """One of them. Raises ``ApiError`` 404."""
        if not self._redis.hexists(run_files_key(job_id), name):
            raise ApiError(404, "not_found", f"{job_id} has made no file {name[:64]!r}")
        try:
            return self._storage.read(sample_path(job_id, name))
        except FileNotFoundError:
            raise ApiError(404, "not_found", f"{name} of {job_id} is gone from the storage") from None

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """The latest of each stage, in order."""
        found = cast(dict[str, str], self._redis.hgetall(run_checkpoints_key(job_id)))
        return sorted(map(Checkpoint.model_validate_json, found.values()), key=lambda checkpoint: checkpoint.at)


def _check(param: str, got: str, known: Collection[str]) -> None:
    if got not in known:
        message = f"{param}: got {got[:64]!r}; there are {', '.join(known) or 'none'}"
        raise ApiError(422, f"unknown_{param}", message, param=param)


def _configuration(fields: DistillationFields) -> DistillConfig:
    """What the request comes down to. Raises ``ApiError`` 422, which names the field."""
    for path in fields.overrides:
        if path.startswith("gate."):
            param = f"overrides.{path}"
            raise ApiError(422, "invalid_override", f"{param}: limits of the gate belong into gate", param=param)
    limits = {f"gate.{path}": value for path, value in fields.gate.items()}
    try:
        return recipes.check(fields.recipe, fields.preset, {**fields.overrides, **limits})
    except ConfigError as error:
        path = error.field or ""
        param = path if path in limits else f"overrides.{path}"
        raise ApiError(422, "invalid_override", f"{param}: {error}", param=param) from None


def _recipe(name: str) -> RecipeView:
    whole = recipes.tunable(name, "full")
    others = {
        preset: {field.path: field.default for field in recipes.tunable(name, preset)}
        for preset in recipes.PRESETS
        if preset != "full"
    }
    fields = []
    for field in whole:
        differing = {preset: of[field.path] for preset, of in others.items() if of[field.path] != field.default}
        fields.append(RecipeField(**field.model_dump(), by_preset=differing))
    gate = "gate."
    return RecipeView(
        name=name,
        presets=list(recipes.PRESETS),
        stages=list(recipes.STAGES),
        fields=[field for field in fields if not field.path.startswith(gate)],
        gate_fields=[
            field.model_copy(update={"path": field.path.removeprefix(gate)})
            for field in fields
            if field.path.startswith(gate)
        ],
    )
